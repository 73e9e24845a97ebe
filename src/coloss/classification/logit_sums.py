r"""Losses on three sums of the logits: the target's logit, the sum over classes, and the sum of squares.

With D logits o, target c, s = sum_k o_k and q = sum_k o_k^2:

    Z-loss             (1/a) softplus(a (b - z_c)),   z_c = (o_c - s/D) / sqrt(q/D - (s/D)^2)
    Taylor softmax     -log((1 + o_c + o_c^2/2) / (D + s + q/2))
    spherical softmax  -log((o_c^2 + eps) / (q + D eps))
    squared error      q - 2 o_c + 1

Each comes as a function of the sums, for `FactoredSphericalLinear`, and as a function of logits with the arguments of
`torch.nn.functional.cross_entropy`. What they are good for is said in `coloss.classification.spherical_training`.

de Brebisson, Vincent 2016, arXiv 1604.08859 and arXiv 1511.05042.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops import accumulation_dtype

Kind = Literal["z", "taylor-softmax", "spherical-softmax", "squared-error"]


class SphericalStatistics(NamedTuple):
    """All that a loss of the spherical family sees of the logits.

    Attributes:
        target_logit: o_c, of any shape.
        logit_sum: s, over all classes, same shape.
        square_sum: q, of the squares, same shape.
        num_classes: D.
    """

    target_logit: Tensor
    logit_sum: Tensor
    square_sum: Tensor
    num_classes: int


SphericalLoss = Callable[[SphericalStatistics], Tensor]
"""A differentiable function of the statistics: one value for each target logit."""


def spherical_statistics(
    logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]
) -> SphericalStatistics:
    """Target logit, sum and sum of squares of each row, summed in float64 where the device has it.

    In float64 the variance q/D - (s/D)^2 is as accurate as float32 logits allow.

    Args:
        logits: one row for each sample.
        target: class of each sample, in [0, classes).

    Returns:
        Differentiable statistics of shape (batch,).

    Raises:
        ValueError: for other shapes, or a target out of range.

    Examples:
        >>> found = spherical_statistics(torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([1]))
        >>> [value.item() for value in found[:3]], found.num_classes
        ([2.0, 0.0, 14.0], 3)
    """
    check_target(logits, target)
    wide = logits.to(accumulation_dtype(logits.device))
    chosen = wide.gather(-1, target[:, None]).squeeze(-1)
    return SphericalStatistics(chosen, wide.sum(-1), wide.square().sum(-1), logits.shape[-1])


def z_from_statistics(
    statistics: SphericalStatistics, sharpness: float = 1.0, location: float = 0.0, eps: float = 1e-6
) -> Float[Tensor, "..."]:
    """Z-loss of each target from the three sums.

    (1/a) softplus(a (b - z_c)) with z_c = (o_c - s/D) / sqrt(q/D - (s/D)^2 + eps^2).

    Args:
        statistics: of the logits; give them in float64, the variance cancels.
        sharpness: a > 0.
        location: b, the z-score asked for.
        eps: > 0, keeps equal logits finite.

    Returns:
        One value for each target logit.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> found = spherical_statistics(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0]))
        >>> round(z_from_statistics(found).item(), 4)  # log(1 + exp(-sqrt(3)))
        0.1629
    """
    check_z_loss(sharpness, location, eps)
    mean = statistics.logit_sum / statistics.num_classes
    variance = (statistics.square_sum / statistics.num_classes - mean.square()).clamp(min=0)
    score = (statistics.target_logit - mean) / (variance + eps**2).sqrt()
    return scaled_softplus(location - score, sharpness)


def taylor_softmax_from_statistics(statistics: SphericalStatistics) -> Float[Tensor, "..."]:
    """Negative log-likelihood of the softmax's second-order Taylor expansion, from the three sums.

    -log((1 + o_c + o_c^2/2) / (D + s + q/2)); every class has a positive share.

    Args:
        statistics: of the logits.

    Returns:
        One value for each target logit.

    Examples:
        >>> found = spherical_statistics(torch.zeros(1, 4), torch.tensor([0]))
        >>> round(taylor_softmax_from_statistics(found).item(), 4)  # log 4
        1.3863
    """
    chosen = statistics.target_logit
    total = statistics.num_classes + statistics.logit_sum + statistics.square_sum / 2
    return total.log() - (1 + chosen + chosen.square() / 2).log()


def spherical_softmax_from_statistics(
    statistics: SphericalStatistics, eps: float = 1e-2
) -> Float[Tensor, "..."]:
    """Negative log of the target's share of the squared logits, from the three sums.

    -log((o_c^2 + eps) / (q + D eps)). It cannot tell o from -o.

    Args:
        statistics: of the logits.
        eps: > 0, the share of a logit of 0; a hyperparameter.

    Returns:
        One value for each target logit.

    Raises:
        ValueError: if eps is not above 0.

    Examples:
        >>> found = spherical_statistics(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        >>> round(spherical_softmax_from_statistics(found, eps=1e-9).item(), 4)  # -log(16 / 25)
        0.4463
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be > 0 and finite, got {eps}")
    total = statistics.square_sum + statistics.num_classes * eps
    return total.log() - (statistics.target_logit.square() + eps).log()


def squared_error_from_statistics(statistics: SphericalStatistics) -> Float[Tensor, "..."]:
    """Squared distance of the logits from the one-hot target, from the three sums: q - 2 o_c + 1.

    Args:
        statistics: of the logits.

    Returns:
        One value for each target logit.

    Examples:
        >>> found = spherical_statistics(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> squared_error_from_statistics(found).item()
        0.5
    """
    return statistics.square_sum - 2 * statistics.target_logit + 1


def spherical_loss(
    kind: Kind = "z", sharpness: float = 1.0, location: float = 0.0, eps: float | None = None
) -> SphericalLoss:
    """One of the spherical losses by name, as a function of the statistics.

    Args:
        kind: "z", "taylor-softmax", "spherical-softmax" or "squared-error".
        sharpness: a > 0, of the Z-loss.
        location: b, of the Z-loss.
        eps: > 0, of the Z-loss (default 1e-6) or of the spherical softmax (default 1e-2).

    Returns:
        A function from `SphericalStatistics` to one value for each target logit.

    Raises:
        ValueError: for an unknown kind or a value out of range.

    Examples:
        >>> found = spherical_statistics(torch.eye(4), torch.arange(4))
        >>> round(spherical_loss("z", location=2.0)(found).mean().item(), 4)
        0.8361
    """
    if kind not in ("z", "taylor-softmax", "spherical-softmax", "squared-error"):
        raise ValueError(
            f'the kind of loss must be "z", "taylor-softmax", "spherical-softmax" or "squared-error", got {kind!r}'
        )
    if kind == "z":
        small = 1e-6 if eps is None else eps
        check_z_loss(sharpness, location, small)
        return partial(z_from_statistics, sharpness=sharpness, location=location, eps=small)
    if kind == "spherical-softmax":
        small = 1e-2 if eps is None else eps
        if not 0 < small < math.inf:
            raise ValueError(f"eps must be > 0 and finite, got {small}")
        return partial(spherical_softmax_from_statistics, eps=small)
    return taylor_softmax_from_statistics if kind == "taylor-softmax" else squared_error_from_statistics


def scaled_softplus(gap: Float[Tensor, "*shape"], sharpness: float) -> Float[Tensor, "*shape"]:
    """softplus(a x) / a of a gap x, without overflow.

    Examples:
        >>> round(scaled_softplus(torch.tensor(0.0), 2.0).item(), 4)  # log(2) / 2
        0.3466
    """
    return -F.logsigmoid(-sharpness * gap) / sharpness


def check_z_loss(sharpness: float, location: float, eps: float) -> None:
    """Refuse values that the Z-loss cannot have.

    Raises:
        ValueError: naming the value and the rule.

    Examples:
        >>> check_z_loss(0.0, 0.0, 1e-6)
        Traceback (most recent call last):
        ...
        ValueError: sharpness must be > 0 and finite, got 0.0
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be > 0 and finite, got {sharpness}")
    if not math.isfinite(location):
        raise ValueError(f"location must be finite, got {location}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be > 0 and finite, got {eps}")


def check_target(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> Bool[Tensor, " batch"]:
    """Which samples count; a target out of range is refused where looking at it does not stall a device.

    Raises:
        ValueError: for other shapes, or a target out of range.

    Examples:
        >>> check_target(torch.zeros(2, 3), torch.tensor([1, -100]), ignore_index=-100)
        tensor([ True, False])
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must have shape (batch, classes) with at least one class, got {tuple(logits.shape)}"
        )
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"target must have shape ({len(logits)},) as the logits say, got {tuple(target.shape)}"
        )
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    if target.device.type == "cpu":
        wrong = target[counted & ((target < 0) | (target >= logits.shape[1]))]
        if len(wrong):
            raise ValueError(f"target must be in [0, {logits.shape[1]}), got {int(wrong[0])}")
    return counted
