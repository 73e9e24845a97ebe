"""Clips of motion, ready for a recogniser: a fixed number of frames, divided so that the test asks for what was never seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.dataset import IndexedDataset, Splits, Standardization
from coloss.data.formats import read_arrays
from coloss.data.motion_clips import TEST, TRAIN, VALIDATION, MotionClips, held_out_pairs
from coloss.data.motion_files import load_motion
from coloss.data.skeleton import Skeleton
from coloss.errors import InputError

PERSONS = ("subject", "actor", "person", "recording")
"""Labels by which a validation part is cut from the training part, the first that there is: nobody is in both."""


@dataclass
class MotionSplits(Splits):
    """`Splits` of clips, (channels, frames, joints, persons) each, that know their skeleton.

    Attributes:
        skeleton: of all clips.
        fps: frames per second of the recordings; clips are brought to one number of frames, so theirs differ.
    """

    skeleton: Skeleton = field(default_factory=lambda: Skeleton((-1,)))
    fps: float = 0.0


def motion_splits(
    source: str | Path | MotionClips,
    *,
    label: str | None = None,
    frames: int = 32,
    seed: int = 0,
    limit: int | None = None,
) -> MotionSplits:
    """Train, validation and test clips of one skeleton, with one of their labels as the class.

    Each clip keeps its middle 95 %, is interpolated to `frames` frames, moved so that the root begins at the origin, and divided by the
    spread of the training part (one number; for screen units one for each axis).

    - `bandai`, whatever the label: the larger part of the set, 10 actions in 7 styles; the test holds 20 of the 70 (action, style) pairs
      (`held_out_pairs`), the validation part 10 others drawn by seed. A random division would be solved by the nearest neighbour of raw
      coordinates. (Only for the label `part` are clips of both parts taken.)
    - `msr-action3d`, `hdm05`: test persons are others, as in the literature; one training person, drawn by seed, validates.
    - `sfinge-hands`: test takes as stored; a fifth of the training takes, drawn by seed, validates. One person may be in both.
    - Clips of your own: the parts that they name. A missing part is cut by person where a label other than the class names enough of them
      (subject, actor, person, recording), else by clip, evenly over the classes; the description says which.

    Args:
        source: as `load_motion` takes it, or clips.
        label: the class; the first one that the source has by default.
        frames: of every clip, >= 1.
        seed: of what is drawn.
        limit: clips in each part at most, drawn by seed. As many classes as that allows are trained on; the other parts hold clips of
            these alone, where they have any.

    Raises:
        InputError: if there is no such label, a part would be empty, a joint is never seen in a clip, or no clip of a test class was ever
            trained on.

    Examples:
        >>> clips = MotionClips.from_list(
        ...     [np.random.rand(9, 2, 3)] * 12, Skeleton((-1, 0)), 15, labels={"action": [0, 1] * 6}
        ... )
        >>> splits = motion_splits(clips, frames=8)
        >>> splits.input_shape, len(splits.train), len(splits.validation), len(splits.test)
        ((3, 8, 2, 1), 8, 2, 2)
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    if frames < 1:
        raise InputError(f"frames must be >= 1, got {frames}")
    clips = source if isinstance(source, MotionClips) else load_motion(source)
    name = clips.source or "motion"
    if label is None and not clips.labels:
        raise InputError(f"{name} has no labels: a class for each clip is needed")
    chosen = next(iter(clips.labels)) if label is None else label
    if chosen not in clips.labels:
        raise InputError(f"{name} has no label {chosen!r}, it has {', '.join(clips.labels) or 'none'}")
    random = np.random.default_rng([seed, 71])
    parts, description = _parts(clips, chosen, random)
    classes = np.unique(np.concatenate([clips.labels[chosen][part] for part in parts]))
    unseen = np.setdiff1d(clips.labels[chosen][parts[TEST]], clips.labels[chosen][parts[TRAIN]])
    if len(unseen):
        raise InputError(f"{name}: class {int(unseen[0])} of {chosen} is tested but has no training clip")
    data = parts if limit is None else _limited(parts, clips.labels[chosen], limit, random)
    for part_name, rows in zip(("train", "validation", "test"), data):
        if not len(rows):
            raise InputError(f"{name} has no clips for {part_name}: give at least 3 clips of each class")
    inputs = [_inputs(clips.select(rows), frames) for rows in data]
    axes = (0, 2, 3, 4) if clips.units == "screen" else (0, 1, 2, 3, 4)
    scale = inputs[TRAIN].std(axes, keepdim=True)[0].clamp_min(1e-8)
    number = {int(value): index for index, value in enumerate(classes)}
    train, validation, test = (
        IndexedDataset(
            part / scale,
            torch.tensor([number[int(value)] for value in clips.labels[chosen][rows]]),
            torch.from_numpy(rows),
        )
        for part, rows in zip(inputs, data)
    )
    names = clips.label_names.get(chosen)
    return MotionSplits(
        name,
        "classification",
        train,
        validation,
        test,
        input_shape=tuple(inputs[TRAIN].shape[1:]),
        num_classes=len(classes),
        class_names=tuple(names[int(value)] if names else str(value) for value in classes),
        standardize=Standardization(torch.zeros(()), scale),
        description=f"{len(data[0])} / {len(data[1])} / {len(data[2])} clips of {frames} frames; {description}",
        skeleton=clips.skeleton,
        fps=clips.fps,
    )


def holds_motion(path: str | Path) -> bool:
    """Whether a file is an `.npz` of clips, as `load_motion` reads it.

    Examples:
        >>> holds_motion("nowhere.npz")
        False
    """
    found = Path(path).expanduser()
    if found.suffix != ".npz" or not found.is_file():
        return False
    try:
        return {"joints", "parents", "fps"} <= set(read_arrays(found))
    except InputError:
        return False


def _parts(
    clips: MotionClips, label: str, random: np.random.Generator
) -> tuple[list[NDArray[np.int64]], str]:
    """Numbers of the training, validation and test clips, and how they were divided."""
    everything = np.arange(len(clips))
    if clips.source == "bandai":
        among = np.ones(len(clips), bool) if label == "part" else clips.labels["part"] == 2
        pairs = clips.labels["action"] * 1000 + clips.labels["style"]
        test = held_out_pairs(clips) & among
        others = np.unique(pairs[among & ~test])
        held = random.choice(others, round(len(others) / 5), replace=False)
        validation = np.isin(pairs, held) & among
        rest = among & ~test & ~validation
        count = len(np.unique(pairs[test]))
        return [everything[rest], everything[validation], everything[test]], (
            f"test on {count} pairs of action and style that nobody trained on, validation on {len(held)} others"
        )
    train, validation, test = (everything[clips.split == part] for part in (TRAIN, VALIDATION, TEST))
    names = ("take",) if clips.source == "sfinge-hands" else PERSONS
    named = next((name for name in names if name in clips.labels and name != label), None)
    missing = (not len(validation)) + (not len(test))
    # As many groups as parts, at least; fewer cannot be divided.
    group = named if named and len(np.unique(clips.labels[named][train])) > missing else None
    if not len(test):
        train, test = _cut(clips, train, label, group, random)
    if not len(validation):
        train, validation = _cut(clips, train, label, group, random)
    found = [train, validation, test]
    if named is not None:
        members = np.concatenate([np.unique(clips.labels[named][part]) for part in found])
        if len(np.unique(members)) == len(members):
            return found, f"parts share no {named}"
    return found, "parts drawn by clip" if missing else "parts as the clips name them"


def _cut(
    clips: MotionClips,
    rows: NDArray[np.int64],
    label: str,
    group: str | None,
    random: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows without and with a fifth of the groups, or of each class where there are no groups."""
    if group is not None:
        members = np.unique(clips.labels[group][rows])
        taken = random.choice(members, max(round(len(members) / 5), 1), replace=False)
        held = np.isin(clips.labels[group][rows], taken)
    else:
        held = np.zeros(len(rows), bool)
        for value in np.unique(clips.labels[label][rows]):
            own = np.flatnonzero(clips.labels[label][rows] == value)
            held[random.permutation(own)[: round(len(own) / 5)]] = True
    return rows[~held], rows[held]


def _limited(
    parts: Sequence[NDArray[np.int64]], labels: NDArray[np.int64], limit: int, random: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Some clips of each part; of the training part one of each class first, of the others those of classes that are trained on, if any."""
    found: list[NDArray[np.int64]] = []
    for number, rows in enumerate(parts):
        if number:
            trained = np.isin(labels[rows], labels[found[TRAIN]])
            rows = rows[trained] if trained.any() else rows
        if len(rows) > limit:
            drawn = random.permutation(rows)
            if number == TRAIN:
                first = np.zeros(len(drawn), bool)
                first[np.unique(labels[drawn], return_index=True)[1]] = True
                drawn = np.concatenate([drawn[first], drawn[~first]])
            rows = np.sort(drawn[:limit])
        found.append(rows)
    return found


def _inputs(clips: MotionClips, frames: int) -> Tensor:
    joints = clips.resampled(frames, centre=0.95)
    missing = joints.isnan().flatten(1).any(1)
    if bool(missing.any()):
        clip = clips.names[int(missing.nonzero()[0])]
        raise InputError(
            f"{clips.source or 'motion'}: a joint of clip {clip!r} is never seen, or not a number"
        )
    root = joints[:, :1, clips.skeleton.root, None]
    # (clips, frames, joints, 3) to (clips, 3, frames, joints, one person).
    return (joints - root).permute(0, 3, 1, 2)[..., None].contiguous()
