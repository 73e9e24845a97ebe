"""Losses for samples whose labels are known as averages over bags: bag level, instance level, and between.

The equations stand in `coloss.classification.aggregate_responses`.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.ops import full_precision, segment_logsumexp, segment_mean, segment_sizes

Base: TypeAlias = Literal["mse", "bce", "ce"] | Callable[[Tensor, Tensor], Tensor]


def bag_level_loss(
    predictions: Float[Tensor, "rows *outputs"],
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " rows"],
    base: Base = "mse",
    weight: Float[Tensor, " bags"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Loss of each bag's average prediction against its average label: unbiased, and noisy where bags are few.

    Takes the arguments of `aggregate_loss` but `rho`.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: as `aggregate_loss`.

    Examples:
        >>> predictions, bags = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> bag_level_loss(predictions, torch.tensor([2.0, 2.0]), bags)  # (2 * 0 + 1 * 9) / 3
        tensor(3.)
    """
    return aggregate_loss(predictions, bag_targets, bag_index, 0.0, base, weight, reduction)


bag_level_loss.batch_statistic = True  # type: ignore[attr-defined]


def instance_level_loss(
    predictions: Float[Tensor, "rows *outputs"],
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " rows"],
    base: Base = "mse",
    weight: Float[Tensor, " bags"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Loss of each sample's prediction against the average label of its bag: stable, and biased towards the average.

    Takes the arguments of `aggregate_loss` but `rho`.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: as `aggregate_loss`.

    Examples:
        >>> predictions, bags = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> instance_level_loss(predictions, torch.tensor([2.0, 2.0]), bags)  # (1 + 1 + 9) / 3
        tensor(3.6667)
    """
    return aggregate_loss(predictions, bag_targets, bag_index, 1.0, base, weight, reduction)


instance_level_loss.batch_statistic = True  # type: ignore[attr-defined]


def aggregate_loss(
    predictions: Float[Tensor, "rows *outputs"],
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " rows"],
    rho: float = 0.1,
    base: Base = "mse",
    weight: Float[Tensor, " bags"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Interpolation between the bag-level and the instance-level loss, for a model of single samples.

    Args:
        predictions: of single samples; logits for "bce" and "ce".
        bag_targets: average label of each bag; proportions in [0, 1] for "bce", summing to 1 over classes for "ce".
            Bags without rows here count nothing, so a table of all bags will do.
        bag_index: bag of each row. All rows of a bag must be here: of a part, the average label is not known.
        rho: 0 is the bag level, 1 the instance level; >= 0, and at most 1 except for "mse".
        base: "mse", squared error averaged over outputs; "bce", binary cross-entropy of each output, averaged; "ce",
            cross-entropy over the last dimension of (rows, classes); or any `(predictions, targets) -> values` for rows, one
            value for each row or output, then predictions are averaged in a bag as they are.
        weight: of each bag; by default its number of rows, so that every sample counts the same.
        reduction: "mean" divides by the sum of weights, "sum" does not. There is no "none": a row of its own has no loss.

    Returns:
        A scalar, at least float32; 0 without rows.

    Raises:
        ValueError: for a value out of range, shapes that do not fit, or `reduction="none"`.

    Cost:
        O(rows * outputs).

    Source:
        Javanmard et al. 2024, arXiv 2401.11081.

    Examples:
        >>> logits = torch.zeros(6, 3, requires_grad=True)
        >>> proportions, bags = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), torch.arange(6) // 3
        >>> round(aggregate_loss(logits, proportions, bags, rho=0.1, base="ce").item(), 4)  # log 3
        1.0986
    """
    _check(predictions, bag_targets, bag_index, rho, base, weight, reduction)
    bags = len(bag_targets)
    sizes = segment_sizes(bag_index, bags)
    predictions = full_precision(predictions)
    targets = bag_targets.to(predictions)
    weights = (sizes if weight is None else weight * (sizes > 0)).to(predictions)
    value = predictions.flatten()[:0].sum()
    if rho != 1:
        value = (
            value + (1 - rho) * (weights * _bag_values(predictions, targets, bag_index, sizes, base)).sum()
        )
    if rho != 0:
        rows = _row_values(predictions, targets[bag_index], base)
        value = value + rho * (weights * segment_mean(rows, bag_index, bags)).sum()
    if reduction == "sum":
        return value
    total = weights.sum()
    return value / torch.where(total == 0, 1.0, total)


aggregate_loss.batch_statistic = True  # type: ignore[attr-defined]


def within_bag_variance(
    predictions: Float[Tensor, "rows *outputs"], bag_index: Int[Tensor, " rows"]
) -> Float[Tensor, ""]:
    """Mean squared distance of predictions from their bag's average: what the instance level adds for squared error.

    Equals half the mean squared difference of two predictions of a bag. A constant added to all predictions changes
    nothing, so an intercept is not regularised.

    Args:
        predictions: of single samples.
        bag_index: bag of each row.

    Returns:
        A scalar, averaged over rows and outputs, at least float32; 0 without rows.

    Examples:
        >>> within_bag_variance(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))  # (1 + 1 + 0) / 3
        tensor(0.6667)
    """
    values = full_precision(predictions)
    deviations = values - segment_mean(values, bag_index)[bag_index]
    return deviations.square().sum() / max(values.numel(), 1)


within_bag_variance.batch_statistic = True  # type: ignore[attr-defined]


class AggregateLoss(nn.Module):
    """`aggregate_loss` as a module, for a loop of your own.

    Args:
        base: "mse", "bce", "ce" or a callable.
        rho: 0 is the bag level, 1 the instance level.
        reduction: "mean" or "sum".

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> loss = AggregateLoss("mse", rho=0.0)
        >>> loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0]), torch.tensor([0, 0]))
        tensor(0.)
    """

    batch_statistic = True

    def __init__(
        self, base: Base = "mse", rho: float = 0.1, reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__()
        check_options(rho, base, reduction)
        self.base, self.rho, self.reduction = base, rho, reduction

    def forward(
        self,
        predictions: Float[Tensor, "rows *outputs"],
        bag_targets: Float[Tensor, "bags *outputs"],
        bag_index: Int[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        return aggregate_loss(
            predictions, bag_targets, bag_index, self.rho, self.base, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"base={self.base!r}, rho={self.rho}, reduction={self.reduction!r}"


def _bag_values(
    predictions: Tensor, targets: Tensor, index: Tensor, sizes: Tensor, base: Base
) -> Float[Tensor, " bags"]:
    """Loss of the average prediction of each bag; 0 for a bag without rows."""
    bags = len(targets)
    if base == "mse" or callable(base):
        values = _row_values(segment_mean(predictions, index, bags), targets, base)
        return torch.where(sizes > 0, values, 0.0)
    log_size = sizes.clamp(min=1).to(predictions.dtype).log().view(-1, *[1] * (predictions.ndim - 1))
    filled = (sizes > 0).view_as(log_size)

    def log_mean(log_probability: Tensor) -> Tensor:
        return torch.where(filled, segment_logsumexp(log_probability, index, bags) - log_size, 0.0)

    if base == "ce":
        return _cross(targets, log_mean(predictions.log_softmax(-1))).sum(-1)
    on, off = log_mean(F.logsigmoid(predictions)), log_mean(F.logsigmoid(-predictions))
    return _per_row(_cross(targets, on) + _cross(1 - targets, off)) * (sizes > 0)


def _row_values(predictions: Tensor, targets: Tensor, base: Base) -> Float[Tensor, " rows"]:
    """Loss of each prediction against a target of its own."""
    if base == "mse":
        return _per_row((predictions - targets).square())
    if base == "ce":
        return _cross(targets, predictions.log_softmax(-1)).sum(-1)
    if base == "bce":
        return _per_row(F.binary_cross_entropy_with_logits(predictions, targets, reduction="none"))
    assert callable(base)
    values = base(predictions, targets)
    if values.ndim == 0 or len(values) != len(predictions):
        raise ValueError(
            f"base must give values for {len(predictions)} rows, got shape {tuple(values.shape)}"
        )
    return _per_row(values)


def _cross(targets: Tensor, log_probability: Tensor) -> Tensor:
    """-t log p, with 0 log 0 = 0."""
    return -targets * torch.where(targets == 0, 0.0, log_probability)


def _per_row(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def check_options(
    rho: float, base: Base, reduction: str = "mean", error: type[ValueError] = ValueError
) -> None:
    """Refuse options that no loss of this module takes, with the kind of error that the caller raises."""
    if not callable(base) and base not in ("mse", "bce", "ce"):
        raise error(f'base must be "mse", "bce", "ce" or a function, got {base!r}')
    limit = float("inf") if base == "mse" else 1.0
    if not 0 <= rho <= limit or rho == float("inf"):
        raise error(f"rho must be >= 0{'' if base == 'mse' else ' and <= 1'}, got {rho}")
    if reduction == "none":
        raise error('reduction must be "mean" or "sum", got "none": a bag has a loss, a row of it has none')
    if reduction not in ("mean", "sum"):
        raise error(f'reduction must be "mean" or "sum", got {reduction!r}')


def _check(
    predictions: Tensor,
    bag_targets: Tensor,
    bag_index: Tensor,
    rho: float,
    base: Base,
    weight: Tensor | None,
    reduction: str,
) -> None:
    check_options(rho, base, reduction)
    if predictions.ndim == 0 or len(predictions) != len(bag_index):
        raise ValueError(
            f"predictions must have the {len(bag_index)} rows of bag_index, got shape {tuple(predictions.shape)}"
        )
    if predictions.shape[1:] != bag_targets.shape[1:]:
        raise ValueError(
            f"bag_targets must be (bags, *{tuple(predictions.shape[1:])}) as predictions are, got {tuple(bag_targets.shape)}"
        )
    if base == "ce" and predictions.ndim < 2:
        raise ValueError("predictions must be (rows, classes) for base 'ce', got one dimension")
    if weight is not None and weight.shape != bag_targets.shape[:1]:
        raise ValueError(
            f"weight must have one value for each of {len(bag_targets)} bags, got {tuple(weight.shape)}"
        )
