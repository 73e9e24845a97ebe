"""Views of an image as an eye takes them: small patches around places that stand out, and no place twice."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import full_precision

Images = Float[Tensor, "batch channels height width"]


class Saccades:
    """Patches around fixations drawn from a saliency map, with inhibition of return; the parameters are where the eye looks.

    Each fixation is drawn in proportion to the saliency. Then a square of half side `inhibition` around it is set to 0, and the next one
    is drawn from what is left. Where nothing is left, all places that were salient may be looked at again; an image without any has equal
    chances everywhere. Fixations stay half a patch away from the border where the image is larger than the patch.

    Args:
        patch: side of a patch in pixels, >= 1; at most the smaller side of the images.
        inhibition: half side of the inhibited square in pixels, >= 0; None for half the patch's side.
            0 inhibits the place itself.
        saliency: images -> (batch, height, width), >= 0 and finite; None for the distance of each pixel to the image's mean, averaged over
            channels.

    Attributes:
        names: row and column of the patch's centre as shares of the sides; `spread`: of numbers uniform in [0, 1].

    Raises:
        ValueError: for a value out of range, images smaller than a patch, or a saliency of another shape, below 0 or not finite.

    Cost:
        A loop over views, not over samples.

    Source:
        Ghaemi, Muller, Bakhtiari, 2025 (seq-JEPA), arXiv 2505.03176, predictive learning across saccades; the default saliency is our own.

    Examples:
        >>> from coloss.jepa import draw_views
        >>> patches, places = draw_views(Saccades(patch=4), torch.rand(5, 3, 12, 12), 3)
        >>> patches.shape, places.shape
        (torch.Size([5, 3, 3, 4, 4]), torch.Size([5, 3, 2]))
    """

    names = ("row", "column")
    spread = (12**-0.5, 12**-0.5)

    def __init__(
        self,
        patch: int = 8,
        inhibition: int | None = None,
        saliency: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if patch < 1:
            raise ValueError(f"patch must be >= 1, got {patch}")
        if inhibition is not None and inhibition < 0:
            raise ValueError(f"inhibition must be >= 0, got {inhibition}")
        self.patch = patch
        self.inhibition = patch // 2 if inhibition is None else inhibition
        self.saliency = saliency if saliency is not None else _contrast

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch channels patch patch"], Float[Tensor, "batch 2"]]:
        """One patch of each image, and where it is."""
        patches, places = self.draw_sequence(images, 1, generator)
        return patches[:, 0], places[:, 0]

    def draw_sequence(
        self, images: Tensor, count: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch count channels patch patch"], Float[Tensor, "batch count 2"]]:
        """Patches in the order of looking, and where each of them is."""
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
        batch, _, height, width = images.shape
        if self.patch > min(height, width):
            raise ValueError(f"patch must be at most the smaller side {min(height, width)}, got {self.patch}")
        saliency = full_precision(self.saliency(images))
        if saliency.shape != (batch, height, width):
            raise ValueError(f"saliency must give {(batch, height, width)}, got {tuple(saliency.shape)}")
        allowed = (saliency >= 0) & saliency.isfinite()
        if not bool(allowed.all()):
            raise ValueError(f"saliency must be >= 0 and finite, got {saliency[~allowed][0].item()}")
        # A patch is named by its upper left corner, and has the saliency of the pixel at its centre.
        half = self.patch // 2
        last_row, last_column = height - self.patch, width - self.patch
        corners = saliency[:, half : half + last_row + 1, half : half + last_column + 1]
        corners = torch.where(corners.sum((1, 2), keepdim=True) > 0, corners, 1)
        rows = torch.arange(last_row + 1, device=images.device).view(1, -1, 1)
        columns = torch.arange(last_column + 1, device=images.device).view(1, 1, -1)
        left, tops, lefts = corners, [], []
        for _ in range(count):
            left = torch.where(left.sum((1, 2), keepdim=True) > 0, left, corners)
            chosen = _choose(left.flatten(1), generator)
            top, start = chosen // (last_column + 1), chosen % (last_column + 1)
            tops.append(top)
            lefts.append(start)
            near = ((rows - top.view(-1, 1, 1)).abs() <= self.inhibition) & (
                (columns - start.view(-1, 1, 1)).abs() <= self.inhibition
            )
            left = left.masked_fill(near, 0)
        top, start = torch.stack(tops, 1), torch.stack(lefts, 1)
        sides = saliency.new_tensor([height, width])
        places = (torch.stack([top, start], dim=-1) + self.patch / 2) / sides
        return _patches(images, top, start, self.patch), places


def _contrast(images: Images) -> Float[Tensor, "batch height width"]:
    values = full_precision(images)
    return (values - values.mean((2, 3), keepdim=True)).abs().mean(1)


def _choose(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index of each row, in proportion to its weights; one uniform number decides, on the generator's device."""
    device = generator.device if generator is not None else weights.device
    share = torch.rand(len(weights), 1, generator=generator, device=device, dtype=weights.dtype)
    cumulated = weights.cumsum(1)
    found = torch.searchsorted(cumulated, share.to(weights.device) * cumulated[:, -1:], right=True)[:, 0]
    # Rounding may point beyond the last place that has a chance.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).long().argmax(1)
    return torch.minimum(found, last)


def _patches(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    offsets = torch.arange(side, device=images.device)
    rows = (top[..., None] + offsets)[..., :, None]
    columns = (left[..., None] + offsets)[..., None, :]
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return images[samples, :, rows, columns].permute(0, 1, 4, 2, 3)
