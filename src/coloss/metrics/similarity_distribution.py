r"""How far relevant items stand above the others, not only in which order: the mean similarity distribution (mSD).

Like mean average precision, but each item counts with its similarity, and the result with how much larger the relevant similarities are
on average. With $s_{(1)} \ge s_{(2)} \ge \dots$ the similarities of one query in [0, 1], $m_{(r)}$ whether the item at rank $r$ has the
query's identity, and $R$ the number of those:

    SD = w (1/R) sum_r m_(r) [sum_{t <= r} m_(t) s_(t)] / [sum_{t <= r} s_(t)]      w = 1 - exp(-mean of relevant s / mean of other s)

and mSD = 100 times the mean over queries. Equal similarities throughout give (1 - 1/e) times the average precision, so a perfect ranking
scores from 63.2 (no separation) to 100 (all relevant at 1, all others at 0).

The value depends on the scale of the similarities: squeezed ones (0.9 + 0.1 c) score lower at the same ranking. That is its purpose, but
models whose similarities have different scales by construction cannot be compared by it.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchmetrics import Metric

from coloss.ops import accumulation_dtype

# Pairs that are sorted at a time, and how far rounding may carry a similarity out of its range.
_PAIRS, _SLACK = 2**22, 1e-4

Range = Literal["cosine", "unit"]


class MeanSimilarityDistribution(NamedTuple):
    """The result of `mean_similarity_distribution`.

    Attributes:
        msd: 100 times the mean over queries, in [0, 100]; NaN where no query has a relevant item.
        per_query: (queries,) in [0, 1]; NaN for queries without a relevant item.
        queries: how many were averaged.
        queries_skipped: how many have no relevant item.
    """

    msd: float
    per_query: Tensor
    queries: int
    queries_skipped: int


def mean_similarity_distribution(
    similarity: Float[Tensor, "queries gallery"],
    query_ids: Shaped[Tensor, " queries"],
    gallery_ids: Shaped[Tensor, " gallery"],
    *,
    in_range: Range = "cosine",
    compat: Literal["released"] | None = None,
) -> MeanSimilarityDistribution:
    """Quality of a retrieval by identity that sees how far relevant items stand above the others; definitions above.

    Without other items w is 1; where all similarities up to a rank are 0 that rank counts 0. Of equal similarities the lower gallery
    index comes first.

    Args:
        similarity: one row for each query.
        query_ids: identity of each query.
        gallery_ids: identity of each item; those with the query's are relevant.
        in_range: "cosine": c in [-1, 1], taken as (c + 1) / 2; "unit": in [0, 1] as it is.
        compat: "released" reproduces the calculator that was published with the paper: it sorts which items match, but not their
            similarities, so its result changes with the order of the gallery. For comparison with published numbers only.

    Returns:
        Value, values of queries, and counts.

    Raises:
        ValueError: if shapes disagree, a similarity is NaN or out of its range, or an option is unknown.

    Cost:
        O(queries * gallery * log gallery) time; memory for about 4 million pairs beside the input.

    Source:
        Zuo et al. 2024 (UFineBench), arXiv 2312.03441.

    Examples:
        >>> found = mean_similarity_distribution(
        ...     torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([7]), torch.tensor([7, 8, 9])
        ... )
        >>> found.msd, found.queries
        (100.0, 1)
        >>> flat = mean_similarity_distribution(torch.zeros(1, 3), torch.tensor([7]), torch.tensor([7, 8, 9]))
        >>> round(flat.msd, 2)  # 100 (1 - 1/e)
        63.21
    """
    _check(similarity, query_ids, gallery_ids, in_range, compat)
    rows = max(1, _PAIRS // max(1, similarity.shape[1]))
    parts = [
        _of_queries(part, ids, gallery_ids, in_range, compat is None)
        for part, ids in zip(similarity.split(rows), query_ids.split(rows), strict=True)
    ]
    per_query = torch.cat(parts) if parts else similarity.new_zeros(0)
    counted = per_query[~per_query.isnan()]
    return MeanSimilarityDistribution(
        100 * float(counted.mean()), per_query, len(counted), len(per_query) - len(counted)
    )


class SimilarityDistribution(Metric):
    """Mean similarity distribution of queries that come in batches, each against the whole gallery; a metric of torchmetrics.

    Sums and counts are joined over processes by `compute`.

    Args:
        in_range, compat: as for `mean_similarity_distribution`.

    Attributes:
        queries, queries_skipped: queries averaged so far, and those without a relevant item.

    Returns:
        From `compute`: a scalar in [0, 100]; NaN without a query that has a relevant item.

    Raises:
        ValueError: from `update`, as `mean_similarity_distribution`.

    Examples:
        >>> metric, gallery = SimilarityDistribution(), torch.tensor([0, 1])
        >>> metric.update(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), gallery)
        >>> metric.update(torch.tensor([[0.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 5]), gallery)
        >>> round(metric.compute().item(), 2), int(metric.queries), int(metric.queries_skipped)
        (81.61, 2, 1)
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    queries: Tensor
    queries_skipped: Tensor

    def __init__(self, *, in_range: Range = "cosine", compat: Literal["released"] | None = None) -> None:
        super().__init__()
        _check(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0), in_range, compat)
        self.in_range, self.compat = in_range, compat
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("queries", "queries_skipped"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        similarity: Float[Tensor, "queries gallery"],
        query_ids: Shaped[Tensor, " queries"],
        gallery_ids: Shaped[Tensor, " gallery"],
    ) -> None:
        """Take in some queries, with their similarities to all items of the gallery."""
        found = mean_similarity_distribution(
            similarity, query_ids, gallery_ids, in_range=self.in_range, compat=self.compat
        )
        self.total += found.per_query.nansum().to(self.total.dtype)
        self.queries += found.queries
        self.queries_skipped += found.queries_skipped

    def compute(self) -> Float[Tensor, ""]:
        """The value over all queries so far."""
        return (100 * self.total / self.queries).float()


def _of_queries(scores: Tensor, ids: Tensor, gallery_ids: Tensor, in_range: str, sort: bool) -> Tensor:
    wide = accumulation_dtype(scores.device)
    similarity = scores.to(wide)
    if in_range == "cosine":
        similarity = (similarity + 1) / 2
    similarity = similarity.clamp(0, 1)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    matches = (gallery_ids.to(scores.device)[order] == ids.to(scores.device).unsqueeze(1)).to(wide)
    ranked = similarity.gather(1, order) if sort else similarity
    relevant, found = matches.sum(1), matches * ranked
    share = found.cumsum(1) / ranked.cumsum(1)
    precision = (matches * share.nan_to_num(0.0)).sum(1) / relevant
    others = matches.shape[1] - relevant
    # Nothing to stand above, or something at 0: the ratio is infinite. A relevant mean of 0 makes the precision 0 by itself.
    ratio = (found.sum(1) / relevant) / (((1 - matches) * ranked).sum(1) / others)
    weight = 1 - torch.exp(-ratio.nan_to_num(torch.inf, posinf=torch.inf))
    return torch.where(relevant > 0, precision * weight, torch.nan)


def _check(
    similarity: Tensor, query_ids: Tensor, gallery_ids: Tensor, in_range: str, compat: str | None
) -> None:
    if in_range not in ("cosine", "unit"):
        raise ValueError(f'in_range must be "cosine" or "unit", got {in_range!r}')
    if compat not in (None, "released"):
        raise ValueError(f'compat must be "released" or None, got {compat!r}')
    for name, ids, count in (
        ("query_ids", query_ids, similarity.shape[0]),
        ("gallery_ids", gallery_ids, similarity.shape[1]),
    ):
        if ids.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(ids.shape)}")
    if similarity.numel():
        low, high = float(similarity.min()), float(similarity.max())
        lowest = -1 if in_range == "cosine" else 0
        if not (lowest - _SLACK <= low and high <= 1 + _SLACK):
            raise ValueError(f"similarity must be in [{lowest}, 1], got values from {low:.4g} to {high:.4g}")
