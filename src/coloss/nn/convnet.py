"""A plain convolutional network for small images and for series."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from coloss.nn.convolution import (
    batch_norm,
    check_architecture,
    check_maps,
    convolution,
    global_average_pool,
)


class ConvNet(nn.Module):
    """A stack of convolution, batch norm and ReLU stages, averaged over all positions at the end.

    Stage `s` is `relu(batch_norm(convolution(x)))` with `widths[s]` channels. A stage that downsamples does
    so with stride 2 (`n -> ceil(n / 2)` positions per dimension), so any input size works.

    Args:
        in_channels: channels of the inputs.
        widths: channels of each stage.
        kernel_size: odd size of every kernel.
        dims: 2 for images (batch, channels, height, width), 1 for series (batch, channels, length).
        downsample: `True` halves the size at every stage but the first, `False` nowhere; a sequence says it
            for each stage.

    Attributes:
        stages: `nn.Sequential` of the stages: tap `"stages.0"`, `"stages.1"` ... for intermediate maps.
        out_features: `widths[-1]`.

    Returns:
        From `forward`: (batch, out_features); from `forward_features`: the last map, before averaging.

    Raises:
        ValueError: for impossible widths, dims or kernel sizes, or inputs of another shape.

    Examples:
        >>> import torch
        >>> from coloss.nn import ConvNet
        >>> network = ConvNet(1, (16, 32))
        >>> network(torch.rand(5, 1, 8, 8)).shape, network.forward_features(torch.rand(5, 1, 8, 8)).shape
        (torch.Size([5, 32]), torch.Size([5, 32, 4, 4]))
        >>> ConvNet(3, (16, 32), dims=1)(torch.rand(5, 3, 50)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int] = (32, 32, 32),
        *,
        kernel_size: int = 3,
        dims: Literal[1, 2] = 2,
        downsample: bool | Sequence[bool] = True,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        check_architecture(in_channels, widths, dims, kernel_size)
        if isinstance(downsample, bool):
            halves = [downsample and stage > 0 for stage in range(len(widths))]
        else:
            halves = list(downsample)
        if len(halves) != len(widths):
            raise ValueError(f"downsample must say yes or no for {len(widths)} stages, got {len(halves)}")
        self.stages = nn.Sequential()
        channels = in_channels
        for width, halve in zip(widths, halves, strict=True):
            layer = convolution(dims, channels, width, kernel_size, stride=2 if halve else 1)
            self.stages.append(nn.Sequential(layer, batch_norm(dims, width), nn.ReLU()))
            channels = width
        self.in_channels = in_channels
        self.dims = dims
        self.out_features = channels

    def forward_features(
        self, inputs: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch features *positions"]:
        """Maps of the last stage, before averaging over positions."""
        check_maps(inputs, self.in_channels, self.dims)
        return self.stages(inputs)

    def forward(self, inputs: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch features"]:
        return global_average_pool(self.forward_features(inputs))
