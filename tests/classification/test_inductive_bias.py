"""Facts about the nats that a space of models lacks to reach a test error."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.classification import (
    ErrorFitWarning,
    ScaledNCX2,
    compare_inductive_bias,
    gaussian_process_errors,
    required_inductive_bias,
)
from coloss.data import load
from coloss.lab.claims import verify

TRUTH = ScaledNCX2(60.0, 0.0, 0.001)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(count: int = 300, seed: int = 0) -> np.ndarray:
    return TRUTH.sample(count, seeded(seed))


def required(sample: np.ndarray, epsilon: float, **options: object):
    return required_inductive_bias(sample, epsilon, resamples=20, generator=seeded(), **options)  # type: ignore[arg-type]


def test_the_value_is_the_surprise_under_the_fitted_distribution() -> None:
    sample = errors()
    found = required(sample, 0.03)
    assert found.value == -found.fit.logcdf(0.03)
    assert found.value == pytest.approx(-TRUTH.logcdf(0.03), rel=0.15)
    assert required(sample, float(np.median(sample))).value == pytest.approx(math.log(2), rel=0.1)


@given(st.floats(0.001, 0.2), st.floats(0.001, 0.2))
@settings(max_examples=5)
def test_a_harder_error_never_needs_less(first: float, second: float) -> None:
    sample = errors(50)
    low, high = sorted((first, second))
    assert required(sample, low).value >= required(sample, high).value >= 0


def test_the_ends() -> None:
    sample = errors(50)
    assert required(sample, math.inf).value == 0
    assert required(sample, math.inf).interval == (0, 0)
    nothing = required(sample, 0.0)
    assert nothing.value == math.inf
    assert nothing.interval == (math.inf, math.inf)


def test_the_unit_of_the_error_does_not_matter() -> None:
    sample = errors(100)
    first, second = required(sample, 0.03), required(1000 * sample, 30.0)
    assert second.value == pytest.approx(first.value, rel=1e-6)
    assert second.interval == pytest.approx(first.interval, rel=1e-6)
    assert second.extrapolation == pytest.approx(first.extrapolation)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, covered = -TRUTH.logcdf(0.035), 0
    for seed in range(12):
        low, high = required_inductive_bias(
            errors(60, seed), 0.035, confidence=0.9, resamples=30, generator=seeded(seed)
        ).interval
        covered += low <= truth <= high
    assert covered >= 8


def test_the_bootstrap_is_that_of_the_generator() -> None:
    sample = errors(60)
    first, again, other = (
        required_inductive_bias(sample, 0.03, resamples=20, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert first.interval == again.interval != other.interval
    assert first.p_value == again.p_value


def test_a_good_fit_within_the_sample_has_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = required(errors(), 0.05)
    assert found.warnings == ()
    assert found.extrapolation < 0
    assert found.p_value > 0.01


def test_reaching_beyond_the_sample_is_said() -> None:
    sample = errors()
    found = required(sample, 0.01)
    assert found.extrapolation == pytest.approx((sample.min() - 0.01) / sample.std(ddof=1))
    assert found.extrapolation > 1
    assert "standard deviations below the smallest of 300" in found.warnings[0]
    assert str(found).startswith(f"{found.value:.4g} nats (")
    assert "extrapolated" in str(found)


def test_a_poor_fit_is_a_warning_not_a_silent_number() -> None:
    two_groups = np.concatenate([errors(500), 8 * errors(500, 1)])
    with pytest.warns(ErrorFitWarning, match="the errors do not look like the fitted distribution"):
        found = required_inductive_bias(two_groups, 0.03, resamples=200, generator=seeded())
    assert found.p_value < 0.01
    assert any("do not look like" in warning for warning in found.warnings)
    outlier = np.append(errors(400), 1.0)
    with pytest.warns(ErrorFitWarning, match="left tail is off"):
        found = required(outlier, 0.03)
    assert found.tail_gap > 0.5


def test_shares_of_wrong_answers_are_recognised() -> None:
    rates = np.random.default_rng(0).binomial(200, 0.1, 60) / 200
    with pytest.warns(ErrorFitWarning, match="of the errors repeat: take a mean squared error"):
        required(rates, 0.05)


# Kernels on digits


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray]:
    splits = load("digits", seed=0)
    train, test = splits.train.subset(torch.arange(200)), splits.test.subset(torch.arange(80))
    return {
        "train": train.inputs.flatten(1).numpy(),
        "known": np.eye(10)[train.targets.numpy()],
        "test": test.inputs.flatten(1).numpy(),
        "wanted": np.eye(10)[test.targets.numpy()],
    }


def kernel_space(digits: dict[str, np.ndarray], bandwidth: float, count: int):
    known = digits["train"][:count], digits["known"][:count]
    return gaussian_process_errors(*known, digits["test"], digits["wanted"], bandwidth)


def test_digits_ask_less_of_a_kernel_with_more_data_and_a_fitting_bandwidth(digits) -> None:
    spaces = {name: kernel_space(digits, *name) for name in ((4.0, 200), (4.0, 60), (1.0, 200))}
    values = {name: required(space.sample(400, seeded()), 0.04).value for name, space in spaces.items()}
    assert values[4.0, 200] < values[4.0, 60] < values[1.0, 200]
    assert values[1.0, 200] > 10 * values[4.0, 200]


def test_the_fit_is_right_near_the_sample_and_too_small_far_from_it(digits) -> None:
    space = kernel_space(digits, 2.0, 200)
    sample = space.sample(2000, seeded())
    near, far = float(np.quantile(sample, 0.005)), 0.3 * sample.min()
    assert required(sample, near).value == pytest.approx(-space.logcdf(near), rel=0.15)
    found, exact = required(sample, far), -space.logcdf(far)
    assert found.interval[1] < exact
    assert found.extrapolation > 5


# Comparison


def test_spaces_are_compared_on_one_task() -> None:
    wide = ScaledNCX2(60.0, 0.0, 0.002).sample(300, seeded(1))
    found = compare_inductive_bias(
        {"wide": lambda: wide, "narrow": errors()}, 0.05, resamples=20, generator=seeded()
    )
    assert found.base == "wide"
    assert list(found.biases) == ["wide", "narrow"]
    value, low, high = found.supplied["narrow"]
    assert value == found.biases["wide"].value - found.biases["narrow"].value
    assert 0 < low < value < high
    assert found.supplied["wide"] == (0, 0, 0)
    other = compare_inductive_bias(
        {"wide": wide, "narrow": errors()}, 0.05, base="narrow", resamples=20, generator=seeded()
    )
    assert other.supplied["wide"][0] == pytest.approx(-value)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["narrow", "wide"]
    assert "over wide" in lines[0]


def test_spaces_that_both_lack_everything_cannot_be_told_apart() -> None:
    found = compare_inductive_bias(
        {"one": errors(40), "two": errors(40, 1)}, 0.0, resamples=20, generator=seeded()
    )
    assert math.isnan(found.supplied["two"][0])


def test_bad_input_is_named(as_users_call: None) -> None:
    sample = errors(20)
    for options, message in (
        ({"epsilon": math.nan}, "epsilon must be a number, got nan"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"resamples": 10}, "resamples must be >= 20, got 10"),
        ({"method": "bayes"}, "method must be"),
        ({"errors": sample[:5]}, r"at least 8, got shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            required_inductive_bias(**({"errors": sample, "epsilon": 0.03} | options))
    with pytest.raises(ValueError, match="base must be one of one, got 'two'"):
        compare_inductive_bias({"one": sample}, 0.03, base="two")
    with pytest.raises(ValueError, match="at least one space, got none"):
        compare_inductive_bias({}, 0.03)


def test_the_claim_runs() -> None:
    found = verify("inductive-bias", smoke=True, seeds=1)
    assert found["metric"] == "nats"
    assert {"low", "high", "extrapolation", "p_value", "nats_without_fit"} <= found["arms"]["tuned kernel"][
        "metrics"
    ].keys()
    assert "perceptrons of one layer" in found["arms"]
