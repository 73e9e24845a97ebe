"""Triplets with prototypes by a plain loop and by hand; the neighbourhood loss follows the score."""

import math

import pytest
import torch
import torch.nn.functional as F

from coloss.contrastive import ICNNLoss, ProtoTripletLoss, proto_triplet_loss
from coloss.metrics import icnn_score
from coloss.ops import prototypes


def episode(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.arange(4).repeat_interleave(3)
    queries = torch.eye(4, 5, dtype=torch.float64)[labels] + spread * torch.randn(12, 5, dtype=torch.float64)
    return queries.requires_grad_(), labels, torch.eye(4, 5, dtype=torch.float64).requires_grad_()


def distance(x, y, metric):
    return (x - y).square().sum() if metric == "sqeuclidean" else 1 - F.cosine_similarity(x, y, dim=0)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("anchor", ["query", "prototype"])
@pytest.mark.parametrize("mining", ["all", "hardest"])
def test_equals_a_plain_loop(metric, anchor, mining):
    queries, labels, centres = episode()
    costs = []
    for x, y in zip(queries, labels):
        own = distance(x, centres[y], metric)
        if anchor == "query":
            others = [distance(x, centres[k], metric) for k in range(4) if k != y]
        else:
            others = [distance(n, centres[y], metric) for n, z in zip(queries, labels) if z != y]
        others = [min(others)] if mining == "hardest" else others
        costs += [(own - other + 0.7).relu() for other in others]
    value = proto_triplet_loss(queries, labels, centres, 0.7, mining=mining, anchor=anchor, metric=metric)
    expected = torch.stack(costs).mean()
    torch.testing.assert_close(value, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (queries, centres)) for loss in (value, expected))):
        torch.testing.assert_close(one, other)


def test_zero_when_every_query_is_nearer_its_prototype_by_the_margin():
    queries, labels, centres = episode(0.01)
    loss = ProtoTripletLoss(margin=1.0)
    assert loss(queries, labels, centres) == 0 and loss.active == 0
    assert ProtoTripletLoss(margin=3.0)(queries, labels, centres) > 0


def test_with_two_classes_the_slope_is_twice_the_way_between_prototypes():
    queries, labels, centres = episode()
    queries, labels, centres = queries[:6], labels[:6], centres[:2]
    loss = ProtoTripletLoss(margin=100.0)
    (slope,) = torch.autograd.grad(loss(queries, labels, centres), queries)
    torch.testing.assert_close(slope, 2 * (centres[1 - labels] - centres[labels]).detach() / 6)
    assert loss.active == 1


def test_the_support_learns_too():
    support = torch.randn(4, 5, requires_grad=True)
    queries, labels, _ = episode()
    loss = proto_triplet_loss(queries.float(), labels, prototypes(support, torch.arange(4)), 10.0)
    assert torch.autograd.grad(loss, support)[0].abs().sum() > 0


def test_one_class_or_no_query_costs_nothing():
    queries, labels, centres = episode()
    for mining in ("all", "hardest"):
        for anchor in ("query", "prototype"):
            options = {"mining": mining, "anchor": anchor}
            assert proto_triplet_loss(queries[:3], labels[:3], centres[:1], **options) == 0
            assert proto_triplet_loss(queries[:0], labels[:0], centres, **options) == 0


@pytest.mark.parametrize("soft", [False, True])
def test_the_neighbourhood_loss_is_the_score_s_logarithm(soft):
    queries, labels, _ = episode()
    score = icnn_score(queries, labels, soft=soft)
    assert ICNNLoss(soft=soft)(queries, labels).item() == pytest.approx(-math.log(score.item() + 1e-6))
    assert ICNNLoss(soft=soft, form="complement")(queries, labels).item() == pytest.approx(1 - score.item())


def test_a_score_of_zero_has_a_finite_loss_and_slope():
    rows = torch.tensor([[0.0], [0.1], [9.0], [9.1]], requires_grad=True)
    for soft in (False, True):
        loss = ICNNLoss(k=1, soft=soft)(rows, torch.tensor([0, 1, 0, 1]))
        assert loss.isfinite() and torch.autograd.grad(loss, rows, allow_unused=True)[0].isfinite().all()


def test_bad_input_is_named(as_users_call):
    queries, labels, centres = episode()
    for call, message in (
        (lambda: ProtoTripletLoss(margin=math.inf), "margin must be finite, got inf"),
        (lambda: ProtoTripletLoss(mining="some"), 'mining must be "all" or "hardest", got \'some\''),
        (lambda: ProtoTripletLoss(anchor="both"), 'anchor must be "query" or "prototype", got \'both\''),
        (lambda: proto_triplet_loss(queries, labels, centres[:2]), r"labels must be in \[0, 2\), got 0 to 3"),
        (
            lambda: proto_triplet_loss(queries, labels[:2], centres),
            r"labels must have shape \(12,\), got \(2,\)",
        ),
        (lambda: ICNNLoss(k=0), "k must be >= 1, got 0"),
        (lambda: ICNNLoss(form="exp"), 'form must be "log" or "complement", got \'exp\''),
    ):
        with pytest.raises(ValueError, match=message):
            call()
