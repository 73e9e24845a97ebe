"""Facts about losses on scores: bounds, limits, slow twins, masks and memory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats
from sklearn.metrics import roc_auc_score

from coloss.ops import (
    duplicate_mask,
    info_nce_loss,
    masked_logsumexp,
    pairwise_logistic_loss,
    relevance_from_ids,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(randn(*shape, seed=seed, dtype=dtype), dim=-1)


def dense_pairwise(positive: torch.Tensor, negative: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.softplus(-(positive[:, None] - negative[None, :]) / temperature).mean()


scores = npst.arrays(np.float64, st.integers(1, 12), elements=st.floats(-5, 5))


@given(scores, scores, st.floats(0.01, 10), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_chunked_equals_dense_in_value_and_gradient(p, n, temperature, chunk_size):
    p, n = torch.from_numpy(p).requires_grad_(), torch.from_numpy(n).requires_grad_()
    value = pairwise_logistic_loss(p, n, temperature, chunk_size)
    dense = dense_pairwise(p, n, temperature)
    torch.testing.assert_close(value, dense)
    got, expected = torch.autograd.grad(value, (p, n)), torch.autograd.grad(dense, (p, n))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert got[0].sum().item() == pytest.approx(-got[1].sum().item(), abs=1e-9)


def test_equal_scores_cost_log_two():
    value = pairwise_logistic_loss(torch.full((7,), 0.3), torch.full((5,), 0.3), 0.05)
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)


@given(scores, scores, st.floats(0.01, 10))
@settings(max_examples=25, deadline=None)
def test_it_bounds_the_area_over_the_curve(p, n, temperature):
    auc = roc_auc_score([1] * len(p) + [0] * len(n), np.concatenate([p, n]))
    loss = pairwise_logistic_loss(torch.from_numpy(p), torch.from_numpy(n), temperature).item()
    assert loss / math.log(2) >= 1 - auc - 1e-12


def test_sharp_gradients_count_what_mann_whitney_counts():
    p, n = randn(30).requires_grad_(), randn(40, seed=1)
    temperature = 1e-7
    pairwise_logistic_loss(p, n, temperature, reduction="sum").backward()
    wrong_pairs = -temperature * p.grad.sum().item()
    u = stats.mannwhitneyu(p.detach().numpy(), n.numpy()).statistic
    assert wrong_pairs == pytest.approx(30 * 40 - u)


@given(scores, scores, st.floats(-100, 100))
@settings(max_examples=20, deadline=None)
def test_a_shift_of_all_scores_changes_nothing(p, n, shift):
    p, n = torch.from_numpy(p), torch.from_numpy(n)
    torch.testing.assert_close(
        pairwise_logistic_loss(p + shift, n + shift, 0.5),
        pairwise_logistic_loss(p, n, 0.5),
        rtol=1e-8,
        atol=1e-10,
    )


def test_a_shift_of_one_query_does_change_it():
    p, n = randn(4), randn(4, seed=1)
    shift = torch.tensor([0.0, 0.0, 3.0, 0.0])
    assert pairwise_logistic_loss(p + shift, n + shift, 1.0) != pairwise_logistic_loss(p, n, 1.0)


def test_one_pair_is_the_cross_entropy_of_two_candidates():
    p, n = randn(1), randn(1, seed=1)
    expected = F.cross_entropy(torch.stack([p, n], 1), torch.tensor([0]))
    torch.testing.assert_close(pairwise_logistic_loss(p, n, 1.0), expected)


def test_pairwise_gradcheck_and_reductions():
    p, n = randn(4).requires_grad_(), randn(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pairwise_logistic_loss(a, b, 0.7, 6), (p, n))
    total = pairwise_logistic_loss(p, n, 0.7, reduction="sum")
    torch.testing.assert_close(total, 20 * pairwise_logistic_loss(p, n, 0.7))
    assert torch.autograd.gradcheck(lambda a: pairwise_logistic_loss(a, n.detach(), 0.7), (p,))


@pytest.mark.parametrize(("positives", "negatives"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_pool_costs_nothing_with_a_graph(positives, negatives):
    p, n = torch.ones(positives, requires_grad=True), torch.ones(negatives, requires_grad=True)
    value = pairwise_logistic_loss(p, n, 0.1)
    value.backward()
    assert value == 0
    assert p.grad.eq(0).all()
    assert n.grad.eq(0).all()


def test_extreme_and_infinite_scores():
    p, n = torch.tensor([-1e4], requires_grad=True), torch.tensor([1e4])
    value = pairwise_logistic_loss(p, n, 0.1)
    value.backward()
    assert value.item() == pytest.approx(2e5)
    assert p.grad.item() == pytest.approx(-10)
    left_out = torch.tensor([0.5, -math.inf], requires_grad=True)
    value = pairwise_logistic_loss(torch.zeros(3), left_out, 1.0, reduction="sum")
    value.backward()
    torch.testing.assert_close(
        value, pairwise_logistic_loss(torch.zeros(3), torch.tensor([0.5]), 1.0, reduction="sum")
    )
    assert left_out.grad[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairwise_half_precision_is_computed_in_float32(dtype):
    p, n = randn(50).to(dtype).requires_grad_(), randn(60, seed=1).to(dtype)
    value = pairwise_logistic_loss(p, n, 0.05)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, pairwise_logistic_loss(p.float(), n.float(), 0.05))
    value.backward()
    assert p.grad.dtype == dtype


def test_many_small_terms_are_not_lost_in_float32():
    p, n = torch.full((3000,), 2.0), torch.full((3000,), -2.0)
    exact = math.log1p(math.exp(-4))
    assert pairwise_logistic_loss(p, n, 1.0).item() == pytest.approx(exact, rel=1e-6)


def test_pairwise_memory_is_that_of_a_tile(largest_tensor, saved_tensors):
    p, n = torch.randn(400, requires_grad=True), torch.randn(300, requires_grad=True)
    with saved_tensors() as kept, largest_tensor() as meter:
        value = pairwise_logistic_loss(p, n, 0.1, chunk_size=20)
        assert kept.numel <= 4 * 700  # a few vectors, no matrix of pairs
        value.backward()
    assert meter.numel <= 2 * 400


def dense_info_nce(q, k, temperature, ignore=None):
    s = q @ k.T / temperature
    if ignore is not None:
        s = s.masked_fill(ignore & ~torch.eye(*s.shape, dtype=torch.bool), -math.inf)
    return F.cross_entropy(s, torch.arange(len(q)))


@given(
    st.integers(1, 8),
    st.integers(0, 5),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_info_nce_equals_cross_entropy(count, extra, chunk_size, symmetric, with_ignore, seed):
    q = randn(count, 4, seed=seed).requires_grad_()
    k = randn(count + extra, 4, seed=seed + 1).requires_grad_()
    ignore = randn(count, count + extra, seed=seed + 2) > 0.3 if with_ignore else None
    value = info_nce_loss(q, k, 0.5, symmetric=symmetric, ignore=ignore, chunk_size=chunk_size)
    dense = dense_info_nce(q, k, 0.5, ignore)
    if symmetric:
        turned = None if ignore is None else ignore[:, :count].T
        dense = (dense + dense_info_nce(k[:count], q, 0.5, turned)) / 2
    torch.testing.assert_close(value, dense)
    for a, b in zip(torch.autograd.grad(value, (q, k)), torch.autograd.grad(dense, (q, k))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_info_nce_gradcheck():
    q, k = randn(3, 2).requires_grad_(), randn(4, 2, seed=1).requires_grad_()
    for symmetric in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, b: info_nce_loss(a, b, 0.7, symmetric=symmetric, chunk_size=2),  # noqa: B023
            (q, k),
        )


def test_info_nce_of_known_embeddings():
    same = torch.ones(8, 3)
    assert info_nce_loss(same, same, 0.07).item() == pytest.approx(math.log(8), rel=1e-6)
    assert info_nce_loss(torch.eye(5), torch.eye(5), 0.01).item() == pytest.approx(0, abs=1e-6)
    assert info_nce_loss(torch.ones(1, 3), torch.ones(1, 3)).item() == 0


def test_info_nce_is_blind_to_an_offset_for_each_query_where_pooled_pairs_are_not():
    """A constant feature of the query adds one constant to all of its scores."""
    q, k = unit(6, 4), unit(6, 4, seed=1)
    offsets = 3 * randn(6, 1, seed=2)
    shifted_q, shifted_k = torch.cat([q, offsets], 1), torch.cat([k, torch.ones(6, 1).double()], 1)
    torch.testing.assert_close(info_nce_loss(shifted_q, shifted_k, 0.5), info_nce_loss(q, k, 0.5))
    own = torch.eye(6, dtype=torch.bool)
    plain, shifted = q @ k.T, shifted_q @ shifted_k.T
    assert pairwise_logistic_loss(shifted[own], shifted[~own], 0.5) > pairwise_logistic_loss(
        plain[own], plain[~own], 0.5
    )


def test_duplicates_left_out_cost_nothing():
    ids = torch.tensor([3, 5, 3, 9])
    k = unit(3, 8)[torch.tensor([0, 1, 0, 2])]
    with_ignore = info_nce_loss(k, k, 0.1, ignore=duplicate_mask(ids))
    assert with_ignore < info_nce_loss(k, k, 0.1) - 0.3
    s = k @ k.T / 0.1
    by_hand = [
        torch.logsumexp(s[i][[j for j in range(4) if j == i or ids[j] != ids[i]]], 0) - s[i, i]
        for i in range(4)
    ]
    torch.testing.assert_close(with_ignore, torch.stack(by_hand).mean())


def test_a_positive_cannot_be_ignored():
    q, k = randn(3, 4), randn(3, 4, seed=1)
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert info_nce_loss(q, k, ignore=everything, symmetric=True) == 0
    assert everything.all()  # and the mask is not written to


def test_info_nce_extremes_and_nothing():
    q = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    value = info_nce_loss(q, -q.detach(), 0.01)
    value.backward()
    assert value.item() == pytest.approx(1e10)
    assert q.grad.isfinite().all()
    nothing = torch.zeros(0, 3, requires_grad=True)
    value = info_nce_loss(nothing, torch.ones(4, 3), symmetric=True)
    value.backward()
    assert value == 0
    assert nothing.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_in_half_precision_and_under_autocast(dtype):
    q, k = unit(16, 8).to(dtype).requires_grad_(), unit(16, 8, seed=1).to(dtype).requires_grad_()
    wide_q, wide_k = (x.detach().float().requires_grad_() for x in (q, k))
    expected = info_nce_loss(wide_q, wide_k, symmetric=True)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = info_nce_loss(q, k, symmetric=True)
        value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(q.grad.float(), wide_q.grad, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(k.grad.float(), wide_k.grad, rtol=1e-2, atol=1e-3)


def test_no_score_matrix_survives_or_exists(largest_tensor, saved_tensors):
    q, k = torch.randn(256, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with saved_tensors() as kept, largest_tensor() as meter:
        value = info_nce_loss(q, k, symmetric=True, chunk_size=8)
        assert kept.numel <= 3 * (256 + 300) * 4
        value.backward()
    assert meter.numel <= 300 * 4


def test_batched_gradients_equal_gradients_one_by_one():
    q, k = randn(4, 3).requires_grad_(), randn(4, 3, seed=1)
    both = torch.stack([info_nce_loss(q, k, 0.5), pairwise_logistic_loss(q[0], k[1], 0.5)])
    (batched,) = torch.autograd.grad(both, q, torch.eye(2).double(), is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(one, q, retain_graph=True)[0] for one in both]
    torch.testing.assert_close(batched, torch.stack(singly))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: pairwise_logistic_loss(x[0], x[1], 0.5),
        lambda x: info_nce_loss(x, x, 0.5),
    ],
)
def test_a_second_derivative_is_an_error(loss):
    x = randn(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="this loss on pairs of embeddings can be differentiated only once"
    ):
        gradient.square().sum().backward()


@given(npst.arrays(np.float64, (3, 4), elements=st.floats(-1e3, 1e3)), npst.arrays(np.bool_, (3, 4)))
@settings(max_examples=25, deadline=None)
def test_masked_logsumexp_equals_numpy_row_by_row(values, mask):
    x = torch.from_numpy(values).requires_grad_()
    got = masked_logsumexp(x, torch.from_numpy(mask), dim=1)
    for row, kept, result in zip(values, mask, got.tolist()):
        expected = np.logaddexp.reduce(row[kept]) if kept.any() else -math.inf
        assert result == pytest.approx(expected)
    got[torch.from_numpy(mask.any(1))].sum().backward()
    torch.testing.assert_close(
        x.grad.sum(1), torch.from_numpy(mask.any(1)).double()
    )  # softmax weights of what is kept


def test_masked_logsumexp_of_empty_rows_has_zero_gradient():
    x = torch.tensor([[1.0, math.nan], [-math.inf, -math.inf], [2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, True], [True, False]])
    result = masked_logsumexp(x, mask)
    assert result.tolist() == [-math.inf, -math.inf, 2.0]
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


def test_masked_logsumexp_broadcasts_reduces_any_dimension_and_widens():
    x = randn(2, 3, 4)
    mask = torch.tensor([True, False, True]).reshape(3, 1)
    torch.testing.assert_close(masked_logsumexp(x, mask, dim=1), torch.logsumexp(x[:, [0, 2]], 1))
    assert masked_logsumexp(x.half(), mask, dim=1).dtype == torch.float32
    assert masked_logsumexp(x[:, :0], mask[:0], dim=1).eq(-math.inf).all()


def test_masks_from_ids():
    documents = torch.tensor([4, 2, 4, 7])
    relevance = relevance_from_ids(torch.tensor([2, 4]), documents)
    assert relevance.tolist() == [[False, True, False, False], [True, False, True, False]]
    assert duplicate_mask(documents).nonzero().tolist() == [[0, 2], [2, 0]]
    assert relevance_from_ids(documents[:0], documents).shape == (0, 4)


@given(st.lists(st.integers(0, 3), max_size=8))
@settings(max_examples=20, deadline=None)
def test_duplicates_and_self_make_up_relevance(ids):
    ids = torch.tensor(ids, dtype=torch.long)
    both = duplicate_mask(ids) | torch.eye(len(ids), dtype=torch.bool)
    assert torch.equal(both, relevance_from_ids(ids, ids))


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named():
    p, q = torch.ones(3), torch.ones(3, 2)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got -0.1"):
        pairwise_logistic_loss(p, p, -0.1)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        pairwise_logistic_loss(p, p, 0.1, 0)
    with pytest.raises(ValueError, match="reduction must be .*, got 'none'"):
        pairwise_logistic_loss(p, p, 0.1, reduction="none")
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        info_nce_loss(q, q, 0.0)
    with pytest.raises(ValueError, match=r"keys must have at least 3 rows of width 2, got \(2, 2\)"):
        info_nce_loss(q, q[:2])
    with pytest.raises(ValueError, match=r"keys must have at least 3 rows of width 2, got \(3, 1\)"):
        info_nce_loss(q, q[:, :1])
    with pytest.raises(ValueError, match=r"ignore must have shape \(3, 3\), got \(3, 2\)"):
        info_nce_loss(q, q, ignore=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got -2"):
        info_nce_loss(q, q, chunk_size=-2)
