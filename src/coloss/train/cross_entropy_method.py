"""Hyper-parameters found by the cross-entropy method: draw settings from a law, keep the best, pull the law towards them.

Each axis has a law of its own: a probability for each value of a `Choice`, a normal law cut to the range of a `Number`. A round draws
N settings x, scores them, and takes the best `elite` share of them; with m the law that makes these most likely (relative frequencies;
mean and standard deviation),

    law <- smoothing m + (1 - smoothing) law

and no probability or deviation falls below its least value, or a few lucky settings would end the search. It runs from Python; there is no
command for it.

Rubinstein 1999 (the method); Fu Li 2024, arXiv 2410.18441 proposes it for hyper-parameters (its constants are not published: those here are
usual ones, a project definition).

When it helps: a few axes, some tens of evaluations in rounds that can run side by side. When not: axes that act together only (the law treats
each by itself), or fewer evaluations than three rounds of ten. The gain over random search is small: rate, decay and momentum of a linear
classifier on digits, best of 60 settings, 0.171 against 0.173 nats in the median of ten seeds (`coloss bench generative`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from coloss.errors import InputError


@dataclass(frozen=True)
class Choice:
    """An axis of a few values without an order.

    Args:
        values: at least one, all different; plain JSON values if the history is to be saved.
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.values or any(value in self.values[:place] for place, value in enumerate(self.values)):
            raise ValueError(f"values must be different and at least one, got {list(self.values)}")


@dataclass(frozen=True)
class Number:
    """An axis of numbers between two ends, both included.

    Args:
        low, high: the ends, low < high.
        log: whether the law is one of the logarithm; low > 0.
        integer: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low must be < high, both finite, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be > 0 on a logarithmic axis, got {self.low}")
        if self.integer and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(
                f"low and high must be whole numbers on an integer axis, got {self.low}, {self.high}"
            )

    def place(self, value: float) -> float:
        """Where a value stands between the ends, 0 to 1; whole numbers stand at the middles of equally long pieces."""
        low, high = self._ends()
        return (self._scale(value) - low) / (high - low)

    def at(self, place: float) -> float | int:
        """The value at a place, 0 to 1."""
        low, high = self._ends()
        value = low + min(max(place, 0.0), 1.0) * (high - low)
        value = math.exp(value) if self.log else value
        value = min(max(round(value) if self.integer else value, self.low), self.high)
        return int(value) if self.integer else float(value)

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _ends(self) -> tuple[float, float]:
        margin = 0.5 if self.integer else 0.0
        return self._scale(self.low - margin), self._scale(self.high + margin)


Axis = Choice | Number


@dataclass(frozen=True)
class SearchTrial:
    """One setting and its score; `vars(trial)` is plain JSON if the choices' values are.

    Attributes:
        round: counted from 0.
        setting: value of each axis.
        score: as the objective gave it.
    """

    round: int
    setting: dict[str, Any]
    score: float


@dataclass(frozen=True)
class AxisLaw:
    """The law of one axis.

    Attributes:
        probabilities: of a choice's values; empty for numbers.
        mean: of the place between a number's ends, 0 to 1.
        deviation: of that place, before the law is cut at the ends.
    """

    probabilities: tuple[float, ...] = ()
    mean: float = 0.5
    deviation: float = 0.5


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best setting; None if every trial failed.
        score: its score; NaN if every trial failed.
        history: all trials in order; `cross_entropy_search(..., history=...)` goes on from it.
        law: of each axis, after the last round.
        rounds: finished ones.
    """

    best: dict[str, Any] | None
    score: float
    history: list[SearchTrial]
    law: dict[str, AxisLaw]
    rounds: int


def cross_entropy_search(
    space: Mapping[str, Axis],
    objective: Callable[[dict[str, Any]], float],
    samples: int = 20,
    elite: float = 0.2,
    smoothing: float = 0.7,
    rounds: int = 10,
    seed: int = 0,
    *,
    direction: Literal["lower", "higher"] = "lower",
    patience: int | None = None,
    least_probability: float = 0.02,
    least_deviation: float = 0.02,
    history: Sequence[SearchTrial | Mapping[str, Any]] = (),
    on_trial: Callable[[SearchTrial], None] | None = None,
) -> SearchResult:
    """Search settings by the cross-entropy method.

    Args:
        space: the axes by name.
        objective: setting -> score. NaN means that the trial failed: it is worse than every other and never moves the law; an infinity of
            the bad side likewise. An exception ends the search (the history that `on_trial` saw is not lost).
        samples: settings in a round, >= 2.
        elite: share of a round that moves the law, in (0, 1]; at least one setting, better two and more.
        smoothing: how far the law goes to the elite's, in (0, 1].
        rounds: at most.
        seed: of the draws. A round's draws depend on it, the round and the law alone.
        direction: which scores are better.
        patience: stop after so many rounds in which the elite's worst score did not improve; None: never.
        least_probability: of a value, at most 1 / number of values.
        least_deviation: of a number's law, in shares of its range.
        history: trials of an earlier, unfinished search with the same arguments, which are not run again.
        on_trial: called after each new trial, to save it.

    Returns:
        Best setting, its score, all trials, the law.

    Raises:
        ValueError: for arguments out of range.
        InputError: if the history is not one of this search (its settings are drawn again and compared).

    Source: Rubinstein 1999; de Boer et al. 2005 (smoothing); Fu Li 2024, arXiv 2410.18441 (for hyper-parameters).

    Examples:
        >>> space = {"rate": Number(1e-4, 1.0, log=True), "kind": Choice(["a", "b"])}
        >>> found = cross_entropy_search(
        ...     space, lambda x: abs(math.log10(x["rate"]) + 2) + (x["kind"] == "a"), rounds=6
        ... )
        >>> found.best["kind"], round(found.best["rate"], 3), len(found.history)
        ('b', 0.01, 120)
    """
    _check(space, samples, elite, smoothing, rounds, patience, least_probability, least_deviation, direction)
    sign = 1.0 if direction == "lower" else -1.0
    count = max(1, round(elite * samples))
    given = [SearchTrial(**one) if isinstance(one, Mapping) else one for one in history]
    law = {name: _first_law(axis) for name, axis in space.items()}
    trials: list[SearchTrial] = []
    limit, stale, finished = math.inf, 0, 0
    for number in range(rounds):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        drawn = [
            {name: _draw(axis, law[name], generator) for name, axis in space.items()} for _ in range(samples)
        ]
        for setting in drawn:
            place = len(trials)
            if place < len(given):
                trial = given[place]
                if trial.round != number or not _same(trial.setting, setting):
                    raise InputError(
                        f"history must come from a search with these arguments, but trial {place} has {trial.setting} "
                        f"where {setting} is drawn"
                    )
            else:
                trial = SearchTrial(number, setting, float(objective(dict(setting))))
                if on_trial is not None:
                    on_trial(trial)
            trials.append(trial)
        finished += 1
        ranked = _ranked(trials[-samples:], sign)[:count]
        if ranked:
            law = {
                name: _moved(
                    axis,
                    law[name],
                    [t.setting[name] for t in ranked],
                    smoothing,
                    least_probability,
                    least_deviation,
                )
                for name, axis in space.items()
            }
        worst = sign * ranked[-1].score if len(ranked) == count else math.inf
        stale = 0 if worst < limit else stale + 1
        limit = min(limit, worst)
        if patience is not None and stale >= patience:
            break
    best = next(iter(_ranked(trials, sign)), None)
    if best is None:
        return SearchResult(None, math.nan, trials, law, finished)
    return SearchResult(dict(best.setting), best.score, trials, law, finished)


def _ranked(trials: Sequence[SearchTrial], sign: float) -> list[SearchTrial]:
    """Trials that did not fail, the best first; of equals the earlier."""
    worked = [trial for trial in trials if sign * trial.score < math.inf]  # False for NaN too
    return sorted(worked, key=lambda trial: sign * trial.score)


def _first_law(axis: Axis) -> AxisLaw:
    if isinstance(axis, Choice):
        return AxisLaw(probabilities=(1 / len(axis.values),) * len(axis.values))
    return AxisLaw()


def _draw(axis: Axis, law: AxisLaw, generator: torch.Generator) -> Any:
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    if isinstance(axis, Choice):
        total = 0.0
        for value, probability in zip(axis.values, law.probabilities, strict=True):
            total += probability
            if share < total:
                return value
        return axis.values[-1]
    # The normal law cut to [0, 1], by the inverse of its distribution function.
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = torch.special.ndtr((ends - law.mean) / law.deviation).tolist()
    inside = torch.tensor(low + share * (high - low), dtype=torch.float64)
    return axis.at(law.mean + law.deviation * torch.special.ndtri(inside).item())


def _moved(
    axis: Axis, law: AxisLaw, values: Sequence[Any], smoothing: float, floor: float, least: float
) -> AxisLaw:
    if isinstance(axis, Choice):
        shares = [sum(value == own for value in values) / len(values) for own in axis.values]
        mixed = [
            smoothing * new + (1 - smoothing) * old
            for new, old in zip(shares, law.probabilities, strict=True)
        ]
        return replace(law, probabilities=_floored(mixed, min(floor, 1 / len(mixed))))
    places = [axis.place(value) for value in values]
    mean = sum(places) / len(places)
    deviation = (sum((place - mean) ** 2 for place in places) / len(places)) ** 0.5
    return replace(
        law,
        mean=smoothing * mean + (1 - smoothing) * law.mean,
        deviation=max(least, smoothing * deviation + (1 - smoothing) * law.deviation),
    )


def _floored(probabilities: Sequence[float], floor: float) -> tuple[float, ...]:
    """A share of the even law mixed in, as much as lifts the least probability to the floor."""
    least, even = min(probabilities), 1 / len(probabilities)
    if least >= floor or even <= floor:
        return tuple(probabilities) if least >= floor else (even,) * len(probabilities)
    share = (floor - least) / (even - least)
    return tuple((1 - share) * own + share * even for own in probabilities)


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        math.isclose(first[name], second[name], rel_tol=1e-9)
        if isinstance(second[name], float) and isinstance(first[name], float | int)
        else first[name] == second[name]
        for name in second
    )


def _check(
    space: Mapping[str, Axis],
    samples: int,
    elite: float,
    smoothing: float,
    rounds: int,
    patience: int | None,
    least_probability: float,
    least_deviation: float,
    direction: str,
) -> None:
    if not space:
        raise ValueError("space must have at least one axis, got none")
    for name, axis in space.items():
        if not isinstance(axis, Choice | Number):
            raise ValueError(f"space must map names to Choice or Number, got {axis!r} for {name!r}")
    if samples < 2:
        raise ValueError(f"samples must be >= 2, got {samples}")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be >= 1, got {patience}")
    for label, value in (("elite", elite), ("smoothing", smoothing)):
        if not 0 < value <= 1:
            raise ValueError(f"{label} must be in (0, 1], got {value}")
    for label, value in (("least_probability", least_probability), ("least_deviation", least_deviation)):
        if not 0 <= value < 1:
            raise ValueError(f"{label} must be in [0, 1), got {value}")
    if least_deviation == 0:
        raise ValueError("least_deviation must be > 0, got 0")
    if direction not in ("lower", "higher"):
        raise ValueError(f'direction must be "lower" or "higher", got {direction!r}')
