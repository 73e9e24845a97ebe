"""The four objectives beside CLIP's: their minima, what gets no gradient, correlations, and assignments over processes."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import run_processes
from torch import Tensor, nn

from coloss.contrastive import (
    CrossModalHeads,
    cross_modal_barlow_loss,
    cross_modal_simsiam_loss,
    swap_assign_loss,
)
from coloss.ops import sinkhorn


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, dim: int) -> Tensor:
    centred = rows(count, dim) - rows(count, dim).mean(0)
    return torch.linalg.qr(centred).Q * count**0.5


def test_aligned_predictions_cost_nothing_and_targets_get_no_gradient():
    p, q, u, v = (rows(5, 3).requires_grad_() for _ in range(4))
    loss = cross_modal_simsiam_loss(p, v, q, u)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    other = cross_modal_simsiam_loss(p, rows(5, 3, seed=1).requires_grad_(), q, u)
    gradients = torch.autograd.grad(other + loss, (p, q, u, v), allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert gradients[2] is gradients[3] is None
    assert cross_modal_simsiam_loss(p, -v, q, -u).item() == pytest.approx(4.0)


def test_identical_whitened_projections_cost_nothing():
    assert cross_modal_barlow_loss(whitened(40, 6), whitened(40, 6)).item() == pytest.approx(0.0, abs=1e-12)


def test_correlations_do_not_need_a_batch_norm_before():
    images, texts = rows(12, 4), rows(12, 4, seed=1)
    norm = nn.BatchNorm1d(4, eps=1e-14, affine=False).double()
    u, v = norm(images), norm(texts)
    c = u.T @ v / 12
    off = c - torch.diag(c.diagonal())
    expected = 0.025 * ((c.diagonal() - 1).square().sum() + 5e-3 * off.square().sum())
    assert cross_modal_barlow_loss(images, texts).item() == pytest.approx(expected.item(), rel=1e-9)
    moved = cross_modal_barlow_loss(7 * images - 3, 0.1 * texts + 5)
    assert moved.item() == pytest.approx(expected.item(), rel=1e-9)
    constant = torch.ones(12, 4).requires_grad_()
    loss = cross_modal_barlow_loss(constant, texts.float(), scale=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(4.0)
    assert constant.grad.isfinite().all()


def test_swapped_assignments_equal_the_formula():
    images, texts = F.normalize(rows(2, 6, 3), dim=2), F.normalize(rows(2, 6, 3, seed=1), dim=2)
    parts = []
    for (u, v), a, b in product(((images, texts), (texts, images)), (0, 1), (0, 1)):
        targets = sinkhorn(u[a] @ v[b].T, 0.05, 3)
        scores = u[1 - a] @ v[1 - b].T / 0.1
        parts.append(-(targets * F.log_softmax(scores, 1)).sum(1).mean())
    assert swap_assign_loss(images, texts).item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-9)


def test_swapped_assignments_survive_half_precision():
    images = torch.randn(2, 5, 4).half().requires_grad_()
    loss = swap_assign_loss(images, images)
    loss.backward()
    assert loss.dtype == torch.float32
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["barlip", "swalip"])
def test_two_processes_see_the_batch_of_one(tmp_path: Path, kind):
    images, texts = rows(2, 8, 3), rows(2, 8, 3, seed=1)

    def work(fabric) -> dict[str, Tensor]:
        own = [
            part[:, fabric.global_rank :: fabric.world_size].clone().requires_grad_()
            for part in (images, texts)
        ]
        if kind == "swalip":
            loss = swap_assign_loss(*own)
        else:
            loss = cross_modal_barlow_loss(own[0][0], own[1][1])
        loss.backward()
        return {"loss": loss.detach(), "images": own[0].grad, "texts": own[1].grad}

    one = run_processes(work, tmp_path, 1)[0]
    found = run_processes(work, tmp_path)
    for part in found:
        torch.testing.assert_close(part["loss"], one["loss"])
    for name in ("images", "texts"):
        both = torch.stack([part[name] for part in found], 2).flatten(1, 2)
        torch.testing.assert_close(both / 2, one[name])


def test_heads_average_the_weak_pair_and_all_pairs_of_strong_views():
    images, texts = rows(3, 6, 4).float(), rows(3, 6, 5, seed=1).float()
    for kind in ("siamlip", "barlip"):
        heads = CrossModalHeads(kind, 4, 5, (8, 3))
        u, v = heads.project(images, texts)
        parts = []
        for a, b in [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]:
            if kind == "barlip":
                parts.append(cross_modal_barlow_loss(u[a], v[b]))
            else:
                p = heads.image_predictor(u.flatten(0, 1)).unflatten(0, (3, 6))
                q = heads.text_predictor(v.flatten(0, 1)).unflatten(0, (3, 6))
                parts.append(cross_modal_simsiam_loss(p[a], v[b], q[b], u[a]))
        torch.testing.assert_close(heads(images, texts), torch.stack(parts).mean())


def test_momentum_targets_take_the_place_of_the_own_projections():
    images, texts = rows(1, 6, 4).float(), rows(1, 6, 5, seed=1).float()
    heads = CrossModalHeads("byolip", 4, 5, (8, 3))
    own = heads(images, texts)
    targets = heads.project(images, texts)
    torch.testing.assert_close(heads(images, texts, targets), own)
    assert not torch.isclose(heads(images, texts, (-targets[0], -targets[1])), own)


def test_bad_input_is_named(as_users_call):
    one = torch.eye(3)
    for call, message in (
        (
            lambda: cross_modal_simsiam_loss(one, one, one, one[:2]),
            r"must have one shape, got \(3, 3\) and \(2, 3\)",
        ),
        (lambda: cross_modal_barlow_loss(one, one, off_diagonal=-1.0), "off_diagonal must be >= 0"),
        (
            lambda: swap_assign_loss(torch.rand(3, 4, 2), torch.rand(3, 4, 2)),
            r"must both be \(2 views, pairs, dim\)",
        ),
        (
            lambda: CrossModalHeads("simlip", 2, 2),
            "kind must be one of siamlip, byolip, barlip, swalip, got 'simlip'",
        ),
        (
            lambda: CrossModalHeads("swalip", 2, 2, (4, 2))(torch.rand(2, 4, 2), torch.rand(2, 4, 2)),
            "swalip needs two strong views beside the weak one, got 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    empty = torch.empty(0, 3)
    assert cross_modal_simsiam_loss(empty, empty, empty, empty).item() == 0
    assert swap_assign_loss(torch.empty(2, 0, 3), torch.empty(2, 0, 3)).item() == 0
