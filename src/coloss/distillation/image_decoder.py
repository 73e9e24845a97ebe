"""Heads of local blocks on maps: one that rebuilds the input image, one that classifies through convolutions."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ImageDecoder(nn.Module):
    """Logits of an image's pixels from maps: bilinear to the image's size, two convolutions.

    Args:
        in_channels: of the maps.
        image_shape: (channels, height, width).
        hidden: channels between the convolutions.

    Returns:
        From `forward`: (batch, *image_shape), before the sigmoid.

    Source: Wang et al. 2021, arXiv 2101.10832 (InfoPro).

    Examples:
        >>> import torch
        >>> ImageDecoder(8, (1, 8, 8))(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, in_channels: int, image_shape: tuple[int, int, int], hidden: int = 12) -> None:
        super().__init__()
        self.size = image_shape[1:]
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, image_shape[0], 3, padding=1),
        )

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch colours rows columns"]:
        return self.layers(F.interpolate(maps, size=self.size, mode="bilinear", align_corners=True))


def convolutional_head(
    in_channels: int, num_outputs: int, convolutions: int = 2, hidden: int | None = 128
) -> nn.Sequential:
    """Convolutions with batch norm, the mean over positions, and one or two linear layers: "2c2f" in InfoPro's short names.

    Args:
        in_channels: of the maps, kept by the convolutions.
        num_outputs: of the last layer.
        convolutions: how many, >= 0.
        hidden: width between two linear layers; None has one linear layer.

    Raises:
        ValueError: if `convolutions` < 0.

    Examples:
        >>> import torch
        >>> convolutional_head(8, 10)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 10])
    """
    if convolutions < 0:
        raise ValueError(f"convolutions must be >= 0, got {convolutions}")
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [
            nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
        ]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if hidden is not None:
        layers += [nn.Linear(in_channels, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden or in_channels, num_outputs))
