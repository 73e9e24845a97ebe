"""Losses that ask predicted similarities for the order, or the course, of graded targets: Pearson, rank divergence, preference order."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.ops import full_precision

_TIE = 1e-8


def pearson_loss(
    predictions: Float[Tensor, " pairs"], targets: Shaped[Tensor, " pairs"], eps: float = 1e-8
) -> Float[Tensor, ""]:
    r"""One minus the correlation of predictions and targets.

    $1 - \frac{\sum_b (s_b - \bar s)(y_b - \bar y)}{\sqrt{\sum_b (s_b - \bar s)^2} \sqrt{\sum_b (y_b - \bar y)^2}}$, which neither the unit nor
    the zero of either side changes.

    Args:
        predictions: $s$, such as cosines.
        targets: $y$, on any scale, without gradient.
        eps: > 0, added to the product of the two norms, so that equal predictions have a gradient of finite size.

    Returns:
        A scalar in [0, 2], at least float32; 0 where all targets are equal, for there is nothing to follow.

    Raises:
        ValueError: if lengths differ or eps is not > 0.

    Source:
        CoDiEmb, 2025, arXiv 2508.11442.

    Examples:
        >>> targets = torch.tensor([1.0, 2.0, 4.0])
        >>> (
        ...     round(pearson_loss(3 * targets + 1, targets).item(), 4),
        ...     round(pearson_loss(-targets, targets).item(), 4),
        ... )
        (0.0, 2.0)
    """
    _check(predictions, targets)
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    s = full_precision(predictions)
    y = targets.detach().to(s.dtype)
    if not len(s):
        return s.sum()
    s, y = s - s.mean(), y - y.mean()
    # The root of 0 has no slope; equal predictions meet it.
    norms = (s.square().sum() + eps**2).sqrt() * y.square().sum().sqrt()
    loss = 1 - (s * y).sum() / (norms + eps)
    return torch.where((y == 0).all(), 0.0 * s.sum(), loss)


def average_ranks(values: Shaped[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Rank of each value from 0, the largest first; equal values share the mean of their ranks.

    Args:
        values: numbers of any kind.

    Examples:
        >>> average_ranks(torch.tensor([5.0, 7.0, 5.0, 1.0]))
        tensor([1.5000, 0.0000, 1.5000, 3.0000])
    """
    dtype = values.dtype if values.is_floating_point() and values.element_size() > 2 else torch.float32
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    above = len(values) - sizes.cumsum(0)
    return (above.to(dtype) + (sizes.to(dtype) - 1) / 2)[group]


def rank_kl_loss(
    predictions: Float[Tensor, " pairs"],
    targets: Shaped[Tensor, " pairs"],
    temperature: float = 0.05,
    *,
    per_pair: bool = True,
) -> Float[Tensor, ""]:
    r"""Divergence of the predictions' softmax from that of the targets' ranks.

    $\frac1n \text{KL}(\text{softmax}(t / \tau) \,\|\, \text{softmax}(s / \tau))$ with $t_b = (n - 1 - r_b) / (n - 1)$ from 1 for the largest
    target to 0 for the smallest, ties sharing a rank. Only the order of the targets counts.

    Args:
        predictions: $s$, such as cosines.
        targets: $y$, on any scale.
        temperature: $\tau > 0$.
        per_pair: divide by n, as in the authors' training; the weight of this loss then falls as batches grow.

    Returns:
        A scalar >= 0, at least float32; 0 for fewer than two pairs.

    Raises:
        ValueError: if lengths differ, or the temperature is out of range.

    Source:
        CoDiEmb, 2025, arXiv 2508.11442.

    Examples:
        >>> targets = torch.tensor([4.0, 1.0, 9.0])
        >>> rank_kl_loss(torch.tensor([0.5, 0.0, 1.0]), targets)  # the ranks themselves
        tensor(0.)
    """
    _check(predictions, targets)
    _check_temperature(temperature)
    s = full_precision(predictions)
    count = len(s)
    if count < 2:
        return 0.0 * s.sum()
    wanted = 1 - average_ranks(targets.detach()).to(s.dtype) / (count - 1)
    wanted = (wanted / temperature).log_softmax(0)
    loss = F.kl_div((s / temperature).log_softmax(0), wanted, reduction="sum", log_target=True)
    return loss / count if per_pair else loss


def preference_order_loss(
    predictions: Float[Tensor, " pairs"],
    targets: Shaped[Tensor, " pairs"],
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    r"""Softmax cost of each pair against all pairs of smaller target, with scores scaled by how far apart the targets are (PRO).

    $-\log \frac{e^{w_k s_k/\tau}}{e^{w_k s_k/\tau} + \sum_{j: y_j < y_k} e^{w_{kj} s_j/\tau}}$ with $w_{kj} = y_k - y_j$ and $w_k = \max_j w_{kj}$, averaged over the
    pairs that have any below. The scale of the targets counts: those of 0 to 5 make it five times sharper than those of 0 to 1. Since
    scores are scaled, not shifted, a constant added to all predictions changes the loss.

    Args:
        predictions: $s$, such as cosines.
        targets: $y$; gaps below 1e-8 are ties.
        temperature: $\tau > 0$.

    Returns:
        A scalar >= 0, at least float32; 0 where no two targets differ.

    Raises:
        ValueError: if lengths differ, or the temperature is out of range.

    Cost:
        O(pairs^2) time and memory.

    Source:
        CoDiEmb, 2025, arXiv 2508.11442; Song et al. 2023 (PRO), arXiv 2306.17492.

    Examples:
        >>> loss = preference_order_loss(torch.tensor([0.1, 0.3]), torch.tensor([1.0, 0.0]), temperature=0.1)
        >>> bool(loss == torch.nn.functional.softplus(torch.tensor((0.3 - 0.1) / 0.1)))
        True
    """
    _check(predictions, targets)
    _check_temperature(temperature)
    s = full_precision(predictions) / temperature
    y = targets.detach().to(s.dtype)
    if not len(s):
        return s.sum()
    gaps = y.unsqueeze(1) - y.unsqueeze(0)
    below = gaps > _TIE
    has_any = below.any(1)
    own = gaps.masked_fill(~below, 0.0).amax(1) * s
    others = (gaps * s).masked_fill(~below, -math.inf)
    # A row without a smaller target is left out before the logarithm of an empty sum is taken.
    total = others.masked_fill(~has_any.unsqueeze(1), 0.0).logsumexp(1)
    costs = torch.where(has_any, F.softplus(total - own), 0.0)
    return costs.sum() / has_any.sum().clamp(min=1)


def _check(predictions: Tensor, targets: Tensor) -> None:
    if predictions.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of predictions {tuple(predictions.shape)}, got {tuple(targets.shape)}"
        )


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
