"""How alike two networks see the same samples, whatever the rotation and scale of their features."""

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import accumulation_dtype, without_autocast


def linear_cka(
    first: Float[Tensor, "samples first_features"], second: Float[Tensor, "same_samples second_features"]
) -> Float[Tensor, ""]:
    r"""Centred kernel alignment with linear kernels: 1 for features that differ by a rotation and a scale, near 0 for unrelated ones.

    $\frac{\|X^T Y\|_F^2}{\|X^T X\|_F \|Y^T Y\|_F}$ with the columns of $X$ and $Y$ centred. It is biased upwards where samples are not many
    more than features: compare values of equal sample counts only.

    Args:
        first: $X$, features of one network, one row for each sample.
        second: $Y$, features of another network (or layer) for the same samples, of any width.

    Returns:
        A scalar in [0, 1], float64 where the device has it; NaN for fewer than two samples, features that do not vary, or NaN among them.

    Raises:
        ValueError: for different numbers of samples.

    Cost: products of the smaller of samples x samples and features x features.

    Source: Kornblith, Norouzi, Lee, Hinton, 2019, arXiv 1905.00414, section 3.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 5.0]])
        >>> turned = 3 * features @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + 7
        >>> round(linear_cka(features, turned).item(), 6)
        1.0
    """
    if len(first) != len(second):
        raise ValueError(
            f"first and second must have features of the same samples, got {len(first)} and {len(second)}"
        )
    left, right = _centred(first), _centred(second)
    with without_autocast(first.device):
        if len(left) <= max(left.shape[1], right.shape[1]):
            # ||X^T Y||^2 = <X X^T, Y Y^T>
            grams = left @ left.T, right @ right.T
            together, apart = (grams[0] * grams[1]).sum(), (grams[0].norm(), grams[1].norm())
        else:
            together = (left.T @ right).square().sum()
            apart = (left.T @ left).norm(), (right.T @ right).norm()
    return (together / (apart[0] * apart[1])).clamp(0, 1)


def _centred(features: Tensor) -> Tensor:
    wide = features.detach().to(accumulation_dtype(features.device))
    if not wide.numel():
        return wide
    # The scale goes first: a square of what is left cannot overflow.
    largest = wide.abs().amax()
    wide = wide / torch.where(largest == 0, 1, largest)
    wide = wide - wide.mean(0)
    # What is left of a constant feature is the rounding of its mean.
    constant = wide.abs().amax(0) <= len(wide) * torch.finfo(wide.dtype).eps
    return torch.where(constant, 0, wide)
