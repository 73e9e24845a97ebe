import itertools
import json
import math
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics.statistics import mean_interval, paired_comparison, rank_correlation, sign_flip_p_value


def paired_values(n, shift, seed):
    random = np.random.default_rng(seed)
    baseline = random.normal(0.8, 0.05, n)
    return baseline + random.normal(shift, 0.02, n), baseline


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_interval_is_that_of_the_paired_t_test(n, confidence):
    method, baseline = paired_values(n, 0.01, n)
    result = paired_comparison(method, baseline, confidence=confidence)
    expected = scipy.stats.ttest_rel(method, baseline).confidence_interval(confidence)
    assert result.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert result.difference == pytest.approx(np.mean(method - baseline))
    assert result.effect_size == pytest.approx(np.mean(method - baseline) / np.std(method - baseline, ddof=1))
    assert result.n == n


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_exact_p_value_is_that_of_scipy_permutation_test(n):
    method, baseline = paired_values(n, 0.01, n)
    expected = scipy.stats.permutation_test(
        (method, baseline),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
    )
    assert paired_comparison(method, baseline).p_value == pytest.approx(expected.pvalue)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
def test_p_value_equals_a_count_over_all_sign_patterns(differences):
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert sign_flip_p_value(differences) == sum(value >= abs(sum(differences)) for value in sums) / len(sums)


def test_largest_enumeration_has_the_smallest_p_value():
    assert sign_flip_p_value([0.1] * 16) == 2 / 2**16


def test_random_patterns_agree_with_enumeration_and_repeat_by_seed():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 17)
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12)
    found = sign_flip_p_value(differences, seed=3)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2**16))
    assert found == sign_flip_p_value(differences, seed=3) != sign_flip_p_value(differences, seed=4)
    assert sign_flip_p_value(np.ones(40)) == 1 / (2**16 + 1)


@pytest.mark.parametrize("direction, verdict", [("higher", "reproduced"), ("lower", "contradicted")])
def test_verdict_follows_the_claimed_direction(direction, verdict):
    result = paired_comparison([1.0, 1.1, 1.2], [0.0, 0.11, 0.21], direction=direction)
    assert result.difference > 0 and result.interval[0] > 0
    assert result.verdict == verdict


def test_interval_that_holds_zero_is_inconclusive():
    result = paired_comparison([1.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    assert result.interval[0] < 0 < result.interval[1] and result.verdict == "inconclusive"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=8))
def test_swapping_the_arms_mirrors_everything(pairs):
    method, baseline = [a for a, _ in pairs], [b for _, b in pairs]
    forth, back = paired_comparison(method, baseline), paired_comparison(baseline, method, direction="lower")
    assert (
        forth.difference == -back.difference
        and forth.p_value == back.p_value
        and forth.verdict == back.verdict
    )
    if forth.interval is not None:
        assert forth.interval == (-back.interval[1], -back.interval[0])


def test_one_pair_is_inconclusive_without_an_interval():
    result = paired_comparison([1.0], [0.0])
    assert (result.difference, result.interval, result.effect_size) == (1.0, None, None)
    assert (result.p_value, result.verdict, result.n) == (1.0, "inconclusive", 1)


def test_identical_differences_have_an_interval_without_width():
    result = paired_comparison([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])  # equal up to rounding
    assert result.interval == pytest.approx((0.1, 0.1), abs=1e-12) and result.effect_size is None
    assert (result.verdict, result.p_value) == ("reproduced", 0.25)


def test_rounding_is_no_evidence():
    result = paired_comparison([0.1 + 0.2] * 4, [0.3] * 4)
    assert (result.difference, result.interval, result.verdict, result.p_value) == (
        0.0,
        (0.0, 0.0),
        "inconclusive",
        1.0,
    )


def test_result_goes_into_json():
    for n in (1, 5):
        method, baseline = paired_values(n, 0.0, 1)
        result = asdict(paired_comparison(method, baseline))
        assert json.loads(json.dumps(result, allow_nan=False))["n"] == n


@pytest.mark.parametrize("n", [2, 6])
def test_mean_interval_is_students(n):
    values = np.random.default_rng(n).normal(size=n)
    expected = scipy.stats.t.interval(0.9, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    found = mean_interval(values, 0.9)
    assert (
        found.interval == pytest.approx(expected)
        and found.mean == pytest.approx(values.mean())
        and found.n == n
    )


def test_mean_interval_of_one_value_and_of_equal_values():
    assert mean_interval([0.5]) == (0.5, None, 1)
    assert mean_interval([0.5, 0.5, 0.5]).interval == (0.5, 0.5)


@pytest.mark.parametrize(
    "method, baseline, options, message",
    [
        ([1.0, 2.0], [1.0], {}, "must pair up, .* got 2 and 1 values"),
        ([1.0, math.nan], [1.0, 1.0], {}, "method_values must be finite, got nan at position 1"),
        ([1.0], [math.inf], {}, "baseline_values must be finite, got inf at position 0"),
        ([], [], {}, "method_values must be a non-empty"),
        ([[1.0]], [1.0], {}, r"got shape \(1, 1\)"),
        ([1.0], [1.0], {"confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_input_is_refused(method, baseline, options, message):
    with pytest.raises(ValueError, match=message):
        paired_comparison(method, baseline, **options)


def test_bad_options_of_the_parts_are_refused():
    with pytest.raises(ValueError, match="resamples must be >= 1, got 0"):
        sign_flip_p_value([1.0], resamples=0)
    with pytest.raises(ValueError, match="values must be finite"):
        mean_interval([math.nan])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
@settings(max_examples=25, deadline=None)
def test_rank_correlation_is_pearsons_of_mean_ranks(pairs):
    first, second = (np.array(side, dtype=float) for side in zip(*pairs))
    found = rank_correlation(first, second)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert math.isnan(found)
    else:
        ranks = [[(side < v).sum() + (side <= v).sum() for v in side] for side in (first, second)]
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_at_the_edges():
    assert rank_correlation([1.0, 2.0, math.inf], [3, 4, 5]) == pytest.approx(1.0)
    for first, second in (([], []), ([1.0], [2.0]), ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0])):
        assert math.isnan(rank_correlation(first, second))
    for first, second in (([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]])):
        with pytest.raises(ValueError, match="must be one-dimensional and of one length, got shapes"):
            rank_correlation(first, second)


def test_import_loads_neither_torch_nor_scipy():
    code = "import sys, coloss.metrics.statistics; print({'torch', 'scipy'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )
