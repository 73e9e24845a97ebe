"""Distillation on the student's own logits: Hinton's loss, or any other that compares two sets of logits.

The plain baseline of the family: one head, the ordinary backward pass, and a loss of student and teacher logits added to the objective.
By name:

    kl            probabilities, by their divergence (Hinton et al. 2015)                  T = 4
    dkd           the right class, and the others among themselves, apart (Zhao et al. 2022)    4
    dist          correlations over classes and over the batch (Huang et al. 2022)              1
    standardized  kl of logits brought to mean 0 and variance 1 (Sun et al. 2024)               2
    binary_kl     a coin for each class                                                         2
    logit_gap     the logits themselves, by log-cosh (Yang et al. 2024)                         2

Measured: 77 kinds of questions to a bank, 1,536 for training, a student of eight features, a teacher of width 256 (73.5% on test
questions); learning rate, weight decay and weight searched for each with equal effort on other seeds, means of 5 seeds, difference to
cross-entropy with its 95% interval (the evidence of `dhkd`):

                    weight   accuracy   difference        log-likelihood (minus)   calibration error
    cross-entropy              61.6%                              1.61                  0.048
    kl               0.03      61.4%    -0.2 +- 0.8               1.58                  0.032
    logit_gap        0.003     60.7%    -1.0 +- 1.4               1.61                  0.059

So on one head a teacher gave no accuracy here that a well regularised cross-entropy has not, and kl a little better probabilities. With
weight decay 5e-4 for all (cross-entropy then has 60.3%, minus log-likelihood 2.13, calibration error 0.164), dkd, dist, standardized and
binary_kl were within 0.4 points of one another, too, and dkd as well calibrated as kl. Best weights differ by a factor of a thousand:
search them. A second head for the logit gap (`DualHeadDistillation`) has 64.6%.

"dist" relates the samples of a batch to one another: over all processes, and gradient accumulation joins the micro-batches.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from coloss.distillation.conflict_report import conflict_report
from coloss.distillation.logit_losses import LogitFunction, LossName, logit_loss
from coloss.distillation.teacher import TeacherLogits, refuse_shared_parameters, teacher_for_setting
from coloss.errors import InputError
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.task import Setting
from coloss.train.teacher_table import OUTPUT, TeacherTable


class LogitDistillation(Method):
    """Pull the student's output towards a teacher's logits while it trains on its own objective.

    Adds the term `logit_distillation`. The run's combiner, or `weight`, scales it.

    Args:
        teacher: network that gives logits for the same inputs; frozen in place.
        loss: a name of the table above, or a function that compares `(student_logits, teacher_logits, temperature)`.
        temperature: > 0, handed to `loss`; None takes that of the table, 4 for a function.
        weight: number >= 0 or schedule of progress. While it is 0 the teacher does not run.
        warmup: share of training, in [0, 1), over which the weight grows from 0 to its value; for "dkd" the authors take 20 of 240 epochs. A
            loop of your own must give `TrainingStep(total_steps=...)`, or the weight stays 0.
        options: further arguments of the loss, such as `{"other_weight": 4.0}` of "dkd", whose best value depends on the two networks.
        ignore_index: positions with this target do not count, such as -100 for padding in a text; None counts all. The mean is over the
            positions that count, in each process by itself.
        center_teacher: take off each sample's mean teacher logit. Only "binary_kl" and "logit_gap" see the difference.
        teacher_logits: in place of a teacher: what `coloss.train.cache_teacher` stored, or a tensor (samples, classes) indexed by sample
            id.
        student_logits: module path whose output is the student's logits, for a student that returns something else; default: what it
            returns.
        teacher_logits_path: likewise, module path whose output is the teacher's logits; of a table, the name that they are stored under.
        report_conflict: after a run of the lab, add to the arm's metrics how the gradients of objective and distillation agree
            (`conflict_report`); shows whether a second head may help. Not with `student_logits`.

    Raises:
        InputError: if not exactly one of `teacher` and `teacher_logits` is given, a value is out of range, the loss or an option of it is
            unknown, `report_conflict` comes with `student_logits`, or the teacher has no such path or shares parameters with the student;
            in a run, if "dkd" or `ignore_index` finds no class numbers among the targets, or the student or teacher gives no tensor; on
            resuming with another table.

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
        ...     [LogitDistillation(teacher, loss="dkd", weight=0.5, warmup=0.1)],
        ...     budget=coloss.Budget(epochs=1),
        ... )
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'logit_distillation']
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        loss: LossName | LogitFunction = "kl",
        temperature: float | None = None,
        weight: Schedule = 1.0,
        warmup: float = 0.0,
        options: Mapping[str, float] | None = None,
        ignore_index: int | None = None,
        center_teacher: bool = False,
        teacher_logits: Tensor | TeacherTable | None = None,
        student_logits: str | None = None,
        teacher_logits_path: str | None = None,
        report_conflict: bool = False,
    ) -> None:
        super().__init__()
        if report_conflict and student_logits is not None:
            raise InputError("report_conflict needs a student that returns its logits, not student_logits")
        self.loss = logit_loss(loss, temperature, options, ignore_index)
        self.teacher = TeacherLogits(
            teacher, teacher_logits, center=center_teacher, path=teacher_logits_path or OUTPUT
        )
        self.weight = term_weight(weight, warmup=warmup)
        self.student_logits, self.report_conflict = student_logits, report_conflict
        self.batch_statistic = self.loss.batch_statistic
        self.term_weights = {"logit_distillation": self.weight}
        self._objective: tuple[Any, ...] = ()

    def setup(self, state: State) -> None:
        refuse_shared_parameters(self.teacher, state.model)
        if self.student_logits is not None:
            state.tap(f"logits of {self.student_logits}", self.student_logits)
        self._objective = (
            state.objective,
        )  # in a tuple, so that a module is not registered as a part of this one

    def terms(self, state: State) -> dict[str, Tensor]:
        student = (
            state.outputs
            if self.student_logits is None
            else state.features[f"logits of {self.student_logits}"]
        )
        if not isinstance(student, Tensor):
            raise InputError(
                f"the student must give a tensor of logits, got {type(student).__name__}: name the module that does with student_logits"
            )
        if value_at(self.weight, state.progress) == 0:
            return {"logit_distillation": student[:0].sum()}
        teacher = self.teacher(state.batch).to(student.device)
        return {"logit_distillation": self.loss(student, teacher, state.batch.targets)}

    def finish(self, state: State) -> None:
        """Take the hook of `teacher_logits_path` out of the teacher."""
        self.teacher.unwatch()

    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        """With `report_conflict`: the mean cosines of `conflict_report`, between the run's objective and this loss."""
        objective = self._objective[0] if self._objective else None
        if not self.report_conflict or objective is None:
            return {}
        found = conflict_report(model, self.teacher, data, loss=self.loss, objective=objective)
        return found.metrics()

    @classmethod
    def for_setting(
        cls, setting: Setting, *, teacher: str | None = None, **parameters: Any
    ) -> "LogitDistillation":
        """Build it for a task of the lab; `teacher` is the path of stored weights, else one is trained."""
        return cls(teacher_for_setting(setting, teacher), **parameters)


def term_weight(weight: Schedule, *, warmup: float = 0.0, until: float = 1.0) -> Schedule:
    """The weight of a distillation term over training: grows from 0 at the start, and is 0 late, where that is asked for.

    Args:
        weight: number >= 0 or schedule of progress.
        warmup: share of training, in [0, 1), over which it grows linearly.
        until: share of training, in (0, 1], after which it is 0.

    Returns:
        The weight itself where nothing is asked for, else a schedule.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> schedule = term_weight(0.4, warmup=0.5, until=0.75)
        >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75)]
        [0.0, 0.2, 0.4, 0.0]
    """
    if not callable(weight) and not 0 <= weight < math.inf:
        raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
    if not 0 <= warmup < 1:
        raise InputError(f"warmup must be in [0, 1), got {warmup}")
    if not 0 < until <= 1:
        raise InputError(f"until must be in (0, 1], got {until}")
    if warmup == 0 and until == 1:
        return weight

    def schedule(progress: float) -> float:
        if until < 1 and progress >= until:
            return 0.0
        return value_at(weight, progress) * (min(progress / warmup, 1.0) if warmup else 1.0)

    return schedule
