"""Facts about the rank at a given error, and the loss that keeps weights away from low rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import delta_rank, low_rank_distance_loss


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_rank(weight, delta):
    """The definition, by NumPy."""
    s = np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)
    tails = [(s[k:] ** 2).sum() / (s**2).sum() for k in range(1, len(s))]
    return 1 + int(np.argmin([abs(tail - delta) for tail in tails]))


@given(st.integers(0, 1000), st.floats(0.01, 0.9))
@settings(max_examples=25, deadline=None)
def test_rank_and_loss_are_those_of_the_definition(seed, delta):
    weight = randn(7, 5, seed=seed)
    rank = delta_rank(weight, delta)
    assert rank == slow_rank(weight, delta)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    expected = -(s[rank:] ** 2).sum() / (s**2).sum()
    assert low_rank_distance_loss(weight, delta).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_rank_one_has_loss_0_and_the_least_rank(dtype):
    """All its tails are equal up to rounding: the least rank wins, where an argmin would go by rounding noise."""
    for seed in range(5):
        weight = randn(12, 1, seed=seed, dtype=dtype) @ randn(1, 9, seed=seed + 50, dtype=dtype)
        assert delta_rank(weight, 0.4) == 1
        assert low_rank_distance_loss(weight, 0.4).item() == pytest.approx(0, abs=1e-12)


@given(st.integers(4, 20), st.floats(0.01, 0.95), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_of_an_orthogonal_matrix_the_loss_is_the_nearest_share(n, delta, seed):
    orthogonal = torch.linalg.qr(randn(n, n, seed=seed)).Q
    dropped = min(max(1, round(delta * n)), n - 1)
    if abs(delta * n % 1 - 0.5) > 1e-6:
        assert delta_rank(orthogonal, delta) == n - dropped
        assert low_rank_distance_loss(orthogonal, delta).item() == pytest.approx(-dropped / n)


def test_one_value_is_kept_and_one_dropped_at_the_ends():
    weight = randn(6, 4)
    assert delta_rank(weight, 1.0) == 1
    assert delta_rank(weight, 0.0) == 3
    # At rank 0 the distance would be constant and its gradient 0.
    weight.requires_grad_()
    low_rank_distance_loss(weight, 0.99).backward()
    assert weight.grad.norm() > 1e-3


def test_gradient_is_that_of_the_formula_and_orthogonal_to_the_weight():
    weight = randn(6, 5).requires_grad_()
    low_rank_distance_loss(weight, 0.2).backward()
    norm, unit = weight.detach().norm(), weight.detach() / weight.detach().norm()
    U, S, Vh = torch.linalg.svd(unit, full_matrices=False)
    k = delta_rank(weight, 0.2)
    rest = unit - (U[:, :k] * S[:k]) @ Vh[:k]
    torch.testing.assert_close(weight.grad, -2 / norm * (rest - unit * rest.square().sum()))
    assert (weight.grad * weight).sum().item() == pytest.approx(0, abs=1e-14)


def test_the_twin_is_held_fixed_which_is_also_the_gradient_of_the_tail():
    """The best approximation does not move to first order, so differences of the tail energy agree with the detached gradient."""
    weight = randn(5, 4).requires_grad_()
    k = delta_rank(weight, 0.15)

    def tail(w):
        s = torch.linalg.svdvals(w)
        return -(s[k:] ** 2).sum() / (s**2).sum()

    low_rank_distance_loss(weight, 0.15).backward()
    (expected,) = torch.autograd.grad(tail(weight), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_a_step_down_the_loss_raises_the_rank():
    weight = (randn(20, 3) @ randn(3, 20, seed=1) + 0.1 * randn(20, 20, seed=2)).requires_grad_()
    before = delta_rank(weight, 0.1)
    for _ in range(50):
        (gradient,) = torch.autograd.grad(low_rank_distance_loss(weight, 0.1), weight)
        weight = (weight - 20 * gradient).detach().requires_grad_()
    assert delta_rank(weight, 0.1) > before


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter_not_even_where_squares_overflow(scale):
    weight = randn(6, 5, dtype=torch.float32)
    scaled = (weight * scale).requires_grad_()
    loss = low_rank_distance_loss(scaled, 0.2)
    torch.testing.assert_close(loss.detach(), low_rank_distance_loss(weight, 0.2))
    assert delta_rank(scaled, 0.2) == delta_rank(weight, 0.2)
    loss.backward()
    assert scaled.grad.isfinite().all()


def test_layers_are_averaged_and_those_without_a_rank_left_out():
    kernel, matrix = randn(4, 3, 2, 2), randn(5, 6)
    each = [low_rank_distance_loss(weight, 0.2) for weight in (kernel, matrix)]
    torch.testing.assert_close(each[0], low_rank_distance_loss(kernel.flatten(1), 0.2))
    together = low_rank_distance_loss([kernel, torch.zeros(3, 3), matrix, randn(1, 7)], 0.2)
    torch.testing.assert_close(together, (each[0] + each[1]) / 2)
    assert delta_rank(torch.zeros(3, 3), 0.2) == 0
    assert delta_rank(randn(1, 7), 0.2) == 1


def test_a_zero_layer_gives_0_with_a_gradient_of_0():
    weight = torch.zeros(3, 4, requires_grad=True)
    low_rank_distance_loss(weight, 0.2).backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))


def test_nan_stays_nan():
    for bad in (torch.nan, torch.inf):
        weight = randn(3, 3, dtype=torch.float32)
        weight[0, 0] = bad
        assert low_rank_distance_loss([randn(3, 3, dtype=torch.float32), weight], 0.2).isnan()
        with pytest.raises(ValueError, match="weight must be finite"):
            delta_rank(weight, 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_decomposed_in_float32(dtype):
    weight = randn(8, 8, dtype=torch.float32).to(dtype)
    expected = low_rank_distance_loss(weight.float(), 0.2)
    half = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = low_rank_distance_loss(half, 0.2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    loss.backward()
    assert half.grad.dtype == dtype


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"delta must be in \[0, 1\], got 1.5"):
        delta_rank(torch.eye(2), 1.5)
    with pytest.raises(ValueError, match="delta must be in"):
        low_rank_distance_loss(torch.eye(2), float("nan"))
    with pytest.raises(ValueError, match="weights must hold at least one weight, got none"):
        low_rank_distance_loss([], 0.2)
    with pytest.raises(ValueError, match="weight must have at least 2 dimensions"):
        low_rank_distance_loss(torch.ones(3), 0.2)
