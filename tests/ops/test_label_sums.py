"""Log-sum-exps by label and the losses made of them: plain sums in double precision, and pytorch-metric-learning."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import run_processes

from coloss.ops import label_logsumexps, multi_similarity_loss, proxy_anchor_loss


def embeddings_of(count: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn).requires_grad_()


LABELS = torch.tensor([7, 1, 7, 2, 1, 9, 7])


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("scales", [(2.0, 3.0), (-2.0, 50.0)])
def test_sums_are_those_over_listed_pairs(tile, scales):
    rows = embeddings_of(7)
    scores = (rows @ rows.T).detach().numpy()
    own, others = label_logsumexps(
        rows, LABELS, positive_scale=scales[0], negative_scale=scales[1], chunk_size=tile
    )
    for i in range(7):
        positives = [scores[i, j] for j in range(7) if j != i and LABELS[j] == LABELS[i]]
        negatives = [scores[i, j] for j in range(7) if LABELS[j] != LABELS[i]]
        expected = np.log(np.exp(scales[0] * np.array(positives)).sum()) if positives else -math.inf
        assert own[i].item() == pytest.approx(expected)
        assert others[i].item() == pytest.approx(np.log(np.exp(scales[1] * np.array(negatives)).sum()))


def test_a_set_beside_keys_keeps_equal_rows():
    rows = embeddings_of(7)
    own, _ = label_logsumexps(rows, LABELS, rows, LABELS)
    assert own[5].item() == pytest.approx(1.0)
    alone, _ = label_logsumexps(rows, LABELS)
    assert alone[5].item() == -math.inf
    (slope,) = torch.autograd.grad(alone.masked_fill(alone == -math.inf, 0).sum(), rows)
    assert slope.isfinite().all()


def test_values_and_gradients_are_those_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    rows, labels = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.randint(5, (20,))
    ours, theirs = (
        multi_similarity_loss(F.normalize(rows), labels),
        losses.MultiSimilarityLoss()(rows, labels),
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rows)[0] for loss in (ours, theirs)))
    peer = losses.ProxyAnchorLoss(7, 6).double()
    ours, theirs = proxy_anchor_loss(F.normalize(rows), labels, F.normalize(peer.proxies)), peer(rows, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for leaf in (rows, peer.proxies):
        one, other = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_gradients_are_those_of_differences():
    rows, proxies = embeddings_of(7), embeddings_of(3, seed=1)
    classes = torch.tensor([0, 1, 0, 2, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda z: multi_similarity_loss(z, LABELS, 2.0, 5.0), (rows,))
    assert torch.autograd.gradcheck(lambda z, p: proxy_anchor_loss(z, classes, p, 4.0), (rows, proxies))


def test_extremes_have_values():
    alone = multi_similarity_loss(torch.eye(1), torch.tensor([3]))
    assert alone.item() == 0
    half = torch.randn(8, 4, dtype=torch.float16).requires_grad_()
    large = multi_similarity_loss(10 * half, torch.arange(8) % 2, 2.0, 75.0)
    (slope,) = torch.autograd.grad(large, half)
    assert large.dtype == torch.float32 and large.isfinite() and slope.isfinite().all()
    one_class = proxy_anchor_loss(embeddings_of(4), torch.zeros(4, dtype=torch.int64), embeddings_of(3))
    assert one_class.isfinite()


def test_bad_input_is_named(as_users_call):
    rows = embeddings_of(7)
    for call, message in (
        (lambda: label_logsumexps(rows, LABELS, rows), "keys and key_labels must be given together"),
        (lambda: label_logsumexps(rows, LABELS[:3]), r"query_labels must have shape \(7,\), got \(3,\)"),
        (lambda: label_logsumexps(rows, LABELS, positive_scale=math.nan), "positive_scale must be finite"),
        (
            lambda: multi_similarity_loss(rows, LABELS, -1.0),
            "positive_scale must be > 0 and finite, got -1.0",
        ),
        (lambda: multi_similarity_loss(rows, LABELS, margin=math.inf), "margin must be finite, got inf"),
        (lambda: proxy_anchor_loss(rows, LABELS, rows, 0.0), "scale must be > 0 and finite, got 0.0"),
        (lambda: proxy_anchor_loss(rows, LABELS, rows[:, :2]), "keys must have width 2, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_two_processes_get_the_loss_and_the_slope_of_one(tmp_path):
    rows, classes, proxies = embeddings_of(6), torch.tensor([0, 1, 2, 0, 1, 2]), embeddings_of(3, seed=1)

    def work(fabric):
        part = slice(3 * fabric.global_rank, None if fabric.world_size == 1 else 3 * fabric.global_rank + 3)
        found = {}
        for name, call in (
            ("similarity", lambda z, p: multi_similarity_loss(z, classes[part], 2.0, 5.0)),
            ("proxies", lambda z, p: proxy_anchor_loss(z, classes[part], p, 4.0)),
        ):
            z, p = rows.detach()[part].clone().requires_grad_(), proxies.detach().clone().requires_grad_()
            loss = call(z, p)
            (slope,) = torch.autograd.grad(loss, z)
            found |= {name: loss.detach(), f"{name} slope": slope / fabric.world_size}
        return found

    whole = run_processes(work, tmp_path, 1)[0]
    for number, found in enumerate(run_processes(work, tmp_path, 2)):
        for name in ("similarity", "proxies"):
            torch.testing.assert_close(found[name], whole[name])
            torch.testing.assert_close(
                found[f"{name} slope"], whole[f"{name} slope"][3 * number : 3 * number + 3]
            )
