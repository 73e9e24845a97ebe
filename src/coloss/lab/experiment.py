"""A comparison described in a YAML file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coloss.errors import InputError, suggest_names
from coloss.lab.known_tasks import TaskKind, task_names


class Experiment(BaseModel):
    """What an experiment file may hold; every entry but `task` and `methods` may be left out.

    ```yaml
    task: digits                # a task, hf:NAME, or a path to CSV / parquet / npz / image folder, relative to this file
    methods:                    # the arms, as after --methods; also in one line: cross-entropy, trp
      - cross-entropy           # the task's own objective
      - trp:energy=0.8:every=10
      - dhkd+trp
    seeds: 5                    # paired runs of each arm: seeds 0 to 4
    budget: 60s                 # of each arm: 60s, 2m, 300steps, 20epochs; default: the task's
    baseline: cross-entropy     # default: the task's own objective if it takes part, else the first arm
    metric: accuracy            # what decides; default: the task's
    direction: higher           # or lower; default: known for the metric
    reach: 0.95                 # metric value; the training time until it is reached is recorded
    target: species             # column to predict, for tables
    kind: classification        # or regression, where the guess by the target's values is wrong; self-supervised to learn without labels;
                                # ranking or next-item for users and items; token-retrieval for captions and images
    model: mymodels:build       # import path of a callable (splits -> module); found from the current folder
    text_features: tfidf        # or hashing, or the import path of an encoder
    limit: 1000                 # use so many samples of each part at most
    label_noise: 0.4            # share of wrong labels in training and validation data, for classification; test data stay clean
    noise_kind: symmetric       # or pairwise
    imbalance: 0.05             # rarest class's share of the most frequent one there, for classification
    imbalance_kind: long-tailed # or step
    logger: csv                 # or tensorboard, mlflow: in the folder logs beside the results
    out: runs/digits            # result folder, relative to the current folder; the same one goes on where a stopped run ended
    ```

    Examples:
        >>> Experiment.model_validate({"task": "digits", "methods": "cross-entropy, trp:energy=0.8"}).methods
        ['cross-entropy', 'trp:energy=0.8']
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    methods: list[str] = Field(min_length=1)
    seeds: int = Field(5, ge=1)
    budget: str | None = None
    target: str | None = None
    kind: TaskKind | None = None
    baseline: str | None = None
    metric: str | None = None
    direction: Literal["higher", "lower"] | None = None
    reach: float | None = None
    model: str | None = None
    text_features: str | None = None
    limit: int | None = Field(None, ge=1)
    label_noise: float | None = Field(None, ge=0, le=1)
    noise_kind: Literal["symmetric", "pairwise"] | None = None
    imbalance: float | None = Field(None, gt=0, le=1)
    imbalance_kind: Literal["long-tailed", "step"] | None = None
    logger: str | None = None
    out: str | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from coloss.lab.arms import split_arms

        return split_arms(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        # A bare number is left to the reader of budgets, who says that a unit is missing.
        return str(value) if isinstance(value, int | float) else value


def read_experiment(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Read an experiment file; what was typed on the command line wins over the file.

    Args:
        path: of the file; a relative `task` path in it is relative to the file.
        given: options from the command line.

    Raises:
        InputError: if the file is missing, is not YAML, or holds an unknown or wrong entry.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "experiment.yaml"
        >>> _ = path.write_text("task: digits\\nmethods: [cross-entropy, trp]\\n")
        >>> read_experiment(path, {"seeds": 3})
        {'task': 'digits', 'methods': ['cross-entropy', 'trp'], 'seeds': 3}
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no experiment file {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold entries like 'task: digits', got {type(content).__name__}")
    for name in content:
        if name not in Experiment.model_fields:
            known = ", ".join(Experiment.model_fields)
            raise InputError(
                f"{path} has an unknown entry {name!r}{suggest_names(str(name), Experiment.model_fields)} (there are {known})"
            )
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InputError(f"{path}: {place}: {first['msg']}{got}") from error
    beside = path.parent / experiment.task
    if experiment.task not in task_names() and beside.exists():
        experiment.task = str(beside)
    typed = {name: value for name, value in given.items() if name != "task"}
    return experiment.model_dump(exclude_none=True) | typed
