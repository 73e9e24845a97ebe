"""Pictures of motion: what is where, in which colour, and for how long."""

import re

import numpy as np
import pytest
from PIL import Image

from coloss.data import Skeleton
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion.body_view import BodyView
from coloss.motion.motion_picture import film_strip_svg, save_gif

BODY = SKELETONS["bandai"]


def standing(frames=3):
    """A person of about 1.6 m with arms hanging, left side at +x, facing +z."""
    joints = np.zeros((21, 3))
    joints[[0, 1, 2, 3, 4], 1] = [0.9, 1.0, 1.15, 1.35, 1.42]
    for sign, arm, leg in ((1, 5, 13), (-1, 9, 17)):
        joints[arm : arm + 4] = [
            [sign * x, y, 0] for x, y in ((0.05, 1.3), (0.18, 1.3), (0.2, 1.05), (0.2, 0.8))
        ]
        joints[leg : leg + 4] = [
            [sign * 0.1, y, z] for y, z in ((0.85, 0), (0.45, 0), (0.08, 0), (0.0, 0.12))
        ]
    return np.repeat(joints[None], frames, axis=0)


def test_the_left_side_stands_on_the_right_of_the_picture_and_up_is_up():
    view = BodyView(standing(), BODY)
    assert view.height == pytest.approx(1.42) and view.floor == 0
    flat, depth = view.project(view.joints[0], view.place(0))
    assert flat[6, 0] > flat[10, 0]  # the person looks at us
    assert flat[4, 1] > flat[0, 1] > flat[15, 1]
    assert depth[6] < depth[10]  # seen from the person's left
    behind = BodyView(standing(), BODY, azimuth=180)
    flat, _ = behind.project(behind.joints[0], behind.place(0))
    assert flat[6, 0] < flat[10, 0]


def test_the_view_turns_and_scales_with_the_body():
    joints = standing()
    turned = (
        joints[..., [2, 1, 0]] * np.array([1.0, 1.0, -1.0]) * 250 + 40
    )  # a quarter to the left, other units
    for frame in (0, -1):
        for one, other in zip(BodyView(joints, BODY).shapes(frame), BodyView(turned, BODY).shapes(frame)):
            np.testing.assert_allclose(one.points, other.points, atol=1e-9)
            assert one.side == other.side and one.radius == pytest.approx(other.radius)


def test_near_shapes_cover_far_ones_and_sides_follow_the_parts():
    shapes = BodyView(standing(), BODY).shapes(0)
    depths = [shape.depth for shape in shapes]
    assert depths == sorted(depths, reverse=True)
    # Two bones of an arm below the shoulder and three of a leg below the hip; those inside the trunk are no shapes.
    sides = [shape.side for shape in shapes]
    assert (sides.count("left"), sides.count("right")) == (5, 5)
    assert [len(shape.points) for shape in shapes].count(4) == 1  # the trunk


def test_joints_that_are_not_seen_are_left_out():
    joints = standing()
    joints[1, 15] = np.nan  # the left ankle: two bones
    view = BodyView(joints, BODY)
    assert len(view.shapes(1)) == len(view.shapes(0)) - 2
    joints[2] = np.nan
    with pytest.raises(InputError, match="seen in every frame, frame 2 has none"):
        BodyView(joints, BODY)
    assert len(BodyView(standing()[:, :3], Skeleton((-1, 0, 1))).shapes(0)) == 2


def test_a_gif_lasts_as_long_as_the_clip(tmp_path):
    joints = standing(10) + np.linspace(0, 1, 10)[:, None, None]
    for fps, frames in ((15, 10), (60, 5)):
        path = tmp_path / f"{fps}.gif"
        save_gif(path, joints, BODY, fps=fps, caption="someone floats away", size=64)
        with Image.open(path) as picture:
            assert picture.n_frames == frames
            total = 0
            for frame in range(frames):
                picture.seek(frame)
                total += picture.info["duration"]
        assert total == pytest.approx(1000 * 10 / fps, abs=20)


def test_colours_show_the_sides(tmp_path):
    def counts(joints):
        save_gif(tmp_path / "clip.gif", joints, BODY, fps=15, size=96)
        with Image.open(tmp_path / "clip.gif") as picture:
            pixels = np.asarray(picture.convert("RGB"), int).reshape(-1, 3)
        orange = (pixels[:, 0] > pixels[:, 2] + 80).sum()
        return orange, (pixels[:, 2] > pixels[:, 0] + 60).sum()

    orange, blue = counts(standing(1))
    assert orange > 50 and blue > 50
    without = standing(1)
    without[:, 5:9] = np.nan
    without[:, 13:17] = np.nan
    without[:, 13], without[:, 6] = standing(1)[:, 13], standing(1)[:, 6]
    assert counts(without)[0] < 10


def test_a_strip_holds_poses_times_and_words():
    joints = standing(46)
    svg = film_strip_svg(joints, BODY, fps=15, caption='<a> & "b"', poses=4)
    assert re.findall(r">([\d.]+) s<", svg) == ["0.0", "1.0", "2.0", "3.0"]
    assert "&lt;a&gt; &amp;" in svg and "from above" not in svg
    joints[..., 2] += np.linspace(0, 3, 46)[:, None]
    assert "from above" in film_strip_svg(joints, BODY, fps=15)
    assert film_strip_svg(joints[:2], BODY, fps=15, poses=7).count("<g ") == 2


def test_bad_input_is_named(tmp_path):
    joints = standing()
    for given, words in (
        ({"size": 63}, "size must be >= 64"),
        ({"fps": 0.0}, "fps must be > 0"),
        ({"joints": joints[:, :20]}, "joints must be \\(frames, 21, 3\\)"),
        ({"joints": joints[:0]}, "at least one frame"),
        ({"path": tmp_path / "clip.mp4"}, "must end in .gif"),
    ):
        arguments = {"path": tmp_path / "clip.gif", "joints": joints, "skeleton": BODY, "fps": 15.0} | given
        with pytest.raises(InputError, match=words):
            save_gif(**arguments)
    with pytest.raises(InputError, match="poses must be >= 2"):
        film_strip_svg(joints, BODY, 15.0, poses=1)
    with pytest.raises(InputError, match="fps must be > 0"):
        film_strip_svg(joints, BODY, 0.0)
