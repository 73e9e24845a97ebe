r"""The streaming core: scores between rows and columns, visited one tile at a time.

Scores are $s_{ij} = x_i \cdot y_j$. Temperatures, biases and distances are put into the embeddings beforehand (a row divided
by its temperature, one more column), so that one core serves every loss: what remains is which pairs count (`Mask`), and
what is made of a tile of scores. Nothing here holds more than two tiles.

Where all scores are known to be small, by the product of the largest norms, exponentials need no shift: one exponential then
serves rows and columns alike, and a pair is left out by a product with 0. Elsewhere maxima are carried along.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import accumulation_dtype, without_autocast

# Sides of a tile. On a CPU a tile and its operands stay in cache; an accelerator wants larger products.
_CPU_TILE = (512, 1024)
_ACCELERATOR_TILE = (4096, 16384)

# Largest score whose exponential needs no shift. Products of two exponentials must stay clear of the smallest normal number too: below
# it processors are up to a hundred times slower, in exponentials as in matrix products.
_BOUND = {torch.float32: 30.0, torch.float64: 300.0}


# Products of 1 + exponentials stay finite in float32 while the bounds of their exponents add up to no more than this.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Mask:
    """Which pairs do not count. All parts that are given act together.

    Attributes:
        diagonal: pairs with column = row + this number.
        row_groups, column_groups: integers from 0 below the number of rows and columns; pairs of equal groups, or with `same` pairs
            of unequal ones.
        same: see above.
        ignore: (rows, columns), True where a pair does not count.
        pairs: (2, n) rows and columns of single pairs, in rising order of rows.
    """

    diagonal: int | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    same: bool = False
    ignore: Tensor | None = None
    pairs: Tensor | None = None

    def apply(self, tile: Tensor, spare: Tensor, rows: slice, columns: slice, value: float) -> None:
        """Write 0 (into exponentials) or minus infinity (into scores) where a pair of the tile does not count."""
        if self.diagonal is not None:
            offset = rows.start + self.diagonal - columns.start
            if -tile.shape[0] < offset < tile.shape[1]:
                tile.diagonal(offset).fill_(value)
        if self.row_groups is not None and self.column_groups is not None:
            row, column = self.row_groups[rows].unsqueeze(1), self.column_groups[columns].unsqueeze(0)
            if value == 0:
                # Groups in the tile's own float type: the comparison and the product are then vectorised.
                keep = torch.eq if self.same else torch.ne
                keep(row.to(tile.dtype), column.to(tile.dtype), out=spare)
                tile.mul_(spare)
            else:
                tile.masked_fill_(row != column if self.same else row == column, value)
        if self.ignore is not None:
            tile.masked_fill_(self.ignore[rows, columns], value)
        if self.pairs is not None:
            edges = torch.tensor([rows.start, rows.stop], device=self.pairs.device)
            first, last = torch.searchsorted(self.pairs[0], edges).tolist()
            row, column = self.pairs[:, first:last]
            here = (column >= columns.start) & (column < columns.stop)
            tile[row[here] - rows.start, column[here] - columns.start] = value


@dataclass(frozen=True)
class Tiles:
    """The scores of x against y; with y None those of x against itself, where each unordered pair is visited once.

    Attributes:
        x: (rows, dim), float32 or float64.
        y: (columns, dim) in the type of x, or None.
        mask: pairs that do not count; symmetric where y is None.
        side: side of a square tile; None chooses for the device.
    """

    x: Tensor
    y: Tensor | None = None
    mask: Mask = field(default_factory=Mask)
    side: int | None = None

    @property
    def columns(self) -> Tensor:
        """The rows of y, or of x where it meets itself."""
        return self.x if self.y is None else self.y

    def bound(self) -> float:
        """A number that no score exceeds in size: by the largest norms, or by the largest entries of each dimension."""
        x, y = self.x, self.columns
        if not x.numel() or not y.numel():
            return 0.0
        longest = torch.linalg.vector_norm(x, dim=1).amax()
        other = longest if self.y is None else torch.linalg.vector_norm(y, dim=1).amax()
        largest = x.abs().amax(0)
        entries = largest.dot(largest if self.y is None else y.abs().amax(0))
        return float(torch.minimum(longest * other, entries))

    def bounded(self) -> bool:
        """Whether exponentials need no shift."""
        return self.bound() <= _BOUND[self.x.dtype]

    def scores(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Rows, columns and raw scores of each tile, and a spare tile; both are overwritten when the next ones are asked for.

        Against itself these are the tiles on the diagonal (whole) and right of it.
        """
        default = _CPU_TILE if self.x.device.type == "cpu" else _ACCELERATOR_TILE
        tall, wide = (self.side, self.side) if self.side is not None else default
        count, width = len(self.x), len(self.columns)
        size = min(tall, count) * min(max(wide, tall), width)
        first, second = self.x.new_empty(size), self.x.new_empty(size)
        for start in range(0, count, tall):
            rows = slice(start, min(start + tall, count))
            stops = [*range(rows.stop if self.y is None else 0, width, wide), width]
            across = [slice(*pair) for pair in zip(stops, stops[1:])]
            for columns in [rows, *across] if self.y is None else across:
                shape = rows.stop - rows.start, columns.stop - columns.start
                tile, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (first, second))
                with without_autocast(self.x.device):
                    torch.mm(self.x[rows], self.columns[columns].T, out=tile)
                yield rows, columns, tile, spare


class RunningLogSumExp:
    """log-sum-exp of rows (or of columns), tile after tile; sums are kept in the widest type.

    Args:
        count: number of rows.
        like: gives device and type of the result.
        shifted: carry maxima along; without it tiles come as exponentials.
    """

    def __init__(self, count: int, like: Tensor, shifted: bool) -> None:
        self.dtype = like.dtype
        self.sums = torch.zeros(count, dtype=accumulation_dtype(like.device), device=like.device)
        self.maxima = like.new_full((count,), -math.inf) if shifted else None

    def add(self, part: slice, tile: Tensor, spare: Tensor, dim: int) -> None:
        """Take in a tile of masked scores, or of exponentials, summed over `dim`, into the rows `part`."""
        if self.maxima is None:
            self.sums[part] += tile.sum(dim)
            return
        old = self.maxima[part]
        new = torch.maximum(old, tile.amax(dim))
        shift = new.masked_fill(new == -math.inf, 0.0)
        _exponentials(tile, shift.unsqueeze(dim), spare)
        self.sums[part] = self.sums[part] * (old - shift).exp_() + spare.sum(dim)
        self.maxima[part] = new

    def result(self) -> Tensor:
        """The log-sum-exp so far; minus infinity where nothing counted."""
        logs = self.sums.log()
        return (logs if self.maxima is None else logs + self.maxima).to(self.dtype)


def logsumexps(tiles: Tiles, columns: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log-sum-exp of each row and, if asked for, of each column of the scores that count; and the last tile, as `add_softmax_slopes`
    takes it back."""
    shifted = not tiles.bounded()
    for_rows = RunningLogSumExp(len(tiles.x), tiles.x, shifted)
    for_columns = RunningLogSumExp(len(tiles.columns), tiles.x, shifted) if columns else None
    tile = None
    for rows, across, tile, spare in tiles.scores():
        _open_tile(tiles.mask, rows, across, tile, spare, shifted)
        for_rows.add(rows, tile, spare, 1)
        if tiles.y is None and across != rows:
            for_rows.add(across, tile, spare, 0)
        if for_columns is not None:
            for_columns.add(across, tile, spare, 0)
    return for_rows.result(), None if for_columns is None else for_columns.result(), tile


@dataclass(frozen=True)
class Softmax:
    """A normalised side: the log-sum-exp of each row (or column) and the gradient that reached it."""

    logs: Tensor
    gradient: Tensor

    def factors(self) -> Tensor:
        """What an unshifted exponential is multiplied by: the gradient over the sum of exponentials, 0 where nothing counted."""
        return (self.gradient * (-self.logs).exp()).masked_fill(self.empty, 0.0)

    @property
    def empty(self) -> Tensor:
        """Where nothing counted."""
        return self.logs == -math.inf


def add_softmax_slopes(
    tiles: Tiles,
    rows: Softmax,
    columns: Softmax | None,
    for_x: Tensor,
    for_y: Tensor | None,
    kept: Tensor | None = None,
) -> None:
    """Add the gradient of log-sum-exps to that of x and of y, with the scores made again.

    With y None, `columns` is the same as `rows` and `for_y` None: each pair then stands for both of its orders. `for_y` may be None
    otherwise too, where only the gradient of x is wanted.

    Args:
        tiles: as in the forward pass.
        rows, columns: normalised sides.
        for_x, for_y: what is added to.
        kept: the one tile that `logsumexps` gave back, in place of making it again.
    """
    shifted = not tiles.bounded()
    sides = [rows] if columns is None else [rows, columns]
    if shifted:
        factors = [side.gradient.masked_fill(side.empty, 0.0) for side in sides]
        logs = [side.logs.masked_fill(side.empty, 0.0) for side in sides]
    else:
        factors, logs = [side.factors() for side in sides], []
    if kept is not None:
        whole = slice(0, len(tiles.x)), slice(0, len(tiles.columns))
        walk = iter(
            [(*whole, kept.clone() if shifted and columns is not None else kept, torch.empty_like(kept))]
        )
    else:
        walk = tiles.scores()
    for here, across, tile, spare in walk:
        if kept is None:
            _open_tile(tiles.mask, here, across, tile, spare, shifted)
        row_factor = factors[0][here].unsqueeze(1)
        if shifted:
            _exponentials(tile, logs[0][here].unsqueeze(1), spare).mul_(row_factor)
        else:
            torch.mul(tile, row_factor, out=spare)
        if columns is not None:
            if shifted:
                _exponentials(tile, logs[1][across], tile)
            spare.addcmul_(tile, factors[1][across].unsqueeze(0))
        _add_products(tiles, here, across, spare, for_x, for_y)


def margin_sum(
    tiles: Tiles, function: str, for_x: Tensor | None, for_y: Tensor | None, mutual: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum of softplus ("softplus"), max(0, s) ("hinge") or its square ("squared_hinge") over the scores that count.

    With y None each pair stands for both of its orders.

    Args:
        tiles: which scores.
        function: "softplus", "hinge" or "squared_hinge".
        for_x, for_y: the gradient is added to them in the same walk; with y None only to `for_x`.
        mutual: the columns meet the rows elsewhere in exchanged roles, so that the gradient of x counts twice, as it does with y None.

    Returns:
        The sum, and the number of scores above 0 (not counted for softplus).
    """
    wide = accumulation_dtype(tiles.x.device)
    total = torch.zeros((), dtype=wide, device=tiles.x.device)
    active = total.clone()
    bound = tiles.bound()
    shifted = function != "softplus" or not bound <= _BOUND[tiles.x.dtype]
    folds = 0 if shifted or not bound else max(0, min(3, int(math.log2(_LARGEST_EXPONENT / bound))))
    for rows, columns, tile, spare in tiles.scores():
        _open_tile(tiles.mask, rows, columns, tile, spare, shifted)
        times = 2 if tiles.y is None and columns != rows else 1
        if function == "softplus":
            if shifted:
                torch.sigmoid(tile, out=spare)
                tile = -F.logsigmoid(-tile)
            else:
                torch.add(tile, 1.0, out=spare)
                torch.div(tile, spare, out=spare)
                tile = _fold(tile, folds).log1p_()
        else:
            torch.gt(tile, 0.0, out=spare)
            active += times * spare.sum()
            tile.clamp_(min=0.0)
            if function == "squared_hinge":
                torch.mul(tile, 2.0, out=spare)
                tile.square_()
        total += times * tile.sum()
        if for_x is not None:
            if mutual or tiles.y is None:
                spare.mul_(2.0)
            _add_products(tiles, rows, columns, spare, for_x, for_y)
    return total, active


def _open_tile(mask: Mask, rows: slice, columns: slice, tile: Tensor, spare: Tensor, shifted: bool) -> None:
    """Turn raw scores into masked ones, or into masked exponentials where these need no shift."""
    if shifted:
        mask.apply(tile, spare, rows, columns, -math.inf)
    else:
        mask.apply(tile.exp_(), spare, rows, columns, 0.0)


def _fold(exponentials: Tensor, times: int) -> Tensor:
    """Fewer numbers with the same sum of log(1 + e): halves are joined, (1 + a)(1 + b) - 1 = a + b + ab. Overwrites its input."""
    for _ in range(times):
        if exponentials.shape[1] % 2:
            break
        first, second = exponentials.tensor_split(2, 1)
        exponentials = first.addcmul_(first, second).add_(second)
    return exponentials


def _add_products(
    tiles: Tiles, rows: slice, columns: slice, slope: Tensor, for_x: Tensor, for_y: Tensor | None
) -> None:
    """Turn the slope of a tile of scores into gradients of the embeddings."""
    with without_autocast(slope.device):
        for_x[rows].addmm_(slope, tiles.columns[columns])
        if tiles.y is None:
            for_y = for_x if columns != rows else None
        if for_y is not None:
            for_y[columns].addmm_(slope.T, tiles.x[rows])


def _exponentials(scores: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Exponentials of scores less a shift; 0 for those below the square of what an unshifted one may be."""
    floor = -2 * _BOUND[scores.dtype]
    torch.sub(scores, shift, out=out).clamp_(min=floor).exp_()
    return F.threshold(out, 2 * math.exp(floor), 0.0, inplace=True)
