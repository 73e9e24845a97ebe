"""How far estimators are from the truth on simulated sets, and where: by size of set, number of columns and true information."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coloss.errors import InputError
from coloss.jepa.mutual_information_data import MIMetaDataset
from coloss.jepa.mutual_information_estimators import KSG, MIEstimator
from coloss.jepa.rank_gaussian import rank_gaussianise
from coloss.metrics.statistics import rank_correlation

# What `choose_neighbours` finds on the sets that the shipped estimator learnt from: `KSG` is tuned on what that was designed on.
KSG_NEIGHBOURS = 1


@dataclass(frozen=True)
class JudgedEstimate:
    """One estimate beside the truth.

    Attributes:
        estimate, low, high: nats; the ends are NaN where no interval was asked for.
        information: the truth.
        samples, dim_x, dim_y: of the set.
        family, map: where it came from.

    Examples:
        >>> JudgedEstimate(0.3, 0.1, 0.5, 0.2, 100, 1, 1, "clayton", "base").covered
        True
    """

    estimate: float
    low: float
    high: float
    information: float
    samples: int
    dim_x: int
    dim_y: int
    family: str
    map: str

    @property
    def squared_error(self) -> float:
        """In nats squared."""
        return (self.estimate - self.information) ** 2

    @property
    def covered(self) -> bool:
        """Whether the interval holds the true information; False without an interval."""
        return self.low <= self.information <= self.high


def judge_estimator(
    estimator: MIEstimator,
    sets: MIMetaDataset,
    levels: tuple[float, float] | None = None,
    every: int = 1,
) -> list[JudgedEstimate]:
    """Estimates of simulated sets beside what is true of them.

    Args:
        estimator: any.
        sets: what it is judged on.
        levels: of the intervals to be drawn; None for no intervals.
        every: take each so-many-th set, >= 1, for estimators that are slow.

    Raises:
        InputError: if `every` < 1, or as the estimator's.

    Examples:
        >>> from coloss.jepa import GaussianMI
        >>> found = judge_estimator(
        ...     GaussianMI(), MIMetaDataset(["normal-dense"], ["base"], batch_size=4, batches=2)
        ... )
        >>> len(found), mean_squared_error(found) < 0.2
        (8, True)
    """
    if every < 1:
        raise InputError(f"every must be >= 1, got {every}")
    found = []
    for number, batch in enumerate(sets):
        first = number * len(batch.information)
        for place in range(-first % every, len(batch.information), every):
            x, y = batch.x[place], batch.y[place]
            with torch.no_grad():
                estimate = float(estimator.estimate(x, y))
            low, high = (
                estimator.interval(x, y, *levels) if levels is not None else (float("nan"), float("nan"))
            )
            truth = batch.information[place].item()
            shape = (len(x), x.shape[1], y.shape[1])
            found.append(
                JudgedEstimate(estimate, low, high, truth, *shape, batch.families[place], batch.maps[place])
            )
    return found


def choose_neighbours(sets: MIMetaDataset, choices: Sequence[int] = (1, 2, 3, 5, 8)) -> int:
    """The number of neighbours with which `KSG`, on columns as they are, has the smallest mean squared error.

    Args:
        sets: to tune it on; not those that it is judged on.
        choices: to choose from, at least one; the first of equally good ones is taken.

    Raises:
        InputError: for no choices, or as `KSG`.

    Cost:
        One pass of `KSG` over the sets for each choice.

    Examples:
        >>> choose_neighbours(MIMetaDataset(["normal-dense"], ["base"], batch_size=4, batches=2), [1, 30])
        1
    """
    if not choices:
        raise InputError("choices must hold at least one number of neighbours, got none")
    return min(choices, key=lambda k: mean_squared_error(judge_estimator(KSG(k), sets)))


def mean_squared_error(found: Sequence[JudgedEstimate]) -> float:
    """Mean over estimates, in nats squared; NaN for none."""
    return float(np.mean([judged.squared_error for judged in found])) if found else float("nan")


def interval_coverage(found: Sequence[JudgedEstimate]) -> float:
    """Share of intervals that hold the true information; NaN for none."""
    return float(np.mean([judged.covered for judged in found])) if found else float("nan")


def error_by_bin(
    found: Iterable[JudgedEstimate],
    samples: Sequence[float] = (100,),
    information: Sequence[float] = (0.3, 1.0),
) -> dict[tuple[str, str, str], float]:
    """Mean squared error for each kind of set, since one number hides that it grows with information and falls with samples.

    Args:
        found: from `judge_estimator`.
        samples: edges between bins of the number of samples.
        information: edges between bins of the true information, in nats.

    Returns:
        By names of the bins, such as ("n < 100", "d = 2", "I >= 1"), where d counts the columns of both sides; empty bins are left out.

    Examples:
        >>> judged = JudgedEstimate(0.3, 0.0, 1.0, 0.2, 60, 1, 1, "clayton", "base")
        >>> {name: round(error, 3) for name, error in error_by_bin([judged]).items()}
        {('n < 100', 'd = 2', 'I < 0.3'): 0.01}
    """
    bins: dict[tuple[str, str, str], list[JudgedEstimate]] = {}
    for judged in found:
        name = (
            _bin("n", judged.samples, samples),
            f"d = {judged.dim_x + judged.dim_y}",
            _bin("I", judged.information, information),
        )
        bins.setdefault(name, []).append(judged)
    return {name: mean_squared_error(bins[name]) for name in sorted(bins)}


def _bin(name: str, value: float, edges: Sequence[float]) -> str:
    place = sum(value >= edge for edge in edges)
    if place == 0:
        return f"{name} < {edges[0]:g}" if edges else f"any {name}"
    if place == len(edges):
        return f"{name} >= {edges[-1]:g}"
    return f"{edges[place - 1]:g} <= {name} < {edges[place]:g}"


def rank_agreement(
    estimator: MIEstimator,
    features: torch.Tensor,
    generator: torch.Generator | None = None,
    *,
    reference: MIEstimator | None = None,
    most_columns: int = 12,
) -> float:
    """Spearman's rank correlation between two estimators over all pairs of columns of a real table.

    Constant columns are left out; ties are broken by noise of a thousandth of a column's spread, without which distances to neighbours mean
    nothing.

    Args:
        estimator: any.
        features: (samples, columns).
        generator: of the noise; None for a fixed seed.
        reference: the other one; None for `KSG` on rank-Gaussianised columns.
        most_columns: the columns of the highest variance of ranks, so many at most, >= 3.

    Returns:
        In [-1, 1]; NaN where one of them gives the same number for all pairs.

    Raises:
        InputError: if fewer than 3 columns are not constant.

    Examples:
        >>> from coloss.jepa import GaussianMI
        >>> table = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> rank_agreement(GaussianMI(), table) > 0.8
        True
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    values = features.detach().double().cpu()
    spread = rank_gaussianise(values).var(0, correction=0)
    columns = (spread > 0).nonzero().flatten()
    if len(columns) < 3:
        raise InputError(f"features must have at least 3 columns that vary, got {len(columns)}")
    columns = columns[spread[columns].argsort(descending=True, stable=True)[:most_columns]].sort().values
    values = values[:, columns]
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    values = values + 1e-3 * values.std(0) * noise
    against = reference if reference is not None else KSG(gaussianise=True)
    pairs = torch.combinations(torch.arange(len(columns))).tolist()
    first, second = (
        [float(one.estimate(values[:, [i]], values[:, [j]])) for i, j in pairs]
        for one in (estimator, against)
    )
    return rank_correlation(first, second)
