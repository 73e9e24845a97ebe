"""Result folders as a comparison leaves them, made up from simple curves so that every number can be checked by hand."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from coloss.lab.records import (
    ArmRecord,
    ComparisonRecord,
    ConflictPoint,
    Cost,
    HistoryPoint,
    TrialRecord,
    trial_path,
    write_record,
)

Values = Mapping[str, Sequence[float | None]]


def plan(values: Values, **changes: object) -> ComparisonRecord:
    fields: dict[str, object] = {
        "title": "Distillation on digits",
        "task": "digits",
        "arms": [
            ArmRecord(name=name, methods=[{"slug": name, "parameters": {"weight": 1.0}}]) for name in values
        ],
        "baseline": next(iter(values)),
        "seeds": list(range(max(map(len, values.values())))),
        "budget": {"epochs": 20.0},
        "metric": "accuracy",
        "target": 0.9,
        "options": {"batch_size": 64, "optimizer": "adamw"},
        "command": "coloss compare digits --methods dhkd,lsskd --seeds 3",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": {"processor": "a processor", "cores": "2"},
        "created": "2026-01-02 03:04 UTC",
    }
    return ComparisonRecord.model_validate(fields | changes)


def trial(
    record: ComparisonRecord, arm: str, seed: int, value: float, *, history: bool, conflicts: bool
) -> TrialRecord:
    number = [item.name for item in record.arms].index(arm)
    points, gradients = [], []
    for step in range(0, 301, 15) if history else ():
        progress = 1 - math.exp(-step / (60 + 12 * number + 5 * seed))
        terms = {"cross_entropy": 2.3 * (1 - 0.97 * progress)}
        if arm != record.baseline:
            terms["distillation"] = 1.4 * (1 - 0.8 * progress) + 0.02 * seed
        metrics = {record.metric: value * (0.1 + 0.9 * progress), "nll": 2.3 - 2 * progress}
        points.append(
            HistoryPoint(
                step=step,
                epoch=step // 15,
                seconds=step * (0.04 + 0.002 * number),
                terms=terms,
                metrics=metrics,
            )
        )
        if conflicts and arm != record.baseline:
            cosine = math.cos(step / 60 + number + 0.2 * seed) * 0.7
            gradients.append(
                ConflictPoint(
                    step=step,
                    cosine={"cross_entropy|distillation": cosine},
                    norm={"cross_entropy": 3 - 2 * progress, "distillation": 0.5 + 0.1 * seed},
                )
            )
    cost = Cost(
        seconds=12 + number + 0.3 * seed,
        prepare_seconds=0.0 if arm == record.baseline else 4.0,
        steps=300,
        steps_per_second=25.0 - number,
        peak_memory_mb=40.0 + 3 * number,
        parameters=12_345 + 100 * number,
        stored_bytes=50_000 - 10_000 * number,
    )
    return TrialRecord(
        arm=arm,
        seed=seed,
        fingerprint=record.fingerprint(),
        metrics={record.metric: value, "nll": 0.3 + 0.01 * seed},
        history=points,
        conflicts=gradients,
        cost=cost,
        time_to_target=6.0 + number if value >= 0.9 else None,
    )


@pytest.fixture
def results() -> Callable[..., tuple[ComparisonRecord, list[TrialRecord]]]:
    """Make a plan and its trials from arm -> value of each seed (None: unfinished); the first arm is the baseline."""

    def make(
        values: Values, *, history: bool = True, conflicts: bool = True, **changes: object
    ) -> tuple[ComparisonRecord, list[TrialRecord]]:
        record = plan(values, **changes)
        trials = [
            trial(record, arm, seed, value, history=history, conflicts=conflicts)
            for arm, found in values.items()
            for seed, value in enumerate(found)
            if value is not None
        ]
        return record, trials

    return make


@pytest.fixture
def result_folder(
    tmp_path: Path, results: Callable[..., tuple[ComparisonRecord, list[TrialRecord]]]
) -> Callable[..., Path]:
    """Store what `results` makes in a folder, as a comparison does."""

    def make(values: Values, **changes: object) -> Path:
        record, trials = results(values, **changes)
        write_record(tmp_path / "comparison.json", record)
        for found in trials:
            write_record(trial_path(tmp_path, found.arm, found.seed), found)
        return tmp_path

    return make
