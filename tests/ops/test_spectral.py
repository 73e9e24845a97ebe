"""Facts about singular values: layouts, truncation, the nuclear norm and effective rank."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from coloss.ops import (
    effective_rank,
    gram_singular_values,
    matricize,
    nuclear_norm,
    rank_at_energy,
    truncated_svd,
)

SHAPES = {"channel": (8, 36), "spatial": (12, 24), "decoupled": (8, 4, 9)}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    count = len(values)
    left = torch.linalg.qr(randn(rows, count, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, count, seed=seed + 1)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("scheme", SHAPES)
def test_matrix_and_weight_hold_the_same_numbers(scheme):
    weight = randn(8, 4, 3, 3)
    matrix, restore = matricize(weight, scheme)
    assert matrix.shape == SHAPES[scheme]
    assert torch.equal(restore(matrix), weight)
    torch.testing.assert_close(matrix.square().sum(), weight.square().sum())


def test_entries_lie_where_the_paper_puts_them():
    weight = randn(8, 4, 3, 5)
    n, c, i, j = 5, 2, 1, 4
    assert matricize(weight, "channel")[0][n, (c * 3 + i) * 5 + j] == weight[n, c, i, j]
    assert matricize(weight, "spatial")[0][c * 3 + i, n * 5 + j] == weight[n, c, i, j]
    assert matricize(weight, "decoupled")[0][n, c, i * 5 + j] == weight[n, c, i, j]


def test_other_layers_and_gradients():
    linear = randn(6, 5).requires_grad_()
    matrix, restore = matricize(linear, "channel")
    assert torch.equal(matrix, linear)
    restore(2 * matrix).sum().backward()
    assert torch.equal(linear.grad, torch.full_like(linear, 2))
    assert matricize(randn(6, 5, 3), "channel")[0].shape == (6, 15)
    assert matricize(randn(6, 5, 3), "decoupled")[0].shape == (6, 5, 3)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_separable_filter_has_spatial_rank_of_its_terms(rank):
    """A sum of r products of a vertical and a horizontal filter bank is of spatial rank r."""
    vertical, horizontal = randn(4, 3, rank), randn(rank, 8, 3, seed=1)
    weight = torch.einsum("cir,rnj->ncij", vertical, horizontal)
    assert torch.linalg.matrix_rank(matricize(weight, "spatial")[0]) == rank


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_truncation_is_the_best_of_its_rank_and_idempotent(seed, rank):
    matrix = randn(5, 9, seed=seed)
    U, S, Vh, kept = truncated_svd(matrix, rank=rank)
    approximation = U * S @ Vh
    dropped = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    assert kept == rank
    assert (matrix - approximation).square().sum().item() == pytest.approx((dropped**2).sum(), abs=1e-12)
    U, S, Vh, _ = truncated_svd(approximation, rank=rank)
    torch.testing.assert_close(U * S @ Vh, approximation)


@given(st.integers(0, 1000), st.floats(0.05, 0.999))
@settings(max_examples=30, deadline=None)
def test_energy_takes_the_least_rank_that_holds_it(seed, energy):
    matrix = randn(6, 9, seed=seed)
    _, S, _, rank = truncated_svd(matrix, energy=energy)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum()
    assert rank_at_energy(torch.from_numpy(squares).sqrt(), energy) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_at_its_edges(dtype):
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=dtype))
    assert truncated_svd(matrix, energy=0.9).rank == 1  # 9 of 10 exactly
    assert truncated_svd(matrix, energy=0.901).rank == 2
    assert truncated_svd(matrix, energy=1e-9).rank == 1


def test_full_energy_is_the_identity_however_small_the_tail():
    matrix = with_spectrum([1.0, 1e-3, 1e-7], 6, 9)
    U, S, Vh, rank = truncated_svd(matrix, energy=1.0)
    torch.testing.assert_close(U * S @ Vh, matrix, rtol=0, atol=1e-14)
    assert rank >= 3
    assert rank_at_energy(torch.tensor([1.0, 1e-12, 1e-30, 0.0]), 1.0) == 3


def test_threshold_keeps_what_is_not_below_it():
    matrix = torch.diag(torch.tensor([5.0, 2.0, 1.0]))
    for threshold, rank in ((0.0, 3), (1.0, 3), (1.1, 2), (2.0, 2), (9.0, 1)):
        assert truncated_svd(matrix, threshold=threshold).rank == rank


def test_each_matrix_of_a_batch_is_cut_at_its_own_rank():
    batch = torch.stack(
        [torch.diag(torch.tensor([4.0, 0.1, 0.1])), torch.diag(torch.tensor([1.0, 1.0, 1.0]))]
    )
    U, S, Vh, rank = truncated_svd(batch, energy=0.9)
    assert rank == 3
    assert S.tolist() == [[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    for one, matrix in zip(U * S.unsqueeze(-2) @ Vh, batch):
        alone = truncated_svd(matrix, energy=0.9)
        torch.testing.assert_close(one, alone.U * alone.S @ alone.Vh)


def test_a_zero_matrix_keeps_one_zero_value():
    for criterion in ({"energy": 0.9}, {"rank": 1}, {"threshold": 0.5}):
        _, S, _, rank = truncated_svd(torch.zeros(3, 4), **criterion)
        assert (rank, S.tolist()) == (1, [0.0])
    assert rank_at_energy(torch.zeros(2, 3), 0.5).tolist() == [0, 0]


def test_half_precision_is_decomposed_in_float32():
    matrix = randn(4, 6).bfloat16()
    U, S, Vh, _ = truncated_svd(matrix, energy=1.0)
    assert S.dtype == torch.float32
    torch.testing.assert_close(U * S @ Vh, matrix.float(), rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert truncated_svd(matrix.float(), rank=2).S.dtype == torch.float32


def test_nuclear_norm_and_its_gradient_at_full_rank():
    matrix = randn(5, 7).requires_grad_()
    value = nuclear_norm(matrix)
    (gradient,) = torch.autograd.grad(value, matrix)
    U, S, Vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    torch.testing.assert_close(value, S.sum())
    torch.testing.assert_close(gradient, U @ Vh)
    assert torch.autograd.gradcheck(nuclear_norm, (randn(2, 4, 3).requires_grad_(),))


def test_a_step_along_the_gradient_shortens_every_singular_value_alike():
    matrix = with_spectrum([3.0, 2.0, 1.0], 4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
    values = torch.linalg.svdvals(matrix.detach() - 0.25 * gradient)
    torch.testing.assert_close(values, torch.tensor([2.75, 1.75, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("spectrum", [[2.0, 1.0], [1.0, 1.0, 1.0], [5.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sub_gradient_of_a_rank_deficient_matrix_stays_in_its_space(spectrum, dtype):
    matrix = with_spectrum(spectrum, 6, 5).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
    values = torch.linalg.svdvals(gradient)
    expected = torch.tensor([1.0] * len(spectrum) + [0.0] * (5 - len(spectrum)), dtype=dtype)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    assert (gradient * matrix).sum().item() == pytest.approx(sum(spectrum), rel=1e-5)


def test_nuclear_norm_of_zero_of_a_batch_and_of_half_precision():
    zero = torch.zeros(3, 4, requires_grad=True)
    value = nuclear_norm(zero)
    value.backward()
    assert value == 0
    assert torch.equal(zero.grad, torch.zeros(3, 4))
    batch = randn(4, 3, 2)
    torch.testing.assert_close(nuclear_norm(batch), torch.stack([nuclear_norm(m) for m in batch]))
    half = randn(3, 3).half().requires_grad_()
    nuclear_norm(half).backward()
    assert half.grad.dtype == torch.float16


def test_nuclear_norm_refuses_a_second_derivative():
    matrix = randn(3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix, create_graph=True)
    with pytest.raises(RuntimeError, match="nuclear_norm can be differentiated only once"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (1, 4), (4, 1)])
def test_gram_route_equals_the_svd(shape):
    matrix = randn(*shape)
    torch.testing.assert_close(
        gram_singular_values(matrix), torch.linalg.svdvals(matrix), rtol=1e-7, atol=1e-7
    )


def test_gram_route_sums_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("coloss.ops.spectral._GRAM_BLOCK", 16)
    matrix = randn(100, 5).float()
    torch.testing.assert_close(gram_singular_values(matrix), torch.linalg.svdvals(matrix.double()))


def test_gram_route_of_half_precision_under_autocast_and_of_nothing():
    matrix = randn(20, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = gram_singular_values(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()))
    assert gram_singular_values(torch.zeros(0, 3)).shape == (0,)


def rankme(matrix: torch.Tensor, eps: float = 1e-7) -> float:
    return effective_rank(gram_singular_values(matrix), eps).item()


def test_effective_rank_of_orthonormal_columns_is_their_number():
    columns = torch.linalg.qr(randn(200, 64)).Q
    assert effective_rank(gram_singular_values(columns)).item() == pytest.approx(64, rel=1e-9)
    assert rankme(columns) == pytest.approx(64.001, abs=1e-3)


@pytest.mark.parametrize(("count", "eps", "expected"), [(64, 1e-7, 1.0001), (500, 1e-5, 1.06)])
def test_effective_rank_of_one_direction_and_the_bias_of_eps(count, eps, expected):
    values = torch.zeros(count, dtype=torch.float64)
    values[0] = 3
    assert effective_rank(values).item() == 1
    assert effective_rank(values, eps).item() == pytest.approx(expected, abs=5e-3 if eps > 1e-6 else 5e-5)


def test_effective_rank_of_gaussian_embeddings_and_of_digits():
    assert rankme(randn(10_000, 64)) == pytest.approx(63.95, abs=0.02)
    pixels = torch.from_numpy(load_digits().data)
    assert rankme(pixels) == pytest.approx(29.63, abs=0.01)
    assert rankme(pixels - pixels.mean(0)) == pytest.approx(39.71, abs=0.01)


@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
@settings(max_examples=20, deadline=None)
def test_effective_rank_ignores_scale_and_rotation_and_is_bounded(seed, scale):
    matrix = randn(12, 6, seed=seed)
    rotation = torch.linalg.qr(randn(6, 6, seed=seed + 1)).Q
    value = rankme(matrix)
    assert 1 <= value <= 6 + 1e-3
    assert rankme(scale * matrix) == pytest.approx(value, rel=1e-9)
    assert rankme(matrix @ rotation) == pytest.approx(value, rel=1e-9)


def test_effective_rank_of_a_zero_spectrum_is_zero_and_gradients_are_finite():
    assert effective_rank(torch.zeros(5)) == 0
    values = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    effective_rank(values).backward()
    assert values.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        effective_rank, (torch.tensor([2.0, 1.0, 0.5]).double().requires_grad_(),)
    )


def test_effective_rank_by_hand():
    # Shares 1/2, 1/4, 1/4 have entropy 1.5 log 2.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(2**1.5)


def test_bad_input_is_named():
    matrix = torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=r'weight must have 4 dimensions for scheme "spatial", got shape \(3, 4\)'
    ):
        matricize(matrix, "spatial")
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        matricize(torch.ones(3), "channel")
    with pytest.raises(ValueError, match=r"matrix must have shape \(3, 4\), got \(4, 3\)"):
        matricize(matrix, "channel")[1](matrix.T)
    with pytest.raises(ValueError, match="exactly one of energy, rank and threshold must be given, got none"):
        truncated_svd(matrix)
    with pytest.raises(ValueError, match=r"got \['energy', 'rank'\]"):
        truncated_svd(matrix, energy=0.9, rank=1)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 3\], got 4"):
        truncated_svd(matrix, rank=4)
    for energy in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"energy must be in \(0, 1\]"):
            truncated_svd(matrix, energy=energy)
        with pytest.raises(ValueError, match=r"energy must be in \(0, 1\]"):
            rank_at_energy(torch.ones(3), energy)
    with pytest.raises(ValueError, match="threshold must be >= 0, got -1"):
        truncated_svd(matrix, threshold=-1.0)
    with pytest.raises(ValueError, match="matrix must not be empty"):
        truncated_svd(matrix[:0], rank=1)
    with pytest.raises(ValueError, match="matrix must be finite"):
        truncated_svd(matrix * math.nan, rank=1)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        gram_singular_values(matrix * math.inf)
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        effective_rank(torch.ones(3), -1.0)


@pytest.mark.usefixtures("as_users_call")
def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="scheme must be .*, got 'rows'"):
        matricize(torch.ones(3, 4), "rows")
