"""Retrieval both ways between paired things, such as motions and captions, where one caption fits many and equal scores are common.

What `coloss.metrics.retrieval_metrics` does not do: it asks only for the best of a query's right answers (R@k is the share of queries with one
among the first k, median rank), equal scores share their average rank, and galleries can be chosen as in TMR (Petrovich et al. 2023).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops import full_precision

RETRIEVAL_KS = (1, 2, 3, 5, 10)
"""Cut-offs that text-motion retrieval is reported with."""


def best_ranks(
    scores: Float[Tensor, "queries items"], relevant: Bool[Tensor, "queries items"] | None = None
) -> Float[Tensor, " queries"]:
    """How many wrong items stand before each query's best right one; an equal score counts half, as ranks of ties are averaged.

    Args:
        scores: higher means nearer.
        relevant: True where an item is right for a query; None: item i for query i.

    Returns:
        Ranks from 0, float64; NaN for a query without a right item.

    Raises:
        ValueError: if shapes differ, a score is NaN, or `relevant` is None and the matrix is not square.

    Examples:
        >>> best_ranks(torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.4, 0.4], [0.7, 0.6, 0.1]]))
        tensor([0., 1., 2.], dtype=torch.float64)
    """
    relevant = _relevant(scores, relevant)
    scores = full_precision(scores)
    if bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN")
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True) if scores.shape[1] else scores
    ahead = ((scores > best) & ~relevant).sum(1) + 0.5 * ((scores == best) & ~relevant).sum(1)
    return ahead.double().masked_fill(~relevant.any(1), torch.nan)


def two_way_retrieval(
    scores: Float[Tensor, "rows columns"],
    relevant: Bool[Tensor, "rows columns"] | None = None,
    *,
    ks: Sequence[int] = RETRIEVAL_KS,
    names: tuple[str, str] = ("row_to_column", "column_to_row"),
) -> dict[str, float]:
    """R@k and median rank of finding columns for rows and rows for columns.

    R@k is the share of queries whose best right answer has a rank below k (from 0, see `best_ranks`), MedR the median of rank + 1. Queries
    without a right answer are left out. As in the published protocol an answer that ties with one wrong item has rank 0.5 and counts as first:
    where many scores are equal, R@k says more of ties than of the model.

    Args:
        scores: of rows, such as motions, and columns, such as captions.
        relevant: True where the two belong together: the diagonal and all with the same caption, in a square matrix; None: the diagonal.
        ks: cut-offs >= 1.
        names: of the two directions, in the keys.

    Returns:
        `NAME_r@k` for each k, in [0, 1], and `NAME_medr`, for both names; NaN where no query has an answer.

    Raises:
        ValueError: as `best_ranks`, or for a cut-off below 1.

    Examples:
        >>> found = two_way_retrieval(torch.eye(4), names=("motion_to_text", "text_to_motion"))
        >>> found["motion_to_text_r@1"], found["text_to_motion_medr"]
        (1.0, 1.0)
        >>> two_way_retrieval(torch.zeros(5, 5))["row_to_column_medr"]  # all equal: (5 + 1) / 2
        3.0
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be >= 1, got {tuple(ks)}")
    relevant = _relevant(scores, relevant)
    found = {}
    for name, table, right in ((names[0], scores, relevant), (names[1], scores.T, relevant.T)):
        ranks = best_ranks(table, right)
        ranks = ranks[~ranks.isnan()]
        for k in ks:
            found[f"{name}_r@{k}"] = float((ranks < k).double().mean())
        found[f"{name}_medr"] = float(ranks.quantile(0.5) + 1) if len(ranks) else torch.nan
    return found


def similar_text_relevance(
    text_similarity: Float[Tensor, "texts texts"], threshold: float = 0.95
) -> Bool[Tensor, "texts texts"]:
    """Which texts count as the same: those whose cosine, brought to [0, 1] as (1 + cos) / 2, is above a threshold; always a text itself.

    Args:
        text_similarity: cosines of sentence embeddings; the sentence encoder's name belongs beside every number made with it.
        threshold: in [0, 1].

    Raises:
        ValueError: for a threshold out of range.

    Examples:
        >>> similar_text_relevance(torch.tensor([[1.0, 0.95, 0.5], [0.95, 1.0, 0.0], [0.5, 0.0, 1.0]])).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    same = (1 + full_precision(text_similarity)) / 2 > threshold
    return same | torch.eye(len(same), dtype=torch.bool, device=same.device)


def dissimilar_items(similarity: Float[Tensor, "items items"], count: int = 100) -> Int[Tensor, " chosen"]:
    """Numbers of items that are as unlike each other as a greedy choice finds: one of the most similar pair left is dropped, again and again.

    Of the pair the one goes whose similarities to those left have the larger sum. (TMR's choice approximates a quadratic knapsack; the
    items may differ.)

    Args:
        similarity: symmetric.
        count: how many to keep, >= 1; all, if there are fewer.

    Returns:
        In rising order.

    Raises:
        ValueError: for a count below 1.

    Cost: O(items^2) for each dropped item.

    Examples:
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
        >>> dissimilar_items(-torch.cdist(points, points), 3).tolist()
        [0, 2, 3]
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    left = full_precision(similarity).clone()
    left.fill_diagonal_(-torch.inf)
    sums = full_precision(similarity).sum(1)
    kept = torch.ones(len(left), dtype=torch.bool, device=left.device)
    for _ in range(len(left) - count):
        first, second = divmod(int(left.argmax()), len(left))
        dropped = first if sums[first] > sums[second] else second
        kept[dropped] = False
        left[dropped], left[:, dropped] = -torch.inf, -torch.inf
        sums = sums - full_precision(similarity)[dropped]
    return kept.nonzero().flatten()


def small_gallery_retrieval(
    scores: Float[Tensor, "pairs pairs"],
    relevant: Bool[Tensor, "pairs pairs"] | None = None,
    *,
    gallery: int = 32,
    seed: int = 0,
    ks: Sequence[int] = RETRIEVAL_KS,
    names: tuple[str, str] = ("row_to_column", "column_to_row"),
) -> dict[str, float]:
    """`two_way_retrieval` in galleries of a few pairs drawn at random, averaged; what does not fill a last gallery is left out.

    Args:
        scores, relevant, ks, names: as there.
        gallery: pairs in a gallery, >= 1.
        seed: of the order of the pairs.

    Raises:
        ValueError: as there, for a gallery below 1, or fewer pairs than a gallery holds.

    Examples:
        >>> small_gallery_retrieval(torch.eye(70))["row_to_column_r@1"]
        1.0
    """
    relevant = _relevant(scores, relevant)
    if not 1 <= gallery <= len(scores) or scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"gallery must be in 1 .. the number of pairs of a square matrix {tuple(scores.shape)}, got {gallery}"
        )
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).to(scores.device)
    parts = [part for part in order.split(gallery) if len(part) == gallery]
    found = [
        two_way_retrieval(scores[part][:, part], relevant[part][:, part], ks=ks, names=names)
        for part in parts
    ]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}


def retrieval_protocols(
    scores: Float[Tensor, "pairs pairs"],
    text_similarity: Float[Tensor, "pairs pairs"],
    groups: Int[Tensor, " pairs"] | None = None,
    *,
    threshold: float = 0.95,
    dissimilar: int = 100,
    gallery: int = 32,
    seed: int = 0,
    ks: Sequence[int] = RETRIEVAL_KS,
    names: tuple[str, str] = ("motion_to_text", "text_to_motion"),
) -> Mapping[str, dict[str, float]]:
    """The four protocols of text-motion retrieval on one matrix of scores.

    - `"all"`: every motion against every text;
    - `"threshold"`: texts above a similarity count as the same;
    - `"dissimilar"`: only the pairs whose texts are most unlike each other;
    - `"small"`: galleries of a few random pairs.

    Args:
        scores: of motion i (row) and text j (column); pair i belongs together.
        text_similarity: cosines of the texts' sentence embeddings.
        groups: equal for pairs whose texts mean the same, which are right for each other under all protocols; None: all differ.
        threshold: see `similar_text_relevance`.
        dissimilar: pairs kept by the third protocol.
        gallery, seed: see `small_gallery_retrieval`; with fewer pairs than a gallery, "small" is left out.
        ks, names: see `two_way_retrieval`.

    Raises:
        ValueError: if shapes differ or an option is out of range.

    Source: Petrovich, Black, Varol 2023 (TMR), arXiv 2305.00976, section 4.1.

    Examples:
        >>> found = retrieval_protocols(torch.eye(40), torch.eye(40))
        >>> {name: metrics["motion_to_text_r@1"] for name, metrics in found.items()}
        {'all': 1.0, 'threshold': 1.0, 'dissimilar': 1.0, 'small': 1.0}
    """
    relevant = _relevant(scores, None)
    for name, given, shape in (
        ("text_similarity", text_similarity, scores.shape),
        ("groups", groups, scores.shape[:1]),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(given.shape)}")
    if groups is not None:
        relevant = groups[:, None] == groups
    chosen = dissimilar_items(text_similarity, dissimilar)
    same = relevant | similar_text_relevance(text_similarity, threshold)
    found = {
        "all": two_way_retrieval(scores, relevant, ks=ks, names=names),
        "threshold": two_way_retrieval(scores, same, ks=ks, names=names),
        "dissimilar": two_way_retrieval(
            scores[chosen][:, chosen], relevant[chosen][:, chosen], ks=ks, names=names
        ),
    }
    if len(scores) >= gallery:
        found["small"] = small_gallery_retrieval(
            scores, relevant, gallery=gallery, seed=seed, ks=ks, names=names
        )
    return found


def _relevant(scores: Tensor, relevant: Tensor | None) -> Tensor:
    if relevant is not None:
        if relevant.shape != scores.shape:
            raise ValueError(f"relevant must have shape {tuple(scores.shape)}, got {tuple(relevant.shape)}")
        return relevant
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"relevant must be given where scores are not square, got {tuple(scores.shape)} and none"
        )
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
