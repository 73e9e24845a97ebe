"""Asks a picture that a model makes to show the same people as the true one: frozen networks for joints and for masks look at both."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.motion.interpolation_losses import heatmap_mse_loss, soft_dice_focal_loss
from coloss.nn import FrozenTaskLoss
from coloss.train import FrozenTaskTerms
from coloss.train.schedules import Schedule


class HumanAwareLoss(FrozenTaskTerms):
    r"""The terms `keypoints` and `masks`, beside the reconstruction loss of any model that makes pictures of people.

        keypoints   heatmap_mse_loss(H(x), H(y))
        masks       soft_dice_focal_loss(S(x), sigmoid(S(y)))

    with heatmap network H, mask network S, picture x of the model and true picture y. Both networks are frozen; the gradient reaches x alone.

    The published weights (0.1 and 0.001) belong to the authors' networks and picture sizes. Most of a heatmap is background, so the first term
    may be negligible: set `measure_every` and look at `keypoints_gradient_ratio` and `masks_gradient_ratio` in the history, or take the weights
    from `coloss.train.matched_weights`.

    Args:
        keypoints: gives one heatmap for each joint; None leaves the term out.
        masks: gives mask logits (batch, masks, height, width); None leaves the term out.
        keypoint_weight: >= 0, or a schedule of progress.
        mask_weight: likewise.
        match: `"class"` if mask channel c means the same thing everywhere, `"iou"` for instances in any order.
        keypoint_preprocess, mask_preprocess: bring pictures to what the networks know, such as `coloss.nn.ImagePreprocess`.
        crop_size: (height, width) of cut-outs, where `boxes` are given.
        options: `every`, `cached`, `boxes`, `prediction`, `truth`, `measure_every` of `FrozenTaskTerms`.

    Raises:
        InputError: if neither network is given, or a value is out of range.

    Cost:
        At each due step a forward and a backward pass of both networks, and a forward pass for targets that are not cached.

    Source:
        Chen and Jiang, 2024 (SportsSloMo), arXiv 2308.16876; masks are matched by overlap instead of by order, and the loss of soft masks is
        0 where they are equal.

    Examples:
        >>> import coloss, torch
        >>> from coloss.motion import FigureNetwork, FrameInterpolator, MaskNetwork, reconstruction_loss
        >>> method = HumanAwareLoss(FigureNetwork(15), MaskNetwork(), measure_every=1)
        >>> first, between, last = torch.rand(3, 8, 3, 16, 16).unbind(0)
        >>> data = coloss.data.IndexedDataset((first, last, torch.full((8,), 0.5)), between)
        >>> run = coloss.fit(
        ...     FrameInterpolator(8), data, reconstruction_loss, [method], budget=coloss.Budget(steps=1)
        ... )
        >>> sorted(run.history[-1].terms), sorted(run.history[-1].metrics)
        (['keypoints', 'masks', 'reconstruction'], ['keypoints_gradient_ratio', 'masks_gradient_ratio'])
    """

    def __init__(
        self,
        keypoints: nn.Module | None = None,
        masks: nn.Module | None = None,
        *,
        keypoint_weight: Schedule = 0.1,
        mask_weight: Schedule = 0.001,
        match: str = "class",
        keypoint_preprocess: Callable[[Tensor], Tensor] | None = None,
        mask_preprocess: Callable[[Tensor], Tensor] | None = None,
        crop_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        if match not in ("class", "iou"):
            raise InputError(f'match must be "class" or "iou", got {match!r}')
        losses, weights = {}, {}
        if keypoints is not None:
            losses["keypoints"] = FrozenTaskLoss(
                keypoints, heatmap_mse_loss, preprocess=keypoint_preprocess, crop_size=crop_size
            )
            weights["keypoints"] = keypoint_weight
        if masks is not None:
            losses["masks"] = FrozenTaskLoss(
                masks, partial(mask_distance, match=match), preprocess=mask_preprocess, crop_size=crop_size
            )
            weights["masks"] = mask_weight
        if not losses:
            raise InputError("keypoints or masks must be given, got neither")
        super().__init__(losses, weights=weights, **options)


def mask_distance(
    logits: Float[Tensor, "batch predicted height width"],
    truth_logits: Float[Tensor, "batch segments height width"],
    match: str = "class",
) -> Float[Tensor, ""]:
    """`soft_dice_focal_loss` between two outputs of one mask network; 0 where they are equal.

    Examples:
        >>> import torch
        >>> logits = torch.randn(2, 3, 4, 4)
        >>> mask_distance(logits, logits).item()
        0.0
    """
    return soft_dice_focal_loss(logits, truth_logits.sigmoid(), match=match)
