import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloss.classification import (
    gap_recovered_interval,
    median_gap_recovered,
    performance_gap_recovered,
)

SCORES = st.floats(0.01, 0.99)


def test_nothing_recovered_is_0_and_everything_is_1() -> None:
    assert performance_gap_recovered(0.6, 0.6, 0.9) == 0.0
    assert performance_gap_recovered(0.6, 0.9, 0.9) == 1.0
    assert performance_gap_recovered(0.5, 0.75, 1.0) == 0.5
    assert performance_gap_recovered(0.5, 0.25, 1.0) == -0.5
    assert math.isnan(performance_gap_recovered(0.9, 0.9, 0.9))
    assert performance_gap_recovered(0.9, 0.9, 0.8, undefined=0.0) == 0.0


@given(SCORES, SCORES, SCORES, st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_origin_of_the_score_do_not_matter(
    weak: float, student: float, gap: float, scale: float, shift: float
) -> None:
    plain = performance_gap_recovered(weak, student, weak + gap)
    moved = performance_gap_recovered(*(scale * score + shift for score in (weak, student, weak + gap)))
    assert moved == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_the_median_leaves_out_pairs_without_a_gap() -> None:
    assert median_gap_recovered(
        [0.5, 0.5, 0.9, 0.7], [0.6, 0.9, 0.1, 0.8], [1.0, 1.0, 0.8, 0.7]
    ) == pytest.approx(0.5)
    assert math.isnan(median_gap_recovered([0.9], [0.9], [0.9]))


def test_the_interval_is_fiellers() -> None:
    # Every ratio at the edge puts the mean of a - r b exactly t standard errors from 0.
    from scipy.stats import t

    generator = np.random.default_rng(0)
    weak = 0.6 + 0.01 * generator.normal(size=12)
    ceiling = weak + 0.2 + 0.02 * generator.normal(size=12)
    student = weak + 0.08 + 0.02 * generator.normal(size=12)
    found = gap_recovered_interval(weak, student, ceiling, confidence=0.9)
    assert found.interval is not None and found.interval[0] < found.value < found.interval[1]
    for edge in found.interval:
        rest = (student - weak) - edge * (ceiling - weak)
        statistic = abs(rest.mean()) / (rest.std(ddof=1) / math.sqrt(12))
        assert statistic == pytest.approx(t.ppf(0.95, 11), rel=1e-9)
    assert found.value == pytest.approx((student - weak).mean() / (ceiling - weak).mean())
    assert found.gap_standard_error == pytest.approx((ceiling - weak).std(ddof=1) / math.sqrt(12))
    assert (found.clear, found.n) == (True, 12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits, runs = np.random.default_rng(1), 0, 400
    for _ in range(runs):
        weak = 0.6 + 0.03 * generator.normal(size=8)
        ceiling, student = (weak + gain + 0.03 * generator.normal(size=8) for gain in (0.1, 0.04))
        low, high = gap_recovered_interval(weak, student, ceiling).interval or (-math.inf, math.inf)
        hits += low <= 0.4 <= high
    assert 0.92 <= hits / runs <= 0.98


def test_single_answers_on_one_test_set_pair_up_as_well() -> None:
    generator = np.random.default_rng(2)
    right = generator.random((3, 2000)) < np.array([[0.6], [0.7], [0.8]])
    found = gap_recovered_interval(*right.astype(float))
    assert found.clear and found.interval is not None
    assert found.interval[0] < 0.5 < found.interval[1]


def test_a_gap_within_its_noise_has_no_value() -> None:
    found = gap_recovered_interval([0.60, 0.70, 0.65], [0.61, 0.72, 0.66], [0.68, 0.66, 0.66])
    assert not found.clear and found.interval is None and math.isnan(found.value)
    assert found.gap == pytest.approx(0.05 / 3)
    reversed_gap = gap_recovered_interval([0.9, 0.91], [0.8, 0.8], [0.7, 0.71])
    assert not reversed_gap.clear and math.isnan(reversed_gap.value)
    equal = gap_recovered_interval([0.5, 0.6], [0.5, 0.6], [0.5, 0.6])
    assert not equal.clear and math.isnan(equal.value)


def test_a_clear_gap_may_still_leave_the_interval_unbounded() -> None:
    # Three standard errors, but Student's quantile for two values is 12.7.
    found = gap_recovered_interval([0.0, 0.0], [0.1, 0.1], [0.2, 0.4])
    assert found.clear and found.interval is None
    assert found.value == pytest.approx(1 / 3)


def test_differences_without_noise_give_a_point() -> None:
    found = gap_recovered_interval([0.25, 0.5], [0.375, 0.625], [0.5, 0.75])
    assert found.interval == pytest.approx((0.5, 0.5)) and found.value == pytest.approx(0.5)


def test_one_value_has_no_interval() -> None:
    found = gap_recovered_interval([0.5], [0.6], [0.7])
    assert found.value == pytest.approx(0.5) and found.interval is None and found.clear
    assert math.isnan(found.gap_standard_error)
    assert not gap_recovered_interval([0.5], [0.6], [0.5]).clear


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="student must be a non-empty list as long as the others"):
        gap_recovered_interval([0.5, 0.6], [0.6], [0.7, 0.8])
    with pytest.raises(ValueError, match="weak must be a non-empty list"):
        median_gap_recovered([], [], [])
    with pytest.raises(ValueError, match="ceiling must be finite, got nan"):
        gap_recovered_interval([0.5], [0.6], [math.nan])
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 1.0"):
        gap_recovered_interval([0.5], [0.6], [0.7], confidence=1.0)
