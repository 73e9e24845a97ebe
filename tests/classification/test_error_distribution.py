"""Facts about the scaled non-central chi-square distribution, its far left tail, and its fit."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from coloss.classification import (
    ScaledNCX2,
    fit_error_distribution,
    noncentral_chi2_logcdf,
    sankaran_logcdf,
)
from coloss.classification.error_distribution import fit_p_value, tail_gap


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The log-CDF


@given(st.floats(0.3, 3000), st.floats(0.01, 3.0))
@settings(max_examples=25)
def test_without_non_centrality_it_is_the_chi_square_distribution(df: float, share: float) -> None:
    expected = stats.chi2.logcdf(share * df, df)
    if expected > -600:
        found = ScaledNCX2(df, 0.0, 0.5).logcdf(0.5 * share * df)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(0.1, 2000), st.floats(0.01, 2000), st.floats(0.2, 2.0))
@settings(max_examples=25)
def test_it_agrees_with_scipy_where_that_does_not_underflow(df: float, nc: float, share: float) -> None:
    x = share * (df + nc)
    expected = stats.ncx2.logcdf(x, df, nc)
    if expected > -600:
        assert noncentral_chi2_logcdf(x, df, nc) == pytest.approx(expected, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize(("x", "df", "nc"), [(1.0, 40.0, 10.0), (20.0, 300.0, 80.0), (0.5, 500.0, 0.0)])
def test_it_agrees_with_forty_digits_in_the_far_tail(x: float, df: float, nc: float) -> None:
    with mpmath.workdps(40):
        total = mpmath.nsum(
            lambda j: mpmath.exp(-nc / 2) * (mpmath.mpf(nc) / 2) ** j / mpmath.factorial(j)
            * mpmath.gammainc(df / 2 + j, 0, x / 2, regularized=True),
            [0, 60 if nc else 0],
        )  # fmt: skip
        exact = float(mpmath.log(total))
    assert exact < -60
    assert noncentral_chi2_logcdf(x, df, nc) == pytest.approx(exact, rel=1e-10)


def test_it_has_no_jump_or_kink_where_an_ordinary_cdf_underflows() -> None:
    values = np.array([noncentral_chi2_logcdf(x, 2000.0, 300.0) for x in np.linspace(350.0, 700.0, 141)])
    assert values[0] < -1000
    assert values[-1] > -700
    slopes = np.diff(values)
    assert (slopes > 0).all()
    # A log-concave distribution: slopes fall, and they fall smoothly.
    falls = -np.diff(slopes)
    assert (falls > 0).all()
    assert (np.abs(np.diff(falls)) < 0.1 * falls[1:]).all()


def test_the_ends_of_the_log_cdf() -> None:
    assert noncentral_chi2_logcdf(0.0, 3.0, 1.0) == noncentral_chi2_logcdf(-1.0, 3.0, 0.0) == -math.inf
    assert noncentral_chi2_logcdf(math.inf, 3.0, 1.0) == 0
    assert noncentral_chi2_logcdf(1e9, 3.0, 1.0) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(noncentral_chi2_logcdf(1e-300, 3.0, 1.0))
    assert noncentral_chi2_logcdf(1.9e5, 1e5, 1e5) == pytest.approx(-87.6, abs=2)


def test_sankaran_is_within_a_hundredth_once_its_gaussian_tail_is_whole() -> None:
    for df, nc in ((200.0, 50.0), (700.0, 0.0), (2000.0, 500.0)):
        for share in (0.7, 0.6, 0.5):
            x = share * (df + nc)
            exact = noncentral_chi2_logcdf(x, df, nc)
            if -200 < exact < -20:
                assert sankaran_logcdf(x, df, nc) == pytest.approx(exact, rel=0.015)
                # What the authors use, z^2 / 2 alone, is several nats short, so that curves jump where they switch.
                z = special.ndtri_exp(sankaran_logcdf(x, df, nc))
                assert 2 < -exact - z**2 / 2 < 8


# Density and samples


@given(st.floats(0.5, 3000), st.floats(0, 3000), st.floats(0.7, 1.3))
@settings(max_examples=25)
def test_the_density_is_the_slope_of_the_cdf(df: float, nc: float, share: float) -> None:
    distribution = ScaledNCX2(df, nc, 0.01)
    error, step = share * distribution.mean, 1e-5 * distribution.mean
    low, high = (distribution.logcdf(error + sign * step) for sign in (-1, 1))
    if -300 < low < -1e-3:
        slope = low + math.log(math.expm1(high - low)) - math.log(2 * step)
        assert float(distribution.logpdf([error])[0]) == pytest.approx(slope, abs=2e-3)


def test_samples_have_the_moments_and_the_cdf() -> None:
    for distribution in (ScaledNCX2(30.0, 12.0, 0.01), ScaledNCX2(5.0, 0.0, 2.0)):
        sample = distribution.sample(20_000, seeded())
        assert sample.mean() == pytest.approx(distribution.mean, rel=0.02)
        assert sample.var() == pytest.approx(distribution.variance, rel=0.05)
        assert distribution.ks_pvalue(sample) > 0.01
        assert distribution.ks_pvalue(1.1 * sample) < 1e-6
        np.testing.assert_array_equal(sample, distribution.sample(20_000, seeded()))
    with pytest.raises(ValueError, match="nc must be >= 0 and finite, got -1"):
        ScaledNCX2(1.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="scale must be > 0 and finite, got 0"):
        ScaledNCX2(1.0, 1.0, 0.0)


# The fit


@pytest.mark.parametrize(
    "truth", [ScaledNCX2(25.0, 0.0, 0.01), ScaledNCX2(40.0, 60.0, 1e-3), ScaledNCX2(400.0, 100.0, 1.0)]
)
def test_the_fit_knows_the_tail_that_the_sample_shows(truth: ScaledNCX2) -> None:
    sample = truth.sample(20_000, seeded())
    fit = fit_error_distribution(sample)
    edge = truth.scale * float(
        stats.ncx2.ppf(0.001, truth.df, truth.nc) if truth.nc else stats.chi2.ppf(0.001, truth.df)
    )
    assert fit.logcdf(edge) == pytest.approx(math.log(0.001), rel=0.05)
    assert fit.mean == pytest.approx(sample.mean())
    assert fit.variance == pytest.approx(sample.var(ddof=1))


def test_the_closed_form_solves_the_equations_of_three_cumulants() -> None:
    # Skewed enough to be inside the family: mean, variance and third cumulant are all matched.
    sample = ScaledNCX2(3.0, 4.0, 0.1).sample(5000, seeded(1))
    fit = fit_error_distribution(sample)
    third = 8 * fit.scale**3 * (fit.df + 3 * fit.nc)
    assert fit.nc > 0
    assert third == pytest.approx(float(stats.kstat(sample, 3)), rel=1e-9)
    mean, variance = sample.mean(), sample.var(ddof=1)
    root = math.sqrt(64 * variance**2 - 32 * mean * third)
    assert fit.scale == pytest.approx((8 * variance - root) / (16 * mean), rel=1e-9)


def test_a_sample_outside_the_family_gets_its_likelier_end() -> None:
    random = np.random.default_rng(0)
    skewed = random.lognormal(0.0, 0.5, 500)
    assert fit_error_distribution(skewed).nc == 0
    symmetric = 1 + 0.05 * random.standard_normal(500)
    fit = fit_error_distribution(symmetric)
    assert fit.mean == pytest.approx(symmetric.mean())
    assert math.isfinite(fit.logcdf(0.5))


@given(st.integers(0, 50), st.integers(8, 200))
@settings(max_examples=20)
def test_scaling_the_errors_scales_the_fit(seed: int, count: int) -> None:
    sample = np.random.default_rng(seed).gamma(10.0, 0.01, count)
    first, second = fit_error_distribution(sample), fit_error_distribution(1000 * sample)
    assert (second.df, second.nc, second.scale) == pytest.approx(
        (first.df, first.nc, 1000 * first.scale), rel=1e-6
    )


def test_likelihood_is_never_lost_by_looking_for_more() -> None:
    for truth in (ScaledNCX2(2.0, 6.0, 0.1), ScaledNCX2(200.0, 0.0, 0.1)):
        sample = truth.sample(300, seeded(2))
        moments, likely = (fit_error_distribution(sample, method) for method in ("moments", "mle"))
        assert likely.logpdf(sample).sum() >= moments.logpdf(sample).sum()
        assert likely.logpdf(sample).sum() >= truth.logpdf(sample).sum() - 0.01


def test_a_fit_that_misses_the_left_tail_is_seen() -> None:
    truth = ScaledNCX2(600.0, 0.0, 1e-4)
    sample = truth.sample(1000, seeded(3))
    gap, error = tail_gap(sample, fit_error_distribution(sample))
    assert abs(gap) < 3 * error
    # As wide as the likelihood search of a library left it once: 1.6 nats where 153 were due.
    wide = ScaledNCX2(6.0, 0.0, 1e-2)
    gap, error = tail_gap(sample, wide)
    assert gap > 10 * error


def test_the_p_value_counts_that_the_distribution_was_fitted() -> None:
    values = []
    for seed in range(8):
        sample = ScaledNCX2(20.0, 5.0, 0.01).sample(60, seeded(seed))
        values.append(
            fit_p_value(sample, fit_error_distribution(sample), resamples=19, generator=seeded(seed))
        )
    assert 0.25 < np.mean(values) < 0.75
    assert min(values) < 0.4
    two_groups = np.concatenate([np.linspace(0.10, 0.11, 50), np.linspace(0.2, 0.21, 50)])
    assert (
        fit_p_value(two_groups, fit_error_distribution(two_groups), resamples=39, generator=seeded())
        == 1 / 40
    )


def test_bad_input_is_named(as_users_call: None) -> None:
    good = list(np.linspace(0.1, 0.2, 9))
    for errors, message in (
        (good[:7], r"at least 8, got shape \(7,\)"),
        ([*good, math.nan], "finite and > 0"),
        ([*good, -0.1], r"finite and > 0, got values in \[-0.1, 0.2\]"),
        ([0.3] * 10, "errors must differ, got 10 times 0.3"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_error_distribution(errors)
    with pytest.raises(ValueError, match="method must be"):
        fit_error_distribution(good, "bayes")
