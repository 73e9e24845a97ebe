"""How far two rankers agree on what comes first, whatever their scores look like.

Every function takes two tensors of the same kind: float scores (rows, items), which are ranked with ties broken by item number; or
whole numbers (rows, positions), lists that are ranked already, best first.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops import accumulation_dtype, top_items


def agreement_at_k(
    first: Float[Tensor, "rows items"] | Int[Tensor, "rows positions"],
    second: Float[Tensor, "rows items"] | Int[Tensor, "rows others"],
    k: int,
    ignore: Bool[Tensor, "#rows items"] | None = None,
) -> float:
    """Share of the first k that two rankings have in common, in any order, averaged over rows.

    |top k of one and of the other| / k. Of two random rankings of n items it is k / n.

    Args:
        first, second: scores, or lists of item numbers without repeats.
        k: how far down to look, >= 1. A list with fewer positions counts as if what is missing were wrong.
        ignore: items that no ranking may hold, for scores: padding, what a user has seen. The same for both.

    Returns:
        A value in [0, 1]; NaN for no rows.

    Raises:
        ValueError: if the two do not fit together, or a row of scores has fewer than k items to rank.

    Cost:
        Sorting the scores, and O(rows * k^2).

    Source:
        Yue et al. 2021, arXiv 2109.01165, section 5.1.

    Examples:
        >>> agreement_at_k(torch.tensor([[4, 2, 9]]), torch.tensor([[2, 7, 4]]), k=2)
        0.5
    """
    first, second = _lists(first, second, k, ignore)
    shared = (first[:, :, None] == second[:, None, :]).any(2).sum(1)
    return float(shared.to(accumulation_dtype(shared.device)).mean() / k)


def exact_match_at_k(
    first: Float[Tensor, "rows items"] | Int[Tensor, "rows positions"],
    second: Float[Tensor, "rows items"] | Int[Tensor, "rows others"],
    k: int,
    ignore: Bool[Tensor, "#rows items"] | None = None,
) -> float:
    """Share of the first k positions at which two rankings hold the same item, averaged over rows.

    Args:
        first, second, k, ignore: as for `agreement_at_k`.

    Returns:
        A value in [0, 1], never above `agreement_at_k`; NaN for no rows.

    Raises:
        ValueError: as for `agreement_at_k`.

    Examples:
        >>> exact_match_at_k(torch.tensor([[4, 2, 9]]), torch.tensor([[4, 9, 2]]), k=3) == 1 / 3
        True
    """
    first, second = _lists(first, second, k, ignore)
    depth = min(first.shape[1], second.shape[1])
    same = (first[:, :depth] == second[:, :depth]).sum(1)
    return float(same.to(accumulation_dtype(same.device)).mean() / k)


def rank_biased_overlap(
    first: Float[Tensor, "rows items"] | Int[Tensor, "rows positions"],
    second: Float[Tensor, "rows items"] | Int[Tensor, "rows others"],
    k: int,
    *,
    persistence: float = 0.9,
    ignore: Bool[Tensor, "#rows items"] | None = None,
) -> float:
    """Agreement of two rankings in which early positions count more, averaged over rows.

    With A_d the agreement at depth d and p the persistence (the chance that a reader goes on to the next position),

        (1 - p) * sum over d = 1 .. k of p^(d - 1) A_d + p^k A_k

    the last term for the unseen rest, as if it agreed as far as the seen part did.

    Args:
        first, second, ignore: as for `agreement_at_k`; lists must have k positions.
        k: how far down to look, >= 1.
        persistence: p, in (0, 1); about 1 / (1 - p) positions count.

    Returns:
        A value in [0, 1], 1 for equal rankings; NaN for no rows.

    Raises:
        ValueError: for a persistence out of range, lists shorter than k, and as for `agreement_at_k`.

    Source:
        Webber, Moffat, Zobel 2010, A similarity measure for indefinite rankings, equation 32.

    Examples:
        >>> one, other = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
        >>> round(rank_biased_overlap(one, other, k=2, persistence=0.5), 4)  # 0.5 * (0 + 0.5) + 0.25
        0.5
    """
    if not 0 < persistence < 1:
        raise ValueError(f"persistence must be in (0, 1), got {persistence}")
    first, second = _lists(first, second, k, ignore)
    for ranking in (first, second):
        if ranking.shape[1] < k:
            raise ValueError(f"lists must have at least {k} positions, got {ranking.shape[1]}")
    wide = accumulation_dtype(first.device)
    # Position by position: an item counts from the depth at which both lists have shown it.
    same = first[:, :, None] == second[:, None, :]
    place = torch.arange(k, device=first.device)
    shown = torch.maximum(place[:, None], place[None, :])
    overlap = torch.stack([(same & (shown <= depth)).sum((1, 2)) for depth in range(k)], dim=1)
    agreement = overlap.to(wide) / (place + 1)
    weights = (1 - persistence) * persistence ** place.to(wide)
    found = (agreement * weights).sum(1) + persistence**k * agreement[:, -1]
    return float(found.mean())


def _lists(first: Tensor, second: Tensor, k: int, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both rankings as lists of at most k positions."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if first.is_floating_point() != second.is_floating_point():
        raise ValueError("first and second must both be scores or both be lists, got one of each")
    if len(first) != len(second):
        raise ValueError(f"first and second must have as many rows, got {len(first)} and {len(second)}")
    if first.is_floating_point():
        if first.shape != second.shape:
            raise ValueError(
                f"scores must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        return top_items(first, k, ignore), top_items(second, k, ignore)
    if ignore is not None:
        raise ValueError("ignore belongs to scores, got lists")
    for ranking in (first, second):
        ordered = ranking[:, :k].sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("lists must hold each item once, got one twice in a row")
    return first[:, :k], second[:, :k]
