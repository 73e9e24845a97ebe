"""Recorded motion: clips of joint positions of any length, their skeleton, labels and division."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.skeleton import COMMON, COMMON_JOINTS, Skeleton
from coloss.errors import InputError

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Values of `MotionClips.split`."""


@dataclass(frozen=True)
class MotionClips:
    """Clips of one skeleton, one after another in one array. A joint that was not seen is NaN.

    Args:
        joints: float32 (frames, joints, 3), positions; y points up and the axes are right-handed.
        start: int64 (clips), first frame of each.
        length: int64 (clips), frames of each, >= 1.
        skeleton: of all clips.
        fps: frames per second.
        units: "m" for metres; "screen" for pixels across and up with a depth of another unit, as MSR Action3D has; "torso" for multiples
            of the length from hips to neck.
        labels: int64 (clips) by name.
        label_names: what the numbers mean, by name; not every label has them.
        split: uint8 (clips), 0 train, 1 validation, 2 test.
        names: of the clips.
        source: name of the data set, or path.

    Raises:
        InputError: if sizes do not agree, or a clip reaches over the end.

    Examples:
        >>> clips = MotionClips.from_list(
        ...     [np.zeros((5, 2, 3)), np.ones((3, 2, 3))], Skeleton((-1, 0)), fps=15
        ... )
        >>> len(clips), clips.clip(1).shape, clips.resampled(4).shape
        (2, (3, 2, 3), torch.Size([2, 4, 2, 3]))
    """

    joints: NDArray[np.float32]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    skeleton: Skeleton
    fps: float
    units: str
    labels: Mapping[str, NDArray[np.int64]]
    label_names: Mapping[str, tuple[str, ...]]
    split: NDArray[np.uint8]
    names: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        count, frames = len(self.start), len(self.joints)
        if self.joints.ndim != 3 or self.joints.shape[1:] != (self.skeleton.num_joints, 3):
            raise InputError(
                f"joints must be (frames, {self.skeleton.num_joints}, 3) for this skeleton, got {self.joints.shape}"
            )
        sizes: dict[str, Any] = {
            "length": self.length,
            "split": self.split,
            "names": self.names,
            **self.labels,
        }
        for name, values in sizes.items():
            if len(values) != count:
                raise InputError(f"{name} must have a value for each of {count} clips, got {len(values)}")
        if count and (
            self.length.min() < 1 or self.start.min() < 0 or (self.start + self.length).max() > frames
        ):
            raise InputError(
                f"each clip must hold frames in [0, {frames}) and at least one, as start and length say"
            )
        if not self.fps > 0:
            raise InputError(f"fps must be > 0, got {self.fps}")

    @classmethod
    def from_list(
        cls,
        clips: list[NDArray[Any]],
        skeleton: Skeleton,
        fps: float,
        *,
        units: str = "m",
        labels: Mapping[str, Any] | None = None,
        label_names: Mapping[str, tuple[str, ...]] | None = None,
        split: Any = None,
        names: Any = None,
        source: str = "",
    ) -> "MotionClips":
        """Clips from arrays (frames, joints, 3); all train, and numbered, unless `split` and `names` say otherwise.

        Raises:
            InputError: if there are none, or sizes do not agree.
        """
        if not clips:
            raise InputError("clips must hold at least one, got none")
        length = np.array([len(clip) for clip in clips], np.int64)
        return cls(
            np.concatenate([np.asarray(clip, np.float32) for clip in clips]),
            np.cumsum(length) - length,
            length,
            skeleton,
            float(fps),
            units,
            {name: np.asarray(values, np.int64) for name, values in (labels or {}).items()},
            dict(label_names or {}),
            np.zeros(len(clips), np.uint8) if split is None else np.asarray(split, np.uint8),
            tuple(str(name) for name in (range(len(clips)) if names is None else names)),
            source,
        )

    def __len__(self) -> int:
        return len(self.start)

    def clip(self, index: int) -> NDArray[np.float32]:
        """Positions (frames, joints, 3) of a clip, sharing memory with `joints`."""
        return self.joints[self.start[index] : self.start[index] + self.length[index]]

    def select(self, chosen: Any) -> "MotionClips":
        """Some of the clips, by a mask or by numbers; the frames are shared."""
        picked = np.arange(len(self))[np.asarray(chosen)]
        return replace(
            self,
            start=self.start[picked],
            length=self.length[picked],
            labels={name: values[picked] for name, values in self.labels.items()},
            split=self.split[picked],
            names=tuple(self.names[index] for index in picked),
        )

    def part(self, split: int) -> "MotionClips":
        """The clips of one part: 0 train, 1 validation, 2 test."""
        return self.select(self.split == split)

    def resampled(self, frames: int, *, centre: float = 1.0) -> Float[Tensor, "clips frames joints 3"]:
        """Every clip brought to the same number of frames, by linear interpolation in time; joints not seen are filled in the same way.

        Before the first and after the last sight of a joint its nearest position stands; one that is never seen stays NaN.

        Args:
            frames: of the result, >= 1.
            centre: share of each clip that is kept, about its middle, in (0, 1].

        Raises:
            InputError: for a number of frames or a share out of range.

        Examples:
            >>> clips = MotionClips.from_list(
            ...     [np.arange(3.0).repeat(3).reshape(3, 1, 3)], Skeleton((-1,)), fps=1
            ... )
            >>> clips.resampled(5)[0, :, 0, 0]
            tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000])
        """
        if frames < 1:
            raise InputError(f"frames must be >= 1, got {frames}")
        if not 0 < centre <= 1:
            raise InputError(f"centre must be in (0, 1], got {centre}")
        out = np.empty((len(self), frames, self.skeleton.num_joints, 3), np.float32)
        for index in range(len(self)):
            clip = filled(self.clip(index))
            last = len(clip) - 1
            margin = last * (1 - centre) / 2
            at = np.linspace(margin, last - margin, frames) if frames > 1 else np.array([last / 2])
            below = np.minimum(at.astype(np.int64), max(last - 1, 0))
            above = np.minimum(below + 1, last)
            share = (at - below)[:, None, None].astype(np.float32)
            out[index] = clip[below] * (1 - share) + clip[above] * share
        return torch.from_numpy(out)


def filled(clip: NDArray[np.float32]) -> NDArray[np.float32]:
    """A clip whose unseen joints (NaN) are interpolated in time; the same array where there are none.

    Args:
        clip: (frames, joints, 3). A joint that is never seen stays NaN.

    Examples:
        >>> filled(np.array([0, np.nan, 2], np.float32).reshape(3, 1, 1))[:, 0, 0]
        array([0., 1., 2.], dtype=float32)
    """
    missing = np.isnan(clip)
    if not missing.any():
        return clip
    columns = clip.reshape(len(clip), -1).copy()
    times = np.arange(len(clip))
    for column in np.flatnonzero(missing.reshape(len(clip), -1).any(0)):
        seen = ~np.isnan(columns[:, column])
        if seen.any():
            columns[:, column] = np.interp(times, times[seen], columns[seen, column])
    return columns.reshape(clip.shape)


def held_out_pairs(
    clips: MotionClips, first: str = "action", second: str = "style", held: Any = None
) -> NDArray[np.bool_]:
    """Which clips belong to held-out pairs of two labels, so that a test asks for combinations nobody trained on.

    Args:
        clips: with both labels.
        first: name of a label.
        second: name of another.
        held: pairs of numbers; by default, of the k-th first label and the seven most frequent second labels, those with second label
            number (2k + j) mod 7, j = 0, 1, where both occur in the larger part of Bandai's set: 20 of its 70 pairs.

    Returns:
        bool (clips).

    Raises:
        InputError: if a label is not there.

    Examples:
        >>> clips = MotionClips.from_list(
        ...     [np.zeros((2, 1, 3))] * 2, Skeleton((-1,)), 15, labels={"action": [0, 0], "style": [0, 1]}
        ... )
        >>> held_out_pairs(clips, held=[(0, 1)])
        array([False,  True])
    """
    for name in (first, second):
        if name not in clips.labels:
            raise InputError(f"clips must have a label {name!r}, got {', '.join(clips.labels) or 'none'}")
    one, other = clips.labels[first], clips.labels[second]
    if held is None:
        dense = clips.labels["part"] == 2 if "part" in clips.labels else np.ones(len(clips), bool)
        firsts, seconds = np.unique(one[dense]), np.unique(other[dense])
        held = [(firsts[k], seconds[(2 * k + j) % len(seconds)]) for k in range(len(firsts)) for j in (0, 1)]
    width = max(int(other.max(initial=0)), *(int(pair[1]) for pair in held), 0) + 1 if len(held) else 1
    keys = [int(pair[0]) * width + int(pair[1]) for pair in held]
    return np.isin(one * width + other, keys)


def common_layout(clips: MotionClips) -> MotionClips:
    """Clips of different bodies in fifteen joints that all of them have, in one unit: the length from hips to neck.

    Each clip is scaled by its own median length. The depth of screen units, which is another unit than pixels, is first brought to the spread
    across about the hips, that of the clips given: an assumption about bodies, no calibration. Clips that share frames get frames of their own.

    Args:
        clips: of `bandai`, `hdm05` or `msr-action3d`.

    Returns:
        Clips of the skeleton `coloss.data.skeleton.COMMON`, in units "torso".

    Raises:
        InputError: for another source, or a clip of which hips and neck are never seen apart.

    Examples:
        >>> from coloss.data import load_motion
        >>> common_layout(load_motion("hdm05")).skeleton.num_joints  # doctest: +SKIP
        15
    """
    if clips.source not in COMMON_JOINTS:
        raise InputError(
            f"clips must come from {', '.join(COMMON_JOINTS)} to be brought to the common layout, got {clips.source or 'clips of your own'!r}"
        )
    kept = list(COMMON_JOINTS[clips.source])
    hip, other_hip, neck = (COMMON.joint(name) for name in ("left_hip", "right_hip", "neck"))
    own = [clips.clip(index)[:, kept] for index in range(len(clips))]
    joints = np.concatenate(own) if own else clips.joints[:0, kept]
    start = np.cumsum(clips.length) - clips.length
    hips = joints[:, [hip, other_hip]].mean(1)
    if clips.units == "screen" and len(joints):
        spread = np.nanstd(joints - hips[:, None], axis=(0, 1)).clip(1e-8)
        joints[..., 2] *= spread[0] / spread[2]
        hips = joints[:, [hip, other_hip]].mean(1)
    torso = np.linalg.norm(joints[:, neck] - hips, axis=-1)
    for name, begin, count in zip(clips.names, start, clips.length):
        seen = torso[begin : begin + count]
        seen = seen[~np.isnan(seen)]
        median = np.median(seen) if len(seen) else np.float32(0)
        if not median > 0:
            raise InputError(
                f"clip {name!r} must show hips and neck apart to be measured by the length between them"
            )
        joints[begin : begin + count] /= median
    return replace(clips, joints=joints, start=start, skeleton=COMMON, units="torso")
