r"""Losses for labels that a weaker model made: let the student overrule them where it is sure.

With student probabilities $p_i$, weak labels $q_i$ (probabilities of the classes) and a target $t_i$ that no gradient enters:

    confidence    t_i = (1 - a) q_i + a h_i,      h_i the student's own prediction, hardened to one class
    product       t_i proportional to p_i^b q_i^a over the classes
    window        t_i = q_i, only for samples on which the student is unsure
    loss          -1/B sum_i sum_c t_ic log p_ic

Weak labels are class probabilities (batch, classes), or class numbers (batch) for hard ones.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.classification.hardening import (
    Student,
    balanced_assignment,
    hardened_predictions,
    label_probabilities,
)
from coloss.errors import InputError
from coloss.ops import distributed, soft_cross_entropy_loss
from coloss.ops.distributed import gather_with_gradient
from coloss.ops.precision import full_precision
from coloss.train.schedules import Schedule, value_at

Reduction = Literal["mean", "sum", "none"]


def confidence_loss(
    logits: Float[Tensor, "batch classes"],
    weak_labels: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
    alpha: float,
    *,
    student: Student = "balanced",
    threshold: float | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy against a mixture of weak labels and the student's own hardened predictions.

    (1 - alpha) CE(p, q) + alpha CE(p, h), which is CE against (1 - alpha) q + alpha h. No gradient flows through h.

    With `student="balanced"` the share of the batch hardened to each class equals the weak labels' mean for that class (to the
    nearest sample), which keeps the student from collapsing to one class: for two classes the samples are ranked by their
    log-odds, as the authors do by a quantile; ties go by weak label. For more classes, an extension, the hardened labels are the most
    likely ones of those with these shares. The rule belongs to a batch: micro-batches of a few samples need
    `ConfidenceLoss(memory=...)`. With several processes the samples of all of them are ranked together.

    Args:
        logits: of the student.
        weak_labels: q, probabilities; or class numbers.
        alpha: share of the student's own prediction in the target, in [0, 1].
        student: h is "balanced" as above; "argmax", the likeliest class; or "soft", the probabilities themselves, detached.
        threshold: in place of the balance, for two classes: h is class 0 where its probability reaches this.
        weight: factor for each class, as in `torch.nn.functional.cross_entropy` with probabilities as targets.
        reduction: "mean", "sum", or "none" (batch) where no balance is taken over the batch.

    Returns:
        The loss, at least float32; the mean over an empty batch is 0.

    Raises:
        ValueError: on shapes that do not fit, values out of range, or reduction "none" with a balance.

    Cost:
        O(batch log batch) for two classes; for more an assignment problem on the CPU, about cubic: 0.3 ms for 64 samples, 2 ms for
        256, 40 ms for 1024.

    Source:
        Burns et al., 2023, arXiv 2312.09390.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.1], [0.0, 3.0], [1.0, 0.0]])
        >>> weak = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.0, 1.0], [0.2, 0.8]])
        >>> confidence_loss(logits, weak, 0.0) == torch.nn.functional.cross_entropy(logits, weak)
        tensor(True)
        >>> round(confidence_loss(logits, weak, 0.5).item(), 4)  # half of them are hardened to each class
        0.4195
    """
    _check_alpha(alpha)
    _check_reduction(reduction)
    if reduction == "none" and student == "balanced" and threshold is None:
        raise InputError(
            'reduction must be "mean" or "sum" with student="balanced": which class a sample is hardened to depends on the others; '
            'give a threshold, or student="argmax" or "soft", for reduction "none"'
        )
    weak = label_probabilities(logits, weak_labels)
    own = hardened_predictions(logits, weak, student=student, threshold=threshold)
    return _against((1 - alpha) * weak + alpha * own, logits, weight, reduction)


confidence_loss.batch_statistic = True  # type: ignore[attr-defined]


def product_loss(
    logits: Float[Tensor, "batch classes"],
    weak_labels: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
    *,
    weak_power: float = 1.0,
    strong_power: float = 1.0,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy against the normalised product of what the weak model and the student say, each to a power.

    Args:
        logits: of the student.
        weak_labels: probabilities, or class numbers, which leave the student nothing to say.
        weak_power: >= 0; 0 leaves the weak labels out.
        strong_power: >= 0; 0 gives plain cross-entropy against the weak labels (to the power `weak_power`).
        weight: factor for each class.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, at least float32. A sample on which the two exclude each other keeps its weak label.

    Raises:
        ValueError: on shapes that do not fit, or values out of range.

    Source:
        The code released with Burns et al., 2023, arXiv 2312.09390; not in the paper.

    Examples:
        >>> logits = torch.tensor([[1.0, 0.0]])
        >>> even = torch.tensor([[0.5, 0.5]])
        >>> torch.allclose(product_loss(logits, even), torch.special.entr(logits.softmax(1)).sum())
        True
    """
    for name, power in (("weak_power", weak_power), ("strong_power", strong_power)):
        if not 0 <= power < math.inf:
            raise InputError(f"{name} must be >= 0 and finite, got {power}")
    _check_reduction(reduction)
    weak = label_probabilities(logits, weak_labels)
    with torch.no_grad():
        scores = torch.zeros_like(weak)
        if strong_power > 0:
            scores = scores + strong_power * torch.log_softmax(full_precision(logits), dim=1)
        if weak_power > 0:
            scores = scores + weak_power * weak.log()
        possible = (scores > -math.inf).any(1, keepdim=True)
        target = torch.where(possible, scores.softmax(1), weak)
    return _against(target, logits, weight, reduction)


def window_loss(
    logits: Float[Tensor, "batch classes"],
    weak_labels: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
    radius: float = 0.15,
    *,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy against the weak labels, only where the student is unsure.

    Counts samples whose largest probability is below 1 / classes + radius (1/2 + radius for two classes); the mean is over all
    samples, so the gradient shrinks as the student becomes sure.

    Args:
        logits: of the student.
        weak_labels: probabilities, or class numbers.
        radius: >= 0; from 1 - 1 / classes on every sample that is not entirely sure counts.
        weight: factor for each class.
        reduction: "mean", "sum" or "none" (0 for samples that do not count).

    Returns:
        The loss, at least float32.

    Raises:
        ValueError: on shapes that do not fit, or a negative radius.

    Source:
        EleutherAI's variant of the code of Burns et al.; for more than two classes an extension.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
        >>> round(window_loss(logits, torch.tensor([1, 1])).item(), 4)  # log 2, and nothing
        0.3466
    """
    if not radius >= 0:
        raise InputError(f"radius must be >= 0, got {radius}")
    _check_reduction(reduction)
    weak = label_probabilities(logits, weak_labels)
    sure = full_precision(logits.detach()).softmax(1).amax(1) >= 1 / logits.shape[1] + radius
    return _against(torch.where(sure.unsqueeze(1), 0.0, weak), logits, weight, reduction)


def balanced_weak_labels(
    weak_labels: Float[Tensor, "samples classes"], floor: float = 1e-6
) -> Float[Tensor, "samples classes"]:
    """Weak labels without the weak model's preference for a class: each class's mean log-probability is taken off.

    For two classes this subtracts the mean log-odds. To be done once for the whole data set, where classes are equally frequent.

    Args:
        weak_labels: probabilities.
        floor: probabilities below count as this, in (0, 1).

    Returns:
        Probabilities.

    Raises:
        ValueError: if `floor` is out of range.

    Source:
        EleutherAI's variant of the code of Burns et al.

    Examples:
        >>> balanced_weak_labels(torch.tensor([[0.8, 0.2], [0.8, 0.2]]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    if not 0 < floor < 1:
        raise InputError(f"floor must be in (0, 1), got {floor}")
    logs = full_precision(weak_labels).clamp(min=floor).log()
    return (logs - logs.mean(0, keepdim=True)).softmax(1) if len(logs) else full_precision(weak_labels)


class ConfidenceLoss(nn.Module):
    """`confidence_loss` with a schedule for alpha, and a memory for small batches.

    Args:
        alpha: a number in [0, 1], or a schedule of progress such as `linear_warmup(0.75, 0.2)`.
        student: "balanced", "argmax" or "soft".
        threshold: for two classes, in place of the balance.
        memory: with "balanced", rank each batch among the last so many samples as well, so that batches of a few samples have a
            meaningful balance; saved with the state. 0 ranks the batch alone.
        weight: factor for each class.
        reduction: "mean", "sum", or "none" where no balance is taken.

    Attributes:
        batch_statistic: True where the value belongs to the batch as a whole: with "balanced" and no memory.

    Returns:
        From `forward(logits, weak_labels, progress=1.0)`: the loss at that progress.

    Raises:
        InputError: for values out of range.

    Examples:
        >>> loss = ConfidenceLoss(alpha=0.5, memory=32)
        >>> weak = torch.tensor([[0.2, 0.8]])
        >>> loss(torch.tensor([[0.0, 1.0]]), weak) < loss(torch.tensor([[1.0, 0.0]]), weak)
        tensor(True)
    """

    def __init__(
        self,
        alpha: Schedule = 0.75,
        *,
        student: Student = "balanced",
        threshold: float | None = None,
        memory: int = 0,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not callable(alpha):
            _check_alpha(alpha)
        if student not in ("balanced", "argmax", "soft"):
            raise InputError(f'student must be "balanced", "argmax" or "soft", got {student!r}')
        if memory < 0:
            raise InputError(f"memory must be >= 0, got {memory}")
        balanced = student == "balanced" and threshold is None
        if memory and not balanced:
            raise InputError('memory is for student="balanced" without a threshold: leave it out')
        if reduction == "none" and balanced:
            raise InputError(
                'reduction must be "mean" or "sum" with student="balanced": samples depend on each other'
            )
        _check_reduction(reduction)
        self.alpha, self.student, self.threshold, self.memory = alpha, student, threshold, memory
        self.reduction: Reduction = reduction
        self.batch_statistic = balanced and not memory
        self.register_buffer("weight", weight, persistent=False)
        # (samples, 2, classes): log-probabilities and weak labels. Not a buffer, since its size is known with the first batch.
        self._seen: Tensor | None = None

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        weak_labels: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
        progress: float = 1.0,
    ) -> Float[Tensor, "..."]:
        alpha = value_at(self.alpha, progress)
        weight: Any = self.weight
        if not self.memory:
            return confidence_loss(
                logits,
                weak_labels,
                alpha,
                student=self.student,
                threshold=self.threshold,
                weight=weight,
                reduction=self.reduction,
            )
        _check_alpha(alpha)
        weak = label_probabilities(logits, weak_labels)
        return _against(
            (1 - alpha) * weak + alpha * self._remembering(logits, weak), logits, weight, self.reduction
        )

    @torch.no_grad()
    def _remembering(self, logits: Tensor, weak: Tensor) -> Tensor:
        """Harden a batch in the company of those before it, and add it to them; the newest samples are kept."""
        owner = torch.full((len(logits),), distributed.rank(), device=logits.device)
        log_probabilities = torch.log_softmax(full_precision(logits), dim=1)
        present = gather_with_gradient(torch.stack([log_probabilities, weak], dim=1))
        before = present[:0] if self._seen is None else self._seen.to(present)
        joined = torch.cat([before, present])
        scores, labels = joined.unbind(1)
        chosen = balanced_assignment(scores, labels.mean(0), labels)[len(before) :]
        self._seen = joined[-self.memory :]
        chosen = chosen[gather_with_gradient(owner) == distributed.rank()]
        return torch.nn.functional.one_hot(chosen, logits.shape[1]).to(log_probabilities.dtype)

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": None if self._seen is None else self._seen.tolist()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        seen = state["seen"]
        self._seen = None if seen is None else torch.tensor(seen, dtype=torch.float64)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _against(target: Tensor, logits: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    target = target if weight is None else target * weight.to(target)
    return soft_cross_entropy_loss(
        logits, target, reduction="batchmean" if reduction == "mean" else reduction
    )
