"""Sums over few of the pairs: those of one group, or those of a list. Differentiable, in memory that does not grow with the pairs."""

from typing import Any

import torch
from torch import Tensor

from .gradients import first_order_only
from .ring import Ring
from .streaming import pairs_within

# Entries gathered at once for listed pairs.
_GATHERED = 2**20


@torch.library.custom_op("coloss::group_index", mutates_args=())
def group_index(ids: Tensor) -> Tensor:
    """Each id as its number, from 0, among the distinct ids in rising order."""
    return torch.unique(ids, return_inverse=True)[1]


@group_index.register_fake
def _(ids):  # type: ignore[no-untyped-def]
    return ids.new_empty(ids.shape, dtype=torch.int64)


@torch.library.custom_op("coloss::group_sum", mutates_args=())
def group_sum(values: Tensor, groups: Tensor, at: Tensor, ring: bool) -> Tensor:
    """For each entry of `at`, the sum of the rows of `values` whose group it names.

    Args:
        values: (rows, dim).
        groups: (rows,) integers.
        at: (queries,) integers.
        ring: sum over the rows of all processes.

    Returns:
        (queries, dim); 0 where no row is of the group.
    """
    names, place = torch.unique(at, return_inverse=True)
    sums = values.new_zeros(len(names), values.shape[1])
    journey = Ring(values) if ring else None
    for _ in range(1 if journey is None else len(journey)):
        if len(names):
            found = torch.searchsorted(names, groups).clamp_(max=len(names) - 1)
            here = names[found] == groups
            sums.index_add_(0, found[here], values[here])
        if journey is not None:
            values, groups = journey.pass_on(values, groups)
    return sums[place]


@group_sum.register_fake
def _(values, groups, at, ring):  # type: ignore[no-untyped-def]
    return values.new_empty(at.shape[0], values.shape[1])


def _remember_groups(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, groups, at, ctx.ring = inputs
    ctx.save_for_backward(groups, at)


def _differentiate_group_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    groups, at = ctx.saved_tensors
    return group_sum(gradient.contiguous(), at, groups, ctx.ring), None, None, None


group_sum.register_autograd(_differentiate_group_sum, setup_context=_remember_groups)


@torch.library.custom_op("coloss::pair_scores", mutates_args=())
def pair_scores(x: Tensor, y: Tensor, pairs: Tensor, ring: bool) -> Tensor:
    """The scores of listed pairs, the inner products of a row of x and a row of y.

    Args:
        x: (rows, dim).
        y: (columns, dim).
        pairs: (2, n) row and column of each pair; in a ring the columns are counted over all processes.
        ring: see above.

    Returns:
        (n,).
    """
    scores = x.new_empty(pairs.shape[1])
    if not ring:
        _write_scores(scores, x, y, pairs, slice(0, len(y)))
        return scores
    journey = Ring(y)
    for _ in range(len(journey)):
        _write_scores(scores, x, y, pairs, journey.rows)
        (y,) = journey.pass_on(y)
    return scores


@pair_scores.register_fake
def _(x, y, pairs, ring):  # type: ignore[no-untyped-def]
    return x.new_empty(pairs.shape[1])


@torch.library.custom_op("coloss::pair_scores_backward", mutates_args=())
def _pair_scores_backward(
    x: Tensor, y: Tensor, pairs: Tensor, ring: bool, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    for_x, for_y = torch.zeros_like(x), torch.zeros_like(y)
    if not ring:
        _add_slopes(for_x, for_y, x, y, pairs, gradient, slice(0, len(y)))
        return for_x, for_y
    journey = Ring(y)
    for _ in range(len(journey)):
        _add_slopes(for_x, for_y, x, y, pairs, gradient, journey.rows)
        y, for_y = journey.pass_on(y, for_y)
    return for_x, for_y


@_pair_scores_backward.register_fake
def _(x, y, pairs, ring, gradient):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(y.shape)


def _remember_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, pairs, ctx.ring = inputs
    ctx.save_for_backward(x, y, pairs)


@first_order_only("this loss on pairs of embeddings")
def _differentiate_pair_scores(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_pair_scores_backward(*ctx.saved_tensors, ctx.ring, gradient), None, None


pair_scores.register_autograd(_differentiate_pair_scores, setup_context=_remember_pairs)


def _write_scores(scores: Tensor, x: Tensor, y: Tensor, pairs: Tensor, columns: slice) -> None:
    for part, listed in _chunks(pairs, columns, x.shape[1]):
        scores[part] = (x[listed[0]] * y[listed[1]]).sum(1)


def _add_slopes(
    for_x: Tensor, for_y: Tensor, x: Tensor, y: Tensor, pairs: Tensor, gradient: Tensor, columns: slice
) -> None:
    for part, listed in _chunks(pairs, columns, x.shape[1]):
        slope = gradient[part].unsqueeze(1)
        for_x.index_add_(0, listed[0], slope * y[listed[1]])
        for_y.index_add_(0, listed[1], slope * x[listed[0]])


def _chunks(pairs: Tensor, columns: slice, width: int) -> list[tuple[Tensor, Tensor]]:
    """The pairs that fall into some columns, a few at a time: their numbers, and rows and columns counted from there."""
    here = ((pairs[1] >= columns.start) & (pairs[1] < columns.stop)).nonzero().flatten()
    parts = here.split(max(1, _GATHERED // max(width, 1)))
    return [(part, pairs_within(pairs[:, part], columns)) for part in parts]
