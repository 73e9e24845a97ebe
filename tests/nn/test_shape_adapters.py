import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.nn import ShapeAdapter, channels_first, feature_layout

SHAPES = {
    "vector": (3, 6),
    "tokens": (3, 9, 6),
    "maps": (3, 6, 3, 3),
    "large maps": (3, 6, 8, 4),
    "tokens of a map": (3, 16, 6),
}


@pytest.mark.parametrize("student", SHAPES)
@pytest.mark.parametrize("teacher", SHAPES)
def test_any_layout_goes_to_any(student: str, teacher: str) -> None:
    target = tuple(size if n != len(SHAPES[teacher]) else 5 for n, size in enumerate(SHAPES[teacher]))
    adapter = ShapeAdapter(SHAPES[student], target)
    features = torch.randn(SHAPES[student]).requires_grad_()
    found = adapter(features)
    assert found.shape == target
    found.sum().backward()
    assert features.grad is not None and bool((features.grad != 0).all())


def test_on_vectors_it_is_a_linear_layer_and_on_maps_a_convolution_of_one_pixel() -> None:
    adapter = ShapeAdapter((1, 4), (1, 7))
    vectors = torch.randn(5, 4)
    torch.testing.assert_close(adapter(vectors), adapter.regressor(vectors))
    adapter = ShapeAdapter((1, 4, 6, 6), (1, 7, 6, 6))
    maps = torch.randn(5, 4, 6, 6)
    weight = adapter.regressor.weight[:, :, None, None]
    torch.testing.assert_close(adapter(maps), F.conv2d(maps, weight, adapter.regressor.bias))


def identity(adapter: ShapeAdapter) -> ShapeAdapter:
    nn.init.eye_(adapter.regressor.weight)
    nn.init.zeros_(adapter.regressor.bias)
    return adapter


@pytest.mark.parametrize("size", [(3, 3), (12, 12), (3, 12), (7, 5)])
def test_positions_are_averaged_down_and_interpolated_up(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 4, 6, 6)
    found = identity(ShapeAdapter((1, 4, 6, 6), (1, 4, *size)))(maps)
    down = [min(6, side) for side in size]
    expected = F.interpolate(F.adaptive_avg_pool2d(maps, down), size, mode="bilinear")
    torch.testing.assert_close(found, expected)
    constant = identity(ShapeAdapter((1, 4, 6, 6), (1, 4, *size)))(torch.full((2, 4, 6, 6), 3.0))
    torch.testing.assert_close(constant, torch.full((2, 4, *size), 3.0))


def test_tokens_are_maps_read_row_by_row() -> None:
    maps = torch.randn(2, 4, 3, 3)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(identity(ShapeAdapter((1, 9, 4), (1, 4, 3, 3)))(tokens), maps)
    torch.testing.assert_close(identity(ShapeAdapter((1, 4, 3, 3), (1, 9, 4)))(maps), tokens)


def test_a_vector_is_the_mean_over_positions_and_stands_at_all_of_them() -> None:
    maps = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(identity(ShapeAdapter((1, 4, 3, 5), (1, 4)))(maps), maps.mean((2, 3)))
    vectors = torch.randn(2, 4)
    spread = identity(ShapeAdapter((1, 4), (1, 4, 3, 5)))(vectors)
    torch.testing.assert_close(spread, vectors[:, :, None, None].expand(2, 4, 3, 5))


def test_series_of_channels_are_maps_when_said() -> None:
    adapter = ShapeAdapter((1, 4, 20), (1, 7, 10), student_layout="maps", teacher_layout="maps")
    series = torch.randn(2, 4, 20)
    torch.testing.assert_close(
        adapter(series), adapter.regressor(F.avg_pool1d(series, 2).transpose(1, 2)).transpose(1, 2)
    )
    tokens = ShapeAdapter((1, 4, 20), (1, 10, 7), student_layout="maps")
    assert tokens(series).shape == (2, 10, 7)


def test_sizes_may_vary_and_channels_may_not() -> None:
    adapter = ShapeAdapter((1, 4, 6, 6), (1, 7, 6, 6))
    assert adapter(torch.randn(2, 4, 9, 9)).shape == (2, 7, 6, 6)
    assert adapter(torch.randn(2, 4, 9, 9), (3, 3)).shape == (2, 7, 3, 3)
    with pytest.raises(ValueError, match=r"4 channels as the adapter was made for, got shape \(2, 5, 6, 6\)"):
        adapter(torch.randn(2, 5, 6, 6))
    with pytest.raises(ValueError, match=r"laid out as maps must have 3 or 4 dimensions, got shape \(2, 4\)"):
        adapter(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4), (1,)), {}, r"teacher must be \(batch, channels\), .* got \(1,\)"),
        (((1, 10, 4), (1, 4, 3, 3)), {}, "must be a square number, got 10"),
        (((1, 4, 3, 3), (1, 10, 4)), {}, "must be a square number, got 10"),
        (((1, 4), (1, 4)), {"student_layout": "series"}, "laid out as one of vector, tokens, maps"),
        (
            ((1, 4, 3, 3), (1, 4, 9)),
            {"teacher_layout": "maps"},
            "maps must have as many dimensions",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_shapes_are_named(shapes: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapeAdapter(*shapes, **options)


def test_channels_first_transposes_tokens_only() -> None:
    assert channels_first(torch.zeros(2, 5, 3)).shape == (2, 3, 5)
    assert channels_first(torch.zeros(2, 5, 3), "maps").shape == (2, 5, 3)
    assert feature_layout((2, 5, 3, 3)) == "maps"
