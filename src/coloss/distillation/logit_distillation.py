"""Distillation on the student's own logits: Hinton's loss, or any other that compares two sets of logits.

The plain baseline of the family: one head, the ordinary backward pass, and a loss of student and teacher logits added to the objective.
By name:

    kl            probabilities, by their divergence (Hinton et al. 2015)                  T = 4
    dkd           the right class, and the others among themselves, apart (Zhao et al. 2022)    4
    dist          correlations over classes and over the batch (Huang et al. 2022)              1
    standardized  kl of logits brought to mean 0 and variance 1 (Sun et al. 2024)               2
    binary_kl     a coin for each class                                                         2
    logit_gap     the logits themselves, by log-cosh (Yang et al. 2024)                         2
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from coloss.distillation.teacher import TeacherLogits, teacher_for_setting
from coloss.errors import InputError
from coloss.ops import (
    binary_kl_loss,
    dist_loss,
    distillation_kl_loss,
    dkd_loss,
    logit_gap_loss,
    standardized_logits,
)
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.task import Setting

LossName = Literal["kl", "dkd", "dist", "standardized", "binary_kl", "logit_gap"]


def _standardized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return distillation_kl_loss(standardized_logits(student), standardized_logits(teacher), temperature)


_LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "kl": (distillation_kl_loss, 4.0),
    "dkd": (dkd_loss, 4.0),
    "dist": (dist_loss, 1.0),
    "standardized": (_standardized, 2.0),
    "binary_kl": (binary_kl_loss, 2.0),
    "logit_gap": (logit_gap_loss, 2.0),
}


class LogitDistillation(Method):
    """Pull the student's output towards a teacher's logits while it trains on its own objective.

    Adds the term `logit_distillation`. The run's combiner, or `weight`, scales it.

    Args:
        teacher: network that gives logits for the same inputs; frozen in place.
        loss: a name of the table above, or a function that compares `(student_logits, teacher_logits, temperature)`.
        temperature: > 0, handed to `loss`; None takes that of the table, 4 for a function.
        weight: number or schedule of progress. While a schedule is 0 the teacher does not run.
        center_teacher: take off each sample's mean teacher logit.
        teacher_logits: (samples, classes) indexed by sample id, in place of a teacher; see `tabulate_teacher_logits`.

    Raises:
        InputError: if not exactly one of `teacher` and `teacher_logits` is given, the temperature is not > 0, or the loss is unknown;
            in a run, if "dkd" finds no class numbers among the targets.

    Cost: one forward pass of the teacher per step.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.

    Examples:
        >>> import torch, coloss
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> teacher = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> run = coloss.fit(
        ...     nn.Linear(4, 3),
        ...     data,
        ...     nn.functional.cross_entropy,
        ...     [LogitDistillation(teacher, weight=0.5)],
        ...     budget=coloss.Budget(epochs=1),
        ... )
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'logit_distillation']
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        loss: LossName | Callable[[Tensor, Tensor, float], Tensor] = "kl",
        temperature: float | None = None,
        weight: Schedule = 1.0,
        center_teacher: bool = False,
        teacher_logits: Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(loss, str) and loss not in _LOSSES:
            raise InputError(f"loss must be a function or one of {', '.join(_LOSSES)}, got {loss!r}")
        self.loss: Callable[..., Tensor]
        self.loss, usual = _LOSSES[loss] if isinstance(loss, str) else (loss, 4.0)
        temperature = usual if temperature is None else temperature
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
        self.teacher = TeacherLogits(teacher, teacher_logits, center=center_teacher)
        self.temperature, self.weight = float(temperature), weight
        # DIST correlates the samples of a batch with each other.
        self.batch_statistic = self.loss is dist_loss
        self.term_weights = {"logit_distillation": weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        if value_at(self.weight, state.progress) == 0:
            return {"logit_distillation": state.outputs[:0].sum()}
        others = []
        if self.loss is dkd_loss:
            targets = state.batch.targets
            if not isinstance(targets, Tensor) or targets.is_floating_point():
                raise InputError(f"loss='dkd' needs class numbers as targets, got {_kind(targets)}")
            others = [targets]
        found = self.loss(state.outputs, self.teacher(state.batch), *others, self.temperature)
        return {"logit_distillation": found}

    @classmethod
    def for_setting(
        cls, setting: Setting, *, teacher: str | None = None, **parameters: Any
    ) -> "LogitDistillation":
        """Build it for a task of the lab; `teacher` is the path of stored weights, else one is trained."""
        return cls(teacher_for_setting(setting, teacher), **parameters)


def _kind(targets: Any) -> str:
    return str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
