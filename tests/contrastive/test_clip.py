"""CLIP's loss is its formula, smoothing that of torch, strong views reduce to it, and the scale stays below its limit."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import run_processes
from torch import Tensor

from coloss.contrastive import ClipObjective, LogitScale, MultiViewClipLoss, clip_loss


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.normalize(rows, dim=-1)


def by_formula(images: Tensor, texts: Tensor, scale: Tensor | float, smoothing: float = 0.0) -> Tensor:
    scores = scale * images @ texts.T
    own = torch.arange(len(scores))
    there, back = (F.cross_entropy(part, own, label_smoothing=smoothing) for part in (scores, scores.T))
    return (there + back) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_equals_torch_in_value_and_gradient(smoothing):
    images, texts = unit(9, 4).requires_grad_(), unit(9, 4, seed=1).requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    found = clip_loss(images, texts, scale, label_smoothing=smoothing, chunk_size=4)
    expected = by_formula(images, texts, scale, smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    parts = (images, texts, scale)
    for one, other in zip(torch.autograd.grad(found, parts), torch.autograd.grad(expected, parts)):
        torch.testing.assert_close(one, other)


def test_smoothing_mixes_in_the_mean_over_all_pairs():
    images, texts, e = unit(5, 3), unit(5, 3, seed=1), 0.3
    logs = [F.log_softmax(7 * part, 1) for part in (images @ texts.T, texts @ images.T)]
    expected = sum((1 - e) * -p.diagonal().mean() + e * -p.mean() for p in logs) / 2
    assert clip_loss(images, texts, 7.0, label_smoothing=e).item() == pytest.approx(expected.item())


def test_without_strong_views_it_is_clip():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    assert torch.equal(MultiViewClipLoss()(images, texts, 14.0), clip_loss(images, texts, 14.0))


def test_equal_views_heads_and_scale_make_all_five_parts_equal():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    plain = clip_loss(images, texts, 10.0)
    found = MultiViewClipLoss(0.0)(images, texts, 10.0, [images] * 2, [texts] * 2, 10.0)
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    twice = MultiViewClipLoss(0.0, "sum")(images, texts, 10.0, [images] * 2, [texts] * 2, 10.0)
    assert twice.item() == pytest.approx(2 * plain.item(), rel=1e-12)


def test_parts_are_weighted_as_published_and_only_strong_ones_are_smoothed():
    images, texts, strong = unit(6, 4), unit(6, 4, seed=1), unit(4, 6, 4, seed=2)
    found = MultiViewClipLoss(0.2)(images, texts, 14.0, strong[:2], strong[2:], 9.0)
    pairs = [by_formula(strong[a], strong[b], 9.0, 0.2) for a in (0, 1) for b in (2, 3)]
    expected = (by_formula(images, texts, 14.0) + 2 * sum(pairs) / 4) / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_pairs_of_equal_id_are_no_negatives():
    images = torch.eye(3)[[0, 1, 0]]
    apart, together = (
        clip_loss(images, images, 5.0),
        clip_loss(images, images, 5.0, ids=torch.tensor([4, 7, 4])),
    )
    assert together < apart
    # Rows 0 and 2 meet one negative, row 1 meets two, all at score 0.
    expected = (2 * math.log1p(math.exp(-5)) + math.log1p(2 * math.exp(-5))) / 3
    assert together.item() == pytest.approx(expected, rel=1e-4)


def test_the_scale_is_brought_back_to_its_limit_and_can_come_down_again():
    scale = LogitScale()
    assert scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.log_scale.fill_(9.0)
    found = scale()
    assert found.item() == pytest.approx(100.0)
    found.backward()
    assert scale.log_scale.item() == pytest.approx(torch.tensor(100.0).log().item())
    assert scale.log_scale.grad.item() == pytest.approx(100.0)
    assert LogitScale().half()().dtype == torch.float32
    scale.reset_parameters()
    assert scale().item() == pytest.approx(1 / 0.07)


def test_half_precision_extremes_and_no_pairs():
    images = unit(4, 8, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        found = clip_loss(images.to(dtype), images.to(dtype), 100.0, label_smoothing=0.1)
        assert found.dtype == torch.float32
        assert found.isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clip_loss(images, images, 10.0, label_smoothing=0.1)
    torch.testing.assert_close(found, by_formula(images, images, 10.0, 0.1))
    one = torch.ones(1, 3, requires_grad=True)
    alone = clip_loss(one, one, 100.0, label_smoothing=0.1)
    alone.backward()
    assert alone.item() == pytest.approx(0.0, abs=1e-4)
    assert one.grad.isfinite().all()
    assert clip_loss(torch.empty(0, 3), torch.empty(0, 3), 5.0, label_smoothing=0.1).item() == 0


def test_negatives_of_all_processes_count_and_receive_gradient(tmp_path: Path):
    """Without gradient through the gathered rows the sum over processes would differ from the joined batch's gradient."""
    images, texts = unit(6, 4), unit(6, 4, seed=1)

    def work(fabric) -> dict[str, Tensor]:
        mine = (
            slice(None)
            if fabric.world_size == 1
            else slice(2 * fabric.global_rank, 2 + 4 * fabric.global_rank)
        )
        own = [part[mine].clone().requires_grad_() for part in (images, texts)]
        scale = LogitScale().double()
        loss = clip_loss(*own, scale(), label_smoothing=0.1)
        loss.backward()
        return {
            "loss": loss.detach(),
            "images": own[0].grad,
            "texts": own[1].grad,
            "scale": scale.log_scale.grad,
        }

    one = run_processes(work, tmp_path, 1)[0]
    first, second = run_processes(work, tmp_path)
    torch.testing.assert_close(first["loss"], one["loss"])
    torch.testing.assert_close(second["loss"], one["loss"])
    for name in ("images", "texts"):
        # Each process gets the gradient of the sum of both losses, which averaging over processes halves.
        torch.testing.assert_close(torch.cat([first[name], second[name]]) / 2, one[name])
    torch.testing.assert_close((first["scale"] + second["scale"]) / 2, one["scale"])


def test_an_objective_learns_its_scale():
    objective = ClipObjective(label_smoothing=0.1)
    pairs = unit(8, 4, dtype=torch.float32)
    objective((pairs, pairs)).backward()
    assert objective.scale.log_scale.grad.abs() > 0
    expected = clip_loss(pairs, pairs, 1 / 0.07, label_smoothing=0.1)
    torch.testing.assert_close(objective((pairs, pairs)), expected)


def test_bad_input_is_named(as_users_call):
    rows = torch.eye(3)
    for call, message in (
        (
            lambda: clip_loss(rows, rows[:2], 1.0),
            r"texts must have the shape of images \(3, 3\), got \(2, 3\)",
        ),
        (lambda: clip_loss(rows, rows, 0.0), "scale must be > 0 and finite, got 0.0"),
        (lambda: clip_loss(rows, rows, label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (
            lambda: clip_loss(rows, rows, label_smoothing=0.1, ids=torch.arange(3)),
            "label_smoothing must be 0 with ids",
        ),
        (lambda: LogitScale(0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: LogitScale(0.001), r"limit must be >= 1 / temperature = 1000, got 100.0"),
        (lambda: MultiViewClipLoss(-0.1), r"label_smoothing must be in \[0, 1\], got -0.1"),
        (lambda: MultiViewClipLoss(reduction="mean"), 'reduction must be "avg" or "sum", got \'mean\''),
        (
            lambda: MultiViewClipLoss()(rows, rows, 1.0, [rows], [], 1.0),
            "as many strong views of images as of texts, at least one, got 1 and 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
