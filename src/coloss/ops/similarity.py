"""Losses on scores between queries and candidates, in memory that does not grow with the pairs."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .gradients import first_order_only, needs_gradient
from .precision import accumulation_dtype, full_precision, without_autocast

# Pairs held at once by default: a block of a processor's cache, or enough to fill an accelerator.
_PAIRS_ON_CPU = 2**18
_PAIRS_ON_ACCELERATOR = 2**24


def pairwise_logistic_loss(
    positive: Float[Tensor, " positives"],
    negative: Float[Tensor, " negatives"],
    temperature: float,
    chunk_size: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    r"""Logistic cost of every positive score against every negative score, a smooth bound on 1 - AUC.

    $\frac{1}{PN} \sum_{p, n} \log(1 + e^{-(s_p - s_n)/\tau})$. Divided by $\log 2$ it is never below the
    share of wrongly ordered pairs. A constant added to all scores changes nothing. The gradients of one call
    sum to 0.

    Args:
        positive: $s_p$, scores that should be high.
        negative: $s_n$, scores that should be low; $-\infty$ leaves a score out of the sum, not of the mean.
        temperature: $\tau > 0$.
        chunk_size: pairs held at once, >= 1; by default chosen for the device.
        reduction: `"mean"` over pairs or `"sum"`.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, when either pool is empty. It can be
        differentiated once.

    Raises:
        ValueError: on a temperature not above 0, `chunk_size` below 1, or an unknown reduction.

    Cost:
        $O(PN)$ time, $O(P + N + \text{chunk})$ memory; the gradient is formed in the same pass. A loop over
        blocks of pairs; sums are accumulated in float64.

    Source:
        arXiv 2510.00137, 2025 (Mann-Whitney loss); Burges et al. 2005 (RankNet) for one pair.

    Examples:
        >>> pairwise_logistic_loss(torch.zeros(3), torch.zeros(5), temperature=0.1)  # log 2
        tensor(0.6931)
    """
    _check_temperature(temperature)
    _check_chunk_size(chunk_size)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    pairs = chunk_size or _default_pairs(positive.device)
    total = _PairwiseLogistic.apply(
        full_precision(positive),
        full_precision(negative),
        temperature,
        pairs,
        needs_gradient(positive, negative),
    )
    return total / max(positive.numel() * negative.numel(), 1) if reduction == "mean" else total


def info_nce_loss(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    temperature: float = 0.07,
    *,
    symmetric: bool = False,
    ignore: Bool[Tensor, "queries keys"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    r"""Softmax cost of finding each query's own key among all keys.

    $\frac1B \sum_i [\log \sum_j e^{s_{ij}/\tau} - s_{ii}/\tau]$ with $s_{ij}$ the inner product of query $i$
    and key $j$. Key $i$ is the positive of query $i$; keys beyond the number of queries are further
    negatives. Give unit vectors for cosine similarity. For a learned temperature multiply the queries by its
    inverse and pass 1.0.

    Args:
        queries: $B$ embeddings.
        keys: at least $B$ embeddings.
        temperature: $\tau > 0$.
        symmetric: average with the loss of finding each of the first $B$ keys' query among all queries.
        ignore: True where a pair is neither positive nor negative, see `duplicate_mask`; positives are always
        kept.
        chunk_size: queries compared at once, >= 1; by default chosen for the device.

    Returns:
        A scalar, at least float32; 0 for no queries. It can be differentiated once.

    Raises:
        ValueError: if there are fewer keys than queries, widths differ, `ignore` has another shape, or
        `temperature` or
            `chunk_size` is out of range.

    Cost:
        $O(B M D)$ time; memory of the embeddings plus chunk x keys: scores are made again in the backward
        pass. A loop over chunks of queries.

    Source:
        van den Oord, Li, Vinyals 2018, arXiv 1807.03748.

    Examples:
        >>> embeddings = torch.eye(4)
        >>> round(info_nce_loss(embeddings, embeddings, temperature=1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
    """
    _check_temperature(temperature)
    _check_chunk_size(chunk_size)
    if keys.shape[0] < queries.shape[0] or keys.shape[1] != queries.shape[1]:
        rows, width = queries.shape
        raise ValueError(f"keys must have at least {rows} rows of width {width}, got {tuple(keys.shape)}")
    if ignore is not None and ignore.shape != (queries.shape[0], keys.shape[0]):
        raise ValueError(
            f"ignore must have shape {(queries.shape[0], keys.shape[0])}, got {tuple(ignore.shape)}"
        )
    rows = chunk_size or max(1, _default_pairs(queries.device) // max(keys.shape[0], 1))
    first, second = full_precision(queries), full_precision(keys)
    if first.dtype != second.dtype:
        first, second = first.double(), second.double()
    return _InfoNCE.apply(first, second, temperature, symmetric, ignore, rows)


def masked_logsumexp(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*#shape"], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Log of the sum of exponentials over the entries that a mask keeps, safe where it keeps none.

    $\log \sum_{j : m_j} e^{x_j}$. With nothing kept, or only $-\infty$, the result is $-\infty$ and its
    gradient is zero, never NaN.

    Args:
        x: any shape; entries outside the mask may hold any value, NaN included.
        mask: True where an entry counts; broadcast against `x`.
        dim: dimension to reduce.

    Returns:
        `x` without `dim`, at least float32.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0, 9.0], [1.0, 2.0, 3.0]])
        >>> masked_logsumexp(x, torch.tensor([[True, True, False], [False, False, False]]))
        tensor([0.6931,   -inf])
    """
    kept = full_precision(x).masked_fill(~mask, -math.inf)
    empty = (kept == -math.inf).all(dim, keepdim=True)
    result = torch.logsumexp(kept.masked_fill(empty, 0.0), dim)
    return result.masked_fill(empty.squeeze(dim), -math.inf)


def relevance_from_ids(
    query_ids: Shaped[Tensor, " queries"], document_ids: Shaped[Tensor, " documents"]
) -> Bool[Tensor, "queries documents"]:
    """Which documents answer which queries: those that carry the same id.

    Args:
        query_ids: id of the document, class or identity that each query looks for.
        document_ids: id of each document.

    Returns:
        True where the two ids are equal.

    Examples:
        >>> relevance_from_ids(torch.tensor([7, 8]), torch.tensor([7, 8, 7])).int()
        tensor([[1, 0, 1],
                [0, 1, 0]], dtype=torch.int32)
    """
    return query_ids.unsqueeze(1) == document_ids.unsqueeze(0)


def duplicate_mask(ids: Shaped[Tensor, " items"]) -> Bool[Tensor, "items items"]:
    """For each item, the other items that hold the same id: false negatives to leave out of a batch.

    Its first $B$ rows are the `ignore` of `info_nce_loss` when `ids` are those of the keys.

    Args:
        ids: id of each item.

    Returns:
        True where ids are equal and the items are not the same; the diagonal is False.

    Examples:
        >>> duplicate_mask(torch.tensor([7, 8, 7])).int()
        tensor([[0, 0, 1],
                [0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    return relevance_from_ids(ids, ids).fill_diagonal_(False)


class _PairwiseLogistic(torch.autograd.Function):
    """Sum of softplus(-(p - n) / temperature) over all pairs, its gradients made in the same walk."""

    @staticmethod
    def forward(
        ctx: Any, positive: Tensor, negative: Tensor, temperature: float, pairs: int, with_gradient: bool
    ) -> Tensor:
        wide = accumulation_dtype(positive.device)
        total = torch.zeros((), dtype=wide, device=positive.device)
        pull = torch.zeros_like(positive, dtype=wide)  # sum over negatives of sigmoid(-(p - n) / temperature)
        push = torch.zeros_like(negative, dtype=wide)
        columns = min(max(negative.numel(), 1), pairs)
        rows = max(1, pairs // columns)
        for p, pull_part in zip(positive.split(rows), pull.split(rows)):
            for n, push_part in zip(negative.split(columns), push.split(columns)):
                margin = (n.unsqueeze(0) - p.unsqueeze(1)) / temperature
                total += F.softplus(margin).sum()
                if with_gradient:
                    wrong = margin.sigmoid_()
                    pull_part += wrong.sum(1)
                    push_part += wrong.sum(0)
        if with_gradient:
            ctx.save_for_backward(
                (pull / -temperature).to(positive.dtype), (push / temperature).to(negative.dtype)
            )
        return total.to(torch.promote_types(positive.dtype, negative.dtype))

    @staticmethod
    @first_order_only("pairwise_logistic_loss")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        pull, push = ctx.saved_tensors
        return gradient * pull, gradient * push, None, None, None


class _InfoNCE(torch.autograd.Function):
    """Saves embeddings and one log-sum-exp for each row (and column); scores live for one chunk of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        temperature: float,
        symmetric: bool,
        ignore: Tensor | None,
        rows: int,
    ) -> Tensor:
        count = queries.shape[0]
        ctx.settings = temperature, symmetric, rows
        row_lse, own = queries.new_empty(count), queries.new_empty(count)
        column_lse = queries.new_full((count,), -math.inf) if symmetric else None
        for start in range(0, count, rows):
            scores = _chunk_scores(queries, keys, temperature, ignore, start, rows)
            stop = start + scores.shape[0]
            own[start:stop] = scores.diagonal(start)
            row_lse[start:stop] = torch.logsumexp(scores, 1)
            if column_lse is not None:
                column_lse = torch.logaddexp(column_lse, torch.logsumexp(scores[:, :count], 0))
        ctx.save_for_backward(queries, keys, ignore, row_lse, column_lse)
        loss = row_lse - own
        if column_lse is not None:
            loss = (loss + column_lse - own) / 2
        return loss.sum() / max(count, 1)

    @staticmethod
    @first_order_only("info_nce_loss")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        queries, keys, ignore, row_lse, column_lse = ctx.saved_tensors
        temperature, symmetric, rows = ctx.settings
        count = queries.shape[0]
        for_queries, for_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for start in range(0, count, rows):
            scores = _chunk_scores(queries, keys, temperature, ignore, start, rows)
            stop = start + scores.shape[0]
            slope = torch.exp(scores - row_lse[start:stop].unsqueeze(1))
            slope.diagonal(start).sub_(1)
            if symmetric:
                from_columns = torch.exp(scores[:, :count] - column_lse)
                from_columns.diagonal(start).sub_(1)
                slope[:, :count].add_(from_columns).div_(2)
                slope[:, count:].div_(2)
            with without_autocast(queries.device):
                for_queries[start:stop] = slope @ keys
                for_keys.addmm_(slope.T, queries[start:stop])
        scale = gradient / (max(count, 1) * temperature)
        return scale * for_queries, scale * for_keys, None, None, None, None


def _chunk_scores(
    queries: Tensor, keys: Tensor, temperature: float, ignore: Tensor | None, start: int, rows: int
) -> Tensor:
    with without_autocast(queries.device):
        scores = queries[start : start + rows] @ keys.T
    scores.div_(temperature)
    if ignore is not None:
        dropped = ignore[start : start + rows].clone()
        dropped.diagonal(start).fill_(False)
        scores.masked_fill_(dropped, -math.inf)
    return scores


def _default_pairs(device: torch.device) -> int:
    return _PAIRS_ON_CPU if device.type == "cpu" else _PAIRS_ON_ACCELERATOR


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
