"""Views of a batch: several random versions of each sample, stacked, as joint-embedding methods take them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.data.skeleton_views import crop_and_shear
from coloss.data.views import random_views, series_views, small_image_views, vector_views
from coloss.errors import InputError

View: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]
MOST_PERSONS = 7
"""In clips of skeletons that get default views: a larger last dimension is taken for the width of a video."""


def default_views(
    inputs: Float[Tensor, "batch *shape"], views: int = 4, generator: torch.Generator | None = None
) -> Float[Tensor, "views batch *shape"]:
    """Random views that suit the shape of the inputs, for a start; better ones come from knowing the data.

    Grey images of up to 32 pixels a side are turned, shifted, scaled, brightened and occluded (`small_image_views`); other images also
    cropped, mirrored and recoloured (`random_views`); series (`series_views`) and vectors (`vector_views`) are scaled, made noisy
    and partly masked; clips of skeletons are shifted in time and sheared (`crop_and_shear`).

    Args:
        inputs: images (batch, channels, height, width), series (batch, channels, steps), vectors (batch, features) or clips
            (batch, 3, frames, joints, persons) of up to 7 persons; more would be the width of a video, which has no default views.
        views: of each sample, >= 1.
        generator: decides every choice.

    Raises:
        ValueError: for inputs of another shape, or views < 1.

    Examples:
        >>> default_views(torch.rand(5, 1, 8, 8), views=2).shape
        torch.Size([2, 5, 1, 8, 8])
    """
    if inputs.ndim == 2:
        return vector_views(inputs, views, generator)
    if inputs.ndim == 3:
        return series_views(inputs, views, generator)
    if inputs.ndim == 4:
        side = min(inputs.shape[2:])
        if inputs.shape[1] == 1 and max(inputs.shape[2:]) <= 32:
            return small_image_views(inputs, views, generator, occlusion=3 * side // 8)
        return random_views(inputs, views, generator)
    if inputs.ndim == 5 and inputs.shape[1] == 3 and inputs.shape[4] <= MOST_PERSONS:
        return crop_and_shear(inputs, views, generator)
    raise ValueError(
        f"inputs must be images, series, clips of skeletons or vectors to have default views, got shape {tuple(inputs.shape)}: give a view function"
    )


def stacked_views(view: View, inputs: Any, generator: torch.Generator | None = None) -> Tensor:
    """Views of a batch by any view function, checked and stacked.

    Args:
        view: called as `view(inputs, generator=generator)`; gives (views, batch, ...), or a list of tensors (batch, ...) of one shape,
            as `coloss.data.MultiView` does.
        inputs: one float tensor, samples in the first dimension.
        generator: decides every choice.

    Returns:
        (views, batch, ...).

    Raises:
        InputError: if inputs are no float tensor, or the views have other shapes.

    Examples:
        >>> stacked_views(lambda inputs, generator: [inputs, -inputs], torch.ones(3, 2)).shape
        torch.Size([2, 3, 2])
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs must be one float tensor to make views of, got {found}")
    views = view(inputs, generator=generator)
    if not isinstance(views, Tensor):
        shapes = sorted({tuple(one.shape) for one in views})
        if len(shapes) != 1:
            raise InputError(f"all views must have one shape, got {shapes}")
        views = torch.stack(tuple(views))
    if views.ndim < 2 or views.shape[0] == 0 or views.shape[1] != len(inputs):
        raise InputError(f"view must give (views, {len(inputs)}, ...), got shape {tuple(views.shape)}")
    return views


def repeated(part: Any, times: int) -> Any:
    """Targets or ids of a batch as often as it has views, in the order of stacked views.

    Args:
        part: a tensor with samples in the first dimension, a tuple or list of such; anything else is given back as it is.
        times: number of views.

    Examples:
        >>> repeated(torch.tensor([7, 8]), 2)
        tensor([7, 8, 7, 8])
    """
    if isinstance(part, Tensor):
        return part.repeat(times, *[1] * (part.ndim - 1))
    if isinstance(part, tuple | list):
        return type(part)(repeated(inner, times) for inner in part)
    return part
