"""What a run of `fit` gives back and keeps on the way: history, metrics, costs, the target it is timed by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from coloss.train.conflict import Conflict
from coloss.train.method import Method


class NonFiniteLossError(ArithmeticError):
    """A loss term or a weight became NaN or infinite."""


@dataclass(frozen=True)
class Target:
    """A metric value to reach; the run records the training seconds it took.

    Examples:
        >>> Target("accuracy", 0.95).met({"accuracy": 0.96})
        True
    """

    metric: str
    value: float
    direction: str = "higher"

    def met(self, metrics: dict[str, float]) -> bool:
        """Tell whether these metrics reach the target."""
        found = metrics.get(self.metric, math.nan)
        return found >= self.value if self.direction == "higher" else found <= self.value


@dataclass
class LogPoint:
    """One logged moment: means of the loss terms since the last one, and metrics.

    `metrics` holds what the evaluation gave, if this was one, and the means since the last point of what methods
    reported with `state.log`.
    """

    step: int
    epoch: int
    seconds: float
    terms: dict[str, float]
    metrics: dict[str, float]


@dataclass
class Fit:
    """What training gives back.

    Attributes:
        model: the network as it ships, after every method's `finish`, in eval mode.
        methods: the methods, with their trained parts.
        metrics: of the shipped model, if `evaluate` was given.
        history: loss terms and metrics over time.
        conflicts: gradient cosines over time, if a monitor was given.
        steps, epochs, seconds: what was done; seconds of training only.
        prepare_seconds: setting up before the clock started.
        steps_per_second: over the training seconds.
        peak_memory_mb: highest memory in use above the start of training, 10^6 bytes.
        time_to_target: training seconds until the target was met first; None if it never was.
    """

    model: nn.Module
    methods: Sequence[Method]
    metrics: dict[str, float]
    history: list[LogPoint]
    conflicts: list[Conflict]
    steps: int
    epochs: int
    seconds: float
    prepare_seconds: float
    steps_per_second: float
    peak_memory_mb: float
    time_to_target: float | None


@dataclass
class Progress:
    """The part of a run that a checkpoint stores besides tensors and counters: where it is in its data, and its record."""

    batch_index: int = 0
    seconds: float = 0.0
    history: list[LogPoint] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    time_to_target: float | None = None
