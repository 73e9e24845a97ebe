"""How well groups found without labels agree with classes."""

import torch
from jaxtyping import Int
from torch import Tensor


def clustering_accuracy(clusters: Int[Tensor, " samples"], targets: Int[Tensor, " samples"]) -> float:
    """Share of samples that are right when each cluster is given the class, each class once, that suits them best.

    The assignment of clusters to classes is the best of all (Hungarian algorithm). Where there are more clusters than classes, those
    without a class count as wrong.

    Args:
        clusters: cluster of each sample, any integers.
        targets: class of each sample, any integers.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: for no samples, or unequal lengths.

    Cost:
        O(samples + clusters^3).

    Source:
        Kuhn 1955; as a measure of clustering: Yang et al. 2010.

    Examples:
        >>> clustering_accuracy(torch.tensor([7, 7, 3, 3, 5]), torch.tensor([0, 0, 1, 0, 1]))
        0.6
    """
    if clusters.shape != targets.shape or not len(targets):
        raise ValueError(
            f"clusters and targets must be of one length >= 1, got {len(clusters)} and {len(targets)}"
        )
    from scipy.optimize import linear_sum_assignment

    _, rows = clusters.cpu().unique(return_inverse=True)
    classes, columns = targets.cpu().unique(return_inverse=True)
    width = len(classes)
    counts = torch.bincount(rows * width + columns, minlength=int(rows.max() + 1) * width)
    table = counts.reshape(-1, width)
    chosen = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[torch.as_tensor(chosen[0]), torch.as_tensor(chosen[1])].sum()) / len(targets)
