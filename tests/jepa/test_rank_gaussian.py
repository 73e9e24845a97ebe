"""Rank-Gaussianising and the information in correlations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, rankdata

from coloss.jepa import gaussian_copula_information, rank_gaussianise
from coloss.jepa.rank_gaussian import log_determinant_bias


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_values_are_those_of_scipys_ranks_with_ties_at_their_mean(values):
    found = rank_gaussianise(torch.tensor(values, dtype=torch.float64)[:, None])[:, 0]
    expected = norm.ppf((rankdata(values) - 0.5) / len(values))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_units_outliers_and_monotone_maps_do_not_matter():
    values = torch.randn(50, 3, dtype=torch.float64)
    plain = rank_gaussianise(values)
    for seen in (
        values.exp(),
        1e9 * values - 7,
        values**3,
        torch.where(values == values.max(), 1e12, values),
    ):
        torch.testing.assert_close(rank_gaussianise(seen), plain, rtol=0, atol=0)


def test_padding_is_zero_and_changes_nothing():
    values = torch.randn(2, 6, 3)
    filled = torch.cat([values, torch.full((2, 3, 3), -1e9)], 1)
    valid = torch.tensor([[True] * 6 + [False] * 3] * 2)
    found = rank_gaussianise(filled, valid)
    torch.testing.assert_close(found[:, :6], rank_gaussianise(values))
    assert (found[:, 6:] == 0).all()
    copula = gaussian_copula_information(found[..., :1], found[..., 1:], valid)
    plain = rank_gaussianise(values)
    torch.testing.assert_close(copula, gaussian_copula_information(plain[..., :1], plain[..., 1:]))


def test_constant_columns_and_single_samples_are_zero():
    assert (rank_gaussianise(torch.full((5, 2), 3.0)) == 0).all()
    assert (rank_gaussianise(torch.tensor([[4.0]])) == 0).all()
    assert rank_gaussianise(torch.zeros(0, 2)).shape == (0, 2)


def test_half_precision_comes_back_as_float32():
    assert rank_gaussianise(torch.randn(9, 2).half()).dtype is torch.float32


def test_the_gradient_is_the_slope_of_a_smooth_curve_through_the_points():
    # Normal samples are mapped to themselves, nearly: slope 1; three times as wide: slope 1/3.
    for scale in (1.0, 3.0):
        values = (scale * torch.special.ndtri((torch.arange(400.0) + 0.5) / 400)).unsqueeze(1)
        values = values[torch.randperm(400)].requires_grad_()
        rank_gaussianise(values).sum().backward()
        middle = values.detach().abs() < scale
        torch.testing.assert_close(
            values.grad[middle], torch.full_like(values.grad[middle], 1 / scale), rtol=0.02, atol=0
        )


def test_the_gradient_is_finite_with_ties_and_padding_and_zero_where_nothing_is():
    values = torch.tensor([[1.0, 5.0], [1.0, 5.0], [2.0, 5.0], [9.0, 9.0]], requires_grad=True)
    valid = torch.tensor([True, True, True, False])
    rank_gaussianise(values, valid).sum().backward()
    assert values.grad.isfinite().all()
    assert (values.grad[3] == 0).all()
    assert (values.grad[:, 1] == 0).all()
    assert (values.grad[:3, 0] > 0).all()


def test_the_correction_is_right_on_average_for_normal_samples():
    x, y = torch.randn(4000, 40, 2, dtype=torch.float64), torch.randn(4000, 40, 3, dtype=torch.float64)
    found = gaussian_copula_information(x, y)
    assert found.mean().abs() < 4 * found.std() / math.sqrt(4000)
    assert log_determinant_bias(torch.tensor(40.0), 2, 3) / 2 > 0.07


def test_a_copy_is_bounded_and_a_constant_shares_nothing():
    x = rank_gaussianise(torch.randn(100, 2))
    assert 4 < gaussian_copula_information(x, x) < 12
    assert gaussian_copula_information(x, torch.zeros(100, 1)).abs() < 0.05
    assert gaussian_copula_information(torch.zeros(3, 2), torch.zeros(3, 2)).isfinite()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_fewer_samples_than_columns_stay_finite(samples):
    x, y = torch.randn(samples, 4), torch.randn(samples, 4)
    assert gaussian_copula_information(x, y).isfinite()
