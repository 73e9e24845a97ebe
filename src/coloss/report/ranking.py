"""The arms of a comparison from best to worst, each beside the baseline over the seeds that both have run."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from coloss.lab.records import ComparisonRecord, TrialRecord
from coloss.metrics.statistics import paired_comparison

RowVerdict = Literal["baseline", "better", "worse", "not separable", "not compared"]


@dataclass(frozen=True)
class Row:
    """One arm: its values, how it stands to the baseline, what it cost (means over its finished seeds).

    Attributes:
        arm: its name.
        values: seed -> metric, for the finished trials.
        mean: of the values; NaN where nothing has finished or a value is not a finite number.
        sd: standard deviation over seeds (n - 1); None below two seeds or where the mean is NaN.
        failed: how many finished trials gave no finite metric.
        differences: seed -> arm - baseline, over the seeds both have; empty for the baseline itself.
        difference: mean of the differences; None where the arm is not compared.
        interval: 95% interval of the difference; None below two pairs.
        p_value: two-sided sign-flip p value.
        effect_size: mean difference over its standard deviation.
        verdict: "better" or "worse" where the interval excludes 0, else "not separable"; "not compared" where no
            seed is shared with the baseline or a shared seed has no finite metric: leaving a run that diverged out
            would flatter the arm.
        steps: optimizer steps.
        seconds: training time.
        prepare_seconds: time spent before the training clock starts.
        steps_per_second: training speed.
        peak_memory_mb: peak memory above the start of training; None where it was not measured.
        parameters: of the model as it ships.
        stored_bytes: size of its compressed file; None where it was not measured.
        time_to_target: mean training seconds to the target metric over the seeds that met it.
        reached: how many seeds met the target.
    """

    arm: str
    values: dict[int, float]
    mean: float
    sd: float | None
    failed: int
    differences: dict[int, float]
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    effect_size: float | None
    verdict: RowVerdict
    steps: float | None
    seconds: float | None
    prepare_seconds: float | None
    steps_per_second: float | None
    peak_memory_mb: float | None
    parameters: float | None
    stored_bytes: float | None
    time_to_target: float | None
    reached: int


def rank_arms(record: ComparisonRecord, trials: Sequence[TrialRecord]) -> list[Row]:
    """Order the arms from best to worst mean metric and compare each with the baseline, paired by seed.

    Args:
        record: the plan: arms, baseline, metric and its direction.
        trials: the finished trials, in any order; one without the metric counts as having no finite value.

    Returns:
        One row for each arm of the plan; arms whose mean is no number come last, in the order of the plan.

    Raises:
        ValueError: if a trial is of an arm that the plan does not have.

    Examples:
        >>> from coloss.lab.records import ArmRecord, Cost
        >>> plan = ComparisonRecord(
        ...     title="t",
        ...     task="digits",
        ...     arms=[ArmRecord(name="plain"), ArmRecord(name="dhkd")],
        ...     baseline="plain",
        ...     seeds=[0, 1],
        ...     budget={"epochs": 1},
        ...     metric="accuracy",
        ... )
        >>> cost = Cost(seconds=1, steps=10, steps_per_second=10, parameters=5)
        >>> trials = [
        ...     TrialRecord(arm=arm, seed=seed, fingerprint="", metrics={"accuracy": value}, cost=cost)
        ...     for arm, seed, value in [
        ...         ("plain", 0, 0.5),
        ...         ("plain", 1, 0.7),
        ...         ("dhkd", 0, 0.8),
        ...         ("dhkd", 1, 0.8),
        ...     ]
        ... ]
        >>> [(row.arm, row.mean, row.verdict) for row in rank_arms(plan, trials)]
        [('dhkd', 0.8, 'not separable'), ('plain', 0.6, 'baseline')]
    """
    by_arm: dict[str, list[TrialRecord]] = {arm.name: [] for arm in record.arms}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        if trial.arm not in by_arm:
            raise ValueError(f"trials must be of the plan's arms {list(by_arm)}, got one of {trial.arm!r}")
        by_arm[trial.arm].append(trial)
    values = {
        arm: {trial.seed: trial.metrics.get(record.metric, math.nan) for trial in found}
        for arm, found in by_arm.items()
    }
    rows = [_row(record, arm, by_arm[arm], values[arm], values.get(record.baseline, {})) for arm in by_arm]
    sign = -1 if record.direction == "higher" else 1
    return sorted(
        rows, key=lambda row: (math.isnan(row.mean), 0 if math.isnan(row.mean) else sign * row.mean)
    )


def _row(
    record: ComparisonRecord,
    arm: str,
    trials: list[TrialRecord],
    values: dict[int, float],
    baseline: dict[int, float],
) -> Row:
    failed = sum(not math.isfinite(value) for value in values.values())
    complete = values and not failed
    shared = [] if arm == record.baseline else [seed for seed in values if seed in baseline]
    differences = {seed: values[seed] - baseline[seed] for seed in shared}
    compared = bool(differences) and all(map(math.isfinite, differences.values()))
    paired = (
        paired_comparison(
            [values[seed] for seed in shared], [baseline[seed] for seed in shared], direction=record.direction
        )
        if compared
        else None
    )
    verdict: RowVerdict = "baseline" if arm == record.baseline else "not compared"
    if paired is not None:
        found: dict[str, RowVerdict] = {"reproduced": "better", "contradicted": "worse"}
        verdict = found.get(paired.verdict, "not separable")
    costs = [trial.cost for trial in trials]
    times = [trial.time_to_target for trial in trials if trial.time_to_target is not None]
    return Row(
        arm=arm,
        values=values,
        mean=statistics.fmean(values.values()) if complete else math.nan,
        sd=statistics.stdev(values.values()) if complete and len(values) > 1 else None,
        failed=failed,
        differences=differences,
        difference=paired.difference if paired else None,
        interval=paired.interval if paired else None,
        p_value=paired.p_value if paired else None,
        effect_size=paired.effect_size if paired else None,
        verdict=verdict,
        steps=_mean(cost.steps for cost in costs),
        seconds=_mean(cost.seconds for cost in costs),
        prepare_seconds=_mean(cost.prepare_seconds for cost in costs),
        steps_per_second=_mean(cost.steps_per_second for cost in costs),
        peak_memory_mb=_mean(cost.peak_memory_mb for cost in costs if cost.peak_memory_mb is not None),
        parameters=_mean(cost.parameters for cost in costs),
        stored_bytes=_mean(cost.stored_bytes for cost in costs if cost.stored_bytes is not None),
        time_to_target=_mean(times),
        reached=len(times),
    )


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.fmean(found) if found else None
