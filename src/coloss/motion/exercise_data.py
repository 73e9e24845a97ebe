"""From clips to what an exercise classifier learns from: windows of joints, their classes and persons, and how often a clip repeats."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.data.motion_clips import TEST, TRAIN, VALIDATION, MotionClips, filled, held_out_pairs
from coloss.data.motion_splits import PERSONS
from coloss.errors import InputError
from coloss.motion.exercise_windows import at_times, cut_windows, group_window_split, resample_rate
from coloss.motion.reference_counts import count_strides, count_swings

REPETITION_LABELS = ("repetitions",)
"""Labels that say how often a clip repeats its motion."""

_IN_NAME = re.compile(r"(\d+)(reps|hops|steps)", re.IGNORECASE)
_STRIDES = ("walk", "run", "dash", "jog", "sneak")
_WAVES = {"wave-left-hand": "L", "wave-right-hand": "R", "wave-both-hands": "R"}


@dataclass
class ExerciseWindows:
    """Windows of joint positions at one rate, and what is known of them.

    Attributes:
        joints: (windows, frames, joints, 3), NaN where a joint was not seen or the recording had not begun.
        targets: int64 (windows), the class.
        recordings: int64 (windows), number of the clip.
        groups: int64 (windows), who moves; for Bandai-Namco's set the (action, style) pair; the recording where neither is known.
        split: int64 (windows), 0 train, 1 validation, 2 test; no recording is in two of them.
        labels: names of the classes.
    """

    joints: Float[Tensor, "windows frames joints 3"]
    targets: Int[Tensor, " windows"]
    recordings: Int[Tensor, " windows"]
    groups: Int[Tensor, " windows"]
    split: Int[Tensor, " windows"]
    labels: tuple[str, ...]


def axis_factors(clips: MotionClips) -> tuple[float, float, float]:
    """What coordinates are multiplied by so that all axes are in one unit, as angles and distances need it.

    1 for clips in metres. Screen units have pixels across and up but another unit for the depth: there the depth is brought to the spread
    across about the hips (the root), over the training clips (all, if none is). That is an assumption about bodies, no calibration.

    Args:
        clips: of one skeleton.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> joints = np.random.default_rng(0).normal(size=(50, 4, 3)) * [1, 2, 8]
        >>> clips = MotionClips.from_list([joints], Skeleton((-1, 0, 1, 1)), fps=15, units="screen")
        >>> [round(factor, 1) for factor in axis_factors(clips)]
        [1.0, 1.0, 0.1]
    """
    if clips.units != "screen":
        return (1.0, 1.0, 1.0)
    chosen = [k for k in range(len(clips)) if clips.split[k] == TRAIN] or list(range(len(clips)))
    own = np.concatenate([clips.clip(k) for k in chosen])
    spread = np.nanstd(own - own[:, [clips.skeleton.root]], axis=(0, 1)).clip(1e-8)
    return (1.0, 1.0, float(spread[0] / spread[2]))


def in_one_unit(clips: MotionClips, factors: Sequence[float]) -> MotionClips:
    """Clips whose axes are multiplied by the factors of `axis_factors`.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> clips = MotionClips.from_list([np.ones((1, 1, 3))], Skeleton((-1,)), fps=15)
        >>> in_one_unit(clips, (1.0, 2.0, 0.5)).joints.tolist()
        [[[1.0, 2.0, 0.5]]]
    """
    return replace(clips, joints=clips.joints * np.asarray(factors, np.float32))


def recordings_for_test(clips: MotionClips) -> Bool[np.ndarray, " clips"]:
    """Which clips are for the test: those that say so; of `bandai`, those of the (action, style) pairs of `held_out_pairs`.

    Bandai-Namco's set names no persons, and its stored parts hold other takes of the same pairs.

    Args:
        clips: of one skeleton.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> clips = MotionClips.from_list([np.zeros((9, 2, 3))] * 2, Skeleton((-1, 0)), fps=15, split=[0, 2])
        >>> recordings_for_test(clips).tolist()
        [False, True]
    """
    return held_out_pairs(clips) if clips.source == "bandai" else clips.split == TEST


def recordings_at(clips: MotionClips, fps: float) -> list[Tensor]:
    """Every clip as a tensor (frames, joints, 3) at one rate.

    Args:
        clips: of one skeleton.
        fps: frames per second.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> clips = MotionClips.from_list([np.zeros((7, 2, 3))], Skeleton((-1, 0)), fps=30)
        >>> [tuple(recording.shape) for recording in recordings_at(clips, 15)]
        [(4, 2, 3)]
    """
    return [
        resample_rate(torch.from_numpy(np.array(clips.clip(k), np.float32)), clips.fps, fps)
        for k in range(len(clips))
    ]


def labelled_windows(
    clips: MotionClips,
    *,
    fps: float = 15,
    window: int = 16,
    stride: int = 8,
    generator: torch.Generator | None = None,
) -> ExerciseWindows:
    """Windows of all clips, with a split in which no recording is on two sides, and no person whom the clips' own split keeps apart.

    The test part is that of `recordings_for_test`. Where the clips name no validation part, it is drawn from the training part: whole persons
    (by the first label that there is of subject, actor, person, recording; for `bandai`, (action, style) pairs) if there are at least
    three, else whole recordings.

    Args:
        clips: whose first label is the class.
        fps: rate of the windows.
        window: frames.
        stride: frames from one to the next.
        generator: draws the validation part.

    Raises:
        InputError: if the clips have no label, or no training or test part.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> labels = {"exercise": [0, 1, 0, 1, 0, 1]}
        >>> clips = MotionClips.from_list(
        ...     [np.zeros((9, 2, 3))] * 6,
        ...     Skeleton((-1, 0)),
        ...     fps=15,
        ...     labels=labels,
        ...     split=[0, 0, 0, 0, 2, 2],
        ... )
        >>> found = labelled_windows(clips, window=8, stride=4)
        >>> tuple(found.joints.shape), sorted(set(found.split.tolist())), found.labels
        ((12, 8, 2, 3), [0, 1, 2], ('0', '1'))
    """
    if not clips.labels:
        raise InputError("clips must have a label to tell exercises by, got none")
    name = next(iter(clips.labels))
    classes = torch.from_numpy(clips.labels[name])
    parts = torch.from_numpy(clips.split.astype(np.int64))
    if not (parts == TRAIN).any() or not (parts == TEST).any():
        raise InputError("clips must have a training part (split 0) and a test part (split 2)")
    who = next((label for label in PERSONS if label in clips.labels), None)
    groups = torch.from_numpy(clips.labels[who]) if who else torch.arange(len(clips))
    if clips.source == "bandai":
        groups = torch.from_numpy(clips.labels["action"] * 1000 + clips.labels["style"])
        parts = torch.from_numpy(np.where(recordings_for_test(clips), TEST, TRAIN).astype(np.int64))
    if not (parts == VALIDATION).any():
        own = (parts == TRAIN).nonzero().flatten()
        members = groups[own]
        if len(members.unique()) < 3:
            members = own
        split = group_window_split(members, test=0.25, validation=0.5, generator=generator)
        parts[own[split.test]] = VALIDATION
    cut = [cut_windows(recording, window, stride) for recording in recordings_at(clips, fps)]
    number = torch.repeat_interleave(torch.arange(len(cut)), torch.tensor([len(part) for part in cut]))
    names = clips.label_names.get(name, tuple(str(k) for k in range(int(classes.max()) + 1)))
    return ExerciseWindows(
        torch.cat(cut), classes[number], number, groups[number], parts[number], tuple(names)
    )


def hide_joints(
    joints: Float[Tensor, "windows frames joints 3"],
    share: float | Float[Tensor, " windows"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "windows frames joints 3"]:
    """Copies in which some joints were not seen: each joint is gone in a stretch of a window, such that a share is gone on the average.

    Args:
        joints: windows.
        share: of joints and frames to hide, in [0, 1], one for all or one for each window. Half of it goes by whole joints, the rest by
            single frames.
        generator: draws which.

    Raises:
        ValueError: for a share out of range.

    Examples:
        >>> hidden = hide_joints(torch.zeros(50, 10, 4, 3), 0.2, torch.Generator().manual_seed(0))
        >>> round(hidden.isnan().float().mean().item(), 1)
        0.2
    """
    part = torch.as_tensor(share, dtype=torch.float32)
    if not bool(((part >= 0) & (part <= 1)).all()):
        raise ValueError(f"share must be in [0, 1], got {share}")
    part = part.reshape(-1, 1, 1) / 2
    count, frames, number, _ = joints.shape
    whole = torch.rand(count, 1, number, generator=generator) < part
    single = torch.rand(count, frames, number, generator=generator) < part / (1 - part)
    return joints.masked_fill((whole | single)[..., None], torch.nan)


def moved(
    joints: Float[Tensor, "windows frames joints 3"],
    generator: torch.Generator | None = None,
    *,
    degrees: float = 90.0,
    scales: tuple[float, float] = (0.8, 1.25),
    shift: float = 1.0,
) -> Float[Tensor, "windows frames joints 3"]:
    """Windows as another camera would see them: each turned about the vertical axis, scaled and shifted as a whole.

    Args:
        joints: y is vertical.
        generator: draws an angle in [-degrees, degrees], a scale (evenly in its logarithm), and a shift along each axis.
        degrees: largest angle.
        scales: least and largest.
        shift: standard deviation of the shift, in the coordinates' unit.

    Examples:
        >>> joints = torch.randn(2, 5, 3, 3)
        >>> same = moved(joints, degrees=0.0, scales=(1.0, 1.0), shift=0.0)
        >>> torch.allclose(same, joints)
        True
    """
    count = len(joints)

    def drawn() -> Tensor:
        return torch.rand(count, 1, 1, generator=generator)

    angle = torch.deg2rad((2 * drawn() - 1) * degrees)
    low, high = (float(np.log(scale)) for scale in scales)
    scale = torch.exp(low + (high - low) * drawn())[..., None]
    x, y, z = joints.unbind(-1)
    turned = torch.stack([angle.cos() * x + angle.sin() * z, y, angle.cos() * z - angle.sin() * x], -1)
    return scale * turned + shift * torch.randn(count, 1, 1, 3, generator=generator)


def known_repetitions(clips: MotionClips) -> Int[Tensor, " clips"]:
    """How often each clip repeats its motion, -1 where nothing says it.

    By the label `repetitions`; else by the class's name, as HDM05 has them (`squat1Reps`; two steps are one stride); else, for
    walks and runs of skeletons with feet, by contacts of the left foot with the ground (strides); for waves of Bandai-Namco's skeleton, by
    swings of the hand relative to the shoulders. The last two are measured from positions, not counted by a person; a joint that is missing
    for a time is interpolated, and one that is never seen tells nothing.

    Args:
        clips: whose first label is the class.

    Examples:
        >>> from coloss.data.skeleton import Skeleton
        >>> clips = MotionClips.from_list(
        ...     [np.zeros((9, 2, 3))] * 2,
        ...     Skeleton((-1, 0)),
        ...     fps=15,
        ...     labels={"action": [0, 1]},
        ...     label_names={"action": ("jog4Steps", "nod")},
        ... )
        >>> known_repetitions(clips)
        tensor([ 2, -1])
    """
    for label in REPETITION_LABELS:
        if label in clips.labels:
            return torch.from_numpy(clips.labels[label])
    found = torch.full((len(clips),), -1)
    name = next(iter(clips.labels))
    names = clips.label_names.get(name, ())
    for index, number in enumerate(clips.labels[name].tolist()):
        if number < len(names):
            found[index] = _repetitions(clips, index, names[number])
    return found


def _repetitions(clips: MotionClips, index: int, name: str) -> int:
    if match := _IN_NAME.search(name):
        return int(match[1]) // (2 if match[2].lower() == "steps" else 1)
    skeleton = clips.skeleton
    joints = torch.from_numpy(filled(np.array(clips.clip(index), np.float32)))
    if clips.units == "m" and skeleton.feet is not None and name.startswith(_STRIDES):
        ankle, toe = (joints[:, joint] for joint in skeleton.feet[:2])
        return count_strides(ankle, toe, clips.fps) if (ankle + toe).isfinite().all() else -1
    side = _WAVES.get(name)
    if side and {f"Hand_{side}", "UpperArm_L", "UpperArm_R"} <= set(skeleton.names):
        shoulders = [skeleton.joint("UpperArm_L"), skeleton.joint("UpperArm_R")]
        hand = joints[:, skeleton.joint(f"Hand_{side}")] - joints[:, shoulders].mean(1)
        return count_swings(hand) if hand.isfinite().all() else -1
    return -1


def chained(
    recordings: Sequence[Tensor],
    repetitions: Sequence[int],
    *,
    speeds: tuple[float, float] = (0.7, 1.4),
    clips: tuple[int, int] = (3, 8),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """Recordings of one motion joined into a longer one, each at a speed of its own: a session whose count is known.

    It is simulated as far as the joins and the speeds go; every repetition is a recorded one.

    Args:
        recordings: of one motion and one person, frames first; joints or features.
        repetitions: in each of them.
        speeds: slowest and fastest.
        clips: fewest and most recordings to join.
        generator: draws which, and their speeds.

    Returns:
        The joined recording and the count.

    Raises:
        InputError: for no recordings, or other counts than recordings.

    Examples:
        >>> session, count = chained([torch.zeros(20, 5)], [2], clips=(3, 3))
        >>> session.shape[1], count
        (5, 6)
    """
    if not recordings or len(recordings) != len(repetitions):
        raise InputError(f"recordings must each have a count, got {len(recordings)} and {len(repetitions)}")
    number = int(torch.randint(clips[0], clips[1] + 1, (1,), generator=generator))
    parts: list[Tensor] = []
    total = 0
    for _ in range(number):
        chosen = int(torch.randint(len(recordings), (1,), generator=generator))
        speed = speeds[0] + (speeds[1] - speeds[0]) * torch.rand(1, generator=generator).item()
        frames = recordings[chosen]
        parts.append(at_times(frames, torch.arange(int((len(frames) - 1) / speed) + 1) * speed))
        total += int(repetitions[chosen])
    return torch.cat(parts), total


def grouped(values: Sequence[Any], groups: Sequence[Any]) -> dict[Any, list[Any]]:
    """Values by their group, in the order of their first appearance.

    Examples:
        >>> grouped([1, 2, 3], ["a", "b", "a"])
        {'a': [1, 3], 'b': [2]}
    """
    found: dict[Any, list[Any]] = {}
    for value, group in zip(values, groups):
        found.setdefault(group, []).append(value)
    return found
