"""Class means around their own mean, and what of their differences is no more than the rounding of sums."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.ops import RunningMoments, accumulation_dtype


def seen_classes(means: Float[Tensor, "classes features"]) -> Bool[Tensor, " classes"]:
    """Which classes have samples: those whose mean is not NaN throughout.

    Examples:
        >>> seen_classes(torch.tensor([[0.0], [math.nan]]))
        tensor([ True, False])
    """
    return ~means.isnan().all(1)


def centred_means(means: Float[Tensor, "classes features"]) -> Float[Tensor, "seen features"]:
    """Means of the classes that have samples, around their own mean, in float64; 0 where they differ from it by rounding.

    Examples:
        >>> centred_means(torch.tensor([[0.0], [math.nan], [4.0]])).flatten()
        tensor([-2.,  2.], dtype=torch.float64)
    """
    rows = means.detach().to(accumulation_dtype(means.device))[seen_classes(means)]
    if not len(rows):
        return rows
    mean = rows.mean(0)
    return without_rounding(rows - mean, 8 * torch.finfo(rows.dtype).eps * mean.abs())


def mean_rounding(moments: RunningMoments) -> Float[Tensor, " features"]:
    """How far means of each feature may be off, as sums over samples of the features' size.

    Examples:
        >>> mean_rounding(RunningMoments.of(torch.full((4, 1), 1e8), torch.zeros(4).long(), 1)) < 1e-6
        tensor([True])
    """
    samples = int(moments.count.sum())
    energy = (moments.squares + moments.count[:, None] * moments.mean.square()).sum(0) / max(samples, 1)
    return max(8.0, math.sqrt(samples)) * torch.finfo(energy.dtype).eps * energy.sqrt()


def without_rounding(
    differences: Float[Tensor, "rows features"], rounding: Float[Tensor, " features"]
) -> Float[Tensor, "rows features"]:
    """Differences of means, 0 where they are not larger than rounding.

    Examples:
        >>> without_rounding(torch.tensor([[1e-9, -1.0]]), torch.tensor([1e-8, 1e-8]))
        tensor([[ 0., -1.]])
    """
    return torch.where(differences.abs() <= rounding, 0.0, differences)
