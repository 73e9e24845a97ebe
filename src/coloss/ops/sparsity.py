"""Which weights stay: exact counts, ties by position, whole tensors at a time."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def top_mask(scores: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """True for exactly the `count` highest scores; of equal ones the first in row-major order.

    Args:
        scores: any shape; infinities are allowed (-inf comes last).
        count: in [0, scores.numel()].

    Raises:
        ValueError: if the count is out of range, or a score is NaN.

    Cost: O(scores) time and memory; nothing is sorted.

    Examples:
        >>> top_mask(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 2).tolist()
        [[True, True], [False, False]]
    """
    flat = scores.detach().reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"count must be in [0, {flat.numel()}], got {count}")
    if flat.isnan().any():
        raise ValueError("scores must not be NaN")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > least
    level = flat == least
    # Of those at the border the first ones make up the number.
    mask = above | (level & (level.cumsum(0) <= count - above.sum()))
    return mask.reshape(scores.shape)


def magnitude_masks(
    weights: Mapping[str, Tensor], density: float, scope: Literal["global", "layer"] = "global"
) -> dict[str, Tensor]:
    """The masks that keep a share of all weights: those of the greatest absolute value.

    Args:
        weights: floating tensors of any shapes, by name.
        density: share to keep, in [0, 1]; rounded to a whole number of weights.
        scope: "global" ranks the weights of all tensors together, so that tensors of small weights lose more;
            "layer" keeps the same share of each.

    Returns:
        A boolean mask for each name. Their sum is `round(density * all weights)` exactly (of each tensor, for "layer").

    Raises:
        ValueError: for an unknown scope, a density out of range, or NaN among the weights.

    Cost: O(all weights); for "global" with a float copy of them all.

    Examples:
        >>> weights = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([0.1, -5.0])}
        >>> {name: mask.tolist() for name, mask in magnitude_masks(weights, density=0.5).items()}
        {'a': [False, True], 'b': [False, True]}
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    if scope == "layer":
        return {
            name: top_mask(_magnitude(weight), round(density * weight.numel()))
            for name, weight in weights.items()
        }
    if scope != "global":
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')
    if not weights:
        return {}
    together = torch.cat([_magnitude(weight).reshape(-1) for weight in weights.values()])
    kept = top_mask(together, round(density * together.numel()))
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {
        name: part.reshape(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def nm_mask(weight: Float[Tensor, "*shape"], n: int = 2, m: int = 4, dim: int = -1) -> Bool[Tensor, "*shape"]:
    """True for the n weights of greatest absolute value in each group of m neighbours.

    Args:
        weight: at least one dimension.
        n, m: 1 <= n <= m; exactly n of each m stay, of equal ones the first.
        dim: along which neighbours are counted; what is left over behind the last whole group stays.

    Returns:
        Mask of the weight's shape.

    Raises:
        ValueError: if n and m are out of range, the weight has no dimension, or it holds NaN.

    Cost: one sort of m values for each group.

    Examples:
        >>> nm_mask(torch.tensor([1.0, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0, 9.0])).int().tolist()
        [0, 1, 1, 0, 1, 1, 0, 0, 1]
    """
    if not 1 <= n <= m:
        raise ValueError(f"n must be in [1, m], got n={n}, m={m}")
    if weight.ndim == 0:
        raise ValueError("weight must have at least one dimension, got a scalar")
    if weight.isnan().any():
        raise ValueError("weight must not be NaN")
    magnitude = weight.detach().abs().movedim(dim, -1)
    whole = magnitude.shape[-1] // m * m
    mask = torch.ones_like(magnitude, dtype=torch.bool)
    groups = magnitude[..., :whole].unflatten(-1, (whole // m, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    mask[..., :whole] = chosen.flatten(-2)
    return mask.movedim(-1, dim)


def _magnitude(weight: Tensor) -> Tensor:
    magnitude = weight.detach().abs()
    return magnitude.float() if magnitude.dtype in (torch.float16, torch.bfloat16) else magnitude
