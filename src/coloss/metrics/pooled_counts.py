"""Counting how the scores of all queries lie among those of the relevant pairs, in a stream of tiles."""

import math

import torch
from torch import Tensor

from .pair_scores import PairScores, nonzero

# Cells of the histogram; its counts fit a cache.
_CELLS = 2**16


class FixedPointScores:
    """Scores of pairs, all on one scale, from rows rounded so far that their products add up without any rounding.

    Every row keeps about 22 bits below its largest entry (for Euclidean distances: below the largest of all), so each
    sum of products is a whole number that float64 holds: whatever the tile, one pair has one score and equal rows tie.

    Args:
        scores: of the same pairs.
    """

    def __init__(self, scores: PairScores):
        self.scores = scores
        euclidean = scores.metric == "euclidean"
        digits = round(1 - math.log2(torch.finfo(scores.wide).eps))
        size = max(1, scores.base.shape[1]).bit_length() + (2 if euclidean else 0)
        self.bits = (digits - 1 - size) // 2
        largest = torch.ones((), dtype=scores.wide)
        if euclidean:
            parts = [
                part.to(scores.wide).abs().amax()
                for rows in (scores.queries, scores.base)
                for part in rows.split(1024)
                if part.numel()
            ]
            largest = torch.stack(parts).amax() if parts else largest
        self.largest = largest

    def _rounded(self, values: Tensor) -> Tensor:
        if not values.shape[1]:
            return values
        by_row = self.scores.metric != "euclidean"
        largest = values.abs().amax(1, keepdim=True) if by_row else self.largest.to(values)
        mantissa = largest.frexp().mantissa
        step = torch.where(mantissa > 0, largest / mantissa, 1.0) * 2.0**-self.bits  # a power of two
        return (values / step).round_().mul_(step)

    def left(self, rows: Tensor) -> Tensor:
        """Of some queries."""
        found = self._prepared(self.scores.queries[rows], self.scores.query_lengths[rows])
        if self.scores.metric != "euclidean":
            return found
        squares = found.square().sum(1, keepdim=True)
        return torch.cat([2 * found, -squares, -torch.ones_like(squares)], 1)

    def right(self, rows: Tensor | slice) -> Tensor:
        """Of some base rows."""
        found = self._prepared(self.scores.base[rows], self.scores.base_lengths[rows])
        if self.scores.metric != "euclidean":
            return found
        squares = found.square().sum(1, keepdim=True)
        return torch.cat([found, torch.ones_like(squares), squares], 1)

    def _prepared(self, rows: Tensor, lengths: Tensor) -> Tensor:
        values = rows.to(self.scores.wide)
        if self.scores.metric == "cosine":
            values = values / nonzero(lengths)[:, None]
        return self._rounded(values)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of some pairs, to the bit what a product of `left` and `right` gives."""
        parts = [
            (self.left(rows[part]) * self.right(columns[part])).sum(1)
            for part in self.scores.blocks(len(rows))
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.scores.wide, device=rows.device)


class WinHistogram:
    """Counts how many of some sorted scores lie below and at each score of a stream.

    Scores go into cells of equal width; only those in a cell that holds a sorted score are looked up.
    """

    def __init__(self, distinct: Tensor, counts: Tensor):
        self.distinct = distinct
        up_to = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        # Below and at: for a score between two sorted ones twice the count below, at one of them half of its own more.
        self.twice = torch.stack([2 * up_to, up_to + torch.cat([up_to[1:], up_to[-1:]])], 1).flatten()
        width = float(distinct[-1] - distinct[0]) / _CELLS
        self.width = width if width > 0 else 1.0
        cells = self._cells(distinct)
        every = torch.arange(_CELLS + 2, device=cells.device)
        self.below = 2 * up_to[torch.searchsorted(cells, every)]
        self.taken = torch.zeros(_CELLS + 2, dtype=torch.bool, device=cells.device)
        self.taken[cells] = True
        self.seen = torch.zeros(_CELLS + 2, dtype=torch.long, device=cells.device)
        self.lost = 0

    def _cells(self, scores: Tensor) -> Tensor:
        cells = (scores - self.distinct[0]).div_(self.width).clamp_(-1, _CELLS).add_(1)
        return cells.long()  # cell 0: below all that count, also -infinity

    def add(self, tile: Tensor) -> None:
        """Count all scores of a tile; -infinity for pairs that do not count."""
        close = tile.flatten()
        if len(close) > _CELLS:
            cells = self._cells(close)
            self.seen += torch.bincount(cells, minlength=_CELLS + 2)
            close = close[self.taken[cells]]
        index = torch.bucketize(close, self.distinct)
        equal = self.distinct[index.clamp(max=len(self.distinct) - 1)] == close
        self.lost += int(self.twice[2 * index + equal].sum())

    def twice_lost(self) -> int:
        """Over all scores seen, twice the number of sorted ones below, and once those at it."""
        return self.lost + int((self.seen * self.below * ~self.taken).sum())
