"""Numbers that change over training, as functions of progress in [0, 1].

A schedule is any callable `progress -> float`; progress is the share of the budget already spent, so the same schedule
works for budgets in epochs, steps or seconds. Plain numbers are accepted wherever a schedule is.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = float | int | Callable[[float], float]


def value_at(schedule: Schedule, progress: float) -> float:
    """Evaluate a schedule, or pass a plain number through.

    Examples:
        >>> value_at(0.5, progress=0.9), value_at(linear(0.0, 1.0), progress=0.25)
        (0.5, 0.25)
    """
    return float(schedule(progress)) if callable(schedule) else float(schedule)


def linear(start: float, end: float) -> Callable[[float], float]:
    """A straight line from `start` to `end`.

    Examples:
        >>> linear(1.0, 0.0)(0.75)
        0.25
    """
    return lambda progress: start + (end - start) * min(max(progress, 0.0), 1.0)


def cosine(start: float = 1.0, end: float = 0.0, warmup: float = 0.0) -> Callable[[float], float]:
    """Half a cosine from `start` to `end`, after a linear rise from 0 over the first `warmup` share of training.

    As a learning-rate schedule the values multiply the optimizer's learning rate.

    Raises:
        ValueError: if `warmup` is outside [0, 1).

    Examples:
        >>> schedule = cosine(warmup=0.1)
        >>> schedule(0.05), schedule(0.1), round(schedule(1.0), 12)
        (0.5, 1.0, 0.0)
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be in [0, 1), got {warmup}")

    def schedule(progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < warmup:
            return start * progress / warmup
        share = (progress - warmup) / (1 - warmup)
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))

    return schedule


def step_decay(milestones: tuple[float, ...], factor: float = 0.1) -> Callable[[float], float]:
    """1, multiplied by `factor` at each milestone (shares of training).

    Examples:
        >>> [step_decay((0.5, 0.75))(progress) for progress in (0.4, 0.5, 0.8)]
        [1.0, 0.1, 0.010000000000000002]
    """
    return lambda progress: factor ** sum(progress >= milestone for milestone in milestones)


def gradual(rate: float = 10.0) -> Callable[[float], float]:
    """The saturating ramp 2 / (1 + exp(-rate * progress)) - 1 from 0 towards 1, used for adversarial terms.

    Source: Ganin et al., 2016, arXiv:1505.07818, section 5.2.2.

    Examples:
        >>> gradual()(0.0), round(gradual()(1.0), 4)
        (0.0, 0.9999)
    """
    return lambda progress: math.tanh(0.5 * rate * progress)
