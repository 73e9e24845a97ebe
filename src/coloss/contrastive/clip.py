r"""CLIP's loss on pairs, with label smoothing in streaming form, and over several views of each side; the learnt scale of its scores.

    CLIP        1/2 [ CE(rows of e^s U V^T) + CE(its columns) ]            target of pair i: pair i, among the pairs of all processes
    smoothing   CE_e = (1 - e) CE + e mean_j (-log p_j) = CE + e e^s (mean_i u_i.v_i - u.v),   u, v the means of all rows
    views       (CE_w + A CE_s) / (1 + A),   CE_w of the weak pair, CE_s the mean over the A^2 pairs of strong views, smoothed

Only the weak pair is never smoothed. The mean over all scores factors into the means of the embeddings, so smoothing costs no second
pass over the pairs.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coloss.ops import all_reduce_mean, full_precision, info_nce_loss, is_distributed


class LogitScale(nn.Module):
    r"""A learnt factor on cosine similarities, one over a temperature: $e^s$ in float32, never above a limit.

    $s$ itself is brought back to the limit before each use, which is what clamping after each optimizer step does: it can come down
    again at once.

    Args:
        temperature: at the start; the scale is one over it.
        limit: largest scale, >= 1 / temperature.

    Returns:
        From `forward`: the scale, a float32 scalar (float64 where the module is).

    Raises:
        ValueError: for a temperature <= 0 or a limit below the first scale.

    Source:
        Radford et al. 2021, arXiv 2103.00020, section 2.5.

    Examples:
        >>> round(LogitScale(0.07)().item(), 2)
        14.29
    """

    def __init__(self, temperature: float = 0.07, limit: float = 100.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not limit * temperature >= 1:
            raise ValueError(f"limit must be >= 1 / temperature = {1 / temperature:.4g}, got {limit}")
        self.temperature, self.limit = temperature, limit
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start."""
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self) -> Float[Tensor, ""]:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.limit))
        return full_precision(self.log_scale).exp()


def clip_loss(
    images: Float[Tensor, "pairs dim"],
    texts: Float[Tensor, "pairs dim"],
    scale: float | Float[Tensor, ""] = 1 / 0.07,
    *,
    label_smoothing: float = 0.0,
    ids: Shaped[Tensor, " pairs"] | None = None,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    r"""Softmax cost of finding each image's text among all texts and each text's image among all images, averaged.

    With smoothing $\epsilon$ the target of a pair is $1 - \epsilon$ on itself plus $\epsilon / M$ on each of the $M$ pairs, itself
    included, as in `torch.nn.functional.cross_entropy`.

    Args:
        images: one row for each pair, unit vectors for cosine similarity.
        texts: likewise; row i belongs to image i.
        scale: factor on the inner products, > 0, may be learnt (see `LogitScale`).
        label_smoothing: in [0, 1].
        ids: pairs of equal id (duplicates) are not negatives of each other; not with smoothing.
        chunk_size: as for `coloss.ops.info_nce_loss`.
        across_processes: take the pairs of all processes for negatives, as if the batch had been joined.

    Returns:
        A scalar, at least float32; 0 for no pairs. It can be differentiated once.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        That of `coloss.ops.info_nce_loss`: memory of the embeddings, their gradients and two tiles of scores.

    Source:
        Radford et al. 2021, arXiv 2103.00020; smoothing as in Fini et al. 2023, arXiv 2305.08675.

    Examples:
        >>> pairs = torch.eye(4)
        >>> round(clip_loss(pairs, pairs, 1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
        >>> scores = pairs @ pairs.T
        >>> expected = nn.functional.cross_entropy(scores, torch.arange(4), label_smoothing=0.1)
        >>> bool(torch.isclose(clip_loss(pairs, pairs, 1.0, label_smoothing=0.1), expected))
        True
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"texts must have the shape of images {tuple(images.shape)}, got {tuple(texts.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if label_smoothing and ids is not None:
        raise ValueError("label_smoothing must be 0 with ids: mass cannot go to pairs that are left out")
    if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
        raise ValueError(f"scale must be > 0 and finite, got {scale}")
    loss = info_nce_loss(
        images,
        texts,
        1 / scale,
        symmetric=True,
        ids=ids,
        chunk_size=chunk_size,
        across_processes=across_processes,
    )
    if not label_smoothing:
        return loss
    u, v = full_precision(images), full_precision(texts)
    own, mean_u, mean_v = (u * v).sum(), u.sum(0), v.sum(0)
    count = own.new_full((), len(u))
    if across_processes and is_distributed():
        own, mean_u, mean_v, count = (all_reduce_mean(part) for part in (own, mean_u, mean_v, count))
    count = count.clamp(min=1)
    return loss + label_smoothing * scale * (own / count - ((mean_u / count) * (mean_v / count)).sum())


class MultiViewClipLoss(nn.Module):
    r"""CLIP's loss on weak views, with CLIP's smoothed loss on all pairs of strong views: $(CE_w + A\,CE_s) / (1 + A)$.

    $CE_s$ is the mean over the A image views times A text views. Without strong views it is CLIP's loss.

    Args:
        label_smoothing: of the strong pairs, in [0, 1]; the weak pair is never smoothed. With a learnt scale smoothing keeps the scale
            from growing: compare values at equal scale only.
        reduction: "avg", or "sum" for twice as much (which matters to plain gradient descent, and hardly to Adam).
        across_processes: take the pairs of all processes for negatives.

    Returns:
        From `forward(images, texts, scale, strong_images, strong_texts, strong_scale)`: a scalar, at least float32. `images` and `texts`
        are (pairs, dim), the strong ones sequences of A such, from the same or from other heads, with a scale of their own.

    Raises:
        ValueError: for a value out of range; when called, if there are not as many image views as text views, or shapes differ.

    Cost:
        1 + A^2 times `clip_loss`.

    Source:
        Fini et al. 2023, arXiv 2305.08675.

    Examples:
        >>> pairs = torch.eye(4)
        >>> loss = MultiViewClipLoss(label_smoothing=0.0)
        >>> same = loss(pairs, pairs, 1.0, [pairs, pairs], [pairs, pairs], 1.0)
        >>> bool(torch.isclose(same, clip_loss(pairs, pairs, 1.0)))
        True
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        reduction: Literal["avg", "sum"] = "avg",
        *,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if reduction not in ("avg", "sum"):
            raise ValueError(f'reduction must be "avg" or "sum", got {reduction!r}')
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.across_processes = across_processes

    def weights(self, views: int) -> tuple[float, float]:
        """Weights of the weak and of the strong part, for A strong views.

        Examples:
            >>> MultiViewClipLoss(reduction="sum").weights(3)
            (0.5, 1.5)
        """
        whole = 2.0 if self.reduction == "sum" else 1.0
        return whole / (1 + views), whole * views / (1 + views)

    def strong(
        self, images: Sequence[Tensor] | Tensor, texts: Sequence[Tensor] | Tensor, scale: float | Tensor
    ) -> Float[Tensor, ""]:
        """The mean over all pairs of strong views, of which there must be some."""
        if len(images) != len(texts) or not len(images):
            raise ValueError(
                f"there must be as many strong views of images as of texts, at least one, got {len(images)} and {len(texts)}"
            )
        parts = [
            clip_loss(
                image,
                text,
                scale,
                label_smoothing=self.label_smoothing,
                across_processes=self.across_processes,
            )
            for image in images
            for text in texts
        ]
        return torch.stack(parts).mean()

    def forward(
        self,
        images: Float[Tensor, "pairs dim"],
        texts: Float[Tensor, "pairs dim"],
        scale: float | Float[Tensor, ""],
        strong_images: Sequence[Tensor] | Tensor = (),
        strong_texts: Sequence[Tensor] | Tensor = (),
        strong_scale: float | Float[Tensor, ""] = 10.0,
    ) -> Float[Tensor, ""]:
        weak, strong = self.weights(len(strong_images))
        loss = weak * clip_loss(images, texts, scale, across_processes=self.across_processes)
        if not len(strong_images) and not len(strong_texts):
            return loss
        return loss + strong * self.strong(strong_images, strong_texts, strong_scale)
