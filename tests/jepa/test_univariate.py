"""Facts about one-dimensional tests of normality: values by hand, by scipy and by integrals; limits; gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from coloss.jepa.univariate import (
    UNIVARIATE,
    anderson_darling,
    cramer_von_mises,
    extended_jarque_bera,
    moment_match,
    quantile_match,
    sliced_wasserstein,
)

OWN = sorted(set(UNIVARIATE) - {"epps_pulley"})
SORTING = {
    "cramer_von_mises": cramer_von_mises,
    "anderson_darling": anderson_darling,
    "sliced_wasserstein": sliced_wasserstein,
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integral(integrand, x):
    """Over the real line, piece by piece between the samples, where the integrand jumps."""
    edges = [-12.0, *np.sort(x), 12.0]
    return sum(
        integrate.quad(integrand, low, high, limit=200, epsabs=1e-12)[0]
        for low, high in zip(edges, edges[1:])
    )


def integrals(x):
    """The tests as integrals over the distribution function, straight from their definitions."""
    count = len(x)

    def squared(t):
        return (np.mean(x <= t) - stats.norm.cdf(t)) ** 2 * stats.norm.pdf(t)

    def weighted(t):
        return squared(t) / (stats.norm.cdf(t) * stats.norm.sf(t))

    def transported(t):
        rank = min(int(stats.norm.cdf(t) * count), count - 1)
        return (np.sort(x)[rank] - t) ** 2 * stats.norm.pdf(t)

    jumps = stats.norm.ppf(np.arange(1, count) / count)
    return {
        "cramer_von_mises": count * integral(squared, x),
        "anderson_darling": count * integral(weighted, x),
        "sliced_wasserstein": integral(transported, jumps),
    }


@pytest.mark.parametrize("count", [1, 2, 7])
def test_closed_forms_are_the_integrals(count):
    x = normal(count, 1, seed=count) * 1.5 + 0.3
    expected = integrals(x[:, 0].numpy())
    for name, statistic in SORTING.items():
        assert statistic(x).item() == pytest.approx(expected[name], rel=1e-7), name


def test_cramer_von_mises_is_scipys():
    x = normal(2, 50, 3)
    found = cramer_von_mises(x)
    for batch in range(2):
        for column in range(3):
            expected = stats.cramervonmises(x[batch, :, column].numpy(), "norm").statistic
            assert found[batch, column].item() == pytest.approx(expected, rel=1e-12)


def test_extended_jarque_bera_adds_two_moments_to_scipys():
    x = normal(40, 1) * 1.3 + 0.2
    variance = x.var().item()
    two = 40 * x.mean().item() ** 2 / variance + 39 * (variance - 1) ** 2 / 2
    expected = two + stats.jarque_bera(x[:, 0].numpy()).statistic
    assert extended_jarque_bera(x).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "count", "mean"),
    [
        ("cramer_von_mises", 5, 1 / 6),
        ("cramer_von_mises", 200, 1 / 6),
        ("anderson_darling", 5, 1.0),
        ("anderson_darling", 200, 1.0),
        ("extended_jarque_bera", 1000, 4.0),
    ],
)
def test_mean_under_the_standard_normal(name, count, mean):
    found = UNIVARIATE[name](normal(count, 1000))
    assert found.mean().item() == pytest.approx(mean, abs=5 * found.std().item() / math.sqrt(1000) + 1e-3)


@pytest.mark.parametrize("name", ["moment_match", "sliced_wasserstein", "quantile_match"])
def test_distances_vanish_for_many_normal_samples(name):
    small, large = (UNIVARIATE[name](normal(count, 100)).mean().item() for count in (100, 4000))
    assert large < 0.06 * small < 0.01


def test_values_worked_by_hand():
    two = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    phi = torch.special.ndtr(two)
    assert cramer_von_mises(two).item() == pytest.approx(1 / 24 + 2 * (0.25 - phi[0].item()) ** 2)
    expected = -2 - 0.5 * (2 * math.log(phi[0].item()) + 6 * math.log(phi[1].item()))
    assert anderson_darling(two).item() == pytest.approx(expected)
    # s^2 = 2, kurtosis 1: (2 - 1) * 1 / 2 + 2 / 6 * (1 - 3)^2 / 4.
    assert extended_jarque_bera(two).item() == pytest.approx(0.5 + 1 / 3)
    assert moment_match(torch.tensor([[1.0], [5.0]])).item() == 9 + 1
    # Quantiles at 1/4 and 3/4: the mean of the upper half of a normal is sqrt(2 / pi).
    assert sliced_wasserstein(two).item() == pytest.approx(2 - 2 * math.sqrt(2 / math.pi))
    quartile = torch.special.ndtri(torch.tensor(0.75, dtype=torch.float64)).item()
    assert quantile_match(two).item() == pytest.approx((1 - quartile) ** 2)
    assert quantile_match(3 * two + 1).item() == pytest.approx(1 + 4 + (1 - quartile) ** 2)


def test_shape_is_judged_apart_from_mean_and_spread():
    uniform = torch.linspace(-1, 1, 101, dtype=torch.float64).unsqueeze(1)
    shape = quantile_match(uniform) - moment_match(uniform)
    moved = 0.01 * uniform + 7
    assert (quantile_match(moved) - moment_match(moved)).item() == pytest.approx(shape.item())


def test_two_moments_miss_what_the_others_see():
    coins = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(500, 1)
    assert moment_match(coins).item() == pytest.approx(0, abs=1e-12)
    assert extended_jarque_bera(coins).item() > 100
    assert cramer_von_mises(coins).item() > 10
    assert sliced_wasserstein(coins).item() > 0.3


@pytest.mark.parametrize("name", OWN)
def test_order_and_leading_dimensions_do_not_matter(name):
    x = normal(3, 20, 4)
    found = UNIVARIATE[name](x)
    assert found.shape == (3, 4)
    assert torch.allclose(UNIVARIATE[name](x.flip(-2)), found)
    for batch in range(3):
        assert torch.allclose(UNIVARIATE[name](x[batch, :, :2]), found[batch, :2])


@pytest.mark.parametrize("name", OWN)
def test_gradient(name):
    x = normal(2, 6, 3).requires_grad_()
    statistic = UNIVARIATE[name]
    if name == "quantile_match":
        # The spread inside is a constant to the gradient, so finite differences must disagree.
        assert not torch.autograd.gradcheck(statistic, x, raise_exception=False)
    else:
        assert torch.autograd.gradcheck(statistic, x)


def test_gradient_of_quantile_match_holds_the_spread():
    x = normal(9, 1).requires_grad_()
    held = x.detach().std(0, correction=0)
    quantile = torch.special.ndtri((torch.arange(9, dtype=torch.float64) + 0.5) / 9).unsqueeze(1)

    def explicit(x):
        shape = ((x - x.mean(0)) / held).sort(0).values - quantile
        return x.mean(0).square() + (x.std(0, correction=0) - 1).square() + shape.square().mean(0)

    (found,) = torch.autograd.grad(quantile_match(x).sum(), x)
    (expected,) = torch.autograd.grad(explicit(x).sum(), x)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("name", OWN)
def test_no_sample_one_sample_and_equal_samples(name):
    empty = torch.zeros(2, 0, 3, requires_grad=True)
    value = UNIVARIATE[name](empty)
    assert value.shape == (2, 3)
    assert not value.any()
    value.sum().backward()
    for x in (torch.tensor([[0.7]]), torch.full((10, 2), 0.1), torch.zeros(4, 1)):
        x.requires_grad_()
        value = UNIVARIATE[name](x)
        assert value.isfinite().all()
        value.sum().backward()
        assert x.grad.isfinite().all()


def test_equal_samples_have_no_spread():
    # 0.1 summed ten times is not 1: the mean is rounded, and what is left of the samples must not pass for spread.
    x = torch.full((10, 1), 0.1)
    assert extended_jarque_bera(x).item() == 4.5
    assert moment_match(x).item() == pytest.approx(1.01)
    assert sliced_wasserstein(x).item() == pytest.approx(1.01)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(name, dtype):
    x = normal(64, 5).to(dtype).requires_grad_()
    value = UNIVARIATE[name](x)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), UNIVARIATE[name](x.detach().double()), rtol=1e-4)
    value.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("far", [30.0, 1e4, 1e7])
def test_tails_are_exact_in_single_precision(far):
    x = torch.tensor([[-far], [0.0], [far]], requires_grad=True)
    value = anderson_darling(x)
    twin = x.detach().double().requires_grad_()
    expected = anderson_darling(twin)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(x.grad.double(), twin.grad, rtol=1e-5)
    # Far out log Phi(x) is -x^2 / 2, and the outermost sample of either end has weight 1 / N.
    assert x.grad[2].item() == pytest.approx(far / 3, rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_bounds_hold_for_every_sample(values):
    x = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    count = len(values)
    assert 1 / (12 * count) - 1e-12 <= cramer_von_mises(x).item() <= count / 3 + 1e-9
    assert anderson_darling(x).item() > 0
    assert extended_jarque_bera(x).item() >= 0
    # Transport cannot cost less than moving the mean and the spread.
    assert sliced_wasserstein(x).item() >= moment_match(x).item() - 1e-9
