"""The k hardest keys are those of a full sort, and the losses against them are the full ones cut there."""

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

from coloss.ops import (
    gather_with_gradient,
    hard_info_nce_loss,
    hard_supervised_contrastive_loss,
    hardest_keys,
    hardest_scores,
    info_nce_loss,
    rank,
    supervised_contrastive_loss,
    world_size,
)


def unit(rows: int, seed: int = 0, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


@settings(max_examples=12, deadline=None)
@given(
    queries=st.integers(0, 9),
    keys=st.integers(0, 12),
    k=st.integers(1, 15),
    chunk=st.sampled_from([1, 4, None]),
    seed=st.integers(0, 99),
)
def test_are_those_of_a_full_sort(queries, keys, k, chunk, seed):
    x, y = unit(queries, seed), unit(keys, seed + 100)
    ids = torch.arange(queries) % 3, torch.arange(keys) % 4
    values, indices = hardest_keys(x, y, k, ids=ids, chunk_size=chunk)
    scores = (x @ y.T).masked_fill(ids[0][:, None] == ids[1], -math.inf)
    expected = F.pad(scores, (0, k), value=-math.inf).topk(k).values
    torch.testing.assert_close(values, expected)
    found = indices >= 0
    assert torch.equal(found, values > -math.inf)
    torch.testing.assert_close(
        scores.gather(1, indices.clamp(min=0))[found] if keys else values[found], values[found]
    )


def test_choice_carries_no_gradient_and_scores_do():
    x, y = unit(6).requires_grad_(), unit(8, 1).requires_grad_()
    assert not hardest_keys(x, y, 3)[0].requires_grad
    assert torch.autograd.gradcheck(lambda a, b: hardest_scores(a, b, 3), (x, y), fast_mode=True)
    assert hardest_scores(x, torch.zeros(0, 5, dtype=torch.float64), 2).tolist() == [[-math.inf] * 2] * 6


def cut_by_hand(x: np.ndarray, y: np.ndarray, k: int, temperature: float) -> float:
    """Wang and Liu, row by row."""
    costs = []
    for i, query in enumerate(x):
        scores = y @ query
        negatives = np.sort(np.delete(scores, i))[::-1][:k]
        top = np.exp(scores[i] / temperature)
        costs.append(-np.log(top / (top + np.exp(negatives / temperature).sum())))
    return float(np.mean(costs))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_info_nce_is_cut_at_the_hardest(k):
    x, y = unit(8), unit(11, 1)
    assert hard_info_nce_loss(x, y, k, 0.2).item() == pytest.approx(cut_by_hand(x.numpy(), y.numpy(), k, 0.2))


def test_one_negative_makes_a_softmax_of_two():
    x, y = unit(8), unit(8, 1)
    scores = x @ y.T
    nearest = scores.masked_fill(torch.eye(8, dtype=torch.bool), -math.inf).amax(1)
    expected = F.softplus((nearest - scores.diagonal()) / 0.1)
    torch.testing.assert_close(hard_info_nce_loss(x, y, 1, 0.1, reduction="none"), expected)


def test_all_negatives_make_the_plain_loss_to_the_bit():
    x, y = unit(8).float(), unit(8, 1).float()
    for reduction in ("mean", "sum", "none"):
        hard = hard_info_nce_loss(x, y, 7, 0.1, reduction=reduction)
        assert torch.equal(hard, info_nce_loss(x, y, 0.1, reduction=reduction))
    labels = torch.arange(4).repeat(2)
    hard = hard_supervised_contrastive_loss(x, labels, 6, 0.1)
    assert torch.equal(hard, supervised_contrastive_loss(x, labels, 0.1))


def test_all_negatives_left_by_ids_make_the_plain_loss():
    x, labels = unit(12), torch.arange(12) % 3
    hard = hard_supervised_contrastive_loss(x, labels, 8, 0.3, reduction="none")
    torch.testing.assert_close(hard, supervised_contrastive_loss(x, labels, 0.3, reduction="none"))
    torch.testing.assert_close(
        hard_info_nce_loss(x[:4], x, 9, 0.3, ids=labels), info_nce_loss(x[:4], x, 0.3, ids=labels)
    )


def test_ids_keep_duplicates_and_positives_out():
    x = unit(6)
    y = torch.cat([x, x])
    ids = torch.arange(6).repeat(2)
    assert hardest_keys(x, y, 1)[0].amin() == pytest.approx(1)  # a query itself, without ids
    values, indices = hardest_keys(x, y, 4, ids=(ids[:6], ids))
    assert bool((indices % 6 != torch.arange(6)[:, None]).all()) and values.amax() < 1
    assert hard_info_nce_loss(x, y, 2, 0.1, ids=ids) < hard_info_nce_loss(x, y, 2, 0.1)


def test_no_gradient_below_the_cut():
    x, y = unit(1), unit(9, 1).requires_grad_()
    hard_info_nce_loss(x, y, 3, 0.5).backward()
    kept = hardest_keys(x, y, 3, ids=(torch.zeros(1), torch.arange(9.0)))[1]
    reached = y.grad.abs().sum(1) > 0
    assert sorted(reached.nonzero().flatten().tolist()) == sorted([0, *kept.flatten().tolist()])


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_in_every_argument(chunk):
    x, y = unit(6).requires_grad_(), unit(7, 1).requires_grad_()
    heat = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    for temperature in (heat, rows):
        assert torch.autograd.gradcheck(
            lambda a, b, t: hard_info_nce_loss(a, b, 2, t, chunk_size=chunk),
            (x, y, temperature),
            fast_mode=True,
        )
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda a, t: hard_supervised_contrastive_loss(a, labels, 2, t, chunk_size=chunk),
        (x, heat),
        fast_mode=True,
    )


def test_temperature_zero_is_the_hardest_negative_triplet():
    x, y = unit(8), unit(8, 1)
    scores = x @ y.T
    nearest = scores.masked_fill(torch.eye(8, dtype=torch.bool), -math.inf).amax(1)
    expected = (nearest - scores.diagonal()).relu()
    for loss in (
        info_nce_loss(x, y, 1e-3, reduction="none"),
        hard_info_nce_loss(x, y, 2, 1e-3, reduction="none"),
    ):
        torch.testing.assert_close(1e-3 * loss, expected, rtol=0, atol=1e-2)


def test_half_precision_ties_and_nothing_to_compare():
    x = unit(6).half().requires_grad_()
    loss = hard_info_nce_loss(x, x.detach(), 2, 0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and bool(x.grad.isfinite().all())
    same = torch.ones(6, 3).div(3**0.5).requires_grad_()
    loss = hard_supervised_contrastive_loss(same, torch.arange(3).repeat(2), 2, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5) and bool(same.grad.isfinite().all())
    alone = unit(5).requires_grad_()
    loss = hard_supervised_contrastive_loss(alone, torch.arange(5), 1, 0.1)  # nobody has a positive
    loss.backward()
    assert loss == 0 and bool((alone.grad == 0).all())
    alike = hard_supervised_contrastive_loss(unit(5), torch.zeros(5), 1, 0.1)  # nobody has a negative
    torch.testing.assert_close(alike, supervised_contrastive_loss(unit(5), torch.zeros(5), 0.1))
    assert hard_info_nce_loss(torch.zeros(0, 3), torch.zeros(9, 3), 2, 0.1) == 0


def test_infinite_scores_do_not_hide_each_other():
    x, y = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [torch.inf]])
    values, indices = hardest_keys(x, y, 2)
    assert values.tolist() == [[math.inf, 2.0]] and indices.tolist() == [[2, 1]]


def test_two_processes_compare_with_the_keys_of_both(tmp_path: Path):
    x, y, labels = unit(8, 2), unit(8, 3), torch.arange(4).repeat(2)

    def work(fabric: Fabric) -> dict[str, Tensor]:
        part = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
        a, b = x[part].clone().requires_grad_(), y[part].clone().requires_grad_()
        loss = hard_info_nce_loss(a, b, 2, 0.3) + hard_supervised_contrastive_loss(a, labels[part], 2, 0.3)
        gradients = [gather_with_gradient(g) / world_size() for g in torch.autograd.grad(loss, (a, b))]
        values, indices = hardest_keys(a, b, 3)
        return {
            "loss": loss.detach(),
            "for_x": gradients[0],
            "for_y": gradients[1],
            "values": gather_with_gradient(values),
            "indices": gather_with_gradient(indices).double(),
        }

    check_two_processes(work, tmp_path)


def test_bad_input_is_named(as_users_call):
    x, y = torch.zeros(4, 3), torch.zeros(6, 3)
    labels = torch.arange(4)
    for call, message in (
        (lambda: hardest_keys(x, torch.zeros(6, 2), 1), "keys must have width 3, got 2"),
        (lambda: hardest_keys(x, y, 0), "k must be >= 1, got 0"),
        (lambda: hardest_keys(x, y, 1, chunk_size=0), "chunk_size must be >= 1, got 0"),
        (
            lambda: hardest_keys(x, y, 1, ids=(labels, labels)),
            r"ids of keys must have shape \(6,\), got \(4,\)",
        ),
        (lambda: hard_info_nce_loss(x, y, 0), "k must be >= 1, got 0"),
        (lambda: hard_info_nce_loss(x, y, 1, 0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: hard_info_nce_loss(y, x, 1), r"keys must have at least 6 rows of width 3, got \(4, 3\)"),
        (lambda: hard_info_nce_loss(x, y, 1, ids=labels), r"ids must have shape \(6,\), got \(4,\)"),
        (
            lambda: hard_supervised_contrastive_loss(x, labels[:2], 1),
            r"labels must have shape \(4,\), got \(2,\)",
        ),
        (lambda: hard_supervised_contrastive_loss(x, labels, 0), "k must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
