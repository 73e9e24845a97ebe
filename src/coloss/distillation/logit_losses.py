"""The losses that compare a student's logits with a teacher's, by name, each with the temperature that its authors use."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor

from coloss.errors import InputError
from coloss.ops import (
    binary_kl_loss,
    dist_loss,
    distillation_kl_loss,
    distributed,
    dkd_loss,
    logit_gap_loss,
    standardized_logits,
)

LossName: TypeAlias = Literal["kl", "dkd", "dist", "standardized", "binary_kl", "logit_gap"]


def standardized_kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """`distillation_kl_loss` of logits brought to mean 0 and variance 1: what the teacher prefers, whatever its scale.

    Args:
        student_logits: logits of the network that learns, classes last.
        teacher_logits: logits to match, same shape.
        temperature: > 0, of the standardised logits.

    Returns:
        A scalar, the mean over positions.

    Raises:
        ValueError: on unequal shapes or a temperature not above 0.

    Source:
        Sun et al. 2024, arXiv 2403.01427; there the loss is without the factor T^2, which stands in the weight.

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[0.0, 1.0, 5.0]])
        >>> standardized_kl_loss(3 * teacher + 1, teacher).abs() < 1e-6
        tensor(True)
    """
    return distillation_kl_loss(
        standardized_logits(student_logits), standardized_logits(teacher_logits), temperature
    )


def _whole_batch_dist_loss(student: Tensor, teacher: Tensor, temperature: float, **options: Any) -> Tensor:
    """DIST over the samples of all processes; token by token where there are more dimensions."""
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if distributed.is_distributed():
        student = distributed.gather_with_gradient(student)
        teacher = distributed.gather_with_gradient(teacher)
    return dist_loss(student, teacher, temperature, **options)


_KNOWN: dict[str, tuple[Callable[..., Tensor], float]] = {
    "kl": (distillation_kl_loss, 4.0),
    "dkd": (dkd_loss, 4.0),
    "dist": (dist_loss, 1.0),
    "standardized": (standardized_kl_loss, 2.0),
    "binary_kl": (binary_kl_loss, 2.0),
    "logit_gap": (logit_gap_loss, 2.0),
}

LogitFunction: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class LogitLoss:
    """A loss of student and teacher logits, ready to use: called with both and with the targets.

    Attributes:
        function: what computes it.
        temperature: handed to it.
        options: further keyword arguments for it.
        ignore_index: positions with this target do not count, whatever their logits hold; None counts all.

    Raises:
        InputError: when called, if `dkd_loss` or `ignore_index` finds no class numbers among the targets.
    """

    function: Callable[..., Tensor]
    temperature: float
    options: Mapping[str, float]
    ignore_index: int | None = None

    @property
    def batch_statistic(self) -> bool:
        """Whether it relates the samples of a batch to one another: DIST does, and a function whose `batch_statistic` is true."""
        function: Any = self.function
        while function is not None:
            if function is dist_loss or getattr(function, "batch_statistic", False):
                return True
            function = getattr(function, "func", None)  # of a functools.partial
        return False

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, targets: Any = None) -> Tensor:
        options: Mapping[str, Any] = self.options
        if self.ignore_index is not None:
            targets = self._classes(targets, f"ignore_index={self.ignore_index}")
            if targets.shape != student_logits.shape[:-1] or student_logits.shape != teacher_logits.shape:
                raise InputError(
                    f"ignore_index needs a target for each position, got targets {tuple(targets.shape)}, student logits "
                    f"{tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}"
                )
            counted = targets != self.ignore_index
            student_logits, teacher_logits = student_logits[counted], teacher_logits[counted]
            targets = targets[counted]
        if self.function is dkd_loss:
            classes = self._classes(targets, "loss='dkd'")
            return dkd_loss(student_logits, teacher_logits, classes, self.temperature, **options)
        function = _whole_batch_dist_loss if self.function is dist_loss else self.function
        return function(student_logits, teacher_logits, self.temperature, **options)

    @staticmethod
    def _classes(targets: Any, what: str) -> Tensor:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            kind = str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
            raise InputError(f"{what} needs class numbers as targets, got {kind}")
        return targets


def logit_loss(
    loss: LossName | LogitFunction,
    temperature: float | None = None,
    options: Mapping[str, float] | None = None,
    ignore_index: int | None = None,
) -> LogitLoss:
    """A loss by its name, or a function of one's own, with its temperature and options checked.

    Args:
        loss: a name, or a function of `(student_logits, teacher_logits, temperature)`; `functools.partial` of a function that has a name
            is that loss with these options.
        temperature: > 0; None takes the authors' for a name, 4 for a function.
        options: further arguments of the loss: `target_weight` and `other_weight` of "dkd", `class_weight` and `sample_weight` of "dist".
        ignore_index: positions with this target do not count.

    Raises:
        InputError: for an unknown name or option, or a temperature out of range.

    Examples:
        >>> import torch
        >>> found = logit_loss("dkd", options={"other_weight": 2.0})
        >>> found.temperature, found(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([1]))
        (4.0, tensor(0.))
    """
    if isinstance(loss, str):
        if loss not in _KNOWN:
            raise InputError(f"loss must be a function or one of {', '.join(_KNOWN)}, got {loss!r}")
        function, usual = _KNOWN[loss]
    else:
        function, usual = loss, 4.0
    known = [function for function, _ in _KNOWN.values()]
    bound: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args and _innermost(function) in known:
        bound, function = function.keywords | bound, function.func
    usual = bound.pop("temperature", usual)
    temperature = usual if temperature is None else temperature
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be > 0 and finite, got {temperature}")
    given = dict(options or {})
    if function in known:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        allowed = [parameter.name for parameter in keywords if parameter.name != "valid"]
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            rule = f"be among {', '.join(allowed)}" if allowed else "be left out"
            raise InputError(f"options of loss={loss!r} must {rule}, got {', '.join(unknown)}")
    return LogitLoss(function, float(temperature), bound | given, ignore_index)


def _innermost(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function
