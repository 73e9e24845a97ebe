r"""One-dimensional tests and distances to a standard normal, for SIGReg's slot `univariate` and for any batch of columns.

Every function maps samples (..., N, S) to one value for each column, (..., S). N samples x_1..x_N of one column, in rising order
x_(1) <= ... <= x_(N), with empirical distribution function F_N and normal distribution function Phi:

    distribution functions  N * integral of (F_N - Phi)^2 w dPhi     `cramer_von_mises` w = 1, `anderson_darling` w = 1 / (Phi (1 - Phi))
    moments                 `extended_jarque_bera` (four of them), `moment_match` (two)
    quantiles               `sliced_wasserstein` (the whole sample), `quantile_match` (mean, spread and shape apart)

The first three are test statistics: multiplied by N, so that their mean under the standard normal does not depend on N (1/6, 1 and
about 4). The last three are distances, not multiplied by N, and go to 0. A weight found for one does not fit another.

`coloss.ops.epps_pulley`, which compares characteristic functions, is the default of SIGReg for good reasons: its value and its gradient
are bounded, it needs no sorting, and equality in it means equality of distributions. Gradients of `anderson_darling`, `moment_match` and
the quantile distances grow linearly with x, those of `extended_jarque_bera` like x^3; two or four moments also leave many distributions
that are not normal at 0. `moment_match` in SIGReg is a sliced form of VICReg's variance and covariance terms.

Common to all: half precision is computed in float32. No sample gives 0. Values are those of the joined batch of all processes: moments
are averaged over them, sorted samples gathered (see `coloss.ops.distributed` for the scale of the gradient).
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import all_reduce_mean, epps_pulley, full_precision, gather_with_gradient, world_size


def cramer_von_mises(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """Squared distance between the empirical and the normal distribution function, weighted by the normal density.

        W^2 = 1 / (12 N) + sum_i ( (2 i - 1) / (2 N) - Phi(x_(i)) )^2

    Args:
        x: finite samples, N rows for each column.

    Returns:
        One value for each column, in [1 / (12 N), N / 3]; its mean under the standard normal is 1/6 for every N.

    Cost:
        O(N log N) for each column. The gradient vanishes for samples far out: they are ranked right, but not called back.

    Source:
        Cramér 1928; von Mises 1931; one of the tests compared in Balestriero, LeCun 2025 (LeJEPA), arXiv 2511.08544, section 4.2.2.

    Examples:
        >>> cramer_von_mises(torch.zeros(1, 1))  # the median itself: 1/12
        tensor([0.0833])
    """
    ordered, rank, count = _order_statistics(x)
    if count == 0:
        return ordered.sum(-2)
    distance = (2 * rank - 1) / (2 * count) - torch.special.ndtr(ordered)
    return 1 / (12 * count) + distance.square().sum(-2)


def anderson_darling(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """The same distance with more weight on the tails, where 1 / (Phi (1 - Phi)) is large.

        A^2 = -N - (1 / N) * sum_i (2 i - 1) * ( log Phi(x_(i)) + log(1 - Phi(x_(N + 1 - i))) )

    Args:
        x: finite samples, N rows for each column.

    Returns:
        One value for each column, > 0; its mean under the standard normal is 1 for every N.

    Cost:
        O(N log N) for each column. The gradient grows linearly with samples far out.

    Source:
        Anderson, Darling 1952; LeJEPA, arXiv 2511.08544, section 4.2.2.

    Examples:
        >>> anderson_darling(torch.zeros(1, 1))  # 2 log 2 - 1
        tensor([0.3863])
    """
    ordered, rank, count = _order_statistics(x)
    if count == 0:
        return ordered.sum(-2)
    # log(1 - Phi(x)) is log Phi(-x); the sample that is (N + 1 - i)-th from below is the i-th from above.
    surprise = _log_normal_cdf(ordered) + _log_normal_cdf(-ordered.flip(-2))
    return -count - ((2 * rank - 1) * surprise).sum(-2) / count


def extended_jarque_bera(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """Deviation of the first four moments from those of a standard normal, each in units of its own spread.

        EJB = N mean^2 / s^2 + (N - 1) (s^2 - 1)^2 / 2 + N / 6 * ( skewness^2 + (kurtosis - 3)^2 / 4 )

    with s^2 the variance with N - 1, and skewness and kurtosis the third and fourth moments of (x - mean) / sqrt(variance with N).

    Args:
        x: finite samples, N rows for each column.

    Returns:
        One value for each column, >= 0; its mean under the standard normal tends to 4. Where all samples of a column are equal,
        skewness and kurtosis have no value: they count 0, and so does the mean, which leaves (N - 1) / 2 without a gradient.

    Source:
        Jarque, Bera 1980; extended in LeJEPA, arXiv 2511.08544, section 4.2.1.

    Examples:
        >>> extended_jarque_bera(torch.tensor([[-1.0], [1.0]]))  # s^2 = 2 and kurtosis 1
        tensor([0.8333])
    """
    samples = full_precision(x)
    count = _count(samples)
    mean, variance = _mean_and_variance(samples, count)
    spread = variance > 0
    variance = torch.where(spread, variance, 1.0)
    unit = (samples - mean.unsqueeze(-2)) / variance.sqrt().unsqueeze(-2)
    skewness, kurtosis = _average(unit**3, count), _average(unit**4, count)
    sample_variance = variance * count / (count - 1).clamp(min=1)
    shape = skewness.square() + (kurtosis - 3).square() / 4
    found = (
        count * mean.square() / sample_variance
        + (count - 1) * (sample_variance - 1).square() / 2
        + count / 6 * shape
    )
    return torch.where(spread, found, (count - 1).clamp(min=0) / 2)


def moment_match(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """How far mean and spread are from 0 and 1: mean^2 + (std - 1)^2.

    Under SIGReg this asks of the embeddings what VICReg's variance and covariance terms ask: zero mean, and covariance the identity.

    Args:
        x: finite samples, N rows for each column; the standard deviation has N in the denominator.

    Returns:
        One value for each column, >= 0; 1 for a column of zeros, which has no gradient.

    Source:
        Bardes, Ponce, LeCun 2022 (VICReg), arXiv 2105.04906, for the terms; slicing them as in LeJEPA, arXiv 2511.08544.

    Examples:
        >>> moment_match(torch.tensor([[-1.0, 0.0], [1.0, 4.0]]))
        tensor([0., 5.])
    """
    samples = full_precision(x)
    count = _count(samples)
    mean, variance = _mean_and_variance(samples, count)
    return (mean.square() + (_square_root(variance) - 1).square()) * (count > 0)


def sliced_wasserstein(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """Squared 2-Wasserstein distance of the samples to the standard normal, exactly.

        W_2^2 = mean_i x_i^2 + 1 - 2 * sum_i x_(i) * ( phi(q_(i-1)) - phi(q_i) ),    q_i = Phi^-1(i / N), phi the normal density

    which is the integral of (F_N^-1(u) - Phi^-1(u))^2 over u in (0, 1). Averaged over slices it is the sliced distance.

    Args:
        x: finite samples, N rows for each column.

    Returns:
        One value for each column, > 0 for any finite sample (a sum of N points is no normal); 1 + mean^2 for a collapsed column.

    Cost:
        O(N log N) for each column.

    Source:
        Bonneel, Rabin, Peyré, Pfister 2015, for slicing; the closed form follows from the integral of q phi(q).

    Examples:
        >>> sliced_wasserstein(torch.tensor([[0.0, 2.0]]))
        tensor([1., 5.])
    """
    ordered, _, count = _order_statistics(x)
    if count == 0:
        return ordered.sum(-2)
    edges = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count
    density = torch.exp(-torch.special.ndtri(edges).square() / 2) / math.sqrt(2 * math.pi)
    weight = (density[:-1] - density[1:]).to(ordered).unsqueeze(-1)
    return ordered.square().mean(-2) + 1 - 2 * (weight * ordered).sum(-2)


def quantile_match(x: Float[Tensor, "*batch samples slices"]) -> Float[Tensor, "*batch slices"]:
    """Mean, spread and shape held against the standard normal one by one, so that each has a gradient of its own.

        mean^2 + (std - 1)^2 + mean_i ( (x_(i) - mean) / stop(std) - q_i )^2,    q_i = Phi^-1((i - 1/2) / N)

    stop(std) is the standard deviation, a constant to the gradient.

    Args:
        x: finite samples, N rows for each column; the standard deviation has N in the denominator.

    Returns:
        One value for each column, >= 0; about 2 for a column of zeros. There only the mean has a gradient.

    Cost:
        O(N log N) for each column.

    Source:
        The form of VISReg as published in code (stable-pretraining); no sliced Wasserstein distance, since the shape is taken after
        centring and scaling.

    Examples:
        >>> quantile = torch.special.ndtri((torch.arange(4) + 0.5) / 4)
        >>> quantile_match(torch.stack([quantile / quantile.std(correction=0), torch.zeros(4)], 1))
        tensor([0.0243, 1.7124])
    """
    samples = full_precision(x)
    count = _count(samples)
    mean, variance = _mean_and_variance(samples, count)
    std = _square_root(variance)
    moments = mean.square() + (std - 1).square()
    scale = torch.where(variance > 0, std, 1.0).detach()
    ordered, rank, total = _order_statistics((samples - mean.unsqueeze(-2)) / scale.unsqueeze(-2))
    if total == 0:
        return ordered.sum(-2)
    quantile = torch.special.ndtri((rank.double().cpu() - 0.5) / total).to(ordered)
    return moments + (ordered - quantile).square().mean(-2)


UNIVARIATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "epps_pulley": epps_pulley,
    "cramer_von_mises": cramer_von_mises,
    "anderson_darling": anderson_darling,
    "extended_jarque_bera": extended_jarque_bera,
    "moment_match": moment_match,
    "sliced_wasserstein": sliced_wasserstein,
    "quantile_match": quantile_match,
}
"""All that fit SIGReg's slot, by name."""


def _order_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Samples of all processes in rising order, their ranks 1..N as a column, and N."""
    samples = gather_with_gradient(full_precision(x).movedim(-2, 0)).movedim(0, -2)
    count = samples.shape[-2]
    rank = torch.arange(1, count + 1, dtype=samples.dtype, device=samples.device).unsqueeze(-1)
    return samples.sort(-2).values, rank, count


def _count(samples: Tensor) -> Tensor:
    """Samples of all processes together, as a scalar tensor."""
    here = torch.tensor(float(samples.shape[-2]), dtype=samples.dtype, device=samples.device)
    return all_reduce_mean(here) * world_size()


def _average(values: Tensor, count: Tensor) -> Tensor:
    """Mean over the samples of all processes; 0 if there are none."""
    return all_reduce_mean(values.sum(-2)) * world_size() / count.clamp(min=1)


def _mean_and_variance(samples: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N in the denominator) of each column; the variance of equal samples is exactly 0."""
    mean = _average(samples, count)
    # A mean may be rounded by a few units in the last place: what lies below that is no spread.
    variance = _average((samples - mean.unsqueeze(-2)).square(), count)
    rounding = (4 * torch.finfo(samples.dtype).eps * mean).square()
    return mean, torch.where(variance > rounding, variance, 0.0)


def _square_root(variance: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def _log_normal_cdf(x: Tensor) -> Tensor:
    """log Phi(x), exact in value and gradient far into the lower tail, where torch's own gradient loses its digits in float32."""
    below, above = x.clamp(max=0), x.clamp(min=0)
    tail = torch.log(torch.special.erfcx(-below / math.sqrt(2)) / 2) - below.square() / 2
    return torch.where(x < 0, tail, torch.log1p(-torch.special.erfc(above / math.sqrt(2)) / 2))
