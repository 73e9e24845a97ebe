"""Random colours and blurs of images, with the factors that were used."""

import math

from jaxtyping import Float
from torch import Tensor

from coloss.jepa.known_transforms import KnownTransform
from coloss.ops import full_precision, without_autocast

Images = Float[Tensor, "batch channels height width"]
# The red, green and blue parts of brightness (ITU-R BT.601).
_GREY = (0.299, 0.587, 0.114)


class ColourChanges(KnownTransform):
    """Images with other brightness, contrast, saturation and hue, clamped to [0, 1].

    In this order: times a brightness factor; away from the mean grey of the image by a contrast factor; away from each pixel's grey by a
    saturation factor; hue turned by an angle in radians (kornia).

    Args:
        brightness, contrast, saturation: factors are uniform in [1 - value, 1 + value], in [0, 1]; 0 leaves it, and gives no parameter.
        hue: angles are uniform in [-hue, hue] turns, in [0, 0.5].

    Raises:
        ValueError: for a value out of bounds, or saturation and hue of images that have not three channels.

    Examples:
        >>> import torch
        >>> transform = ColourChanges(hue=0.0)
        >>> images, factors = transform(torch.rand(5, 3, 8, 8))
        >>> transform.names, factors.shape
        (('brightness', 'contrast', 'saturation'), torch.Size([5, 3]))
    """

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
    ) -> None:
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in factors.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {hue}")
        turn = 2 * math.pi * hue
        super().__init__({name: (1 - v, 1 + v) for name, v in factors.items()} | {"hue": (-turn, turn)})

    def apply(self, images: Images, parameters: Float[Tensor, "batch parameters"]) -> Images:
        found = {name: parameters[:, place, None, None, None] for place, name in enumerate(self.names)}
        coloured = images.shape[1] == 3
        if not coloured and ("saturation" in found or "hue" in found):
            raise ValueError(f"saturation and hue must be 0 without three channels, got {images.shape[1]}")
        values = full_precision(images)
        if "brightness" in found:
            values = (values * found["brightness"]).clamp(0, 1)
        weights = values.new_tensor(_GREY).view(1, 3, 1, 1) if coloured else None
        if "contrast" in found:
            grey = _grey(values, weights).mean((1, 2, 3), keepdim=True)
            values = (grey + (values - grey) * found["contrast"]).clamp(0, 1)
        if "saturation" in found:
            grey = _grey(values, weights)
            values = (grey + (values - grey) * found["saturation"]).clamp(0, 1)
        if "hue" in found:
            from kornia.enhance import adjust_hue

            with without_autocast(values.device):
                values = adjust_hue(values, found["hue"].flatten()).clamp(0, 1)
        return values.to(images.dtype)


class Blurs(KnownTransform):
    """Images blurred by a Gaussian of known standard deviation in pixels (kornia), with reflected borders.

    Args:
        sigma: lowest and highest, > 0.
        kernel_size: odd, >= 3; about 6 times the highest sigma covers it.

    Raises:
        ValueError: for a value out of bounds, or images of less than half the kernel's side.

    Examples:
        >>> import torch
        >>> images, sigmas = Blurs((0.1, 2.0))(torch.rand(5, 1, 16, 16))
        >>> images.shape, sigmas.shape
        (torch.Size([5, 1, 16, 16]), torch.Size([5, 1]))
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), kernel_size: int = 9) -> None:
        if not sigma[0] > 0:
            raise ValueError(f"sigma must be > 0, got {sigma}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and >= 3, got {kernel_size}")
        super().__init__({"sigma": sigma})
        self.kernel_size = kernel_size

    def apply(self, images: Images, parameters: Float[Tensor, "batch 1"]) -> Images:
        side = min(images.shape[2:])
        if self.kernel_size >= 2 * side:
            raise ValueError(
                f"kernel_size must be at most {2 * side - 1} for images of side {side}, got {self.kernel_size}"
            )
        from kornia.filters import gaussian_blur2d

        values = full_precision(images)
        size = (self.kernel_size, self.kernel_size)
        with without_autocast(values.device):
            return gaussian_blur2d(values, size, parameters.to(values).expand(-1, 2)).to(images.dtype)


def _grey(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(1, keepdim=True) if weights is None else (values * weights).sum(1, keepdim=True)
