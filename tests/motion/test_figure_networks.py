"""Heatmaps and the points they mean, masks, errors of joints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.errors import InputError
from coloss.motion import FigureNetwork, MaskNetwork, heatmap_points, joint_error, joint_heatmaps


@settings(max_examples=8)
@given(st.floats(6, 25), st.floats(6, 25))
def test_points_come_back_from_their_heatmaps(x, y):
    points = torch.tensor([[[x, y]]])
    found = heatmap_points(joint_heatmaps(points, 32, sigma=1.0), reach=2)
    assert (found - points).abs().max() < 0.2


def test_the_middle_of_a_map_pixel_is_exact():
    # Pixel (row 3, column 5) of the map covers pixels 10, 11 and 6, 7 of the picture.
    points = torch.tensor([[[10.5, 6.5]]])
    torch.testing.assert_close(heatmap_points(joint_heatmaps(points, 32)), points)
    maps = joint_heatmaps(points, (20, 32))
    assert maps.shape == (1, 1, 10, 16)
    assert maps[0, 0, 3, 5] == 1
    points = points.floor()
    torch.testing.assert_close(heatmap_points(joint_heatmaps(points, 31, stride=1), stride=1), points)


def test_hidden_and_missing_joints_have_empty_maps_and_empty_maps_no_point():
    points = torch.tensor([[[5.0, 5.0], [math.nan, 5.0], [9.0, 9.0]]])
    maps = joint_heatmaps(points, 16, visible=torch.tensor([[True, True, False]]))
    assert [bool(one.any()) for one in maps[0]] == [True, False, False]
    assert heatmap_points(maps)[0, 1:].isnan().all()
    assert heatmap_points(-maps).isnan().all()


def test_errors_count_visible_joints_and_missed_ones():
    truth = torch.zeros(2, 2, 2)
    found = torch.tensor([[[3.0, 4.0], [math.nan, math.nan]], [[100.0, 0.0], [1.0, 0.0]]])
    seen = torch.tensor([[True, True], [True, False]])
    assert joint_error(found, truth, seen, missed=16.0) == pytest.approx((5 + 16 + 16) / 3)
    assert math.isnan(joint_error(found, truth, seen & False, missed=16.0))


@pytest.mark.parametrize("size", [(32, 32), (33, 18)])
def test_networks_give_maps_of_half_and_masks_of_full_size(size):
    height, width = size
    images = torch.rand(2, 3, *size)
    assert FigureNetwork(5, 4)(images).shape == (2, 5, -(-height // 2), -(-width // 2))
    assert MaskNetwork(2, 4)(images).shape == (2, 2, *size)
    assert joint_heatmaps(torch.zeros(2, 5, 2), size).shape == FigureNetwork(5, 4)(images).shape


def test_bad_input_is_named():
    points = torch.zeros(1, 1, 2)
    for call, message in (
        (lambda: FigureNetwork(0), "maps must be >= 1, got 0"),
        (lambda: joint_heatmaps(points, 0), "size and stride must be >= 1, got 0 and 2"),
        (lambda: joint_heatmaps(points, 8, sigma=0.0), "sigma must be > 0 and finite, got 0.0"),
        (lambda: heatmap_points(torch.zeros(1, 1, 4, 4), stride=0), "stride must be >= 1"),
        (
            lambda: joint_error(points, points, torch.ones(1, 1).bool(), missed=0.0),
            "missed must be > 0, got 0.0",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
