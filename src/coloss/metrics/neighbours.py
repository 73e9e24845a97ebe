"""Exact nearest neighbours of embeddings, without ever holding all pairs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .pair_scores import Metric, PairScores, SparsePairs

# Queries in one product, and columns of a tile of which only the largest is looked at first. Measured: with 8,192 base
# rows in a tile the search takes 1.6 times the product alone, with `topk` over whole rows 3.5 times.
_QUERIES = 512
_GROUP = 16


class Neighbours(NamedTuple):
    """The nearest base rows of each query, nearest first.

    Attributes:
        values: (queries, k) in float64: similarities in falling order, or Euclidean distances in rising order.
        indices: (queries, k): rows of the base; of equal values the lower index comes first. Where a query has fewer than k
            base rows that count, the rest is -1, with a similarity of -infinity or a distance of infinity.
    """

    values: Tensor
    indices: Tensor


def nearest_neighbours(
    queries: Float[Tensor, "queries dimensions"],
    base: Float[Tensor, "base dimensions"],
    k: int,
    *,
    metric: Metric = "cosine",
    exclude: bool | tuple[Int[Tensor, " queries"], Int[Tensor, " base"]] = False,
    query_chunk: int = 2048,
    base_chunk: int = 8192,
) -> Neighbours:
    """The k base rows most similar to each query, exactly, in a stream of tiles.

    Candidates come from a matrix product of centred rows in the precision of the embeddings; all that its rounding
    might have put in the wrong order are compared again in float64, each pair by itself. Distances are then taken
    from differences, so near points keep all digits. The result does not depend on the chunk sizes.

    Args:
        queries: finite; float16 and bfloat16 are brought to full precision a tile at a time.
        base: finite. May be the same tensor as `queries`.
        k: neighbours of each query, >= 1; capped at the number of base rows.
        metric: "cosine" (0 with a zero row), "inner" (dot product) or "euclidean".
        exclude: True leaves out base row i for query i, for neighbours within one set; two tensors of integer ids
            leave out all pairs with equal ids.
        query_chunk: queries searched for at a time, >= 1; changes memory, not the result.
        base_chunk: base rows in a tile, >= 1; changes memory, not the result.

    Returns:
        Values and indices (queries, k).

    Raises:
        ValueError: if shapes disagree, a value is not finite, or an option is out of range.

    Cost:
        O(queries * base * dimensions) time, the product itself and about as much again for its looking through; about
        (query_chunk + 4 * base_chunk) * dimensions + 1,500 * base_chunk numbers of memory beside the result. Queries
        with more neighbours at one distance than fit (k / 8 + 16 beyond k) are searched for once more, which is slow
        where most pairs tie.

    Examples:
        >>> base = torch.tensor([[0.0], [2.0], [5.0], [2.0]])
        >>> nearest_neighbours(torch.tensor([[1.5]]), base, 3, metric="euclidean")
        Neighbours(values=tensor([[0.5000, 0.5000, 1.5000]], dtype=torch.float64), indices=tensor([[1, 3, 0]]))
        >>> nearest_neighbours(base, base, 1, metric="euclidean", exclude=True).indices.flatten()
        tensor([1, 3, 1, 1])
    """
    check_at_least_one(k=k, query_chunk=query_chunk, base_chunk=base_chunk)
    scores = PairScores(queries, base, metric)
    excluded = excluded_pairs(exclude, len(queries), len(base), base.device)
    k = min(k, len(base))
    values = torch.empty(len(queries), k, dtype=scores.wide, device=base.device)
    indices = torch.empty(len(queries), k, dtype=torch.long, device=base.device)
    for rows in torch.arange(len(queries), device=base.device).split(query_chunk):
        found = search(scores, rows, k, excluded, base_chunk)
        values[rows], indices[rows] = found
    return Neighbours(-values if metric == "euclidean" else values, indices)


def excluded_pairs(
    exclude: bool | tuple[Tensor, Tensor], queries: int, base: int, device: torch.device
) -> SparsePairs | None:
    """The pairs that `exclude` names, None for none."""
    if exclude is False:
        return None
    if exclude is True:
        if queries != base:
            raise ValueError(
                f"exclude=True needs as many queries as base rows, got {queries} queries and {base} base rows"
            )
        ids = torch.arange(base, device=device)
        exclude = (ids, ids)
    return SparsePairs("exclude", (exclude[0].to(device), exclude[1].to(device)), queries, base)


def search(
    scores: PairScores, rows: Tensor, k: int, excluded: SparsePairs | None, base_chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """Exact scores and indices of the k best base rows of some queries; -infinity and -1 where there are fewer."""
    base = len(scores.base)
    keep = min(k + k // 8 + 16, base)
    upper = torch.full((len(rows), keep), -torch.inf, dtype=scores.dtype, device=rows.device)
    indices = torch.full((len(rows), keep), -1, device=rows.device)
    if keep == 0:
        return upper.to(scores.wide), indices
    left = scores.left(rows)
    dropped = _dropped(excluded, rows)
    slacks = []
    for start in range(0, base, base_chunk):
        stop = min(start + base_chunk, base)
        right, largest = scores.right(start, stop)
        slacks.append(scores.slack(left, largest))
        drop_rows, drop_columns = between(dropped, start, stop)
        for first in range(0, len(rows), _QUERIES):
            part = slice(first, min(first + _QUERIES, len(rows)))
            tile = scores.product(left[part], right)
            drop(tile, drop_rows, drop_columns, part)
            best, place = _largest(tile, keep)
            best = torch.cat([upper[part], best + slacks[-1][part, None]], 1)
            place = torch.cat([indices[part], place + start], 1)
            upper[part], order = best.topk(keep, sorted=False)
            indices[part] = place.gather(1, order)
    indices.masked_fill_(upper == -torch.inf, -1)

    # Every base row that is not kept scores at most `upper.amin`; the k-th best scores at least `least`.
    slack_of = torch.stack(slacks, 1).gather(1, indices.clamp(min=0) // base_chunk)
    lower = torch.where(indices >= 0, upper - 2 * slack_of, -torch.inf)
    least = lower.topk(k, sorted=False).values.amin(1) - 2 * scores.row_slack[rows]
    crowded = (upper.amin(1) >= least) & (least > -torch.inf) if keep < base else torch.zeros_like(least) > 0
    indices, order = indices.masked_fill(upper < least[:, None], -1).sort(1)
    near, place = torch.nonzero(indices >= 0, as_tuple=True)
    values = torch.full(upper.shape, -torch.inf, dtype=scores.wide, device=rows.device)
    values[near, place] = scores.exact(rows[near], indices[near, place])
    values, indices = _best(values, indices, k)
    for again in torch.nonzero(crowded).flatten().split(_QUERIES):
        values[again], indices[again] = _search_ties(
            scores, rows[again], k, excluded, least[again], base_chunk
        )
    return values, indices


def _search_ties(
    scores: PairScores, rows: Tensor, k: int, excluded: SparsePairs | None, least: Tensor, base_chunk: int
) -> tuple[Tensor, Tensor]:
    """As `search`, for queries with many base rows near the k-th best score: all above a quick score are compared exactly."""
    values = torch.full((len(rows), k), -torch.inf, dtype=scores.wide, device=rows.device)
    indices = torch.full((len(rows), k), -1, device=rows.device)
    left = scores.left(rows)
    dropped = _dropped(excluded, rows)
    for start in range(0, len(scores.base), base_chunk):
        stop = min(start + base_chunk, len(scores.base))
        right, largest = scores.right(start, stop)
        tile = scores.product(left, right)
        drop(tile, *between(dropped, start, stop), slice(0, len(rows)))
        near, column = torch.nonzero(tile >= (least - scores.slack(left, largest))[:, None], as_tuple=True)
        if not len(near):
            continue
        exact = torch.full(tile.shape, -torch.inf, dtype=scores.wide, device=rows.device)
        exact[near, column] = scores.exact_in_tile(rows, start, stop, near, column)
        # Base rows come in rising order, so a later one must be better than the k-th so far, not equal.
        better = torch.nonzero((exact > values[:, -1:]).any(1)).flatten()
        here = torch.arange(start, stop, device=rows.device).expand(len(better), -1)
        here = here.masked_fill(exact[better] == -torch.inf, -1)
        values[better], indices[better] = _best(
            torch.cat([values[better], exact[better]], 1), torch.cat([indices[better], here], 1), k
        )
    return values, indices


def _largest(tile: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row: they lie in the groups of columns with the largest maxima."""
    columns = tile.shape[1]
    groups = columns // _GROUP
    if groups <= 2 * keep or columns % _GROUP:
        return tile.topk(min(keep, columns), sorted=False)
    grouped = tile.view(len(tile), _GROUP, groups)
    chosen = grouped.amax(1).topk(keep, sorted=False).indices[:, None].expand(-1, _GROUP, -1)
    values, order = grouped.gather(2, chosen).flatten(1).topk(keep, sorted=False)
    place = chosen + groups * torch.arange(_GROUP, device=tile.device)[:, None]
    return values, place.flatten(1).gather(1, order)


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, of equal values the first; rows hold rising indices."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order[:, :k])


def _dropped(excluded: SparsePairs | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    if excluded is None:
        return rows[:0], rows[:0]
    places, columns, _ = excluded.of(rows)
    return by_column(places, columns)


def by_column(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs in order of their columns."""
    columns, order = columns.sort()
    return rows[order], columns


def between(pairs: tuple[Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Of pairs in order of columns those in one tile, columns counted from its first."""
    rows, columns = pairs
    bounds = torch.tensor([start, stop], device=columns.device)
    first, last = torch.searchsorted(columns, bounds).tolist()
    return rows[first:last], columns[first:last] - start


def drop(tile: Tensor, rows: Tensor, columns: Tensor, part: slice) -> None:
    """Put some pairs of a tile, whose rows are a part of those that the pairs count, behind all others."""
    if len(rows):
        inside = (rows >= part.start) & (rows < part.stop)
        tile[rows[inside] - part.start, columns[inside]] = -torch.inf


def check_at_least_one(**sizes: int) -> None:
    """Refuse a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
