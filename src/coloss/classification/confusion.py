"""Confusion counts that gradients flow through; `coloss.classification.confusion_metrics` are functions of these four numbers.

With p_i the probability of a class, y_i in [0, 1] whether sample i belongs to it, and A the amplifier:

    s_i = A(p_i) = 1 / (1 + exp(-L (p_i - 1/2)))                 soft decision, L the amplification
    TP  = sum_i y_i s_i             FP = sum_i (1 - y_i) s_i
    FN  = sum_i y_i (1 - s_i)       TN = sum_i (1 - y_i) (1 - s_i)

As L grows the soft decisions become those of a threshold at 1/2, and the metrics those that one reports; without an amplifier
(s_i = p_i) the F1 score is the soft Dice score. Among C classes of which one is right the amplifier is a softmax of L p / 2,
whose decision is that of the largest probability; for C = 2 it is the A above.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.ops import all_reduce_mean, full_precision, world_size


@dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """How many samples of which kind were decided how; soft decisions count in parts.

    Each is a scalar, or holds one number for each class held against the rest. Unpacks as `tp, fp, fn, tn`; `+` joins the counts
    of two batches.

    Attributes:
        true_positive: positives that are predicted.
        false_positive: negatives that are predicted.
        false_negative: positives that are not.
        true_negative: negatives that are not.

    Examples:
        >>> counts = soft_confusion(torch.tensor([0.9, 0.2, 0.4]), torch.tensor([1, 0, 1]))
        >>> [round(float(count), 1) for count in counts]
        [1.3, 0.2, 0.7, 0.8]
        >>> (counts + counts).positives
        tensor(4.)
    """

    true_positive: Float[Tensor, "*classes"]
    false_positive: Float[Tensor, "*classes"]
    false_negative: Float[Tensor, "*classes"]
    true_negative: Float[Tensor, "*classes"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.true_positive, self.false_positive, self.false_negative, self.true_negative))

    def __add__(self, other: "ConfusionCounts") -> "ConfusionCounts":
        return ConfusionCounts(*(mine + theirs for mine, theirs in zip(self, other)))

    @property
    def positives(self) -> Tensor:
        """Samples of the class."""
        return self.true_positive + self.false_negative

    @property
    def negatives(self) -> Tensor:
        """Samples of other classes."""
        return self.false_positive + self.true_negative

    @property
    def predicted(self) -> Tensor:
        """Samples that the class is predicted for."""
        return self.true_positive + self.false_positive

    @property
    def rejected(self) -> Tensor:
        """Samples that it is not predicted for."""
        return self.false_negative + self.true_negative

    def summed(self) -> "ConfusionCounts":
        """The counts of all classes together, for micro averages."""
        return ConfusionCounts(*(count.sum() for count in self))

    def of_class(self, number: int) -> "ConfusionCounts":
        """The counts of one class."""
        return ConfusionCounts(*(count[number] for count in self))


def amplify(probabilities: Float[Tensor, "*shape"], amplification: float = 73.0) -> Float[Tensor, "*shape"]:
    """Soft yes or no decisions of probabilities: A(p) = 1 / (1 + exp(-amplification * (p - 1/2))).

    Args:
        probabilities: in [0, 1].
        amplification: L > 0. The slope in p is L / 4 at 1/2, and about L exp(-L |p - 1/2|) far from it: at L = 73 nothing flows
            back from p = 0.1.

    Returns:
        Values in [A(0), A(1)], of the shape of `probabilities`.

    Raises:
        ValueError: if `amplification` is not > 0 and finite.

    Source:
        Han, Moniz and Chawla, 2024, arXiv 2405.14745.

    Examples:
        >>> amplify(torch.tensor([0.4, 0.5, 0.6]), amplification=20.0)
        tensor([0.1192, 0.5000, 0.8808])
    """
    _check_amplification(amplification)
    return _split_sigmoid(amplification * (full_precision(probabilities) - 0.5))[0]


def amplify_classes(
    probabilities: Float[Tensor, "batch classes"], amplification: float = 73.0
) -> Float[Tensor, "batch classes"]:
    """Soft choice of one among several classes: softmax(amplification / 2 * p).

    With two classes it is `amplify` of each probability. With more, held against 1/2, all decisions of an untrained network would
    be no, without a gradient; here the largest probability wins.

    Args:
        probabilities: rows that sum to 1.
        amplification: L > 0.

    Returns:
        Rows that sum to 1.

    Raises:
        ValueError: if `amplification` is not > 0 and finite.

    Examples:
        >>> amplify_classes(torch.tensor([[0.4, 0.6], [0.5, 0.5]]), amplification=20.0)
        tensor([[0.1192, 0.8808],
                [0.5000, 0.5000]])
    """
    _check_amplification(amplification)
    return (0.5 * amplification * full_precision(probabilities)).softmax(1)


def soft_confusion(
    probabilities: Float[Tensor, "batch *classes"],
    target: Shaped[Tensor, "batch *labels"],
    *,
    amplification: float | None = None,
    from_logits: bool = False,
    weight: Float[Tensor, " batch"] | None = None,
) -> ConfusionCounts:
    """Confusion counts of soft decisions, differentiable in the probabilities.

    Args:
        probabilities: (batch,) of one class, or (batch, classes).
        target: of the shape of `probabilities`, 0 / 1 or in between (soft labels make soft counts), where each column is a question
            of its own; or class numbers (batch,) for (batch, classes), where one class is right.
        amplification: L of `amplify`, for class numbers of `amplify_classes`; None counts the probabilities themselves.
        from_logits: take a sigmoid first, for class numbers a softmax.
        weight: of each sample, >= 0; a sample counts as so many.

    Returns:
        Scalars for (batch,), one number for each class for (batch, classes); at least float32. An empty batch gives zeros.

    Raises:
        ValueError: if shapes do not fit, a target is out of range, or `amplification` is not > 0 and finite.

    Cost: O(batch * classes) time and memory.

    Examples:
        >>> counts = soft_confusion(torch.tensor([2.0, -1.0]), torch.tensor([1, 1]), from_logits=True)
        >>> counts.positives, bool(counts.true_positive < 1.2)
        (tensor(2.), True)
        >>> soft_confusion(torch.eye(3), torch.tensor([0, 1, 1])).true_positive
        tensor([1., 1., 0.])
    """
    if amplification is not None:
        _check_amplification(amplification)
    scores = full_precision(probabilities)
    exclusive = scores.ndim == 2 and target.ndim == 1
    _check_target(scores, target, exclusive)
    if exclusive:
        if from_logits:
            scores = scores.softmax(1)
        chosen = scores if amplification is None else amplify_classes(scores, amplification)
        rejected = 1 - chosen
        applies = (target.unsqueeze(1) == torch.arange(scores.shape[1], device=target.device)).to(
            scores.dtype
        )
    else:
        chosen, rejected = _split_sigmoid(scores) if from_logits else (scores, 1 - scores)
        if amplification is not None:
            chosen, rejected = _split_sigmoid(amplification * (chosen - 0.5))
        applies = target.to(scores.dtype)
    if weight is None:
        positive, negative = applies, 1 - applies
    else:
        rows = weight.to(scores.dtype)
        rows = rows if scores.ndim == 1 else rows.unsqueeze(1)
        positive, negative = rows * applies, rows * (1 - applies)
    return ConfusionCounts(
        *(
            (side * decision).sum(0)
            for side, decision in (
                (positive, chosen),
                (negative, chosen),
                (positive, rejected),
                (negative, rejected),
            )
        )
    )


def all_reduce_counts(counts: ConfusionCounts) -> ConfusionCounts:
    """Counts over the batches of all processes, differentiable; the counts themselves on one process.

    A metric of these counts is that of the joined batch, and after the averaging of data-parallel training so is its gradient.

    Args:
        counts: of this process; of one shape on every process.

    Cost: one collective of four numbers for each class forward, one backward.

    Examples:
        >>> counts = soft_confusion(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
        >>> all_reduce_counts(counts).positives
        tensor(1.)
    """
    processes = world_size()
    if processes == 1:
        return counts
    return ConfusionCounts(*(all_reduce_mean(torch.stack(list(counts))) * processes).unbind(0))


def _split_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and 1 - sigmoid(x), with gradients that do not round to zero where one of them rounds to one."""
    up, down = torch.sigmoid(x), torch.sigmoid(-x)
    positive = x > 0
    return torch.where(positive, 1 - down, up), torch.where(positive, down, 1 - up)


def _check_amplification(amplification: float) -> None:
    if not 0 < amplification < float("inf"):
        raise ValueError(f"amplification must be > 0 and finite, got {amplification}")


def _check_target(scores: Tensor, target: Tensor, exclusive: bool) -> None:
    shape = tuple(scores.shape)
    if scores.ndim not in (1, 2):
        raise ValueError(f"probabilities must be (batch,) or (batch, classes), got {shape}")
    if len(target) != len(scores) or not (exclusive or target.shape == scores.shape):
        raise ValueError(
            f"target must have the shape of probabilities {shape} or be class numbers, got {tuple(target.shape)}"
        )
    if exclusive and target.is_floating_point():
        raise ValueError(f"target must be class numbers for probabilities {shape}, got {target.dtype}")
    if target.numel() and target.dtype != torch.bool:
        low, high = target.min(), target.max()
        largest = scores.shape[1] - 1 if exclusive else 1
        if not bool((low >= 0) & (high <= largest)):
            raise ValueError(
                f"target must be in [0, {largest}], got values from {low.item()} to {high.item()}"
            )
