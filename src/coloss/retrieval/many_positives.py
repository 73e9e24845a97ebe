"""Losses for queries with several right answers: positives that do not compete, and a soft choice of the k best."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coloss.ops import (
    full_precision,
    is_distributed,
    log_soft_topk,
    masked_logsumexp,
    soft_contrastive_loss,
    without_autocast,
)
from coloss.ops.distributed import row_counts

# Scores held at once where the labels are many.
_SCORES_AT_ONCE = 2**22


def decoupled_score_loss(
    scores: Float[Tensor, "queries labels"],
    relevance: Shaped[Tensor, "queries labels"],
    temperature: float = 1.0,
    *,
    ignore: Bool[Tensor, "queries labels"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "*losses"]:
    r"""Decoupled softmax on scores that exist already: logits of a multi-label classifier, of a cross-encoder.

    `coloss.ops.decoupled_softmax_loss` says what it is, and does it for embeddings without ever making the scores.

    Args:
        scores: s, not divided by the temperature.
        relevance: weight of each positive, such as a grade; relevant where > 0.
        temperature: tau > 0.
        ignore: pairs that are neither positive nor negative.
        reduction: `"mean"` over queries with a positive, or `"none"`: one value each, 0 without a positive.

    Returns:
        A scalar (0 if there is no positive) or (queries,), at least float32: weighted means over the positives of a query.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        O(queries * labels) time and memory.

    Source:
        Gupta et al. 2024 (DEXML), arXiv 2310.10636, equation 5.

    Examples:
        >>> scores = torch.tensor([[3.0, 0.0, 0.0, -1.0, -1.0, -1.0]])
        >>> relevance = torch.tensor([[1, 1, 1, 0, 0, 0]])
        >>> round(decoupled_score_loss(scores, relevance).item(), 4)
        0.5136
    """
    _check(temperature)
    for name, mask in (("relevance", relevance), ("ignore", ignore)):
        if mask is not None and mask.shape != scores.shape:
            raise ValueError(
                f"{name} must have the shape of scores {tuple(scores.shape)}, got {tuple(mask.shape)}"
            )
    logits = full_precision(scores) / temperature
    positive = relevance > 0
    if ignore is not None:
        positive = positive & ~ignore
    negative = ~positive if ignore is None else ~positive & ~ignore
    # Positives' costs against the negatives of their query, and 0 in place of what does not count.
    costs = F.softplus(masked_logsumexp(logits, negative).unsqueeze(1) - logits.masked_fill(~positive, 0.0))
    weight = relevance.to(logits.dtype) * positive
    mass = weight.sum(1)
    losses = (torch.where(positive, costs, 0.0) * weight).sum(1) / mass.masked_fill(mass == 0, 1.0)
    return losses if reduction == "none" else losses.sum() / (mass > 0).sum().clamp(min=1)


def multi_positive_softmax_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    positives: Int[Tensor, "2 positives"],
    temperature: float | Float[Tensor, ""] = 0.05,
    *,
    across_processes: bool = True,
) -> Float[Tensor, " queries"]:
    r"""Cost of each query's softmax over all keys, averaged over its positives: the common baseline, in which positives compete.

    $-\frac{1}{|P|}\sum_{l \in P} [s_l/\tau - \log\sum_j e^{s_j/\tau}]$. A positive whose share of the softmax exceeds $1/|P|$ is pushed down.

    Args:
        queries, keys, temperature, across_processes: as for `coloss.ops.decoupled_softmax_loss`.
        positives: query and key number of each positive pair.

    Returns:
        One value for each query; 0 where there is no positive.

    Examples:
        >>> keys = torch.tensor([[3.0], [0.0], [0.0], [-1.0], [-1.0], [-1.0]])
        >>> positives = torch.tensor([[0, 0, 0], [0, 1, 2]])
        >>> round(multi_positive_softmax_loss(torch.ones(1, 1), keys, positives, 1.0).item(), 4)
        2.1437
    """
    rows = positives[0]
    share = 1 / torch.bincount(rows, minlength=len(queries)).clamp(min=1).to(torch.float32)
    columns = sum(row_counts(keys)) if across_processes and is_distributed() else len(keys)
    targets = torch.sparse_coo_tensor(positives, share[rows], (len(queries), columns), check_invariants=False)
    return soft_contrastive_loss(
        queries, keys, targets, temperature, reduction="none", across_processes=across_processes
    )


def soft_topk_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    positives: Int[Tensor, "2 positives"],
    k: float | Shaped[Tensor, " queries"] = 5,
    temperature: float = 0.05,
    *,
    alpha: float = 2.0,
    ignore: Int[Tensor, "2 ignored"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " queries"]:
    r"""Cost of positives that are not among the k best of their query: $-\frac{1}{|P|}\sum_{l \in P} \log \text{softtop-}k(s/\tau)_l$.

    The loss for precision at k: beyond the k best places nothing counts.

    Args:
        queries, keys: embeddings.
        positives: query and key number of each positive pair.
        k: in (0, keys that count); one number, or one for each query.
        temperature: tau > 0 of the scores.
        alpha: steepness of the choice, see `coloss.ops.soft_topk`.
        ignore: pairs that are out, such as positives that were not drawn.
        chunk_size: queries whose scores are held at once, >= 1; by default as many as make four million scores.

    Returns:
        One value for each query, at least float32; 0 where there is no positive.

    Raises:
        ValueError: for values out of range.

    Cost:
        O(queries * keys * (dim + 10)) time, twice that backward; O(chunk_size * keys) memory. Chunks are made again for the backward pass.
        Nothing is exchanged between processes: the keys must be the same on all of them.

    Source:
        Gupta et al. 2024 (DEXML), arXiv 2310.10636, section 4.

    Examples:
        >>> keys = torch.tensor([[3.0], [2.0], [0.0], [-1.0]])
        >>> first, last = torch.tensor([[0], [0]]), torch.tensor([[0], [3]])
        >>> losses = [soft_topk_loss(torch.ones(1, 1), keys, pairs, 2, 1.0) for pairs in (first, last)]
        >>> [round(loss.item(), 2) for loss in losses]
        [0.02, 4.02]
    """
    _check(temperature)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    x, y = full_precision(queries) / temperature, full_precision(keys)
    size = chunk_size or max(1, _SCORES_AT_ONCE // max(len(y), 1))
    counts = torch.as_tensor(k, dtype=x.dtype, device=x.device).expand(len(x))

    def costs(rows: Tensor, every: Tensor, start: int) -> Tensor:
        with without_autocast(rows.device):
            scores = rows @ every.T
        own = _within(positives, start, start + len(rows))
        if ignore is not None:
            left_out = _within(ignore, start, start + len(rows))
            scores = scores.index_put(
                (left_out[0], left_out[1]), torch.tensor(-math.inf, dtype=scores.dtype, device=scores.device)
            )
        found = log_soft_topk(scores, counts[start : start + len(rows)], alpha)[own[0], own[1]]
        total = rows.new_zeros(len(rows)).index_add(0, own[0], -found)
        return total / torch.bincount(own[0], minlength=len(rows)).clamp(min=1)

    starts = range(0, len(x), size)
    if len(starts) <= 1:
        return costs(x, y, 0) if len(x) else x.new_zeros(0)
    parts = [
        checkpoint(costs, x[start : start + size], y, start, use_reentrant=False, preserve_rng_state=False)
        for start in starts
    ]
    return torch.cat(parts)


def draw_positives(
    positives: Int[Tensor, "2 positives"],
    count: int,
    weight: Float[Tensor, " positives"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, " positives"]:
    """Which positive pairs to keep: at most `count` of each query, drawn without replacement in proportion to their weight.

    Args:
        positives: query and key number of each.
        count: >= 1.
        weight: > 0, such as relevance; None for all alike.
        generator: of the draw.

    Returns:
        True for pairs that were drawn. The others of a query are positives all the same: leave them out, do not take them for negatives.

    Raises:
        ValueError: if count < 1.

    Examples:
        >>> pairs = torch.tensor([[0, 0, 0, 1], [4, 5, 6, 4]])
        >>> kept = draw_positives(pairs, 1, generator=torch.Generator().manual_seed(0))
        >>> pairs[0, kept].tolist()
        [0, 1]
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    device = generator.device if generator is not None else positives.device
    noise = torch.rand(positives.shape[1], generator=generator, device=device).to(positives.device)
    # Exponential waiting times at rates w: the first to ring are a draw without replacement in proportion to w.
    times = -torch.log1p(-noise.double()) / (1.0 if weight is None else weight.double())
    order = times.argsort(stable=True)
    order = order[positives[0, order].argsort(stable=True)]
    rows = positives[0, order]
    first = torch.searchsorted(rows, rows)  # where each query's run begins
    kept = torch.zeros(positives.shape[1], dtype=torch.bool, device=positives.device)
    kept[order] = torch.arange(len(rows), device=rows.device) - first < count
    return kept


def _within(pairs: Tensor, start: int, stop: int) -> Tensor:
    inside = pairs[:, (pairs[0] >= start) & (pairs[0] < stop)]
    return torch.stack([inside[0] - start, inside[1]])


def _check(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
