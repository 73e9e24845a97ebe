"""Distillation on the student's own logits: Hinton's loss, or any other that compares two sets of logits.

The plain baseline of the family: one head, the ordinary backward pass, and `loss(student_logits, teacher_logits, temperature)`
added to the objective. Hinton, Vinyals, Dean 2015, arXiv 1503.02531.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from coloss.distillation.teacher import TeacherLogits, teacher_for_setting
from coloss.errors import InputError
from coloss.ops import distillation_kl_loss
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.task import Setting


class LogitDistillation(Method):
    """Pull the student's output towards a teacher's logits while it trains on its own objective.

    Adds the term `logit_distillation` = `loss(outputs, teacher logits, temperature)`. The run's combiner, or `weight`, scales it.

    Args:
        teacher: network that gives logits for the same inputs; frozen in place.
        loss: compares `(student_logits, teacher_logits, temperature)`, such as `distillation_kl_loss` or `logit_gap_loss`.
        temperature: > 0, handed to `loss`.
        weight: number or schedule of progress. While a schedule is 0 the teacher does not run.
        center_teacher: take off each sample's mean teacher logit.
        teacher_logits: (samples, classes) indexed by sample id, in place of a teacher; see `tabulate_teacher_logits`.

    Raises:
        InputError: if not exactly one of `teacher` and `teacher_logits` is given, or the temperature is not > 0.

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
        loss: Callable[[Tensor, Tensor, float], Tensor] = distillation_kl_loss,
        temperature: float = 4.0,
        weight: Schedule = 1.0,
        center_teacher: bool = False,
        teacher_logits: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
        self.teacher = TeacherLogits(teacher, teacher_logits, center=center_teacher)
        self.loss, self.temperature, self.weight = loss, float(temperature), weight
        self.term_weights = {"logit_distillation": weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        if value_at(self.weight, state.progress) == 0:
            return {"logit_distillation": state.outputs[:0].sum()}
        teacher_logits = self.teacher(state.batch)
        return {"logit_distillation": self.loss(state.outputs, teacher_logits, self.temperature)}

    @classmethod
    def for_setting(
        cls, setting: Setting, *, teacher: str | None = None, **parameters: Any
    ) -> "LogitDistillation":
        """Build it for a task of the lab; `teacher` is the path of stored weights, else one is trained."""
        return cls(teacher_for_setting(setting, teacher), **parameters)
