"""Paired statistics for comparing a method with a baseline over the same seeds.

Both arms of a comparison run once for each seed, so their values come in pairs and the noise that a seed
brings to both arms (the split, the initial weights, the order of batches) cancels in the differences. With
differences d_1 .. d_n, mean m and standard deviation s (n - 1 in the denominator) this module reports

    interval      m -+ t * s / sqrt(n), t the quantile of Student's distribution with n - 1 degrees of freedom
    p value       share of the 2^n sign patterns whose |sum of signed differences| is at least |sum of
    differences| effect size   Cohen's d_z = m / s

and a verdict from the interval alone. Nothing here imports torch; scipy is loaded when an interval is asked
for.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Direction = Literal["higher", "lower"]
Verdict = Literal["reproduced", "contradicted", "inconclusive"]

EXACT_LIMIT = 16
"""Largest number of pairs for which all 2^n sign patterns are enumerated."""


class MeanInterval(NamedTuple):
    """A mean with its confidence interval.

    Attributes:
        mean: the mean of the values.
        interval: (low, high), or None where a single value gives no spread to judge by.
        n: how many values there were.
    """

    mean: float
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class PairedResult:
    """What a paired comparison found; every field goes into JSON as it is.

    Attributes:
        difference: mean of method - baseline, in the unit of the values.
        interval: (low, high) of the difference; None for a single pair; (d, d) where all differences equal d.
        p_value: two-sided sign-flip p value; never below 2 / 2^n, so 5 pairs reach 0.0625 at best.
        effect_size: Cohen's d_z; None for a single pair and where the differences do not vary.
        verdict: "reproduced", "contradicted" or "inconclusive".
        n: number of pairs.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float
    effect_size: float | None
    verdict: Verdict
    n: int


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Student's t interval around the mean of independent values.

    Args:
        values: n >= 1 finite numbers.
        confidence: coverage, strictly between 0 and 1.

    Returns:
        Mean, (low, high) and n. One value gives no interval (None); equal values give (mean, mean).

    Raises:
        ValueError: if values are empty, not one-dimensional or not finite, or confidence is outside (0, 1).

    Examples:
        >>> mean, (low, high), n = mean_interval([0.90, 0.92, 0.94])
        >>> round(mean, 3), round(low, 3), round(high, 3), n
        (0.92, 0.87, 0.97, 3)
    """
    array = _checked(values, "values")
    _check_confidence(confidence)
    spread = array.std(ddof=1) if array.size > 1 and np.ptp(array) > 0 else 0.0
    return MeanInterval(float(array.mean()), _t_interval(array, spread, confidence), array.size)


def paired_comparison(
    method_values: ArrayLike,
    baseline_values: ArrayLike,
    *,
    direction: Direction = "higher",
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedResult:
    """Difference of two arms that ran on the same seeds, with interval, p value, effect size and verdict.

    The verdict is "reproduced" if the interval of method - baseline excludes 0 in the claimed direction,
    "contradicted" if it excludes 0 in the other, else "inconclusive". Differences within rounding of 0 (8
    float64 steps at the size of the values) count as 0, and differences that agree within rounding count as
    identical: their interval has no width, so identical nonzero differences decide the verdict although no
    spread was seen. One pair is always inconclusive.

    Args:
        method_values: n >= 1 finite values of the method, one for each seed.
        baseline_values: as many values of the baseline, in the same order of seeds.
        direction: whether the claim says that the method's value is "higher" or "lower".
        confidence: coverage of the interval, strictly between 0 and 1.
        seed: of the Monte Carlo sign patterns, used above 16 pairs only.

    Returns:
        The result; `difference` is method - baseline whatever the direction.

    Raises:
        ValueError: if the arms differ in length, are empty, hold NaN or infinity, or an option is out of
            range.

    Examples:
        >>> result = paired_comparison([0.91, 0.93, 0.92, 0.95], [0.89, 0.90, 0.91, 0.92])
        >>> round(result.difference, 4), result.verdict, result.p_value
        (0.0225, 'reproduced', 0.125)
    """
    method, baseline = _checked(method_values, "method_values"), _checked(baseline_values, "baseline_values")
    if method.size != baseline.size:
        raise ValueError(
            "method_values and baseline_values must pair up, one value of each for every seed, "
            f"got {method.size} and {baseline.size} values"
        )
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction must be 'higher' or 'lower', got {direction!r}")
    _check_confidence(confidence)

    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(method).max(), np.abs(baseline).max())
    differences = method - baseline
    differences[np.abs(differences) <= rounding] = 0.0
    spread = float(differences.std(ddof=1)) if np.ptp(differences) > rounding else 0.0
    varies = spread > 0  # the squares of differences near the smallest numbers underflow
    mean = float(differences.mean())
    interval = _t_interval(differences, spread, confidence)
    return PairedResult(
        difference=mean,
        interval=interval,
        p_value=sign_flip_p_value(differences, seed=seed),
        effect_size=mean / spread if varies else None,
        verdict=_verdict(interval, direction),
        n=differences.size,
    )


def sign_flip_p_value(differences: ArrayLike, *, resamples: int = 2**16, seed: int = 0) -> float:
    """Two-sided permutation p value of paired differences being symmetric around 0.

    If the two arms were exchangeable, each difference could as well carry the other sign. The p value is the
    share of sign patterns s in {-1, 1}^n with |sum_i s_i d_i| >= |sum_i d_i|, ties within rounding included.

    Args:
        differences: n >= 1 finite numbers.
        resamples: number of random sign patterns drawn where n > 16; up to 16 all 2^n patterns are
            enumerated.
        seed: of the random sign patterns.

    Returns:
        A value in (0, 1]. Exact for n <= 16; beyond, (1 + hits) / (1 + resamples), which is never 0.

    Raises:
        ValueError: if differences are empty, not one-dimensional or not finite, or resamples < 1.

    Cost:
        O(n * min(2^n, resamples)) time; memory stays below about 20 MB.

    Source:
        Fisher 1935, The Design of Experiments, section 21; Phipson and Smyth 2010 for the + 1.

    Examples:
        >>> sign_flip_p_value([1.0, 2.0, 3.0])  # only + + + and - - - reach |sum| = 6, of 8 patterns
        0.25
    """
    array = _checked(differences, "differences")
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")
    reached = abs(array.sum()) - 1e-12 * np.abs(array).sum()
    n = array.size
    if n <= EXACT_LIMIT:
        # |sum| is the same for a pattern and its mirror image, so the first sign may stay fixed.
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1) & 1
        sums = array[0] + (1.0 - 2.0 * bits) @ array[1:]
        return float(np.mean(np.abs(sums) >= reached))

    generator = np.random.default_rng(seed)
    hits, left, rows = 0, resamples, max(1, 2**20 // n)
    while left > 0:
        signs = generator.integers(0, 2, size=(min(rows, left), n), dtype=np.int8) * 2.0 - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ array) >= reached))
        left -= len(signs)
    return (1 + hits) / (1 + resamples)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's: by how much two lists put the same things in the same order.

    Args:
        first, second: one number of each thing, infinities allowed; equal ones share their mean rank.

    Returns:
        In [-1, 1]; NaN where one list is constant or holds NaN, and for fewer than two things: there is no order to agree on.

    Raises:
        ValueError: if the two are not one-dimensional and of one length.

    Cost:
        O(n log n).

    Source:
        Spearman 1904.

    Examples:
        >>> rank_correlation([1.0, 2.0, 9.0], [0.1, 0.5, 0.2])
        0.5
    """
    sides = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    shapes = [side.shape for side in sides]
    if shapes[0] != shapes[1] or sides[0].ndim != 1:
        raise ValueError(
            f"first and second must be one-dimensional and of one length, got shapes {shapes[0]} and {shapes[1]}"
        )
    if any(np.isnan(side).any() or np.unique(side).size < 2 for side in sides):
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(*sides).statistic)


def _checked(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty, one-dimensional list, got shape {array.shape}")
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[position]} at position {position}")
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _t_interval(values: np.ndarray, spread: float, confidence: float) -> tuple[float, float] | None:
    if values.size == 1:
        return None
    from scipy.special import stdtrit

    mean = float(values.mean())
    half = float(stdtrit(values.size - 1, (1 + confidence) / 2)) * float(spread) / math.sqrt(values.size)
    return mean - half, mean + half


def _verdict(interval: tuple[float, float] | None, direction: Direction) -> Verdict:
    if interval is None:
        return "inconclusive"
    low, high = interval if direction == "higher" else (-interval[1], -interval[0])
    if low > 0:
        return "reproduced"
    return "contradicted" if high < 0 else "inconclusive"
