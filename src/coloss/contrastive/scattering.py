"""An image encoder whose first layers are not learnt: the wavelet scattering transform, and a small residual network on its coefficients.

The wavelets come from the library kymatio: pip install 'coloss[scattering]'.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn.convolution import batch_norm, convolution
from coloss.nn.resnet import PostactivationBlock
from coloss.ops import without_autocast

Normalize = Literal["none", "log1p", "batchnorm"]
Blocks = Sequence[tuple[int, int]]

ADAPTERS: Mapping[int, tuple[int, tuple[tuple[int, int], ...]]] = MappingProxyType(
    {
        8: (32, ((64, 4), (128, 4))),
        12: (256, ((128, 4), (64, 4), (128, 4))),
        16: (256, ((128, 6), (64, 4), (128, 6))),
        30: (256, ((128, 30),)),
        45: (256, ((128, 15), (64, 15), (128, 15))),
    }
)
"""Stem width and blocks (width, number) of the published networks, by their number of blocks."""


def scattering_channels(scales: int, angles: int, order: int = 2) -> int:
    r"""Scattering coefficients at each position, for one channel of an image.

    $1 + LJ + L^2 J (J - 1) / 2$ for $J$ `scales` and $L$ `angles`: one local mean, one first-order coefficient for each wavelet, and one
    of second order for each pair of wavelets of rising scale; the last summand falls away with `order` 1.

    Args:
        scales: J >= 1.
        angles: L >= 1.
        order: 1 or 2.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> scattering_channels(2, 16), scattering_channels(1, 8), scattering_channels(2, 8, order=1)
        (289, 9, 17)
    """
    for name, value in (("scales", scales), ("angles", angles)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    pairs = angles**2 * scales * (scales - 1) // 2
    return 1 + angles * scales + (pairs if order == 2 else 0)


class ScatteringFront(nn.Module):
    r"""Scattering coefficients of images: what fixed wavelets of several scales and angles find around each position.

    $S_0 = x * \phi$, $S_1 = |x * \psi_\lambda| * \phi$, $S_2 = ||x * \psi_\lambda| * \psi_\mu| * \phi$ with Morlet wavelets $\psi$ and a
    low pass $\phi$ of width $2^J$, each channel by itself. Nothing is learnt. Small shifts and deformations change the coefficients
    little, and no two images move apart. The wavelets are made for the size of the first images of each size, on their device; they are
    no part of the state dict.

    Args:
        in_channels: of the images, >= 1.
        scales: J; the result has a 2^J times smaller height and width, rounded down.
        angles: L wavelets at each scale.
        order: 1 or 2.
        normalize: the coefficients' sizes differ by orders of magnitude. `"log1p"` takes sign(s) * log(1 + |s|); `"batchnorm"` standardises
            each channel, without parameters, by running statistics in evaluation; `"none"` leaves them as they are.

    Attributes:
        out_channels: `in_channels` * `scattering_channels(scales, angles, order)`; the coefficients of one input channel lie together.

    Returns:
        From `forward`, images (batch, channels, height, width): (batch, out_channels, height / 2^J, width / 2^J) in the type of the
        images. Computed in float32 always, also under autocast; float64 images are no exception.

    Raises:
        ValueError: for a value out of range, images with other channels, or a side below 2^J.
        InputError: if kymatio is not installed.

    Cost:
        One Fourier transform of the padded image for each coefficient: O(channels * coefficients * H W log(H W)). Nothing is stored for a
        backward pass unless the images ask for a gradient.

    Source:
        Bruna, Mallat, 2013, arXiv 1203.1513; kymatio: Andreux et al., 2020, arXiv 1812.11214.

    Examples:
        >>> front = ScatteringFront(3, scales=2, angles=4)
        >>> front.out_channels, front(torch.rand(2, 3, 32, 28)).shape
        (75, torch.Size([2, 75, 8, 7]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        scales: int = 2,
        angles: int = 8,
        *,
        order: int = 2,
        normalize: Normalize = "log1p",
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be >= 1, got {in_channels}")
        if normalize not in ("none", "log1p", "batchnorm"):
            raise ValueError(f'normalize must be "none", "log1p" or "batchnorm", got {normalize!r}')
        self.out_channels = in_channels * scattering_channels(scales, angles, order)
        self.in_channels, self.scales, self.angles, self.order = in_channels, scales, angles, order
        self.normalize = normalize
        self.norm = nn.BatchNorm2d(self.out_channels, affine=False) if normalize == "batchnorm" else None

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch coefficients out_height out_width"]:
        side = 2**self.scales
        batch, channels, height, width = images.shape
        if channels != self.in_channels:
            raise ValueError(f"images must have {self.in_channels} channels, got shape {tuple(images.shape)}")
        if min(height, width) < side:
            raise ValueError(
                f"images must be at least {side} pixels high and wide for {self.scales} scales, got {height} x {width}"
            )
        if batch == 0:
            return images.new_zeros(0, self.out_channels, height // side, width // side)
        transform = _transform(self.scales, self.angles, self.order, (height, width), images.device)
        with without_autocast(images.device):
            coefficients = transform(images.float().contiguous()).flatten(1, 2)
            if self.normalize == "log1p":
                coefficients = coefficients.sign() * coefficients.abs().log1p()
        coefficients = coefficients.to(images.dtype)
        return coefficients if self.norm is None else self.norm(coefficients)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, scales={self.scales}, angles={self.angles}, order={self.order}, normalize={self.normalize!r}"


class ResidualAdapter(nn.Module):
    """A small residual network that keeps the size of its maps: what is learnt on top of fixed features.

    A 3 x 3 convolution to `stem` channels with batch norm and ReLU, residual blocks of two convolutions without stride, then an average
    over a `pool` x `pool` grid, flattened.

    Args:
        in_channels: of the maps, >= 1.
        blocks: (width, number) of the residual blocks, in order; `ADAPTERS` holds the published ones.
        stem: channels of the first convolution.
        pool: cells of the grid in each direction, >= 1.

    Attributes:
        out_features: width of the last block * pool^2.

    Returns:
        From `forward`, maps (batch, in_channels, height, width): (batch, out_features).

    Raises:
        ValueError: for no blocks, or a number below 1.

    Examples:
        >>> stem, blocks = ADAPTERS[8]
        >>> adapter = ResidualAdapter(81, blocks, stem)
        >>> adapter.out_features, adapter(torch.rand(2, 81, 7, 7)).shape
        (2048, torch.Size([2, 2048]))
    """

    def __init__(
        self, in_channels: int, blocks: Blocks = ADAPTERS[12][1], stem: int = 256, pool: int = 4
    ) -> None:
        super().__init__()
        numbers = [number for pair in blocks for number in pair]
        if not numbers or min(in_channels, stem, pool, *numbers) < 1:
            raise ValueError(
                f"in_channels, stem, pool and at least one pair in blocks must be >= 1, "
                f"got {in_channels}, {stem}, {pool} and {list(blocks)}"
            )
        layers: list[nn.Module] = [
            convolution(2, in_channels, stem, 3, 1),
            batch_norm(2, stem),
            nn.ReLU(),
        ]
        channels = stem
        for width, count in blocks:
            for _ in range(count):
                layers.append(PostactivationBlock(channels, width, 1, 2, 3))
                channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten())
        self.out_features = channels * pool**2

    def forward(self, maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        return self.layers(maps)


class ScatteringEncoder(nn.Module):
    """A scattering front and a residual adapter as one encoder: fixed wavelets first, learnt layers after them.

    Args:
        in_channels: of the images.
        scales, angles, order, normalize: of the `ScatteringFront`; batch norm by default, since a network is learnt on top.
        blocks, stem, pool: of the `ResidualAdapter`.

    Attributes:
        front, adapter: its two parts.
        out_features: length of a feature vector.

    Returns:
        From `forward`, images (batch, in_channels, height, width): (batch, out_features).

    Raises:
        ValueError, InputError: as its parts.

    Source:
        Kinakh, Taran, Voloshynovskiy, 2021, arXiv 2108.13939.

    Examples:
        >>> encoder = ScatteringEncoder(1, angles=4, blocks=((16, 1),), stem=16, pool=2)
        >>> encoder(torch.rand(2, 1, 16, 16)).shape, encoder.out_features
        (torch.Size([2, 64]), 64)
    """

    def __init__(
        self,
        in_channels: int = 1,
        scales: int = 2,
        angles: int = 8,
        *,
        order: int = 2,
        normalize: Normalize = "batchnorm",
        blocks: Blocks = ADAPTERS[12][1],
        stem: int = 256,
        pool: int = 4,
    ) -> None:
        super().__init__()
        self.front = ScatteringFront(in_channels, scales, angles, order=order, normalize=normalize)
        self.adapter = ResidualAdapter(self.front.out_channels, blocks, stem, pool)
        self.out_features = self.adapter.out_features

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        return self.adapter(self.front(images))


def scattering_encoder(splits: Any) -> ScatteringEncoder:
    """A small scattering encoder that fits a data set of images, for `coloss compare TASK --model coloss.contrastive:scattering_encoder`.

    Two scales from 16 pixels on, else one; eight angles; two residual blocks; 256 features.

    Args:
        splits: a data set as `coloss.data.load` gives it; its `input_shape` is looked at.

    Raises:
        InputError: if its inputs are no images.

    Examples:
        >>> from coloss.data import load
        >>> splits = load("digits", limit=20)
        >>> scattering_encoder(splits)(splits.train.inputs).shape
        torch.Size([20, 256])
    """
    shape = tuple(splits.input_shape)
    if len(shape) != 3:
        raise InputError(
            f"a scattering encoder needs images (channels, height, width), got inputs of {shape}"
        )
    scales = 2 if min(shape[1:]) >= 16 else 1
    return ScatteringEncoder(shape[0], scales, blocks=((32, 1), (64, 1)), stem=32, pool=2)


@lru_cache(maxsize=16)
def _transform(scales: int, angles: int, order: int, size: tuple[int, int], device: torch.device) -> Any:
    """The wavelets of one size, which are constants; one copy serves all networks."""
    try:
        # The package's own entry point imports parts that recent versions of scipy have no functions for.
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
    except ImportError as error:
        raise InputError(
            "the scattering transform needs the package kymatio: pip install 'coloss[scattering]'"
        ) from error
    with torch.inference_mode(False):
        return ScatteringTorch2D(J=scales, shape=size, L=angles, max_order=order).to(device)
