"""Sinkhorn's assignment: its sums, its limits, capacities, what is forbidden, and rows spread over processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from contract import run_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coloss.ops import sinkhorn


def by_formula(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Columns to equal sums and rows to 1 by turns, on the matrix itself."""
    plan = np.exp(scores / epsilon)
    plan /= plan.sum(1, keepdims=True)
    for _ in range(iterations):
        plan *= len(plan) / plan.shape[1] / plan.sum(0, keepdims=True)
        plan /= plan.sum(1, keepdims=True)
    return plan


@pytest.mark.parametrize("iterations", [0, 1, 3, 30])
def test_equals_the_formula(iterations):
    scores = torch.rand(7, 4, dtype=torch.float64) * 2 - 1
    expected = by_formula(scores.numpy(), 0.2, iterations)
    np.testing.assert_allclose(sinkhorn(scores, 0.2, iterations).numpy(), expected, rtol=1e-10)


def test_rows_sum_to_one_and_columns_are_about_equal_after_three_iterations():
    plan = sinkhorn(torch.nn.functional.normalize(torch.randn(64, 16), dim=1), 0.25, 3)
    torch.testing.assert_close(plan.sum(1), torch.ones(64))
    assert (plan.sum(0) - 4).abs().max() < 0.2


def test_a_small_epsilon_gives_the_best_matching():
    scores = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
    rows, columns = linear_sum_assignment(-scores.numpy())
    plan = sinkhorn(scores, 0.005, 3000)
    assert plan[rows, columns].min() > 0.9


def test_capacity_binds_only_where_it_must():
    scores = torch.tensor([[1.0, 0.0, 0.2], [1.0, 0.2, 0.0], [1.0, 0.1, 0.3], [0.0, 0.2, 1.0]])
    free = torch.softmax(scores / 0.1, 1)
    torch.testing.assert_close(sinkhorn(scores, 0.1, 50, capacity=4.0), free)
    bound = sinkhorn(scores, 0.1, 500, capacity=1.5)
    torch.testing.assert_close(bound.sum(1), torch.ones(4))
    assert bound.sum(0).max() <= 1.5 + 1e-3
    assert free.sum(0)[0] > 2.5
    # Without room for all, rows still sum to 1.
    torch.testing.assert_close(sinkhorn(scores, 0.1, 50, capacity=0.1).sum(1), torch.ones(4))


def test_forbidden_rows_columns_and_pairs_stay_zero():
    scores = torch.rand(2, 5, 4)
    scores[:, 1] = -torch.inf
    scores[:, :, 2] = -torch.inf
    scores[0, 0, 0] = -torch.inf
    plan = sinkhorn(scores, 0.1, 200)
    assert plan.isfinite().all()
    assert plan[:, 1].sum() == plan[:, :, 2].sum() == plan[0, 0, 0] == 0
    kept = plan[:, [0, 2, 3, 4]]
    torch.testing.assert_close(kept.sum(2), torch.ones(2, 4))
    torch.testing.assert_close(kept.sum(1)[:, [0, 1, 3]], torch.full((2, 3), 4 / 3), rtol=0.02, atol=0)
    part = sinkhorn(scores[1][[0, 2, 3, 4]][:, [0, 1, 3]], 0.1, 200)
    torch.testing.assert_close(plan[1][[0, 2, 3, 4]][:, [0, 1, 3]], part)


def test_half_precision_extremes_and_emptiness():
    scores = torch.tensor([[60000.0, -60000.0], [0.0, 1.0]], dtype=torch.float16)
    plan = sinkhorn(scores, 0.05)
    assert plan.dtype == torch.float32
    assert plan.isfinite().all()
    torch.testing.assert_close(plan, torch.eye(2))
    for shape in ((0, 3), (3, 0), (2, 0, 4)):
        assert sinkhorn(torch.empty(shape)).shape == shape
    assert not sinkhorn(torch.rand(3, 3, requires_grad=True)).requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(-3, 3), st.integers(0, 1000))
def test_adding_a_number_to_a_row_changes_nothing(rows, columns, shift, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = scores.clone()
    moved[0] += shift
    torch.testing.assert_close(sinkhorn(moved, 0.3, 5), sinkhorn(scores, 0.3, 5))


@pytest.mark.parametrize("capacity", [None, 1.2])
def test_rows_of_two_processes_are_one_matrix(tmp_path: Path, capacity):
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:3, 1] = -torch.inf  # a column of which the first process can use nothing

    def work(fabric) -> dict[str, Tensor]:
        own = scores.chunk(fabric.world_size)[fabric.global_rank]
        return {"plan": sinkhorn(own, 0.1, 7, capacity=capacity, across_processes=True)}

    found = torch.cat([part["plan"] for part in run_processes(work, tmp_path)])
    torch.testing.assert_close(found, sinkhorn(scores, 0.1, 7, capacity=capacity))


def test_bad_input_is_named():
    for options, message in (
        ({"epsilon": 0.0}, "epsilon must be > 0 and finite, got 0.0"),
        ({"iterations": -1}, "iterations must be >= 0, got -1"),
        ({"capacity": 0.0}, "capacity must be > 0 and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn(torch.rand(2, 2), **options)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="scores must not be NaN or infinite"):
            sinkhorn(torch.full((2, 2), value))
