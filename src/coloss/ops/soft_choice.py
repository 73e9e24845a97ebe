"""A differentiable choice of the k largest scores, with exact gradients."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision

# Every second step of the search halves the bracket, so that steep cases end too; smooth ones end after about ten.
_STEPS = 80


def soft_topk(
    scores: Float[Tensor, "rows columns"], k: float | Shaped[Tensor, " rows"], alpha: float = 1.0
) -> Float[Tensor, "rows columns"]:
    r"""Degrees in (0, 1) to which entries are among the k largest of their row; each row sums to k.

    $\sigma(\alpha(s_j + t))$, with the one shift $t$ of the row for which they sum to $k$. As $\alpha$ grows this becomes the indicator of
    the k largest. A constant added to a row changes nothing.

    Args:
        scores: $s$; entries of $-\infty$ are out of the choice.
        k: in (0, columns) for each row: one number, or one for each row.
        alpha: > 0, steepness in the unit of 1 / scores.

    Returns:
        Same shape, at least float32. It can be differentiated once, by the implicit function theorem: no gradient flows through the
        search for $t$.

    Raises:
        ValueError: if k or alpha is out of range.

    Cost:
        Some ten passes over the scores forward, one backward; the scores are kept.

    Source:
        Gupta et al. 2024 (DEXML), arXiv 2310.10636, section 4; sums of sigmoids with a common shift after Ahle, 2023.

    Examples:
        >>> degrees = soft_topk(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), k=2, alpha=4.0)
        >>> [round(value, 2) for value in degrees[0].tolist()], round(degrees.sum().item(), 4)
        ([1.0, 0.88, 0.12, 0.0], 2.0)
    """
    return _SoftTopK.apply(*_checked(scores, k, alpha), alpha, False)


def log_soft_topk(
    scores: Float[Tensor, "rows columns"], k: float | Shaped[Tensor, " rows"], alpha: float = 1.0
) -> Float[Tensor, "rows columns"]:
    r"""Logarithm of `soft_topk`, exact where that underflows.

    Args:
        scores, k, alpha: as for `soft_topk`.

    Returns:
        Same shape, at least float32, in $(-\infty, 0)$. It can be differentiated once.

    Raises:
        ValueError: if k or alpha is out of range.

    Source:
        Gupta et al. 2024 (DEXML), arXiv 2310.10636.

    Examples:
        >>> log_soft_topk(torch.zeros(1, 4), k=2)  # each is one half
        tensor([[-0.6931, -0.6931, -0.6931, -0.6931]])
    """
    return _SoftTopK.apply(*_checked(scores, k, alpha), alpha, True)


def _checked(scores: Tensor, k: float | Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be > 0 and finite, got {alpha}")
    scores = full_precision(scores)
    counts = torch.as_tensor(k, dtype=scores.dtype, device=scores.device).expand(len(scores))
    if not torch.compiler.is_compiling() and len(scores):
        columns = (scores > float("-inf")).sum(1)
        wrong = ~((counts > 0) & (counts < columns))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"k must be in (0, {int(columns[row])}), the scores of row {row} that count, got {counts[row].item():g}"
            )
    return scores, counts


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, alpha: float, log: bool) -> Tensor:
        shift = _shift(scores, k, alpha)
        ctx.save_for_backward(scores, shift)
        ctx.alpha, ctx.log = alpha, log
        logits = alpha * (scores + shift)
        return torch.nn.functional.logsigmoid(logits) if log else logits.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scores, shift = ctx.saved_tensors
        degrees = (ctx.alpha * (scores + shift)).sigmoid()
        slopes = ctx.alpha * degrees * (1 - degrees)
        own = gradient * (ctx.alpha * (1 - degrees) if ctx.log else slopes)
        # An entry that is out has log degree minus infinity, and no slope, whatever gradient arrives.
        own = torch.where(scores > float("-inf"), own, 0.0)
        total = slopes.sum(1, keepdim=True)
        through_shift = own.sum(1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return own - through_shift * slopes, None, None, None


def _shift(scores: Tensor, k: Tensor, alpha: float) -> Tensor:
    """The shift of each row for which its degrees sum to k: bisection, and Newton's steps where they stay in the bracket."""
    if scores.numel() == 0:
        return scores.new_zeros(len(scores), 1)
    k = k.unsqueeze(1)
    counts = scores > float("-inf")
    margin = (torch.log(counts.sum(1, keepdim=True).to(scores.dtype)) + 20) / alpha
    low = -scores.amax(1, keepdim=True) - margin
    high = -scores.masked_fill(~counts, float("inf")).amin(1, keepdim=True) + margin
    shift = (low + high) / 2
    for step in range(_STEPS):
        degrees = (alpha * (scores + shift)).sigmoid()
        excess = degrees.sum(1, keepdim=True) - k
        low, high = torch.where(excess < 0, shift, low), torch.where(excess < 0, high, shift)
        newton = shift - excess / (alpha * (degrees * (1 - degrees)).sum(1, keepdim=True))
        inside = (newton > low) & (newton < high)
        before = shift
        middle = (low + high) / 2
        shift = torch.where(inside, newton, middle) if step % 2 == 0 else middle
        # The last word is Newton's: near the solution it is exact to rounding, where halving is not yet.
        if not torch.compiler.is_compiling() and bool(
            (excess.abs() <= 4 * torch.finfo(scores.dtype).eps * k).all()
        ):
            return before
    return torch.where(inside, newton, middle)
