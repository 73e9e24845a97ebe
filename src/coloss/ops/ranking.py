"""Ranked lists from scores, the same on every machine: ties are broken by item number."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_items(
    scores: Float[Tensor, "rows items"], k: int, ignore: Bool[Tensor, "#rows items"] | None = None
) -> Int[Tensor, "rows k"]:
    """Numbers of the k highest scores of each row, best first; of equal scores the lower number comes first.

    `torch.topk` leaves the order of ties to the machine; lists that are compared with each other must not depend on it.

    Args:
        scores: higher is better; minus infinity ranks last, but does rank.
        k: length of the lists, >= 1.
        ignore: True for items that may not be listed.

    Returns:
        int64 column numbers.

    Raises:
        ValueError: if a row has fewer than k items to list, or a score that counts is NaN.

    Cost:
        O(rows * items * log items) time.

    Examples:
        >>> top_items(torch.tensor([[0.1, 0.9, 0.9, 0.5]]), 3)
        tensor([[1, 2, 3]])
        >>> top_items(torch.tensor([[0.1, 0.9, 0.9, 0.5]]), 2, torch.tensor([[False, True, False, False]]))
        tensor([[2, 3]])
    """
    keep = torch.ones_like(scores[:1], dtype=torch.bool) if ignore is None else ~ignore
    fewest = int(keep.sum(1).min()) if scores.numel() else scores.shape[1]
    if not 1 <= k <= fewest:
        raise ValueError(f"k must be in [1, {fewest}], the fewest items that a row can list, got {k}")
    if bool((scores.isnan() & keep).any()):
        raise ValueError("scores must not be NaN; mark items without a score in ignore")
    if ignore is None:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    falling = scores.masked_fill(ignore, -math.inf)
    order = falling.argsort(dim=1, descending=True, stable=True)
    if bool(((falling > -math.inf).sum(1) >= k).all()):
        return order[:, :k]
    # Ignored items go behind all others, also behind scores of minus infinity.
    behind = ignore.expand_as(order).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True)
    return order.gather(1, behind[:, :k])
