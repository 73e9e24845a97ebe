"""Label-free and label-light meters of an embedding space: alignment, uniformity, tolerance, collapse.

Embeddings are (samples, dimensions). All meters but the scale-free `feature_standard_deviation` let
`normalize=False` keep the lengths; by default rows are brought to length 1 (a zero row stays zero). Nothing
here carries a gradient.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import full_precision, without_autocast


def alignment(
    first: Float[Tensor, "samples dimensions"],
    second: Float[Tensor, "samples dimensions"],
    alpha: float | int = 2,
    *,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    """Mean distance between the two embeddings of each positive pair; lower means more invariant.

        alignment = mean_i || first_i - second_i ||^alpha

    Args:
        first: embeddings of one view of each sample.
        second: embeddings of the other view, row by row.
        alpha: exponent of the Euclidean distance, > 0.
        normalize: bring rows to length 1 before; the value then lies in [0, 2^alpha].

    Returns:
        A scalar >= 0; NaN for no pair.

    Raises:
        ValueError: if shapes differ or alpha <= 0.

    Source:
        Wang and Isola 2020, arXiv 2005.10242, equation 2.

    Examples:
        >>> orthogonal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> alignment(*orthogonal)
        tensor(2.)
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            "first and second must have one shape (samples, dimensions), "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    first, second = _prepared(first, normalize), _prepared(second, normalize)
    return (first - second).square().sum(1).pow(alpha / 2).mean()


def uniformity(
    embeddings: Float[Tensor, "samples dimensions"],
    t: float | int = 2,
    *,
    normalize: bool = True,
    chunk_size: int = 512,
) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential between distinct samples; lower means more evenly spread.

        uniformity = log mean over pairs i < j of exp( -t * || x_i - x_j ||^2 )

    Args:
        embeddings: one row for each sample.
        t: inverse width of the potential, > 0, in units of 1 / distance^2.
        normalize: bring rows to length 1 before; the value then lies in [-4 t, 0].
        chunk_size: rows compared with the rest at a time, >= 1; changes memory, not the value.

    Returns:
        A scalar <= 0; 0 if all samples coincide; NaN for fewer than 2 samples.

    Raises:
        ValueError: if the shape is wrong, t <= 0 or chunk_size < 1.

    Cost:
        O(samples^2 * dimensions) time, O(chunk_size * samples) memory.

    Source:
        Wang and Isola 2020, arXiv 2005.10242, equation 3.

    Examples:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # antipodes: -t * 2^2
        tensor(-8.)
    """
    _check_embeddings(embeddings)
    if t <= 0:
        raise ValueError(f"t must be > 0, got {t}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    embeddings = _prepared(embeddings, normalize)
    samples = len(embeddings)
    if samples < 2:
        return embeddings.new_tensor(float("nan"))
    embeddings = embeddings - embeddings.mean(0)  # keeps distances, lessens the rounding of expanded squares
    squares = embeddings.square().sum(1)
    parts = []
    for start in range(0, samples, chunk_size):
        rows, rest = embeddings[start : start + chunk_size], embeddings[start:]
        with without_autocast(embeddings.device):
            products = rows @ rest.T
        distances = squares[start : start + len(rows), None] + squares[None, start:] - 2 * products
        potentials = -t * distances.clamp(min=0)
        later = torch.ones_like(potentials, dtype=torch.bool).triu(1)
        parts.append(potentials.masked_fill(~later, -math.inf).logsumexp((0, 1)))
    return torch.stack(parts).logsumexp(0) - math.log(samples * (samples - 1) / 2)


def tolerance(
    embeddings: Float[Tensor, "samples dimensions"],
    targets: Int[Tensor, " samples"],
    *,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    """Mean similarity between distinct samples of one class; higher means that a class stays together.

        tolerance = mean over pairs i != j with targets_i = targets_j of x_i . x_j
                  = sum_c ( || sum_{i in c} x_i ||^2 - sum_{i in c} ||x_i||^2 ) / sum_c n_c (n_c - 1)

    Args:
        embeddings: one row for each sample.
        targets: class of each sample, any integers. Every pair weighs the same, so a large class weighs more.
        normalize: bring rows to length 1 before; the value is then a cosine in [-1, 1].

    Returns:
        A scalar; 1 if each class is one point; NaN if no class has 2 samples.

    Raises:
        ValueError: if the sizes disagree.

    Cost:
        O(samples * dimensions): the second form of the equation, through class sums.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, section 3.5. The paper prints an expectation over all pairs of
        similarity times an indicator of equal classes; here it is taken over the pairs of equal class.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        >>> tolerance(embeddings, torch.tensor([0, 0, 1, 1]))  # orthogonal in one class, equal in the other
        tensor(0.5000)
    """
    _check_embeddings(embeddings)
    if targets.shape != embeddings.shape[:1]:
        raise ValueError(f"targets must have shape ({len(embeddings)},), got {tuple(targets.shape)}")
    embeddings = _prepared(embeddings, normalize)
    _, index, counts = targets.unique(return_inverse=True, return_counts=True)
    sums = embeddings.new_zeros(len(counts), embeddings.shape[1]).index_add(0, index, embeddings)
    pairs = (counts * (counts - 1)).sum()
    alone = counts == 1  # a class of one adds exactly 0, not its rounding
    sums = sums.masked_fill(alone[:, None], 0.0)
    own = embeddings.square().sum(1).masked_fill(alone[index], 0.0)
    return (sums.square().sum() - own.sum()) / pairs


def feature_standard_deviation(embeddings: Float[Tensor, "samples dimensions"]) -> Float[Tensor, ""]:
    """Spread of unit-length embeddings, the usual alarm for collapse in self-supervised training.

        mean over dimensions d of std_i ( x_id / ||x_i|| ),    n - 1 in the denominator

    Args:
        embeddings: one row for each sample; rows are brought to length 1, so the scale does not matter.

    Returns:
        A scalar: about 1 / sqrt(dimensions) for directions spread evenly, 0 for one common direction; NaN for
        fewer than 2 samples.

    Raises:
        ValueError: if the shape is wrong.

    Source:
        Chen and He 2021 (SimSiam), arXiv 2011.10566, section 4.1.

    Examples:
        >>> feature_standard_deviation(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(0.8165)
        >>> feature_standard_deviation(torch.ones(4, 2))
        tensor(0.)
    """
    _check_embeddings(embeddings)
    embeddings = _prepared(embeddings, normalize=True)
    if len(embeddings) < 2:
        return embeddings.new_tensor(float("nan"))
    return embeddings.std(0).mean()


def _check_embeddings(embeddings: Tensor) -> None:
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (samples, dimensions), got shape {tuple(embeddings.shape)}")


def _prepared(embeddings: Tensor, normalize: bool) -> Tensor:
    embeddings = full_precision(embeddings.detach())
    return F.normalize(embeddings, dim=1) if normalize else embeddings
