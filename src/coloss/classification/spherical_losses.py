"""The spherical losses as functions of logits, with the arguments of `torch.nn.functional.cross_entropy`, and `ZLoss` as a module.

The equations stand in `coloss.classification.logit_sums`, what the losses are good for in `coloss.classification.spherical_training`.

de Brebisson, Vincent 2016, arXiv 1604.08859 and arXiv 1511.05042.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.classification.logit_sums import (
    SphericalLoss,
    check_target,
    check_z_loss,
    scaled_softplus,
    spherical_softmax_from_statistics,
    spherical_statistics,
    squared_error_from_statistics,
    taylor_softmax_from_statistics,
)
from coloss.ops import full_precision

Reduction = Literal["mean", "sum", "none"]


def z_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    sharpness: float = 1.0,
    location: float = 0.0,
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Softplus of how far the target's z-score among the logits falls short of a location; in place of cross-entropy.

    (1/a) softplus(a (b - z_c)), z_c = (o_c - mu) / sqrt(sigma^2 + eps^2), with mu and sigma^2 the mean and population variance of
    a row of logits o. Unchanged when logits are shifted, or scaled by a positive number.

    Args:
        logits: one row for each sample; -inf takes a class out of mean and variance.
        target: class of each sample, in [0, classes), or `ignore_index`.
        sharpness: a > 0; a -> infinity gives max(0, b - z_c).
        location: b, the z-score asked for.
        weight: factor of each class; "mean" divides by the sum of the samples' weights, as in PyTorch.
        ignore_index: target of samples that do not count.
        eps: > 0; bounds the gradient of equal logits by 1 / eps.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or one value for each sample with "none"; at least float32. The mean of no sample is 0.

    Raises:
        ValueError: for other shapes, a value or a target out of range.

    Source:
        de Brebisson, Vincent 2016, arXiv 1604.08859.

    Examples:
        >>> logits, target = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
        >>> round(z_loss(logits, target).item(), 4), round(z_loss(7 * logits - 3, target).item(), 4)
        (0.1629, 0.1629)
    """
    check_z_loss(sharpness, location, eps)
    _check_reduction(reduction)
    counted = check_target(logits, target, ignore_index)
    chosen = torch.where(counted, target, 0)[:, None]
    values = full_precision(logits)
    possible = ~values.isneginf()
    count = possible.sum(-1, keepdim=True).clamp(min=1)
    mean = values.masked_fill(~possible, 0).sum(-1, keepdim=True) / count
    centred = (values - mean).masked_fill(~possible, 0)
    # The largest deviation is divided out, so that no square overflows; it cancels in the score and in its gradient.
    size = centred.detach().abs().amax(-1, keepdim=True).clamp(min=eps)
    deviation = ((centred / size).square().sum(-1, keepdim=True) / count + (eps / size) ** 2).sqrt()
    score = ((values.gather(-1, chosen) - mean) / size / deviation).squeeze(-1)
    losses = scaled_softplus(location - score, sharpness)
    return _reduce(losses, target, counted, weight, reduction)


def taylor_softmax_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of the softmax's second-order Taylor expansion, see `taylor_softmax_from_statistics`.

    Args:
        logits: one row for each sample.
        target: class of each sample, or `ignore_index`.
        weight: factor of each class.
        ignore_index: target of samples that do not count.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or one value for each sample with "none"; at least float32.

    Raises:
        ValueError: for other shapes or a target out of range.

    Source:
        de Brebisson, Vincent 2016, arXiv 1511.05042.

    Examples:
        >>> round(taylor_softmax_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863
    """
    return _dense(taylor_softmax_from_statistics, logits, target, weight, ignore_index, reduction)


def spherical_softmax_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    eps: float = 1e-2,
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of squared logits, normalised to sum to 1, see `spherical_softmax_from_statistics`.

    Args:
        logits: one row for each sample.
        target: class of each sample, or `ignore_index`.
        eps: > 0, the share of a logit of 0.
        weight: factor of each class.
        ignore_index: target of samples that do not count.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or one value for each sample with "none"; at least float32.

    Raises:
        ValueError: for other shapes, a value or a target out of range.

    Source:
        de Brebisson, Vincent 2016, arXiv 1511.05042.

    Examples:
        >>> round(spherical_softmax_loss(torch.ones(1, 4), torch.tensor([2])).item(), 4)
        1.3863
    """
    by_row = lambda statistics: spherical_softmax_from_statistics(statistics, eps)
    return _dense(by_row, logits, target, weight, ignore_index, reduction)


def one_hot_squared_error_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Squared distance of logits from the one-hot target, summed over classes.

    Args:
        logits: one row for each sample.
        target: class of each sample, or `ignore_index`.
        weight: factor of each class.
        ignore_index: target of samples that do not count.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or one value for each sample with "none"; at least float32.

    Raises:
        ValueError: for other shapes or a target out of range.

    Examples:
        >>> one_hot_squared_error_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([0])).item()
        0.5
    """
    return _dense(squared_error_from_statistics, logits, target, weight, ignore_index, reduction)


class ZLoss(nn.Module):
    """Module form of `z_loss`, in place of `nn.CrossEntropyLoss`.

    Args:
        sharpness: a > 0.
        location: b, the z-score asked for.
        weight: factor of each class, or None.
        ignore_index: target of samples that do not count.
        eps: > 0.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> round(ZLoss(location=2.0)(torch.eye(4), torch.arange(4)).item(), 4)
        0.8361
    """

    weight: Tensor | None

    def __init__(
        self,
        sharpness: float = 1.0,
        location: float = 0.0,
        *,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: int = -100,
        eps: float = 1e-6,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_z_loss(sharpness, location, eps)
        _check_reduction(reduction)
        self.sharpness, self.location, self.eps = sharpness, location, eps
        self.ignore_index, self.reduction = ignore_index, reduction
        self.register_buffer("weight", weight)

    def forward(
        self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]
    ) -> Float[Tensor, "..."]:
        return z_loss(
            logits,
            target,
            self.sharpness,
            self.location,
            weight=self.weight,
            ignore_index=self.ignore_index,
            eps=self.eps,
            reduction=self.reduction,
        )


def _dense(
    loss: SphericalLoss,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    _check_reduction(reduction)
    counted = check_target(logits, target, ignore_index)
    losses = loss(spherical_statistics(logits, torch.where(counted, target, 0)))
    return _reduce(losses.to(full_precision(logits).dtype), target, counted, weight, reduction)


def _reduce(
    losses: Tensor, target: Tensor, counted: Tensor, weight: Tensor | None, reduction: Reduction
) -> Tensor:
    share = counted.to(losses.dtype)
    if weight is not None:
        share = share * weight.to(losses.dtype)[torch.where(counted, target, 0)]
    # A sample that does not count may hold anything, an infinity included.
    losses = torch.where(counted, losses, 0) * share
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = share.sum()
    return losses.sum() / torch.where(total == 0, 1, total)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
