"""Losses for queries with several positives: what they equal, what they push, and what they leave out."""

import math

import pytest
import torch
import torch.nn.functional as F

from coloss.ops import decoupled_softmax_loss
from coloss.retrieval import (
    decoupled_score_loss,
    draw_positives,
    multi_positive_softmax_loss,
    soft_topk_loss,
)


def batch(queries=6, keys=15, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1)
        for n in (queries, keys)
    )
    relevance = torch.rand(queries, keys, generator=generator) < share
    relevance[:, 0] = True
    relevance[0] = False
    return x, y, relevance


def test_one_positive_is_cross_entropy():
    scores, target = torch.randn(5, 9, dtype=torch.float64), torch.tensor([3, 0, 8, 8, 1])
    relevance = F.one_hot(target, 9)
    loss = decoupled_score_loss(scores, relevance, 0.5)
    torch.testing.assert_close(loss, F.cross_entropy(scores / 0.5, target))


@pytest.mark.parametrize(("form", "expected"), [("softmax", 1.5985), ("decoupled", -0.0521)])
def test_a_confident_positive_is_pushed_down_by_the_softmax_alone(form, expected):
    keys = torch.tensor([[3.0], [0.0], [0.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64).requires_grad_()
    positives = torch.tensor([[0, 0, 0], [0, 1, 2]])
    function = multi_positive_softmax_loss if form == "softmax" else decoupled_softmax_loss
    options = {} if form == "softmax" else {"reduction": "none"}
    loss = 3 * function(torch.ones(1, 1, dtype=torch.float64), keys, positives, 1.0, **options).sum()
    (gradient,) = torch.autograd.grad(loss, keys)  # of the sum over positives; the query is 1
    assert gradient[0].item() == pytest.approx(expected, abs=1e-4)


def test_scores_and_embeddings_give_the_same():
    x, y, relevance = batch()
    x, y = x.requires_grad_(), y.requires_grad_()
    of_scores = decoupled_score_loss(x @ y.T, relevance, 0.1)
    of_embeddings = decoupled_softmax_loss(x, y, relevance.nonzero().T, 0.1)
    torch.testing.assert_close(of_scores, of_embeddings)
    for one, other in zip(torch.autograd.grad(of_scores, (x, y)), torch.autograd.grad(of_embeddings, (x, y))):
        torch.testing.assert_close(one, other)
    weights = relevance * torch.rand(relevance.shape).double()
    pairs = relevance.nonzero().T
    torch.testing.assert_close(
        decoupled_score_loss(x @ y.T, weights, 0.1),
        decoupled_softmax_loss(x, y, pairs, 0.1, weight=weights[pairs[0], pairs[1]]),
    )


def test_softmax_over_positives_equals_its_formula():
    x, y, relevance = batch()
    logs = (x @ y.T / 0.1).log_softmax(1)
    expected = -(logs * relevance).sum(1) / relevance.sum(1).clamp(min=1)
    torch.testing.assert_close(
        multi_positive_softmax_loss(x, y, relevance.nonzero().T, 0.1).double(), expected, rtol=1e-6, atol=1e-6
    )


def test_no_negatives_cost_nothing_and_ignored_pairs_do_not_count():
    scores = torch.randn(2, 4).requires_grad_()
    everything = torch.ones(2, 4)
    loss = decoupled_score_loss(scores, everything)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()
    relevance = torch.tensor([[1, 0, 0, 1]])
    ignore = torch.tensor([[False, False, True, True]])
    scores = torch.tensor([[1.0, 0.5, math.nan, math.inf]], requires_grad=True)
    loss = decoupled_score_loss(scores, relevance, ignore=ignore)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    loss.backward()
    assert (scores.grad[0, 2:] == 0).all() and scores.grad.isfinite().all()
    assert decoupled_score_loss(scores, torch.zeros(1, 4)) == 0


@pytest.mark.parametrize("chunk", [None, 2])
def test_soft_topk_loss_asks_to_be_among_the_best(chunk):
    x, y, relevance = batch()
    pairs = relevance.nonzero().T
    x = x.requires_grad_()
    from coloss.ops import soft_topk

    degrees = soft_topk(x @ y.T / 0.2, 4, 1.5)
    expected = -(degrees.log() * relevance).sum(1) / relevance.sum(1).clamp(min=1)
    found = soft_topk_loss(x, y, pairs, 4, 0.2, alpha=1.5, chunk_size=chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0]
    )
    out = torch.tensor([[1, 1], [2, 3]])
    kept = pairs[:, ~((pairs[0] == 1) & ((pairs[1] == 2) | (pairs[1] == 3)))]
    keep = torch.ones(15, dtype=torch.bool)
    keep[[2, 3]] = False
    degrees = soft_topk((x @ y.T / 0.2)[1:2, keep], 4, 1.5)
    expected = -(degrees.log() * relevance[1:2, keep]).sum(1) / relevance[1, keep].sum()
    found = soft_topk_loss(x, y, kept, 4, 0.2, alpha=1.5, ignore=out, chunk_size=chunk)
    torch.testing.assert_close(found[1:2], expected)


def test_drawn_positives_are_at_most_so_many_and_follow_the_weights():
    pairs = torch.tensor([[0] * 4 + [2] * 2, [0, 1, 2, 3, 7, 8]])
    weight = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_positives(pairs, 1, weight, generator) for _ in range(3000)])
    assert (drawn[:, :4].sum(1) == 1).all() and (drawn[:, 4:].sum(1) == 1).all()
    shares = drawn[:, :4].double().mean(0)
    torch.testing.assert_close(shares, torch.tensor([1, 1, 1, 3], dtype=torch.float64) / 6, rtol=0, atol=0.03)
    three = draw_positives(pairs, 3, None, generator)
    assert three[:4].sum() == 3 and three[4:].all()
    shuffled = torch.randperm(6)
    again = draw_positives(pairs[:, shuffled], 2, None, generator)
    assert torch.bincount(pairs[0, shuffled][again]).tolist() == [2, 0, 2]


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match=r"relevance must have the shape of scores \(2, 3\), got \(2, 4\)"):
        decoupled_score_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        decoupled_score_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        draw_positives(torch.zeros(2, 0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        soft_topk_loss(
            torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 0, dtype=torch.int64), chunk_size=0
        )
