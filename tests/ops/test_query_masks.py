"""Facts about the loss of masks drawn by queries: values by hand, what does not count, and two processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes

from coloss.ops import query_mask_loss


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 4, 6, generator=generator, dtype=dtype)
    presence = torch.randn(4, 3, 2, generator=generator, dtype=dtype)
    targets = torch.randint(2, (4, 4, 6), generator=generator)
    targets[0] = 2
    targets[1, :2] = -100
    return logits, presence, targets


def slow_loss(logits, presence, targets, gamma=2.0):
    logits, presence, targets = logits.numpy(), presence.numpy(), targets.numpy()
    focal, dice, masks, surprise, weights = 0.0, 0.0, 0, 0.0, 0.0
    for image in range(len(logits)):
        counted = targets[image] != -100
        for c in range(logits.shape[1]):
            truth = (targets[image] == c)[counted].astype(float)
            p = 1 / (1 + np.exp(-logits[image, c][counted]))
            there = truth.any()
            z = presence[image, c]
            weight = 1.0 if there else 0.1
            surprise -= weight * (z[0 if there else 1] - np.log(np.exp(z).sum()))
            weights += weight
            if there:
                right = np.where(truth == 1, p, 1 - p)
                focal += np.mean(np.where(truth == 1, 0.25, 0.75) * (1 - right) ** gamma * -np.log(right))
                dice += 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
                masks += 1
    return (20 * focal + dice) / masks + surprise / weights


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_value_is_that_of_a_loop_over_images_and_classes_and_sure_pixels_have_gradients(gamma):
    logits, presence, targets = drawn()
    assert query_mask_loss(logits, presence, targets, gamma=gamma).item() == pytest.approx(
        slow_loss(logits, presence, targets, gamma), rel=1e-12
    )
    sure = (30 * logits.float().sign()).requires_grad_()
    query_mask_loss(sure, presence.float(), targets, gamma=gamma).backward()
    assert sure.grad.isfinite().all() and sure.grad.any()


def test_masks_are_brought_to_the_targets_size_and_ignored_pixels_do_not_count():
    logits, presence, targets = drawn()
    large = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)
    wide = targets.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(
        query_mask_loss(logits, presence, wide), query_mask_loss(large, presence, wide)
    )
    changed = logits.clone()
    changed[1, :, :2] += 5.0
    assert torch.equal(
        query_mask_loss(changed, presence, targets), query_mask_loss(logits, presence, targets)
    )
    nothing = torch.full_like(targets, 255)
    assert query_mask_loss(logits, presence, nothing, ignore_index=255).isfinite()


def test_gradients_are_right_and_finite_for_extreme_logits():
    logits, presence, targets = drawn()
    logits, presence = logits[1:2, :, 1:3, :3].requires_grad_(), presence[1:2].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: query_mask_loss(a, b, targets[1:2, 1:3, :3]), (logits, presence)
    )
    extreme = (1e4 * drawn(torch.float32)[0]).requires_grad_()
    query_mask_loss(extreme, drawn(torch.float32)[1], targets).backward()
    assert extreme.grad.isfinite().all()
    half = query_mask_loss(*(part.bfloat16() for part in drawn()[:2]), targets)
    assert half.dtype == torch.float32


def test_two_processes_take_the_gradient_of_one(tmp_path):
    def work(fabric):
        logits, presence, targets = drawn()
        rows = slice(
            fabric.global_rank * 4 // fabric.world_size, (fabric.global_rank + 1) * 4 // fabric.world_size
        )
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        query_mask_loss(scale * logits[rows], scale * presence[rows], targets[rows]).backward()
        return {"gradient": fabric.all_reduce(scale.grad, reduce_op="mean")}

    check_two_processes(work, tmp_path, atol=1e-12)


def test_bad_input_is_refused():
    logits, presence, targets = drawn()
    with pytest.raises(ValueError, match="absent_weight must be >= 0"):
        query_mask_loss(logits, presence, targets, absent_weight=-1.0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 3"):
        query_mask_loss(logits, presence, targets, alpha=3.0)
    for gamma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma must be >= 0 and finite"):
            query_mask_loss(logits, presence, targets, gamma=gamma)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 3\) or -100, got 3"):
        query_mask_loss(logits, presence, targets.masked_fill(targets == 2, 3))
