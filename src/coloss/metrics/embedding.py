"""Label-free and label-light meters of an embedding space: alignment, uniformity, tolerance, collapse.

Embeddings are (samples, dimensions). All meters but the scale-free `feature_standard_deviation` let
`normalize=False` keep the lengths; by default rows are brought to length 1 (a zero row stays zero). Nothing
here carries a gradient. Rows are prepared a chunk at a time and sums are taken in float64, so that large sets
need little memory beside the embeddings themselves.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import (
    accumulation_dtype,
    effective_rank,
    full_precision,
    gram_singular_values,
    without_autocast,
)

# Rows that are brought to full precision and length 1 at once: with 256 dimensions 1 MiB.
_ROWS = 1024
# Tiles of pairs for which a chunk of rows is prepared once.
_TILES = 8


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
        ValueError: if shapes differ, a value is not finite or alpha <= 0.

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
    total = torch.zeros((), dtype=accumulation_dtype(first.device), device=first.device)
    for one, other in zip(
        _prepared_parts("first", first, normalize), _prepared_parts("second", second, normalize)
    ):
        total += (one - other).square().sum(1).pow(alpha / 2).sum(dtype=total.dtype)
    return (total / len(first)).to(_result_dtype(first, second))


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
        chunk_size: edge of the tiles of pairs, >= 1; changes memory and time, not the value. At the default a tile
            stays in a core's cache.

    Returns:
        A scalar <= 0; 0 if all samples coincide; NaN for fewer than 2 samples.

    Raises:
        ValueError: if the shape is wrong, a value is not finite, t <= 0 or chunk_size < 1.

    Cost:
        O(samples^2 * dimensions / 2) time, each pair once; O(chunk_size * (chunk_size + 8 * dimensions)) memory. For a
        large set that of a random part is close: among 20,000 samples there are 200 million pairs.

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
    embeddings = embeddings.detach()
    samples, dtype = len(embeddings), _result_dtype(embeddings)
    mean = torch.zeros(embeddings.shape[1], dtype=accumulation_dtype(embeddings.device)).to(embeddings.device)
    for rows in _prepared_parts("embeddings", embeddings, normalize):
        mean += rows.sum(0, dtype=mean.dtype)
    if samples < 2:
        return torch.full((), math.nan, dtype=dtype, device=embeddings.device)
    centre = (mean / samples).to(dtype)  # keeps distances, lessens the rounding of expanded squares

    def factors(start: int, stop: int, left: bool) -> Tensor:
        """Rows whose products are -t * distance^2: 2 t x . y - t |x|^2 - t |y|^2."""
        rows = _prepared(embeddings[start:stop], normalize) - centre
        squares = -t * rows.square().sum(1, keepdim=True)
        one = torch.ones_like(squares)
        return torch.cat([2 * t * rows, squares, one] if left else [rows, one, squares], 1)

    highest, total = -math.inf, 0.0  # the sum of all potentials so far is exp(highest) * total
    for start in range(0, samples, _TILES * chunk_size):
        stop = min(start + _TILES * chunk_size, samples)
        left = factors(start, stop, left=True)
        for column in range(start, samples, chunk_size):
            right = factors(column, min(column + chunk_size, samples), left=False)
            for row in range(start, min(stop, column + 1), chunk_size):
                with without_autocast(left.device):
                    potentials = left[row - start : row - start + chunk_size] @ right.T
                potentials.clamp_(max=0)
                if row == column:
                    later = torch.ones_like(potentials, dtype=torch.bool).triu_(1)
                    potentials.masked_fill_(~later, -math.inf)
                top = float(potentials.amax())
                if top == -math.inf:
                    continue
                here = float(potentials.sub_(top).exp_().sum())
                if top > highest:
                    total, highest = total * math.exp(highest - top) + here, top
                else:
                    total += here * math.exp(top - highest)
    value = highest + math.log(total) - math.log(samples * (samples - 1) / 2) if total else -math.inf
    return torch.tensor(value, dtype=dtype, device=embeddings.device)


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
        ValueError: if the sizes disagree or a value is not finite.

    Cost:
        O(samples * dimensions) time: the second form of the equation, through class sums in float64.

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
    embeddings = embeddings.detach()
    _, index, counts = targets.to(embeddings.device).unique(return_inverse=True, return_counts=True)
    wide = accumulation_dtype(embeddings.device)
    sums = torch.zeros(len(counts), embeddings.shape[1], dtype=wide, device=embeddings.device)
    own = torch.zeros((), dtype=wide, device=embeddings.device)
    shared = counts[index] > 1  # a class of one adds exactly 0, not its rounding
    parts = _prepared_parts("embeddings", embeddings, normalize)
    for rows, classes, counted in zip(parts, index.split(_ROWS), shared.split(_ROWS)):
        rows = rows[counted].to(wide)
        sums.index_add_(0, classes[counted], rows)
        own += rows.square().sum()
    pairs = (counts * (counts - 1)).sum()
    value = (torch.linalg.vector_norm(sums).square() - own) / pairs
    return value.to(_result_dtype(embeddings))


def feature_standard_deviation(embeddings: Float[Tensor, "samples dimensions"]) -> Float[Tensor, ""]:
    """Spread of unit-length embeddings, the usual alarm for collapse in self-supervised training.

        mean over dimensions d of std_i ( x_id / ||x_i|| ),    n - 1 in the denominator

    Args:
        embeddings: one row for each sample; rows are brought to length 1, so the scale does not matter.

    Returns:
        A scalar: about 1 / sqrt(dimensions) for directions spread evenly, 0 for one common direction; NaN for
        fewer than 2 samples.

    Raises:
        ValueError: if the shape is wrong or a value is not finite.

    Source:
        Chen and He 2021 (SimSiam), arXiv 2011.10566, section 4.1.

    Examples:
        >>> feature_standard_deviation(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(0.8165)
        >>> feature_standard_deviation(torch.ones(4, 2))
        tensor(0.)
    """
    _check_embeddings(embeddings)
    embeddings = embeddings.detach()
    samples, dtype = len(embeddings), _result_dtype(embeddings)
    sums = squares = origin = None
    for rows in _prepared_parts("embeddings", embeddings, normalize=True):
        rows = rows.to(accumulation_dtype(rows.device))
        if origin is None or sums is None or squares is None:
            origin = rows[0].clone()  # equal rows differ from it by 0, with no rounding of a mean
            sums, squares = torch.zeros_like(origin), torch.zeros_like(origin)
        rows = rows - origin
        sums += rows.sum(0)
        squares += rows.square().sum(0)
    if samples < 2 or sums is None or squares is None:
        return torch.full((), math.nan, dtype=dtype, device=embeddings.device)
    variance = (squares - sums.square() / samples).clamp(min=0) / (samples - 1)
    return variance.sqrt().mean().to(dtype)


def embedding_metrics(
    embeddings: Float[Tensor, "samples dimensions"],
    targets: Int[Tensor, " samples"] | None = None,
    other_view: Float[Tensor, "samples dimensions"] | None = None,
    *,
    uniformity_samples: int | None = 20_000,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """All meters of this page at once, with the effective rank, for tables and logs.

    Args:
        embeddings: one finite row for each sample.
        targets: class of each sample, for the tolerance.
        other_view: embeddings of another view of each sample, row by row, for the alignment.
        uniformity_samples: samples drawn for the uniformity, whose cost is quadratic, >= 2; None takes all.
        generator: of that draw; None draws always the same.

    Returns:
        `uniformity`, `feature_std` (see `feature_standard_deviation`), `effective_rank` (of the embeddings as they are,
        not centred; RankMe without its epsilon), and where they can be had `tolerance` and `alignment`.

    Raises:
        ValueError: if shapes disagree, a value is not finite, or uniformity_samples < 2.

    Examples:
        >>> found = embedding_metrics(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'uniformity': -4.0, 'feature_std': 0.5, 'effective_rank': 4.0, 'tolerance': 0.0}
    """
    if uniformity_samples is not None and uniformity_samples < 2:
        raise ValueError(f"uniformity_samples must be >= 2, got {uniformity_samples}")
    part = embeddings
    if uniformity_samples is not None and len(embeddings) > uniformity_samples:
        source = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = torch.randperm(len(embeddings), generator=source, device=source.device)[:uniformity_samples]
        part = embeddings[drawn.to(embeddings.device)]
    metrics = {
        "uniformity": float(uniformity(part)),
        "feature_std": float(feature_standard_deviation(embeddings)),
        "effective_rank": float(effective_rank(gram_singular_values(embeddings.detach()))),
    }
    if targets is not None:
        metrics["tolerance"] = float(tolerance(embeddings, targets))
    if other_view is not None:
        metrics["alignment"] = float(alignment(embeddings, other_view))
    return metrics


def _check_embeddings(embeddings: Tensor) -> None:
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (samples, dimensions), got shape {tuple(embeddings.shape)}")


def _result_dtype(*embeddings: Tensor) -> torch.dtype:
    return torch.float64 if any(rows.dtype == torch.float64 for rows in embeddings) else torch.float32


def _prepared(rows: Tensor, normalize: bool) -> Tensor:
    rows = full_precision(rows)
    return F.normalize(rows, dim=1) if normalize else rows


def _prepared_parts(name: str, embeddings: Tensor, normalize: bool) -> Iterator[Tensor]:
    """Rows a chunk at a time, in full precision and of length 1 where asked for."""
    for start in range(0, len(embeddings), _ROWS):
        rows = embeddings[start : start + _ROWS].detach()
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        yield _prepared(rows, normalize)
