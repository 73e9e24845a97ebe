"""Columns with a standard normal shape, whatever they were measured in; and the information that is then left in their correlations."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.ops import full_precision
from coloss.ops.gradients import needs_gradient

# Correlations are pulled towards 0 by this share, so that the information of a copy stays finite.
_SHRINKAGE = 1e-4


def rank_gaussianise(
    values: Float[Tensor, "*sets samples columns"], valid: Bool[Tensor, "*sets samples"] | None = None
) -> Float[Tensor, "*sets samples columns"]:
    """Each column by the normal quantile of its ranks: mutual information stays, units, outliers and monotone distortions go.

        g_i = Phi^-1( (rank_i - 1/2) / n ),    ties share their mean rank

    The value is a step function of the inputs, so its true derivative is 0. The gradient given here is that of a fixed smooth curve
    through the points (x_i, g_i): the slope of the chord over the sqrt(n) / 2 neighbours on each side. Mutual information does not
    change with the curve, so what is left out, the movement of the curve itself, would change nothing in a perfect estimate.

    Args:
        values: samples in the last but one dimension; finite where valid.
        valid: True for samples that are there; None for all.

    Returns:
        The same shape, at least float32; 0 where a sample is not there, and in a constant column.

    Cost:
        O(n log n) for each column.

    Source:
        Kraskov, Stoegbauer, Grassberger 2004, arXiv cond-mat/0305641, section II, for the invariance; the gradient is ours.

    Examples:
        >>> rank_gaussianise(torch.tensor([[1.0], [1000.0], [10.0]])).flatten().round(decimals=2)
        tensor([-0.9700,  0.9700,  0.0000])
    """
    found = full_precision(values)
    columns = found.detach().transpose(-1, -2).contiguous()
    samples = columns.shape[-1]
    if columns.numel() == 0:
        return found
    if valid is None:
        present = torch.ones((), dtype=torch.bool, device=columns.device).expand(columns.shape)
    else:
        present = valid.unsqueeze(-2).expand(columns.shape)
    counts = present.sum(-1, keepdim=True)
    columns = columns.masked_fill(~present, math.inf)
    ordered = columns.sort(-1).values
    below = torch.searchsorted(ordered, columns, side="left")
    up_to = torch.searchsorted(ordered, columns, side="right")
    share = ((below + up_to).to(columns.dtype) / (2 * counts.clamp(min=1))).masked_fill(~present, 0.5)
    normal = torch.special.ndtri(share).transpose(-1, -2)
    if not needs_gradient(values):
        return normal
    # The curve through the ordered points, and its slope at each sample.
    order = columns.argsort(-1)
    heights = normal.transpose(-1, -2).gather(-1, order)
    reach = max(1, round(math.sqrt(samples) / 2))
    last = (counts - 1).clamp(min=0)
    left = torch.minimum((below - reach).clamp(min=0), last)
    right = torch.minimum(up_to - 1 + reach, last)
    rise = heights.gather(-1, right) - heights.gather(-1, left)
    run = ordered.gather(-1, right) - ordered.gather(-1, left)
    good = present & (run > 0) & run.isfinite()
    slope = torch.where(good, rise / torch.where(good, run, 1.0), 0.0).transpose(-1, -2)
    moved = torch.where(slope != 0, slope * (found - found.detach()), 0.0)
    return normal + moved


def gaussian_copula_information(
    x: Float[Tensor, "*sets samples dim_x"],
    y: Float[Tensor, "*sets samples dim_y"],
    valid: Bool[Tensor, "*sets samples"] | None = None,
) -> Float[Tensor, "*sets"]:
    """Information in the correlations of columns that are rank-Gaussianised already, corrected for the number of samples.

        I = 1/2 ( log det R_x + log det R_y - log det R ) - 1/2 ( b(dim_x) + b(dim_y) - b(dim_x + dim_y) )
        b(d) = sum_{i=1..d} ( psi((n - i) / 2) - log((n - 1) / 2) ),  what a log determinant of Gaussian samples is off by on average

    For any other dependence with the same correlations the true value is larger or equal.

    Args:
        x, y: columns of standard normal shape, from `rank_gaussianise`.
        valid: True for samples that are there; None for all.

    Returns:
        Nats, one number for each set; it may be below 0. Bounded also for y = x, since correlations are shrunk by 1e-4.

    Source:
        Ince et al. 2017, Human Brain Mapping 38, for the estimate; Misra, Singh, Demchuk 2005 for the correction.

    Examples:
        >>> x = rank_gaussianise(torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)))
        >>> gaussian_copula_information(x[:, :1], x[:, 1:]).abs() < 0.01
        tensor(True)
    """
    joined = torch.cat([x, y], -1)
    samples, dim_x, dim_y = joined.shape[-2], x.shape[-1], y.shape[-1]
    if valid is None:
        counts = joined.new_full(joined.shape[:-2], samples)
    else:
        counts = valid.sum(-1).to(joined.dtype)
        joined = torch.where(valid.unsqueeze(-1), joined, 0.0)
    size = counts.clamp(min=1)[..., None, None]
    centred = joined - joined.sum(-2, keepdim=True) / size
    if valid is not None:
        centred = torch.where(valid.unsqueeze(-1), centred, 0.0)
    covariance = centred.transpose(-1, -2) @ centred / size
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).rsqrt()
    correlation = covariance * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    identity = torch.eye(dim_x + dim_y).to(correlation)
    # Off the diagonal alone: a constant column then counts as independent of all.
    correlation = (1 - _SHRINKAGE) * correlation * (1 - identity) + identity
    total = (
        torch.logdet(correlation[..., :dim_x, :dim_x])
        + torch.logdet(correlation[..., dim_x:, dim_x:])
        - torch.logdet(correlation)
    )
    return (total - log_determinant_bias(counts, dim_x, dim_y)) / 2


def log_determinant_bias(counts: Float[Tensor, "*sets"], dim_x: int, dim_y: int) -> Float[Tensor, "*sets"]:
    """How much log det S_x + log det S_y - log det S exceeds its true value on average, for covariances S of Gaussian samples.

    Args:
        counts: n, samples in each set. Below dim_x + dim_y + 2 the last terms are taken at 1 degree of freedom, to stay finite.
        dim_x, dim_y: number of columns.

    Examples:
        >>> log_determinant_bias(torch.tensor(1000.0), 1, 1).round(decimals=4)
        tensor(0.0010)
    """

    def bias(dim: int) -> Tensor:
        freedom = counts.unsqueeze(-1) - torch.arange(1, dim + 1).to(counts)
        base = ((counts - 1).clamp(min=1) / 2).log().unsqueeze(-1)
        return (torch.digamma(freedom.clamp(min=1) / 2) - base).sum(-1)

    return bias(dim_x) + bias(dim_y) - bias(dim_x + dim_y)
