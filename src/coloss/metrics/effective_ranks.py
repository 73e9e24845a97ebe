"""How many directions an embedding really uses, by several definitions; none needs labels.

Embeddings are (samples, dimensions). Singular values come from the Gram matrix in float64, which is much quicker than an SVD; those below
1e-8 of the largest are rounding, and count next to nothing. Nothing here carries a gradient.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import accumulation_dtype, effective_rank, gram_singular_values

Embeddings = Float[Tensor, "samples dim"]


def rankme(embeddings: Embeddings, eps: float = 1e-7, center: bool = False) -> Float[Tensor, ""]:
    """The effective rank of an embedding matrix, from its singular values.

    Args:
        embeddings: Z, finite; one row for each sample. N <= K bounds the value by N.
        eps: added to each share after normalising, >= 0, as published. It adds about m eps log(1 / eps) nats, so never compare
            numbers across `eps`.
        center: take off the mean embedding first.

    Returns:
        A scalar in float64, without a gradient; 0 for no samples, or where all embeddings are 0.

    Raises:
        ValueError: if a value is not finite, or eps < 0.

    Cost:
        O(N K min(N, K)).

    Source:
        Garrido et al., 2023, arXiv 2210.02885, equation 1; Roy, Vetterli 2007 for the effective rank.

    Examples:
        >>> rankme(torch.eye(4)).round(decimals=3), rankme(torch.ones(10, 4)).round(decimals=3)
        (tensor(4., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    return effective_rank(_singular_values(embeddings, center), eps)


def entropy_rank(embeddings: Embeddings, center: bool = True) -> Float[Tensor, ""]:
    """The exponential of the entropy of the variances along the principal directions.

        exp( - sum_k p_k log p_k ),    p_k = l_k / sum_j l_j,    l_k the eigenvalues of the covariance

    Args:
        embeddings: finite; one row for each sample.
        center: take off the mean embedding first.

    Returns:
        A scalar in float64 in [1, min(N, K)]; 0 where there is no variance.

    Raises:
        ValueError: if a value is not finite.

    Examples:
        >>> entropy_rank(torch.eye(4), center=False)
        tensor(4., dtype=torch.float64)
    """
    return _entropy(_singular_values(embeddings, center))


def participation_ratio(embeddings: Embeddings, center: bool = True) -> Float[Tensor, ""]:
    """How many equal variances would be as unequal as those along the principal directions.

        (sum_k l_k)^2 / sum_k l_k^2,    l_k the eigenvalues of the covariance

    Args:
        embeddings: finite; one row for each sample.
        center: take off the mean embedding first.

    Returns:
        A scalar in float64 in [1, min(N, K)]; 0 where there is no variance.

    Raises:
        ValueError: if a value is not finite.

    Examples:
        >>> participation_ratio(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        tensor(1., dtype=torch.float64)
    """
    return _participation(_singular_values(embeddings, center))


def stable_rank(embeddings: Embeddings, center: bool = False) -> Float[Tensor, ""]:
    """The squared Frobenius norm over the squared spectral norm: what is there, in units of the strongest direction.

    Args:
        embeddings: finite; one row for each sample.
        center: take off the mean embedding first.

    Returns:
        A scalar in float64 in [1, min(N, K)]; 0 where all values are 0.

    Raises:
        ValueError: if a value is not finite.

    Source:
        Rudelson, Vershynin 2007.

    Examples:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
        tensor(2.2500, dtype=torch.float64)
    """
    return _stable(_singular_values(embeddings, center))


def rank_meters(embeddings: Embeddings, eps: float = 1e-7) -> dict[str, float]:
    """The effective ranks above at once, from one spectrum as the embeddings are and one around their mean.

    Args:
        embeddings: finite; one row for each sample.
        eps: as in `rankme`.

    Returns:
        "rankme" and "stable_rank" of the embeddings as they are; "rankme_centered", "entropy_rank" and "participation_ratio" without
        the mean.

    Raises:
        ValueError: as `rankme`.

    Cost:
        As `rankme`, twice.

    Examples:
        >>> found = rank_meters(torch.eye(4))
        >>> {name: round(value, 3) for name, value in found.items() if name.startswith("rankme")}
        {'rankme': 4.0, 'rankme_centered': 3.0}
    """
    plain, centred = (_singular_values(embeddings, center) for center in (False, True))
    found = {
        "rankme": effective_rank(plain, eps),
        "rankme_centered": effective_rank(centred, eps),
        "entropy_rank": _entropy(centred),
        "participation_ratio": _participation(centred),
        "stable_rank": _stable(plain),
    }
    return {name: float(value) for name, value in found.items()}


def alpha_req(embeddings: Embeddings, center: bool = True) -> Float[Tensor, ""]:
    """How fast the variances along the principal directions decay: a of l_k ~ k^-a, by least squares on logarithms.

    Args:
        embeddings: finite; one row for each sample.
        center: take off the mean embedding first.

    Returns:
        A scalar in float64; 0 for equal variances; NaN for fewer than 2 variances above rounding error (1e-14 of the largest).

    Raises:
        ValueError: if a value is not finite.

    Source:
        Agrawal et al. 2022 (alpha-ReQ), NeurIPS. The paper leaves the range of the fit open; here it is every k.

    Examples:
        >>> spectrum = (
        ...     torch.tensor([1.0, 2.0, 3.0, 4.0]) ** -1.0
        ... )  # of singular values: variances fall like k^-2
        >>> alpha_req(torch.diag(spectrum), center=False).round(decimals=6)
        tensor(2., dtype=torch.float64)
    """
    variances = _singular_values(embeddings, center).square()
    variances = variances[variances > 1e-14 * variances.amax()] if len(variances) else variances
    if len(variances) < 2:
        return variances.new_tensor(math.nan)
    place = torch.arange(1, len(variances) + 1, dtype=variances.dtype, device=variances.device).log()
    place = place - place.mean()
    return -(place * variances.log()).sum() / place.square().sum()


def lidar(
    embeddings: Float[Tensor, "samples views dim"], delta: float = 1e-4, eps: float = 1e-8
) -> Float[Tensor, ""]:
    """Effective rank of what tells samples apart, where each sample with its views is a class of its own.

        S_w = sum over n, q of (z[n, q] - m[n]) (z[n, q] - m[n])^T / (N (Q - 1)) + delta I        m[n] the mean over views
        S_b = sum over n of (m[n] - m) (m[n] - m)^T / (N - 1)
        LiDAR = exp( - sum_k p_k log p_k ),    p_k = l_k / sum_j l_j + eps,    l the eigenvalues of S_w^-1/2 S_b S_w^-1/2

    Unlike RankMe it does not count directions in which the views of one sample differ as much as samples do.

    Args:
        embeddings: of Q >= 2 views of N >= 2 samples, finite; the views of one sample along dimension 1. From stacked views
            (views, samples, dim): `views.transpose(0, 1)`. Samples whose views got mixed up give a plausible, wrong number.
        delta: added to the within-class variances, > 0. The value therefore depends on the scale: of a cloud that collapsed to
            variances near delta, delta is all that is left within classes, and LiDAR takes it for a healthy one.
        eps: as in `rankme`, >= 0.

    Returns:
        A scalar in float64, at most about min(K, N - 1); 0 where all samples have one mean.

    Raises:
        ValueError: for fewer than 2 samples or views, values that are not finite, or a parameter out of range.

    Cost:
        O(N Q K^2 + K^3).

    Source:
        Thilak et al. 2024 (LiDAR), ICLR, arXiv 2312.04000. Published runs take about 1,000 samples with 50 views.

    Examples:
        >>> samples = (
        ...     torch.eye(3).repeat_interleave(2, 0).view(3, 2, 3)
        ... )  # two equal views of three orthogonal samples
        >>> lidar(samples).round(decimals=3)
        tensor(2., dtype=torch.float64)
    """
    samples, views, dim = embeddings.shape
    if samples < 2 or views < 2:
        raise ValueError(
            f"embeddings must hold at least 2 samples with 2 views each, got {samples} with {views}"
        )
    if not delta > 0:
        raise ValueError(f"delta must be > 0, got {delta}")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, got an infinity or NaN")
    values = embeddings.detach().to(accumulation_dtype(embeddings.device))
    means = values.mean(1)
    inner = (values - means.unsqueeze(1)).flatten(0, 1)
    outer = means - means.mean(0)
    within = inner.T @ inner / (samples * (views - 1)) + delta * torch.eye(dim).to(values)
    between = outer.T @ outer / (samples - 1)
    # L^-1 S_b L^-T with S_w = L L^T has the eigenvalues of S_w^-1/2 S_b S_w^-1/2.
    factor = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh((ratio + ratio.T) / 2).clamp(min=0), eps)


class RankInterval(NamedTuple):
    """RankMe of a sample, and the range it would move in had other samples been drawn.

    Examples:
        >>> RankInterval(12.0, 11.5, 12.5).high
        12.5
    """

    value: float
    low: float
    high: float


def rankme_interval(
    embeddings: Embeddings,
    generator: torch.Generator | None = None,
    *,
    resamples: int = 200,
    level: float = 0.95,
    eps: float = 1e-7,
    center: bool = False,
) -> RankInterval:
    """RankMe with a bootstrap interval over samples, to see whether two runs really differ.

    Rows are drawn with replacement. That repeats some and loses others, which lowers every resampled value a little; so the interval is
    their spread about their own mean, laid about the value itself: [value + low quantile - mean, value + high quantile - mean].

    Args:
        embeddings: finite; one row for each sample, at least 2.
        generator: of the draws; None for torch's global generator.
        resamples: number of draws, >= 2.
        level: share of the spread inside the interval, in (0, 1).
        eps, center: as in `rankme`.

    Returns:
        The value, and the interval's ends.

    Raises:
        ValueError: for a parameter out of range, fewer than 2 samples, or values that are not finite.

    Cost:
        As `rankme`, once for each resample.

    Source:
        Efron, Tibshirani 1993, for the bootstrap.

    Examples:
        >>> embeddings = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> value, low, high = rankme_interval(embeddings, torch.Generator().manual_seed(0), resamples=50)
        >>> low < value < high, high - low < 0.1
        (True, True)
    """
    if resamples < 2:
        raise ValueError(f"resamples must be >= 2, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    samples = len(embeddings)
    if samples < 2:
        raise ValueError(f"embeddings must hold at least 2 samples, got {samples}")
    value = rankme(embeddings, eps, center)
    source = generator.device if generator is not None else "cpu"
    draws = torch.randint(samples, (resamples, samples), generator=generator, device=source).to(
        embeddings.device
    )
    found = torch.stack([rankme(embeddings[rows], eps, center) for rows in draws])
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(found)
    low, high = (value + found.quantile(tails) - found.mean()).tolist()
    return RankInterval(float(value), low, high)


def _singular_values(embeddings: Tensor, center: bool) -> Tensor:
    return gram_singular_values(embeddings.detach(), center)


def _entropy(singular_values: Tensor) -> Tensor:
    return effective_rank(singular_values.square())


def _participation(singular_values: Tensor) -> Tensor:
    variances = _shares(singular_values.square())
    squares = variances.square().sum()
    return torch.where(squares > 0, variances.sum().square() / squares.clamp(min=1e-300), 0.0)


def _stable(singular_values: Tensor) -> Tensor:
    energies = singular_values.square()
    if len(energies) == 0 or energies[0] == 0:
        return energies.new_zeros(())
    return (energies / energies[0]).sum()


def _shares(values: Tensor) -> Tensor:
    """Divided by the largest, so that squares neither overflow nor vanish."""
    return values / values[0] if len(values) and values[0] > 0 else values
