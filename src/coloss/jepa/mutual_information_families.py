"""Pairs of variables whose mutual information is known exactly: closed forms, and samples to train or test estimators on.

Every family draws its own parameters, then samples. The ranges are those of the published meta-distribution; how its latent-variable
covariances are put together is reconstructed from the benchmark that it builds on (Czyz et al. 2023, arXiv 2306.11078). The Clayton
family is ours: a dependence that is not elliptical, with a closed form.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import full_precision


class PairedSamples(NamedTuple):
    """Samples of two variables, and the information that they share in truth.

    Attributes:
        x: (samples, dim_x).
        y: (samples, dim_y).
        information: I(X; Y) in nats.

    Examples:
        >>> draw = draw_additive_uniform(50, 2, 2, torch.Generator().manual_seed(0))
        >>> draw.x.shape, draw.information > 0
        (torch.Size([50, 2]), True)
    """

    x: Float[Tensor, "samples dim_x"]
    y: Float[Tensor, "samples dim_y"]
    information: float


def gaussian_information(covariance: Float[Tensor, "dims dims"], dim_x: int) -> float:
    """Mutual information of the first `dim_x` and the other coordinates of a normal vector.

        I = 1/2 ( log det S_x + log det S_y - log det S )

    Args:
        covariance: S, positive definite.
        dim_x: in [1, dims - 1].

    Returns:
        Nats, >= 0.

    Raises:
        ValueError: if `dim_x` is out of range or the covariance is not positive definite.

    Examples:
        >>> round(gaussian_information(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), 1), 4)
        0.2231
    """
    if not 1 <= dim_x < len(covariance):
        raise ValueError(f"dim_x must be in [1, {len(covariance) - 1}], got {dim_x}")
    exact = full_precision(covariance).double()
    if torch.linalg.cholesky_ex(exact).info != 0:
        raise ValueError("covariance must be positive definite, got one that is not")
    blocks = (exact[:dim_x, :dim_x], exact[dim_x:, dim_x:], exact)
    first, second, joint = (torch.logdet(block).item() for block in blocks)
    return max((first + second - joint) / 2, 0.0)


def bivariate_gaussian_information(correlation: float) -> float:
    """Mutual information of two normal variables: `-log(1 - r^2) / 2`; infinite for |r| = 1.

    Raises:
        ValueError: if the correlation is not in [-1, 1].

    Examples:
        >>> round(bivariate_gaussian_information(0.6), 4), bivariate_gaussian_information(1.0)
        (0.2231, inf)
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation must be in [-1, 1], got {correlation}")
    return math.inf if abs(correlation) == 1 else -0.5 * math.log1p(-(correlation**2))


def additive_uniform_information(noise: float) -> float:
    """Mutual information of X, uniform on [0, 1], and Y = X + U with U uniform on [-e, e].

        I = e - log(2 e) for e <= 1/2,    1 / (4 e) above

    Args:
        noise: e, > 0.

    Raises:
        ValueError: if `noise` is not > 0.

    Examples:
        >>> round(additive_uniform_information(0.25), 4), additive_uniform_information(1.0)
        (0.9431, 0.25)
    """
    if not noise > 0:
        raise ValueError(f"noise must be > 0, got {noise}")
    return noise - math.log(2 * noise) if noise <= 0.5 else 1 / (4 * noise)


def student_excess_information(freedom: float, dim_x: int, dim_y: int) -> float:
    """What a joint Student-t vector shares beyond a normal one with the same dispersion matrix: the common scale.

        c = f(v) + f(v + dim_x + dim_y) - f(v + dim_x) - f(v + dim_y),    f(u) = log Gamma(u / 2) - u / 2 psi(u / 2)

    Args:
        freedom: v, degrees of freedom, > 0; 0 is the limit for many.
        dim_x, dim_y: >= 1.

    Returns:
        Nats, >= 0; the same for every dispersion matrix.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> round(student_excess_information(1.0, 1, 1), 4), student_excess_information(1e6, 2, 2) < 1e-5
        (0.2242, True)
    """
    if not freedom > 0:
        raise ValueError(f"freedom must be > 0, got {freedom}")
    if dim_x < 1 or dim_y < 1:
        raise ValueError(f"dim_x and dim_y must be >= 1, got {dim_x} and {dim_y}")
    from scipy.special import digamma, gammaln

    def part(freedom: float) -> float:
        return float(gammaln(freedom / 2) - freedom / 2 * digamma(freedom / 2))

    return max(
        part(freedom) + part(freedom + dim_x + dim_y) - part(freedom + dim_x) - part(freedom + dim_y), 0.0
    )


def clayton_information(strength: float) -> float:
    """Mutual information of two variables under Clayton's copula: `log(1 + t) - t / (1 + t)`.

    From its density (1 + t) (u v)^(-1-t) C^(1+2t) with C = (u^-t + v^-t - 1)^(-1/t): E log u = -1, and E log C = -1 - 1 / (1 + t) by
    Kendall's distribution.

    Args:
        strength: t, > 0.

    Raises:
        ValueError: if `strength` is not > 0.

    Examples:
        >>> round(clayton_information(2.0), 4)
        0.4319
    """
    if not strength > 0:
        raise ValueError(f"strength must be > 0, got {strength}")
    return math.log1p(strength) - strength / (1 + strength)


Family = Callable[[int, int, int, torch.Generator | None], PairedSamples]


def draw_dense_normal(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Normal vectors in which every two coordinates have the same correlation, from U(0, 0.5)."""
    return _normal(samples, dim_x, _dense(dim_x, dim_y, generator), generator)


def draw_sparse_normal(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Normal vectors in which some coordinates share a latent variable with one partner each; all others are independent."""
    return _normal(samples, dim_x, _sparse(dim_x, dim_y, generator), generator)


def draw_two_pair_normal(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """As `draw_sparse_normal` with two pairs (one where there is no room for two)."""
    return _normal(samples, dim_x, _sparse(dim_x, dim_y, generator, most=2, least=2), generator)


def draw_latent_normal(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Normal vectors from latent variables: one common to all, one for each side, and one for each of some pairs.

    X_m = noise + alpha U + beta_x V_x + (lambda Z_m if m <= K, else eta_x W_x),    Y_m likewise with the same U and Z
    """
    pairs = _integer(1, min(dim_x, dim_y), generator)
    loadings = torch.zeros(dim_x + dim_y, pairs + 5, dtype=torch.float64)
    loadings[:, 0] = _uniform(0.0, 1.0, generator)
    strength = _uniform(0.1, 3.0, generator)
    for side, (start, stop) in enumerate(((0, dim_x), (dim_x, dim_x + dim_y))):
        loadings[start:stop, 1 + side] = _uniform(0.0, 1.5, generator)
        loadings[start + pairs : stop, 3 + side] = _uniform(0.1, 5.0, generator)
        loadings[start : start + pairs, 5:] = strength * torch.eye(pairs)
    return _normal(samples, dim_x, _from_loadings(loadings), generator)


def draw_dense_student(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Student-t vectors with U(1, 10) degrees of freedom, and the dispersion of `draw_dense_normal`."""
    return _student(samples, dim_x, _dense(dim_x, dim_y, generator), generator)


def draw_sparse_student(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Student-t vectors with U(1, 10) degrees of freedom, and the dispersion of `draw_sparse_normal`."""
    return _student(samples, dim_x, _sparse(dim_x, dim_y, generator), generator)


def draw_two_pair_student(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Student-t vectors with U(1, 10) degrees of freedom, and the dispersion of `draw_two_pair_normal`."""
    return _student(samples, dim_x, _sparse(dim_x, dim_y, generator, most=2, least=2), generator)


def draw_additive_uniform(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Uniform coordinates, each with a partner that is itself plus uniform noise of a half-width from U(0.1, 2)."""
    pairs, noise = min(dim_x, dim_y), _uniform(0.1, 2.0, generator)
    x = torch.rand(samples, dim_x, generator=generator)
    other = torch.rand(samples, dim_y, generator=generator)
    y = noise * (2 * torch.rand(samples, dim_y, generator=generator) - 1)
    y = y + torch.cat([x[:, :pairs], other[:, pairs:]], 1)
    return PairedSamples(x, y, pairs * additive_uniform_information(noise))


def draw_clayton(
    samples: int, dim_x: int, dim_y: int, generator: torch.Generator | None = None
) -> PairedSamples:
    """Normal coordinates of which some have one partner each under Clayton's copula: strongly tied at one end only.

    The strength is log-uniform from 0.1 to 10; each coordinate may be turned round.
    """
    pairs = _integer(1, min(dim_x, dim_y), generator)
    strength = math.exp(_uniform(math.log(0.1), math.log(10.0), generator))
    first = _open_uniform((samples, max(dim_x, pairs)), generator)
    second = _open_uniform((samples, dim_y), generator)
    tied, level = first[:, :pairs], second[:, :pairs]
    # v^-t - 1 = u^-t (w^(-t / (1 + t)) - 1), by logarithms: u^-t may be beyond 1e100.
    growth = torch.expm1(-strength / (1 + strength) * level.log()).log() - strength * tied.log()
    partner = (-torch.nn.functional.softplus(growth) / strength).exp()
    second = torch.cat([partner, second[:, pairs:]], 1)
    turned = [1 - 2 * torch.randint(2, (dim,), generator=generator) for dim in (dim_x, dim_y)]
    x, y = (
        (torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)) * sign).float()
        for u, sign in zip((first, second), turned)
    )
    return PairedSamples(x, y, pairs * clayton_information(strength))


# Families of the published meta-distribution, and after them ours.
FAMILIES: dict[str, Family] = {
    "normal-dense": draw_dense_normal,
    "normal-sparse": draw_sparse_normal,
    "normal-2pair": draw_two_pair_normal,
    "normal-latent": draw_latent_normal,
    "student-dense": draw_dense_student,
    "student-sparse": draw_sparse_student,
    "student-2pair": draw_two_pair_student,
    "additive-uniform": draw_additive_uniform,
    "clayton": draw_clayton,
}


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _open_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in (0, 1), never its ends."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def _integer(low: int, high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _dense(dim_x: int, dim_y: int, generator: torch.Generator | None) -> Tensor:
    dims, correlation = dim_x + dim_y, _uniform(0.0, 0.5, generator)
    return (1 - correlation) * torch.eye(dims, dtype=torch.float64) + correlation


def _sparse(
    dim_x: int, dim_y: int, generator: torch.Generator | None, most: int | None = None, least: int = 1
) -> Tensor:
    room = min(dim_x, dim_y)
    pairs = _integer(min(least, room), min(most or room, room), generator)
    loadings = torch.zeros(dim_x + dim_y, pairs, dtype=torch.float64)
    loadings[:pairs] = loadings[dim_x : dim_x + pairs] = torch.eye(pairs, dtype=torch.float64)
    return _from_loadings(_uniform(0.1, 5.0, generator) * loadings)


def _from_loadings(loadings: Tensor) -> Tensor:
    """Correlations of loadings times latent variables plus unit noise."""
    covariance = loadings @ loadings.T + torch.eye(len(loadings), dtype=torch.float64)
    scale = covariance.diagonal().rsqrt()
    return covariance * scale * scale.unsqueeze(1)


def _normal(samples: int, dim_x: int, covariance: Tensor, generator: torch.Generator | None) -> PairedSamples:
    factor = torch.linalg.cholesky(covariance).float()
    values = torch.randn(samples, len(covariance), generator=generator) @ factor.T
    return PairedSamples(values[:, :dim_x], values[:, dim_x:], gaussian_information(covariance, dim_x))


def _student(
    samples: int, dim_x: int, dispersion: Tensor, generator: torch.Generator | None
) -> PairedSamples:
    from scipy.special import gammaincinv

    freedom = _uniform(1.0, 10.0, generator)
    x, y, information = _normal(samples, dim_x, dispersion, generator)
    share = _open_uniform((samples, 1), generator).numpy()
    chi_square = torch.from_numpy(2 * gammaincinv(freedom / 2, share)).clamp(min=1e-30)
    scale = (freedom / chi_square).sqrt().float()
    excess = student_excess_information(freedom, dim_x, len(dispersion) - dim_x)
    return PairedSamples(x * scale, y * scale, information + excess)
