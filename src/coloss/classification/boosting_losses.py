r"""The three losses of functional gradient boosting: where to start, which way to go, and how far.

With scores F (samples, outputs) and targets y of the same shape:

    squared    1/2 (y - F)^2            y any number           start mean(y)                       residual y - F
    logistic   log(1 + exp(-2 y F))     y = -1 or 1            start 1/2 log((1 + ybar)/(1 - ybar))   residual 2y / (1 + exp(2 y F))
    softmax    -sum_k y_k log p_k       y one-hot, p softmax(F)  start log of the classes' shares      residual y - p

The residual is the negative gradient. The step along a direction g is one Newton step over all samples, one number for all outputs:
rho = sum(r g) / sum(g^2 h) with h the second derivative, 1, r (2y - r) and p (1 - p) (the diagonal of the Hessian for softmax).

Emami, Martinez-Munoz 2023, arXiv 1909.12098.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BoostingLoss = Literal["squared", "logistic", "softmax"]


def init_score(loss: BoostingLoss, targets: Float[Tensor, "samples outputs"]) -> Float[Tensor, " outputs"]:
    """The best constant score.

    A class without samples, whose best score is infinite, is taken to have half a sample.

    Args:
        loss: which one.
        targets: y, see the module's text.

    Returns:
        One score for each output; for "softmax" they sum to 0.

    Raises:
        ValueError: for an unknown loss or targets that it cannot have.

    Examples:
        >>> init_score("squared", torch.tensor([[1.0], [4.0]])).tolist()
        [2.5]
        >>> round(init_score("logistic", torch.tensor([[1.0], [1.0], [1.0], [-1.0]])).item(), 4)  # log(3) / 2
        0.5493
    """
    check_targets(loss, targets)
    if loss == "squared":
        return targets.mean(0)
    if loss == "logistic":
        positive = (targets > 0).sum(0).clamp(min=0.5)
        negative = (targets < 0).sum(0).clamp(min=0.5)
        return 0.5 * (positive.to(targets.dtype) / negative).log()
    scores = targets.sum(0).clamp(min=0.5).log()
    return scores - scores.mean()


def pseudo_residual(
    loss: BoostingLoss, targets: Float[Tensor, "samples outputs"], scores: Float[Tensor, "samples outputs"]
) -> Float[Tensor, "samples outputs"]:
    """Negative gradient of the loss at the present scores: what the next stage should predict.

    Args:
        loss: which one.
        targets: y, see the module's text.
        scores: F.

    Returns:
        r, of the shape of the scores; rows of "softmax" sum to 0.

    Raises:
        ValueError: for an unknown loss.

    Examples:
        >>> pseudo_residual("logistic", torch.tensor([[1.0]]), torch.tensor([[0.0]])).item()
        1.0
    """
    _check_loss(loss)
    if loss == "squared":
        return targets - scores
    if loss == "logistic":
        return 2 * targets * torch.sigmoid(-2 * targets * scores)
    return targets - scores.softmax(1)


def newton_step(
    loss: BoostingLoss,
    targets: Float[Tensor, "samples outputs"],
    residual: Float[Tensor, "samples outputs"],
    direction: Float[Tensor, "samples outputs"],
    largest: float = 1e3,
) -> float:
    """How far to go along a direction: one Newton step on all samples, the same for all outputs.

    Args:
        loss: which one; for "squared" the step is 1, since a stage is fitted to the residual itself.
        targets: y, see the module's text.
        residual: r, from `pseudo_residual`.
        direction: g, what the stage predicts.
        largest: limit of the step's size; where predictions are certain the curvature vanishes and the step explodes.

    Returns:
        rho. 0 if the direction, or the slope along it, is 0 or not finite. A negative step is possible where a stage was fitted to other
        samples.

    Raises:
        ValueError: for an unknown loss, or a limit not above 0.

    Examples:
        >>> targets, scores = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)
        >>> residual = pseudo_residual("logistic", targets, scores)
        >>> newton_step("logistic", targets, residual, direction=residual)
        1.0
    """
    _check_loss(loss)
    if not largest > 0:
        raise ValueError(f"largest must be > 0, got {largest}")
    slope = float((residual * direction).sum())
    if not math.isfinite(slope) or float(direction.abs().max()) == 0:
        return 0.0
    if loss == "squared":
        return 1.0
    if loss == "logistic":
        curvature = residual * (2 * targets - residual)
    else:
        probability = targets - residual
        curvature = probability * (1 - probability)
    bend = float((direction.square() * curvature).sum())
    if slope == 0:
        return 0.0
    if not bend > abs(slope) / largest:
        return math.copysign(largest, slope)
    return slope / bend


def boosting_loss(
    loss: BoostingLoss, targets: Float[Tensor, "samples outputs"], scores: Float[Tensor, "samples outputs"]
) -> Float[Tensor, ""]:
    """Mean loss over samples, summed over outputs.

    Args:
        loss: which one.
        targets: y, see the module's text.
        scores: F.

    Raises:
        ValueError: for an unknown loss.

    Examples:
        >>> round(boosting_loss("logistic", torch.tensor([[1.0]]), torch.tensor([[0.0]])).item(), 4)  # log 2
        0.6931
    """
    _check_loss(loss)
    if loss == "squared":
        return 0.5 * (targets - scores).square().sum(1).mean()
    if loss == "logistic":
        return F.softplus(-2 * targets * scores).sum(1).mean()
    return -(targets * scores.log_softmax(1)).sum(1).mean()


def check_targets(loss: BoostingLoss, targets: Float[Tensor, "samples outputs"]) -> None:
    """Refuse targets that a loss cannot have.

    Raises:
        ValueError: naming the rule.

    Examples:
        >>> check_targets("logistic", torch.tensor([[0.0], [1.0]]))
        Traceback (most recent call last):
        ...
        ValueError: targets of the logistic loss must be -1 or 1
    """
    _check_loss(loss)
    if targets.ndim != 2 or targets.shape[0] == 0 or targets.shape[1] == 0:
        raise ValueError(
            f"targets must be (samples, outputs), at least one of each, got {tuple(targets.shape)}"
        )
    if not bool(targets.isfinite().all()):
        raise ValueError("targets must be finite, got NaN or infinity")
    if loss == "logistic" and not bool((targets.abs() == 1).all()):
        raise ValueError("targets of the logistic loss must be -1 or 1")
    if loss == "softmax" and not bool(
        ((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all()
    ):
        raise ValueError("targets of the softmax loss must be one-hot rows")


def _check_loss(loss: str) -> None:
    if loss not in ("squared", "logistic", "softmax"):
        raise ValueError(f'loss must be "squared", "logistic" or "softmax", got {loss!r}')
