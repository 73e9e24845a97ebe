"""Losses of pictures, heatmaps and masks: worked values, zeros where they should be, invariances, slow twins, bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coloss.motion import (
    census_loss,
    charbonnier_loss,
    heatmap_mse_loss,
    laplacian_pyramid_loss,
    mask_distance,
    reconstruction_loss,
    soft_dice_focal_loss,
)

PICTURE_LOSSES = [
    charbonnier_loss,
    census_loss,
    reconstruction_loss,
    laplacian_pyramid_loss,
    heatmap_mse_loss,
]


@pytest.mark.parametrize("loss", [*PICTURE_LOSSES, mask_distance])
def test_equal_inputs_cost_nothing_and_pull_nowhere(loss):
    picture = torch.rand(2, 3, 9, 10)
    own = picture.clone().requires_grad_()
    found = loss(own, picture)
    assert found.item() == 0
    assert torch.autograd.grad(found, own)[0].abs().max() == 0
    other = torch.rand(2, 3, 9, 10).requires_grad_()
    assert torch.autograd.grad(loss(other, picture), other)[0].abs().max() > 0


# The reconstruction loss is a sum of two others here.
@pytest.mark.parametrize(
    "loss", [mask_distance, *(loss for loss in PICTURE_LOSSES if loss is not reconstruction_loss)]
)
def test_gradients_are_right_and_half_precision_is_summed_in_full(loss):
    predicted, truth = torch.randn(2, 1, 3, 3, 4, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(lambda x: loss(x, truth), predicted.requires_grad_())
    half = loss(predicted.half(), truth.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), loss(predicted, truth), rtol=1e-2, atol=1e-3)
    assert loss(torch.full((1, 3, 6, 7), math.nan), torch.zeros(1, 3, 6, 7)).isnan()


def test_charbonnier_is_between_square_and_absolute_difference():
    difference = torch.tensor([[1e-6, 3.0]])
    small = charbonnier_loss(difference[:, :1], torch.zeros(1, 1), epsilon=1.0)
    assert small.item() == pytest.approx(0.5e-12, rel=1e-4)
    assert charbonnier_loss(difference[:, 1:], torch.zeros(1, 1), epsilon=4.0).item() == 1.0
    assert charbonnier_loss(difference[:, 1:], torch.zeros(1, 1)).item() == pytest.approx(3, abs=1e-3)


def census_slowly(predicted, truth, window):
    weights = np.array([0.2989, 0.5870, 0.1140])
    reach, costs = window // 2, []
    for one, other in zip(predicted, truth):
        a, b = (np.tensordot(weights, picture, 1) for picture in (one, other))
        height, width = a.shape
        for row in range(height):
            for column in range(width):
                for y in range(max(0, row - reach), min(height, row + reach + 1)):
                    for x in range(max(0, column - reach), min(width, column + reach + 1)):
                        if (y, x) != (row, column):
                            signs = [
                                (g[y, x] - g[row, column]) / math.sqrt(0.81 + (g[y, x] - g[row, column]) ** 2)
                                for g in (a, b)
                            ]
                            delta = (signs[0] - signs[1]) ** 2
                            costs.append(delta / (0.1 + delta))
    return np.mean(costs)


@pytest.mark.parametrize("size", [(5, 6), (2, 7), (1, 2)])
def test_census_is_that_of_a_loop_over_pairs(size):
    predicted, truth = torch.rand(2, 1, 3, *size, dtype=torch.float64).unbind(0)
    found = census_loss(predicted, truth, window=5)
    assert found.item() == pytest.approx(census_slowly(predicted.numpy(), truth.numpy(), 5), rel=1e-9)


@pytest.mark.parametrize("shift", [-1.0, 0.3, 1.0])
def test_census_does_not_see_brightness_even_at_the_edge(shift):
    predicted, truth = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64).unbind(0)
    assert census_loss(predicted + shift, truth).item() == pytest.approx(census_loss(predicted, truth).item())
    assert census_loss(predicted + shift, predicted).item() == pytest.approx(0, abs=1e-12)


def test_one_level_of_the_pyramid_is_the_absolute_difference_and_coarse_bands_count_more():
    predicted, truth = torch.rand(2, 2, 3, 16, 16).unbind(0)
    torch.testing.assert_close(
        laplacian_pyramid_loss(predicted, truth, levels=1), F.l1_loss(predicted, truth)
    )
    # A constant difference lives in the last band alone, of which there are as many as the size allows.
    flat = torch.full((1, 1, 16, 16), 0.5)
    assert laplacian_pyramid_loss(flat, 0 * flat, levels=3).item() == pytest.approx(4 * 0.5)
    assert laplacian_pyramid_loss(flat, 0 * flat, levels=9).item() == pytest.approx(8 * 0.5)
    pattern = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 16, 16)
    assert laplacian_pyramid_loss(pattern, 0 * pattern, levels=3).item() < 2


def test_the_pyramid_is_not_shifted():
    # Of a ramp nothing but the edge is in the fine band; the coarse one has its mean, counted twice.
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    assert laplacian_pyramid_loss(ramp, 0 * ramp, levels=2).item() == pytest.approx(2 * 31.5, abs=0.1)
    for size in ((16, 16), (9, 14), (3, 5)):
        predicted, truth = torch.rand(2, 1, 1, *size, dtype=torch.float64).unbind(0)
        for sides in ((2,), (3,), (2, 3)):
            torch.testing.assert_close(
                laplacian_pyramid_loss(predicted.flip(sides), truth.flip(sides)),
                laplacian_pyramid_loss(predicted, truth),
            )


def test_the_pyramid_goes_down_to_two_pixels():
    flat = torch.full((1, 1, 3, 3), 0.5)
    assert laplacian_pyramid_loss(flat, 0 * flat).item() == pytest.approx(2 * 0.5)
    assert laplacian_pyramid_loss(flat[..., :2], 0 * flat[..., :2]).item() == pytest.approx(0.5)


def binary_masks(*areas):
    """Disjoint masks of so many pixels each, (1, masks, 4, 8)."""
    masks, start = torch.zeros(len(areas), 32), 0
    for number, area in enumerate(areas):
        masks[number, start : start + area] = 1
        start += area
    return masks.reshape(1, len(areas), 4, 8)


def as_logits(masks):
    return 200 * masks - 100


def test_dice_of_disjoint_and_of_equal_masks():
    masks = binary_masks(6, 9)
    dice = {"focal_weight": 0.0, "match": "class"}
    disjoint = soft_dice_focal_loss(as_logits(masks[:, :1]), masks[:, 1:], **dice)
    assert disjoint.item() == pytest.approx(1 - 1 / (6 + 9 + 1))
    assert soft_dice_focal_loss(as_logits(masks), masks, **dice).item() == pytest.approx(0, abs=1e-6)


def test_the_focal_loss_is_the_usual_one_for_masks_of_zeros_and_ones_and_takes_one_sigmoid():
    logits, truth = torch.randn(1, 1, 4, 5), (torch.rand(1, 1, 4, 5) > 0.5).float()
    p = logits.sigmoid()
    right = torch.where(truth > 0, p, 1 - p)
    share = torch.where(truth > 0, 0.25, 0.75)
    expected = (-share * (1 - right) ** 2 * right.log()).mean()
    found = soft_dice_focal_loss(logits, truth, dice_weight=0.0, focal_weight=1.0)
    torch.testing.assert_close(found, expected)
    twice = soft_dice_focal_loss(logits.sigmoid(), truth, dice_weight=0.0, focal_weight=1.0)
    assert abs(twice - expected) > 0.01


def test_the_focal_loss_does_not_depend_on_the_size():
    logits, truth = torch.randn(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    focal = {"dice_weight": 0.0, "match": "class"}
    large = [part.repeat_interleave(3, 2).repeat_interleave(3, 3) for part in (logits, truth)]
    torch.testing.assert_close(
        soft_dice_focal_loss(*large, **focal), soft_dice_focal_loss(logits, truth, **focal)
    )


def test_instances_are_matched_by_overlap_not_by_order():
    masks = binary_masks(5, 8, 11)
    shuffled = as_logits(masks[:, [2, 0, 1]])
    assert soft_dice_focal_loss(shuffled, masks).item() < 1e-6
    assert soft_dice_focal_loss(shuffled, masks, match="class").item() > 0.5
    batch = soft_dice_focal_loss(torch.cat([shuffled, as_logits(masks)]), torch.cat([masks, masks]))
    assert batch.item() < 1e-6


def test_people_invented_or_lost_cost_something():
    masks = binary_masks(5, 8)
    dice = {"focal_weight": 0.0}
    invented = soft_dice_focal_loss(as_logits(masks), masks[:, :1], **dice)
    assert invented.item() == pytest.approx(8 / 9)
    lost = soft_dice_focal_loss(as_logits(masks[:, :1]), masks, **dice)
    assert lost.item() == pytest.approx(8 / 9 / 2)
    none = soft_dice_focal_loss(as_logits(masks[:, :1]), masks[:, :0], **dice)
    assert none.item() == pytest.approx(5 / 6)
    nobody = soft_dice_focal_loss(as_logits(0 * masks), 0 * masks)
    assert nobody.item() == pytest.approx(0, abs=1e-6)


def test_soft_masks_have_a_gradient_hard_ones_none():
    logits, truth = torch.randn(1, 2, 4, 4, requires_grad=True), torch.rand(1, 2, 4, 4)
    soft_dice_focal_loss(logits, truth).backward()
    assert logits.grad.abs().min() > 0
    hard = (logits > 0).float() * 20 - 10
    assert not soft_dice_focal_loss(hard, truth).requires_grad


@pytest.mark.parametrize("extreme", [math.inf, -math.inf, 1e30])
def test_extreme_logits_stay_finite(extreme):
    logits = torch.full((1, 1, 3, 3), extreme)
    for truth in (torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)):
        own = logits.clone().requires_grad_()
        found = soft_dice_focal_loss(own, truth)
        assert found.isfinite()
        assert torch.autograd.grad(found, own)[0].isfinite().all()


def test_bad_input_is_named(as_users_call):
    a, b = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 5)
    for loss in PICTURE_LOSSES:
        with pytest.raises(ValueError, match="prediction and truth must have equal shapes"):
            loss(a, b)
    for call, message in (
        (lambda: charbonnier_loss(a, a, epsilon=0), "epsilon must be > 0 and finite, got 0"),
        (lambda: census_loss(a, a, window=4), "window must be odd and >= 3, got 4"),
        (lambda: census_loss(a[..., :1, :1], a[..., :1, :1]), "two pixels or more"),
        (lambda: laplacian_pyramid_loss(a, a, levels=0), "levels must be >= 1, got 0"),
        (lambda: reconstruction_loss(a, a, -1.0), "census_weight must be >= 0 and finite, got -1.0"),
        (lambda: soft_dice_focal_loss(a, b), "equal batch, height and width"),
        (lambda: soft_dice_focal_loss(a, a, match="order"), 'match must be "iou" or "class", got \'order\''),
        (lambda: soft_dice_focal_loss(a, a[:, :1], match="class"), "equal channels, got 2 and 1"),
        (lambda: soft_dice_focal_loss(a, 3 * a + 1), r"truth must be probabilities in \[0, 1\]"),
        (lambda: soft_dice_focal_loss(a, a, alpha=2.0), r"alpha must be in \[0, 1\], got 2.0"),
        (lambda: soft_dice_focal_loss(a, a, gamma=0.5), "gamma must be >= 1 and finite, got 0.5"),
        (lambda: soft_dice_focal_loss(a, a, dice_weight=-1.0), "dice_weight must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
