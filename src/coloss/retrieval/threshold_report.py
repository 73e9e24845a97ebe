"""Tells what one cut-off on the scores gives, and whether it means the same for every query."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from coloss.metrics import threshold_at_fpr
from coloss.ops import accumulation_dtype


@dataclass(frozen=True)
class ThresholdReport:
    """One cut-off for all queries, and how unequally it treats them.

    Attributes:
        threshold: accept scores >= it; infinity where no pair may be accepted.
        precision: share of accepted pairs that are relevant; NaN where none is accepted.
        recall: share of relevant pairs that are accepted.
        quantiles: which quantiles over queries the next two hold.
        query_thresholds: of the cut-off that each query would need by itself, in the unit of the scores: a score above it is
            accepted at no more than the chosen false positive rate of that query. All equal if scores are calibrated.
        query_false_positive_rates: of the share of its irrelevant documents that a query accepts at the common threshold.

    Examples:
        >>> report = threshold_report(torch.eye(3), torch.eye(3), fpr=0.0)
        >>> report.threshold, report.precision, report.recall
        (1.0, 1.0, 1.0)
    """

    threshold: float
    precision: float
    recall: float
    quantiles: tuple[float, ...]
    query_thresholds: tuple[float, ...]
    query_false_positive_rates: tuple[float, ...]


def threshold_report(
    scores: Float[Tensor, "queries documents"],
    relevance: Shaped[Tensor, "queries documents"],
    fpr: float | int = 0.01,
    *,
    ignore: Bool[Tensor, "queries documents"] | None = None,
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
) -> ThresholdReport:
    """The cut-off for a tolerated rate of false positives, what it gives, and its spread over queries.

    Args:
        scores: higher means more relevant.
        relevance: bool or numbers, relevant where > 0.
        fpr: largest tolerated share of irrelevant pairs above the cut-off, in [0, 1].
        ignore: pairs to leave out.
        quantiles: over queries, in [0, 1]; the nearest query's value is taken. Queries without an irrelevant document are left
            out.

    Returns:
        See `ThresholdReport`; threshold, precision and recall are those of `coloss.metrics.threshold_at_fpr`.

    Raises:
        ValueError: if shapes differ, a score that counts is NaN, either class is missing, or `fpr` or a quantile is outside
            [0, 1].

    Cost:
        O(queries * documents * log) time.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.4, 0.3], [0.5, 0.8, 0.1]])
        >>> report = threshold_report(scores, torch.eye(2, 3), fpr=0.25, quantiles=(0.0, 1.0))
        >>> round(report.threshold, 4), report.recall, report.query_false_positive_rates
        (0.5, 1.0, (0.0, 0.5))
    """
    for quantile in quantiles:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantiles must be in [0, 1], got {quantile}")
    point = threshold_at_fpr(scores, relevance, fpr, ignore)
    irrelevant = ~(relevance > 0) if ignore is None else ~(relevance > 0) & ~ignore
    counts = irrelevant.sum(1)
    rows = counts > 0
    scores, irrelevant, counts = scores[rows], irrelevant[rows], counts[rows]
    wide = accumulation_dtype(scores.device)
    falling = scores.to(wide).masked_fill(~irrelevant, -math.inf).sort(dim=1, descending=True).values
    tolerated = (counts.to(wide) * fpr * (1 + 1e-12)).floor().long()
    alone = F.pad(falling, (0, 1), value=-math.inf).gather(1, tolerated.unsqueeze(1)).squeeze(1)
    rates = ((scores >= point.threshold) & irrelevant).sum(1) / counts
    levels = torch.tensor(list(quantiles), dtype=wide, device=scores.device)
    thresholds, false_positives = (
        tuple(torch.quantile(values.to(wide), levels, interpolation="nearest").tolist())
        for values in (alone, rates)
    )
    return ThresholdReport(
        point.threshold, point.precision, point.recall, tuple(quantiles), thresholds, false_positives
    )
