"""Ranking metrics straight from embeddings: the numbers of `retrieval_metrics` without the matrix of scores.

What a ranking metric asks is at which ranks the relevant documents stand, and a rank is a count of documents that
score higher. Counts add up over tiles, so no more than a tile of scores is ever held. Relevance and pairs to leave out
are given sparsely: as a list of index pairs, or as two vectors of ids (classes, groups) of which equal ones belong
together. Of equal scores the lower document index comes first, as in `retrieval_metrics`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coloss.ops import without_autocast

from .neighbours import between, by_column, check_at_least_one, drop
from .pair_scores import Metric, PairScores, SparsePairs
from .pooled_counts import FixedPointScores, WinHistogram

Ids: TypeAlias = tuple[Int[Tensor, " queries"], Int[Tensor, " documents"]]
Pairs: TypeAlias = Tensor | tuple[Tensor, Tensor]

# Queries in one product; columns of which only the closest is looked at first; relevant documents of a query up to
# which comparing a tile with each is quicker than sorting it (about 1.6 against 70 nanoseconds for a score).
_QUERIES, _GROUP, _COMPARED = 512, 16, 32
# Pairs whose exact scores are held at once.
_PAIRS = 2**22


def retrieval_metrics_from_embeddings(
    queries: Float[Tensor, "queries dimensions"],
    documents: Float[Tensor, "documents dimensions"],
    relevance: Int[Tensor, "pairs 2"] | Ids,
    ks: Sequence[int] = (1, 5, 10),
    *,
    grades: Shaped[Tensor, " pairs"] | None = None,
    ignore: Int[Tensor, "ignored 2"] | Ids | None = None,
    metric: Metric = "cosine",
    pooled_auc: bool = True,
    query_chunk: int = 2048,
    document_chunk: int = 8192,
) -> dict[str, float]:
    """All common ranking metrics of every query against every document, in a stream of tiles.

    Definitions are those of `retrieval_metrics`. Ranks are exact (see `nearest_neighbours`), whatever the chunk sizes.

    Args:
        queries: finite; float16 and bfloat16 are brought to full precision a tile at a time.
        documents: finite.
        relevance: pairs (query index, document index), each at most once; or ids of the queries and of the documents,
            where every pair of equal ids is relevant.
        ks: cut-offs >= 1 of recall and nDCG.
        grades: one number >= 0 for each pair of `relevance`, not for ids; 0 is not relevant. None: all 1.
        ignore: pairs to leave out of everything, as pairs or ids; for queries that are documents themselves
            `(torch.arange(n), torch.arange(n))`.
        metric: score: "cosine" (0 with a zero row), "inner" or "euclidean" (nearer is higher).
        pooled_auc: whether to count the pooled AUC, which takes a second product, in float64. It is exact for
            embeddings rounded to about 22 bits below the largest entry of each row, so that equal pairs tie.
        query_chunk: queries ranked at a time, >= 1; changes memory, not the result.
        document_chunk: documents in a tile, >= 1; changes memory, not the result.

    Returns:
        A dict with `recall@k` and `ndcg@k` for each k, `precision@1`, `mrr`, `map`, `r_precision`, `pooled_auc` (if
        asked for), `queries` (averaged) and `queries_skipped` (without a relevant document). With all queries skipped
        the metrics are NaN.

    Raises:
        ValueError: if shapes disagree, an embedding or grade is not finite, a grade is negative, a relevant pair is
            given twice, an index is out of range or an option is.

    Cost:
        O(queries * documents * (dimensions + R)) time for R <= 32 relevant documents a query, and no more for more, for
        which tiles are sorted. Memory: a tile, some numbers for each relevant or ignored pair of a chunk of queries
        and, for the AUC, of all queries.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
        >>> labels, every = torch.tensor([0, 0, 1, 1]), torch.arange(4)
        >>> found = retrieval_metrics_from_embeddings(
        ...     embeddings, embeddings, (labels, labels), ks=(1, 2), ignore=(every, every)
        ... )
        >>> found["recall@1"], found["mrr"], found["pooled_auc"]
        (0.75, 0.8333333333333334, 0.75)
    """
    check_at_least_one(ks=min(ks, default=1), query_chunk=query_chunk, document_chunk=document_chunk)
    scores = PairScores(queries, documents, metric)
    judged = _Judged(scores, relevance, grades, ignore)
    # Queries with many relevant documents first, so that those compared together have about as many.
    order = judged.relevant.counts.argsort(descending=True, stable=True)
    order = order[judged.relevant.counts[order] > 0]
    parts = []
    for rows in order.split(query_chunk):
        ranked = _ranks(scores, judged, rows, document_chunk)
        if ranked is not None:
            parts.append(_query_metrics(ranked, ks))
    names = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")]
    names += ["precision@1", "mrr", "map", "r_precision"]
    metrics = {name: _mean(parts, name) for name in names}
    if pooled_auc:
        metrics["pooled_auc"] = _pooled_auc(scores, judged, query_chunk, document_chunk)
    counted = sum(len(part["mrr"]) for part in parts)
    return metrics | {"queries": float(counted), "queries_skipped": float(len(queries) - counted)}


class _Judged:
    """Which pairs are relevant, how much so, and which take no part."""

    def __init__(self, scores: PairScores, relevance: Pairs, grades: Tensor | None, ignore: Pairs | None):
        sizes, device = (len(scores.queries), len(scores.base)), scores.base.device
        self.columns = sizes[1]
        self.relevant = SparsePairs("relevance", _moved(relevance, device), *sizes)
        self.ignored = None if ignore is None else SparsePairs("ignore", _moved(ignore, device), *sizes)
        if self.relevant.repeats:
            raise ValueError(
                f"relevance must hold each pair once, got {self.relevant.repeats} pairs more than once"
            )
        self.grades = None
        if grades is not None:
            if not isinstance(relevance, Tensor) or grades.shape != relevance.shape[:1]:
                raise ValueError(
                    "grades must be one for each pair of relevance, "
                    f"got shape {tuple(grades.shape)} for {'ids' if isinstance(relevance, tuple) else len(relevance)}"
                )
            self.grades = grades.to(device, scores.wide)
            if not bool(((self.grades >= 0) & self.grades.isfinite()).all()):
                raise ValueError(
                    f"grades must be finite and >= 0, got values from {grades.min()} to {grades.max()}"
                )

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Relevant pairs of some queries (place of the query, document, grade), and all pairs that are not irrelevant."""
        row, column, at = self.relevant.of(rows)
        grade = torch.ones(len(at), dtype=torch.float64) if self.grades is None else self.grades[at]
        grade = grade.to(row.device)
        key = row * self.columns + column
        keep = grade > 0
        known = key[keep]
        if self.ignored is not None:
            ignored_row, ignored_column, _ = self.ignored.of(rows)
            ignored = ignored_row * self.columns + ignored_column
            keep &= ~torch.isin(key, ignored)
            known = torch.cat([known, ignored]).unique()
        row, column, grade = row[keep], column[keep], grade[keep]
        columns = max(1, self.columns)
        return row, column, grade, by_column(known // columns, known % columns)


class _Ranked(NamedTuple):
    """Relevant documents of some queries, best first: their ranks from 1, grades, and whether there is one at all."""

    ranks: Tensor
    grades: Tensor
    real: Tensor


class _Wanted(NamedTuple):
    """Relevant documents of some queries, best first: quick score and its bound, exact score and index."""

    quick: Tensor
    bound: Tensor
    exact: Tensor
    columns: Tensor

    def part(self, rows: slice, most: int) -> "_Wanted":
        return _Wanted(*(values[rows, :most] for values in self))


def _ranks(scores: PairScores, judged: _Judged, rows: Tensor, chunk: int) -> _Ranked | None:
    row, column, grade, known = judged.of(rows)
    if not len(row):
        return None
    exact, quick = scores.exact(rows[row], column), scores.quick(rows[row], column)
    # Documents come in rising order within a query: of equal scores the lower stays first.
    order = exact.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, column, grade, exact, quick = (values[order] for values in (row, column, grade, exact, quick))
    counts = torch.bincount(row, minlength=len(rows))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]

    def table(values: Tensor, rest: float) -> Tensor:
        found = torch.full((len(rows), int(counts.max())), rest, dtype=values.dtype, device=values.device)
        found[row, place] = values
        return found

    single = torch.finfo(scores.dtype).eps
    bound = 2 * scores.row_slack[rows[row]].to(quick) + 2 * single * quick.abs()
    wanted = _Wanted(
        table(quick.to(scores.dtype), math.inf),
        table(bound.to(scores.dtype), 0.0),
        table(exact, math.inf),
        table(column, -1),
    )
    ahead = torch.zeros_like(wanted.columns)
    left = scores.left(rows)
    for start in range(0, len(scores.base), chunk):
        stop = min(start + chunk, len(scores.base))
        right, largest = scores.right(start, stop)
        slack = scores.slack(left, largest)[:, None]
        dropped = between(known, start, stop)
        for first in range(0, len(rows), _QUERIES):
            part = slice(first, min(first + _QUERIES, len(rows)))
            most = int(counts[part].max())
            if not most:
                continue
            tile = scores.product(left[part], right)
            drop(tile, *dropped, part)
            here = wanted.part(part, most)
            here = here._replace(bound=torch.where(here.quick == math.inf, 0.0, here.bound + slack[part]))
            above, near = (_compared if most <= _COMPARED else _sorted)(tile, here)
            for pair_row, pair_place, pair_column in near:
                found = scores.exact_in_tile(rows[part], start, stop, pair_row, pair_column)
                least = here.exact[pair_row, pair_place]
                earlier = start + pair_column < here.columns[pair_row, pair_place]
                wins = (found > least) | ((found == least) & earlier)
                above.index_put_((pair_row[wins], pair_place[wins]), wins.new_ones(1).long(), accumulate=True)
            ahead[part, :most] += above
    counted = torch.nonzero(counts).flatten()
    real = wanted.columns[counted] >= 0
    ranks = ahead[counted] + torch.arange(1, real.shape[1] + 1, device=real.device)
    return _Ranked(ranks, table(grade, 0.0)[counted], real)


Near: TypeAlias = Iterator[tuple[Tensor, Tensor, Tensor]]


def _compared(tile: Tensor, wanted: _Wanted) -> tuple[Tensor, Near]:
    """How many scores of a tile are surely above each wanted one, and the pairs too near to tell; one by one."""
    low, high = wanted.quick - wanted.bound, wanted.quick + wanted.bound
    scratch = torch.empty_like(tile)  # comparing into floats is twice as quick as into bools
    above = torch.stack(
        [torch.gt(tile, high[:, r, None], out=scratch).sum(1) for r in range(high.shape[1])], 1
    )

    def near() -> Near:
        for r in range(high.shape[1]):
            torch.sub(tile, wanted.quick[:, r, None], out=scratch).abs_()
            limit = 2 * wanted.bound[:, r, None]
            if tile.shape[1] % _GROUP == 0:
                groups = tile.shape[1] // _GROUP
                closest = scratch.view(len(tile), _GROUP, groups).amin(1)
                row, group = torch.nonzero(closest <= limit, as_tuple=True)
                every = torch.arange(_GROUP, device=tile.device) * groups
                columns = group[:, None] + every
                row = row[:, None].expand_as(columns)
                row, columns = row.flatten(), columns.flatten()
            else:
                row, columns = torch.nonzero(scratch <= limit, as_tuple=True)
            values = tile[row, columns]
            inside = (values >= low[row, r]) & (values <= high[row, r])
            row = row[inside]
            yield row, torch.full_like(row, r), columns[inside]

    return above.long(), near()


def _sorted(tile: Tensor, wanted: _Wanted) -> tuple[Tensor, Near]:
    """As `_compared`, for many wanted ones: each looks up its place in the sorted scores."""
    values, order = tile.sort(dim=1)
    first = torch.searchsorted(values, (wanted.quick - wanted.bound).contiguous())
    last = torch.searchsorted(values, (wanted.quick + wanted.bound).contiguous(), right=True)

    def near() -> Near:
        pairs = torch.nonzero(last > first)
        sizes = (last - first)[pairs[:, 0], pairs[:, 1]]
        together = max(1, _PAIRS // max(1, int(sizes.max()))) if len(sizes) else 1
        for some, size in zip(pairs.split(together), sizes.split(together)):
            which = torch.arange(len(some), device=size.device).repeat_interleave(size)
            row, place = some[which, 0], some[which, 1]
            within = torch.arange(len(which), device=size.device) - (size.cumsum(0) - size)[which]
            yield row, place, order[row, first[row, place] + within]

    return tile.shape[1] - last, near()


def _query_metrics(ranked: _Ranked, ks: Sequence[int]) -> dict[str, Tensor]:
    ranks, grades, real = ranked
    relevant = real.sum(1)
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    wide = grades.dtype
    gain = grades / torch.log2(ranks.to(wide) + 1)
    best = (grades.sort(dim=1, descending=True).values / torch.log2(place.to(wide) + 1)).cumsum(1)
    metrics = {}
    for k in ks:
        inside = (ranks <= k) & real
        metrics[f"recall@{k}"] = inside.sum(1) / relevant.to(wide)
        metrics[f"ndcg@{k}"] = (gain * inside).sum(1) / best[:, min(k, best.shape[1]) - 1]
    metrics["precision@1"] = (ranks[:, 0] == 1).to(wide)
    metrics["mrr"] = 1 / ranks[:, 0].to(wide)
    metrics["map"] = (place / ranks.to(wide) * real).sum(1) / relevant
    metrics["r_precision"] = ((ranks <= relevant[:, None]) & real).sum(1) / relevant.to(wide)
    return metrics


def _pooled_auc(scores: PairScores, judged: _Judged, query_chunk: int, document_chunk: int) -> float:
    """Share of pairs (relevant, irrelevant) in which the first scores higher, ties by half."""
    fixed = FixedPointScores(scores)
    chunks = torch.arange(len(scores.queries), device=scores.base.device).split(query_chunk)
    positives, irrelevant = [], len(scores.queries) * len(scores.base)
    for rows in chunks:
        row, column, _, known = judged.of(rows)
        positives.append(fixed.pairs(rows[row], column))
        irrelevant -= len(known[0])
    distinct, counts = torch.cat(positives).unique(return_counts=True) if positives else (torch.empty(0),) * 2
    relevant = int(counts.sum())
    if not relevant or not irrelevant:
        return math.nan
    histogram = WinHistogram(distinct, counts)
    width = min(document_chunk, 2048)
    for rows in chunks:
        known = judged.of(rows)[3]
        left = fixed.left(rows)
        for start in range(0, len(scores.base), width):
            stop = min(start + width, len(scores.base))
            right = fixed.right(slice(start, stop))
            dropped = between(known, start, stop)
            for first in range(0, len(rows), _QUERIES):
                part = slice(first, min(first + _QUERIES, len(rows)))
                with without_autocast(left.device):
                    tile = left[part] @ right.T
                drop(tile, *dropped, part)
                histogram.add(tile)
    twice_won = 2 * relevant * irrelevant - histogram.twice_lost()
    return twice_won / (2 * relevant * irrelevant)


def _mean(parts: Sequence[Mapping[str, Tensor]], name: str) -> float:
    return float(torch.cat([part[name] for part in parts]).mean()) if parts else math.nan


def _moved(pairs: Pairs, device: torch.device) -> Pairs:
    return pairs.to(device) if isinstance(pairs, Tensor) else (pairs[0].to(device), pairs[1].to(device))
