"""The soft choice of the k largest sums to k, hardens as alpha grows, and has exact gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.ops import log_soft_topk, soft_topk


def scores(rows=4, columns=9, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 10_000),
    columns=st.integers(2, 60),
    share=st.floats(0.02, 0.98),
    alpha=st.sampled_from([0.01, 0.5, 2.0, 50.0, 1e4]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_rows_sum_to_k(seed, columns, share, alpha, scale):
    values = scale * scores(3, columns, seed)
    k = share * columns
    degrees = soft_topk(values, k, alpha)
    torch.testing.assert_close(degrees.sum(1), torch.full((3,), k, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    order = values.argsort(1)
    assert (degrees.gather(1, order).diff(dim=1) >= -1e-12).all()


def test_single_precision_sums_to_k_within_1e_5():
    values = 5 * torch.randn(8, 500)
    assert (soft_topk(values, 5, 2.0).sum(1) - 5).abs().max() < 1e-5


def test_large_alpha_gives_the_hard_choice():
    values = scores()
    hard = torch.zeros_like(values).scatter(1, values.topk(3).indices, 1.0)
    torch.testing.assert_close(soft_topk(values, 3, 1e5), hard, rtol=0, atol=1e-6)


def test_a_shift_of_a_row_changes_nothing_and_the_log_is_the_log():
    values = scores()
    degrees = soft_topk(values, 2, 1.5)
    torch.testing.assert_close(soft_topk(values + 7, 2, 1.5), degrees)
    torch.testing.assert_close(log_soft_topk(values, 2, 1.5).exp(), degrees)
    spread = torch.tensor([[0.0, 1000.0, 2000.0]])
    assert log_soft_topk(spread, 1).tolist()[0][0] == pytest.approx(-1500, rel=0.01)  # exp of it is 0


def test_k_may_differ_between_rows():
    values = scores(3)
    degrees = soft_topk(values, torch.tensor([1, 2, 3]), 2.0)
    torch.testing.assert_close(degrees.sum(1), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(degrees[1], soft_topk(values[1:2], 2, 2.0)[0])


@pytest.mark.parametrize("function", [soft_topk, log_soft_topk])
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_gradients_are_exact(function, alpha):
    values = scores(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, 2.0, alpha), values)
    weights = torch.randn(3, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((function(values, 2.0, alpha) * weights).sum(), values)
    # A common shift of a row changes nothing, so gradients of a row cancel.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_entries_that_are_out_stay_out():
    values = scores(2, 6)
    values[:, 4:] = float("-inf")
    values.requires_grad_()
    degrees = soft_topk(values, 2, 1.0)
    assert (degrees[:, 4:] == 0).all()
    torch.testing.assert_close(degrees[:, :4], soft_topk(values[:, :4], 2, 1.0))
    (gradient,) = torch.autograd.grad(degrees.square().sum(), values)
    assert gradient.isfinite().all() and (gradient[:, 4:] == 0).all()


def test_half_precision_and_no_rows():
    values = torch.randn(2, 5).bfloat16().requires_grad_()
    degrees = soft_topk(values, 2)
    assert degrees.dtype == torch.float32
    degrees.square().sum().backward()
    assert values.grad.dtype == torch.bfloat16
    assert soft_topk(torch.zeros(0, 5), 2).shape == (0, 5)


def test_it_can_be_differentiated_once():
    values = scores(1, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_topk(values, 2).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match="alpha must be > 0 and finite, got 0"):
        soft_topk(torch.zeros(1, 4), 2, 0)
    for k in (0, 4, 5, -1):
        with pytest.raises(
            ValueError, match=rf"k must be in \(0, 4\), the scores of row 0 that count, got {k}"
        ):
            soft_topk(torch.zeros(1, 4), k)
