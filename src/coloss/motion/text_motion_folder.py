"""A folder in the format of HumanML3D: feature files, sentences with their stretch of the clip, and lists of train, validation and test."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from coloss.data import Skeleton
from coloss.data.formats import read_text
from coloss.data.image_text import words_of
from coloss.errors import InputError
from coloss.motion.motion_representation import FeatureNormalizer

HUMANML3D = Skeleton(
    (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19),
    (
        *("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2"),
        *("left_ankle", "right_ankle", "spine3", "left_foot", "right_foot", "neck"),
        *("left_collar", "right_collar", "head", "left_shoulder", "right_shoulder"),
        *("left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    ),
    (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20),
    {
        "trunk": (0, 3, 6, 9, 12, 15),
        "left_arm": (13, 16, 18, 20),
        "right_arm": (14, 17, 19, 21),
        "left_leg": (1, 4, 7, 10),
        "right_leg": (2, 5, 8, 11),
    },
    feet=(7, 10, 8, 11),
    face=(2, 1, 17, 16),
)
"""The 22 joints of HumanML3D's files of 263 numbers."""

KIT = Skeleton(
    (-1, 0, 1, 2, 3, 3, 5, 6, 3, 8, 9, 0, 11, 12, 13, 14, 0, 16, 17, 18, 19),
    (
        *("pelvis", "spine", "chest", "neck", "head"),
        *("right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
        *("right_hip", "right_knee", "right_ankle", "right_foot", "right_toe"),
        *("left_hip", "left_knee", "left_ankle", "left_foot", "left_toe"),
    ),
    (0, 1, 2, 3, 4, 8, 9, 10, 5, 6, 7, *range(16, 21), *range(11, 16)),
    {
        "trunk": (0, 1, 2, 3, 4),
        "left_arm": (8, 9, 10),
        "right_arm": (5, 6, 7),
        "left_leg": (16, 17, 18, 19, 20),
        "right_leg": (11, 12, 13, 14, 15),
    },
    feet=(19, 20, 14, 15),
    face=(11, 16, 5, 8),
)
"""The 21 joints of the KIT files of 251 numbers, which are in millimetres."""

_RIGHT, _UP, _DOWN, _AHEAD, _LEFT = (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (1, 0, 0)

_HUMANML3D_REST = (
    *(
        (0, 0, 0),
        _LEFT,
        _RIGHT,
        _UP,
        _DOWN,
        _DOWN,
        _UP,
        _DOWN,
        _DOWN,
        _UP,
        _AHEAD,
        _AHEAD,
        _UP,
        _LEFT,
        _RIGHT,
        _AHEAD,
    ),
    *[_DOWN] * 6,
)
_KIT_REST = (
    *((0, 0, 0), _UP, _UP, _UP, _UP, _LEFT, _DOWN, _DOWN, _RIGHT, _DOWN, _DOWN),
    *(_LEFT, _DOWN, _DOWN, _AHEAD, _AHEAD, _RIGHT, _DOWN, _DOWN, _AHEAD, _AHEAD),
)

_PUBLISHED = {263: (HUMANML3D, 20.0, 40), 251: (KIT, 12.5, 24)}
"""Skeleton, frames per second and shortest clip by the numbers of a frame."""

_LISTS = {"train.txt": 0, "val.txt": 1, "test.txt": 2}


@dataclass(frozen=True)
class TextMotionFolder:
    """What `read_text_motion_folder` found; the fields are those of `TextMotion`, frames not yet cut to whole tokens.

    Examples:
        >>> read_text_motion_folder("my-motions").names  # doctest: +SKIP
        ('000000', '000001')
    """

    features: tuple[NDArray[np.float32], ...]
    captions: tuple[tuple[str, ...], ...]
    first_words: tuple[tuple[str, ...], ...]
    parts: tuple[int, ...]
    names: tuple[str, ...]
    num_joints: int
    rotations: bool
    skeleton: Skeleton | None
    fps: float
    normalizer: FeatureNormalizer | None
    skipped: tuple[str, ...]


def read_text_motion_folder(
    folder: str | Path,
    *,
    min_frames: int | None = None,
    max_frames: int = 199,
    fps: float | None = None,
    skeleton: Skeleton | None = None,
    limit: int | None = None,
) -> TextMotionFolder:
    """Reads every clip that the lists name; a stretch of a clip with sentences of its own becomes a clip `NAME:from-to`.

    Args:
        folder: see `load_text_motion`.
        min_frames: shorter clips are left out.
        max_frames: longer clips are left out.
        fps: frames per second, > 0.
        skeleton: of the clips.
        limit: at most so many names of each list, evenly spaced.

    Raises:
        InputError: if there is no such folder, no `train.txt`, no clip that can be read, a text line that cannot be read, or sizes that do
            not fit one another.

    Examples:
        >>> read_text_motion_folder("nowhere")
        Traceback (most recent call last):
        coloss.errors.InputError: nowhere holds no motion with texts: new_joint_vecs is missing
    """
    folder = Path(folder)
    for name in ("new_joint_vecs", "texts", "train.txt"):
        if not (folder / name).exists():
            raise InputError(f"{folder} holds no motion with texts: {name} is missing")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    listed = {
        str(name): part
        for file, part in _LISTS.items()
        if (folder / file).exists()
        for name in evenly(np.array(read_text(folder / file).split(), np.str_), limit)
    }
    clips: list[tuple[str, int, NDArray[np.float32], tuple[str, ...]]] = []
    skipped: list[str] = []
    numbers: int | None = None
    for name, part in listed.items():
        try:
            clip = _read_clip(folder / "new_joint_vecs" / f"{name}.npy", numbers)
        except InputError as error:
            skipped.append(f"{name}: {error}")
            continue
        numbers = clip.shape[1]
        rate = _rate(numbers, fps)
        least = min_frames if min_frames is not None else _PUBLISHED.get(numbers, (None, 0.0, 40))[2]
        texts = folder / "texts" / f"{name}.txt"
        if not texts.exists():
            skipped.append(f"{name}: {texts.name} is missing")
            continue
        for start, stop, sentences in _read_sentences(texts):
            called = name if stop == 0 else f"{name}:{start:g}-{stop:g}"
            stretch = clip if stop == 0 else clip[int(start * rate) : int(stop * rate)]
            if not least <= len(stretch) <= max_frames:
                skipped.append(f"{called}: {len(stretch)} frames, not in [{least}, {max_frames}]")
                continue
            clips.append((called, part, stretch, sentences))
    if numbers is None or not clips:
        raise InputError(f"{folder} holds no clip that can be used" + (f" ({skipped[0]})" if skipped else ""))
    num_joints, rotations, skeleton = _layout(numbers, skeleton)
    return TextMotionFolder(
        features=tuple(clip for _, _, clip, _ in clips),
        captions=tuple(sentences for _, _, _, sentences in clips),
        first_words=tuple(tuple(words_of(sentences[0])) for _, _, _, sentences in clips),
        parts=tuple(part for _, part, _, _ in clips),
        names=tuple(name for name, _, _, _ in clips),
        num_joints=num_joints,
        rotations=rotations,
        skeleton=skeleton,
        fps=_rate(numbers, fps),
        normalizer=_read_normalizer(folder, numbers),
        skipped=tuple(skipped),
    )


def published_rest(skeleton: Skeleton) -> Float[Tensor, "joints 3"]:
    """Direction of each bone in the pose of no rotation, of the two skeletons whose files are published with rotations.

    Raises:
        InputError: for any other skeleton: `rest_directions` finds directions for it, which its files must have been made with.

    Examples:
        >>> published_rest(HUMANML3D)[1]
        tensor([1., 0., 0.])
    """
    for known, rest in ((HUMANML3D, _HUMANML3D_REST), (KIT, _KIT_REST)):
        if skeleton.parents == known.parents:
            return torch.tensor(rest, dtype=torch.float32)
    raise InputError(
        "rotations of a skeleton other than HumanML3D's and KIT's need the directions its files were made with"
    )


def evenly(values: NDArray, limit: int | None) -> NDArray:
    """At most so many of some values, evenly spaced, the first and the last among them.

    Examples:
        >>> evenly(np.arange(10), 4)
        array([0, 3, 6, 9])
    """
    if limit is None or len(values) <= limit:
        return values
    return values[np.linspace(0, len(values) - 1, limit).round().astype(np.int64)]


def _layout(numbers: int, skeleton: Skeleton | None) -> tuple[int, bool, Skeleton | None]:
    """Joints and whether there are rotations: 12 J - 1 numbers with them, 6 J + 5 without."""
    if skeleton is None and numbers in _PUBLISHED:
        skeleton = _PUBLISHED[numbers][0]
    if skeleton is not None:
        joints = skeleton.num_joints
        if numbers not in (12 * joints - 1, 6 * joints + 5):
            raise InputError(
                f"clips must have {12 * joints - 1} or {6 * joints + 5} numbers a frame for a skeleton of {joints} joints, got {numbers}"
            )
        return joints, numbers == 12 * joints - 1, skeleton
    if (numbers + 1) % 12 == 0:
        return (numbers + 1) // 12, True, None
    if numbers > 11 and (numbers - 5) % 6 == 0:
        return (numbers - 5) // 6, False, None
    raise InputError(f"clips must have 12 J - 1 or 6 J + 5 numbers a frame for J joints, got {numbers}")


def _rate(numbers: int, fps: float | None) -> float:
    if fps is not None:
        if not fps > 0:
            raise InputError(f"fps must be > 0, got {fps}")
        return float(fps)
    if numbers not in _PUBLISHED:
        raise InputError(f"fps must be given for clips with {numbers} numbers a frame")
    return _PUBLISHED[numbers][1]


def _read_clip(path: Path, numbers: int | None) -> NDArray[np.float32]:
    """One clip's features; raises InputError, whose text becomes the reason why it is left out."""
    try:
        clip = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read") from error
    if clip.ndim != 2 or (numbers is not None and clip.shape[1] != numbers):
        wanted = "(frames, numbers)" if numbers is None else f"(frames, {numbers})"
        raise InputError(f"{path.name} must be {wanted}, got {clip.shape}")
    if not np.isfinite(clip).all():
        frame = int(np.flatnonzero(~np.isfinite(clip).all(1))[0])
        raise InputError(f"{path.name} holds NaN or infinity, first in frame {frame}")
    return clip.astype(np.float32)


def _read_sentences(path: Path) -> list[tuple[float, float, tuple[str, ...]]]:
    """Stretches in seconds (0, 0: the whole clip) with their sentences."""
    found: dict[tuple[float, float], list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        fields = line.strip().split("#")
        try:
            start, stop = (0.0 if math.isnan(float(field)) else float(field) for field in fields[-2:])
            if len(fields) != 4 or not words_of(fields[0]) or not 0 <= start <= stop:
                raise ValueError
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: must be sentence#tokens#from#to, got {line!r}"
            ) from error
        found.setdefault((start, stop) if stop > start else (0.0, 0.0), []).append(fields[0].strip())
    return [(start, stop, tuple(sentences)) for (start, stop), sentences in found.items()]


def _read_normalizer(folder: Path, numbers: int) -> FeatureNormalizer | None:
    if not (folder / "Mean.npy").exists() or not (folder / "Std.npy").exists():
        return None
    arrays = []
    for name in ("Mean.npy", "Std.npy"):
        try:
            arrays.append(np.load(folder / name, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / name} cannot be read ({error})") from error
        if arrays[-1].shape != (numbers,) or not np.isfinite(arrays[-1]).all():
            raise InputError(f"{folder / name} must hold {numbers} finite numbers, got {arrays[-1].shape}")
    try:
        return FeatureNormalizer(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))
    except ValueError as error:
        raise InputError(f"{folder / 'Std.npy'}: {error}") from error
