"""Recorded motion: clips of joint positions of any length, their skeleton, labels and division."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.catalog import dataset_info, locate
from coloss.data.formats import read_arrays
from coloss.data.skeleton import COMMON, COMMON_JOINTS, SKELETONS, Skeleton
from coloss.errors import InputError

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Values of `MotionClips.split`."""

_LABELS = {
    "bandai": ("action", "style", "part"),
    "hdm05": ("action", "actor"),
    "msr-action3d": ("action", "subject", "trial"),
    "sfinge-hands": ("gesture", "take"),
}


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


def load_motion(source: str | Path) -> MotionClips:
    """Clips of a data set by name, or of an `.npz` file of one's own.

    - `bandai`: metres; labels `action`, `style`, `part`.
    - `hdm05`: metres; labels `action`, `actor`; train and test actors differ.
    - `msr-action3d`: screen units, brought to the axes of the others (x to the person's left, y up, z towards the camera); labels
      `action`, `subject`, `trial`; train and test subjects differ. Frames without a skeleton are NaN, the one clip that has no other is
      left out.
    - `sfinge-hands`: metres; labels `gesture`, `take`.

    A file holds `joints` (frames, joints, 3), `parents` (joints), `fps`, and `start`, `length` (clips), where there is more than one clip;
    optionally `joint_names`, `mirror`, `units`, `split` (0, 1, 2), `names`, and for each label NAME whole numbers (clips) and their
    `NAME_names`. `save_motion` writes it.

    Args:
        source: a name, or a path.

    Raises:
        UnknownNameError: if it is neither; close names are proposed.
        DataNotFoundError: if the file is not there.
        InputError: if it does not hold motion.

    Examples:
        >>> clips = load_motion("msr-action3d")  # doctest: +SKIP
        >>> len(clips), clips.skeleton.num_joints  # doctest: +SKIP
        (566, 20)
    """
    text = str(source)
    if text not in SKELETONS:
        if isinstance(source, Path) or text.endswith(".npz") or "/" in text:
            return _own(Path(source).expanduser())
        info = dataset_info(text)
        raise InputError(
            f"data set {text!r} ({info.kind}) holds no motion: choose one of {', '.join(SKELETONS)}"
        )
    arrays = read_arrays(locate(text))
    joints = arrays["joints_mm" if text == "bandai" else "joints"].astype(np.float32)
    if text == "bandai":
        joints /= np.float32(1000)
    if text == "msr-action3d":
        unseen = ~joints.any((1, 2))
        joints = -joints
        joints[unseen] = np.nan
    labels = {name: arrays[name].astype(np.int64) for name in _LABELS[text]}
    count = len(arrays["start"])
    clips = MotionClips(
        joints,
        arrays["start"],
        arrays["length"].astype(np.int64),
        SKELETONS[text],
        {"sfinge-hands": 20.0}.get(text, 15.0),
        "screen" if text == "msr-action3d" else "m",
        labels,
        {
            name: tuple(str(value) for value in arrays[f"{name}_names"])
            for name in labels
            if f"{name}_names" in arrays
        },
        arrays["split"],
        tuple(str(name) for name in arrays["clip"]) if "clip" in arrays else tuple(map(str, range(count))),
        text,
    )
    return clips.select([index for index in range(count) if not np.isnan(clips.clip(index)).all()])


def save_motion(path: str | Path, clips: MotionClips) -> None:
    """Write clips to an `.npz` file that `load_motion` reads again.

    Args:
        path: ends in `.npz`.
        clips: any.

    Raises:
        InputError: for another ending, or if it cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "wave.npz"
        >>> save_motion(
        ...     path, MotionClips.from_list([np.zeros((4, 2, 3))], Skeleton((-1, 0)), fps=20, names=["wave"])
        ... )
        >>> load_motion(path).names
        ('wave',)
    """
    target = Path(path)
    if target.suffix != ".npz":
        raise InputError(f"path must end in .npz, got {target.name!r}")
    skeleton = clips.skeleton
    arrays: dict[str, Any] = {
        "joints": np.concatenate([clips.clip(index) for index in range(len(clips))])
        if len(clips)
        else clips.joints[:0],
        "start": np.cumsum(clips.length) - clips.length,
        "length": clips.length,
        "parents": np.array(skeleton.parents),
        "fps": np.array(clips.fps),
        "units": np.array(clips.units),
        "split": clips.split,
        "names": np.array(clips.names, dtype=np.str_),
    }
    if skeleton.names:
        arrays["joint_names"] = np.array(skeleton.names, dtype=np.str_)
    if skeleton.mirror is not None:
        arrays["mirror"] = np.array(skeleton.mirror)
    for name, joints in (("feet", skeleton.feet), ("face", skeleton.face)):
        if joints is not None:
            arrays[name] = np.array(joints)
    for name, part in skeleton.parts.items():
        arrays[f"part_{name}"] = np.array(part)
    for name, values in clips.labels.items():
        arrays[name] = values
        if name in clips.label_names:
            arrays[f"{name}_names"] = np.array(clips.label_names[name], dtype=np.str_)
    try:
        with target.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


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

    Each clip is scaled by its own median length; screen units, whose depth is another unit than the rest, are first brought to equal spread
    along the three axes, that of the clips given. Clips that share frames get frames of their own.

    Args:
        clips: of `bandai`, `hdm05` or `msr-action3d`.

    Returns:
        Clips of the skeleton `coloss.data.skeleton.COMMON`, in units "torso".

    Raises:
        InputError: for another source, or a clip of which hips and neck are never seen apart.
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
        spread = np.nanstd(joints - hips[:, None], axis=(0, 1))
        joints *= np.float32(spread[1]) / spread.astype(np.float32)
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


def _own(path: Path) -> MotionClips:
    arrays = read_arrays(path)
    for field in ("joints", "parents", "fps"):
        if field not in arrays:
            raise InputError(
                f"{path} holds no motion: {field!r} is missing, it has {', '.join(sorted(arrays))}"
            )
    joints = arrays["joints"]
    if joints.ndim != 3 or joints.shape[-1] != 3:
        raise InputError(f"{path}: joints must be (frames, joints, 3), got {joints.shape}")
    start = arrays.get("start", np.zeros(1, np.int64)).astype(np.int64)
    length = arrays.get("length", np.array([len(joints)])).astype(np.int64)
    known = {
        "joints",
        "parents",
        "fps",
        "start",
        "length",
        "joint_names",
        "mirror",
        "units",
        "split",
        "names",
    }
    labels = {
        name: values.astype(np.int64)
        for name, values in arrays.items()
        if name not in known
        and values.shape == start.shape
        and values.dtype.kind in "iu"
        and not name.startswith("part_")
        and name not in ("feet", "face")
    }
    try:
        skeleton = Skeleton(
            tuple(int(parent) for parent in arrays["parents"]),
            tuple(str(name) for name in arrays["joint_names"]) if "joint_names" in arrays else (),
            tuple(int(joint) for joint in arrays["mirror"]) if "mirror" in arrays else None,
            {
                name.removeprefix("part_"): tuple(int(joint) for joint in values)
                for name, values in arrays.items()
                if name.startswith("part_")
            },
            feet=_four(arrays.get("feet")),
            face=_four(arrays.get("face")),
        )
        return MotionClips(
            joints.astype(np.float32),
            start,
            length,
            skeleton,
            float(arrays["fps"]),
            str(arrays.get("units", "m")),
            labels,
            {
                name: tuple(str(value) for value in arrays[f"{name}_names"])
                for name in labels
                if f"{name}_names" in arrays
            },
            arrays.get("split", np.zeros(len(start), np.uint8)).astype(np.uint8),
            tuple(str(name) for name in arrays.get("names", np.arange(len(start)))),
            str(path),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _four(joints: Any) -> tuple[int, int, int, int] | None:
    if joints is None or len(joints) != 4:
        return None
    first, second, third, fourth = (int(joint) for joint in joints)
    return first, second, third, fourth
