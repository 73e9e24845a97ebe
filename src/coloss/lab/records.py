"""What a comparison leaves on disk: one JSON file for the comparison, one for each finished trial.

A result folder holds `comparison.json` (a `ComparisonRecord`) and `trials/<arm>--seed<k>.json` (a `TrialRecord` each). Every
file is written whole or not at all, so a comparison that was killed resumes at the first unfinished trial. Nothing here imports torch.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coloss.errors import InputError
from coloss.train.atomic_text import write_atomically as write_atomically


class Record(BaseModel):
    """A base for everything stored: unknown keys are refused, so a foreign file is noticed."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


R = TypeVar("R", bound=Record)


class HistoryPoint(Record):
    """One logged moment of training: the loss terms since the last point, and the metrics if it was an evaluation."""

    step: int
    epoch: int
    seconds: float = Field(description="training seconds so far, evaluation excluded")
    terms: dict[str, float] = Field(default_factory=dict, description="mean of each loss term, unweighted")
    metrics: dict[str, float] = Field(default_factory=dict)


class ConflictPoint(Record):
    """Gradient cosines ("first|second" -> cosine) and norms of the loss terms on shared parameters at one step."""

    step: int
    cosine: dict[str, float]
    norm: dict[str, float]


class Cost(Record):
    """What a trial cost. `prepare_seconds` is work before the training clock starts (a teacher, say)."""

    seconds: float
    prepare_seconds: float = 0.0
    steps: int
    steps_per_second: float
    peak_memory_mb: float | None = Field(
        default=None, description="peak resident memory above the start of training"
    )
    parameters: int = Field(description="parameters of the model as it ships")
    stored_bytes: int | None = Field(
        default=None, description="size of the shipped model's compressed file, see coloss.compression"
    )


class TrialRecord(Record):
    """One finished run of one arm with one seed."""

    arm: str
    seed: int
    fingerprint: str = Field(description="of the comparison it belongs to")
    metrics: dict[str, float] = Field(description="on test data, after `finish`")
    history: list[HistoryPoint] = Field(default_factory=list)
    conflicts: list[ConflictPoint] = Field(default_factory=list)
    cost: Cost
    time_to_target: float | None = Field(
        default=None, description="training seconds until the target metric was met"
    )


class ArmRecord(Record):
    """An arm as it is stored: its name and how to build it again."""

    name: str
    methods: list[dict[str, Any]] = Field(
        default_factory=list, description='[{"slug": ..., "parameters": {...}}]'
    )


class ComparisonRecord(Record):
    """The plan of a comparison; its fingerprint says whether two folders hold the same experiment."""

    kind: Literal["comparison", "claim"] = "comparison"
    title: str
    task: str
    arms: list[ArmRecord]
    baseline: str
    seeds: list[int]
    budget: dict[str, float]
    metric: str
    direction: Literal["higher", "lower"] = "higher"
    target: float | None = Field(
        default=None, description="metric value whose first crossing gives the time to target"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="everything else that changes the numbers"
    )
    command: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    created: str = ""

    def fingerprint(self) -> str:
        """Identify the experiment: equal for equal task, arms, budget, metric and options, whatever the seeds and the machine."""
        identity = self.model_dump(
            include={"kind", "task", "arms", "budget", "metric", "direction", "target", "options"}
        )
        identity["arms"] = sorted(identity["arms"], key=lambda arm: arm["name"])
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """List the versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for name in (
        "coloss",
        "torch",
        "lightning-fabric",
        "torchjd",
        "kornia",
        "scikit-learn",
        "scipy",
        "numpy",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, str]:
    """Describe the machine: processor, cores, system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = match.group(1).strip() if match else processor
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def write_record(path: Path, record: Record) -> None:
    """Store a record as JSON, atomically."""
    write_atomically(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path, kind: type[R]) -> R:
    """Load a record.

    Raises:
        InputError: if the file is missing, is not JSON or does not hold such a record; the message says which and what to do.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: is this the folder of a comparison?") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"{path} is damaged or not a {kind.__name__} ({first}); delete it to run it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def trial_path(folder: Path, arm: str, seed: int) -> Path:
    """Name the file of one trial; characters that a file system may refuse become '_'."""
    safe = re.sub(r"[^A-Za-z0-9.+=_-]", "_", arm)
    return folder / "trials" / f"{safe}--seed{seed}.json"


def read_comparison(folder: Path) -> tuple[ComparisonRecord, list[TrialRecord]]:
    """Load a comparison and its finished trials, in the order of arms and seeds; trials of other experiments are refused.

    Raises:
        InputError: if a file is missing, damaged or belongs to another experiment.
    """
    record = read_record(folder / "comparison.json", ComparisonRecord)
    fingerprint = record.fingerprint()
    trials = []
    for arm in record.arms:
        for seed in record.seeds:
            path = trial_path(folder, arm.name, seed)
            if path.exists():
                trial = read_record(path, TrialRecord)
                if trial.fingerprint != fingerprint:
                    raise InputError(
                        f"{path} belongs to another experiment than comparison.json; use another --out folder"
                    )
                trials.append(trial)
    return record, trials
