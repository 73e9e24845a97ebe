"""Drawn figures: what covers which pixel, who is in front, what is hidden, and where joints are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import Skeleton
from coloss.errors import InputError
from coloss.motion import (
    occluding_bars,
    orthographic_view,
    render_figures,
    side_colors,
    textured_background,
)


def drawn_slowly(points, bones, size, radius):
    """Coverage of one figure, pixel by pixel."""
    mask = [[0.0] * size for _ in range(size)]
    for row in range(size):
        for column in range(size):
            for first, second in bones:
                (ax, ay), (bx, by) = points[first], points[second]
                dx, dy = bx - ax, by - ay
                t = min(max(((column - ax) * dx + (row - ay) * dy) / (dx * dx + dy * dy), 0), 1)
                distance = math.hypot(column - ax - t * dx, row - ay - t * dy)
                mask[row][column] = max(mask[row][column], min(max(radius - distance + 0.5, 0), 1))
    return torch.tensor(mask)


def test_coverage_is_that_of_a_loop_over_pixels():
    points = [[1.3, 2.2], [8.1, 6.4], [3.0, 9.0]]
    bones = [(1, 0), (2, 1)]
    found = render_figures(torch.tensor([points]), bones, 11, radius=1.2)
    torch.testing.assert_close(found.masks[0], drawn_slowly(points, bones, 11, 1.2), atol=1e-5, rtol=0)
    # White bones on black: the picture is the mask.
    torch.testing.assert_close(found.images, found.masks[:, None].expand(-1, 3, -1, -1))


@settings(max_examples=10)
@given(st.integers(3, 20), st.integers(3, 20), st.integers(1, 4), st.integers(0, 99))
def test_any_tree_at_any_size_stays_within_range(height, width, joints, seed):
    generator = torch.Generator().manual_seed(seed)
    skeleton = Skeleton((-1, *range(joints)))
    points = 30 * torch.rand(2, joints + 1, 2, generator=generator) - 5
    found = render_figures(
        points,
        skeleton,
        (height, width),
        depth=torch.rand(2, joints + 1, generator=generator),
        colors=side_colors(skeleton, 2, generator),
        background=textured_background(2, (height, width), generator),
        bars=occluding_bars(2, (height, width), generator),
    )
    assert found.images.shape == (2, 3, height, width)
    for values in (found.images, found.masks):
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-6


def test_moving_a_figure_by_whole_pixels_moves_its_mask():
    points = 4 + 4 * torch.rand(1, 3, 2)
    bones = [(1, 0), (2, 1)]
    before, after = (render_figures(points + shift, bones, 16).masks[0] for shift in (0, 3))
    torch.testing.assert_close(after[3:, 3:], before[:-3, :-3], atol=1e-5, rtol=0)


def test_the_nearer_bone_is_in_front():
    points = torch.tensor([[[1.0, 4.0], [7.0, 4.0], [4.0, 1.0], [4.0, 7.0]]])
    bones, colors = [(0, 1), (2, 3)], torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    for nearer, colour in ((0, [1.0, 0, 0]), (1, [0, 0, 1.0])):
        depth = torch.zeros(1, 4)
        depth[0, 2 * nearer : 2 * nearer + 2] = 5
        found = render_figures(points, bones, 9, depth=depth, colors=colors)
        assert found.images[0, :, 4, 4].tolist() == colour
    # Without depth the later bone is.
    assert render_figures(points, bones, 9, colors=colors).images[0, :, 4, 4].tolist() == [0, 0, 1]


def test_bars_hide_pixels_masks_and_joints_and_points_stay_exact():
    points = torch.tensor([[[2.0, 4.0], [6.0, 4.0], [40.0, 4.0]]])
    bars = torch.zeros(1, 4, 9, 9)
    bars[:, 0], bars[:, 3, :, 5:] = 1.0, 1.0
    found = render_figures(points, [(1, 0)], 9, background=torch.ones(1, 3, 9, 9), bars=bars)
    assert found.visible.tolist() == [[True, False, False]]
    assert found.masks[0, :, 5:].abs().max() == 0
    assert found.images[0, :, 4, 7].tolist() == [1, 0, 0]
    assert torch.equal(found.points, points)


def test_a_missing_joint_is_no_joint_at_zero():
    nan = math.nan
    points = torch.tensor([[[1.0, 1.0], [6.0, 6.0], [nan, nan]], [[nan, nan]] * 3])
    found = render_figures(points, [(1, 0), (2, 1)], 9)
    alone = render_figures(points[:1, :2], [(1, 0)], 9)
    assert torch.equal(found.masks[0], alone.masks[0])
    assert found.masks[1].abs().max() == 0
    assert found.visible.tolist() == [[True, True, False], [False] * 3]
    assert found.images.isfinite().all()


def test_the_camera_turns_about_the_vertical_and_keeps_heights():
    joints = torch.tensor([[[[0.0, 0, 0], [1.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]]]])
    front, depth = orthographic_view(joints, torch.zeros(1), 11, extent=11.0)
    side, depth_there = orthographic_view(joints, torch.tensor([math.pi / 2]), 11, extent=11.0)
    torch.testing.assert_close(front[0, 0, 2, 1], front[0, 0, 0, 1] - 2)
    torch.testing.assert_close(side[..., 1], front[..., 1])
    # What was to the right is near now, and what was near is to the left.
    assert depth_there[0, 0, 1] - depth_there[0, 0, 0] == pytest.approx(1)
    assert depth[0, 0, 3] - depth[0, 0, 0] == pytest.approx(1)
    assert side[0, 0, 3, 0] - side[0, 0, 0, 0] == pytest.approx(-1)


def test_the_camera_stands_still_while_the_figure_moves():
    path = torch.zeros(1, 2, 1, 3)
    path[0, 1, 0, 0] = 2.0
    seen, _ = orthographic_view(path, torch.zeros(1), 11, extent=11.0)
    assert seen[0, :, 0].tolist() == [[4, 5], [6, 5]]


def test_randomness_is_the_generators():
    first, again, other = (
        torch.cat(
            [
                maker(3, 12, torch.Generator().manual_seed(seed))
                for maker in (textured_background, occluding_bars)
            ],
            1,
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sides_are_told_apart_by_colour():
    skeleton = Skeleton((-1, 0, 0, 0), mirror=(0, 2, 1, 3), parts={"left_arm": (2,)})
    middle = side_colors(skeleton, 200, torch.Generator().manual_seed(0)).mean(0)
    assert middle[1, 0] > middle[1, 2]  # joint 2 is left: warm
    assert middle[0, 2] > middle[0, 0]  # joint 1 is right: cool
    assert middle[2].std() < 0.05  # joint 3 is neither
    assert side_colors(Skeleton((-1, 0)), 1).shape == (1, 1, 3)


def test_bad_input_is_named(as_users_call):
    points = torch.zeros(1, 2, 2)
    for call, message in (
        (lambda: render_figures(points, [(0, 2)], 8), r"bones must be pairs of joints in \[0, 2\)"),
        (lambda: render_figures(points, [], 8), "at least one"),
        (lambda: render_figures(points, [(0, 1)], 0), "size must be >= 1, got 0"),
        (lambda: render_figures(points, [(0, 1)], 8, radius=0.0), "radius must be > 0, got 0.0"),
        (
            lambda: orthographic_view(torch.zeros(1, 1, 1, 3), torch.zeros(1), 8, extent=0),
            "extent must be > 0",
        ),
        (lambda: textured_background(-1, 8), "count must be >= 0, got -1"),
        (lambda: occluding_bars(1, 8, bars=-1), "bars must be >= 0, got -1"),
        (lambda: occluding_bars(1, 8, thickness=(0.2, 0.1)), "thickness must be"),
    ):
        with pytest.raises(InputError, match=message):
            call()
