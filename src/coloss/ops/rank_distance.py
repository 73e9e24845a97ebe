"""How far a weight is from its best approximation of low rank: the rank at a given error, and a loss that keeps that error up."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from .precision import accumulation_dtype, full_precision, without_autocast
from .spectral import matricize


@torch.no_grad()
def delta_rank(weight: Float[Tensor, "*shape"], delta: float) -> int:
    r"""The rank at which a weight's best approximation has a relative squared error closest to a given one.

    $\arg\min_k |\sum_{i>k} s_i^2 / \sum_i s_i^2 - \delta|$ over $k = 1 \dots n - 1$, with $s$ the singular values of the weight as
    a matrix of outputs by all else, and $n$ the lesser of its sizes. Of equally good ones the least; at least one singular value is
    always kept and one dropped. The error at that rank may lie on either side of `delta`.

    Args:
        weight: at least two dimensions, finite; a kernel's are joined with the inputs.
        delta: $\delta$, in [0, 1].

    Returns:
        A whole number: 0 for a weight of zeros, 1 for one with a single row or column.

    Raises:
        ValueError: for a `delta` out of range, a weight with fewer than two dimensions, or one that is not finite.

    Cost:
        One SVD: $O(\min(r, c)^2 \max(r, c))$.

    Source:
        Tian et al. 2023 (RPG), arXiv 2311.17493.

    Examples:
        >>> delta_rank(torch.eye(10), 0.2), delta_rank(torch.diag(torch.tensor([3.0, 1.0, 1.0])), 0.2)
        (8, 1)
    """
    _check_delta(delta)
    matrix = full_precision(matricize(weight.detach(), "channel")[0])
    if not matrix.isfinite().all():
        raise ValueError("weight must be finite, got an infinity or NaN")
    if matrix.numel() == 0 or (largest := matrix.abs().amax()) == 0:
        return 0
    # Scaled first, so that squares neither overflow nor vanish.
    return _closest_rank(torch.linalg.svdvals(matrix / largest), delta)


def low_rank_distance_loss(
    weights: Float[Tensor, "*shape"] | Iterable[Tensor], delta: float
) -> Float[Tensor, ""]:
    r"""Pushes weights away from their best approximation of low rank, so that very sparse layers do not collapse to a few directions.

    $-\frac{1}{L} \sum_l \lVert \hat W_l - A_l \rVert_F^2$ with $\hat W = W / \lVert W \rVert_F$ and $A$ its truncated singular
    value decomposition of rank `delta_rank(W, delta)`, held fixed. By the choice of that rank the value is always near
    $-\delta$ and says little; the gradient counts,

    $-\frac{2}{\lVert W \rVert_F} [(\hat W - A) - \hat W \lVert \hat W - A \rVert_F^2]$,

    which is orthogonal to W: the loss does not depend on a weight's scale. Add it to any loss, with any way of pruning.

    Args:
        weights: one weight, or several to average over; each with at least two dimensions.
        delta: $\delta$ in [0, 1], the share of the squared singular values that counts as low.

    Returns:
        A scalar in [-1, 0], at least float32. Weights of zeros and those with a single row or column have no approximation of lower
        rank: they are left out of the mean; 0 where none is left. NaN for a weight that is not finite.

    Raises:
        ValueError: for a `delta` out of range, no weight, or one with fewer than two dimensions.

    Cost:
        One SVD for each weight, $O(\min(r, c)^2 \max(r, c))$, in float32 (float64 for such weights) also under autocast.

    Source:
        Tian et al. 2023 (RPG), arXiv 2311.17493.

    Examples:
        >>> low_rank_distance_loss(torch.eye(10), delta=0.2).item()
        -0.200...
        >>> low_rank_distance_loss([torch.eye(10), torch.zeros(4, 4), torch.eye(2)], delta=0.2).item()
        -0.349...
    """
    _check_delta(delta)
    listed = [weights] if isinstance(weights, Tensor) else list(weights)
    if not listed:
        raise ValueError("weights must hold at least one weight, got none")
    distances = []
    for weight in listed:
        matrix = full_precision(matricize(weight, "channel")[0])
        if min(matrix.shape) < 2 or (largest := matrix.detach().abs().amax()) == 0:
            continue
        if not largest.isfinite():
            distances.append(matrix.sum() * torch.nan)
            continue
        scaled = matrix / largest
        unit = scaled / torch.linalg.vector_norm(scaled)
        distances.append(-(unit - _twin(unit, delta)).square().sum())
    if not distances:
        return sum((full_precision(weight).reshape(-1)[:0].sum() for weight in listed), torch.tensor(0.0))
    return torch.stack([distance.to(distances[0]) for distance in distances]).mean()


@torch.no_grad()
def _twin(matrix: Tensor, delta: float) -> Tensor:
    """The closest matrix of the rank at `delta`."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = _closest_rank(S, delta)
    with without_autocast(matrix.device):
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def _closest_rank(values: Tensor, delta: float) -> int:
    """Of singular values in descending order, not all zero."""
    if len(values) == 1:
        return 1
    squares = values.to(accumulation_dtype(values.device)) ** 2
    # Summed from the small end; entry k is what is lost when k values are kept.
    tails = squares.flip(0).cumsum(0).flip(0)
    distance = (tails[1:] / tails[0] - delta).abs()
    # Tails that differ by rounding alone are equal: the least rank wins.
    level = distance <= distance.min() + 8 * torch.finfo(values.dtype).eps
    return int(level.nonzero()[0]) + 1


def _check_delta(delta: float) -> None:
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must be in [0, 1], got {delta}")
