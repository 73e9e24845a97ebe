"""Sums over triplets, some anchors at a time: distances of a few rows to all columns, mined or sorted, and turned into a gradient."""

from typing import Any

import torch
from torch import Tensor

from .gradients import first_order_only, needs_gradient
from .precision import accumulation_dtype, without_autocast

_DISTANCES_ON_CPU = 2**20
_DISTANCES_ON_ACCELERATOR = 2**24


def triplet_sum(
    x: Tensor,
    y: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    first: int,
    margin: float,
    mining: str,
    root: bool,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the hinges of mined triplets, the number of triplets, and of those whose hinge is above 0.

    Args:
        x: (anchors, dim).
        y: (samples, dim), the anchors among them.
        row_groups, column_groups: label numbers of both.
        first: the sample that is the first anchor.
        margin: of the hinge.
        mining: "hard", "semi-hard" or "all".
        root: distances are the roots of minus the scores x @ y.T, in place of minus the scores.
        rows: anchors at once; None chooses for the device.

    Returns:
        Three scalars; only the first has a gradient.
    """
    total, chosen, active, _, _ = _triplet_sum(
        x, y, row_groups, column_groups, first, margin, mining, root, rows, needs_gradient(x, y)
    )
    return total, chosen, active


@torch.library.custom_op("coloss::triplet_sum", mutates_args=())
def _triplet_sum(
    x: Tensor,
    y: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    first: int,
    margin: float,
    mining: str,
    root: bool,
    rows: int | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.device)
    total = torch.zeros((), dtype=wide, device=x.device)
    chosen, active = total.clone(), total.clone()
    for_x = x.new_zeros(x.shape if with_gradient else 0)
    for_y = y.new_zeros(y.shape if with_gradient else 0)
    held = _DISTANCES_ON_CPU if x.device.type == "cpu" else _DISTANCES_ON_ACCELERATOR
    step = rows or max(1, held // max(len(y), 1))
    mine = {"hard": _hard, "semi-hard": _semi_hard, "all": _all}[mining]
    for start in range(0, len(x) if len(y) else 0, step):
        anchors = slice(start, min(start + step, len(x)))
        with without_autocast(x.device):
            distances = -(x[anchors] @ y.T)
        if root:
            distances = distances.clamp_(min=0.0).sqrt_()
        positive = row_groups[anchors].unsqueeze(1) == column_groups
        negative = ~positive
        positive.diagonal(first + start).fill_(False)
        cost, count, costly, slope = mine(distances, positive, negative, margin)
        total, chosen, active = total + cost, chosen + count, active + costly
        if with_gradient:
            if root:
                slope = torch.where(distances > 0, slope / (2 * distances), 0.0)
            slope = slope.to(x.dtype)
            with without_autocast(x.device):
                for_x[anchors] -= slope @ y
                for_y.addmm_(slope.T, x[anchors], alpha=-1)
    return total.to(x.dtype), chosen.to(x.dtype), active.to(x.dtype), for_x, for_y


@_triplet_sum.register_fake
def _(x, y, row_groups, column_groups, first, margin, mining, root, rows, with_gradient):  # type: ignore[no-untyped-def]
    for_x = x.new_empty(x.shape if with_gradient else 0)
    for_y = y.new_empty(y.shape if with_gradient else 0)
    return x.new_empty(()), x.new_empty(()), x.new_empty(()), for_x, for_y


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


@first_order_only("this loss on triplets of embeddings")
def _differentiate(ctx: Any, gradient: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 10
    for_x, for_y = ctx.saved_tensors
    return gradient * for_x, gradient * for_y, *[None] * 8


_triplet_sum.register_autograd(_differentiate, setup_context=_remember)

# Each of the following takes distances, masks of positives and negatives (anchors, samples), and the margin; it gives the sum of hinges,
# the number of triplets, the number of those that cost something, and the slope of the sum by each distance.
_Mined = tuple[Tensor, Tensor, Tensor, Tensor]


def _hard(distances: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    far, farthest = distances.masked_fill(~positive, -torch.inf).max(1)
    near, nearest = distances.masked_fill(~negative, torch.inf).min(1)
    exists = positive.any(1) & negative.any(1)
    hinge = torch.where(exists, far - near + margin, 0.0).clamp(min=0.0)
    costly = (hinge > 0).to(distances.dtype)
    slope = torch.zeros_like(distances)
    slope.scatter_add_(1, farthest.unsqueeze(1), costly.unsqueeze(1))
    slope.scatter_add_(1, nearest.unsqueeze(1), -costly.unsqueeze(1))
    return hinge.double().sum(), exists.sum(), costly.sum(), slope


def _semi_hard(distances: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    ordered, order = distances.masked_fill(~negative, torch.inf).sort(1)
    place = torch.searchsorted(ordered, distances.contiguous(), right=True).clamp_(max=distances.shape[1] - 1)
    beyond = ordered.gather(1, place)
    exists = positive & (beyond > distances) & (beyond < torch.inf)
    hinge = torch.where(exists, distances - beyond + margin, 0.0).clamp_(min=0.0)
    slope = (hinge > 0).to(distances.dtype)
    costly = slope.sum()
    slope.scatter_add_(1, order.gather(1, place), -slope.clone())
    return hinge.double().sum(), exists.sum(), costly, slope


def _all(distances: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    wide = distances.to(accumulation_dtype(distances.device))
    below = wide + margin
    ordered = wide.masked_fill(~negative, torch.inf).sort(1).values
    costly = torch.searchsorted(ordered, below).masked_fill_(~positive, 0)
    # Sum of the k nearest negatives of each anchor, for k = 0, 1, ...
    sums = torch.nn.functional.pad(ordered.masked_fill(ordered == torch.inf, 0.0).cumsum(1), (1, 0))
    total = (costly * below).sum() - sums.gather(1, costly).masked_fill_(~positive, 0.0).sum()
    reach = below.masked_fill(~positive, -torch.inf).sort(1).values
    pushed = distances.shape[1] - torch.searchsorted(reach, wide, right=True)
    slope = costly - pushed.masked_fill_(~negative, 0)
    count = (positive.sum(1) * negative.sum(1)).sum()
    return total, count, costly.sum(), slope.to(distances.dtype)
