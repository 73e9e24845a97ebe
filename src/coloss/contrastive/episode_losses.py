"""Losses of few-shot episodes beside the prototypical one: triplets with prototypes, and the score of neighbourhoods.

Reconstructed: see `coloss.contrastive.episodic_training`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.metrics import icnn_score
from coloss.ops import prototypical_logits
from coloss.ops.class_prototypes import PrototypeMetric

Mining = Literal["all", "hardest"]
Anchor = Literal["query", "prototype"]


def proto_triplet_loss(
    queries: Float[Tensor, "queries dim"],
    labels: Int[Tensor, " queries"],
    prototypes: Float[Tensor, "classes dim"],
    margin: float = 1.0,
    *,
    mining: Mining = "all",
    anchor: Anchor = "query",
    metric: PrototypeMetric = "sqeuclidean",
) -> Float[Tensor, ""]:
    r"""Hinge on triplets with prototypes, so that single examples do not decide alone.

    With a query as anchor: mean over queries $x$ of $\frac{1}{N - 1} \sum_{k \ne y} [d(x, c_y) - d(x, c_k) + m]_+$. With a prototype as
    anchor: mean over queries $p$, and queries $n$ of other classes, of $[d(c_y, p) - d(c_y, n) + m]_+$.

    Args:
        queries: embeddings.
        labels: class of each, in [0, classes).
        prototypes: one row for each class; they get a gradient too.
        margin: $m$, finite: about 1 for squared distances, 0.2 for cosines.
        mining: `"all"` others as above, or for each the `"hardest"` alone, the nearest. A mean over all lets the hardest count less, the more
            classes there are.
        anchor: see above.
        metric: $d$: `"sqeuclidean"`, or `"cosine"` for one minus the cosine.

    Returns:
        A scalar, at least float32; 0 where there are no two classes, or no queries.

    Raises:
        ValueError: if shapes disagree, a label is out of range, or an option is.

    Cost:
        O(queries * classes * dim); with a prototype as anchor a queries x queries matrix.

    Source:
        Our reading of Mendez-Ruiz et al. 2023, arXiv 2305.09062.

    Examples:
        >>> queries, centres = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> proto_triplet_loss(queries, torch.tensor([0, 1]), centres)  # [0 - 4 + 1]_+ and [1 - 1 + 1]_+
        tensor(0.5000)
    """
    costs, counted = _triplet_costs(queries, labels, prototypes, margin, mining, anchor, metric)
    return (costs * counted).sum() / counted.sum().clamp(min=1)


class ProtoTripletLoss(nn.Module):
    """Hinge on triplets with prototypes, as a module.

    Args:
        margin, mining, anchor, metric: as for `proto_triplet_loss`.

    Attributes:
        active: share of the triplets of the last call that cost something; a loss with none has no gradient.

    Returns:
        From `forward(queries, labels, prototypes)`: a scalar.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> loss = ProtoTripletLoss(mining="hardest")
        >>> queries, centres = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> loss(queries, torch.tensor([0, 1]), centres), loss.active
        (tensor(0.5000), 0.5)
    """

    batch_statistic = True

    def __init__(
        self,
        margin: float = 1.0,
        mining: Mining = "all",
        anchor: Anchor = "query",
        *,
        metric: PrototypeMetric = "sqeuclidean",
    ) -> None:
        super().__init__()
        _check_options(margin, mining, anchor)
        self.margin, self.mining, self.anchor, self.metric = margin, mining, anchor, metric
        self.active = math.nan

    def forward(
        self,
        queries: Float[Tensor, "queries dim"],
        labels: Int[Tensor, " queries"],
        prototypes: Float[Tensor, "classes dim"],
    ) -> Float[Tensor, ""]:
        costs, counted = _triplet_costs(
            queries, labels, prototypes, self.margin, self.mining, self.anchor, self.metric
        )
        total = counted.sum().clamp(min=1)
        self.active = float(((costs > 0) & counted).sum() / total)
        return (costs * counted).sum() / total

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining!r}, anchor={self.anchor!r}"


class ICNNLoss(nn.Module):
    """Minus the logarithm of the ICNN score of an episode's embeddings, or one minus the score.

    The score does not change with the scale of the embeddings, so this loss keeps them neither from growing nor from shrinking: use it
    beside another. Where no sample has a neighbour of its class the hard form has no gradient.

    Args:
        k: neighbours; None: size of the smallest class less one. See `coloss.metrics.icnn_score`.
        soft: weigh all others by distance (ours), so that purity trains too; False takes the k nearest.
        exponents: of the three factors.
        form: `"log"` for -log(score + 1e-6), or `"complement"` for 1 - score.

    Returns:
        From `forward(embeddings, labels)`: a scalar, at least float32.

    Raises:
        ValueError: for an unknown form; at a call, as `icnn_score`.

    Source:
        Our reading of Mendez-Ruiz et al. 2023, arXiv 2305.09062.

    Examples:
        >>> embeddings = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> loss = ICNNLoss(soft=False, form="complement")
        >>> loss(embeddings, torch.tensor([0, 0, 1, 1])), loss(embeddings, torch.tensor([0, 1, 0, 1]))
        (tensor(0.), tensor(1.))
    """

    batch_statistic = True

    def __init__(
        self,
        k: int | None = None,
        *,
        soft: bool = True,
        exponents: Sequence[float] = (2.0, 2.0, 2.0),
        form: Literal["log", "complement"] = "log",
    ) -> None:
        super().__init__()
        if form not in ("log", "complement"):
            raise ValueError(f'form must be "log" or "complement", got {form!r}')
        if k is not None and k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        self.k, self.soft, self.exponents, self.form = k, soft, tuple(exponents), form

    def forward(
        self, embeddings: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"]
    ) -> Float[Tensor, ""]:
        score = icnn_score(embeddings, labels, self.k, exponents=self.exponents, soft=self.soft)
        # A score of 0 is an ordinary value at the start, not a rounding error: the offset is part of the loss.
        return 1 - score if self.form == "complement" else -torch.log(score + 1e-6)


def _check_options(margin: float, mining: str, anchor: str) -> None:
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if mining not in ("all", "hardest"):
        raise ValueError(f'mining must be "all" or "hardest", got {mining!r}')
    if anchor not in ("query", "prototype"):
        raise ValueError(f'anchor must be "query" or "prototype", got {anchor!r}')


def _triplet_costs(
    queries: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    margin: float,
    mining: str,
    anchor: str,
    metric: PrototypeMetric,
) -> tuple[Tensor, Tensor]:
    """Cost of each triplet, and which of them count: (queries, others), or (queries, 1) for the hardest alone."""
    _check_options(margin, mining, anchor)
    if labels.shape != queries.shape[:1]:
        raise ValueError(f"labels must have shape ({len(queries)},), got {tuple(labels.shape)}")
    classes = len(prototypes)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    distances = -prototypical_logits(queries, prototypes, metric)
    own = distances.gather(1, labels.unsqueeze(1))
    if anchor == "query":
        others = distances
        counted = labels.unsqueeze(1) != torch.arange(classes, device=labels.device)
    else:
        others = distances[:, labels].T
        counted = labels.unsqueeze(1) != labels
    costs = (own - others + margin).relu()
    if mining == "hardest":
        if not others.shape[1]:
            return costs, counted
        nearest = others.masked_fill(~counted, math.inf).argmin(1, keepdim=True)
        return costs.gather(1, nearest), counted.gather(1, nearest)
    return costs, counted


for _loss in (proto_triplet_loss,):
    _loss.batch_statistic = True  # type: ignore[attr-defined]
