"""Facts about codewords on a line, and about gradients of a choice among them."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import codebook_lookup, kmeans_1d, nearest_codes, nearest_codeword, proximal_code_weights

DOUBLE = torch.float64


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(values, found, weights=None):
    squares = (values - found.table.gather(1, found.codes.long())).square()
    return (squares if weights is None else weights * squares).sum(1)


def best_error(values, codes, weights):
    """Every way to cut the sorted values into intervals."""
    order = np.argsort(values)
    x, w = values[order], weights[order]
    errors = []
    for cuts in combinations(range(1, len(x)), codes - 1):
        bounds = [0, *cuts, len(x)]
        parts = [(x[a:b], w[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        errors.append(sum((q * (p - np.average(p, weights=q)) ** 2).sum() for p, q in parts))
    return min(errors)


@given(st.integers(0, 1000), st.integers(5, 8), st.integers(1, 4))
@settings(max_examples=6)
def test_few_values_are_cut_in_the_best_way(seed, count, codes):
    values, weights = randn(2, count, seed=seed), randn(2, count, seed=seed + 1).abs() + 0.1
    found = kmeans_1d(values, codes, weights=weights)
    for row in range(2):
        best = best_error(values[row].numpy(), codes, weights[row].numpy())
        assert error(values, found, weights)[row].item() == pytest.approx(best)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=4), st.integers(0, 100))
@settings(max_examples=10)
def test_no_more_distinct_values_than_codewords_are_kept_exactly(distinct, seed):
    pick = torch.randint(len(distinct), (1, 50), generator=torch.Generator().manual_seed(seed))
    values = torch.tensor(distinct)[pick]
    found = kmeans_1d(values, 4)
    assert torch.equal(found.table.gather(1, found.codes.long()), values)
    assert (found.table.diff(dim=1) >= 0).all()


def test_two_codewords_of_a_symmetric_law_are_plus_and_minus_the_mean_size():
    half = randn(1, 1000).abs()
    values = torch.cat([half, -half], 1)
    table = kmeans_1d(values, 2).table
    torch.testing.assert_close(table, half.mean() * torch.tensor([[-1.0, 1.0]], dtype=DOUBLE))


def test_many_values_end_at_a_fixed_point_near_the_known_optimum_of_a_gaussian():
    values = randn(3, 20_000)
    found = kmeans_1d(values, 4)
    # Max 1960: least error of four levels is 0.1175.
    assert (error(values, found) / 20_000).tolist() == pytest.approx([0.1175] * 3, abs=0.004)
    for row in range(3):
        means = [values[row][found.codes[row] == k].mean() for k in range(4)]
        torch.testing.assert_close(torch.stack(means), found.table[row])


def test_padding_by_weight_0_changes_nothing():
    values = randn(1, 40)
    padded = torch.cat([values, torch.full((1, 7), 99.0, dtype=DOUBLE)], 1)
    weights = torch.cat([torch.ones(1, 40), torch.zeros(1, 7)], 1).double()
    torch.testing.assert_close(kmeans_1d(padded, 4, weights=weights).table, kmeans_1d(values, 4).table)
    many = torch.cat([randn(1, 64, seed=1), torch.full((1, 4000), 99.0, dtype=DOUBLE)], 1)
    weights = (torch.arange(4064) < 64).double()[None]
    assert torch.equal(kmeans_1d(many, 8, weights=weights).table, kmeans_1d(many[:, :64], 8).table)
    nothing = kmeans_1d(values, 4, weights=torch.zeros_like(values))
    assert nothing.table.isfinite().all()


def test_dead_codewords_are_seeded_anew():
    """Every codeword far away on one side: all values fall to the first of them."""
    values = randn(2, 500)
    found = kmeans_1d(values, 8, start=torch.full((2, 8), 50.0, dtype=DOUBLE))
    assert [len(row.unique()) for row in found.codes] == [8, 8]
    assert (error(values, found) < 1.3 * error(values, kmeans_1d(values, 8))).all()


def test_edges():
    one = kmeans_1d(torch.tensor([[2.0]]), 4)
    assert one.table.tolist() == [[2.0] * 4]
    assert kmeans_1d(randn(2, 9), 1).table.flatten().tolist() == pytest.approx(randn(2, 9).mean(1).tolist())
    assert kmeans_1d(torch.empty(0, 3), 2).codes.shape == (0, 3)
    half = kmeans_1d(randn(1, 64).half(), 4)
    assert half.table.dtype == torch.float32
    assert len(kmeans_1d(randn(1, 700), 256).codes.unique()) == 256


def test_the_nearest_codeword_is_found_and_ties_go_down():
    values, table = randn(3, 50), randn(3, 6, seed=1).sort(1).values
    expected = (values[:, :, None] - table[:, None]).abs().argmin(-1)
    assert torch.equal(nearest_codes(values, table).long(), expected)
    assert nearest_codes(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])).tolist() == [[0, 1]]


def test_numbers_near_the_largest_do_not_overflow():
    table = torch.tensor([[40_000.0, 50_000.0]]).half()
    assert nearest_codes(torch.tensor([[50_000.0]]), table).tolist() == [[1]]
    assert kmeans_1d(torch.tensor([[3.0e38, 3.1e38, 3.3e38, 3.4e38]]), 2).codes.tolist() == [[0, 0, 1, 1]]


def test_soft_gradient_is_the_formula():
    logits, table = randn(5, 4).requires_grad_(), randn(1, 4, seed=1).requires_grad_()
    g = randn(5, seed=2)
    value = codebook_lookup(logits, table, "soft", temperature=0.7)
    to_logits, to_table = torch.autograd.grad(value, [logits, table], g)
    shares = (logits / 0.7).softmax(-1).detach()
    value = value.detach()[:, None]
    torch.testing.assert_close(to_logits, g[:, None] * shares * (table.detach() - value) / 0.7)
    torch.testing.assert_close(to_table, (g[:, None] * shares).sum(0, keepdim=True))
    assert torch.autograd.gradcheck(lambda m, c: codebook_lookup(m, c, "soft"), [logits, table])


def test_proximal_gradient_is_hard_forward_and_local_backward():
    logits, table = randn(5, 4).requires_grad_(), randn(1, 4, seed=1).requires_grad_()
    g = randn(5, seed=2)
    value = codebook_lookup(logits, table, spacing=0.5)
    codes = logits.argmax(-1)
    assert torch.equal(value, table[0, codes])
    to_logits, to_table = torch.autograd.grad(value, [logits, table], g)
    phi = proximal_code_weights(table.detach().expand(5, 4), table.detach()[0, codes][:, None], 0.5)
    torch.testing.assert_close(to_logits, g[:, None] * logits.detach().softmax(-1) * phi)
    assert (to_logits.gather(1, codes[:, None]) == 0).all()
    torch.testing.assert_close(to_table[0], torch.zeros(4, dtype=DOUBLE).index_add_(0, codes, g))


def test_proximal_weights_fall_with_distance_where_the_default_ones_grow():
    table = torch.arange(8.0)
    phi = proximal_code_weights(table, table[2:3], 1.0)
    assert phi[2] == 0
    assert (phi[3:].diff() < 0).all()
    assert (phi[:2].diff() < 0).all()
    assert (phi[:2] < 0).all()
    assert ((table - table[2])[3:].diff() > 0).all()
    # Codewords that all but coincide do not send the weight to infinity; without any gap there is none.
    assert proximal_code_weights(torch.tensor([0.0, 1e-9]), torch.tensor([0.0]), 1.0).max() <= 10
    assert proximal_code_weights(torch.zeros(3), torch.zeros(1), 0.0).tolist() == [0.0] * 3


def test_straight_through_nearest_passes_the_gradient_whole():
    values, table = randn(6).requires_grad_(), randn(4, seed=1).requires_grad_()
    g = randn(6, seed=2)
    found = nearest_codeword(values, table)
    to_values, to_table = torch.autograd.grad(found, [values, table], g)
    codes = (values[:, None] - table).abs().argmin(1)
    assert torch.equal(found, table[codes])
    assert torch.equal(to_values, g)
    torch.testing.assert_close(to_table, torch.zeros(4, dtype=DOUBLE).index_add_(0, codes, g))


def test_hidden_codewords_are_never_chosen_and_half_precision_is_widened():
    logits = torch.tensor([[5.0, 1.0, 0.0]]).masked_fill(torch.tensor([True, False, False]), -torch.inf)
    table = torch.tensor([0.0, 1.0, 2.0])
    assert codebook_lookup(logits, table).item() == 1.0
    soft = codebook_lookup(logits.requires_grad_(), table, "soft")
    assert soft.item() == pytest.approx(1 + 1 / (1 + np.e))
    assert torch.autograd.grad(soft.sum(), logits)[0].isfinite().all()
    assert codebook_lookup(logits.bfloat16(), table, "soft").dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans_1d(torch.ones(1, 3), 0), r"codes must be in 1\.\.256, got 0"),
        (lambda: kmeans_1d(torch.ones(1, 0), 2), "values must hold at least one in each group, got none"),
        (lambda: kmeans_1d(torch.tensor([[torch.nan]]), 2), "values must be finite, got NaN or infinity"),
        (
            lambda: kmeans_1d(torch.ones(1, 2), 2, weights=torch.tensor([[1.0, -1.0]])),
            r"weights must be finite and >= 0, got -1\.0",
        ),
        (
            lambda: kmeans_1d(torch.ones(1, 2), 2, weights=torch.tensor([[1.0, torch.inf]])),
            "weights must be finite and >= 0, got inf",
        ),
        (
            lambda: kmeans_1d(torch.ones(1, 5), 4, start=torch.zeros(1, 3)),
            r"start must have 4 codewords for each of 1 groups, got \(1, 3\)",
        ),
        (
            lambda: codebook_lookup(torch.ones(1, 2), torch.ones(2), temperature=0.0),
            r"temperature must be > 0, got 0\.0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("as_users_call")
def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match='gradient must be "soft" or "proximal", got \'hard\''):
        codebook_lookup(torch.ones(1, 2), torch.ones(2), "hard")
