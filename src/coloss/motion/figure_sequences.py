"""Frames of moving figures to train on: windows of recorded motion in which something moves, drawn, with the picture in between as target.

The motion is recorded, the pictures are simulated: each window has one figure, seen by a still camera from a random side, in colours that tell
left from right, before a texture of its own and behind a bar that may hide parts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.data import IndexedDataset, MotionClips, common_layout, held_out_pairs, load_motion
from coloss.data.motion_clips import TEST, TRAIN, VALIDATION
from coloss.data.skeleton import COMMON_JOINTS
from coloss.errors import InputError
from coloss.motion.rendered_figures import (
    RenderedFigures,
    occluding_bars,
    orthographic_view,
    render_figures,
    side_colors,
    textured_background,
)

_CHUNK = 64
_MARGIN = 1.35
_THICKNESS, _HEAD = 0.028, 0.045


@dataclass(frozen=True)
class MotionParts:
    """Clips to train, to choose and to judge on, and what a picture of them spans.

    Args:
        train, validation, test: clips of one skeleton.
        extent: of a picture's side, in the unit of the clips.
    """

    train: MotionClips
    validation: MotionClips
    test: MotionClips
    extent: float


@dataclass(frozen=True)
class FigureFrames:
    """Pairs of pictures, the picture between them, and what is known of it.

    Args:
        dataset: inputs (first picture, last picture, share of the time between), targets the picture at that time.
        points: of its joints in pixels, see `RenderedFigures`.
        visible: joints inside it that nothing hides.
        masks: share of each of its pixels that shows the figure.
        motion: mean way of a joint from the first to the last picture, in pixels.
    """

    dataset: IndexedDataset
    points: Float[Tensor, "frames joints 2"]
    visible: Bool[Tensor, "frames joints"]
    masks: Float[Tensor, "frames height width"]
    motion: float


def motion_parts(source: str | Path) -> MotionParts:
    """Recorded motion, divided so that nothing judged was trained on.

    Bodies are brought to 15 common joints; other skeletons stay as they are. Of `bandai` the test part is 20 pairs of action and style that
    occur nowhere else; other sets are divided as they come, without validation or test clips by every fifth clip.

    Args:
        source: name of a set or path of an `.npz` file, see `coloss.data.load_motion`.

    Raises:
        InputError: if there are fewer than ten clips.

    Examples:
        >>> parts = motion_parts("bandai")  # doctest: +SKIP
        >>> len(parts.train), len(parts.validation), len(parts.test)  # doctest: +SKIP
        (1025, 102, 444)
    """
    clips = load_motion(source)
    if len(clips) < 10:
        raise InputError(f"data must hold at least 10 clips, got {len(clips)}")
    split = clips.split.copy()
    if clips.source == "bandai":
        held = held_out_pairs(clips)
        split[split == TEST] = TRAIN
        split[held] = TEST
    else:
        order = np.arange(len(clips)) % 5
        for part, turn in ((TEST, 4), (VALIDATION, 3)):
            if not (split == part).any():
                split[(split == TRAIN) & (order == turn)] = part
    if clips.source in COMMON_JOINTS:
        clips = common_layout(clips)
    spans = [np.nanmax(np.nanmax(clip, (0, 1)) - np.nanmin(clip, (0, 1))) for clip in _still(clips)]
    train, validation, test = (clips.select(split == part) for part in (TRAIN, VALIDATION, TEST))
    return MotionParts(train, validation, test, _MARGIN * float(np.median(spans)))


def _still(clips: MotionClips) -> list[np.ndarray]:
    """One frame of each clip, the middle one, or the nearest after it that shows anybody."""
    found = []
    for index in range(len(clips)):
        clip = clips.clip(index)
        seen = np.flatnonzero(~np.isnan(clip).all((1, 2)))
        if len(seen):
            place = int(seen[min(int(np.searchsorted(seen, len(clip) // 2)), len(seen) - 1)])
            found.append(clip[place : place + 1])
    return found


def moving_windows(
    clips: MotionClips,
    count: int,
    frames: int,
    *,
    least: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count frames joints 3"]:
    """Random runs of consecutive frames, each from a random clip, in which joints move.

    Args:
        clips: to draw from; those with fewer frames are passed over.
        count: windows, >= 1.
        frames: in each, >= 1.
        least: mean way of the joints from the first to the last frame, in the unit of the clips.
        generator: of randomness.

    Raises:
        InputError: for a count or number of frames < 1, or if almost no window moves so far.

    Examples:
        >>> from coloss.data import Skeleton
        >>> falling = np.linspace(0, 1, 20).reshape(20, 1, 1) * [0, -1, 0]
        >>> clips = MotionClips.from_list([falling, falling * 0], Skeleton((-1,)), fps=15)
        >>> windows = moving_windows(clips, 3, 4, least=0.1)
        >>> windows.shape, (windows[:, 0, 0, 1] - windows[:, -1, 0, 1]).min().item() > 0.1
        (torch.Size([3, 4, 1, 3]), True)
    """
    if count < 1 or frames < 1:
        raise InputError(f"count and frames must be >= 1, got {count} and {frames}")
    long = np.flatnonzero(clips.length >= frames)
    if not len(long):
        raise InputError(f"clips must have one of {frames} frames or more, got none")
    found: list[Tensor] = []
    kept = drawn = 0
    while kept < count:
        if drawn > 200 * count + 10_000:
            raise InputError(
                f"clips must move by {least} within {frames} frames often enough, got {kept} of {drawn}"
            )
        at_once = max(4 * count, 256)
        chosen = torch.randint(len(long), (at_once,), generator=generator).numpy()
        share = torch.rand(at_once, generator=generator, dtype=torch.float64).numpy()
        starts = clips.start[long[chosen]] + (share * (clips.length[long[chosen]] - frames + 1)).astype(
            np.int64
        )
        way = np.linalg.norm(clips.joints[starts + frames - 1] - clips.joints[starts], axis=-1)
        known = ~np.isnan(way)
        mean = np.where(known, way, 0).sum(1) / known.sum(1).clip(min=1)
        moving = starts[(mean >= least) & known.any(1)]
        found.append(torch.from_numpy(clips.joints[moving[:, None] + np.arange(frames)]))
        kept, drawn = kept + len(moving), drawn + len(starts)
    return torch.cat(found)[:count]


def draw_windows(
    windows: Float[Tensor, "count frames joints 3"],
    clips: MotionClips,
    size: int,
    *,
    extent: float,
    generator: torch.Generator | None = None,
) -> RenderedFigures:
    """Pictures of windows of motion, window by window; colours, texture, bar and camera are one for all frames of a window.

    Args:
        windows: positions in the unit of the clips.
        clips: whose skeleton the windows show.
        size: side of a picture in pixels, >= 1.
        extent: of that side in the unit of the clips.
        generator: of randomness.

    Raises:
        InputError: for a size or an extent out of range.

    Examples:
        >>> from coloss.data import Skeleton
        >>> clips = MotionClips.from_list([np.zeros((5, 2, 3))], Skeleton((-1, 0)), fps=15)
        >>> draw_windows(moving_windows(clips, 3, 2), clips, 16, extent=2.0).images.shape
        torch.Size([6, 3, 16, 16])
    """
    skeleton, frames = clips.skeleton, windows.shape[1]
    thick = [
        _HEAD if skeleton.names and "head" in skeleton.names[joint].lower() else _THICKNESS
        for joint, _ in skeleton.bones()
    ]
    parts = []
    for some in windows.split(_CHUNK):
        count = len(some)
        points, depth = orthographic_view(
            some, 2 * torch.pi * torch.rand(count, generator=generator), size, extent=extent
        )
        look = (
            side_colors(skeleton, count, generator),
            textured_background(count, size, generator),
            occluding_bars(count, size, generator, bars=1),
        )
        colors, background, bars = (part.repeat_interleave(frames, 0) for part in look)
        parts.append(
            render_figures(
                points.flatten(0, 1),
                skeleton,
                size,
                depth=depth.flatten(0, 1),
                radius=size * torch.tensor(thick),
                colors=colors,
                background=background,
                bars=bars,
            )
        )
    return RenderedFigures(*(torch.cat(column) for column in zip(*parts)))


def figure_frames(
    clips: MotionClips,
    count: int,
    *,
    size: int,
    extent: float,
    gap: int = 3,
    least: float = 0.08,
    generator: torch.Generator | None = None,
) -> FigureFrames:
    """Pairs of pictures some frames apart, and one of the recorded frames between them, drawn at random, as target.

    Args:
        clips: of recorded motion.
        count: pairs, >= 1.
        size: side of a picture in pixels.
        extent: of that side in the unit of the clips.
        gap: frames from the first picture to the last, >= 2.
        least: joints move by this share of the picture's side at least, in space, in the mean.
        generator: of randomness.

    Raises:
        InputError: for a value out of range, or clips that hardly move.

    Examples:
        >>> from coloss.data import Skeleton
        >>> path = np.linspace(0, 1, 40).reshape(40, 1, 1) * np.ones((1, 2, 1)) * [1.0, 0, 0]
        >>> path = path + np.array([[0.0, 0, 0], [0, 1, 0]])
        >>> clips = MotionClips.from_list([path], Skeleton((-1, 0)), fps=15)
        >>> frames = figure_frames(clips, 4, size=16, extent=2.0, gap=4, least=0.01)
        >>> frames.dataset.inputs[0].shape, set((frames.dataset.inputs[2] * 4).tolist()) <= {1.0, 2.0, 3.0}
        (torch.Size([4, 3, 16, 16]), True)
    """
    if gap < 2:
        raise InputError(f"gap must be >= 2, so that there is a frame between, got {gap}")
    windows = moving_windows(clips, count, gap + 1, least=least * extent, generator=generator)
    between = torch.randint(1, gap, (count,), generator=generator)
    # The first, the last and the one between are all that is drawn.
    order = torch.stack([torch.zeros_like(between), between, torch.full_like(between, gap)], 1)
    windows = windows.gather(1, order[..., None, None].expand(-1, -1, *windows.shape[2:]))
    drawn = draw_windows(windows, clips, size, extent=extent, generator=generator)
    images = drawn.images.unflatten(0, (count, 3))
    points = drawn.points.unflatten(0, (count, 3))
    return FigureFrames(
        IndexedDataset((images[:, 0], images[:, 2], between / gap), images[:, 1]),
        points[:, 1],
        drawn.visible.unflatten(0, (count, 3))[:, 1],
        drawn.masks.unflatten(0, (count, 3))[:, 1],
        float((points[:, 2] - points[:, 0]).norm(dim=-1).nanmean()),
    )


def still_figures(
    clips: MotionClips,
    count: int,
    *,
    size: int,
    extent: float,
    generator: torch.Generator | None = None,
) -> RenderedFigures:
    """Single pictures of recorded poses, for networks that find joints and masks.

    Examples:
        >>> from coloss.data import Skeleton
        >>> clips = MotionClips.from_list([np.zeros((5, 2, 3))], Skeleton((-1, 0)), fps=15)
        >>> still_figures(clips, 3, size=16, extent=2.0).masks.shape
        torch.Size([3, 16, 16])
    """
    windows = moving_windows(clips, count, 1, generator=generator)
    return draw_windows(windows, clips, size, extent=extent, generator=generator)
