"""Values and gradients beside pytorch-metric-learning, where it is installed. It brings embeddings to length 1 by itself."""

import pytest
import torch
import torch.nn.functional as F

from coloss.ops import pair_margin_loss, supervised_contrastive_loss, triplet_margin_loss

losses = pytest.importorskip("pytorch_metric_learning.losses")
distances = pytest.importorskip("pytorch_metric_learning.distances")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 0, 4])


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(10, 6, dtype=torch.float64).requires_grad_()


def assert_same(embeddings, value, peer):
    torch.testing.assert_close(value, peer, rtol=1e-9, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(loss, embeddings) for loss in (value, peer))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_supervised_contrast(embeddings):
    # The peer's default averages over the losses above 0 only; anchors without a positive have none here either.
    peer = losses.SupConLoss(temperature=0.2)(embeddings, LABELS)
    assert_same(embeddings, supervised_contrastive_loss(F.normalize(embeddings), LABELS, 0.2), peer)


def test_nt_xent_of_two_views(embeddings):
    labels = torch.arange(5).repeat(2)
    peer = losses.NTXentLoss(temperature=0.2)(embeddings, labels)
    assert_same(embeddings, supervised_contrastive_loss(F.normalize(embeddings), labels, 0.2), peer)


@pytest.mark.parametrize("active", [False, True])
def test_all_triplets(embeddings, active):
    reducer = reducers.AvgNonZeroReducer() if active else reducers.MeanReducer()
    peer = losses.TripletMarginLoss(margin=0.2, reducer=reducer)(embeddings, LABELS)
    value = triplet_margin_loss(
        F.normalize(embeddings), LABELS, 0.2, mining="all", reduction="mean-active" if active else "mean"
    )
    assert_same(embeddings, value, peer)


def test_pairs_with_margins(embeddings):
    peer = losses.ContrastiveLoss(pos_margin=0.9, neg_margin=0.2, distance=distances.CosineSimilarity())(
        embeddings, LABELS
    )
    assert_same(embeddings, pair_margin_loss(F.normalize(embeddings), LABELS, 0.9, 0.2), peer)
