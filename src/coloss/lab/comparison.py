"""Arms against each other on one task: same data, same budget, same seeds."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coloss.errors import InputError, suggest_names
from coloss.lab.arms import build_arm, check_arms, parse_arm
from coloss.lab.directions import Direction, metric_direction
from coloss.lab.known_tasks import is_file
from coloss.lab.loggers import check_logger
from coloss.lab.records import (
    ArmRecord,
    ComparisonRecord,
    TrialRecord,
    machine,
    read_comparison,
    read_record,
    trial_path,
    versions,
    write_record,
)
from coloss.lab.tasks import content_hash, find_task
from coloss.lab.trials import Logs, Outcome, attempt_arm, rehearse
from coloss.lab.workers import Report, check_workers, in_processes, in_ray
from coloss.train.budget import Budget
from coloss.train.system import Arm
from coloss.train.task import Task


@dataclass(frozen=True)
class Result:
    """A comparison that has run.

    Attributes:
        folder: where it is stored.
        record: its plan.
        trials: its finished trials; one that diverged has NaN for the metric.
        failures: why trials gave no finite metric, by (arm, seed); empty if all went well.
    """

    folder: Path
    record: ComparisonRecord
    trials: list[TrialRecord]
    failures: dict[tuple[str, int], str] = field(default_factory=dict)

    def values(self, arm: str, metric: str | None = None) -> list[float]:
        """One metric of an arm, by seed; NaN where a trial does not have it.

        Raises:
            InputError: if there is no such arm.
        """
        names = [known.name for known in self.record.arms]
        if arm not in names:
            raise InputError(
                f"no arm named {arm!r}{suggest_names(arm, names)} (there are {', '.join(names)})"
            )
        name = metric or self.record.metric
        return [trial.metrics.get(name, math.nan) for trial in self.trials if trial.arm == arm]


class Comparison:
    """Trains every arm with every seed on one task, and keeps each finished trial.

    Args:
        task: a `Task`, or the name of one, or a path to data.
        arms: slugs ("dhkd"), sums of slugs ("dhkd+trp"), slugs with parameters ("trp:energy=0.8:every=10"), the name of the task's own
            objective ("cross-entropy"), or `Arm` objects.
        seeds: a number of seeds (0, 1, ...) or a list.
        budget: of each arm; default: the task's.
        baseline: the arm that the others are held against; default: the task's own objective if it takes part, else the first arm.
        metric: what decides; default: the task's.
        direction: whether the metric is better "higher" or "lower"; default: the task's for its own metric, else by the metric's name.
        reach: metric value whose first crossing is timed.
        logger: "csv", "tensorboard" or "mlflow", written to `logs` in the result folder.
        command: what to show as the command that made it.
        options: what `find_task` takes (`target`, `kind`, `model`, `text_features`, `limit`, `label_noise`, `imbalance` ...), for tasks given by name.

    Raises:
        InputError: for unknown tasks, methods or parameters, a method that does not fit the task, or no arm.

    Examples:
        >>> import tempfile
        >>> comparison = Comparison("iris", ["cross-entropy", "trp"], seeds=2, budget=Budget(steps=4))
        >>> result = comparison.run(tempfile.mkdtemp())
        >>> len(result.trials), len(result.values("trp"))
        (4, 2)
    """

    def __init__(
        self,
        task: Task | str,
        arms: Sequence[str | Arm],
        *,
        seeds: int | Iterable[int] = 5,
        budget: Budget | None = None,
        baseline: str | None = None,
        metric: str | None = None,
        direction: Direction | None = None,
        reach: float | None = None,
        logger: str | None = None,
        command: str = "",
        **options: Any,
    ):
        numbers = _check_seeds(seeds)
        self.logger = check_logger(logger) if logger is not None else None
        if direction not in (None, "higher", "lower"):
            raise InputError(f"direction must be higher or lower, got {direction!r}")
        if reach is not None and not math.isfinite(reach):
            raise InputError(f"reach must be a finite number, got {reach}")
        stored: dict[str, Any] = {}
        if isinstance(task, str):
            options = {name: value for name, value in options.items() if value is not None}
            _check_options(options)
            if is_file(task):
                path = Path(task).expanduser().resolve()
                task = str(path)
                stored["data"] = content_hash(path)
            self.task = find_task(task, **options)
            self.named = all(isinstance(arm, str) for arm in arms)
        else:
            if options:
                raise InputError(f"{', '.join(options)} can be given for a task by name only")
            self.task, self.named = task, False
        records = [
            parse_arm(arm, self.task) if isinstance(arm, str) else ArmRecord(name=arm.name) for arm in arms
        ]
        check_arms(records)
        self.arms = [build_arm(r) if isinstance(arm, str) else arm for r, arm in zip(records, arms)]
        names = [record.name for record in records]
        if baseline is None:
            baseline = self.task.objective_name if self.task.objective_name in names else names[0]
        if baseline not in names:
            raise InputError(
                f"baseline must be one of the arms ({', '.join(names)}), got {baseline!r}{suggest_names(baseline, names)}"
            )
        own = metric in (None, self.task.metric)
        self.record = ComparisonRecord(
            title=self.task.title,
            task=self.task.name,
            arms=records,
            baseline=baseline,
            seeds=numbers,
            budget=(budget or self.task.budget).as_dict(),
            metric=metric or self.task.metric,
            direction=direction or (self.task.direction if own else metric_direction(metric or "")),
            target=reach,
            options=stored | {"task": options},
            command=command,
            versions=versions(),
            machine=machine(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def run(
        self, folder: str | Path, *, workers: int = 1, ray: str | None = None, report: Report | None = None
    ) -> Result:
        """Run all trials that the folder does not hold yet; each is stored as soon as it is finished.

        Before anything is trained each arm takes one step on trial, so that what cannot work is refused at once. A trial that diverges is
        stored with NaN and the others go on.

        Args:
            folder: of the results; the same folder continues a comparison that was stopped.
            workers: processes to spread trials over; 1 runs them here. A script of your own then needs the usual
                `if __name__ == "__main__":` around it.
            ray: address of a Ray cluster ("auto", "local"), in place of processes.
            report: called with (arm, seed, share done).

        Raises:
            InputError: if the folder holds another experiment, a damaged file, or cannot be written; if a method or a model does not work,
                or the task does not give the metric.
        """
        check_workers(workers)
        if not self.named and (workers > 1 or ray is not None):
            raise InputError(
                "workers > 1 and ray need a task and arms given by name (processes build them anew)"
            )
        folder = Path(folder)
        record = self._join(folder)
        there = {(trial.arm, trial.seed) for trial in _finished(folder, record)}
        todo = [
            (arm.name, seed)
            for seed in self.record.seeds
            for arm in self.arms
            if (arm.name, seed) not in there
        ]
        for arm in self.arms if todo else ():
            rehearse(record, self.task, arm, judge=arm is self.arms[0])
        write_record(folder / "comparison.json", record)
        if report is not None:
            for arm_name, seed in there:
                report(arm_name, seed, 1.0)
        failures = {}
        for outcome in self._stream(record, todo, folder, workers, ray, report):
            for trial in outcome.trials:
                write_record(trial_path(folder, trial.arm, trial.seed), trial)
                if outcome.failure is not None:
                    failures[trial.arm, trial.seed] = outcome.failure
                if report is not None:
                    report(trial.arm, trial.seed, 1.0)
        record, trials = read_comparison(folder)
        for trial in trials:
            if not math.isfinite(trial.metrics.get(record.metric, math.nan)):
                file = trial_path(folder, trial.arm, trial.seed)
                reason = (
                    f"{trial.arm}, seed {trial.seed}: diverged when it was run (to try again delete {file})"
                )
                failures.setdefault((trial.arm, trial.seed), reason)
        return Result(folder, record, trials, failures)

    def _stream(
        self,
        record: ComparisonRecord,
        todo: Sequence[tuple[str, int]],
        folder: Path,
        workers: int,
        ray: str | None,
        report: Report | None,
    ) -> Iterator[Outcome]:
        logs = (self.logger, str((folder / "logs").resolve())) if self.logger is not None else None
        if ray is not None:
            return in_ray(record, todo, ray, logs)
        if workers > 1:
            return in_processes(record, todo, workers, logs, report)
        return self._here(record, todo, logs, report)

    def _here(
        self,
        record: ComparisonRecord,
        todo: Sequence[tuple[str, int]],
        logs: Logs | None,
        report: Report | None,
    ) -> Iterator[Outcome]:
        for arm_name, seed in todo:
            arm = next(arm for arm in self.arms if arm.name == arm_name)

            def progress(share: float, arm_name: str = arm_name, seed: int = seed) -> None:
                if report is not None:
                    report(arm_name, seed, min(share, 0.999))

            progress(0.0)
            yield attempt_arm(record, self.task, arm, seed, logs=logs, progress=progress)

    def _join(self, folder: Path) -> ComparisonRecord:
        """The plan to store: this one, or the stored one of the same experiment with this one's seeds added."""
        if not (folder / "comparison.json").exists() or not any((folder / "trials").glob("*.json")):
            return self.record
        stored = read_record(folder / "comparison.json", ComparisonRecord)
        if stored.fingerprint() != self.record.fingerprint():
            raise InputError(
                f"{folder} holds another comparison ({_differences(stored, self.record)}); choose another --out folder"
            )
        seeds = sorted({*stored.seeds, *self.record.seeds})
        return self.record.model_copy(update={"created": stored.created, "seeds": seeds})


def _finished(folder: Path, record: ComparisonRecord) -> list[TrialRecord]:
    stored = (folder / "comparison.json").exists()
    return [trial for trial in read_comparison(folder)[1] if trial.seed in record.seeds] if stored else []


def _check_seeds(seeds: int | Iterable[int]) -> list[int]:
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if len(set(numbers)) < len(numbers) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise InputError(f"seeds must be different whole numbers >= 0, got {numbers}")
    return numbers


def _check_options(options: dict[str, Any]) -> None:
    """Options are stored, so that processes can build the task anew."""
    for name, value in options.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise InputError(
                f"{name} must be text or a number (an import path, for a function), got {type(value).__name__}"
            ) from error


def _differences(stored: ComparisonRecord, new: ComparisonRecord) -> str:
    """Where two plans differ: "budget {'steps': 300}, now {'steps': 20}"."""
    found = []
    for name in ("kind", "task", "arms", "budget", "metric", "direction", "target", "options"):
        before, now = getattr(stored, name), getattr(new, name)
        if name == "arms":
            before, now = (", ".join(sorted(arm.name for arm in arms)) for arms in (before, now))
        if name == "options" and before.get("data") != now.get("data"):
            found.append("the data have changed")
        elif before != now:
            found.append(f"{name} {before}, now {now}")
    return "; ".join(found) or "arms of the same names, built otherwise"
