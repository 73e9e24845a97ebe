"""Scattering coefficients are those of their definition, hardly move with the image, and need no state; the adapter keeps its maps' size."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coloss.contrastive import (
    ADAPTERS,
    ResidualAdapter,
    ScatteringEncoder,
    ScatteringFront,
    scattering,
    scattering_channels,
    scattering_encoder,
)
from coloss.errors import InputError

filters = pytest.importorskip("kymatio.scattering2d.filter_bank")


def raw(*sizes, **options):
    return ScatteringFront(*sizes, normalize="none", **options)


@pytest.mark.parametrize(
    ("scales", "angles", "order", "count"),
    [(2, 16, 2, 289), (1, 8, 2, 9), (2, 8, 2, 81), (2, 8, 1, 17), (3, 2, 2, 19)],
)
def test_the_number_of_coefficients_is_the_formulas(scales, angles, order, count):
    assert scattering_channels(scales, angles, order) == count
    front = raw(2, scales, angles, order=order)
    assert front.out_channels == 2 * count
    assert front(torch.rand(1, 2, 20, 17)).shape == (1, 2 * count, 20 // 2**scales, 17 // 2**scales)


def test_means_and_finest_wavelets_are_those_of_the_definition():
    image = np.random.default_rng(0).random((16, 12))
    found = raw(1, 2, 4)(torch.from_numpy(image).float()[None, None])[0].numpy()
    height, width = (((side + 4) // 4 + 1) * 4 for side in image.shape)
    rows, columns = height - 16, width - 12
    padded = np.pad(image, ((rows // 2, (rows + 1) // 2), (columns // 2, (columns + 1) // 2)), mode="reflect")
    bank = filters.filter_bank(height, width, 2, 4)
    low = bank["phi"]["levels"][0]

    def smoothed(x):
        return np.fft.ifft2(np.fft.fft2(x) * low).real[::4, ::4][1:-1, 1:-1]

    np.testing.assert_allclose(found[0], smoothed(padded), atol=1e-6)
    for angle in range(4):
        wavelet = bank["psi"][angle]
        assert wavelet["j"] == 0 and wavelet["theta"] == angle
        modulus = np.abs(np.fft.ifft2(np.fft.fft2(padded) * wavelet["levels"][0]))
        np.testing.assert_allclose(found[1 + angle], smoothed(modulus), atol=1e-6)


def test_a_constant_image_has_its_mean_and_no_wavelet_coefficients():
    found = raw(1, 2, 8)(torch.ones(1, 1, 32, 32))[0]
    torch.testing.assert_close(found[0], torch.ones(8, 8), rtol=0, atol=1e-4)
    assert found[1:].abs().max() < 1e-6


def test_a_shift_moves_the_coefficients_less_than_the_image():
    image = F.avg_pool2d(torch.rand(1, 1, 34, 34), 3, stride=1)
    shifted = image.roll(1, 3)
    front = raw(1, 2, 8)

    def moved(one, other):
        return ((one - other).norm() / one.norm()).item()

    assert moved(front(image), front(shifted)) < 0.75 * moved(image, shifted)


def test_no_two_images_move_apart():
    first, second = torch.rand(2, 8, 1, 24, 24)
    second[4:] = first[4:] + 0.01 * torch.randn(4, 1, 24, 24)
    front = raw(1, 2, 8)
    distance = (front(first) - front(second)).flatten(1).norm(dim=1)
    assert (distance <= (first - second).flatten(1).norm(dim=1)).all()


def test_each_input_channel_has_its_coefficients_together():
    images = torch.rand(2, 3, 16, 16)
    together = raw(3, 1, 4)(images).unflatten(1, (3, -1))
    for channel in range(3):
        alone = raw(1, 1, 4)(images[:, channel : channel + 1])
        torch.testing.assert_close(together[:, channel], alone)


def test_normalisations():
    images = torch.rand(16, 1, 16, 16) - 0.5
    plain = raw(1, 1, 4)(images)
    assert plain.min() < 0
    torch.testing.assert_close(ScatteringFront(1, 1, 4)(images), plain.sign() * plain.abs().log1p())
    front = ScatteringFront(1, 1, 4, normalize="batchnorm")
    rows = front(images).transpose(0, 1).flatten(1)
    assert rows.mean(1).abs().max() < 1e-4 and plain.std((0, 2, 3)).max() > 4 * plain.std((0, 2, 3)).min()
    torch.testing.assert_close(rows.std(1), torch.ones(5), rtol=0.05, atol=0)
    assert not list(front.parameters())
    before = front.eval()(images)
    front(10 * images)
    torch.testing.assert_close(front(images), before, rtol=0, atol=0)


def test_it_computes_in_float32_whatever_the_precision_around_it():
    images = torch.rand(3, 1, 16, 16)
    front = raw(1, 2, 4)
    expected = front(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(front(images), expected, rtol=0, atol=0)
    half = copy.deepcopy(front).to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.01)
    double = front.double()(images.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=0)


def test_one_front_serves_images_of_any_size_and_has_no_state():
    front = raw(1, 2, 4)
    shapes = [(1, 1, 16, 16), (2, 1, 28, 20), (0, 1, 16, 16), (1, 1, 4, 4)]
    assert [tuple(front(torch.rand(*shape)).shape[2:]) for shape in shapes] == [
        (4, 4),
        (7, 5),
        (4, 4),
        (1, 1),
    ]
    assert front(torch.rand(0, 1, 16, 16)).shape == (0, 25, 4, 4)
    assert front.state_dict() == {}


def test_wavelets_made_without_autograd_serve_training_later():
    scattering._transform.cache_clear()
    encoder = ScatteringEncoder(1, 1, 4, blocks=((4, 1),), stem=4, pool=1)
    images = torch.rand(4, 1, 10, 10)
    with torch.inference_mode():
        encoder.eval()(images)
    images.requires_grad_()
    encoder.train()(images).square().sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_gradients_to_the_image_are_finite_where_moduli_vanish():
    for image in (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)):
        image.requires_grad_()
        ScatteringFront(1, 1, 4)(image).sum().backward()
        assert image.grad.isfinite().all()


def test_published_adapters_have_their_number_of_blocks_and_keep_the_size_of_maps():
    assert {depth: sum(count for _, count in blocks) for depth, (_, blocks) in ADAPTERS.items()} == {
        depth: depth for depth in (8, 12, 16, 30, 45)
    }
    adapter = ResidualAdapter(5, ADAPTERS[8][1], 32)
    assert adapter.out_features == 2048 and len(adapter.layers) == 3 + 8 + 2
    assert adapter.layers[:-2](torch.rand(1, 5, 6, 7)).shape == (1, 128, 6, 7)


def test_only_the_adapter_of_an_encoder_is_learnt():
    encoder = ScatteringEncoder(1, 1, 4, blocks=((8, 1), (16, 2)), stem=8, pool=2)
    learnt = {id(parameter) for parameter in encoder.parameters()}
    assert learnt == {id(parameter) for parameter in encoder.adapter.parameters()}
    assert encoder(torch.rand(2, 1, 9, 9)).shape == (2, encoder.out_features) == (2, 64)


def test_bad_input_is_named(as_users_call):
    for build, message in (
        (lambda: ScatteringFront(0), "in_channels must be >= 1, got 0"),
        (lambda: ScatteringFront(1, 0), "scales must be >= 1, got 0"),
        (lambda: ScatteringFront(1, angles=0), "angles must be >= 1, got 0"),
        (lambda: ScatteringFront(order=3), "order must be 1 or 2, got 3"),
        (lambda: ScatteringFront(normalize="l2"), 'must be "none", "log1p" or "batchnorm", got \'l2\''),
        (lambda: ScatteringFront(3)(torch.zeros(1, 1, 8, 8)), "images must have 3 channels"),
        (
            lambda: ScatteringFront(1, 3)(torch.zeros(1, 1, 9, 7)),
            "at least 8 pixels high and wide for 3 scales, got 9 x 7",
        ),
        (lambda: ResidualAdapter(4, ()), r"at least one pair in blocks must be >= 1, got 4, 256, 4 and \[\]"),
        (lambda: ResidualAdapter(4, ((8, 0),)), r"got 4, 256, 4 and \[\(8, 0\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            build()

    class Table:
        input_shape = (5,)

    with pytest.raises(InputError, match=r"needs images \(channels, height, width\), got inputs of \(5,\)"):
        scattering_encoder(Table())


def test_the_error_names_the_package_that_is_missing(monkeypatch):
    scattering._transform.cache_clear()
    monkeypatch.setitem(sys.modules, "kymatio.scattering2d.frontend.torch_frontend", None)
    with pytest.raises(InputError, match=r"pip install 'coloss\[scattering\]'"):
        ScatteringFront()(torch.rand(1, 1, 8, 8))
