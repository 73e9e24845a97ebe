"""Choosing among arms by a number that needs no labels, and what that choice costs beside knowing the labels."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coloss.errors import InputError, suggest_names
from coloss.lab.directions import Direction, metric_direction
from coloss.lab.records import read_comparison
from coloss.metrics.statistics import MeanInterval, mean_interval, rank_correlation


@dataclass(frozen=True)
class Selection:
    """Which arm a criterion chooses, and how far that is from the best.

    Attributes:
        criterion: the metric that chose.
        criterion_direction: whether it was taken to be better "higher" or "lower".
        metric: what the arms are judged by.
        chosen: arm with the best mean of the criterion.
        best: arm with the best mean of the metric: the oracle's choice.
        criterion_means: arm -> mean of the criterion over the seeds.
        metric_means: arm -> mean of the metric over the seeds.
        seeds: those with a finite criterion and metric in every arm; each chooses for itself below.
        choices: seed -> arm that the criterion chooses among the runs of that seed.
        regret: metric of the best run of a seed less that of the chosen one, >= 0 (whatever the direction of the metric), with its
            interval over the seeds.
        random_regret: the same for an arm drawn at random.
        rank_correlation: Spearman's, of criterion and metric over the arms of a seed, each so turned that higher is better; mean over
            seeds. NaN where either does not vary.
    """

    criterion: str
    criterion_direction: Direction
    metric: str
    chosen: str
    best: str
    criterion_means: Mapping[str, float]
    metric_means: Mapping[str, float]
    seeds: Sequence[int]
    choices: Mapping[int, str]
    regret: MeanInterval
    random_regret: MeanInterval
    rank_correlation: float


def select_arm(
    folder: str | Path, by: str, *, direction: Direction | None = None, metric: str | None = None
) -> Selection:
    """Choose among the arms of a finished comparison by one of its metrics, and say what the choice costs.

    The arms should be runs of one method with different hyperparameters: what tells good runs from bad ones within a method need not do
    so across methods. Methods on views give `embedding_rankme`, `embedding_lidar`, `embedding_uniformity` and other meters of the training
    inputs (see `coloss.train.ViewMethod.report`), which take no labels.

    Args:
        folder: result folder of `coloss compare`.
        by: the criterion, any metric of the trials.
        direction: whether the criterion is better "higher" or "lower"; default: by its name.
        metric: what regret is counted in; default: what decided the comparison.

    Raises:
        InputError: if the folder holds no comparison, fewer than 2 arms, no such metric, or no seed that all arms have finished.

    Source:
        Garrido et al., 2023 (RankMe), arXiv 2210.02885, for choosing hyperparameters by a label-free criterion.

    Examples:
        >>> import tempfile
        >>> from coloss import Budget
        >>> from coloss.lab import Comparison
        >>> folder = tempfile.mkdtemp()
        >>> arms = ["lejepa:weight=0.0", "lejepa:weight=0.1"]
        >>> _ = Comparison("iris-ssl", arms, seeds=2, budget=Budget(steps=3)).run(folder)
        >>> found = select_arm(folder, "embedding_rankme")
        >>> found.chosen in arms, found.regret.mean >= 0
        (True, True)
    """
    record, trials = read_comparison(Path(folder))
    metric = metric or record.metric
    arms = [arm.name for arm in record.arms]
    if len(arms) < 2:
        raise InputError(f"{folder} must hold at least 2 arms to choose among, got {len(arms)}")
    known = sorted({name for trial in trials for name in trial.metrics})
    for name in (by, metric):
        if name not in known:
            raise InputError(
                f"no metric named {name!r} in {folder}{suggest_names(name, known)} (there are {', '.join(known)})"
            )
    way = direction or metric_direction(by)
    better = record.direction if metric == record.metric else metric_direction(metric)
    table = {(trial.arm, trial.seed): trial.metrics for trial in trials}
    seeds = [
        seed
        for seed in record.seeds
        if all(
            math.isfinite(table.get((arm, seed), {}).get(n, math.nan)) for arm in arms for n in (by, metric)
        )
    ]
    if not seeds:
        raise InputError(f"no seed of {folder} has a finite {by} and {metric} in all {len(arms)} arms")

    def signed(name: str, toward: Direction) -> dict[int, list[float]]:
        sign = 1.0 if toward == "higher" else -1.0
        return {seed: [sign * table[arm, seed][name] for arm in arms] for seed in seeds}

    criterion, value = signed(by, way), signed(metric, better)
    picks = {seed: _best(criterion[seed]) for seed in seeds}
    return Selection(
        criterion=by,
        criterion_direction=way,
        metric=metric,
        chosen=arms[_best(_means(criterion))],
        best=arms[_best(_means(value))],
        criterion_means={arm: statistics.fmean(table[arm, seed][by] for seed in seeds) for arm in arms},
        metric_means={arm: statistics.fmean(table[arm, seed][metric] for seed in seeds) for arm in arms},
        seeds=seeds,
        choices={seed: arms[pick] for seed, pick in picks.items()},
        regret=mean_interval([max(value[seed]) - value[seed][picks[seed]] for seed in seeds]),
        random_regret=mean_interval([max(value[seed]) - statistics.fmean(value[seed]) for seed in seeds]),
        rank_correlation=_mean([rank_correlation(criterion[seed], value[seed]) for seed in seeds]),
    )


def _means(values: Mapping[int, Sequence[float]]) -> list[float]:
    """Of each arm, over the seeds."""
    return [statistics.fmean(column) for column in zip(*values.values())]


def _best(values: Sequence[float]) -> int:
    """Where the largest stands, the first of equal ones."""
    return max(range(len(values)), key=lambda place: values[place])


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
