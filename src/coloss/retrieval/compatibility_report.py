"""Tells what an embedding upgrade is worth: new queries in the old index, in the new one, and what the old encoder gave.

Useful for any two encoders, however they were trained: by `coloss.retrieval.BasisTransformTraining`, or not made compatible at all and
joined by `procrustes_map`, the adapter without training that everybody tries first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.metrics import nearest_neighbours, retrieval_metrics_from_embeddings
from coloss.metrics.pair_scores import Metric
from coloss.ops import accumulation_dtype

Ids = tuple[Int[Tensor, " queries"], Int[Tensor, " gallery"]]


@dataclass(frozen=True)
class CompatibilityReport:
    """Retrieval quality before an upgrade, during it and after it.

    Attributes:
        old_old: old queries against the old index: what there was.
        new_old: new queries against the old index: what an upgrade gives on the day it ships, with nothing embedded anew.
        new_new: new queries against the new index: what it gives in the end.

    Each holds `cmc@k` (share of queries with a relevant item among the first k), `map`, `mrr`, `r_precision`, `queries` (averaged) and
    `queries_skipped` (without a relevant item in the gallery).

    Examples:
        >>> old, new = torch.eye(4), torch.eye(4)[[0, 0, 1, 1]]
        >>> report = compatibility_report(old, new, old, new, torch.tensor([0, 0, 1, 1]))
        >>> report.old_old["cmc@1"], report.new_old["cmc@1"], report.new_new["cmc@1"]
        (0.5, 0.5, 1.0)
        >>> report.is_compatible(), report.update_gain("cmc@1")
        (True, 0.0)
    """

    old_old: dict[str, float]
    new_old: dict[str, float]
    new_new: dict[str, float]

    def is_compatible(self, metric: str = "map") -> bool:
        """Whether new queries do at least as well in the old index as the old queries did."""
        return self.new_old[metric] >= self.old_old[metric]

    def update_gain(self, metric: str = "map") -> float:
        """Share of the whole gain that is there before anything is embedded anew: 0 as old, 1 as with a new index.

        (new/old - old/old) / (new/new - old/old); NaN where the new index brings nothing. Source: Shen et al. 2020, arXiv 2003.11942.
        """
        whole = self.new_new[metric] - self.old_old[metric]
        return (self.new_old[metric] - self.old_old[metric]) / whole if whole else math.nan


def compatibility_report(
    old_queries: Float[Tensor, "queries dim_old"],
    new_queries: Float[Tensor, "queries dim_new"],
    old_gallery: Float[Tensor, "gallery dim_old"],
    new_gallery: Float[Tensor, "gallery dim_new"],
    query_labels: Int[Tensor, " queries"],
    gallery_labels: Int[Tensor, " gallery"] | None = None,
    *,
    ids: Ids | None = None,
    compatible_queries: Float[Tensor, "queries dim_old"] | None = None,
    metric: Metric = "cosine",
    ks: Sequence[int] = (1, 5),
) -> CompatibilityReport:
    """Quality of old/old, new/old and new/new retrieval by class, each query left out of its own ranking.

    An index of vectors has one fixed length, so there are two of them during an upgrade: the old one, searched by the first `dim_old`
    coordinates of a new embedding, and the new one, searched by all of them.

    Args:
        old_queries, new_queries: the same queries, embedded by the two encoders.
        old_gallery, new_gallery: the same items, embedded by the two encoders.
        query_labels: class of each query; items of that class are relevant.
        gallery_labels: class of each item. None: item i is query i itself, and is left out of its ranking.
        ids: of the queries and of the items; pairs of equal ids are left out. For galleries that hold some of the queries.
        compatible_queries: what searches the old index; default: the first dim_old coordinates of `new_queries`.
        metric: "cosine", "inner" or "euclidean". As long as the items are unit vectors the length of a query changes no ranking, and
            the compatible part of a `BackwardCompatibleHead`, which is not of unit length, may be used as it is.
        ks: cut-offs >= 1.

    Returns:
        See `CompatibilityReport`.

    Raises:
        InputError: if there are labels for other numbers of rows, or queries too short for the old index.
        ValueError: as `coloss.metrics.retrieval_metrics_from_embeddings`.

    Cost:
        Three times that of `coloss.metrics.retrieval_metrics_from_embeddings`; scores are never held.

    Examples:
        >>> old = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> new = torch.cat([old, torch.ones(3, 1)], dim=1)
        >>> gallery = torch.tensor([0, 1, 2])
        >>> report = compatibility_report(old[:2], new[:2], old, new, gallery[:2], gallery)
        >>> report.new_old == report.old_old, report.new_new["map"]
        (True, 1.0)
    """
    if gallery_labels is None:
        if len(old_gallery) != len(old_queries):
            raise InputError(
                f"gallery_labels must be given where the gallery is not the queries, got {len(old_queries)} queries and "
                f"{len(old_gallery)} items"
            )
        gallery_labels = query_labels
        if ids is None:
            number = torch.arange(len(query_labels))
            ids = (number, number)
    for name, found, wanted in (
        ("new_queries", len(new_queries), len(old_queries)),
        ("new_gallery", len(new_gallery), len(old_gallery)),
        ("query_labels", len(query_labels), len(old_queries)),
        ("gallery_labels", len(gallery_labels), len(old_gallery)),
    ):
        if found != wanted:
            raise InputError(f"{name} must have {wanted} rows, got {found}")
    dim_old = old_gallery.shape[1]
    if compatible_queries is None:
        if new_queries.shape[1] < dim_old:
            raise InputError(
                f"new_queries must have at least the {dim_old} dimensions of the old gallery, got {new_queries.shape[1]}: "
                "give compatible_queries"
            )
        compatible_queries = new_queries[:, :dim_old]
    labels = (query_labels.cpu(), gallery_labels.cpu())
    pairs = (
        (old_queries, old_gallery),
        (compatible_queries, old_gallery),
        (new_queries, new_gallery),
    )
    return CompatibilityReport(*(_quality(*pair, labels, ids, metric, ks) for pair in pairs))


def procrustes_map(
    new: Float[Tensor, "samples dim_new"], old: Float[Tensor, "samples dim_old"]
) -> Float[Tensor, "dim_new dim_old"]:
    """The rotation that brings new embeddings nearest to the old ones of the same samples: an adapter without training.

    Minimises |new M - old| over orthogonal M; with unequal lengths the shorter vectors are filled up with zeros, and M is the part of the
    rotation that matters. `new_queries @ M` searches the old index (`compatible_queries` of `compatibility_report`), the new index
    stays as it is.

    Args:
        new, old: embeddings of the same training samples, usually unit vectors.

    Returns:
        M, in the type of `new`, at least float32.

    Raises:
        InputError: if there are no samples, or not as many of each.

    Cost:
        O(samples d^2 + d^3) with d the larger dimension.

    Source:
        Schoenemann 1966, Psychometrika 31.

    Examples:
        >>> old = torch.randn(20, 3)
        >>> turn = torch.linalg.qr(torch.randn(3, 3)).Q
        >>> torch.allclose(procrustes_map(old @ turn, old), turn.T, atol=1e-5)
        True
    """
    if len(new) != len(old) or not len(new):
        raise InputError(f"new and old must hold the same samples, got {len(new)} and {len(old)}")
    dim = max(new.shape[1], old.shape[1])
    wide = accumulation_dtype(torch.device("cpu"))
    first, second = (F.pad(part.detach().cpu().to(wide), (0, dim - part.shape[1])) for part in (new, old))
    rotation, _ = scipy.linalg.orthogonal_procrustes(first.numpy(), second.numpy())
    found = torch.from_numpy(rotation)[: new.shape[1], : old.shape[1]]
    return found.to(new.device, new.dtype if new.dtype == torch.float64 else torch.float32)


def _quality(
    queries: Tensor,
    gallery: Tensor,
    labels: tuple[Tensor, Tensor],
    ids: Ids | None,
    metric: Metric,
    ks: Sequence[int],
) -> dict[str, float]:
    ranked = retrieval_metrics_from_embeddings(
        queries, gallery, labels, ks, ignore=ids, metric=metric, pooled_auc=False
    )
    near = nearest_neighbours(queries, gallery, max(ks), metric=metric, exclude=ids or False).indices.cpu()
    hits = (labels[1][near] == labels[0].unsqueeze(1)) & (near >= 0)
    answered = _relevant_items(labels, ids) > 0
    shares = hits[answered].double().cumsum(1) > 0
    found = {f"cmc@{k}": float(shares[:, min(k, shares.shape[1]) - 1].double().mean()) for k in ks}
    names = ("map", "mrr", "r_precision", "queries", "queries_skipped")
    return found | {name: ranked[name] for name in names}


def _relevant_items(labels: tuple[Tensor, Tensor], ids: Ids | None) -> Tensor:
    """How many items each query could find: those of its class, less those of its class and id."""
    counts = _matches(*labels)
    if ids is None:
        return counts
    both = [torch.stack([label, number.cpu()], dim=1) for label, number in zip(labels, ids, strict=True)]
    return counts - _matches(*both)


def _matches(queries: Tensor, items: Tensor) -> Tensor:
    """Number of items equal to each query."""
    _, place = torch.cat([queries, items]).unique(dim=0, return_inverse=True)
    counts = torch.bincount(place[len(queries) :], minlength=int(place.max()) + 1 if len(place) else 0)
    return counts[place[: len(queries)]]
