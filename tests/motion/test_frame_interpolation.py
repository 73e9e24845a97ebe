"""The small interpolator, warping, slow motion and picture metrics."""

import math

import pytest
import torch

from coloss.errors import InputError
from coloss.motion import (
    FrameInterpolator,
    backward_warp,
    charbonnier_loss,
    interpolation_metrics,
    slow_motion,
)


def random_network(width=4):
    network = FrameInterpolator(width)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_a_flow_of_whole_pixels_shifts_and_none_leaves_the_picture():
    images = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(backward_warp(images, torch.zeros(2, 2, 5, 6)), images)
    flow = torch.zeros(2, 2, 5, 6)
    flow[:, 0], flow[:, 1] = 2.0, -1.0
    warped = backward_warp(images, flow)
    torch.testing.assert_close(warped[:, :, 1:, :4], images[:, :, :-1, 2:])
    # Beyond the edge the nearest pixel counts.
    torch.testing.assert_close(warped[:, :, 1:, 4:], images[:, :, :-1, 5:].expand(-1, -1, -1, 2))


def test_gradients_of_the_warp_are_right():
    images, flow = torch.rand(1, 1, 3, 4, dtype=torch.float64), torch.rand(1, 2, 3, 4, dtype=torch.float64)
    flow = 0.2 + 0.5 * flow  # away from whole pixels, where the derivative jumps
    assert torch.autograd.gradcheck(backward_warp, (images.requires_grad_(), flow.requires_grad_()))


def test_both_ends_are_the_pictures_whatever_the_weights():
    first, last = torch.rand(2, 3, 3, 12, 9).unbind(0)
    network = random_network()
    torch.testing.assert_close(network(first, last, 0.0), first)
    torch.testing.assert_close(network(first, last, 1.0), last)
    assert not torch.allclose(network(first, last, 0.5), (first + last) / 2, atol=1e-2)


@pytest.mark.parametrize("logit", [-120.0, 120.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ends_are_the_pictures_however_sure_the_network_is_of_the_other(logit, dtype):
    first, last = torch.rand(2, 1, 3, 8, 8).to(dtype).unbind(0)
    network = FrameInterpolator(4).to(dtype)
    torch.nn.init.constant_(network.head.bias[4:5], logit)
    for share, expected in ((0.0, first), (0.5, first if logit > 0 else last), (1.0, last)):
        found = network(first, last, share)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), network.head.bias)[0].isfinite().all()


def test_a_new_network_blends_and_times_may_differ_in_a_batch():
    first, last = torch.rand(2, 3, 3, 8, 8).unbind(0)
    share = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(
        FrameInterpolator(4)((first, last, share)), torch.lerp(first, last, share[:, None, None, None])
    )
    network = random_network()
    together = network(first, last, share)
    for k in range(3):
        torch.testing.assert_close(
            together[k : k + 1], network(first[k : k + 1], last[k : k + 1], share[k].item())
        )


def test_it_trains_at_any_size_also_in_half_precision():
    for size in ((4, 4), (17, 30)):
        network = FrameInterpolator(4).bfloat16()
        first, last, truth = torch.rand(3, 1, 3, *size, dtype=torch.bfloat16).unbind(0)
        found = network(first, last, 0.5)
        assert found.dtype == torch.bfloat16
        charbonnier_loss(found, truth).backward()
        assert network.head.weight.grad.isfinite().all()
        assert network.head.weight.grad.abs().sum() > 0


def test_slow_motion_keeps_every_frame_and_the_networks_mode():
    video, network = torch.rand(4, 3, 8, 8), random_network().train()
    found = slow_motion(network, video, 3)
    assert found.shape == (10, 3, 8, 8)
    assert torch.equal(found[::3], video)
    assert network.training
    assert not found.requires_grad
    torch.testing.assert_close(
        found[4], network.eval()(video[1:2], video[2:3], 1 / 3)[0].clamp(0, 1).detach()
    )
    assert torch.equal(slow_motion(network, video, 1), video)


def test_metrics_of_known_differences():
    truth = torch.full((2, 3, 12, 12), 0.5)
    predicted = truth.clone()
    predicted[0] += 0.1
    predicted[1] -= 0.01
    found = interpolation_metrics(predicted, truth)
    assert found["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert found["interpolation_error"] == pytest.approx(255 * 0.055, rel=1e-4)
    same = interpolation_metrics(truth, truth)
    assert (same["psnr"], same["interpolation_error"]) == (math.inf, 0)
    assert same["ssim"] == pytest.approx(1)
    # Cut to [0, 1] first.
    assert interpolation_metrics(torch.full_like(truth, 3.0), torch.ones_like(truth))["psnr"] == math.inf


def test_structural_similarity_is_that_of_windows_wholly_inside():
    truth = torch.rand(2, 3, 11, 11)
    predicted = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    taps = (-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).exp()
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def mean(values):
        return (window * values).sum((2, 3))

    a, b = mean(predicted), mean(truth)
    cross = mean(predicted * truth) - a * b
    spread = mean(predicted**2) - a**2 + mean(truth**2) - b**2
    expected = (2 * a * b + 1e-4) * (2 * cross + 9e-4) / ((a**2 + b**2 + 1e-4) * (spread + 9e-4))
    found = interpolation_metrics(predicted, truth)["ssim"]
    assert found == pytest.approx(expected.mean().item(), abs=1e-5)


def test_bad_input_is_named(as_users_call):
    network, picture = FrameInterpolator(4), torch.rand(1, 3, 8, 8)
    for call, message in (
        (lambda: FrameInterpolator(0), "width and channels must be >= 1, got 0 and 3"),
        (lambda: network(picture, None), "pictures must be two of 3 channels and equal shape"),
        (lambda: network(picture[:, :1], picture[:, :1]), "pictures must be two of 3 channels"),
        (lambda: network(picture[..., :3], picture[..., :3]), "at least 4 x 4 pixels"),
        (lambda: network(picture, picture, 1.5), r"time must be in \[0, 1\], got 1.5"),
        (lambda: network(picture, picture, math.nan), r"time must be in \[0, 1\], got nan"),
        (lambda: slow_motion(network, picture, 2), "frames must be two or more, got 1"),
        (lambda: slow_motion(network, picture.repeat(2, 1, 1, 1), 0), "factor must be >= 1, got 0"),
        (lambda: interpolation_metrics(picture, picture), "at least 11 x 11 pixels"),
    ):
        with pytest.raises(InputError, match=message):
            call()
