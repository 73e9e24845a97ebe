"""Arms as a person types them, `dhkd+trp:energy=0.8`, turned into methods; whatever cannot work is refused at once."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from coloss.data.text import import_callable
from coloss.errors import InputError, UnknownNameError, suggest_names
from coloss.lab.catalog import RUN_FLAGS, catalog, find_entry, import_name
from coloss.lab.records import ArmRecord, trial_path
from coloss.train.method import Method
from coloss.train.system import Arm
from coloss.train.task import Setting, Task

LONGEST_NAME = 120
"""Characters in an arm's name at most: it becomes a file name."""

_WORDS: Mapping[str, Any] = {"true": True, "false": False, "none": None, "null": None}


def split_arms(text: str) -> list[str]:
    """Arms from one comma-separated text; commas within brackets or quotes belong to a parameter.

    Examples:
        >>> split_arms('cross-entropy, trp:layers=["a","b"]:every=5')
        ['cross-entropy', 'trp:layers=["a","b"]:every=5']
    """
    return [part.strip() for part in _split(text, ",")]


def parse_arm(text: str, task: Task) -> ArmRecord:
    """Read an arm as a person types it: "dhkd", "dhkd+trp", "trp:energy=0.8:every=10", or the task's own objective.

    A method of one's own goes by its import path, "package.module:Class:weight=0.5"; modules in the current folder are found too.

    Raises:
        InputError: if a slug or parameter is unknown or of a wrong type, or the method does not fit the task.

    Examples:
        >>> from coloss.lab.tasks import find_task
        >>> parse_arm("trp:energy=0.8:decompose=false", find_task("iris")).methods
        [{'slug': 'trp', 'parameters': {'energy': 0.8, 'decompose': False}}]
    """
    methods: list[dict[str, Any]] = []
    for part in _split(text, "+"):
        slug, *settings = _split(part.strip(), ":")
        slug = slug.strip()
        if settings and settings[0].strip().isidentifier() and _is_module(slug):
            slug = f"{slug}:{settings.pop(0).strip()}"
        if not slug:
            raise InputError(f"an arm must name methods, like dhkd or dhkd+trp, got {text!r}")
        if slug == task.objective_name:
            if settings:
                raise InputError(f"{slug} takes no parameters, got {':'.join(settings)!r}")
            continue
        check_fits(slug, task)
        parameters = _read_parameters(settings, text)
        check_parameters(slug, parameters)
        methods.append({"slug": slug, "parameters": parameters})
    return ArmRecord(name=text.strip(), methods=methods)


def _read_parameters(settings: list[str], text: str) -> dict[str, Any]:
    written: list[tuple[str, str]] = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if equals and name.strip().isidentifier():
            written.append((name.strip(), value))
        elif written:  # a colon within a value, such as a path
            written[-1] = (written[-1][0], f"{written[-1][1]}:{setting}")
        else:
            raise InputError(f"a parameter must look like name=value, got {setting!r} in {text!r}")
    names = [name for name, _ in written]
    if len(set(names)) < len(names):
        raise InputError(f"a parameter may be given once, got {', '.join(names)} in {text!r}")
    return {name: read_value(value.strip()) for name, value in written}


def read_value(text: str) -> Any:
    """A parameter's value: JSON if it is that (number, list, quoted text), true / false / none in any case, else text.

    Examples:
        >>> read_value("0.8"), read_value("False"), read_value("[1, 2]"), read_value("spatial")
        (0.8, False, [1, 2], 'spatial')
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def check_arms(records: list[ArmRecord]) -> None:
    """Refuse arms whose names, or the file names made of them, are equal or too long.

    Raises:
        InputError: naming them.
    """
    names = [record.name for record in records]
    if not names:
        raise InputError("a comparison needs at least one arm, got none")
    files = {trial_path(Path(), name, 0).name.lower() for name in names}
    if len(files) < len(names):
        raise InputError(f"arms must have names that differ in letters or digits, got {', '.join(names)}")
    for name in names:
        if not name.strip() or len(name) > LONGEST_NAME:
            raise InputError(
                f"an arm's name must have 1 to {LONGEST_NAME} characters, got {len(name)}: {name[:40]!r} ..."
            )


def check_fits(slug: str, task: Task) -> None:
    """Refuse a method that is not made for the task's kind; one given by import path is taken to fit.

    Raises:
        InputError: naming the kinds it is made for, and for unknown slugs.
    """
    known = [entry.slug for entry in catalog()]
    if ":" in slug:
        method_class(slug)
        return
    if slug not in known:
        choices = [task.objective_name, *(entry.slug for entry in catalog() if task.kind in entry.kinds)]
        raise UnknownNameError(
            f"no method named {slug!r}{suggest_names(slug, [task.objective_name, *known])} (for this task: {', '.join(choices)})"
        )
    method_class(slug)
    kinds = find_entry(slug).kinds
    if task.kind not in kinds:
        raise InputError(f"{slug} is made for {' and '.join(kinds)} tasks, {task.name} is a {task.kind} task")


def check_parameters(slug: str, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that a method does not have, or whose values are of another type than it takes.

    Raises:
        InputError: naming the parameter, and close names or the type.
    """
    _check_values(slug, _parameters(method_class(slug)), parameters)


def read_options(slug: str, recipe: Callable[..., Any], written: Sequence[str]) -> dict[str, Any]:
    """Options of a complete system's recipe as a user writes them, beside those that `coloss run` has a flag for.

    Args:
        slug: the system's, for messages.
        recipe: its function.
        written: texts like "size=paper".

    Raises:
        InputError: for a text of another form, a name given twice, an option that the recipe lacks or that has a flag, or a value of
            another type than it takes.

    Examples:
        >>> def recipe(data, folder, *, budget=None, seed=0, progress=None, size: str = "small"): ...
        >>> read_options("mine", recipe, ["size=paper"])
        {'size': 'paper'}
    """
    pairs = [_read_parameters([text], text) for text in written]
    names = [name for pair in pairs for name in pair]
    if len(set(names)) < len(names):
        raise InputError(f"an option may be set once, got {', '.join(names)}")
    options = {name: value for pair in pairs for name, value in pair.items()}
    known = {name: kind for name, kind in _hints(recipe).items() if name not in RUN_FLAGS}
    _check_values(slug, known, options)
    return options


def _check_values(slug: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in known:
            raise InputError(
                f"{slug} has no parameter {name!r}{suggest_names(name, known)} (it has: {', '.join(sorted(known)) or 'none'})"
            )
        if not _accepts(known[name], value):
            raise InputError(f"{name} of {slug} must be {_type_text(known[name])}, got {value!r}")


def method_class(slug: str) -> type[Method]:
    """The Method that a slug, or an import path "package.module:Class", names.

    Raises:
        InputError: if the system has none, or the path names no Method.

    Examples:
        >>> method_class("coloss.jepa:VICReg").__name__
        'VICReg'
    """
    if ":" in slug:
        found = import_callable(slug)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError(f"{slug} must be a class derived from coloss.Method, got {found!r}")
        return found
    entry = find_entry(slug)
    if entry.method is None:
        raise InputError(f"{slug} does not act during training, so it cannot be an arm (coloss show {slug})")
    return import_name(entry.method)


def build_arm(record: ArmRecord) -> Arm:
    """An arm from the slugs and parameters of its methods."""
    return Arm(record.name, methods=lambda setting: [_build_method(spec, setting) for spec in record.methods])


def _build_method(spec: Mapping[str, Any], setting: Setting) -> Method:
    try:
        return method_class(spec["slug"]).for_setting(setting, **spec.get("parameters", {}))
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _is_module(name: str) -> bool:
    """Whether the first part of an arm stands for a module, not for a slug: it has a dot, or is a file in the current folder."""
    return "." in name or Path(f"{name}.py").is_file()


def _parameters(method: type[Method]) -> dict[str, Any]:
    """Names and annotations of what can be given to a method: of `for_setting`, and what that passes on to the constructor."""
    found: dict[str, Any] = {}
    for function in (method.for_setting, method.__init__):
        for name, kind in _hints(function).items():
            if name not in ("self", "setting"):
                found.setdefault(name, kind)
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters that have a name."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker imports
        hints = {}
    parameters = inspect.signature(function).parameters.items()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: hints.get(name, Any) for name, parameter in parameters if parameter.kind not in variable}


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        adapter: TypeAdapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, TypeError):  # no type that can be checked
        return True
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    text = inspect.formatannotation(annotation)
    for prefix in ("typing.", "collections.abc.", "torch.nn.modules.module.", "torch."):
        text = text.replace(prefix, "")
    return text


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that stand outside brackets and quotes; a `+` within a number is none."""
    parts, depth, quoted, start = [], 0, False, 0
    for position, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "([{") - (character in ")]}")
            in_number = separator == "+" and text[position + 1 : position + 2].isdigit()
            if character == separator and depth == 0 and not in_number:
                parts.append(text[start:position])
                start = position + 1
    return [*parts, text[start:]]
