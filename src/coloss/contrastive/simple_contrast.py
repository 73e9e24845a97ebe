"""Contrast without a temperature: all negatives are pushed alike, the control that shows what weighing them by similarity is worth."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from coloss.ops import hardest_scores, is_distributed, rank
from coloss.ops.loss_arguments import reduced, same_type
from coloss.ops.pair_sums import group_sum


def simple_contrastive_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    *,
    push: float = 1.0,
    hard: int | None = None,
    ids: Shaped[Tensor, " keys"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    across_processes: bool = True,
) -> Float[Tensor, "*losses"]:
    r"""Pulls each query to its own key and pushes it from all others alike, whatever their similarity: the control without a temperature.

    $\frac1B \sum_i [\frac{\lambda}{|N_i|} \sum_{j \in N_i} s_{ij} - s_{ii}]$ with $N_i$ the negatives of query $i$. It is the limit of $\tau$ times
    `coloss.ops.info_nce_loss` for large $\tau$, but for a constant and terms in $1/N$.

    Args:
        queries: $B$ embeddings, unit vectors for cosine similarity; without bounds on their length the loss has no minimum.
        keys: at least $B$ embeddings; key $i$ is the positive of query $i$, keys beyond the number of queries are further negatives.
        push: $\lambda \ge 0$, weight of all negatives together; 1 pulls and pushes alike. The paper weighs each negative: $\lambda / |N_i|$.
        hard: negatives >= 1 that each query keeps, the most similar ones; None keeps all.
        ids: id of each key; query $i$ carries that of key $i$. Other keys with a query's own id are not taken for negatives.
        reduction: over queries: `"mean"`, `"sum"`, or `"none"` for one value each.
        across_processes: compare with the keys of all processes of a run; False keeps to this one's.

    Returns:
        A scalar (0 for no queries) or (queries,), at least float32.

    Raises:
        ValueError: if there are fewer keys than queries, widths differ, ids have another shape, or an option is out of range.

    Cost:
        $O((B + M) D)$ time and memory, as the similarities are never made; with `hard` that of `coloss.ops.hardest_scores`.

    Source:
        Wang and Liu 2021, arXiv 2012.09740, sections 3.3 (simple contrastive loss) and 4 ("HardSimple").

    Examples:
        >>> embeddings = torch.eye(4)
        >>> simple_contrastive_loss(embeddings, embeddings)
        tensor(-1.)
        >>> simple_contrastive_loss(embeddings, torch.ones(4, 4), hard=1)
        tensor(0.)
    """
    if keys.shape[0] < queries.shape[0] or keys.shape[1] != queries.shape[1]:
        rows, width = queries.shape
        raise ValueError(f"keys must have at least {rows} rows of width {width}, got {tuple(keys.shape)}")
    if not 0 <= push < math.inf:
        raise ValueError(f"push must be >= 0 and finite, got {push}")
    if hard is not None and hard < 1:
        raise ValueError(f"hard must be >= 1, got {hard}")
    if ids is not None and ids.shape != keys.shape[:1]:
        raise ValueError(f"ids must have shape ({len(keys)},), got {tuple(ids.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    ring = across_processes and is_distributed()
    x, y = same_type(queries, keys)
    if ids is None:
        ids = torch.arange(len(y), device=y.device) + (rank() << 40)
    own_ids = ids[: len(x)]
    own = (x * y[: len(x)]).sum(1)
    if hard is not None:
        scores = hardest_scores(x, y, hard, ids=(own_ids, ids), across_processes=across_processes)
        kept = scores != -math.inf
        against, count = scores.masked_fill(~kept, 0.0).sum(1), kept.sum(1)
    else:
        extended = torch.cat([y, y.new_ones(len(y), 1)], 1)
        everyone = group_sum(extended, torch.zeros_like(ids), torch.zeros_like(own_ids), ring)
        others = everyone - group_sum(extended, ids, own_ids, ring)
        against, count = (x * others[:, :-1]).sum(1), others[:, -1].round()
    return reduced(push * against / count.clamp(min=1) - own, None, reduction, ring)


simple_contrastive_loss.batch_statistic = True  # type: ignore[attr-defined]
