"""The list of systems, read from the source of their rooms without importing them (no torch)."""

import ast
import importlib
import inspect
import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from coloss.errors import InputError, UnknownNameError, suggest_names
from coloss.lab.evidence import read_evidence
from coloss.lab.room_examples import room_example

PACKAGE = Path(__file__).resolve().parents[1]
FAMILIES = (
    "classification",
    "contrastive",
    "retrieval",
    "jepa",
    "multimodal",
    "distillation",
    "compression",
    "adapters",
    "language",
    "openworld",
    "shift",
    "motion",
    "perception",
    "generation",
    "signals",
)

# Parsing every room in full would take over a second for the whole catalog; these two pieces are enough.
_DOCSTRING = re.compile(r'\A\s*(r?"""(?:[^"\\]|\\.|"(?!""))*""")', re.DOTALL)
_SYSTEM = re.compile(r"^SYSTEM = System\($.*?^\)$", re.DOTALL | re.MULTILINE)
_CLAIM = re.compile(r"^CLAIM\b", re.MULTILINE)
_PROFILE = re.compile(r"^PROFILE\b", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One system of the catalog: what its `SYSTEM` says, where it lives, its docstring, and what was measured."""

    slug: str
    title: str
    paper: str
    family: str
    acts_on: tuple[str, ...]
    api: tuple[str, ...]
    module: str
    docstring: str
    method: str | None = None
    kinds: tuple[str, ...] = ()
    recipe: str | None = None
    compare: str | None = None
    has_claim: bool = False
    has_profile: bool = False

    @property
    def evidence(self) -> dict[str, Any] | None:
        """What `coloss verify` measured, or None."""
        return read_evidence(self.slug)

    @property
    def summary(self) -> str:
        """The first line of the room's docstring."""
        return self.docstring.splitlines()[0] if self.docstring else self.title

    @property
    def example(self) -> str:
        """The code example of its method, or else of the first public name that has one; empty if none has."""
        family = PACKAGE / self.family
        places = {**_homes(family / "__init__.py"), None: self.module.rpartition(".")[2]}
        names = [path.rpartition(".")[2] for path in (self.method, *self.api, self.recipe) if path]
        for name in names:
            # In the room itself, or in the module beside it that the family takes the name from.
            for module in dict.fromkeys((places[None], places.get(name))):
                found = module and room_example(
                    family / f"{module}.py", f"coloss.{self.family}.{module}", [name]
                )
                if found:
                    return found
        return ""

    @property
    def options(self) -> dict[str, str]:
        """What `coloss run --set` can set, and the defaults as they would be typed, read from the source of its recipe; empty without one."""
        if self.recipe is None:
            return {}
        family, name = PACKAGE / self.family, self.recipe.rpartition(".")[2]
        module = _homes(family / "__init__.py").get(name, self.module.rpartition(".")[2])
        for node in ast.parse((family / f"{module}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults)
                given = {argument.arg: _typed(value) for argument, value in pairs if value is not None}
                return {key: text for key, text in given.items() if key not in RUN_FLAGS}
        return {}

    def as_json(self) -> dict[str, Any]:
        """The entry as `coloss list --json` prints it."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "docstring"}
        return found | {"summary": self.summary, "evidence": self.evidence}


RUN_FLAGS = ("data", "folder", "budget", "seed", "progress")
"""Arguments of a complete system's recipe for which `coloss run` has flags, or a bar."""


@cache
def catalog() -> tuple[Entry, ...]:
    """All systems of the installed package, by family and slug.

    Raises:
        InputError: if a room's `SYSTEM` cannot be read.

    Examples:
        >>> "dhkd" in {entry.slug for entry in catalog()}
        True
    """
    rooms = ((path, family) for family in FAMILIES for path in sorted((PACKAGE / family).glob("*.py")))
    found = [entry for path, family in rooms if (entry := read_room(path, family)) is not None]
    return tuple(sorted(found, key=lambda entry: (FAMILIES.index(entry.family), entry.slug)))


def find_entry(slug: str) -> Entry:
    """Look one system up.

    Raises:
        UnknownNameError: if there is none of that name; close names are suggested.

    Examples:
        >>> find_entry("trp").family
        'compression'
    """
    known = {entry.slug: entry for entry in catalog()}
    if slug not in known:
        raise UnknownNameError(
            f"no system named {slug!r}{suggest_names(slug, sorted(known))} (coloss list shows all)"
        )
    return known[slug]


def import_name(path: str) -> Any:
    """Import `package.module.name`.

    Raises:
        InputError: if there is no such thing.

    Examples:
        >>> import_name("json.dumps")([1])
        '[1]'
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot import {path!r}: {error}") from error


@cache
def _typed(default: ast.expr) -> str:
    """A default value as a user types it."""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


def _homes(init: Path) -> dict[str | None, str]:
    """Modules of a family that its `__init__` takes names from, by name."""
    tree = ast.parse(init.read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None
        for alias in node.names
    }


def read_room(path: Path, family: str) -> Entry | None:
    """The catalog entry of a room's source file, or None if it declares no system.

    Raises:
        InputError: if `SYSTEM` holds anything but literal values, or other fields than a `System` has.

    Examples:
        >>> read_room(PACKAGE / "compression" / "trained_rank_pruning.py", "compression").slug
        'trp'
    """
    source = path.read_text(encoding="utf-8")
    declaration = _SYSTEM.search(source)
    if declaration is None:
        return None
    docstring = _DOCSTRING.match(source)
    try:
        (statement,) = ast.parse(declaration.group()).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        declared = {k.arg: ast.literal_eval(k.value) for k in statement.value.keywords if k.arg}
        if declared.get("family") != family:
            raise ValueError(f"family must be {family!r} as the folder is, got {declared.get('family')!r}")
        return Entry(
            **declared,
            module=f"coloss.{family}.{path.stem}",
            docstring=inspect.cleandoc(ast.literal_eval(docstring.group(1))) if docstring else "",
            has_claim=_CLAIM.search(source) is not None,
            has_profile=_PROFILE.search(source) is not None,
        )
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(
            f"SYSTEM in {path} must hold the fields of System as literal values: {error}"
        ) from error
