"""Counts repetitions in a signal of the body, such as the angle of a knee: by two thresholds, one value at a time, or without any.

A counter with two thresholds (hysteresis; Riccio, 2024, arXiv 2411.11548, in general form) adds one whenever the signal rises above `high`
after it was below `low`. Swings between the two count nothing, so noise smaller than their distance never counts twice, as it does at a
single threshold. The rule at the ends: k waves from low to high count k, wherever they begin; a rise whose low was not seen counts nothing.
So k periods of -cos count k, k periods of sin count k - 1 (the first rise begins in the middle).

The others need no thresholds. They take a whole recording and a motion that goes on: autocorrelation for its period, peaks that stand out,
and the phase that the signal runs through.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.signal import find_peaks, hilbert
from torch import Tensor


class HysteresisCounter:
    """Counts a repetition when a signal rises above `high` after it was below `low`; one value at a time.

    Args:
        low: the lower threshold, in the signal's unit.
        high: the upper one, >= low. Equal ones are a single threshold, which noise crosses again and again.

    Attributes:
        count: repetitions so far.
        low_seen: whether the next rise above `high` counts.

    Raises:
        ValueError: for thresholds that are not finite or in the wrong order.

    Examples:
        >>> counter = HysteresisCounter(90, 160)
        >>> [counter.update(angle) for angle in (170, 80, 100, 85, 165, 150, 165, math.nan, 85, 170)]
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    """

    def __init__(self, low: float, high: float) -> None:
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"low and high must be finite with low <= high, got {low} and {high}")
        self.low, self.high = float(low), float(high)
        self.reset()

    def update(self, value: float) -> int:
        """Take the next value and give the count; a missing one (NaN) changes nothing.

        Args:
            value: of the signal.
        """
        if value < self.low:
            self.low_seen = True
        elif value > self.high and self.low_seen:
            self.low_seen = False
            self.count += 1
        return self.count

    def reset(self) -> None:
        """Begin again at 0, with no low seen."""
        self.count, self.low_seen = 0, False


class SwingCounter:
    """Counts each rise by at least `swing`, wherever it begins; one value at a time.

    Levels do not matter, so it bears signals that drift, or lie elsewhere for another body, better than two fixed thresholds; a rise is
    measured from the lowest value since the last fall by as much.

    Args:
        swing: the least rise that counts, and the least fall that ends it, > 0, in the signal's unit.

    Attributes:
        count: rises so far.

    Raises:
        ValueError: for a swing that is not > 0 and finite.

    Examples:
        >>> counter = SwingCounter(30)
        >>> [counter.update(angle) for angle in (100, 90, 110, 125, 120, 150, 110, math.nan, 115, 145)]
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 2]
    """

    def __init__(self, swing: float) -> None:
        if not 0 < swing < math.inf:
            raise ValueError(f"swing must be > 0 and finite, got {swing}")
        self.swing = float(swing)
        self.rising, self.turn = False, math.inf
        self.reset()

    def update(self, value: float) -> int:
        """Take the next value and give the count; one that is missing (NaN) or infinite changes nothing.

        Args:
            value: of the signal.
        """
        if not math.isfinite(value):
            return self.count
        if self.rising:
            self.turn = max(self.turn, value)
            if value <= self.turn - self.swing:
                self.rising, self.turn = False, value
        else:
            self.turn = min(self.turn, value)
            if value >= self.turn + self.swing:
                self.rising, self.turn = True, value
                self.count += 1
        return self.count

    def reset(self) -> None:
        """Begin again at 0."""
        self.count, self.rising, self.turn = 0, False, math.inf


def hysteresis_events(
    signals: Float[Tensor, "*batch frames"],
    low: float | Float[Tensor, "*batch"],
    high: float | Float[Tensor, "*batch"],
) -> Bool[Tensor, "*batch frames"]:
    """The frames in which a `HysteresisCounter` would count, for many signals at once.

    Args:
        signals: frames last; NaN where a value is missing.
        low: lower threshold, one for all or one for each.
        high: upper threshold, >= low.

    Raises:
        ValueError: for thresholds in the wrong order.

    Examples:
        >>> hysteresis_events(torch.tensor([170.0, 80, 100, 165, 85, 170]), 90, 160).nonzero().flatten()
        tensor([3, 5])
    """
    low, high = (torch.as_tensor(value, dtype=signals.dtype, device=signals.device) for value in (low, high))
    if not bool((low <= high).all()):
        raise ValueError(f"low must be <= high, got {low.tolist()} and {high.tolist()}")
    frames = torch.arange(signals.shape[-1], device=signals.device)
    below, above = signals < low[..., None], signals > high[..., None]
    marked = below | above
    last = torch.where(marked, frames, -1).cummax(-1).values
    # The mark before this frame; -1 where there was none.
    before = torch.cat([torch.full_like(last[..., :1], -1), last[..., :-1]], -1)
    was_below = below.gather(-1, before.clamp_min(0)) & (before >= 0)
    return above & was_below


def hysteresis_count(
    signals: Float[Tensor, "*batch frames"],
    low: float | Float[Tensor, "*batch"],
    high: float | Float[Tensor, "*batch"],
) -> Int[Tensor, "*batch"]:
    """Repetitions in each of many signals, as a `HysteresisCounter` counts them.

    Args:
        signals: frames last; NaN where a value is missing.
        low: lower threshold, one for all or one for each.
        high: upper threshold, >= low.

    Returns:
        int64, one for each signal.

    Raises:
        ValueError: for thresholds in the wrong order.

    Examples:
        >>> waves = -torch.cos(torch.linspace(0, 2 * math.pi, 200)[None] * torch.tensor([[3.0], [5.0]]))
        >>> hysteresis_count(waves, -0.5, 0.5)
        tensor([3, 5])
    """
    return hysteresis_events(signals, low, high).sum(-1)


def autocorrelation_count(
    signal: Float[Tensor, " frames"], shortest: int = 4, longest: int | None = None
) -> float:
    """Periods in a recording, from the delay after which it is most like itself; needs no thresholds and no class.

    The delay is the first one whose autocorrelation reaches 0.9 of the highest peak's, so that two periods are not taken for one.

    Args:
        signal: of one recording; missing values (NaN) are filled in linearly, those at its ends are left out.
        shortest: delay in frames from which on it is looked for, >= 1.
        longest: up to which; default: half the recording.

    Returns:
        Length of the recording in periods, no whole number; 0 where no delay stands out (fewer than two periods, or a signal that is constant
        or a straight line).

    Raises:
        ValueError: for a delay out of range.

    Examples:
        >>> round(autocorrelation_count(torch.sin(torch.linspace(0, 2 * math.pi * 6, 301))), 1)
        6.0
    """
    if shortest < 1 or (longest is not None and longest < shortest):
        raise ValueError(f"delays must be 1 <= shortest <= longest, got {shortest} and {longest}")
    values = _filled(signal)
    frames = len(values)
    longest = frames // 2 if longest is None else min(longest, frames - 2)
    if longest < shortest or _still(values):
        return 0.0
    centred = _detrended(values)
    if centred.std() <= 1e-9 * abs(values).max():
        return 0.0
    # Each delay as the correlation of the two overlapping pieces, so that long delays are not damped. One more delay at each end, so
    # that the shortest and the longest can be peaks; where any smooth signal is like itself, there is none.
    delays = range(shortest - 1, longest + 2)
    found = np.array([_correlation(centred[: frames - lag], centred[lag:]) for lag in delays])
    peaks = find_peaks(found, height=0.2)[0]
    if not len(peaks):
        return 0.0
    first = int(peaks[found[peaks] >= 0.9 * found[peaks].max()][0])
    return float((frames - 1) / (shortest - 1 + _vertex(found, first)))


def peak_count(signal: Float[Tensor, " frames"], prominence: float = 0.4, shortest: int = 3) -> int:
    """Peaks of a recording that stand out from what is around them.

    Args:
        signal: of one recording; missing values (NaN) are filled in linearly, those at its ends are left out.
        prominence: share of the signal's range (5% to 95% quantile) that a peak must rise above its surroundings, > 0.
        shortest: frames from one peak to the next at least, >= 1.

    Raises:
        ValueError: for a prominence or distance out of range.

    Examples:
        >>> peak_count(torch.sin(torch.linspace(0, 2 * math.pi * 6, 301)))
        6
    """
    if not 0 < prominence < math.inf:
        raise ValueError(f"prominence must be > 0 and finite, got {prominence}")
    if shortest < 1:
        raise ValueError(f"shortest must be >= 1, got {shortest}")
    values = _filled(signal)
    if _still(values):
        return 0
    low, high = np.quantile(values, [0.05, 0.95])
    if high - low <= 1e-9 * abs(values).max():
        return 0
    return len(find_peaks(values, prominence=prominence * (high - low), distance=shortest)[0])


def phase_count(signal: Float[Tensor, " frames"]) -> float:
    """Turns of a recording's phase, by the analytic signal: for one smooth wave whose speed may change.

    Args:
        signal: of one recording; missing values (NaN) are filled in linearly, those at its ends are left out.

    Returns:
        Turns, no whole number; 0 for a constant signal.

    Examples:
        >>> round(phase_count(torch.sin(torch.linspace(0, 2 * math.pi * 6, 301))))
        6
    """
    values = _filled(signal)
    if len(values) < 3 or _still(values):
        return 0.0
    phase = np.unwrap(np.angle(hilbert(values - values.mean())))
    return float(abs(phase[-1] - phase[0]) / (2 * math.pi))


def _filled(signal: Tensor) -> np.ndarray:
    """From the first value that is there to the last one, gaps filled in linearly; none if nothing is there."""
    values = signal.detach().double().cpu().numpy()
    seen = np.flatnonzero(np.isfinite(values))
    return np.interp(np.arange(seen[0], seen[-1] + 1), seen, values[seen]) if len(seen) else values[:0]


def _still(values: np.ndarray) -> bool:
    return not len(values) or bool(values.std() <= 1e-9 * abs(values).max())


def _detrended(values: np.ndarray) -> np.ndarray:
    frames = np.arange(len(values))
    return values - np.polyval(np.polyfit(frames, values, 1), frames)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    length = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / length if length > 0 else 0.0


def _vertex(values: np.ndarray, peak: int) -> float:
    """Where a parabola through a peak and its neighbours is highest."""
    if not 0 < peak < len(values) - 1:
        return float(peak)
    before, at, after = values[peak - 1 : peak + 2]
    bend = before - 2 * at + after
    return peak + (0.5 * (before - after) / bend if bend < 0 else 0.0)
