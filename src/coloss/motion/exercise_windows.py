"""Windows of recordings, and splits of them that do not leak: all windows of one recording, or one person, stay on one side."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit
from torch import Tensor

from coloss.errors import InputError


class WindowSplit(NamedTuple):
    """Positions of windows, int64 each, without overlap; together all of them.

    Attributes:
        train: to learn from.
        validation: to choose by.
        test: to report.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


def resample_rate(frames: Float[Tensor, "frames *shape"], rate: float, new_rate: float) -> Tensor:
    """A recording as another camera would have taken it, by linear interpolation in time.

    The first frame stays the first. A frame between two of which one misses a joint misses it, too.

    Args:
        frames: one recording, frames first; NaN where something was not seen.
        rate: frames per second that it has, > 0.
        new_rate: that it shall have, > 0.

    Returns:
        Frames at times 0, 1 / new_rate, ... up to the last one; float.

    Raises:
        ValueError: for a rate <= 0, or no frames.

    Examples:
        >>> resample_rate(torch.tensor([0.0, 1.0, 2.0]), 10, 20)
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000])
    """
    for name, value in (("rate", rate), ("new_rate", new_rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if not len(frames):
        raise ValueError("frames must hold at least one frame, got none")
    if rate == new_rate:
        return frames
    count = int((len(frames) - 1) * new_rate / rate + 1e-6) + 1
    return at_times(frames, torch.arange(count) * (rate / new_rate))


def at_times(frames: Float[Tensor, "frames *shape"], times: Float[Tensor, " times"]) -> Tensor:
    """A recording at any times, by linear interpolation.

    Args:
        frames: one recording, frames first.
        times: in frames, within [0, frames - 1]; whole ones give the frames themselves.

    Examples:
        >>> at_times(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 0.25, 1.0])).flatten()
        tensor([0.0000, 0.5000, 2.0000])
    """
    before = times.clamp(0, len(frames) - 1).floor().long()
    after = (before + 1).clamp(max=len(frames) - 1)
    share = (times - before).to(frames).reshape(-1, *[1] * (frames.ndim - 1))
    # A joint that is missing in the other frame must not be lost where that frame has no share.
    mixed = frames[before] + share * (frames[after] - frames[before])
    return torch.where(share > 0, mixed, frames[before])


def cut_windows(
    features: Float[Tensor, "frames *shape"], length: int, stride: int
) -> Float[Tensor, "windows length *shape"]:
    """Windows of one recording, the last one at its end.

    A recording shorter than a window gives one, with NaN in front: that is what a window holds soon after the camera was switched on.

    Args:
        features: one recording, frames first.
        length: frames of a window, >= 1.
        stride: frames from one window to the next, >= 1.

    Returns:
        (windows, length, ...): at frames 0, stride, 2 stride ..., and one more that ends with the recording if they do not.

    Raises:
        ValueError: for a length or stride < 1, or no frames.

    Examples:
        >>> cut_windows(torch.arange(6.0), 3, 2)
        tensor([[0., 1., 2.],
                [2., 3., 4.],
                [3., 4., 5.]])
        >>> cut_windows(torch.arange(2.0), 3, 2)
        tensor([[nan, 0., 1.]])
    """
    for name, value in (("length", length), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    count = len(features)
    if not count:
        raise ValueError("features must hold at least one frame, got none")
    if count < length:
        empty = features.new_full((length - count, *features.shape[1:]), torch.nan)
        return torch.cat([empty, features])[None]
    starts = list(range(0, count - length + 1, stride))
    if starts[-1] != count - length:
        starts.append(count - length)
    return torch.stack([features[start : start + length] for start in starts])


def group_window_split(
    groups: Sequence[Hashable] | Int[Tensor, " windows"],
    *,
    test: float = 0.25,
    validation: float = 0.2,
    generator: torch.Generator | None = None,
) -> WindowSplit:
    """Parts none of which shares a recording (or a person: whatever the groups are) with another.

    Args:
        groups: of each window, the number or name of its recording or person.
        test: share of the groups in the test part, in (0, 1).
        validation: share of the others in the validation part, in (0, 1).
        generator: draws which.

    Returns:
        Positions of windows. Shares are of groups, so the parts' sizes vary with the groups'.

    Raises:
        InputError: for a share out of range, or fewer than three groups.

    Examples:
        >>> split = group_window_split([0, 0, 1, 1, 2, 2, 3, 3], generator=torch.Generator().manual_seed(0))
        >>> [len(part) for part in split]
        [4, 2, 2]
    """
    numbers = _numbered(groups)
    if numbers.max(initial=-1) < 2:
        raise InputError(f"groups must be at least 3 to split, got {numbers.max(initial=-1) + 1}")
    return _split(GroupShuffleSplit, numbers, test, validation, generator)


def random_window_split(
    windows: int, *, test: float = 0.25, validation: float = 0.2, generator: torch.Generator | None = None
) -> WindowSplit:
    """Parts drawn window by window: what NOT to report. Windows of one recording lie on both sides, so the test part is half known.

    It is here to measure by how much such a number flatters; split with `group_window_split`.

    Args:
        windows: how many there are, >= 3.
        test: share in the test part, in (0, 1).
        validation: share of the others in the validation part, in (0, 1).
        generator: draws which.

    Raises:
        InputError: for a share out of range or too few windows.

    Examples:
        >>> [len(part) for part in random_window_split(10, generator=torch.Generator().manual_seed(0))]
        [5, 2, 3]
    """
    if windows < 3:
        raise InputError(f"windows must be at least 3 to split, got {windows}")
    return _split(ShuffleSplit, torch.arange(windows).numpy(), test, validation, generator)


def _numbered(groups):  # type: ignore[no-untyped-def]
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64).numpy()


def _split(splitter, groups, test, validation, generator) -> WindowSplit:  # type: ignore[no-untyped-def]
    for name, share in (("test", test), ("validation", validation)):
        if not 0 < share < 1:
            raise InputError(f"{name} must be in (0, 1), got {share}")
    by_group = splitter is GroupShuffleSplit
    first, second = torch.randint(2**31, (2,), generator=generator).tolist()
    outer = splitter(1, test_size=test, random_state=first)
    inner = splitter(1, test_size=validation, random_state=second)
    rest, held = next(outer.split(groups, groups=groups if by_group else None))
    try:
        train, chosen = next(inner.split(rest, groups=groups[rest] if by_group else None))
    except ValueError as error:
        raise InputError(f"validation must leave something to train on, got {validation}") from error
    found = (torch.from_numpy(part) for part in (rest[train], rest[chosen], held))
    return WindowSplit(*found)
