r"""Kernels that walk over all scores $x_i \cdot y_j$ of one block of rows, tile by tile, and keep none.

One program owns a block of rows and visits all columns: it needs no atomic operation, so that a result is the same each time (for the
same block sizes, which are chosen by timing at the first call in a process). What columns need is found by the same kernels with the
roles exchanged. So normalising rows and columns costs two products of x and y in place of one, their gradients four or more, and scores
of x against itself are all made, not half of them.

Products are those of float32 numbers (`input_precision="ieee"`), outside the tensor cores. TF32 would be several times as fast, but rounds
factors to 11 bits: scores of unit vectors, divided by a temperature $\tau$, and with them log-sum-exps and the relative size of
softmax weights would be off by up to $10^{-3} / \tau$ in place of $10^{-7} / \tau$. Three TF32 products in place of one ("tf32x3") would
come near to float32; that has not been tried.

Checked in Triton's interpreter only, and compiled; never yet run on a GPU.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..score_tiles import Mask, Softmax, Tiles
from .compiler import jit, kernel, power_of_two, tl


@jit
@no_type_check
def _masked_scores(
    x, y, row_groups, column_groups, rows, columns, row_count, column_count, diagonal,
    DIM: tl.constexpr, DIAGONAL: tl.constexpr, GROUPS: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, minus infinity where a pair does not count or does not exist."""
    row_here, column_here = rows < row_count, columns < column_count
    row_start, column_start = rows.to(tl.int64) * DIM, columns.to(tl.int64) * DIM
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DIM, DEPTH):
        part = start + tl.arange(0, DEPTH)
        inside = part < DIM
        left = tl.load(x + row_start[:, None] + part[None, :], row_here[:, None] & inside[None, :], 0.0)
        right = tl.load(
            y + column_start[None, :] + part[:, None], column_here[None, :] & inside[:, None], 0.0
        )
        scores = tl.dot(left, right, scores, input_precision="ieee")
    keep = row_here[:, None] & column_here[None, :]
    if DIAGONAL:
        keep = keep & (columns[None, :] - rows[:, None] != diagonal)
    if GROUPS:
        row_group = tl.load(row_groups + rows, row_here, 0)[:, None]
        column_group = tl.load(column_groups + columns, column_here, 0)[None, :]
        if SAME:
            keep = keep & (row_group == column_group)
        else:
            keep = keep & (row_group != column_group)
    return tl.where(keep, scores, float("-inf"))


@kernel(
    ["DIM", "GROUPS"],
    ({"ROWS": 64, "COLUMNS": 64, "DEPTH": 16}, 4, 3),
    ({"ROWS": 64, "COLUMNS": 128, "DEPTH": 16}, 8, 3),
    ({"ROWS": 128, "COLUMNS": 128, "DEPTH": 16}, 8, 3),
    ({"ROWS": 32, "COLUMNS": 64, "DEPTH": 32}, 4, 2),
)
@no_type_check
def _logsumexp_kernel(
    x, y, row_groups, column_groups, logs, row_count, column_count, diagonal,
    DIM: tl.constexpr, DIAGONAL: tl.constexpr, GROUPS: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    maxima = tl.full([ROWS], float("-inf"), tl.float32)
    # One double for each row and tile costs next to nothing, and thousands of tiles then add no rounding.
    sums = tl.zeros([ROWS], tl.float64)
    for start in range(0, column_count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        scores = _masked_scores(
            x, y, row_groups, column_groups, rows, columns, row_count, column_count, diagonal,
            DIM, DIAGONAL, GROUPS, SAME, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        largest = tl.maximum(maxima, tl.max(scores, 1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        sums = sums * tl.exp(maxima - shift).to(tl.float64)
        sums += tl.sum(tl.exp(scores - shift[:, None]), 1).to(tl.float64)
        maxima = largest
    # Where nothing counts the maximum stays minus infinity.
    logarithms = tl.log(tl.where(sums == 0.0, 1.0, sums)).to(tl.float32)
    tl.store(logs + rows, logarithms + maxima, rows < row_count)


@kernel(
    ["DIM", "FUNCTION", "GRADIENT"],
    ({"ROWS": 64, "COLUMNS": 32, "DEPTH": 16}, 4, 2),
    ({"ROWS": 64, "COLUMNS": 64, "DEPTH": 16}, 8, 2),
    ({"ROWS": 128, "COLUMNS": 32, "DEPTH": 16}, 8, 2),
    ({"ROWS": 32, "COLUMNS": 32, "DEPTH": 16}, 4, 2),
)
@no_type_check
def _slopes_kernel(
    x, y, row_groups, column_groups, row_logs, row_factors, column_logs, column_factors,
    gradient, totals, actives, row_count, column_count, diagonal,
    DIM: tl.constexpr, DIAGONAL: tl.constexpr, GROUPS: tl.constexpr, SAME: tl.constexpr,
    FUNCTION: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, GRADIENT: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of x in columns of its own, and for a margin function sum and number of active scores of each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    row_here = rows < row_count
    slopes = tl.zeros([ROWS, OUT], tl.float32)
    total, active = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.int32)
    if BY_ROW:
        row_log = tl.load(row_logs + rows, row_here, 0.0)[:, None]
        row_factor = tl.load(row_factors + rows, row_here, 0.0)[:, None]
    for start in range(0, column_count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_here = columns < column_count
        scores = _masked_scores(
            x, y, row_groups, column_groups, rows, columns, row_count, column_count, diagonal,
            DIM, DIAGONAL, GROUPS, SAME, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if FUNCTION == "softmax":
            slope = tl.zeros([ROWS, COLUMNS], tl.float32)
            if BY_ROW:
                slope += tl.exp(scores - row_log) * row_factor
            if BY_COLUMN:
                column_log = tl.load(column_logs + columns, column_here, 0.0)[None, :]
                column_factor = tl.load(column_factors + columns, column_here, 0.0)[None, :]
                slope += tl.exp(scores - column_log) * column_factor
        elif FUNCTION == "softplus":
            small = tl.exp(-tl.abs(scores))
            above = 1.0 + small
            # log(1 + small), where `above - 1` is how much of `small` the sum took in.
            taken = above - 1.0
            logs = tl.where(taken == 0.0, small, tl.log(above) * (small / tl.where(taken == 0.0, 1.0, taken)))
            slope = tl.where(scores >= 0.0, 1.0, small) / above
            total += tl.sum(tl.maximum(scores, 0.0) + logs, 1).to(tl.float64)
        else:
            slope = tl.where(scores > 0.0, 1.0, 0.0)
            margin = tl.maximum(scores, 0.0)
            active += tl.sum((scores > 0.0).to(tl.int32), 1)
            if FUNCTION == "squared_hinge":
                slope, margin = 2.0 * margin, margin * margin
            total += tl.sum(margin, 1).to(tl.float64)
        if GRADIENT:
            across = columns.to(tl.int64)[:, None] * DIM + out[None, :]
            others = tl.load(y + across, column_here[:, None] & (out[None, :] < DIM), 0.0)
            slopes = tl.dot(slope, others, slopes, input_precision="ieee")
    if GRADIENT:
        here = rows.to(tl.int64)[:, None] * DIM + out[None, :]
        tl.store(gradient + here, slopes, row_here[:, None] & (out[None, :] < DIM))
    if FUNCTION != "softmax":  # noqa: SIM102 (the first is decided when the kernel is compiled)
        if tl.program_id(1) == 0:
            tl.store(totals + rows, total, row_here)
            tl.store(actives + rows, active, row_here)


def logsumexps(tiles: Tiles, columns: bool) -> tuple[Tensor, Tensor | None]:
    """log-sum-exp of each row and, if asked for, of each column of the scores that count.

    Cost:
        One product of x and y for the rows and one for the columns; memory for the results alone.
    """
    x, y = tiles.x.contiguous(), tiles.columns.contiguous()
    of_rows = _row_logsumexps(x, y, tiles.mask)
    return of_rows, _row_logsumexps(y, x, _exchanged(tiles.mask)) if columns else None


def add_softmax_slopes(
    tiles: Tiles, rows: Softmax, columns: Softmax | None, for_x: Tensor, for_y: Tensor | None
) -> None:
    """Add the gradient of log-sum-exps to that of x and of y, as `score_tiles.add_softmax_slopes` does.

    Cost:
        For each of x and y two products, the one that makes the scores once for every 128 dimensions.
    """
    x, y = tiles.x.contiguous(), tiles.columns.contiguous()
    by_row, by_column = _log_and_factor(rows), None if columns is None else _log_and_factor(columns)
    for_x += _slopes(x, y, tiles.mask, "softmax", True, by_row, by_column)[0]
    if for_y is not None:
        for_y += _slopes(y, x, _exchanged(tiles.mask), "softmax", True, by_column, by_row)[0]


def margin_sum(
    tiles: Tiles, function: str, for_x: Tensor | None, for_y: Tensor | None, mutual: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum of a margin function over the scores that count, number of scores above 0, and gradients, as `score_tiles.margin_sum`."""
    x, y = tiles.x.contiguous(), tiles.columns.contiguous()
    gradient, totals, actives = _slopes(x, y, tiles.mask, function, for_x is not None)
    times = 2.0 if mutual or tiles.y is None else 1.0
    if for_x is not None:
        for_x.add_(gradient, alpha=times)
    if for_y is not None and tiles.y is not None:
        for_y.add_(_slopes(y, x, _exchanged(tiles.mask), function, True)[0], alpha=times)
    wide = accumulation_dtype(x.device)
    return totals.sum().to(wide), actives.sum().to(wide)


def _exchanged(mask: Mask) -> Mask:
    """The mask of y against x."""
    diagonal = None if mask.diagonal is None else -mask.diagonal
    return Mask(diagonal, mask.column_groups, mask.row_groups, mask.same)


def _log_and_factor(side: Softmax) -> tuple[Tensor, Tensor]:
    return (
        side.logs.masked_fill(side.empty, 0.0).contiguous(),
        side.gradient.masked_fill(side.empty, 0.0).contiguous(),
    )


def _parts(x: Tensor, mask: Mask) -> tuple[bool, Tensor, Tensor]:
    """Whether pairs have groups, and these; what is not there is never read."""
    if mask.row_groups is None or mask.column_groups is None:
        return False, x, x
    return True, mask.row_groups.contiguous(), mask.column_groups.contiguous()


def _row_logsumexps(x: Tensor, y: Tensor, mask: Mask) -> Tensor:
    logs = x.new_empty(len(x))
    grouped, row_groups, column_groups = _parts(x, mask)
    with torch.cuda.device_of(x):
        _logsumexp_kernel[lambda sizes: (math.ceil(len(x) / sizes["ROWS"]),)](
            x, y, row_groups, column_groups, logs, len(x), len(y), mask.diagonal or 0,
            DIM=x.shape[1], DIAGONAL=mask.diagonal is not None, GROUPS=grouped, SAME=mask.same,
        )  # fmt: skip
    return logs


def _slopes(
    x: Tensor,
    y: Tensor,
    mask: Mask,
    function: str,
    with_gradient: bool,
    by_row: tuple[Tensor, Tensor] | None = None,
    by_column: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x, and for a margin function the sum and the number of active scores of each row."""
    dim, rows = x.shape[1], 0 if function == "softmax" else len(x)
    out = power_of_two(16, 128, dim)
    gradient = torch.empty_like(x) if with_gradient else x.new_empty(0)
    totals, actives = x.new_empty(rows, dtype=torch.float64), x.new_empty(rows, dtype=torch.int32)
    grouped, row_groups, column_groups = _parts(x, mask)
    with torch.cuda.device_of(x):
        _slopes_kernel[
            lambda sizes: (math.ceil(len(x) / sizes["ROWS"]), math.ceil(dim / out) if with_gradient else 1)
        ](
            x, y, row_groups, column_groups, *(by_row or (x, x)), *(by_column or (x, x)),
            gradient, totals, actives, len(x), len(y), mask.diagonal or 0,
            DIM=dim, DIAGONAL=mask.diagonal is not None, GROUPS=grouped, SAME=mask.same,
            FUNCTION=function, BY_ROW=by_row is not None, BY_COLUMN=by_column is not None, GRADIENT=with_gradient,
            OUT=out,
        )  # fmt: skip
    return gradient, totals, actives
