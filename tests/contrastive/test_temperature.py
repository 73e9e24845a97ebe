"""Weights, entropies and the simple loss have the paper's values and limits; the claim runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor

from coloss.contrastive import (
    effective_negatives,
    negative_weights,
    simple_contrastive_loss,
    weight_entropy,
)
from coloss.lab.claims import verify
from coloss.ops import gather_with_gradient, info_nce_loss, rank, world_size


def unit(rows: int, seed: int = 0, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def similarities(rows: int = 7, columns: int = 9) -> tuple[Tensor, Tensor]:
    return unit(rows) @ unit(columns, 1).T, torch.eye(rows, columns, dtype=torch.bool)


def test_gradients_of_the_loss_are_the_weights():
    scores, positives = similarities(7, 7)
    leaf = scores.clone().requires_grad_()
    temperature = 0.2
    loss = F.cross_entropy(leaf / temperature, torch.arange(7), reduction="sum")
    (slope,) = torch.autograd.grad(loss, leaf)
    pull = slope.diagonal()
    probability = (scores / temperature).softmax(1)
    torch.testing.assert_close(pull, -(1 - probability.diagonal()) / temperature, atol=1e-6, rtol=0)
    push = slope.masked_fill(positives, 0.0)
    torch.testing.assert_close(push.sum(1), -pull)
    weights = negative_weights(scores, temperature, positives)
    torch.testing.assert_close(weights, push / -pull.unsqueeze(1))


@settings(max_examples=20, deadline=None)
@given(low=st.floats(0.05, 1.0), factor=st.floats(1.1, 10.0), seed=st.integers(0, 99))
def test_weights_sum_to_one_and_entropy_rises_with_the_temperature(low, factor, seed):
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    positives = torch.eye(4, 6, dtype=torch.bool)
    weights = [negative_weights(scores, value, positives) for value in (low, low * factor)]
    for some in weights:
        torch.testing.assert_close(some.sum(1), torch.ones(4, dtype=torch.float64))
        assert bool((some[positives] == 0).all())
    assert bool((weight_entropy(weights[0]) < weight_entropy(weights[1])).all())


def test_limits_of_the_effective_number():
    scores, positives = similarities()
    cold = effective_negatives(negative_weights(scores, 1e-3, positives))
    torch.testing.assert_close(cold, torch.ones(7, dtype=torch.float64), atol=1e-3, rtol=0)
    hot = effective_negatives(negative_weights(scores, 1e3, positives))
    torch.testing.assert_close(hot, torch.full((7,), 8.0, dtype=torch.float64), atol=1e-3, rtol=0)


def test_equal_scores_single_rows_half_precision_and_rows_without_negatives():
    positives = torch.tensor([[True, False, False, False], [True, True, True, True]])
    weights = negative_weights(torch.full((2, 4), 0.9, dtype=torch.float16), 0.01, positives)
    assert weights.dtype == torch.float32
    assert weights[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3]) and weights[1].tolist() == [0.0] * 4
    assert effective_negatives(weights).tolist() == pytest.approx([3, 0])
    assert weight_entropy(weights).tolist() == pytest.approx([math.log(3), 0])
    of_rows = negative_weights(torch.eye(2), torch.tensor([0.1, 1e6]), torch.zeros(2, 2, dtype=torch.bool))
    assert effective_negatives(of_rows).tolist() == pytest.approx([1, 2], abs=1e-3)
    leaf = torch.eye(2, 4).requires_grad_()
    weight_entropy(negative_weights(leaf, 0.5, positives)).sum().backward()
    assert bool(leaf.grad.isfinite().all())


def by_formula(x: np.ndarray, y: np.ndarray, push: float, hard: int | None) -> float:
    costs = []
    for i, query in enumerate(x):
        negatives = np.sort(np.delete(y @ query, i))[::-1][:hard]
        costs.append(push * negatives.mean() - query @ y[i])
    return float(np.mean(costs))


@pytest.mark.parametrize("hard", [None, 1, 4])
@pytest.mark.parametrize("push", [0.0, 1.0, 2.5])
def test_simple_loss_equals_the_formula(hard, push):
    x, y = unit(6), unit(9, 1)
    found = simple_contrastive_loss(x, y, push=push, hard=hard).item()
    assert found == pytest.approx(by_formula(x.numpy(), y.numpy(), push, hard))
    every = simple_contrastive_loss(x, y, push=push, hard=8)
    torch.testing.assert_close(every, simple_contrastive_loss(x, y, push=push))


def test_simple_loss_is_info_nce_at_a_high_temperature():
    x, y = unit(6).requires_grad_(), unit(6, 1)
    hot = 1e6
    (slope,) = torch.autograd.grad(hot * info_nce_loss(x, y, hot), x)
    (simple,) = torch.autograd.grad(simple_contrastive_loss(x, y), x)
    torch.testing.assert_close(slope, simple * 5 / 6, rtol=1e-4, atol=1e-6)


def test_simple_loss_takes_no_equal_ids_for_negatives():
    x, ids = unit(4), torch.tensor([0, 1, 0, 1])
    scores = x @ x.T
    expected = torch.stack([scores[i][ids != ids[i]].mean() - 1 for i in range(4)])
    torch.testing.assert_close(simple_contrastive_loss(x, x, ids=ids, reduction="none"), expected)
    alone = simple_contrastive_loss(x, x, ids=torch.zeros(4), reduction="none")
    torch.testing.assert_close(alone, torch.full((4,), -1.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda a: simple_contrastive_loss(a, a, ids=ids, hard=1), x.requires_grad_(), fast_mode=True
    )
    assert simple_contrastive_loss(torch.zeros(0, 3), torch.zeros(2, 3)) == 0


def test_two_processes_see_the_negatives_of_both(tmp_path: Path):
    x, y = unit(8, 2), unit(8, 3)

    def work(fabric: Fabric) -> dict[str, Tensor]:
        part = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
        a, b = x[part].clone().requires_grad_(), y[part].clone().requires_grad_()
        loss = simple_contrastive_loss(a, b) + simple_contrastive_loss(a, b, hard=2)
        slopes = [gather_with_gradient(g) / world_size() for g in torch.autograd.grad(loss, (a, b))]
        return {"loss": loss.detach(), "for_x": slopes[0], "for_y": slopes[1]}

    check_two_processes(work, tmp_path)


def test_bad_input_is_named(as_users_call):
    x, y = torch.zeros(4, 3), torch.zeros(6, 3)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    for call, message in (
        (lambda: negative_weights(x, 0.0, mask), "temperature must be > 0 and finite, got 0.0"),
        (lambda: negative_weights(x, torch.tensor(-1.0), mask), "temperature must be > 0, got -1.0"),
        (lambda: negative_weights(x, torch.ones(3), mask), r"shape \(4,\), got shape \(3,\)"),
        (lambda: negative_weights(y, 1.0, mask), r"positives must have shape \(6, 3\), got \(4, 3\)"),
        (lambda: simple_contrastive_loss(y, x), r"keys must have at least 6 rows of width 3, got \(4, 3\)"),
        (lambda: simple_contrastive_loss(x, y, push=-1.0), "push must be >= 0 and finite, got -1.0"),
        (lambda: simple_contrastive_loss(x, y, hard=0), "hard must be >= 1, got 0"),
        (
            lambda: simple_contrastive_loss(x, y, ids=torch.arange(4)),
            r"ids must have shape \(6,\), got \(4,\)",
        ),
        (lambda: simple_contrastive_loss(x, y, reduction="max"), "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_claim_runs():
    found = verify("contrastive-temperature", smoke=True, seeds=1)
    assert {"uniformity", "tolerance", "knn", "linear_probe"} == set(
        found["arms"]["temperature 0.3"]["metrics"]
    )
    assert {"temperature 0.07", "temperature 1", "temperature 1, hard", "simple loss"} < set(found["arms"])
