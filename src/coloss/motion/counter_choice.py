"""Chooses the signal and the thresholds that count a motion best, on recordings whose repetitions are known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.motion.repetition_counter import HysteresisCounter, SwingCounter, hysteresis_count


class CounterChoice(NamedTuple):
    """What counts the repetitions of a class.

    Attributes:
        feature: which column of the features is the signal; -1 - column for the column with its sign turned, so that falls count.
        kind: `"levels"` for a `HysteresisCounter`, `"swings"` for a `SwingCounter` of high - low.
        low: lower threshold, in the feature's unit; 0 for swings.
        high: upper threshold, or the swing.
        error: mean distance from the true counts of the recordings that it was chosen on.
    """

    feature: int
    kind: str
    low: float
    high: float
    error: float

    def new_counter(self) -> HysteresisCounter | SwingCounter:
        """A counter at 0."""
        return (
            SwingCounter(self.high - self.low)
            if self.kind == "swings"
            else HysteresisCounter(self.low, self.high)
        )

    def count(self, features: Float[Tensor, "frames features"]) -> int:
        """Repetitions in a whole recording."""
        signal = counter_signal(features, self.feature)
        if self.kind == "levels":
            return int(hysteresis_count(signal, self.low, self.high))
        return _rises(_turning_points(signal.detach().double().cpu().numpy()), self.high - self.low)


def choose_counter(
    recordings: Sequence[Tensor],
    repetitions: Sequence[int],
    levels: Sequence[tuple[float, float]] = ((0.2, 0.5), (0.35, 0.65), (0.25, 0.75), (0.5, 0.8)),
    swings: Sequence[float] = (0.4, 0.6),
    columns: Sequence[int] | None = None,
    shifted: float = 0.1,
) -> CounterChoice:
    """The feature and the thresholds that count best in recordings whose repetitions are known.

    Two kinds of counters are tried for each feature and for its negative: levels at shares of the feature's range (from the median of the
    recordings' 5% quantiles to that of their 95% quantiles), and swings of a share of it.
    The choice has the least error, also where the thresholds lie a little lower or higher, as they do for another body; of equal ones, the one
    whose thresholds lie farthest apart (so features should be of one unit).

    Args:
        recordings: (frames, features), NaN where missing; each with some repetitions of the motion.
        repetitions: how many, >= 0.
        levels: pairs of thresholds to try, as shares of the range, low < high.
        swings: swings to try, as shares of the range, more than `shifted`.
        columns: features to try; default: all.
        shifted: share of the range by which thresholds lie lower and higher.

    Raises:
        InputError: for no recordings, or counts that do not fit them.

    Examples:
        >>> knee = -torch.cos(torch.linspace(0, 6 * torch.pi, 90))
        >>> still = torch.zeros(90)
        >>> recording = torch.stack([still, knee], 1)
        >>> choose_counter([recording], [3]).count(recording)
        3
    """
    if not recordings or len(recordings) != len(repetitions) or min(repetitions) < 0:
        raise InputError(f"recordings must each have a count >= 0, got {len(recordings)} and {repetitions}")
    columns = range(recordings[0].shape[1]) if columns is None else columns
    padded = torch.nn.utils.rnn.pad_sequence(list(recordings), batch_first=True, padding_value=torch.nan)
    true = np.asarray(repetitions)
    found: list[tuple[float, float, CounterChoice]] = []
    for feature in (feature for column in columns for feature in (column, -1 - column)):
        signals = counter_signal(padded, feature)
        if bool(signals.isnan().all(1).any()):
            continue
        ends = signals.double().nanquantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=1)
        bottom, top = ends.median(1).values.tolist()
        if not top > bottom:
            continue
        turns = [_turning_points(signal) for signal in signals.double().numpy()]
        moves = (0.0, -shifted, shifted)
        candidates = [("levels", [(low + move, high + move) for move in moves]) for low, high in levels]
        candidates += [("swings", [(0.0, swing + move) for move in moves]) for swing in swings]
        for kind, tried in candidates:
            base = bottom if kind == "levels" else 0.0
            bounds = [tuple(base + share * (top - bottom) for share in pair) for pair in tried]
            if kind == "levels":
                counts = [hysteresis_count(signals, low, high).numpy() for low, high in bounds]
            else:
                counts = [np.array([_rises(turn, swing) for turn in turns]) for _, swing in bounds]
            errors = [float(np.abs(count - true).mean()) for count in counts]
            low, high = bounds[0]
            found.append((sum(errors), low - high, CounterChoice(feature, kind, low, high, errors[0])))
    if not found:
        raise InputError("recordings must hold a feature that is there and moves, got none")
    return min(found)[2]


def counter_signal(features: Float[Tensor, "*frames features"], feature: int) -> Float[Tensor, "*frames"]:
    """The signal that a `CounterChoice` names: a column, with its sign turned if the number is negative.

    Examples:
        >>> counter_signal(torch.tensor([[1.0, 2.0]]), -2)
        tensor([-2.])
    """
    return features[..., feature] if feature >= 0 else -features[..., -1 - feature]


def _turning_points(values: np.ndarray) -> np.ndarray:
    """The ends and the highest and lowest values between, all that a swing depends on."""
    seen = values[np.isfinite(values)]
    steps = np.diff(seen)
    moving = np.concatenate([[True], steps != 0]) if len(seen) else np.zeros(0, bool)
    seen = seen[moving]
    if len(seen) < 3:
        return seen
    steps = np.diff(seen)
    return seen[np.concatenate([[True], steps[1:] * steps[:-1] < 0, [True]])]


def _rises(turns, swing):  # type: ignore[no-untyped-def]
    """What a `SwingCounter` counts in an array; without annotations, that checks of types do not slow it down."""
    counter = SwingCounter(swing)
    for value in turns.tolist():
        counter.update(value)
    return counter.count
