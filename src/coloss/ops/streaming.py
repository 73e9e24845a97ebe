"""Differentiable sums over all scores between two sets of embeddings, without ever holding the scores.

Two custom operators, which `torch.compile` calls without a graph break: the log-sum-exp of each row and column of the scores, whose
backward pass makes the scores again, and the sum of a margin function over them, whose gradient is made in the forward walk.

With `ring=True` the columns are those of all processes: they travel from process to process, and the gradients are those of the sum of
all processes' losses (see `coloss.ops.distributed`).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .distributed import all_reduce_mean
from .gradients import first_order_only, needs_gradient
from .kernels import add_softmax_slopes, logsumexps, margin_sum
from .precision import accumulation_dtype
from .ring import Ring
from .score_tiles import Mask, Softmax, Tiles

# Scores kept for the backward pass where there are so few, in place of being made again.
_KEPT_ON_CPU = 2**22
_KEPT_ON_ACCELERATOR = 2**24

MARGIN_FUNCTIONS = ("softplus", "hinge", "squared_hinge")


def streaming_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    mask: Mask | None = None,
    *,
    columns: bool = False,
    side: int | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor]:
    """log-sum-exp of the rows, and if asked for of the columns, of x @ y.T over the pairs that count.

    Args:
        x: (rows, dim), float32 or float64.
        y: (columns, dim) in the same type; None compares x with itself, at half the cost.
        mask: pairs that do not count; in a ring `column_groups` and `pairs` count the columns of all processes.
        columns: whether those of the columns are wanted; with y None they are those of the rows.
        side: of a square tile, >= 1; by default chosen for the device.
        ring: compare with the columns of all processes.

    Returns:
        (rows,) and (columns,), the second empty if not asked for; minus infinity, with gradient 0, where nothing counts.

    Cost:
        $O(N M D)$ time, four matrix products forward and backward (two with y None); $O((N + M) D)$ memory and two tiles.
    """
    mask = mask or Mask()
    gradient = needs_gradient(x) if y is None else needs_gradient(x, y)
    parts = mask.diagonal, mask.row_groups, mask.column_groups, mask.same, mask.ignore, mask.pairs
    of_rows, of_columns, _ = _logsumexp(x, y, *parts, columns and y is not None, side, gradient, ring)
    return of_rows, of_rows if columns and y is None else of_columns


def streaming_margin_sum(
    x: Tensor,
    y: Tensor | None = None,
    mask: Mask | None = None,
    *,
    function: str = "softplus",
    side: int | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of softplus(s), max(0, s) or max(0, s)^2 over the scores s that count, and how many of those are above 0.

    Args:
        x: (rows, dim), float32 or float64.
        y: (columns, dim) in the same type; None compares x with itself, at half the cost, over both orders of each pair.
        mask: pairs that do not count; in a ring `column_groups` and `pairs` count the columns of all processes.
        function: one of `MARGIN_FUNCTIONS`.
        side: of a square tile, >= 1; by default chosen for the device.
        ring: compare with the columns of all processes. All processes must weigh the sum alike.

    Returns:
        Two scalars, over this process's rows; the second has no gradient and is 0 for softplus.

    Cost:
        $O(N M D)$ time, three matrix products; $O((N + M) D)$ memory and two tiles.
    """
    mask = mask or Mask()
    gradient = needs_gradient(x) if y is None else needs_gradient(x, y)
    parts = mask.diagonal, mask.row_groups, mask.column_groups, mask.same, mask.ignore, mask.pairs
    total, active, _, _ = _margin_sum(x, y, *parts, function, side, gradient, ring)
    return total, active


def _met(tiles: Tiles, journey: Ring, block: Tensor) -> Tiles:
    """The scores of the own rows against the block of columns that is here on its journey."""
    mask = replace(
        tiles.mask,
        diagonal=tiles.mask.diagonal if journey.at_home else None,
        column_groups=None if tiles.mask.column_groups is None else tiles.mask.column_groups[journey.rows],
        pairs=None if tiles.mask.pairs is None else pairs_within(tiles.mask.pairs, journey.rows),
    )
    own = tiles.y is None and journey.at_home
    return replace(tiles, y=None if own else block, mask=mask)


def pairs_within(pairs: Tensor, columns: slice) -> Tensor:
    """The pairs whose column is one of those given, counted from there."""
    here = (pairs[1] >= columns.start) & (pairs[1] < columns.stop)
    return torch.stack([pairs[0, here], pairs[1, here] - columns.start])


def _kept_shape(x: Tensor, columns: Tensor, keep: bool, ring: bool) -> tuple[int, int]:
    limit = _KEPT_ON_CPU if x.device.type == "cpu" else _KEPT_ON_ACCELERATOR
    rows, width = x.shape[0], columns.shape[0]
    return (rows, width) if keep and not ring and rows * width <= limit else (0, 0)


@torch.library.custom_op("coloss::similarity_logsumexp", mutates_args=())
def _logsumexp(
    x: Tensor,
    y: Tensor | None,
    diagonal: int | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    same: bool,
    ignore: Tensor | None,
    pairs: Tensor | None,
    columns: bool,
    side: int | None,
    keep: bool,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, y, Mask(diagonal, row_groups, column_groups, same, ignore, pairs), side)
    nothing = x.new_empty(0)
    if not ring:
        shape = _kept_shape(x, tiles.columns, keep and side is None, ring)
        if shape != (0, 0):
            tiles = replace(tiles, side=max(*shape, 1))
        of_rows, of_columns, last = logsumexps(tiles, columns)
        kept = last if last is not None and shape != (0, 0) else x.new_empty(shape)
        return of_rows, nothing if of_columns is None else of_columns, kept
    journey, block = Ring(tiles.columns), tiles.columns
    of_rows, of_columns = x.new_full((len(x),), -math.inf), x.new_full((len(block),), -math.inf)
    for _ in range(len(journey)):
        by_rows, by_columns, _ = logsumexps(_met(tiles, journey, block), columns)
        of_rows = torch.logaddexp(of_rows, by_rows)
        if by_columns is not None:
            of_columns = torch.logaddexp(of_columns, by_columns)
        block, of_columns = journey.pass_on(block, of_columns)
    return of_rows, of_columns if columns else nothing, x.new_empty(0, 0)


@_logsumexp.register_fake
def _(x, y, diagonal, row_groups, column_groups, same, ignore, pairs, columns, side, keep, ring):  # type: ignore[no-untyped-def]
    across = x if y is None else y
    shape = _kept_shape(x, across, keep and side is None, ring)
    return x.new_empty(x.shape[0]), x.new_empty(across.shape[0] if columns else 0), x.new_empty(shape)


@torch.library.custom_op("coloss::similarity_logsumexp_backward", mutates_args=())
def _logsumexp_backward(
    x: Tensor,
    y: Tensor | None,
    diagonal: int | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    same: bool,
    ignore: Tensor | None,
    pairs: Tensor | None,
    side: int | None,
    ring: bool,
    of_rows: Tensor,
    of_columns: Tensor,
    kept: Tensor,
    for_rows: Tensor,
    for_columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tiles = Tiles(x, y, Mask(diagonal, row_groups, column_groups, same, ignore, pairs), side)
    rows = Softmax(of_rows, for_rows)
    columns = None if for_columns is None else Softmax(of_columns, for_columns)
    for_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for_y = x.new_zeros(0) if y is None else torch.zeros_like(y, memory_format=torch.contiguous_format)
    if not ring:
        both = rows if y is None else columns
        add_softmax_slopes(
            tiles, rows, both, for_x, None if y is None else for_y, kept if kept.numel() else None
        )
        return for_x, for_y
    journey, block = Ring(tiles.columns), tiles.columns
    # With y None the rows of the others come by as columns, and nothing of the gradient needs to travel.
    visitors = rows if y is None else columns
    for _ in range(len(journey)):
        add_softmax_slopes(_met(tiles, journey, block), rows, visitors, for_x, None if y is None else for_y)
        sides = [] if visitors is None else [visitors.logs, visitors.gradient]
        block, slope, *sides = journey.pass_on(block, block[:, :0] if y is None else for_y, *sides)
        for_y = for_y if y is None else slope
        visitors = Softmax(*sides) if sides else None
    return for_x, for_y


@_logsumexp_backward.register_fake
def _(x, y, *others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(0) if y is None else x.new_empty(y.shape)


def _remember_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, diagonal, row_groups, column_groups, same, ignore, pairs, columns, side, _, ring = inputs
    ctx.save_for_backward(x, y, row_groups, column_groups, ignore, pairs, *output)
    ctx.settings = diagonal, same, columns, side, ring
    ctx.set_materialize_grads(False)


@first_order_only("this loss on pairs of embeddings")
def _differentiate_logsumexp(
    ctx: Any, for_rows: Tensor | None, for_columns: Tensor | None, for_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, row_groups, column_groups, ignore, pairs, of_rows, of_columns, kept = ctx.saved_tensors
    diagonal, same, columns, side, ring = ctx.settings
    for_x, for_y = _logsumexp_backward(
        x,
        y,
        diagonal,
        row_groups,
        column_groups,
        same,
        ignore,
        pairs,
        side,
        ring,
        of_rows,
        of_columns,
        kept,
        torch.zeros_like(of_rows) if for_rows is None else for_rows,
        torch.zeros_like(of_columns) if columns and for_columns is None else for_columns,
    )
    return for_x, None if y is None else for_y, *[None] * 10


_logsumexp.register_autograd(_differentiate_logsumexp, setup_context=_remember_logsumexp)


@torch.library.custom_op("coloss::similarity_margin_sum", mutates_args=())
def _margin_sum(
    x: Tensor,
    y: Tensor | None,
    diagonal: int | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    same: bool,
    ignore: Tensor | None,
    pairs: Tensor | None,
    function: str,
    side: int | None,
    with_gradient: bool,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = Tiles(x, y, Mask(diagonal, row_groups, column_groups, same, ignore, pairs), side)
    for_x = x.new_zeros(x.shape if with_gradient else 0)
    for_y = x.new_zeros(y.shape if with_gradient and y is not None else 0)
    slope_x, slope_y = for_x if with_gradient else None, for_y if with_gradient and y is not None else None
    if not ring:
        total, active = margin_sum(tiles, function, slope_x, slope_y)
        return total.to(x.dtype), active.to(x.dtype), for_x, for_y
    journey, block = Ring(tiles.columns), tiles.columns
    wide = accumulation_dtype(x.device)
    total, active = torch.zeros((), dtype=wide, device=x.device), torch.zeros((), dtype=wide, device=x.device)
    for _ in range(len(journey)):
        part = _met(tiles, journey, block)
        here = margin_sum(part, function, slope_x, slope_y, mutual=y is None)
        total, active = total + here[0], active + here[1]
        if slope_y is None:
            (block,) = journey.pass_on(block)
        else:
            block, slope_y = journey.pass_on(block, slope_y)
    return total.to(x.dtype), active.to(x.dtype), for_x, for_y if slope_y is None else slope_y


@_margin_sum.register_fake
def _(x, y, diagonal, row_groups, column_groups, same, ignore, pairs, function, side, with_gradient, ring):  # type: ignore[no-untyped-def]
    for_x = x.new_empty(x.shape if with_gradient else 0)
    for_y = x.new_empty(y.shape if with_gradient and y is not None else 0)
    return x.new_empty(()), x.new_empty(()), for_x, for_y


def _remember_margin_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.two_sided, ctx.ring = inputs[1] is not None, inputs[-1]
    ctx.set_materialize_grads(False)


@first_order_only("this loss on pairs of embeddings")
def _differentiate_margin_sum(ctx: Any, for_total: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    for_x, for_y = ctx.saved_tensors
    if for_total is None:
        return (None,) * 12
    if ctx.ring:
        # The walk took the sum's own weight as 1 on every process; here the processes' weights meet.
        for_total = all_reduce_mean(for_total)
    return for_total * for_x, for_total * for_y if ctx.two_sided else None, *[None] * 10


_margin_sum.register_autograd(_differentiate_margin_sum, setup_context=_remember_margin_sum)
