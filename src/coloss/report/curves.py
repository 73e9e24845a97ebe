"""What training looked like over time, with the seeds of an arm laid over each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coloss.lab.records import TrialRecord

Group = Literal["metrics", "terms"]
Axis = Literal["seconds", "steps"]

GRID_POINTS = 120
"""Points of the common grid where the seeds of an arm were not logged at the same steps."""

MOST_COLUMNS = 240
"""Columns of a conflict map; longer runs are averaged in even stretches."""


@dataclass(frozen=True)
class Curve:
    """One quantity of one arm over training: mean, lowest and highest over its seeds at each point."""

    arm: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


@dataclass(frozen=True)
class PairConflict:
    """How the gradients of two loss terms of one arm met, over all steps looked at and all seeds.

    Attributes:
        arm: the arm.
        first: one term.
        second: the other term.
        cosine: mean cosine of their gradients; NaN where it was never defined.
        opposed: share of the looks at which the cosine was negative; NaN where it was never defined.
        ratio: geometric mean of the first gradient's norm over the second's; NaN where it was never defined.
        looks: how often the cosine was defined.
    """

    arm: str
    first: str
    second: str
    cosine: float
    opposed: float
    ratio: float
    looks: int


@dataclass(frozen=True)
class ConflictMap:
    """The conflicts of one arm over time, averaged over its seeds.

    Attributes:
        arm: the arm.
        steps: the columns.
        pairs: the rows, pairs of loss terms.
        cosine: mean gradient cosine of each row and column; NaN where it was not defined.
        norms: mean gradient norm of each term and column; NaN where it was not measured.
        seeds: how many seeds were monitored.
    """

    arm: str
    steps: list[float]
    pairs: list[tuple[str, str]]
    cosine: list[list[float]]
    norms: dict[str, list[float]]
    seeds: int


def logged_names(trials: Sequence[TrialRecord], group: Group) -> list[str]:
    """List the metrics or loss terms that any trial logged during training, in order of first sight."""
    return list(
        dict.fromkeys(name for trial in trials for point in trial.history for name in getattr(point, group))
    )


def training_curve(trials: Sequence[TrialRecord], group: Group, name: str, axis: Axis) -> Curve | None:
    """Lay the seeds of one arm over each other.

    Seeds that were logged at the same steps are averaged step by step, over seconds at the mean time of the step.
    Otherwise they are interpolated on the stretch that all of them cover; without one, only their last points are
    averaged.

    Args:
        trials: the trials of one arm.
        group: where the quantity was logged, "metrics" or "terms".
        name: which of them.
        axis: what lies along x, "seconds" or "steps" of training.

    Returns:
        The curve, or None where no trial logged the quantity. NaN where a seed had no finite value.

    Examples:
        >>> from coloss.lab.records import Cost, HistoryPoint
        >>> cost = Cost(seconds=1, steps=10, steps_per_second=10, parameters=5)
        >>> def run(seed, loss):
        ...     history = [HistoryPoint(step=10, epoch=0, seconds=1, terms={"loss": loss})]
        ...     return TrialRecord(arm="a", seed=seed, fingerprint="", metrics={}, cost=cost, history=history)
        >>> curve = training_curve([run(0, 2.0), run(1, 4.0)], "terms", "loss", "steps")
        >>> curve.x, curve.mean, curve.low, curve.high
        ([10.0], [3.0], [2.0], [4.0])
    """
    runs = []
    for trial in trials:
        found = [
            (point.step, point.seconds, getattr(point, group)[name])
            for point in trial.history
            if name in getattr(point, group)
        ]
        if found:
            steps, seconds, values = np.array(found, dtype=np.float64).T
            runs.append((steps, seconds, np.where(np.isfinite(values), values, np.nan)))
    if not runs:
        return None
    if all(np.array_equal(run[0], runs[0][0]) for run in runs):
        x = runs[0][0] if axis == "steps" else np.mean([run[1] for run in runs], axis=0)
        values = np.stack([run[2] for run in runs])
    else:
        x, values = _interpolated([(run[0] if axis == "steps" else run[1], run[2]) for run in runs])
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    return Curve(trials[0].arm, x.tolist(), mean.tolist(), low.tolist(), high.tolist(), len(runs))


def conflict_map(trials: Sequence[TrialRecord]) -> ConflictMap | None:
    """Average the monitored gradients of one arm over its seeds; None where nothing was monitored."""
    points = [point for trial in trials for point in trial.conflicts]
    names = list(dict.fromkeys(pair for point in points for pair in point.cosine))
    if not names:
        return None
    steps = sorted({point.step for point in points})
    columns = np.array_split(np.array(steps), min(len(steps), MOST_COLUMNS))
    column_of = {int(step): number for number, stretch in enumerate(columns) for step in stretch}

    def averaged(group: str, name: str) -> list[float]:
        cells: list[list[float]] = [[] for _ in columns]
        for point in points:
            value = getattr(point, group).get(name, math.nan)
            if math.isfinite(value):
                cells[column_of[point.step]].append(value)
        return [float(np.mean(cell)) if cell else math.nan for cell in cells]

    terms = list(dict.fromkeys(term for point in points for term in point.norm))
    return ConflictMap(
        arm=trials[0].arm,
        steps=[float(stretch.mean()) for stretch in columns],
        pairs=[split_pair(name) for name in names],
        cosine=[averaged("cosine", name) for name in names],
        norms={term: averaged("norm", term) for term in terms},
        seeds=sum(bool(trial.conflicts) for trial in trials),
    )


def summarize_conflicts(trials: Sequence[TrialRecord]) -> list[PairConflict]:
    """Say for each pair of terms of one arm how often and how strongly their gradients opposed each other."""
    points = [point for trial in trials for point in trial.conflicts]
    found = []
    for name in dict.fromkeys(pair for point in points for pair in point.cosine):
        first, second = split_pair(name)
        cosines = [point.cosine[name] for point in points if math.isfinite(point.cosine.get(name, math.nan))]
        ratios = [
            math.log(point.norm[first] / point.norm[second])
            for point in points
            if 0 < point.norm.get(first, 0) < math.inf and 0 < point.norm.get(second, 0) < math.inf
        ]
        found.append(
            PairConflict(
                arm=trials[0].arm,
                first=first,
                second=second,
                cosine=float(np.mean(cosines)) if cosines else math.nan,
                opposed=sum(cosine < 0 for cosine in cosines) / len(cosines) if cosines else math.nan,
                ratio=math.exp(float(np.mean(ratios))) if ratios else math.nan,
                looks=len(cosines),
            )
        )
    return found


def split_pair(name: str) -> tuple[str, str]:
    """Take the key of a gradient cosine apart.

    Examples:
        >>> split_pair("cross_entropy|distillation")
        ('cross_entropy', 'distillation')
    """
    first, _, second = name.partition("|")
    return first, second


def _interpolated(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    low, high = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    if high <= low:
        return np.array([np.mean([x[-1] for x, _ in runs])]), np.array([[values[-1]] for _, values in runs])
    grid = np.linspace(low, high, GRID_POINTS)
    return grid, np.stack([np.interp(grid, x, values) for x, values in runs])
