"""Any metric of confusion counts as a loss of a batch: the function and the module."""

import re
from typing import Any, Literal

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coloss.classification.confusion import ConfusionCounts, all_reduce_counts, soft_confusion
from coloss.classification.confusion_metrics import Metric, find_metric

Average = Literal["binary", "macro", "micro"]
Reduction = Literal["mean", "sum"]


def metric_loss(
    input: Float[Tensor, "batch *classes"],
    target: Shaped[Tensor, "batch *labels"],
    metric: str | Metric = "f1",
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    amplification: float = 73.0,
    average: Average | None = None,
    positive: int = 1,
    from_logits: bool = True,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """1 - metric of the batch, by soft decisions: what to minimise where that metric is to be maximised.

    Takes the place of `F.binary_cross_entropy_with_logits(input, target)` and of `F.cross_entropy(input, target)`. It belongs to the
    batch as a whole (attribute `batch_statistic`): the mean over batches is not the metric of the set, and a batch should hold
    several positives, so take large or stratified ones.

    Args:
        input: logits: (batch,) or (batch, 1) of one class; (batch, classes, ...).
        target: 0 / 1 of the shape of `input`, where each column is a label of its own; or class numbers, without the dimension of
            classes.
        metric: name of a score (`coloss.classification.confusion_metrics.METRICS`, "f1", "f2", ...), or any elementwise function of
            `ConfusionCounts`, larger is better.
        weight: of each class in the macro average, >= 0.
        ignore_index: class number (or label, for (batch,)) of samples to leave out.
        reduction: `"mean"`: the loss; `"sum"`: times the number of samples. There is no loss of a single sample.
        amplification: L > 0. The larger, the closer to the metric, and the fewer samples move anything: see `amplify`.
        average: `"binary"`: the score of class `positive` alone; `"macro"`: the mean over the classes that occur in the batch;
            `"micro"`: the score of all classes' counts together. Default: binary for one or two classes, else macro.
        positive: the class that `"binary"` looks at, for class numbers.
        from_logits: False if `input` holds probabilities.
        across_processes: on several processes, take the metric of all their batches together; every process must then call this
            equally often.

    Returns:
        A scalar, at least float32, in [0, 1] for a metric in [0, 1]. What the batch leaves undefined has no gradient: F1 without a
        positive is 0, whatever is predicted; recall without a positive is 1. An empty batch costs 0.

    Raises:
        ValueError: if shapes do not fit, a value is out of range, or the metric is unknown.

    Cost: O(batch * classes); on several processes one collective forward and one backward.

    Source: Han, Moniz and Chawla, 2024, arXiv 2405.14745; more than two classes are ours.

    Examples:
        >>> import torch
        >>> logits, target = torch.tensor([4.0, -4.0, 3.0, -2.0]), torch.tensor([1, 0, 0, 0])
        >>> metric_loss(logits, target, "balanced_accuracy")  # one of three negatives is wrong
        tensor(0.1667)
        >>> metric_loss(logits, target, lambda counts: counts.true_positive / counts.predicted)
        tensor(0.5000)
    """
    if reduction not in ("mean", "sum"):
        reason = "a metric belongs to the batch, not to one sample" if reduction == "none" else "no other"
        raise ValueError(f'reduction must be "mean" or "sum" ({reason}), got {reduction!r}')
    counts, averaging = batch_counts(
        input, target, ignore_index, amplification, average, positive, from_logits, across_processes
    )
    loss = 1 - averaged_score(
        counts, find_metric(metric) if isinstance(metric, str) else metric, averaging, weight
    )
    if reduction == "sum":
        samples = counts.positives + counts.negatives
        loss = loss * (samples if samples.ndim == 0 else samples[0]).detach()
    return loss


metric_loss.batch_statistic = True  # type: ignore[attr-defined]


class MetricLoss(nn.Module):
    """1 - metric of the batch, as a module.

    Args:
        metric, weight, ignore_index, reduction, amplification, average, positive, from_logits, across_processes: as for
            `metric_loss`.

    Attributes:
        amplification: may be changed during training, such as by `amplification_schedule`.
        batch_statistic: always True: the value belongs to a batch, so batches cannot be split.

    Returns:
        From `forward(input, target)`: a scalar.

    Raises:
        ValueError: for an unknown metric; at a call, as `metric_loss`.

    Source: Han, Moniz and Chawla, 2024, arXiv 2405.14745.

    Examples:
        >>> import torch
        >>> loss = MetricLoss("balanced_accuracy", amplification=10.0)
        >>> loss(torch.zeros(4), torch.tensor([1, 0, 0, 0]))
        tensor(0.5000)
    """

    batch_statistic = True
    weight: Tensor | None

    def __init__(
        self,
        metric: str | Metric = "f1",
        *,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        amplification: float = 73.0,
        average: Average | None = None,
        positive: int = 1,
        from_logits: bool = True,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        self.metric = find_metric(metric) if isinstance(metric, str) else metric
        self.register_buffer("weight", weight, persistent=False)
        self.amplification = amplification
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "average": average,
            "positive": positive,
            "from_logits": from_logits,
            "across_processes": across_processes,
        }

    def forward(
        self, input: Float[Tensor, "batch *classes"], target: Shaped[Tensor, "batch *labels"]
    ) -> Float[Tensor, ""]:
        return metric_loss(
            input, target, self.metric, weight=self.weight, amplification=self.amplification, **self.options
        )

    def extra_repr(self) -> str:
        return f"{metric_name(self.metric)}, amplification={self.amplification}"


def batch_counts(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    amplification: float,
    average: str | None,
    positive: int,
    from_logits: bool,
    across_processes: bool,
) -> tuple[ConfusionCounts, str]:
    """Soft counts of the batch (of all processes), and how their scores are averaged; arguments as for `metric_loss`.

    Raises:
        ValueError: if shapes do not fit, or a value is out of range.

    Examples:
        >>> import torch
        >>> arguments = (-100, 73.0, None, 1, True, True)
        >>> counts, average = batch_counts(torch.zeros(4, 2), torch.tensor([0, 1, 0, 0]), *arguments)
        >>> average, counts.positives
        ('binary', tensor(1.))
    """
    if average not in (None, "binary", "macro", "micro"):
        raise ValueError(f'average must be "binary", "macro" or "micro", got {average!r}')
    if input.ndim == 2 and input.shape[1] == 1:
        input, target = input.squeeze(1), target.squeeze(1) if target.ndim == 2 else target
    if input.ndim > 2 and target.ndim == input.ndim - 1:
        input, target = input.movedim(1, -1).flatten(0, -2), target.flatten()
    if target.ndim == 1 and not target.is_floating_point() and len(target) == len(input):
        kept = target != ignore_index
        if not bool(kept.all()):
            input, target = input[kept], target[kept]
    counts = soft_confusion(input, target, amplification=amplification, from_logits=from_logits)
    if across_processes:
        counts = all_reduce_counts(counts)
    if average is None:
        average = "binary" if input.ndim == 1 or (target.ndim == 1 and input.shape[1] == 2) else "macro"
    if average == "binary" and input.ndim == 2:
        if target.ndim == 2:
            raise ValueError(
                'average="binary" needs one class, or class numbers as target, got several labels'
            )
        if not 0 <= positive < input.shape[1]:
            raise ValueError(f"positive must be a class in [0, {input.shape[1] - 1}], got {positive}")
        counts = counts.of_class(positive)
    return counts, average


def averaged_score(counts: ConfusionCounts, metric: Metric, average: str, weight: Tensor | None) -> Tensor:
    """One number from counts: of one class, of all classes together, or the mean over the classes that occur.

    Raises:
        ValueError: if the metric is not elementwise, or the weights do not fit.

    Examples:
        >>> import torch
        >>> counts = soft_confusion(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> averaged_score(counts, find_metric("recall"), "macro", None)
        tensor(0.7500)
    """
    if counts.positives.ndim == 0 or average == "micro":
        if weight is not None:
            raise ValueError(f"weight is of the classes in a macro average, the average is {average}")
        return metric(counts.summed())
    scores = metric(counts)
    if scores.shape != counts.positives.shape:
        shape = tuple(counts.positives.shape)
        raise ValueError(f"metric must give one score for each class {shape}, got {tuple(scores.shape)}")
    shares = (counts.positives != 0).to(scores.dtype)
    if weight is not None:
        if weight.shape != scores.shape:
            raise ValueError(
                f"weight must have one entry for each of {len(scores)} classes, got {tuple(weight.shape)}"
            )
        shares = shares * weight.to(scores.dtype)
    total = shares.sum()
    # A batch without samples has no class to average over, and nothing wrong with it.
    return (shares * scores).sum() / total if bool(total != 0) else metric(counts.summed())


def metric_name(metric: Metric) -> str:
    """A name for a function of counts.

    Examples:
        >>> metric_name(find_metric("f1")), metric_name(find_metric("recall"))
        ('f1', 'recall')
    """
    keywords = getattr(metric, "keywords", {})
    name = getattr(getattr(metric, "func", metric), "__name__", type(metric).__name__)
    if name == "f_beta" and "beta" in keywords:
        return as_identifier(f"f{keywords['beta']:g}")
    return as_identifier(name) if name != "<lambda>" else "metric"


def as_identifier(name: str) -> str:
    """A name with underscores for what no name may hold.

    Examples:
        >>> as_identifier("f0.5")
        'f0_5'
    """
    return re.sub(r"\W", "_", name)
