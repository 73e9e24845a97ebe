"""A task: data, a default model, a metric and training defaults under one name; and one trial's view of it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from coloss.errors import InputError
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.outcome import Fit
from coloss.train.schedules import Schedule, cosine
from coloss.train.step import Objective

Evaluate = Callable[[nn.Module, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Task:
    """What an arm is trained and judged on.

    Args:
        name: its name on the command line.
        kind: "classification", "regression", "multilabel", "retrieval", "self-supervised" or another that systems name, such as "next-token".
        title: one line for people.
        load: seed -> splits with `train`, `validation` and `test`; the seed draws the split.
        model: splits -> a fresh model; called under the trial's seed.
        objective: the task's own loss; None where a method must supply it.
        objective_name: name of the plain arm that trains with it, such as "cross-entropy".
        validate: (model, splits) -> metrics on validation data, for learning curves and early decisions.
        test: (model, splits) -> metrics on test data, once, for the shipped model.
        metric: which of them decides.
        direction: "higher" or "lower" is better.
        budget: default length of training.
        batch_size, optimizer, learning_rate_schedule, evaluate_every: training defaults, equal for all arms.
        teacher: splits -> a larger model, for methods that need a teacher; None if the task has none.
    """

    name: str
    kind: str
    title: str
    load: Callable[[int], Any]
    model: Callable[[Any], nn.Module]
    objective: Objective | None
    objective_name: str
    validate: Evaluate
    test: Evaluate
    metric: str
    direction: Literal["higher", "lower"] = "higher"
    budget: Budget = Budget(epochs=20)
    batch_size: int = 64
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = partial(torch.optim.AdamW, lr=2e-3)
    learning_rate_schedule: Schedule | None = field(default_factory=lambda: cosine(warmup=0.05))
    evaluate_every: int | None = None
    teacher: Callable[[Any], nn.Module] | None = None


@dataclass
class Setting:
    """One trial's view of its task: seed, splits, budget; and what methods may ask for before training.

    Attributes:
        task: the task.
        seed: of this trial.
        splits: the data of this seed.
        budget: of the trial.
        smoke: True when only the code is exercised, in seconds.
    """

    task: Task
    seed: int
    splits: Any
    budget: Budget
    smoke: bool = False

    @classmethod
    def of(cls, task: Task, seed: int, budget: Budget | None = None, smoke: bool = False) -> "Setting":
        """Load the task's data for a seed."""
        return cls(task, seed, task.load(seed), budget or task.budget, smoke)

    def new_model(self) -> nn.Module:
        """A fresh model, initialised by the trial's seed; the global random state is left as it was."""
        return self._seeded(self.task.model)

    def new_teacher(self) -> nn.Module:
        """A larger model trained on the same training data with the task's own recipe, in eval mode.

        Its training is not part of the budget; its cost is reported beside it as preparation.

        Raises:
            InputError: if the task has no teacher.
        """
        if self.task.teacher is None:
            raise InputError(f"task {self.task.name!r} has no teacher model: this method needs one")
        teacher = self._seeded(self.task.teacher)
        return self.fit(teacher, budget=Budget(steps=3) if self.smoke else self.task.budget).model.eval()

    def fit(
        self, model: nn.Module, objective: Objective | None = None, methods: Any = (), **options: Any
    ) -> Fit:
        """Train with the task's defaults; anything given in `options` goes to `fit` instead of them.

        An objective that is a module is copied first, so that what it learns stays within the run.
        """
        defaults: dict[str, Any] = {
            "budget": self.budget,
            "batch_size": self.task.batch_size,
            "optimizer": self.task.optimizer,
            "learning_rate_schedule": self.task.learning_rate_schedule,
            "seed": self.seed,
        }
        objective = objective if objective is not None else self.task.objective
        if isinstance(objective, nn.Module):
            objective = copy.deepcopy(objective)
        return fit(model, self.splits.train, objective, methods, **(defaults | options))

    def _seeded(self, build: Callable[[Any], nn.Module]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return build(self.splits)
