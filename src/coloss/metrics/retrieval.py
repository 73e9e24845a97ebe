"""Ranking and threshold metrics of a matrix of query-document scores.

Conventions, the same for every function: a document is relevant to a query where `relevance` > 0; pairs
marked in `ignore` (unknown relevance, duplicates, the query itself) take no part at all; scores are compared,
never transformed, so any similarity on any scale will do. All results are exact and deterministic.

Rankings (`retrieval_metrics`) break ties by index: of equal scores the lower column comes first. Where the
relevant documents sit in the first columns, a network that gives all documents one score therefore looks
perfect: shuffle the columns, or look at `pooled_auc`, which counts a tie as half a win.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from coloss.ops import accumulation_dtype, full_precision


class RocCurve(NamedTuple):
    """Receiver operating characteristic at every distinct score, from the strictest threshold to the loosest.

    Attributes:
        false_positive_rate: share of irrelevant pairs with score >= threshold, from 0 to 1.
        true_positive_rate: share of relevant pairs with score >= threshold, from 0 to 1.
        thresholds: distinct scores in falling order, led by infinity (nothing accepted).
    """

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    thresholds: Tensor


class OperatingPoint(NamedTuple):
    """What accepting every pair with score >= threshold gives.

    Attributes:
        threshold: the cut-off; infinity where no pair may be accepted.
        recall: share of relevant pairs that are accepted (true positive rate).
        precision: share of accepted pairs that are relevant; NaN where none is accepted.
    """

    threshold: float
    recall: float
    precision: float


def retrieval_metrics(
    scores: Float[Tensor, "queries documents"],
    relevance: Shaped[Tensor, "queries documents"],
    ks: Sequence[int] = (1, 5, 10),
    ignore: Bool[Tensor, "queries documents"] | None = None,
) -> dict[str, float]:
    """All common ranking metrics at once, averaged over the queries that have a relevant document.

    With r_j the relevance of the document at rank j = 1, 2, .. of one query and R its number of relevant
    documents:

        recall@k     = |{j <= k: r_j > 0}| / R            precision@1 = [r_1 > 0]
        mrr          = 1 / (first rank with r_j > 0)      r_precision = |{j <= R: r_j > 0}| / R
        map          = (1/R) sum over ranks j with r_j > 0 of |{i <= j: r_i > 0}| / j
        ndcg@k       = DCG@k / best DCG@k,                DCG@k = sum_{j <= k} r_j / log2(j + 1)

    The gain of nDCG is linear in the grade, as in torchmetrics and scikit-learn; the 2^r - 1 of web search is
    had by passing grades so transformed. A k above the number of documents looks at all of them.

    Args:
        scores: higher means more relevant.
        relevance: bool, or grades >= 0, of which only nDCG uses more than the sign.
        ks: cut-offs >= 1 of recall and nDCG.
        ignore: pairs to leave out of all rankings and of the pooled AUC.

    Returns:
        A dict with `recall@k` and `ndcg@k` for each k, `precision@1`, `mrr`, `map`, `r_precision`,
        `pooled_auc` (see there; over all queries), `queries` (averaged) and `queries_skipped` (without a
        relevant document). With all queries skipped the metrics are NaN.

    Raises:
        ValueError: if shapes differ, a score that counts is NaN, a grade is negative or not finite, or a k is
            below 1.

    Cost:
        O(queries * documents * log documents) time; the ranking tensors hold at most about 4 million pairs at
        a time.

    Source:
        Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, chapter 8;
        Jarvelin and Kekalainen 2002 for nDCG.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
        >>> found = retrieval_metrics(scores, torch.eye(2, 3, dtype=torch.bool), ks=(1, 2))
        >>> found["recall@1"], found["recall@2"], found["mrr"]
        (0.5, 1.0, 0.75)
    """
    keep = _check_pairs(scores, relevance, ignore)
    if not scores.shape[1]:  # no documents: the same as one that is ignored
        one = torch.ones(len(scores), 1, dtype=torch.bool, device=scores.device)
        return retrieval_metrics(one.to(scores.dtype), one, ks, one)
    for k in ks:
        if k < 1:
            raise ValueError(f"ks must be >= 1, got {k}")
    grades = relevance.float().masked_fill(~keep, 0.0)
    if not bool(((grades >= 0) & grades.isfinite()).all()):
        raise ValueError(
            f"relevance must be finite and >= 0, got values from {grades.min()} to {grades.max()}"
        )

    counted = torch.nonzero((grades > 0).any(1)).flatten()
    rows = max(1, 2**22 // max(1, scores.shape[1]))
    parts = [_query_metrics(scores[part], grades[part], keep[part], ks) for part in counted.split(rows)]
    metrics = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
    metrics["pooled_auc"] = float(pooled_auc(scores, relevance, ignore))
    metrics["queries"] = float(len(counted))
    metrics["queries_skipped"] = float(len(scores) - len(counted))
    return metrics


def pooled_auc(
    scores: Float[Tensor, "*pairs"],
    relevance: Shaped[Tensor, "*pairs"],
    ignore: Bool[Tensor, "*pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Probability that a relevant pair outscores an irrelevant one, over the pairs of all queries together.

        AUC = mean over relevant p and irrelevant n of [s_p > s_n] + 0.5 * [s_p = s_n]

    Unlike a per-query ranking it falls when each query has its own offset, so it tells whether one threshold
    serves all queries. Its value depends on which irrelevant pairs are in the pool: compare only over equal
    pools.

    Args:
        scores: any shape; queries x documents for retrieval.
        relevance: bool or numbers, relevant where > 0.
        ignore: pairs to leave out.

    Returns:
        A scalar in [0, 1]; 0.5 for chance and for constant scores; NaN if either class is missing.

    Raises:
        ValueError: if shapes differ or a score that counts is NaN.

    Cost:
        O(n log n) for n pairs. The pairs are counted in integers, so the value is exact but for one division.

    Source:
        Mann and Whitney 1947; equal to scikit-learn's `roc_auc_score` over the flattened pairs.

    Examples:
        >>> pooled_auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0]))
        tensor(0.8750)
    """
    _, positives, negatives = _score_histogram(scores, relevance, ignore)
    pairs = int(positives.sum()) * int(negatives.sum())
    if pairs == 0:
        return torch.full((), float("nan"), device=scores.device)
    beaten = negatives.cumsum(0) - negatives
    twice_won = int((positives * (2 * beaten + negatives)).sum())
    return torch.tensor(twice_won / (2 * pairs), dtype=torch.float32, device=scores.device)


def roc_curve_pooled(
    scores: Float[Tensor, "*pairs"],
    relevance: Shaped[Tensor, "*pairs"],
    ignore: Bool[Tensor, "*pairs"] | None = None,
) -> RocCurve:
    """False and true positive rates of every threshold, over the pairs of all queries together.

    Args:
        scores: any shape; queries x documents for retrieval.
        relevance: bool or numbers, relevant where > 0.
        ignore: pairs to leave out.

    Returns:
        The curve from (0, 0) to (1, 1), one point for each distinct score; its area is `pooled_auc`.

    Raises:
        ValueError: if shapes differ, a score that counts is NaN, or either class is missing.

    Cost:
        O(n log n) for n pairs.

    Examples:
        >>> curve = roc_curve_pooled(torch.tensor([0.9, 0.4, 0.1]), torch.tensor([1, 0, 1]))
        >>> curve.false_positive_rate, curve.true_positive_rate
        (tensor([0., 0., 1., 1.]), tensor([0.0000, 0.5000, 0.5000, 1.0000]))
    """
    thresholds, accepted_positives, accepted_negatives = _acceptances(scores, relevance, ignore)
    return RocCurve(
        accepted_negatives / accepted_negatives[-1], accepted_positives / accepted_positives[-1], thresholds
    )


def threshold_at_fpr(
    scores: Float[Tensor, "*pairs"],
    relevance: Shaped[Tensor, "*pairs"],
    fpr: float | int,
    ignore: Bool[Tensor, "*pairs"] | None = None,
) -> OperatingPoint:
    """Lowest cut-off, one for all queries, that accepts at most a given share of the irrelevant pairs.

    Args:
        scores: any shape; queries x documents for retrieval.
        relevance: bool or numbers, relevant where > 0.
        fpr: largest tolerated false positive rate, in [0, 1].
        ignore: pairs to leave out.

    Returns:
        Threshold (a score of the pool; accept score >= threshold), recall and precision there. Where even the
        highest score would break the limit the threshold is infinite, recall 0 and precision NaN.

    Raises:
        ValueError: if shapes differ, a score that counts is NaN, either class is missing, or fpr is outside
            [0, 1].

    Cost:
        O(n log n) for n pairs.

    Examples:
        >>> threshold_at_fpr(torch.tensor([0.75, 0.5, 0.25, 0.0]), torch.tensor([1, 0, 1, 0]), fpr=0.5)
        OperatingPoint(threshold=0.25, recall=1.0, precision=0.6666666666666666)
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be in [0, 1], got {fpr}")
    thresholds, accepted_positives, accepted_negatives = _acceptances(scores, relevance, ignore)
    allowed = math.floor(fpr * int(accepted_negatives[-1]) * (1 + 1e-12))
    last = int((accepted_negatives <= allowed).sum()) - 1
    right, wrong = int(accepted_positives[last]), int(accepted_negatives[last])
    precision = right / (right + wrong) if right + wrong else math.nan
    return OperatingPoint(float(thresholds[last]), right / int(accepted_positives[-1]), precision)


def _check_pairs(scores: Tensor, relevance: Tensor, ignore: Tensor | None) -> Tensor:
    """Check what all functions ask of their input and return the mask of pairs that count."""
    shape = tuple(scores.shape)
    if relevance.shape != scores.shape:
        raise ValueError(f"relevance must have the shape of scores {shape}, got {tuple(relevance.shape)}")
    if ignore is not None and ignore.shape != scores.shape:
        raise ValueError(f"ignore must have the shape of scores {shape}, got {tuple(ignore.shape)}")
    keep = torch.ones_like(scores, dtype=torch.bool) if ignore is None else ignore == 0
    if bool((scores.isnan() & keep).any()):
        raise ValueError("scores must not be NaN; mark pairs without a score in ignore")
    return keep


def _query_metrics(scores: Tensor, grades: Tensor, keep: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Metrics of each query, all of which have a relevant document; grades of ignored pairs are 0."""
    order = scores.masked_fill(~keep, -math.inf).argsort(dim=1, descending=True, stable=True)
    if not bool(keep.all()):  # ignored pairs go behind all others, also behind scores of -inf
        order = order.gather(1, (~keep).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    ranked = grades.gather(1, order)
    relevant = ranked > 0
    dtype = accumulation_dtype(scores.device)
    hits = relevant.cumsum(1, dtype=dtype)
    total = hits[:, -1:]
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=dtype)
    discount = 1 / torch.log2(rank + 1)
    gain = (ranked * discount).cumsum(1)
    best = (grades.sort(dim=1, descending=True).values * discount).cumsum(1)
    metrics = {}
    for k in ks:
        last = min(k, scores.shape[1]) - 1
        metrics[f"recall@{k}"] = hits[:, last] / total[:, 0]
        metrics[f"ndcg@{k}"] = gain[:, last] / best[:, last]
    metrics["precision@1"] = hits[:, 0]
    metrics["mrr"] = 1 / rank[relevant.float().argmax(1)]
    metrics["map"] = (hits / rank * relevant).sum(1) / total[:, 0]
    metrics["r_precision"] = (hits.gather(1, total.long() - 1) / total)[:, 0]
    return metrics


def _score_histogram(
    scores: Tensor, relevance: Tensor, ignore: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scores in rising order, with the number of relevant and of irrelevant pairs at each."""
    keep = _check_pairs(scores, relevance, ignore)
    relevant = relevance[keep] > 0
    pooled = full_precision(scores[keep])
    distinct, index = pooled.unique(sorted=True, return_inverse=True)
    positives = torch.bincount(index[relevant], minlength=len(distinct))
    return distinct, positives, torch.bincount(index[~relevant], minlength=len(distinct))


def _acceptances(scores: Tensor, relevance: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds in falling order from infinity, with how many relevant and irrelevant pairs each accepts."""
    distinct, positives, negatives = _score_histogram(scores, relevance, ignore)
    if not int(positives.sum()) or not int(negatives.sum()):
        raise ValueError(
            "relevance must hold relevant and irrelevant pairs, "
            f"got {int(positives.sum())} relevant and {int(negatives.sum())} irrelevant"
        )
    thresholds = F.pad(distinct.flip(0), (1, 0), value=math.inf)
    accepted = [F.pad(counts.flip(0).cumsum(0), (1, 0)) for counts in (positives, negatives)]
    return thresholds, accepted[0], accepted[1]
