r"""Pair losses in one form, in which a pair may be a positive in part: contrastive, multi-similarity, proxy anchor, NCA, lifted structure.

Of an anchor $a$ and others $x$ with labels $y \in [0, 1]$ (1 positive, 0 negative, between them mixed):

    l(a) = tau( sigma_pos( sum_x y rho_pos(s(a, x)) ) + sigma_neg( sum_x (1 - y) rho_neg(s(a, x)) ) )

$s$ is the inner product of unit vectors. A `PairLoss` names the five functions; `pair_loss` evaluates the formula, for labels of either
kind. Where labels are 0 or 1, `PairLoss.clean` gives the same loss from embeddings, as far as it can without a matrix of scores.

Source: Venkataramanan et al. 2022 (Metrix), arXiv 2106.04990, section 3.1 and 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from coloss.ops import (
    full_precision,
    gather_with_gradient,
    is_distributed,
    masked_logsumexp,
    rank,
    without_autocast,
)
from coloss.ops.distributed import row_counts
from coloss.ops.loss_arguments import reduced_total

Function = Callable[[Tensor], Tensor]
Clean = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs as five functions of similarities.

    Args:
        name: what its term is called.
        rho_positive: cost of a positive pair at a similarity; its logarithm where `exponential`.
        rho_negative: likewise of a negative pair.
        sigma_positive: what is made of an anchor's summed costs of positives; of their logarithm where `exponential`.
        sigma_negative: likewise of negatives.
        outer: tau, what is made of the two together.
        exponential: costs are exponentials, so that sums are kept as logarithms and none overflows.
        mean_over: how anchors become one number: `"anchors"` is their mean; `"sides"` divides the positive side by the anchors that have
            positives, the negative side by all; `"active pairs"` divides each side by its pairs that cost something (sigma and tau must
            then do nothing).
        proxies: `"anchors"` where the anchors are learned proxies of classes and the others samples, `"others"` the other way round, None
            where both are samples.
        streaming: the same loss of (embeddings, labels, proxies), for labels 0 and 1, without a matrix of scores.

    Raises:
        ValueError: for unknown options.

    Examples:
        >>> attraction = PairLoss("attraction", lambda s: 1 - s, torch.zeros_like)
        >>> pair_loss(torch.tensor([[0.2]]), torch.tensor([[1.0]]), torch.tensor([[True]]), attraction)
        tensor([0.8000])
    """

    name: str
    rho_positive: Function
    rho_negative: Function
    sigma_positive: Function = _same
    sigma_negative: Function = _same
    outer: Function = _same
    exponential: bool = False
    mean_over: Literal["anchors", "sides", "active pairs"] = "anchors"
    proxies: Literal["anchors", "others"] | None = None
    streaming: Clean | None = None

    def __post_init__(self) -> None:
        if self.mean_over not in ("anchors", "sides", "active pairs"):
            raise ValueError(
                f'mean_over must be "anchors", "sides" or "active pairs", got {self.mean_over!r}'
            )
        if self.proxies not in (None, "anchors", "others"):
            raise ValueError(f'proxies must be "anchors", "others" or None, got {self.proxies!r}')
        plain = self.sigma_positive is self.sigma_negative is self.outer is _same and not self.exponential
        if self.mean_over == "active pairs" and not plain:
            raise ValueError(
                'mean_over="active pairs" is for sums of costs: sigma and outer must be left out'
            )

    def clean(
        self,
        embeddings: Float[Tensor, "samples dim"],
        labels: Shaped[Tensor, " samples"],
        proxies: Float[Tensor, "classes dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch whose pairs are positive or negative, over the samples of all processes.

        Args:
            embeddings: one row for each sample, of any length.
            labels: classes; with proxies numbers in [0, classes).
            proxies: one row for each class, of any length, if the loss has proxies.

        Returns:
            A scalar, at least float32.

        Raises:
            ValueError: if the loss needs proxies and has none, or the other way round.

        Cost:
            Streaming, see `coloss.ops.label_logsumexps`; a `PairLoss` without `streaming` takes a samples x samples matrix of scores.
        """
        self.check_proxies(proxies)
        rows = F.normalize(full_precision(embeddings), dim=1)
        kernels = None if proxies is None else F.normalize(full_precision(proxies), dim=1).to(rows.dtype)
        if self.streaming is not None:
            return self.streaming(rows, labels, kernels)
        return self._from_scores(rows, labels, kernels)

    def check_proxies(self, proxies: Tensor | None) -> None:
        """Refuse a loss with proxies that is given none, and the other way round."""
        if (proxies is None) != (self.proxies is None):
            raise ValueError(
                f"{self.name} {'takes no proxies, got some' if self.proxies is None else 'needs proxies, got none'}"
            )

    def _from_scores(self, rows: Tensor, labels: Tensor, proxies: Tensor | None) -> Tensor:
        first = sum(row_counts(rows)[: rank()]) if is_distributed() else 0
        samples, classes = gather_with_gradient(rows), gather_with_gradient(labels)
        if proxies is None:
            anchors, of_anchors, others, of_others = rows, labels, samples, classes
        else:
            numbers = torch.arange(len(proxies), device=labels.device)
            anchors, of_anchors, others, of_others = proxies, numbers, samples, classes
            if self.proxies == "others":
                anchors, of_anchors, others, of_others = rows, labels, proxies, numbers
        with without_autocast(rows.device):
            scores = anchors @ others.T
        mask = torch.ones_like(scores, dtype=torch.bool)
        if proxies is None:
            mask.diagonal(first).fill_(False)
        alike = (of_anchors.unsqueeze(1) == of_others.unsqueeze(0)).to(scores.dtype)
        # Proxies are the same anchors on every process.
        return mean_pair_loss(scores, alike, mask, self, across_processes=self.proxies != "anchors")


def pair_loss(
    similarities: Float[Tensor, "anchors others"],
    labels: Float[Tensor, "anchors others"],
    mask: Bool[Tensor, "anchors others"],
    loss: PairLoss,
) -> Float[Tensor, " anchors"]:
    """The loss of each anchor, from similarities and labels between 0 and 1.

    Args:
        similarities: of unit vectors, in [-1, 1].
        labels: weight of each pair as a positive, in [0, 1]; the rest of it is a negative.
        mask: which pairs count; elsewhere similarities may hold anything.
        loss: which.

    Returns:
        One value for each anchor, at least float32. A side on which an anchor has no weight costs it nothing, without gradient.

    Raises:
        ValueError: if a label that counts is outside [0, 1].

    Examples:
        >>> margin_loss = PairLoss(
        ...     "margin", lambda s: 1 - s, lambda s: (s - 0.5).relu(), mean_over="active pairs"
        ... )
        >>> similarities = torch.tensor([[0.9, 0.8, 0.1]])
        >>> labels, mask = torch.tensor([[1.0, 0.5, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> pair_loss(similarities, labels, mask, margin_loss)  # 0.1 + 0.5 * (0.2 + 0.3)
        tensor([0.3500])
    """
    positive, negative, _, _ = _sides(similarities, labels, mask, loss)
    return loss.outer(positive + negative)


def mean_pair_loss(
    similarities: Float[Tensor, "anchors others"],
    labels: Float[Tensor, "anchors others"],
    mask: Bool[Tensor, "anchors others"],
    loss: PairLoss,
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """One number for the anchors, averaged as the loss says (`PairLoss.mean_over`) over those that have a pair.

    Args:
        similarities, labels, mask, loss: as for `pair_loss`.
        across_processes: average over the anchors of all processes of a run.

    Returns:
        A scalar, at least float32; 0 where no pair counts.

    Examples:
        >>> margin_loss = PairLoss(
        ...     "margin", lambda s: 1 - s, lambda s: (s - 0.5).relu(), mean_over="active pairs"
        ... )
        >>> similarities, labels = (
        ...     torch.tensor([[0.9, 0.6], [0.5, 0.3]]),
        ...     torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        ... )
        >>> mask = torch.ones(2, 2, dtype=torch.bool)
        >>> loss = mean_pair_loss(similarities, labels, mask, margin_loss)  # (0.1 + 0.5) / 2 + 0.1 / 1
        >>> round(loss.item(), 4)
        0.4
    """
    positive, negative, active, passive = _sides(similarities, labels, mask, loss)
    anchors = mask.any(1)
    if loss.mean_over == "anchors":
        return _averaged((loss.outer(positive + negative) * anchors).sum(), anchors.sum(), across_processes)
    if loss.mean_over == "sides":
        counts = (mask & (labels > 0)).any(1).sum(), anchors.sum()
    else:
        counts = active, passive
    return sum(
        (
            _averaged(side.sum(), count, across_processes)
            for side, count in zip((positive, negative), counts, strict=True)
        ),
        start=positive.new_zeros(()),
    )


def _sides(
    similarities: Tensor, labels: Tensor, mask: Tensor, loss: PairLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchors,) costs of positives and of negatives after sigma, and how many pairs of each cost anything."""
    scores = full_precision(similarities).masked_fill(~mask, 0.0)
    weights = labels.to(scores.dtype).masked_fill(~mask, 0.0)
    if bool(((weights < 0) | (weights > 1)).any()):
        raise ValueError(f"labels must be in [0, 1], got {weights.min().item()} to {weights.max().item()}")
    sides, counts = [], []
    for weight, rho, sigma in (
        (weights, loss.rho_positive, loss.sigma_positive),
        (1 - weights, loss.rho_negative, loss.sigma_negative),
    ):
        counted = mask & (weight > 0)
        if loss.exponential:
            # A weight multiplies an exponential as its logarithm adds; weight 0 is no pair.
            total = masked_logsumexp(rho(scores) + weight.masked_fill(~counted, 1.0).log(), counted)
            counts.append(counted.sum())
        else:
            costs = torch.where(counted, weight * rho(scores), 0.0)
            total = costs.sum(1)
            counts.append((costs > 0).sum())
        present = counted.any(1)
        sides.append(torch.where(present, sigma(total.masked_fill(~present, 0.0)), 0.0))
    return sides[0], sides[1], counts[0], counts[1]


def _averaged(total: Tensor, count: Tensor, across_processes: bool) -> Tensor:
    return reduced_total(total, count.to(total.dtype), "mean", across_processes and is_distributed())
