import random

import numpy as np
import pytest
import torch
from torch import Tensor

from coloss.data import MultiView, random_views, series_views, small_image_views, vector_views
from coloss.data.views import seeded_globally


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(6, 3, 12, 10, generator=_generator(9))
GREY = torch.rand(6, 1, 8, 8, generator=_generator(9))
VECTORS = torch.randn(6, 20, generator=_generator(9))
SERIES = torch.randn(6, 3, 40, generator=_generator(9))
CASES = [
    (random_views, IMAGES),
    (random_views, GREY),
    (small_image_views, GREY),
    (vector_views, VECTORS),
    (series_views, SERIES),
]


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_views_are_a_function_of_the_generator_alone(make, inputs: Tensor) -> None:
    original = inputs.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = make(inputs, 3, _generator(1))
    assert torch.equal(states[0], torch.get_rng_state())
    if make is random_views:  # elsewhere the type checks of the test run draw from Python's own generator
        assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(77)
    assert torch.equal(first, make(inputs, 3, _generator(1)))
    assert not torch.equal(first, make(inputs, 3, _generator(2)))
    assert torch.equal(inputs, original)


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_views_are_as_exact_under_autocast(make, inputs: Tensor) -> None:
    views = make(inputs, 3, _generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make(inputs, 3, _generator()), views)


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_views_differ_from_each_other_and_keep_the_shape(make, inputs: Tensor) -> None:
    views = make(inputs, 3, _generator())
    assert views.shape == (3, *inputs.shape) and views.isfinite().all()
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_one_sample_and_none(make, inputs: Tensor) -> None:
    assert make(inputs[:1], 2, _generator()).shape == (2, 1, *inputs.shape[1:])
    assert make(inputs[:0], 2, _generator()).shape == (2, 0, *inputs.shape[1:])


@pytest.mark.parametrize(("make", "inputs"), CASES)
def test_without_a_generator_the_global_seed_decides(make, inputs: Tensor) -> None:
    torch.manual_seed(3)
    first = make(inputs, 2)
    second = make(inputs, 2)
    torch.manual_seed(3)
    assert torch.equal(first, make(inputs, 2)) and not torch.equal(first, second)


def test_random_views_stay_images_of_the_wanted_size() -> None:
    views = random_views(IMAGES, 2, _generator(), size=(6, 5))
    assert views.shape == (2, 6, 3, 6, 5) and views.min() >= 0 and views.max() <= 1


def test_random_views_with_everything_off_are_the_images() -> None:
    views = random_views(
        IMAGES,
        2,
        _generator(),
        crop=(1.0, 1.0),
        rotation=0.0,
        translation=0.0,
        flip=False,
        jitter=0.0,
        grey=0.0,
        erasing=0.0,
    )
    # The crop still chooses among aspect ratios, so only an image without any structure stays as it is.
    assert views.shape[1:] == IMAGES.shape
    flat = random_views(
        torch.full((2, 3, 8, 8), 0.5),
        2,
        _generator(),
        rotation=0.0,
        translation=0.0,
        jitter=0.0,
        grey=0.0,
        erasing=0.0,
    )
    assert torch.allclose(flat, torch.full_like(flat, 0.5), atol=1e-5)


def test_small_image_views_with_everything_off_are_the_images() -> None:
    off = {"rotation": 0.0, "scaling": 0.0, "shift": 0.0, "gain": 0.0, "noise": 0.0, "occlusion": 0}
    views = small_image_views(GREY, 2, _generator(), **off)
    assert torch.allclose(views, GREY.expand(2, *GREY.shape), atol=1e-5)


def test_small_image_views_black_out_one_square() -> None:
    off = {"rotation": 0.0, "scaling": 0.0, "shift": 0.0, "gain": 0.0, "noise": 0.0}
    views = small_image_views(torch.ones(400, 1, 8, 8), 2, _generator(), occlusion=3, **off)
    black = views.flatten(0, 1)[:, 0] == 0
    assert (black.sum((1, 2)) == 9).all()
    assert (black.any(2).sum(1) == 3).all() and (black.any(1).sum(1) == 3).all()
    corners = black.flatten(1).float().argmax(1).unique()
    assert corners.numel() == 36  # every one of the 6 x 6 positions occurs


def test_small_image_views_turn_by_at_most_the_given_angle() -> None:
    # A bright pixel right of the centre of a large oblong image moves on a circle.
    image = torch.zeros(1, 1, 61, 121)
    image[..., 30, 90] = 1.0
    off = {"scaling": 0.0, "shift": 0.0, "gain": 0.0, "noise": 0.0, "occlusion": 0}
    views = small_image_views(image, 200, _generator(), rotation=0.35, **off)[:, 0, 0]
    mass = views.sum((1, 2))
    rows = (views.sum(2) * (torch.arange(61.0) - 30)).sum(1) / mass
    columns = (views.sum(1) * (torch.arange(121.0) - 60)).sum(1) / mass
    assert torch.allclose((rows**2 + columns**2).sqrt(), torch.tensor(30.0), atol=0.6)
    angles = torch.atan2(rows, columns).abs()
    assert angles.max() < 0.37 and angles.max() > 0.3 and angles.min() < 0.05


def test_small_image_views_scale_and_shift() -> None:
    image = torch.zeros(1, 1, 81, 81)
    image[..., 40, 60] = 1.0
    off = {"rotation": 0.0, "gain": 0.0, "noise": 0.0, "occlusion": 0}
    views = small_image_views(image, 200, _generator(), scaling=0.25, shift=0.0, **off)[:, 0, 0]
    columns = (views.sum(1) * (torch.arange(81.0) - 40)).sum(1) / views.sum((1, 2))
    assert 14 < columns.min() < 16.5 and 23.5 < columns.max() < 26
    image = torch.zeros(1, 1, 81, 81)
    image[..., 40, 40] = 1.0
    views = small_image_views(image, 200, _generator(), scaling=0.0, shift=0.3, **off)[:, 0, 0]
    rows = (views.sum(2) * (torch.arange(81.0) - 40)).sum(1) / views.sum((1, 2))
    assert 11 < rows.abs().max() < 12.7  # 0.3 of 40.5 pixels is 12.15


def test_vector_views_scale_a_sample_as_a_whole() -> None:
    views = vector_views(torch.ones(4, 10), 50, _generator(), noise=0.0, scaling=0.5, masking=0.0)
    assert torch.equal(views, views[..., :1].expand_as(views))
    assert 0.5 <= views.min() < 0.6 and 1.4 < views.max() <= 1.5


def test_vector_views_lose_the_given_share() -> None:
    views = vector_views(torch.ones(50, 40), 10, _generator(), noise=0.0, scaling=0.0, masking=0.3)
    assert abs((views == 0).float().mean() - 0.3) < 0.02


def test_noise_has_the_given_deviation() -> None:
    flat = vector_views(torch.zeros(200, 50), 2, _generator(), noise=0.5, masking=0.0)
    series = series_views(torch.zeros(20, 5, 50), 4, _generator(), noise=0.5, masking=0.0)
    assert abs(flat.std() - 0.5) < 0.02 and abs(series.std() - 0.5) < 0.02


def test_series_views_lose_one_span_in_all_channels() -> None:
    views = series_views(torch.ones(30, 2, 20), 3, _generator(), noise=0.0, scaling=0.0, masking=0.25)
    lost = (views == 0).flatten(0, 1)
    assert torch.equal(lost[:, 0], lost[:, 1]) and (lost[:, 0].sum(1) == 5).all()
    changes = lost[:, 0].int().diff(dim=1).abs().sum(1)
    assert (changes <= 2).all()
    assert lost[:, 0, 0].any() and lost[:, 0, -1].any()


def test_multi_view_passes_the_generator_on_in_order() -> None:
    def small(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return random_views(inputs, 1, generator, size=(4, 4))[0]

    def noisy(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return small_image_views(inputs, 1, generator)[0]

    views = MultiView([small, noisy])
    one, two = views(GREY, _generator(5)), views(GREY, _generator(5))
    assert one[0].shape == (6, 1, 4, 4) and one[1].shape == GREY.shape
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_global_state_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded_globally(_generator()):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiView([]), "at least one"),
        (lambda: random_views(IMAGES, 0), "count must be >= 1, got 0"),
        (lambda: random_views(IMAGES, crop=(0.0, 1.0)), "crop must be"),
        (lambda: random_views(IMAGES, erasing=1.5), r"erasing must be in \[0, 1\], got 1.5"),
        (lambda: random_views(IMAGES, rotation=-1.0), "rotation must be >= 0"),
        (lambda: small_image_views(GREY, 0), "views must be >= 1"),
        (lambda: small_image_views(GREY, occlusion=9), r"occlusion must be in \[0, 8\], got 9"),
        (lambda: small_image_views(GREY, scaling=1.0), "scaling must be in"),
        (lambda: small_image_views(GREY, noise=-0.1), "noise must be >= 0, got -0.1"),
        (lambda: vector_views(VECTORS, masking=1.0), "masking in"),
        (lambda: series_views(SERIES, noise=-1.0), "noise must be >= 0"),
        (lambda: series_views(SERIES, 0), "views must be >= 1"),
    ],
)
def test_refuses_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
