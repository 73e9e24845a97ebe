"""Finds positives that several sources agree on: streams of a skeleton, modalities or crops vote which samples of a batch are alike.

Each source u compares every sample with every other (S_u, cosines), keeps the most similar ones of each row, and the sources vote:

    B_u = sharpen(S_u)                  bool (rows, columns); several readings of one source must all agree
    Y   = [ sum_u B_u >= votes ]
    loss = mean over pairs with Y_ij of 2 - 2 cos(p_i, z_j)

With Y the identity this is the loss of BYOL. `neighbour_votes` serves any contrastive training as well, to tell false negatives.

Source: the figure of Guo, Liu, Liu et al., 2023, arXiv 2307.07791. How similarities are sharpened there is not public; the k most similar of
each row is one reading.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.ops import all_reduce_mean, full_precision, without_autocast


def cosine_similarity_matrix(
    rows: Float[Tensor, "*batch rows dim"], columns: Float[Tensor, "*batch columns dim"]
) -> Float[Tensor, "*batch rows columns"]:
    """Cosine of each row with each column, at least float32; 0 with a zero vector.

    Examples:
        >>> cosine_similarity_matrix(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.]])
    """
    first, second = (F.normalize(full_precision(part), dim=-1) for part in (rows, columns))
    with without_autocast(first.device):
        return first @ second.transpose(-1, -2)


def nearest_mask(similarity: Float[Tensor, "*readings rows columns"], k: int = 10) -> Bool[Tensor, "*mask"]:
    """True for the k most similar columns of each row, and for those equal to the k-th.

    Args:
        similarity: larger is more similar.
        k: >= 1; capped at the number of columns.

    Raises:
        ValueError: for k < 1.

    Examples:
        >>> nearest_mask(torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1]]), k=1).int()
        tensor([[1, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if not similarity.shape[-1]:
        return torch.zeros_like(similarity, dtype=torch.bool)
    least = similarity.topk(min(k, similarity.shape[-1]), dim=-1).values[..., -1:]
    return similarity >= least


def neighbour_votes(
    similarities: Sequence[Tensor],
    sharpen: Callable[[Tensor], Tensor] = nearest_mask,
    min_votes: int = 2,
) -> Bool[Tensor, "rows columns"]:
    """Which pairs enough sources take for alike.

    Args:
        similarities: float, of each source (rows, columns); or (readings, rows, columns), which must all agree for the source's vote.
        sharpen: turns similarities into bool of the same shape, row by row; by default the 10 most similar. Give
            `functools.partial(nearest_mask, k=5)`, or `lambda s: s > 0.8`.
        min_votes: sources that must agree, in [1, sources].

    Returns:
        bool (rows, columns), without gradient.

    Raises:
        ValueError: for no sources, shapes that differ, or min_votes out of range.

    Cost:
        O(rows x columns) for each reading.

    Examples:
        >>> joint, motion, bone = (torch.tensor([[s]]) for s in (1.0, 0.0, 1.0))
        >>> neighbour_votes([joint, motion, bone], lambda s: s > 0.5)
        tensor([[True]])
        >>> neighbour_votes([joint, motion, motion], lambda s: s > 0.5)
        tensor([[False]])
    """
    if not similarities:
        raise ValueError("similarities must hold at least one source, got none")
    if len({tuple(part.shape[-2:]) for part in similarities}) > 1:
        shapes = [tuple(part.shape) for part in similarities]
        raise ValueError(f"similarities must have the same rows and columns, got {shapes}")
    if not 1 <= min_votes <= len(similarities):
        raise ValueError(
            f"min_votes must be in [1, {len(similarities)}], the number of sources, got {min_votes}"
        )
    ballots = [
        sharpen(part.detach()).flatten(0, -3).all(0) if part.ndim > 2 else sharpen(part.detach())
        for part in similarities
    ]
    return torch.stack([ballot.int() for ballot in ballots]).sum(0) >= min_votes


def soft_positive_loss(
    predictions: Float[Tensor, "rows dim"],
    targets: Float[Tensor, "columns dim"],
    positives: Bool[Tensor, "positive_rows positive_columns"],
    *,
    across_processes: bool = False,
) -> Float[Tensor, ""]:
    """Mean over the positive pairs of 2 - 2 cos(prediction, target): BYOL's loss with more positives than a sample's own other view.

    Args:
        predictions: p, of any length.
        targets: z; no gradient reaches them.
        positives: True for pairs that should be alike; the diagonal alone gives `byol_loss`.
        across_processes: count the pairs of all processes, so that the mean of the processes' losses is the mean over all pairs; each
            process must then call this.

    Returns:
        A scalar in [0, 4], at least float32; 0 without a positive pair.

    Raises:
        ValueError: if the mask does not fit.

    Cost:
        O(rows x columns x dim).

    Examples:
        >>> p = torch.eye(2)
        >>> soft_positive_loss(p, p, torch.eye(2).bool()), soft_positive_loss(p, p, torch.ones(2, 2).bool())
        (tensor(0.), tensor(1.))
    """
    if positives.shape != (len(predictions), len(targets)):
        raise ValueError(
            f"positives must be {(len(predictions), len(targets))}, got {tuple(positives.shape)}"
        )
    distance = 2 - 2 * cosine_similarity_matrix(predictions, targets.detach())
    count = positives.sum().to(distance.dtype)
    count = all_reduce_mean(count) if across_processes else count
    return distance.masked_fill(~positives, 0).sum() / count.clamp_min(torch.finfo(count.dtype).tiny)
