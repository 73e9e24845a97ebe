r"""Losses of several heads whose temperature belongs to each pair: contrastive, SimSiam and Barlow Twins forms.

Equations, sources and what of them is reconstructed: `coloss.contrastive.adaptive_multi_head`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coloss.contrastive.multi_head import PairTemperature, share_at_bounds
from coloss.errors import InputError
from coloss.ops import (
    full_precision,
    gather_with_gradient,
    hardest_keys,
    is_distributed,
    masked_logsumexp,
    negative_logsumexp,
    rank,
    without_autocast,
)
from coloss.ops.loss_arguments import reduced

Base = Literal["max", "logsumexp"]


def omega(temperature: Float[Tensor, "*shape"], dim: float) -> Float[Tensor, "*shape"]:
    r"""The normaliser of a pair's likelihood, $1/\tau + \frac{d}{2} \log\tau$: keeps a temperature from going anywhere it likes.

    With $-s/\tau$ added it is, up to a constant, the negative log-likelihood of a unit vector at cosine $s$ under a Gaussian of variance
    $\tau$ around the anchor. Over $\tau$ that is lowest at $2(1 - s)/d$; with `omega` weighted by $\beta > s$ at $2(\beta - s)/(\beta d)$, and
    for $s \ge \beta$ it falls without end towards $\tau = 0$.

    Args:
        temperature: $\tau > 0$.
        dim: $d$, of the embeddings; a smaller number weakens the logarithm.

    Examples:
        >>> omega(torch.tensor(0.5), dim=4)
        tensor(0.6137)
    """
    temperature = full_precision(temperature)
    return 1 / temperature + dim / 2 * temperature.log()


@dataclass
class Adaptive:
    """A loss, and the temperatures it was made with."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


def adaptive_contrastive_loss(
    first: Float[Tensor, "samples heads dim"],
    second: Float[Tensor, "samples heads dim"],
    temperature: PairTemperature,
    *,
    beta: float = 0.1,
    base: Base = "max",
    positive_competes: bool = False,
    regularizer_dim: float | None = None,
    ids: Shaped[Tensor, " samples"] | None = None,
) -> Float[Tensor, ""]:
    r"""Contrast of two views under several heads, each pair with a temperature of its own.

    With $\Omega$ as in `omega`, summed over heads and averaged over the rows of both views:

    - `"max"`: $-s_+/\tau_+ + s_n/\tau_n + \beta\Omega(\tau_+) - \beta\Omega(\tau_n)$ with $n$ the row's hardest negative;
    - `"logsumexp"`, an addition to the paper: $-s_+/\tau_+ + \log\sum_{k \ne i} e^{s_k/\tau_k} + \beta\Omega(\tau_+)$.

    Args:
        first, second: embeddings of two views, of any length.
        temperature: gives the temperature of a pair. Where it is constant, `"logsumexp"` is the streamed NT-Xent of every head.
        beta: weight of $\Omega$, >= 0; 1 is the exact likelihood.
        base: see above.
        positive_competes: with `"max"`, let the positive be its own rival: rows that have no negative nearer than their positive cost
            nothing (the InfoNCE of LGP and CAN).
        regularizer_dim: $d$ of $\Omega$; None takes the embeddings' length.
        ids: of samples: rows of equal id are no negatives. None: all samples differ.

    Returns:
        A scalar, at least float32; in the `"max"` form it may be negative. 0 where nothing has a negative.

    Raises:
        InputError: for a value out of range, or shapes that disagree.

    Cost:
        Of C heads, N rows of D numbers: `"max"` $O(C N^2 D)$ time, memory of the embeddings and some tiles, and temperatures of 2 C N pairs.
        `"logsumexp"` also the temperatures of all C N^2 pairs in time and memory.

    Examples:
        >>> view = torch.eye(2).unsqueeze(1)  # two samples, one head
        >>> loss = adaptive_contrastive_loss(view, view, PairTemperature(2, bounds=(0.5, 0.5)), beta=0.0)
        >>> loss.item()  # positives at cosine 1, hardest negatives at 0
        -2.0
    """
    options = beta, base, positive_competes, regularizer_dim, ids
    return contrastive_parts(first, second, temperature, *options).loss


def contrastive_parts(
    first: Tensor,
    second: Tensor,
    temperature: PairTemperature,
    beta: float,
    base: Base,
    positive_competes: bool,
    regularizer_dim: float | None,
    ids: Tensor | None,
) -> Adaptive:
    """`adaptive_contrastive_loss` with its temperatures; the negative ones are those of the hardest, or of all, negatives."""
    check_weight("beta", beta)
    if base not in ("max", "logsumexp"):
        raise InputError(f'base must be "max" or "logsumexp", got {base!r}')
    if first.shape != second.shape:
        raise InputError(
            f"both views must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    samples, dim = len(first), regularizer_dim if regularizer_dim is not None else first.shape[2]
    if ids is None:
        # Samples of other processes are others.
        ids = torch.arange(samples, device=first.device) + (rank() << 40)
    rows = F.normalize(full_precision(torch.cat([first, second])), dim=2)
    partners, ids = rows.roll(samples, 0), ids.repeat(2)
    own = (rows * partners).sum(2)
    positive = temperature(rows, partners)
    attraction = -own / positive + beta * omega(positive, dim)
    if base == "max":
        found, rivals = _hardest(rows, ids)
        rival = (rows * rivals).sum(2)
        negative = temperature(rows, rivals)
        repulsion = rival / negative - beta * omega(negative, dim)
        if positive_competes:
            loses = rival > own
            attraction, repulsion = (torch.where(loses, part, 0.0) for part in (attraction, repulsion))
        negative = negative[found]
    elif temperature.is_constant:
        tau = temperature.bounds[0]
        sums = [negative_logsumexp(head, head, tau, query_ids=ids, key_ids=ids) for head in rows.unbind(1)]
        repulsion = torch.logaddexp(torch.stack([logs for logs, _ in sums], 1), own / tau)
        found, negative = sums[0][1] > 0, positive[:0]
    else:
        found, logs, negative = _negatives_of_pairs(rows, ids, temperature)
        repulsion = torch.logaddexp(logs, own / positive)
    loss = torch.where(found, (attraction + torch.where(found.unsqueeze(1), repulsion, 0.0)).sum(1), 0.0)
    return Adaptive(reduced(loss, found, "mean", is_distributed()), positive, negative)


def _hardest(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have a negative, and under each head the nearest one."""
    indices = torch.cat([hardest_keys(head, head, 1, ids=(ids, ids))[1] for head in rows.unbind(1)], 1)
    every = gather_with_gradient(rows)
    return (indices >= 0).all(1), every.gather(0, indices.clamp(min=0).unsqueeze(2).expand_as(rows))


def _negatives_of_pairs(
    rows: Tensor, ids: Tensor, temperature: PairTemperature
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows have a negative, the log-sum-exp over them under each head, and the temperatures of all negative pairs."""
    every = gather_with_gradient(rows)
    others = ids.unsqueeze(1) != gather_with_gradient(ids).unsqueeze(0)
    temperatures = temperature.pairwise(rows, every)
    # A temperature for each pair cannot be put into the embeddings, so the streaming core does not serve here.
    with without_autocast(rows.device):
        scores = torch.einsum("ihd,jhd->ijh", rows, every) / temperatures
    return others.any(1), masked_logsumexp(scores, others.unsqueeze(2), 1), temperatures[others]


def adaptive_simsiam_loss(
    predictions: tuple[Float[Tensor, "samples heads dim"], Float[Tensor, "samples heads dim"]],
    projections: tuple[Float[Tensor, "samples dim"], Float[Tensor, "samples dim"]],
    temperature: Callable[[Tensor, Tensor], Tensor],
    *,
    beta: float = 0.1,
    regularizer_dim: float | None = None,
) -> Float[Tensor, ""]:
    r"""Agreement of each view's predictions with the other view's projection, every pair with a temperature of its own.

    $\sum_c [-s(z^c, \bar h_+)/2\tau - s(z_+^c, \bar h)/2\tilde\tau + \beta\Omega(\tau) + \beta\Omega(\tilde\tau)]$ averaged over samples, with
    $\bar h$ held constant.

    Args:
        predictions: of both views, by several heads.
        projections: of both views, what the heads predict from; no gradient flows into them.
        temperature: (first, second) -> temperatures, such as `PairTemperature`.
        beta: weight of $\Omega$, >= 0.
        regularizer_dim: $d$ of $\Omega$; None takes the embeddings' length.

    Returns:
        A scalar, at least float32; 0 for no samples.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> rows = torch.eye(3)
        >>> heads = rows.unsqueeze(1).repeat(1, 2, 1)
        >>> temperature = PairTemperature(3, bounds=(0.5, 0.5))
        >>> adaptive_simsiam_loss(
        ...     (heads, heads), (rows, rows), temperature, beta=0.0
        ... ).item()  # 2 heads, -1 / 0.5 each
        -4.0
    """
    return simsiam_parts(predictions, projections, temperature, beta, regularizer_dim).loss


def simsiam_parts(
    predictions: tuple[Tensor, Tensor],
    projections: tuple[Tensor, Tensor],
    temperature: Callable[[Tensor, Tensor], Tensor],
    beta: float,
    regularizer_dim: float | None,
) -> Adaptive:
    """`adaptive_simsiam_loss` with its temperatures."""
    check_weight("beta", beta)
    dim = regularizer_dim if regularizer_dim is not None else predictions[0].shape[2]
    costs, taus = [], []
    for own, other in zip(predictions, reversed(projections), strict=True):
        own = F.normalize(full_precision(own), dim=2)
        other = F.normalize(full_precision(other.detach()), dim=1).unsqueeze(1).expand_as(own)
        tau = temperature(own, other)
        costs.append(-(own * other).sum(2) / (2 * tau) + beta * omega(tau, dim))
        taus.append(tau)
    positive = torch.cat(taus)
    loss = reduced((costs[0] + costs[1]).sum(1), None, "mean", is_distributed())
    return Adaptive(loss, positive, positive[:0])


def adaptive_barlow_twins_loss(
    first: Float[Tensor, "samples heads dim"],
    second: Float[Tensor, "samples heads dim"],
    temperatures: Float[Tensor, "heads dim dim"],
    *,
    beta: float = 0.1,
    redundancy_weight: float = 5e-3,
    regularizer_dim: float | None = None,
) -> Float[Tensor, ""]:
    r"""Cross-correlation of two views drawn to the identity, every pair of features with a temperature of its own.

    $\sum_c [\sum_l (1 - C_{ll}/\tau_l)^2 + \lambda \sum_{l \ne m} C_{lm}^2/\tau_{lm} + \beta\sum_l \Omega(\tau_l) - \beta\sum_{l \ne m}\Omega(\tau_{lm})]$
    with $C$ the correlation over the batch of all processes. With temperatures 1 and $\beta = 0$ it is the loss of Barlow Twins, summed
    over heads.

    Args:
        first, second: embeddings of two views.
        temperatures: of feature pairs, such as those of `FeaturePairTemperature`.
        beta: weight of $\Omega$, >= 0.
        redundancy_weight: $\lambda \ge 0$.
        regularizer_dim: $d$ of $\Omega$; None takes the number of features.

    Returns:
        A scalar, at least float32; features without variance have correlation 0.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> rows = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).unsqueeze(1)
        >>> adaptive_barlow_twins_loss(rows, rows, torch.ones(1, 2, 2), beta=0.0).item()
        0.0
    """
    check_weight("beta", beta)
    check_weight("redundancy_weight", redundancy_weight)
    rows = [gather_with_gradient(full_precision(view)) for view in (first, second)]
    dim = regularizer_dim if regularizer_dim is not None else first.shape[2]
    standard = []
    for view in rows:
        centred = view - view.mean(0)
        variance = centred.square().mean(0)
        standard.append(centred * variance.clamp(min=torch.finfo(view.dtype).tiny).rsqrt())
    with without_autocast(first.device):
        correlation = torch.einsum("nhl,nhm->hlm", *standard) / max(len(rows[0]), 1)
    diagonal = torch.eye(first.shape[2], dtype=torch.bool, device=first.device)
    on = (1 - correlation / temperatures).square() + beta * omega(temperatures, dim)
    off = redundancy_weight * correlation.square() / temperatures - beta * omega(temperatures, dim)
    return torch.where(diagonal, on, off).sum()


class AdaptiveMultiHeadLoss(nn.Module):
    """`adaptive_contrastive_loss` as a module that holds the network of its temperatures.

    Args:
        temperature: the network.
        beta, base, positive_competes, regularizer_dim: as for `adaptive_contrastive_loss`.

    Returns:
        From `forward(first, second, ids=None)`: a scalar.

    Raises:
        InputError: for a value out of range, at the first call.

    Examples:
        >>> loss = AdaptiveMultiHeadLoss(PairTemperature(8))
        >>> loss(*torch.randn(2, 6, 3, 8)).shape, sorted(loss.stats())
        (torch.Size([]), ['at_bounds', 'negative_temperature', 'positive_temperature'])
    """

    batch_statistic = True

    def __init__(
        self,
        temperature: PairTemperature,
        beta: float = 0.1,
        base: Base = "max",
        *,
        positive_competes: bool = False,
        regularizer_dim: float | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.options = beta, base, positive_competes, regularizer_dim
        self._stats: dict[str, float] = {}

    def forward(
        self,
        first: Float[Tensor, "samples heads dim"],
        second: Float[Tensor, "samples heads dim"],
        ids: Shaped[Tensor, " samples"] | None = None,
    ) -> Float[Tensor, ""]:
        found = contrastive_parts(first, second, self.temperature, *self.options, ids)
        self._stats = temperature_stats(found, self.temperature.bounds)
        return found.loss

    def stats(self) -> dict[str, float]:
        """Of the last call: mean temperature of positives and of negatives, and the share of both at a bound; empty before the first."""
        return dict(self._stats)


def temperature_stats(found: Adaptive, bounds: tuple[float, float]) -> dict[str, float]:
    """Means of the temperatures that a loss was made with, and the share of them at a bound; NaN of none."""
    positive, negative = found.positive.detach().flatten(), found.negative.detach().flatten()
    return {
        "positive_temperature": float(positive.mean()),
        "negative_temperature": float(negative.mean()),
        "at_bounds": float(share_at_bounds(torch.cat([positive, negative]), bounds)),
    }


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight that is negative or not finite."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name} must be >= 0 and finite, got {weight}")
