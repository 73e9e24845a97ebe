"""Tiny networks that find a body in a picture: a heatmap for each joint, a mask of the whole figure; and the points that heatmaps mean."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import full_precision

STRIDE = 2
"""Pixels of a picture to one of a map, along each side."""


class FigureNetwork(nn.Module):
    """Five convolutions with batch norm down to an eighth of the size and back, which give maps at half the picture's size.

    Args:
        maps: that it gives, >= 1.
        width: channels at half size, >= 1.
        channels: of a picture.

    Returns:
        From `forward(images)`: maps (batch, maps, ceil(height / 2), ceil(width / 2)) of any real values.

    Raises:
        InputError: for a size < 1.

    Examples:
        >>> FigureNetwork(15)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 15, 16, 16])
    """

    def __init__(self, maps: int, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        for name, value in (("maps", maps), ("width", width), ("channels", channels)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        self.at_half = _layer(channels, width, 2)
        self.at_quarter = _layer(width, 2 * width, 2)
        self.at_eighth = _layer(2 * width, 4 * width, 2)
        self.up_quarter = _layer(6 * width, 2 * width, 1)
        self.up_half = _layer(3 * width, width, 1)
        self.head = nn.Conv2d(width, maps, 3, padding=1)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch maps map_height map_width"]:
        half = self.at_half(images)
        quarter = self.at_quarter(half)
        up = self.up_quarter(torch.cat([quarter, _resized(self.at_eighth(quarter), quarter)], 1))
        return self.head(self.up_half(torch.cat([half, _resized(up, half)], 1)))


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _resized(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, like.shape[2:], mode="bilinear", align_corners=False)


def joint_heatmaps(
    points: Float[Tensor, "frames joints 2"],
    size: int | tuple[int, int],
    *,
    visible: Bool[Tensor, "frames joints"] | None = None,
    stride: int = STRIDE,
    sigma: float = 1.0,
) -> Float[Tensor, "frames joints map_height map_width"]:
    """The maps that a network should give: at each joint a Gaussian of height 1.

    Args:
        points: in pixels of the picture, x and y, (0, 0) in the middle of the upper left one; NaN for a joint that is not there.
        size: of the picture: a side, or (height, width).
        visible: joints to show; the map of another one, or of one that is not there, is 0.
        stride: pixels to one of the map.
        sigma: of the Gaussian in pixels of the map, > 0.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> joint_heatmaps(torch.tensor([[[4.5, 2.5]]]), 8)[0, 0].argmax().item()  # row 1, column 2 of 4 x 4
        6
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width, stride) < 1:
        raise InputError(f"size and stride must be >= 1, got {size} and {stride}")
    if not 0 < sigma < torch.inf:
        raise InputError(f"sigma must be > 0 and finite, got {sigma}")
    there = points.isfinite().all(-1)
    if visible is not None:
        there = there & visible
    x, y = ((points.nan_to_num() + 0.5) / stride - 0.5).unbind(-1)
    rows = torch.arange(-(-height // stride), dtype=points.dtype, device=points.device)
    columns = torch.arange(-(-width // stride), dtype=points.dtype, device=points.device)
    down = (-(rows - y[..., None]).square() / (2 * sigma**2)).exp()
    across = (-(columns - x[..., None]).square() / (2 * sigma**2)).exp()
    return down[..., :, None] * across[..., None, :] * there[..., None, None]


def heatmap_points(
    heatmaps: Float[Tensor, "frames joints height width"], *, stride: int = STRIDE, reach: int = 1
) -> Float[Tensor, "frames joints 2"]:
    """Where each heatmap has its peak, finer than its pixels: the centre of mass of what is positive around the largest value.

    Args:
        heatmaps: of any real values.
        stride: pixels of the picture to one of the map.
        reach: pixels of the map on each side of the peak that count, >= 0.

    Returns:
        x and y in pixels of the picture; NaN where the largest value is not above 0 or a value is NaN.

    Raises:
        InputError: for a stride < 1 or a reach < 0.

    Examples:
        >>> points = torch.tensor([[[4.0, 3.0]]])
        >>> (heatmap_points(joint_heatmaps(points, 12)) - points).abs().max().item() < 0.3
        True
    """
    if stride < 1 or reach < 0:
        raise InputError(f"stride must be >= 1 and reach >= 0, got {stride} and {reach}")
    maps = full_precision(heatmaps)
    height, width = maps.shape[2:]
    peak, place = maps.flatten(2).max(2)
    row, column = place // width, place % width
    rows = torch.arange(height, device=maps.device)
    columns = torch.arange(width, device=maps.device)
    near_row = ((rows - row[..., None]).abs() <= reach).to(maps.dtype)
    near_column = ((columns - column[..., None]).abs() <= reach).to(maps.dtype)
    mass = maps.clamp(min=0) * near_row[..., :, None] * near_column[..., None, :]
    total = mass.sum((2, 3))
    x = (mass.sum(2) * columns).sum(2) / total
    y = (mass.sum(3) * rows).sum(2) / total
    points = (torch.stack([x, y], -1) + 0.5) * stride - 0.5
    return points.masked_fill(~(peak > 0)[..., None], torch.nan)


def joint_error(
    found: Float[Tensor, "frames joints 2"],
    truth: Float[Tensor, "frames joints 2"],
    visible: Bool[Tensor, "frames joints"],
    *,
    missed: float,
) -> float:
    """Mean distance in pixels of the joints found from the true ones, over visible joints.

    Args:
        found: NaN where a network found nothing.
        truth: exact.
        visible: joints that count.
        missed: distance that a visible joint costs that was not found; also the largest that any joint costs.

    Returns:
        Pixels; NaN if no joint is visible.

    Raises:
        InputError: if `missed` is not > 0.

    Examples:
        >>> truth, seen = torch.zeros(1, 3, 2), torch.tensor([[True, True, False]])
        >>> joint_error(torch.tensor([[[3.0, 4.0], [torch.nan, 0.0], [9.0, 9.0]]]), truth, seen, missed=9.0)
        7.0
    """
    if not missed > 0:
        raise InputError(f"missed must be > 0, got {missed}")
    distance = (found - truth).norm(dim=-1).nan_to_num(missed).clamp(max=missed)
    return float(distance[visible].mean())


def visible_heatmap_loss(
    heatmaps: Float[Tensor, "batch joints height width"], truth: Float[Tensor, "batch joints height width"]
) -> Float[Tensor, ""]:
    """What trains a heatmap network: squared error, ten times as strong where the truth is above 0.1, so that empty maps are no way out.

    Examples:
        >>> visible_heatmap_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]]))
        tensor(5.)
    """
    return ((1 + 9 * (truth > 0.1)) * (heatmaps - truth).square()).mean()


class MaskNetwork(FigureNetwork):
    """A `FigureNetwork` whose maps are brought to the picture's size: logits of a mask for each class, by default of the one figure.

    Examples:
        >>> MaskNetwork()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(self, maps: int = 1, width: int = 8, channels: int = 3) -> None:
        super().__init__(maps, width, channels)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch maps height width"]:
        return _resized(super().forward(images), images)
