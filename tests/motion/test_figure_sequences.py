"""Windows of recorded motion, drawn: what moves, what is the same in a window, what is exact, what is refused."""

import numpy as np
import pytest
import torch

from coloss.data import MotionClips, Skeleton, save_motion
from coloss.errors import InputError
from coloss.motion import draw_windows, figure_frames, motion_parts, moving_windows, still_figures

BODY = Skeleton((-1, 0, 1), names=("hips", "neck", "head"))


def new_clips(count=12, frames=20, still=()):
    """Figures that walk to the right, each a little further than the one before; `still` ones stand."""
    body = np.array([[0.0, 0, 0], [0, 1, 0], [0, 1.3, 0]])
    clips = []
    for number in range(count):
        path = np.linspace(0, 0 if number in still else 1 + number / 10, frames)[:, None, None]
        clips.append(body + path * np.array([1.0, 0, 0]))
    return MotionClips.from_list(clips, BODY, fps=15)


def test_windows_are_runs_of_frames_of_clips_that_move():
    clips = new_clips(still=range(6))
    found = moving_windows(clips, 30, 4, least=0.1, generator=torch.Generator().manual_seed(0))
    steps = found[:, 1:] - found[:, :-1]
    torch.testing.assert_close(steps[:, :1].expand_as(steps), steps, atol=1e-4, rtol=0)
    assert (steps[..., 0].sum(1) > 0.1).all()
    assert len({round(value, 3) for value in steps[:, 0, 0, 0].tolist()}) > 3  # of several clips


def test_every_start_may_be_drawn_the_last_included():
    clips = MotionClips.from_list([np.arange(5.0).reshape(5, 1, 1) * np.ones(3)], Skeleton((-1,)), fps=15)
    found = moving_windows(clips, 60, 3, generator=torch.Generator().manual_seed(0))
    assert set(found[:, 0, 0, 0].tolist()) == {0.0, 1.0, 2.0}


def test_frames_between_are_recorded_ones_and_their_joints_exact():
    clips = new_clips()
    frames = figure_frames(
        clips, 24, size=24, extent=3.0, gap=4, least=0.02, generator=torch.Generator().manual_seed(0)
    )
    first, last, share = frames.dataset.inputs
    assert set(share.tolist()) == {0.25, 0.5, 0.75}
    # What does not move is one picture: the background's corner pixels, mostly.
    target = frames.dataset.targets
    same = (first - last).abs().amax(1) < 1e-6
    assert same.float().mean() > 0.5
    assert (first - target).abs().amax(1)[same].median() < 1e-6
    # The joints lie on the figure: the mask is there around visible ones.
    x, y = frames.points.round().long().clamp(0, 23).unbind(-1)
    at_joints = frames.masks[torch.arange(24)[:, None], y, x]
    assert at_joints[frames.visible].mean() > 0.7
    assert frames.motion > 0.5


def test_drawing_depends_on_the_generator_alone():
    clips = new_clips()
    windows = moving_windows(clips, 3, 2, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        draw_windows(windows, clips, 16, extent=3.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.visible.any()


def test_parts_of_a_file_of_ones_own_do_not_overlap(tmp_path):
    save_motion(tmp_path / "own.npz", new_clips(count=20))
    parts = motion_parts(tmp_path / "own.npz")
    names = [set(clips.names) for clips in (parts.train, parts.validation, parts.test)]
    assert [len(part) for part in names] == [12, 4, 4]
    assert not names[0] & names[2]
    assert parts.extent == pytest.approx(1.35 * 1.3, rel=1e-3)
    figures = still_figures(parts.train, 4, size=16, extent=parts.extent)
    assert figures.masks.amax((1, 2)).min() > 0.5


def test_bad_input_is_named(tmp_path):
    clips = new_clips()
    for call, message in (
        (lambda: moving_windows(clips, 0, 2), "count and frames must be >= 1, got 0 and 2"),
        (lambda: moving_windows(clips, 1, 99), "clips must have one of 99 frames or more, got none"),
        (
            lambda: moving_windows(clips, 1, 2, least=9.0),
            "clips must move by 9.0 within 2 frames often enough",
        ),
        (lambda: figure_frames(clips, 2, size=16, extent=3.0, gap=1), "gap must be >= 2"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    save_motion(tmp_path / "few.npz", new_clips(count=3))
    with pytest.raises(InputError, match="data must hold at least 10 clips, got 3"):
        motion_parts(tmp_path / "few.npz")
