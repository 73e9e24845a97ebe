"""Drawing several different items of each row at random, the likelier the higher they score."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import full_precision


@torch.no_grad()
def sample_without_replacement(
    logits: Float[Tensor, "*batch items"], n: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, "*batch n"]:
    r"""Different items of each row, drawn one after the other by the softmax of those that are left.

    The first is $j$ with probability $e^{z_j} / \sum_i e^{z_i}$, the next one likewise without $j$, and so on. All are found at once as
    the n largest of $z_j + g_j$ with independent $g_j$ from the standard Gumbel distribution.

    Args:
        logits: $z$, finite or $-\infty$ for items that may not be drawn; divide them by a temperature to draw more (or less) evenly.
        n: items to draw, in [0, number of items that may be drawn in every row].
        generator: of the draw.

    Returns:
        int64 positions in the row, in the order in which they are drawn.

    Raises:
        ValueError: if a row has fewer than n items to draw, or a logit is NaN or $+\infty$.

    Cost:
        O(items) random numbers, and the n largest of them.

    Source:
        Kool, van Hoof, Welling 2019, arXiv 1903.06059.

    Examples:
        >>> logits = torch.tensor([[0.0, 5.0, -torch.inf, 0.0]])
        >>> sample_without_replacement(logits, 3).sort().values
        tensor([[0, 1, 3]])
    """
    logits = full_precision(logits)
    if bool(logits.isnan().any() | (logits == math.inf).any()):
        raise ValueError("logits must be finite or -infinity, got NaN or +infinity")
    left_out = logits == -math.inf
    fewest = int((~left_out).sum(-1).min()) if left_out.numel() else logits.shape[-1]
    if not 0 <= n <= fewest:
        raise ValueError(f"n must be in [0, {fewest}], the fewest items that a row can draw, got {n}")
    device = logits.device if generator is None else generator.device
    waiting = torch.empty(logits.shape, dtype=logits.dtype, device=device).exponential_(generator=generator)
    keys = logits - waiting.to(logits.device).log()
    return keys.masked_fill(left_out, -math.inf).topk(n, dim=-1).indices
