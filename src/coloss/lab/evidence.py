"""What `coloss verify` measured, on disk: one JSON file for each system. Nothing here imports torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from coloss.errors import InputError
from coloss.lab.records import write_atomically

PACKAGE = Path(__file__).resolve().parents[1]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Side(_Stored):
    """One of the two arms that the verdict is about: its deciding metric over the seeds."""

    name: str
    mean: float
    values: list[float]


class Spread(_Stored):
    """One metric of one arm over the seeds; None where it was no finite number."""

    mean: float | None
    values: list[float | None]


class ArmSummary(_Stored):
    """Everything measured of one arm; times are means over seeds."""

    metrics: dict[str, Spread]
    seconds: float
    prepare_seconds: float
    steps_per_second: float
    parameters: int


class Evidence(_Stored):
    """The outcome of one claim: who was compared on what, every value, the verdict, and how to make it again."""

    slug: str
    statement: str
    verdict: Literal["reproduced", "contradicted", "inconclusive"]
    metric: str
    direction: Literal["higher", "lower"]
    seeds: list[int]
    baseline: Side
    method: Side
    difference: float
    interval: tuple[float, float]
    p_value: float
    effect_size: float | None
    arms: dict[str, ArmSummary]
    task: str
    budget: dict[str, float]
    tried: str
    seconds: float
    command: str
    versions: dict[str, str]
    machine: dict[str, str]
    created: str


def evidence_folder() -> Path:
    """Where evidence lives: the project's `evidence` folder in a checkout, else the copy inside the installed package."""
    checkout = PACKAGE.parents[1]
    if (checkout / "pyproject.toml").exists() and PACKAGE.parent.name == "src":
        return checkout / "evidence"
    return PACKAGE / "evidence"


def read_evidence(slug: str) -> dict[str, Any] | None:
    """What was measured for a system, as the fields of `Evidence`, or None if nothing was.

    Raises:
        InputError: if the file is damaged; the message says which and how to make it anew.

    Examples:
        >>> read_evidence("no-such-system") is None
        True
    """
    path = evidence_folder() / f"{slug}.json"
    try:
        return Evidence.model_validate_json(path.read_bytes()).model_dump(mode="json")
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        else:
            reason = error.strerror or str(error)
        raise InputError(f"{path} is damaged ({reason}); make it anew with: coloss verify {slug}") from error


def write_evidence(folder: Path, evidence: Evidence) -> Path:
    """Store evidence as `<folder>/<slug>.json`, whole or not at all.

    Raises:
        InputError: if the folder cannot be written.
    """
    path = folder / f"{evidence.slug}.json"
    write_atomically(path, evidence.model_dump_json(indent=1) + "\n")
    return path
