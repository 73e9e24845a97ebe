"""Scores of all query-base pairs, tile by tile: quick ones with a bound on their error, and exact ones on demand.

A tile is one matrix product in the precision of the embeddings. Its rounding depends on the shape of the tile, so two
equal rows may score differently in two tiles, and an order by quick scores alone would depend on the chunk size. Every
quick score therefore has a bound (the usual one of a dot product, about dimensions * rounding unit * lengths), and where
bounds overlap the pair is scored again, in float64 and alone, which always rounds alike. So the order is that of the
exact scores, at the price of the product. Rows are centred before the product: that shifts all scores of one query
alike and leaves their order, and makes the bounds small where embeddings have nearly collapsed to one point.
"""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.ops import accumulation_dtype, without_autocast

Metric: TypeAlias = Literal["cosine", "inner", "euclidean"]
METRICS = ("cosine", "inner", "euclidean")

# Rows that are brought to full precision at once, and numbers in one block of exact products: both fit a cache.
_ROWS = 1024
_BLOCK = 2**19


class PairScores:
    """Scores between queries and base rows, higher for nearer: cosine, inner product or minus Euclidean distance.

    Args:
        queries: (queries, dimensions), finite.
        base: (base, dimensions), finite.
        metric: "cosine" (0 with a zero row), "inner" or "euclidean".

    Raises:
        ValueError: if shapes or metric are wrong, or a value is NaN or infinite (for float64: about 1e150 and more).
    """

    def __init__(self, queries: Tensor, base: Tensor, metric: str):
        for name, rows in (("queries", queries), ("base", base)):
            if rows.ndim != 2:
                raise ValueError(f"{name} must be (samples, dimensions), got shape {tuple(rows.shape)}")
        if queries.shape[1] != base.shape[1]:
            raise ValueError(
                "queries and base must have one number of dimensions, "
                f"got {queries.shape[1]} and {base.shape[1]}"
            )
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.metric = metric
        self.queries, self.base = queries.detach(), base.detach()
        self.wide = accumulation_dtype(base.device)
        double = torch.float64 in (queries.dtype, base.dtype)
        self.dtype = self.wide if double else torch.float32
        self.query_lengths = _lengths("queries", self.queries, self.wide)
        same = base is queries
        self.base_lengths = self.query_lengths if same else _lengths("base", self.base, self.wide)
        self._place_centre()

    def _place_centre(self) -> None:
        """Scale and centre of the base, and the share of the bounds that comes from float64 itself."""
        longest = float(self.base_lengths.amax()) if len(self.base) else 0.0
        self._factors = 1 / nonzero(self.base_lengths)
        if self.metric != "cosine":
            self._factors = torch.full_like(self.base_lengths, 1 / longest if longest > 1e-100 else 1.0)
        dimensions = self.base.shape[1]
        # Any centre will do for the order, so it is summed as quickly as may be.
        centre = torch.zeros(dimensions, dtype=self.wide, device=self.base.device)
        with without_autocast(centre.device):
            for start in range(0, len(self.base), _ROWS):
                rows = self.base[start : start + _ROWS].to(self.dtype)
                centre += self._factors[start : start + _ROWS].to(self.dtype) @ rows
        self._centre = centre / max(1, len(self.base))
        reach = torch.ones_like(self.query_lengths)
        if self.metric == "euclidean" and len(self.base):
            reach = 2 + self.query_lengths * self._factors[0]
        self.row_slack = ((4 * dimensions + 32) * torch.finfo(self.wide).eps * reach).to(self.dtype)
        # Of float32 products that hardware may shorten: TF32 keeps 10 bits of each factor, bfloat16 keeps 7.
        shortened = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}
        coarse = shortened[torch.get_float32_matmul_precision()] if self.dtype == torch.float32 else 0.0
        self._tile_rounding = 1.1 * ((dimensions + 8) * torch.finfo(self.dtype).eps / 2 + coarse)

    def left(self, rows: Tensor, wide: bool = False) -> Tensor:
        """What stands for some queries in a product; the order within a row is that of the exact scores.

        With the centre m and r = b - m it is that of (q - m) . r + m . r, and for distances of (q - m) . r - |r|^2 / 2;
        the second summand takes a last column.
        """
        values = self.queries[rows].to(self.wide)  # indexing has made a copy
        if self.metric == "euclidean":
            values = values.mul_(self._factors[0]).sub_(self._centre)
            size = torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp_(min=1)
            values = torch.cat([values.div_(size), 1 / size], 1)  # no entry exceeds 1
        else:
            values = values.div_(nonzero(self.query_lengths[rows])[:, None]).sub_(self._centre)
            values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
        return values if wide else values.to(self.dtype)

    def _right(self, rows: Tensor | slice) -> Tensor:
        values = self.base[rows].to(self.wide, copy=True)
        values.mul_(self._factors[rows][:, None]).sub_(self._centre)
        if self.metric == "euclidean":
            last = values.square().sum(1).div_(-2)
        else:
            last = values @ self._centre
        return torch.cat([values, last[:, None]], 1)

    def right(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What stands for base rows in a product, and the largest length and last entry among them."""
        with without_autocast(self.base.device):
            values = self._right(slice(start, stop)).to(self.dtype)
        return values, _extent(values).amax(0)

    def slack(self, left: Tensor, largest: Tensor) -> Tensor:
        """Bounds on the errors of a product, one for each of its rows."""
        return self._tile_rounding * (_extent(left) * largest).sum(1)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Quick scores (rows, columns), each up to a shift and scale of its row."""
        with without_autocast(left.device):
            return left @ right.T

    def quick(self, rows: Int[Tensor, " pairs"], columns: Int[Tensor, " pairs"]) -> Tensor:
        """What `product` would give for some pairs, without its rounding."""
        values = torch.empty(len(rows), dtype=self.wide, device=rows.device)
        for part in self.blocks(len(rows)):
            with without_autocast(rows.device):
                right = self._right(columns[part])
            values[part] = (self.left(rows[part], wide=True) * right).sum(1)
        return values

    def exact(self, rows: Int[Tensor, " pairs"], columns: Int[Tensor, " pairs"]) -> Tensor:
        """Exact scores of some pairs in float64: one pair has one value wherever and beside whatever it is asked for."""
        if self.metric != "euclidean":
            live = (self.query_lengths[rows] > 0) & (self.base_lengths[columns] > 0)
            if not bool(live.all()):  # products with zero rows are 0 without work, and there may be very many
                values = torch.zeros(len(rows), dtype=self.wide, device=rows.device)
                values[live] = self.exact(rows[live], columns[live])
                return values
        values = torch.empty(len(rows), dtype=self.wide, device=rows.device)
        for part in self.blocks(len(rows)):
            q, b = rows[part], columns[part]
            queries, base = self.queries[q].to(self.wide), self.base[b].to(self.wide)
            if self.metric == "euclidean":
                values[part] = -queries.sub_(base).square_().sum(1).sqrt_()
                continue
            values[part] = queries.mul_(base).sum(1)
            if self.metric == "cosine":
                lengths = nonzero(self.query_lengths[q]) * nonzero(self.base_lengths[b])
                values[part] = (values[part] / lengths).clamp_(-1, 1)
        return values

    def exact_in_tile(self, queries: Tensor, start: int, stop: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Exact scores of pairs of one tile, by place in it; where base rows repeat, each distinct row is scored once."""
        many = len(rows) > 8 * (len(queries) + stop - start)
        if many:
            distinct, place = self.base[start:stop].unique(dim=0, return_inverse=True)
            if 8 * len(distinct) <= stop - start:
                first = torch.full((len(distinct),), stop - start, device=place.device)
                first.scatter_reduce_(0, place, torch.arange(stop - start, device=place.device), "amin")
                pairs = torch.cartesian_prod(queries, start + first)
                table = self.exact(pairs[:, 0], pairs[:, 1]).view(len(queries), len(distinct))
                return table[rows, place[columns]]
        return self.exact(queries[rows], start + columns)

    def blocks(self, pairs: int) -> Iterator[slice]:
        """Parts of a list of pairs whose rows fit a cache."""
        size = max(1, _BLOCK // max(1, self.base.shape[1]))
        return (slice(start, start + size) for start in range(0, pairs, size))


class SparsePairs:
    """A set of (query, base) pairs, asked for by queries: listed, or all pairs whose two ids are equal.

    Args:
        name: of the argument, for errors.
        given: (pairs, 2) with a query and a base index in each row, or a tuple of the queries' and the base's ids.
        queries: number of queries.
        base: number of base rows.

    Raises:
        ValueError: if a shape is wrong or an index is out of range.
    """

    def __init__(self, name: str, given: Tensor | tuple[Tensor, Tensor], queries: int, base: int):
        if isinstance(given, Tensor):
            if given.ndim != 2 or given.shape[1] != 2:
                raise ValueError(f"{name} must be (pairs, 2), got shape {tuple(given.shape)}")
            for column, limit in ((0, queries), (1, base)):
                indices = given[:, column]
                if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
                    raise ValueError(
                        f"{name}[:, {column}] must be indices in [0, {limit}), "
                        f"got {int(indices.min())} to {int(indices.max())}"
                    )
            key = given[:, 0].long() * base + given[:, 1].long()
            order = key.argsort(stable=True)
            self.place: Tensor | None = order
            self.repeats = int((key[order].diff() == 0).sum())
            self._columns = given[order, 1].long()
            rows = given[order, 0].long().contiguous()
            every = torch.arange(queries, device=rows.device)
            self._first = torch.searchsorted(rows, every)
            self.counts = torch.searchsorted(rows, every, right=True) - self._first
        else:
            for ids, size, of in ((given[0], queries, "queries"), (given[1], base, "base")):
                if ids.shape != (size,):
                    raise ValueError(
                        f"ids of {of} in {name} must have shape ({size},), got {tuple(ids.shape)}"
                    )
            self.place, self.repeats = None, 0
            ids, self._columns = given[1].sort(stable=True)
            self._first = torch.searchsorted(ids, given[0].contiguous())
            self.counts = torch.searchsorted(ids, given[0].contiguous(), right=True) - self._first

    def of(self, queries: Int[Tensor, " some"]) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of some queries: place of the query among these, base index, place in the list that was given."""
        counts = self.counts[queries]
        rows = torch.arange(len(queries), device=counts.device).repeat_interleave(counts)
        within = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
        at = self._first[queries][rows] + within
        return rows, self._columns[at], at if self.place is None else self.place[at]


def _extent(values: Tensor) -> Tensor:
    """Length of each row but for its last entry, and the size of that."""
    lengths = torch.linalg.vector_norm(values[:, :-1], dim=1)
    return torch.stack([lengths, values[:, -1].abs()], 1)


def _lengths(name: str, rows: Tensor, wide: torch.dtype) -> Tensor:
    lengths = torch.empty(len(rows), dtype=wide, device=rows.device)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        values = rows[part].to(wide, copy=True)
        lengths[part] = values.mul_(values).sum(1)
    if not bool(lengths.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return lengths.sqrt_()


def nonzero(lengths: Tensor) -> Tensor:
    """Lengths to divide by: 1 in place of 0."""
    return torch.where(lengths > 0, lengths, 1.0)
