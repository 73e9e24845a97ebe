"""Metrics of decisions as functions of confusion counts, hard or soft, so that each of them can be a loss.

Hard decisions give the usual metrics that scikit-learn computes. A share of nothing (recall where no sample is positive,
precision where nothing is predicted, F1 where neither occurs) is 1, since nothing was missed, and has no gradient; scikit-learn
says 0 there. A correlation where one side is constant is 0.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from torch import Tensor

from coloss.classification.confusion import ConfusionCounts
from coloss.errors import UnknownNameError, suggest_names

Metric: TypeAlias = Callable[[ConfusionCounts], Tensor]
"""A score of confusion counts, larger is better; elementwise, so that counts by class give scores by class."""


def accuracy(counts: ConfusionCounts) -> Tensor:
    """(TP + TN) / N.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> accuracy(soft_confusion(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1, 0, 0])))
        tensor(0.6667)
    """
    right = counts.true_positive + counts.true_negative
    return _share(right, right + counts.false_positive + counts.false_negative)


def precision(counts: ConfusionCounts) -> Tensor:
    """TP / (TP + FP): how many of the predicted samples are of the class.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> precision(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])))
        tensor(0.5000)
    """
    return _share(counts.true_positive, counts.predicted)


def recall(counts: ConfusionCounts) -> Tensor:
    """TP / (TP + FN): how many samples of the class are predicted. Also true positive rate, sensitivity.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> recall(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])))
        tensor(0.5000)
    """
    return _share(counts.true_positive, counts.positives)


def specificity(counts: ConfusionCounts) -> Tensor:
    """TN / (TN + FP): how many samples of other classes are rejected. Also true negative rate.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> specificity(soft_confusion(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0])))
        tensor(0.6667)
    """
    return _share(counts.true_negative, counts.negatives)


def f_beta(counts: ConfusionCounts, beta: float = 1.0) -> Tensor:
    """(1 + beta^2) TP / ((1 + beta^2) TP + beta^2 FN + FP): precision and recall in one, recall weighing beta times as much.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> f_beta(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])))
        tensor(0.5000)
    """
    hits = (1 + beta**2) * counts.true_positive
    return _share(hits, hits + beta**2 * counts.false_negative + counts.false_positive)


def balanced_accuracy(counts: ConfusionCounts) -> Tensor:
    """(recall + specificity) / 2.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> balanced_accuracy(soft_confusion(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1, 0, 0])))
        tensor(0.5000)
    """
    return (recall(counts) + specificity(counts)) / 2


def g_mean(counts: ConfusionCounts) -> Tensor:
    """sqrt(recall * specificity).

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> g_mean(soft_confusion(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1, 1, 1])))
        tensor(0.8165)
    """
    return _root(recall(counts)) * _root(specificity(counts))


def jaccard(counts: ConfusionCounts) -> Tensor:
    """TP / (TP + FP + FN), the intersection over union.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> jaccard(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])))
        tensor(0.3333)
    """
    return tversky(counts, 1.0, 1.0)


def tversky(counts: ConfusionCounts, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """TP / (TP + alpha FP + beta FN): F1 at 1/2 and 1/2, Jaccard at 1 and 1.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> tversky(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])), beta=1.5)
        tensor(0.3333)
    """
    hits = counts.true_positive
    return _share(hits, hits + alpha * counts.false_positive + beta * counts.false_negative)


def matthews_correlation(counts: ConfusionCounts) -> Tensor:
    """(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), in [-1, 1].

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> matthews_correlation(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 0])))
        tensor(0.5000)
    """
    tp, fp, fn, tn = counts
    # One factor at a time: the product of all four overflows for large counts.
    sides = (
        _root(counts.predicted) * _root(counts.positives),
        _root(counts.negatives) * _root(counts.rejected),
    )
    return _share(tp, sides[0], 0.0) * _share(tn, sides[1], 0.0) - _share(fp, sides[0], 0.0) * _share(
        fn, sides[1], 0.0
    )


def youden_index(counts: ConfusionCounts) -> Tensor:
    """recall + specificity - 1, in [-1, 1].

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> youden_index(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 0])))
        tensor(0.5000)
    """
    return recall(counts) + specificity(counts) - 1


def fowlkes_mallows(counts: ConfusionCounts) -> Tensor:
    """sqrt(precision * recall).

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> fowlkes_mallows(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 0])))
        tensor(0.7071)
    """
    return _root(precision(counts)) * _root(recall(counts))


def cohen_kappa(counts: ConfusionCounts) -> Tensor:
    """Agreement beyond what chance would give, in [-1, 1].

    2 (TP TN - FN FP) / ((TP + FP) (FP + TN) + (TP + FN) (FN + TN))

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> cohen_kappa(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 0])))
        tensor(0.4000)
    """
    tp, fp, fn, tn = counts
    chance = counts.predicted * counts.negatives + counts.positives * counts.rejected
    return _share(2 * (tp * tn - fn * fp), chance, 0.0)


def cost_score(
    counts: ConfusionCounts, false_positive_cost: float = 1.0, false_negative_cost: float = 1.0
) -> Tensor:
    """1 - cost / (cost if every decision were wrong), in [0, 1].

    With equal costs it is the accuracy.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> counts = soft_confusion(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 1, 0]))
        >>> cost_score(counts, false_negative_cost=10.0)
        tensor(0.5238)
    """
    saved = false_positive_cost * counts.true_negative + false_negative_cost * counts.true_positive
    lost = false_positive_cost * counts.false_positive + false_negative_cost * counts.false_negative
    return _share(saved, saved + lost)


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "cohen_kappa": cohen_kappa,
    "fowlkes_mallows": fowlkes_mallows,
    "g_mean": g_mean,
    "jaccard": jaccard,
    "matthews_correlation": matthews_correlation,
    "precision": precision,
    "recall": recall,
    "specificity": specificity,
    "youden_index": youden_index,
}
"""Metrics by name; `find_metric` knows F scores as well."""


def find_metric(name: str) -> Metric:
    """A metric by its name: one of `METRICS`, or "f1", "f2", "f0.5" for the F score of that beta.

    Raises:
        UnknownNameError: if there is none of that name; close names are suggested.

    Examples:
        >>> import torch
        >>> from coloss.classification import soft_confusion
        >>> find_metric("f2")(soft_confusion(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 1])))
        tensor(0.5000)
    """
    score = re.fullmatch(r"f(\d+\.?\d*)", name)
    if score is not None and float(score.group(1)) > 0:
        return partial(f_beta, beta=float(score.group(1)))
    if name not in METRICS:
        raise UnknownNameError(
            f"no metric named {name!r}{suggest_names(name, [*METRICS, 'f1'])} (there are f1, {', '.join(METRICS)})"
        )
    return METRICS[name]


def _share(part: Tensor, whole: Tensor, of_nothing: float = 1.0) -> Tensor:
    """part / whole; `of_nothing`, without a gradient, where whole is 0."""
    empty = whole == 0
    return (part / whole.masked_fill(empty, 1.0)).masked_fill(empty, of_nothing)


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 in place of infinity."""
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
