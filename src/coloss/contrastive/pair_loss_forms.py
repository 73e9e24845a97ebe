"""The pair losses of metric learning by name: contrastive, multi-similarity, proxy anchor, NCA, lifted structure.

Each is a `PairLoss`, for labels between 0 and 1; where labels are 0 or 1 its `clean` form streams through `coloss.ops`.

Source: Venkataramanan et al. 2022 (Metrix), arXiv 2106.04990, table 1.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.contrastive.labelled_pairs import PairLoss
from coloss.errors import InputError, suggest_names
from coloss.ops import (
    is_distributed,
    label_logsumexps,
    multi_similarity_loss,
    pair_margin_loss,
    proxy_anchor_loss,
)
from coloss.ops.loss_arguments import reduced


def contrastive(margin: float = 0.5) -> PairLoss:
    """Pull positives together, push negatives below a similarity; each side a mean over the pairs that cost something.

    rho_pos(s) = 1 - s and rho_neg(s) = [s - margin]_+. The paper writes -s, which differs by a constant.

    Args:
        margin: m, similarity up to which negatives cost nothing.

    Examples:
        >>> contrastive().clean(torch.eye(2), torch.tensor([0, 0]))
        tensor(1.)
    """
    return PairLoss(
        "contrastive",
        lambda s: (1 - s).relu(),
        lambda s: (s - margin).relu(),
        mean_over="active pairs",
        streaming=lambda rows, labels, _: pair_margin_loss(rows, labels, 1.0, margin),
    )


def euclidean_contrastive(margin: float = 0.5) -> PairLoss:
    """The contrastive loss on distances d = sqrt(2 - 2 s) of unit vectors, as the authors' code has it.

    rho_pos = d (not squared) and rho_neg = [margin - d]_+, each side a mean over the pairs that cost something. A distance of 0 has
    gradient 0.

    Args:
        margin: distance from which on negatives cost nothing.

    Examples:
        >>> euclidean_contrastive().clean(torch.eye(2), torch.tensor([0, 0]))
        tensor(1.4142)
    """
    return PairLoss(
        "contrastive",
        _distance,
        lambda s: (margin - _distance(s)).relu(),
        mean_over="active pairs",
    )


def multi_similarity(
    positive_scale: float = 2.0, negative_scale: float = 50.0, margin: float = 0.5
) -> PairLoss:
    """The multi-similarity loss without mining: `coloss.ops.multi_similarity_loss` for labels between 0 and 1.

    sigma(u) = log(1 + u) / scale, rho_pos(s) = exp(-positive_scale (s - m)), rho_neg(s) = exp(negative_scale (s - m)).

    Examples:
        >>> round(multi_similarity().clean(torch.eye(2), torch.tensor([0, 0])).item(), 4)
        0.6566
    """
    return PairLoss(
        "multi_similarity",
        lambda s: -positive_scale * (s - margin),
        lambda s: negative_scale * (s - margin),
        lambda log_u: F.softplus(log_u) / positive_scale,
        lambda log_u: F.softplus(log_u) / negative_scale,
        exponential=True,
        streaming=lambda rows, labels, _: multi_similarity_loss(
            rows, labels, positive_scale, negative_scale, margin
        ),
    )


def proxy_anchor(scale: float = 32.0, margin: float = 0.1) -> PairLoss:
    """The proxy anchor loss: `coloss.ops.proxy_anchor_loss` for labels between 0 and 1.

    sigma(u) = log(1 + u), rho_pos(s) = exp(-scale (s - m)), rho_neg(s) = exp(scale (s + m)).

    Examples:
        >>> proxies = torch.eye(2)
        >>> loss = proxy_anchor(scale=1.0, margin=0.0).clean(proxies, torch.tensor([0, 1]), proxies)
        >>> round(loss.item(), 4)
        1.0064
    """
    return PairLoss(
        "proxy_anchor",
        lambda s: -scale * (s - margin),
        lambda s: scale * (s + margin),
        F.softplus,
        F.softplus,
        exponential=True,
        mean_over="sides",
        proxies="anchors",
        streaming=lambda rows, labels, proxies: proxy_anchor_loss(
            rows, labels, _given(proxies), scale, margin
        ),
    )


def nca(temperature: float = 0.1) -> PairLoss:
    """Proxy-NCA: the odds of each sample's own class proxy against the proxies of all other classes.

    sigma_pos(u) = -log u, sigma_neg(u) = log u, rho(s) = exp(s / temperature). The own proxy is not part of the denominator; with it, this
    is the softmax cross-entropy of ProxyNCA++.

    Examples:
        >>> round(nca(temperature=1.0).clean(torch.eye(2), torch.tensor([0, 1]), torch.eye(2)).item(), 4)
        -1.0
    """
    return PairLoss(
        "nca",
        lambda s: s / temperature,
        lambda s: s / temperature,
        torch.neg,
        exponential=True,
        proxies="others",
        streaming=partial(_streaming_nca, temperature),
    )


def lifted_structure(margin: float = 1.0, scale: float = 1.0) -> PairLoss:
    """The lifted structure loss in its generalised form: [log sum of positives + log sum of negatives]_+ for each anchor.

    rho_pos(s) = exp(-scale s), rho_neg(s) = exp(scale (s - margin)), sigma = log, tau(x) = [x]_+.

    Source:
        Oh Song et al. 2016, arXiv 1511.06452; Hermans et al. 2017, arXiv 1703.07737, equation 8.

    Examples:
        >>> loss = lifted_structure(margin=0.0).clean(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1]))
        >>> round(loss.item(), 4)  # anchors cost [-1 + 1]_+ twice, and 1 + log 2
        0.5644
    """
    return PairLoss(
        "lifted_structure",
        lambda s: -scale * s,
        lambda s: scale * (s - margin),
        outer=torch.relu,
        exponential=True,
        streaming=partial(_streaming_lifted, margin, scale),
    )


PAIR_LOSSES: dict[str, Callable[[], PairLoss]] = {
    "contrastive": contrastive,
    "euclidean-contrastive": euclidean_contrastive,
    "multi-similarity": multi_similarity,
    "proxy-anchor": proxy_anchor,
    "nca": nca,
    "lifted-structure": lifted_structure,
}
"""The pair losses by name, each with its defaults."""


def find_pair_loss(loss: str | PairLoss) -> PairLoss:
    """A pair loss from its name, with its defaults; or the one given.

    Raises:
        InputError: for an unknown name.

    Examples:
        >>> find_pair_loss("multi-similarity").name
        'multi_similarity'
    """
    if isinstance(loss, PairLoss):
        return loss
    if loss not in PAIR_LOSSES:
        raise InputError(
            f"loss must be a PairLoss or one of {', '.join(PAIR_LOSSES)}, got {loss!r}{suggest_names(loss, PAIR_LOSSES)}"
        )
    return PAIR_LOSSES[loss]()


def _distance(similarity: Tensor) -> Tensor:
    squared = (2 - 2 * similarity).clamp(min=0)
    apart = squared > 0
    return torch.where(apart, squared.masked_fill(~apart, 1.0).sqrt(), 0.0)


def _given(proxies: Tensor | None) -> Tensor:
    assert proxies is not None
    return proxies


def _streaming_nca(temperature: float, rows: Tensor, labels: Tensor, proxies: Tensor | None) -> Tensor:
    numbers = torch.arange(len(_given(proxies)), device=labels.device)
    scale = 1 / temperature
    # Proxies are the same on every process: there is nothing to gather.
    own, others = label_logsumexps(
        rows,
        labels,
        proxies,
        numbers,
        positive_scale=scale,
        negative_scale=scale,
        across_processes=False,
    )
    return reduced(_present(others) - _present(own), None, "mean", is_distributed())


def _streaming_lifted(
    margin: float, scale: float, rows: Tensor, labels: Tensor, proxies: Tensor | None
) -> Tensor:
    positives, negatives = label_logsumexps(rows, labels, positive_scale=-scale, negative_scale=scale)
    loss = (_present(positives) + _present(negatives - scale * margin)).relu()
    return reduced(loss, None, "mean", is_distributed())


def _present(logs: Tensor) -> Tensor:
    """0 where there is nothing to sum."""
    return torch.where(logs > -math.inf, logs.masked_fill(logs == -math.inf, 0.0), 0.0)
