"""Contrast between two modalities whose targets are no longer one-to-one: given ones, or those of the other modality itself."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coloss.ops import (
    full_precision,
    gather_with_gradient,
    is_distributed,
    soft_contrastive_loss,
    without_autocast,
)
from coloss.ops.loss_arguments import reduced, same_type
from coloss.ops.streaming import streaming_logsumexp

Targets = Tensor | Callable[[Tensor, Tensor], Tensor]


def soft_target_clip_loss(
    first: Float[Tensor, "pairs dim"],
    second: Float[Tensor, "pairs dim"],
    targets: Targets,
    back_targets: Targets,
    temperature: float | Float[Tensor, ""] = 0.07,
    *,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""CLIP's loss with soft targets: the mean of the cross-entropies from the first modality to the second, and back.

    $\frac{1}{2B} \sum_i [-\sum_j Y_{ij} \log p(j | i) - \sum_j Y'_{ij} \log p'(j | i)]$ with $p$ the softmax of cosine similarities over
    $\tau$, from row $i$ of the first to all rows of the second, and $p'$ the reverse. With identities as targets it is CLIP's loss.

    Args:
        first: embeddings of one modality, of any length.
        second: of the other; row i belongs to row i.
        targets: $Y$, as `coloss.ops.soft_contrastive_loss` takes them: a dense or sparse (B, B) tensor, or a function of row and column
            numbers. Nothing is differentiated through them.
        back_targets: $Y'$, from the second to the first: its rows are those of the second.
        temperature: $\tau > 0$: a number, or a scalar tensor that may be learned.
        chunk_size, across_processes: as for `coloss.ops.soft_contrastive_loss`.

    Returns:
        A scalar, at least float32. It can be differentiated once.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        Twice that of `coloss.ops.soft_contrastive_loss`; no (B, B) tensor is made here.

    Examples:
        >>> pairs, hard = torch.eye(4), torch.eye(4)
        >>> round(
        ...     soft_target_clip_loss(pairs, pairs, hard, hard, temperature=1.0).item(), 4
        ... )  # log(1 + 3 / e)
        0.7437
    """
    check_paired(first, second)
    x, y = unit_rows(first, second)
    options = {"chunk_size": chunk_size, "across_processes": across_processes}
    forth = soft_contrastive_loss(x, y, targets, temperature, **options)  # type: ignore[arg-type]
    back = soft_contrastive_loss(y, x, back_targets, temperature, **options)  # type: ignore[arg-type]
    return (forth + back) / 2


def soft_clip_loss(
    first: Float[Tensor, "pairs dim"],
    second: Float[Tensor, "pairs dim"],
    temperature: float = 0.125,
    *,
    detach_target: bool = True,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""CLIP's loss whose targets are the similarities within the second modality.

    $Q = \mathrm{softmax}(z^2 z^{2\top} / \tau)$ by rows is the target both of $\mathrm{softmax}(z^1 z^{2\top} / \tau)$ and of its
    transpose; cosines throughout. Add the same with the modalities exchanged to use both as sources of targets.

    Args:
        first: $z^1$, of any length.
        second: $z^2$; row i belongs to row i.
        temperature: $\tau > 0$.
        detach_target: take no gradient through $Q$. False differentiates it too, as the published code does: both sides of the
            cross-entropy may then sharpen or flatten together.
        chunk_size, across_processes: as for `coloss.ops.soft_contrastive_loss`.

    Returns:
        A scalar, at least float32; with both modalities equal it is the mean entropy of the rows of $Q$. It can be differentiated once.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        $O(B^2 D)$ time, about that of four `info_nce_loss`. $Q$ is made tile by tile; memory of the embeddings (of all processes, where
        there are several) and two tiles. With `detach_target=False` two fused attentions more.

    Source:
        Kumar et al. 2024 (M3CoL), arXiv 2409.17777, the "MultiSClip" loss; Scotti et al. 2023 (MindEye), arXiv 2305.18274.

    Examples:
        >>> round(
        ...     soft_clip_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4
        ... )  # the entropy of [e, 1] / (e + 1)
        0.5822
    """
    check_paired(first, second)
    x, y = unit_rows(first, second)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    ring = across_processes and is_distributed()
    with torch.no_grad():
        everyone = gather_with_gradient(y) if ring else y
        logs, _ = streaming_logsumexp(y / temperature, everyone, side=chunk_size)
        scaled, columns_of = y.detach() / temperature, everyone.detach()

    def targets(rows: Tensor, columns: Tensor) -> Tensor:
        row, column = rows.flatten(), columns.flatten()
        with without_autocast(scaled.device):
            return (scaled[row] @ columns_of[column].T - logs[row].unsqueeze(1)).exp()

    loss = soft_target_clip_loss(
        x, y, targets, targets, temperature, chunk_size=chunk_size, across_processes=across_processes
    )
    return loss if detach_target else loss + _target_slope(x, y, temperature, ring)


def check_paired(first: Tensor, second: Tensor) -> None:
    """Refuse two modalities that are not paired row by row.

    Raises:
        ValueError: naming both shapes.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"both modalities must be (pairs, dim) of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def unit_rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in full precision and of one type, each row divided by its length; rows of zeros stay."""
    x, y = same_type(full_precision(first), full_precision(second))
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def _target_slope(x: Tensor, y: Tensor, temperature: float, ring: bool) -> Tensor:
    """0, with the gradient that the loss has through its targets alone.

    Rows of targets sum to 1, so that their slopes meet the scores and never the normaliser: what remains of the cross-entropy is minus the
    inner product of each row with the targets' mean of the other side, which is an attention.
    """
    keys = gather_with_gradient(y) if ring else y
    others = gather_with_gradient(x) if ring else x

    def mean_of(values: Tensor) -> Tensor:
        with without_autocast(y.device):
            return F.scaled_dot_product_attention(
                y[None, None], keys[None, None], values.detach()[None, None], scale=1 / temperature
            )[0, 0]

    scores = (x.detach() * mean_of(keys)).sum(1) + (y.detach() * mean_of(others)).sum(1)
    value = reduced(-scores / (2 * temperature), None, "mean", ring)
    return value - value.detach()
