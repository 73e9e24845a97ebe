"""How far predicted latent vectors are from their targets, over any set of tokens, an empty one included."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .distributed import all_reduce_mean
from .precision import full_precision

LatentDistance: TypeAlias = Literal["l1", "smooth_l1", "mse", "cosine"]
TargetNorm: TypeAlias = Literal["layer"] | None


def latent_prediction_loss(
    prediction: Float[Tensor, "*tokens dim"],
    target: Float[Tensor, "*tokens dim"],
    kind: LatentDistance = "l1",
    target_norm: TargetNorm = None,
    valid: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Mean distance of predicted vectors p to their targets y, over the tokens that count.

        l1         mean_d |p_d - y_d|
        smooth_l1  mean_d h(p_d - y_d),  h(u) = u^2 / 2 for |u| < 1, else |u| - 1/2
        mse        mean_d (p_d - y_d)^2
        cosine     1 - cos(p, y), in [0, 2]; 1 where a vector is zero

    The targets are not cut from the graph here: make them under `torch.no_grad()`, or detach them.

    Args:
        prediction: p, one vector for each token.
        target: y, in the same shape.
        kind: the distance.
        target_norm: "layer" brings each target to mean 0 and variance 1 over its dimensions before, without learned scale.
        valid: False for tokens that do not count, whatever they hold, NaN included; None where all count. Over several processes the
            number of valid tokens is averaged, so that the mean of the processes' losses is the mean over all valid tokens; each
            process must then give `valid`.

    Returns:
        A scalar >= 0, at least float32. Without a token that counts it is 0, and backward gives zero gradients.

    Raises:
        ValueError: for an unknown name, or shapes that differ.

    Source:
        Assran et al., 2023 (I-JEPA), arXiv 2301.08243 (smooth_l1 on layer-normalised targets, in its released form).

    Examples:
        >>> prediction, target = (
        ...     torch.tensor([[1.0, 4.0], [0.0, 0.0]]),
        ...     torch.tensor([[1.0, 2.0], [9.0, 9.0]]),
        ... )
        >>> latent_prediction_loss(prediction, target, "mse", valid=torch.tensor([True, False]))
        tensor(2.)
        >>> latent_prediction_loss(prediction, target, "l1")
        tensor(5.)
    """
    if kind not in _DISTANCES:
        raise ValueError(f"kind must be one of {', '.join(_DISTANCES)}, got {kind!r}")
    if target_norm not in (None, "layer"):
        raise ValueError(f'target_norm must be "layer" or None, got {target_norm!r}')
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if valid is not None and valid.shape != prediction.shape[:-1]:
        raise ValueError(f"valid must be {tuple(prediction.shape[:-1])}, got {tuple(valid.shape)}")
    prediction, target = full_precision(prediction), full_precision(target)
    if valid is not None:
        # Before anything is computed: what does not count must not reach the gradient as 0 * NaN either.
        prediction = torch.where(valid[..., None], prediction, 0)
        target = torch.where(valid[..., None], target, 0)
    if target_norm == "layer":
        target = F.layer_norm(target, target.shape[-1:])
    distances = _DISTANCES[kind](prediction, target)
    if valid is None:
        return distances.sum() / max(distances.numel(), 1)
    counted = all_reduce_mean(valid.sum().to(distances.dtype))
    total = torch.where(valid, distances, 0).sum()
    return total / torch.where(counted > 0, counted, 1)


def _l1(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean(-1)


def _smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(-1)


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    prediction, target = _moderate(prediction), _moderate(target)
    lengths = torch.linalg.vector_norm(prediction, dim=-1) * torch.linalg.vector_norm(target, dim=-1)
    return 1 - (prediction * target).sum(-1) / torch.where(lengths > 0, lengths, 1)


def _moderate(vectors: Tensor) -> Tensor:
    """Vectors of largest entry 1: cosines do not see a scale, and squares of very large or small entries leave the range."""
    scale = vectors.detach().abs().amax(-1, keepdim=True) if vectors.shape[-1] else vectors
    return vectors / torch.where(scale > 0, scale, 1)


_DISTANCES = {"l1": _l1, "smooth_l1": _smooth_l1, "mse": _mse, "cosine": _cosine}
