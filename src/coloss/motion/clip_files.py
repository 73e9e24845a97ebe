"""Clips from files that people have: `.npz`, `.bvh`, a folder of such, or a data set by name, at one frame rate."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coloss.data import MotionClips, Skeleton, load_motion
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion.bvh import read_bvh

_SUFFIXES = (".npz", ".bvh")


def read_clips(source: str | Path, skeleton: Skeleton, fps: float, *, scale: float = 1.0) -> MotionClips:
    """All clips of a file, a folder or a data set, as clips of one skeleton and frame rate.

    A clip is named by its file; where a file holds several, with its own name behind a colon. Joints of a `.bvh` file are matched by their names.

    Args:
        source: path of a file, of a folder (its `.npz` and `.bvh` files, in the order of their names), or the name of a motion data set.
        skeleton: what the clips must be of.
        fps: frames per second of the result, by linear interpolation.
        scale: what positions are multiplied by, > 0: 0.01 makes metres of the centimetres that most `.bvh` files hold.

    Raises:
        InputError: for a scale not > 0, if there is nothing to read, or a file does not hold clips of this skeleton; the message names the file.

    Examples:
        >>> read_clips("nowhere", Skeleton((-1, 0)), fps=20)
        Traceback (most recent call last):
        coloss.errors.InputError: nowhere is not there
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"scale must be > 0, got {scale}")
    path = Path(source).expanduser()
    if str(source) in SKELETONS:
        found = [_matched(load_motion(str(source)), skeleton, str(source), alone=True)]
    else:
        if not path.exists():
            raise InputError(f"{path} is not there")
        files = (
            sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
        )
        if not files:
            raise InputError(f"{path} holds no clips: no file that ends in {' or '.join(_SUFFIXES)}")
        found = [_read(file, skeleton) for file in files]
    clips, names = [], []
    for part in found:
        for index in range(len(part)):
            clips.append(at_rate(part.clip(index), part.fps, fps) * np.float32(scale))
            names.append(part.names[index])
    return MotionClips.from_list(clips, skeleton, fps, names=names, source=str(source))


def _read(file: Path, skeleton: Skeleton) -> MotionClips:
    if file.suffix == ".npz":
        return _matched(load_motion(file), skeleton, file.stem)
    if file.suffix != ".bvh":
        raise InputError(f"{file} must end in {' or '.join(_SUFFIXES)}")
    motion = read_bvh(file)
    joints, names = motion.joints, motion.skeleton.names
    if skeleton.names and set(skeleton.names) <= set(names):
        kept = [names.index(name) for name in skeleton.names]
        joints, motion = joints[:, kept], replace(motion, skeleton=motion.skeleton.subset(kept))
    clips = MotionClips.from_list([joints], motion.skeleton, motion.fps, source=str(file))
    return _matched(clips, skeleton, file.stem)


def _matched(clips: MotionClips, skeleton: Skeleton, name: str, *, alone: bool = False) -> MotionClips:
    if clips.skeleton.parents != skeleton.parents:
        raise InputError(
            f"{clips.source or name}: clips must be of the model's skeleton with {skeleton.num_joints} joints, "
            f"got one of {clips.skeleton.num_joints}"
            + (" with other parents" if clips.skeleton.num_joints == skeleton.num_joints else "")
        )
    names = (
        clips.names if alone else (name,) if len(clips) == 1 else [f"{name}:{each}" for each in clips.names]
    )
    return replace(clips, names=tuple(names))


def at_rate(clip: NDArray[np.floating], have: float, want: float) -> NDArray[np.float32]:
    """A clip with another number of frames per second, by linear interpolation; what does not fill a step at the end is left out.

    Args:
        clip: (frames, joints, 3), at least one frame.
        have: its frames per second.
        want: those of the result.

    Examples:
        >>> at_rate(np.arange(4.0).reshape(4, 1, 1), 30, 20)[:, 0, 0]
        array([0. , 1.5, 3. ], dtype=float32)
    """
    clip = clip.astype(np.float32)
    if have == want:
        return clip
    at = np.arange(int((len(clip) - 1) * want / have + 1e-6) + 1) * have / want
    below = np.minimum(at.astype(np.int64), max(len(clip) - 2, 0))
    above = np.minimum(below + 1, len(clip) - 1)
    share = (at - below).astype(np.float32)[:, None, None]
    return clip[below] * (1 - share) + clip[above] * share
