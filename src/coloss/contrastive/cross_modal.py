r"""Non-contrastive losses between two modalities: SiamLIP, BYOLIP, BarLIP and SwALIP, to be added to CLIP's loss or compared with it.

    SiamLIP   1/2 [ 2 - 2 cos(p(u), sg v) + 2 - 2 cos(q(v), sg u) ]          p, q predictors, sg no gradient
    BYOLIP    the same, v and u from a momentum copy of the encoders
    BarLIP    scale [ sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2 ]       C the correlations of the columns of u and v
    SwALIP    cross-entropy of softmax(s' / tau) against sinkhorn(s), s the scores of one pair of views, s' those of the other pair

u are projected features of images, v of texts. None of them needs negatives, though BarLIP and SwALIP need the batch.
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn import projection_head
from coloss.ops import (
    all_reduce_mean,
    full_precision,
    gather_with_gradient,
    is_distributed,
    sinkhorn,
    soft_contrastive_loss,
    without_autocast,
    world_size,
)

Extra = Literal["siamlip", "byolip", "barlip", "swalip"]
EXTRA_WEIGHTS = {"siamlip": 1.0, "byolip": 1.0, "barlip": 1.0, "swalip": 0.2}


def cross_modal_simsiam_loss(
    predicted_images: Float[Tensor, "pairs dim"],
    texts: Float[Tensor, "pairs dim"],
    predicted_texts: Float[Tensor, "pairs dim"],
    images: Float[Tensor, "pairs dim"],
) -> Float[Tensor, ""]:
    """How far predictions from each modality are from the other one, as targets without gradient.

    The mean over pairs and both directions of 2 - 2 cos(prediction, target): from 0 for equal directions to 4 for opposite ones.

    Args:
        predicted_images: what a predictor makes of the images' projections.
        texts: projections of the texts; the targets of the above.
        predicted_texts: what a predictor makes of the texts' projections.
        images: projections of the images. For BYOLIP, targets come from a momentum copy.

    Returns:
        A scalar, at least float32; 0 for no pairs.

    Raises:
        ValueError: if shapes differ.

    Source:
        Fini et al. 2023, arXiv 2305.08675 (SiamLIP, BYOLIP), after Chen and He 2021, arXiv 2011.10566, and Grill et al. 2020,
        arXiv 2006.07733.

    Examples:
        >>> one, other = torch.eye(2), torch.eye(2).flip(0)
        >>> (
        ...     cross_modal_simsiam_loss(one, one, one, one).item(),
        ...     cross_modal_simsiam_loss(one, other, one, one).item(),
        ... )
        (0.0, 1.0)
    """
    _check_shapes(predicted_images, texts, predicted_texts, images)
    if not len(images):
        return full_precision(predicted_images).sum()
    return (_distance(predicted_images, texts) + _distance(predicted_texts, images)) / 2


def cross_modal_barlow_loss(
    images: Float[Tensor, "pairs dim"],
    texts: Float[Tensor, "pairs dim"],
    off_diagonal: float = 5e-3,
    scale: float = 0.025,
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """How far each dimension of the images is from being that of the texts, and from being alone in what it says.

    Columns are standardised here over the batch, so C is a matrix of correlations whatever comes in; one more batch norm at the end of
    the projectors changes nothing. A constant column correlates with nothing.

    Args:
        images: projections.
        texts: likewise.
        off_diagonal: weight lambda of the correlations that should be 0, >= 0.
        scale: of the whole, > 0. The default is the published one, for 8,192 dimensions.
        across_processes: over the pairs of all processes.

    Returns:
        A scalar, at least float32; 0 for identical whitened projections.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        O(pairs * dim^2) time and dim^2 memory.

    Source:
        Fini et al. 2023, arXiv 2305.08675 (BarLIP), after Zbontar et al. 2021, arXiv 2103.03230.

    Examples:
        >>> signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> cross_modal_barlow_loss(signs, 3 * signs + 1).item()
        0.0
        >>> cross_modal_barlow_loss(signs, -signs, scale=1.0).item()  # both diagonal entries are -1
        8.0
    """
    _check_shapes(images, texts)
    if not 0 <= off_diagonal < float("inf") or not 0 < scale < float("inf"):
        raise ValueError(
            f"off_diagonal must be >= 0 and scale > 0, both finite, got {off_diagonal} and {scale}"
        )
    joint = across_processes and is_distributed()
    with without_autocast(images.device):
        rows = images.new_full((), len(images), dtype=full_precision(images).dtype)
        count = _total(rows, joint)
        u, v = (_standardised(full_precision(part), count, joint) for part in (images, texts))
        correlations = _total(u.T @ v, joint) / count.clamp(min=1)
    on = (correlations.diagonal() - 1).square().sum()
    return scale * (
        on + off_diagonal * (correlations.square().sum() - correlations.diagonal().square().sum())
    )


def swap_assign_loss(
    images: Float[Tensor, "2 pairs dim"],
    texts: Float[Tensor, "2 pairs dim"],
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Cross-entropy of the scores of one pair of views against balanced assignments made from the scores of the other views.

    For image view a and text view b the targets are `coloss.ops.sinkhorn` of their cosines, without gradient; the scores of views 1 - a
    and 1 - b predict them, from images to texts and back. The mean over the four pairs and both directions.

    Args:
        images: projections of two views of each image, of any length.
        texts: of two views of each text.
        temperature: of the prediction, > 0.
        epsilon, iterations: as for `coloss.ops.sinkhorn`.
        across_processes: rows compete for the texts (images) of all processes, and are balanced over all of them.

    Returns:
        A scalar, at least float32; 0 for no pairs.

    Raises:
        ValueError: if there are not two views of each, or a value is out of range.

    Cost:
        Four assignments each way: matrices of this process's pairs by those of all.

    Source:
        Fini et al. 2023, arXiv 2305.08675 (SwALIP), after Caron et al. 2020, arXiv 2006.09882.

    Examples:
        >>> views = torch.eye(4).repeat(2, 1, 1)
        >>> swap_assign_loss(views, views).item() < 1e-3
        True
    """
    if images.ndim != 3 or len(images) != 2 or images.shape != texts.shape:
        raise ValueError(
            f"images and texts must both be (2 views, pairs, dim), got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    if not images.shape[1]:
        return full_precision(images).sum()
    u, v = (F.normalize(full_precision(part), dim=-1) for part in (images, texts))
    joint = across_processes and is_distributed()
    total = u.new_zeros(())
    for (rows, columns), a, b in product(((u, v), (v, u)), range(2), range(2)):
        with torch.no_grad(), without_autocast(u.device):
            everyone = gather_with_gradient(columns[b]) if joint else columns[b]
            targets = sinkhorn(rows[a] @ everyone.T, epsilon, iterations, across_processes=joint)
        total = total + soft_contrastive_loss(
            rows[1 - a], columns[1 - b], targets, temperature, across_processes=across_processes
        )
    return total / 8


class CrossModalHeads(nn.Module):
    """Projectors (and predictors) of one of the four losses, and its mean over pairs of views.

    Of V views of each sample the first is the weak one. SiamLIP, BYOLIP and BarLIP compare the weak pair and all (V - 1)^2 strong pairs;
    SwALIP the strong views alone, of which there must be two.

    Args:
        kind: "siamlip", "byolip", "barlip" or "swalip".
        image_features: width of the images' features.
        text_features: of the texts'.
        projector: widths of the hidden layers and, last, of what is compared. The published ones are 2048-2048-128, for BarLIP
            3000-3000-8192.

    Raises:
        ValueError: for an unknown kind; when called, for a number of views that does not fit.

    Examples:
        >>> heads = CrossModalHeads("barlip", 8, 6, (16, 4))
        >>> heads(torch.randn(3, 5, 8), torch.randn(3, 5, 6)).shape
        torch.Size([])
    """

    def __init__(
        self, kind: Extra, image_features: int, text_features: int, projector: Sequence[int] = (256, 128)
    ) -> None:
        super().__init__()
        if kind not in EXTRA_WEIGHTS:
            raise ValueError(f"kind must be one of {', '.join(EXTRA_WEIGHTS)}, got {kind!r}")
        self.kind = kind
        self.image_projector = projection_head(image_features, projector)
        self.text_projector = projection_head(text_features, projector)
        if kind in ("siamlip", "byolip"):
            widths = (projector[0], projector[-1])
            self.image_predictor = projection_head(projector[-1], widths)
            self.text_predictor = projection_head(projector[-1], widths)

    def project(
        self, images: Float[Tensor, "views pairs image"], texts: Float[Tensor, "views pairs text"]
    ) -> tuple[Float[Tensor, "views pairs dim"], Float[Tensor, "views pairs dim"]]:
        """Projections of the features of all views."""
        return _over_views(self.image_projector, images), _over_views(self.text_projector, texts)

    def forward(
        self,
        images: Float[Tensor, "views pairs image"],
        texts: Float[Tensor, "views pairs text"],
        targets: tuple[Tensor, Tensor] | None = None,
        *,
        across_processes: bool = True,
    ) -> Float[Tensor, ""]:
        """The loss; `targets` are the projections by a momentum copy, for BYOLIP."""
        u, v = self.project(images, texts)
        views = len(u)
        if self.kind == "swalip":
            if views != 3:
                raise ValueError(f"swalip needs two strong views beside the weak one, got {views - 1}")
            return swap_assign_loss(u[1:], v[1:], across_processes=across_processes)
        pairs = [(0, 0), *product(range(1, views), range(1, views))]
        if self.kind == "barlip":
            parts = [cross_modal_barlow_loss(u[a], v[b], across_processes=across_processes) for a, b in pairs]
        else:
            p, q = _over_views(self.image_predictor, u), _over_views(self.text_predictor, v)
            target_u, target_v = (u, v) if targets is None else targets
            parts = [cross_modal_simsiam_loss(p[a], target_v[b], q[b], target_u[a]) for a, b in pairs]
        return torch.stack(parts).mean()


def _over_views(layers: nn.Module, features: Tensor) -> Tensor:
    return layers(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    cosine = F.cosine_similarity(full_precision(prediction), full_precision(target.detach()), dim=1)
    return (2 - 2 * cosine).mean()


def _standardised(columns: Tensor, count: Tensor, joint: bool) -> Tensor:
    count = count.clamp(min=1)
    centred = columns - _total(columns.sum(0), joint) / count
    variance = _total(centred.square().sum(0), joint) / count
    # Below this a float32 column is constant but for rounding, and its correlations would be noise.
    return torch.where(variance > 1e-12, centred * variance.clamp(min=1e-12).rsqrt(), 0.0)


def _total(part: Tensor, joint: bool) -> Tensor:
    return all_reduce_mean(part) * world_size() if joint else part


def _check_shapes(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != first.shape:
            raise ValueError(
                f"all parts must have one shape, got {tuple(first.shape)} and {tuple(other.shape)}"
            )
