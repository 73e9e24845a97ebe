"""Retrieval within one labelled set: does a sample find others of its class?"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .neighbours import check_at_least_one, excluded_pairs, search
from .pair_scores import Metric, PairScores

# Neighbours that are held at once.
_NEIGHBOURS = 2**22


def self_retrieval_metrics(
    embeddings: Float[Tensor, "samples dimensions"],
    labels: Int[Tensor, " samples"],
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    metric: Metric = "cosine",
    query_chunk: int = 2048,
    base_chunk: int = 8192,
) -> dict[str, float]:
    """How well the samples find others of their class, in the metrics of metric learning.

    Each sample is asked for its nearest others, itself left out. With h_j whether the j-th nearest has the label, and R
    the number of other samples with that label:

        recall@k    = [some h_j = 1, j <= k]             r_precision = |{j <= R: h_j = 1}| / R
        map@r       = (1/R) sum over j <= R with h_j = 1 of |{i <= j: h_i = 1}| / j

    This recall@k asks for one hit only; that of `retrieval_metrics` for the share of all relevant documents.

    Args:
        embeddings: one finite row for each sample.
        labels: class of each sample, any integers.
        ks: cut-offs >= 1 of recall.
        metric: what is near: "cosine", "inner" or "euclidean".
        query_chunk: samples searched for at a time, >= 1; changes memory, not the result.
        base_chunk: samples in a tile, >= 1; changes memory, not the result.

    Returns:
        A dict with `recall@k` for each k, `r_precision`, `map@r`, `queries` (averaged) and `queries_skipped` (alone in
        their class). With all skipped the metrics are NaN.

    Raises:
        ValueError: if sizes disagree, an embedding is not finite, or an option is out of range.

    Cost:
        A search for the max(k, R) nearest of each sample; memory as `nearest_neighbours`, at most about 4 million
        neighbours at a time.

    Source:
        Musgrave, Belongie and Lim 2020, arXiv 2003.08505, section 3.2, for R-precision and MAP@R.

    Examples:
        >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [5.0], [7.0]])
        >>> labels = torch.tensor([0, 0, 1, 1, 2])
        >>> found = self_retrieval_metrics(embeddings, labels, ks=(1, 2), metric="euclidean")
        >>> found["recall@1"], found["recall@2"], found["queries_skipped"]
        (0.25, 0.75, 1.0)
    """
    check_at_least_one(ks=min(ks, default=1), query_chunk=query_chunk, base_chunk=base_chunk)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}")
    scores = PairScores(embeddings, embeddings, metric)
    itself = excluded_pairs(True, len(embeddings), len(embeddings), embeddings.device)
    labels = labels.to(embeddings.device)
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    others = counts[index] - 1
    order = others.argsort(descending=True, stable=True)
    order = order[others[order] > 0]
    names = [*(f"recall@{k}" for k in ks), "r_precision", "map@r"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    while len(order):
        k = min(len(embeddings) - 1, max(int(others[order[0]]), *ks))
        size = max(1, min(query_chunk, _NEIGHBOURS // k))
        rows, order = order[:size], order[size:]
        _, found = search(scores, rows, k, itself, base_chunk)
        hits = (labels[found] == labels[rows, None]) & (found >= 0)
        wanted = others[rows, None]
        place = torch.arange(1, k + 1, device=rows.device)
        share = hits.cumsum(1).to(scores.wide) / place * (hits & (place <= wanted))
        for k in ks:
            parts[f"recall@{k}"].append(hits[:, :k].any(1).to(scores.wide))
        parts["r_precision"].append((hits & (place <= wanted)).sum(1) / wanted[:, 0].to(scores.wide))
        parts["map@r"].append(share.sum(1) / wanted[:, 0])
    metrics = {name: float(torch.cat(part).mean()) if part else math.nan for name, part in parts.items()}
    counted = int((others > 0).sum())
    return metrics | {"queries": float(counted), "queries_skipped": float(len(embeddings) - counted)}
