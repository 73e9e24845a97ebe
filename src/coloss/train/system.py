"""What a system's room declares about itself: its catalog entry and its claim.

`SYSTEM = System(...)` must be written with literal values only: the catalog reads it from the source text, without importing
the room.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coloss.train.budget import Budget
from coloss.train.method import Method

if TYPE_CHECKING:
    from coloss.train.outcome import Fit
    from coloss.train.step import Objective
    from coloss.train.task import Setting, Task


@dataclass(frozen=True)
class System:
    """A system's entry in the catalog.

    Args:
        slug: its name on the command line.
        title: of the paper.
        paper: authors, year and arXiv id.
        family: the folder it lives in.
        acts_on: stations of the training step: "batch", "model", "loss", "combine", "gradients", "optimizer", "weights", "evaluation".
        api: public import paths, the most important first.
        method: import path of the Method that `coloss compare --methods SLUG` builds; None if it has none.
        kinds: kinds of task that method fits: "classification", "regression", "multilabel", "retrieval", "self-supervised".
        recipe: import path of the function behind `coloss run SLUG`; None if it is no complete system.
        compare: what follows `coloss compare` on its card, where the usual example of its kind does not fit.
    """

    slug: str
    title: str
    paper: str
    family: str
    acts_on: tuple[str, ...]
    api: tuple[str, ...]
    method: str | None = None
    kinds: tuple[str, ...] = ()
    recipe: str | None = None
    compare: str | None = None


def _no_methods(setting: "Setting") -> Sequence[Method]:
    return ()


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: the same model, data and budget as the others, another objective or other methods.

    Args:
        name: how tables call it.
        methods: builds fresh methods for one trial.
        objective: stands in for the task's objective; None keeps it.
    """

    name: str
    methods: Callable[["Setting"], Sequence[Method]] = _no_methods
    objective: "Objective | None" = None


@dataclass(frozen=True)
class Claim:
    """A paper's directional claim as a comparison with a prediction: `method` beats `baseline` in `metric`.

    Args:
        statement: the claim in one sentence, as it is tested here.
        metric: what decides; computed on data that no arm trained or tuned on.
        baseline: name of the arm it is held against.
        method: name of the arm that should win.
        direction: "higher" or "lower" is better.
        task: the task, or the name of a task of the lab.
        arms: the arms, context arms included; same budget and tuning effort for all.
        budget: of each arm; default: the task's.
        seeds: number of paired runs (seeds 0, 1, ...), at least 5.
        measure: extra metrics of a finished run, `(fit, setting) -> {metric: value}`.
        trial: in place of task and arms: one seed's metrics of every arm at once, `setting -> {arm: {metric: value}}`.
        tried: what was tried to explain a verdict that is not "reproduced".
    """

    statement: str
    metric: str
    baseline: str
    method: str
    direction: Literal["higher", "lower"] = "higher"
    task: "Task | str | None" = None
    arms: tuple[Arm, ...] = ()
    budget: Budget | None = None
    seeds: int = 5
    measure: "Callable[[Fit, Setting], Mapping[str, float]] | None" = None
    trial: "Callable[[Setting], Mapping[str, Mapping[str, float]]] | None" = None
    tried: str = ""
