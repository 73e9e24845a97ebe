r"""How well the neighbours of each sample are of its own class: the ICNN score of a labelled embedding, between 0 and 1.

Reconstructed: the published equations could not be read, and what stands here is our reading of the abstracts of Mendez-Ruiz et al. 2021,
arXiv 2107.06992, and 2023, arXiv 2305.09062. That the score rewards near neighbours of the own class and far ones of others is theirs; the
three factors and their exponents are not confirmed. With $K_i$ the $k$ nearest of sample $i$, $S_i$ those of its class, $D_i$ the others:

    dn(i, q) = (d(i, q) - min_{K_i} d) / (max_{K_i} d - min_{K_i} d)        d the squared Euclidean distance; 0 where all are equal
    purity_i      = |S_i| / k
    separation_i  = (sum_{q in S_i} (1 - dn) + sum_{q in D_i} dn) / k
    compactness_i = 1 / (1 + var_{S_i} dn + var_{D_i} dn)                  an empty or single set has variance 0
    score_i       = purity^(1/p) separation^(1/q) compactness^(1/r)

The soft form (ours, for training) takes all others in place of $K_i$, each with the weight softmax(-d / T), T being the median distance of the
k nearest over all samples.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.metrics.neighbours import nearest_neighbours
from coloss.ops import full_precision, prototypical_logits
from coloss.ops.pair_sums import pair_scores

# Roots have an infinite slope at 0.
_LEAST = 1e-6


class NeighbourhoodFactors(NamedTuple):
    """The three factors of the ICNN score, each in [0, 1], of each sample.

    Attributes:
        purity: (samples,), share of the neighbours that are of the sample's class.
        separation: (samples,), near neighbours of its class and far ones of others.
        compactness: (samples,), at least 2/3: how equally far neighbours of one kind are.
    """

    purity: Tensor
    separation: Tensor
    compactness: Tensor


def icnn_score(
    embeddings: Float[Tensor, "samples dimensions"],
    labels: Int[Tensor, " samples"],
    k: int | None = None,
    *,
    exponents: Sequence[float] = (2.0, 2.0, 2.0),
    soft: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "*scores"]:
    """Quality of a labelled embedding by the neighbours of each sample: 1 where they are all near and of its class.

    A shift, a rotation or a change of scale leaves it as it is. Other than accuracy it can be differentiated (see
    `icnn_factors` for what has a gradient).

    Args:
        embeddings: at least two rows, finite.
        labels: class of each, any integers.
        k: neighbours, in [1, samples); None: size of the smallest class less one, at least 1. With more than that 1 cannot be reached.
        exponents: p, q, r > 0: roots taken of purity, separation and compactness.
        soft: all others as neighbours, weighted by their distance.
        reduction: `"mean"`, or `"none"` for one score each.

    Returns:
        A scalar or (samples,), in [0, 1], at least float32.

    Raises:
        ValueError: if sizes disagree, a value is not finite, or an option is out of range.

    Cost:
        As `nearest_neighbours`, and O(samples * k) memory; in the soft form samples x samples matrices.

    Source:
        Reconstructed after Mendez-Ruiz et al. 2021 and 2023, arXiv 2107.06992 and 2305.09062; see the head of this module.

    Examples:
        >>> embeddings = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> icnn_score(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(1.)
        >>> icnn_score(embeddings, torch.tensor([0, 1, 0, 1]))
        tensor(0.)
    """
    if len(exponents) != 3 or min(exponents) <= 0:
        raise ValueError(f"exponents must be three numbers > 0, got {tuple(exponents)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    score = None
    for factor, exponent in zip(icnn_factors(embeddings, labels, k, soft=soft), exponents, strict=True):
        root = factor.clamp(min=_LEAST) ** (1 / exponent) * (factor > 0)
        score = root if score is None else score * root
    assert score is not None
    return score.mean() if reduction == "mean" else score


def icnn_factors(
    embeddings: Float[Tensor, "samples dimensions"],
    labels: Int[Tensor, " samples"],
    k: int | None = None,
    *,
    soft: bool = False,
) -> NeighbourhoodFactors:
    """Purity, separation and compactness of each sample's neighbourhood, of which the ICNN score is made.

    Purity counts, so it has a gradient in the soft form only. The nearest and the farthest neighbour, which set the scale of distances,
    are taken without gradient, or all of it would act on these two.

    Args:
        embeddings, labels, k, soft: as for `icnn_score`.

    Returns:
        Three tensors (samples,).

    Raises:
        ValueError: as `icnn_score`.

    Examples:
        >>> embeddings = torch.tensor([[0.0], [1.0], [3.0]])
        >>> icnn_factors(embeddings, torch.tensor([0, 0, 1]), k=2).purity
        tensor([0.5000, 0.5000, 0.0000])
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"embeddings must have at least 2 rows, got {count}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({count},), got {tuple(labels.shape)}")
    if k is None:
        k = max(int(labels.unique(return_counts=True)[1].min()) - 1, 1)
    if not 1 <= k < count:
        raise ValueError(f"k must be in [1, {count}), got {k}")
    rows = full_precision(embeddings)
    found = nearest_neighbours(rows.detach(), rows.detach(), k, metric="euclidean", exclude=True)
    if soft:
        distances = -prototypical_logits(rows, rows)
        itself = torch.eye(count, dtype=torch.bool, device=rows.device)
        scale = found.values.square().median().to(rows.dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        weights = (-distances / scale).masked_fill(itself, -torch.inf).softmax(1)
        alike = labels.unsqueeze(1) == labels
        nearest = distances.detach().masked_fill(itself, torch.inf).amin(1, keepdim=True)
        farthest = distances.detach().masked_fill(itself, -torch.inf).amax(1, keepdim=True)
        relative = _relative(distances, nearest, farthest).masked_fill(itself, 0.0)
    else:
        distances = found.values.square().to(rows.dtype)
        if rows.requires_grad and torch.is_grad_enabled():
            distances = _listed_distances(rows, found.indices)
        weights = torch.full_like(distances, 1 / k)
        alike = labels[found.indices] == labels.unsqueeze(1)
        shown = distances.detach()
        relative = _relative(distances, shown.amin(1, keepdim=True), shown.amax(1, keepdim=True))
    own, others = weights * alike, weights * ~alike
    spread = _variance(relative, own) + _variance(relative, others)
    return NeighbourhoodFactors(
        own.sum(1).clamp(max=1.0),
        (own * (1 - relative) + others * relative).sum(1).clamp(0.0, 1.0),
        1 / (1 + spread),
    )


def _relative(distances: Tensor, nearest: Tensor, farthest: Tensor) -> Tensor:
    """Distances as shares of the way from the nearest to the farthest; 0 where these are equally far."""
    way = farthest - nearest
    return torch.where(way > 0, (distances - nearest) / way.masked_fill(way <= 0, 1.0), 0.0)


def _variance(values: Tensor, weights: Tensor) -> Tensor:
    """(rows,) weighted variance; 0 without weight."""
    total = weights.sum(1, keepdim=True)
    some = total > 0
    share = torch.where(some, weights / total.masked_fill(~some, 1.0), 0.0)
    mean = (share * values).sum(1, keepdim=True)
    return (share * (values - mean).square()).sum(1)


def _listed_distances(rows: Tensor, neighbours: Tensor) -> Tensor:
    """(samples, k) squared distances from the neighbours, differentiable."""
    rows = rows - rows.detach().mean(0)
    squares = rows.square().sum(1)
    index = torch.arange(len(rows), device=rows.device).repeat_interleave(neighbours.shape[1])
    pairs = torch.stack([index, neighbours.flatten()])
    products = pair_scores(rows, rows, pairs, False).view(neighbours.shape)
    return (squares.unsqueeze(1) + squares[neighbours] - 2 * products).clamp(min=0)
