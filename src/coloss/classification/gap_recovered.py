r"""How much of the distance between a weak supervisor and a strong model a student made good: the performance gap recovered.

    PGR = (student - weak) / (ceiling - weak)

0: no better than the supervisor; 1: as good as the same model trained on true labels. A ratio of two noisy differences, so it comes with
Fieller's interval, and has no value where ceiling - weak is not clearly above 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from coloss.errors import InputError


@dataclass(frozen=True)
class GapRecovered:
    """A performance gap recovered, with what it rests on.

    Attributes:
        value: the ratio of the means; NaN where the gap is not `clear`.
        interval: Fieller's (low, high); None where it is unbounded, or the gap is not clear, or there is one value only.
        gap: mean of ceiling - weak.
        gap_standard_error: of that mean; NaN for one value.
        clear: whether the gap is more than two of its standard errors above 0; for one value, above 0.
        n: number of paired values.
    """

    value: float
    interval: tuple[float, float] | None
    gap: float
    gap_standard_error: float
    clear: bool
    n: int


def performance_gap_recovered(
    weak: float, student: float, ceiling: float, undefined: float = math.nan
) -> float:
    """Share of the gap between weak supervisor and ceiling that a student closed.

    Args:
        weak: score of the supervisor, higher is better; all three on the same test data.
        student: of the strong model trained on the supervisor's labels.
        ceiling: of the strong model trained on true labels.
        undefined: what to give where ceiling <= weak.

    Returns:
        (student - weak) / (ceiling - weak): 0 for no gain, 1 for all of it; below 0 and above 1 do occur.

    Examples:
        >>> round(performance_gap_recovered(weak=0.6, student=0.7, ceiling=0.8), 3)
        0.5
        >>> performance_gap_recovered(weak=0.8, student=0.7, ceiling=0.8)
        nan
    """
    return (student - weak) / (ceiling - weak) if ceiling > weak else undefined


def median_gap_recovered(weak: ArrayLike, student: ArrayLike, ceiling: ArrayLike) -> float:
    """Median over several pairs of weak and strong models, pairs without a gap left out; NaN if none is left.

    Args:
        weak: a score for each pair of models.
        student: likewise.
        ceiling: likewise.

    Raises:
        ValueError: if lengths differ, or a value is not finite.

    Source:
        The notebook released with Burns et al., 2023, arXiv 2312.09390.

    Examples:
        >>> round(median_gap_recovered([0.5, 0.5, 0.9], [0.6, 0.7, 0.8], [0.9, 0.9, 0.9]), 3)
        0.375
    """
    columns = zip(*_checked(weak, student, ceiling), strict=True)
    found = [performance_gap_recovered(*map(float, scores)) for scores in columns]
    kept = [value for value in found if not math.isnan(value)]
    return float(np.median(kept)) if kept else math.nan


def gap_recovered_interval(
    weak: ArrayLike, student: ArrayLike, ceiling: ArrayLike, confidence: float = 0.95
) -> GapRecovered:
    """Performance gap recovered from paired scores, with an interval that knows of the noise above and below the line.

    Pairs are seeds (a score each), or the samples of one test set (1 where right, 0 where wrong). With a = student - weak and
    b = ceiling - weak pair by pair, the interval holds every ratio r for which the mean of a - r b is within Student's t
    standard errors of 0.

    Args:
        weak: scores of the supervisor.
        student: of the student, in the same order.
        ceiling: of the ceiling, likewise.
        confidence: coverage, in (0, 1).

    Returns:
        Value, interval and the gap it rests on.

    Raises:
        ValueError: if lengths differ, there is no value or one that is not finite, or `confidence` is out of range.

    Source:
        Fieller 1954, Some problems in interval estimation.

    Examples:
        >>> found = gap_recovered_interval([0.60, 0.62, 0.61], [0.70, 0.71, 0.72], [0.80, 0.80, 0.81])
        >>> round(found.value, 3), found.clear, [round(edge, 2) for edge in found.interval]
        (0.517, True, [0.44, 0.59])
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    low, own, high = _checked(weak, student, ceiling)
    gained, gaps = own - low, high - low
    n, mean_gained, gap = len(gaps), float(gained.mean()), float(gaps.mean())
    if n == 1:
        value = performance_gap_recovered(float(low[0]), float(own[0]), float(high[0]))
        return GapRecovered(value, None, gap, math.nan, gap > 0, 1)
    covariance = np.cov(gained, gaps) / n
    error = math.sqrt(covariance[1, 1])
    # Differences of equal scores differ by rounding.
    clear = gap > max(2 * error, 8 * np.finfo(np.float64).eps * float(np.abs(high).max()))
    if not clear:
        return GapRecovered(math.nan, None, gap, error, False, n)
    return GapRecovered(
        mean_gained / gap, _fieller(mean_gained, gap, covariance, n, confidence), gap, error, True, n
    )


def _fieller(
    above: float, below: float, covariance: np.ndarray, n: int, confidence: float
) -> tuple[float, float] | None:
    from scipy.special import stdtrit

    t2 = float(stdtrit(n - 1, (1 + confidence) / 2)) ** 2
    a = below**2 - t2 * covariance[1, 1]
    b = above * below - t2 * covariance[0, 1]
    c = above**2 - t2 * covariance[0, 0]
    if a <= 0:
        return None
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def _checked(*scores: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in scores]
    for name, array in zip(("weak", "student", "ceiling"), arrays, strict=True):
        if array.ndim != 1 or array.size == 0 or array.shape != arrays[0].shape:
            raise InputError(
                f"{name} must be a non-empty list as long as the others, got shape {array.shape}"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return arrays
