"""A small residual network for small images and for series."""

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


class ResNet(nn.Module):
    """Residual blocks of two convolutions in stages of growing width, averaged over all positions at the end.

    After a stem (one convolution at full size), stage `s` holds `blocks[s]` blocks of `widths[s]` channels;
    every stage but the first begins with stride 2. A block adds a two-convolution branch `F` to its input:
    `relu(x + F(x))` with batch norm after each convolution, or, with `preactivation`, `x +
    F(relu(batch_norm(x)))`, where the identity path is never touched. Where the shape changes, a 1 x 1
    convolution takes the place of `x`.

    Args:
        in_channels: channels of the inputs.
        widths: channels of each stage.
        blocks: residual blocks in each stage.
        dims: 2 for images (batch, channels, height, width), 1 for series (batch, channels, length).
        kernel_size: odd size of the kernels.
        preactivation: norm and activation before each convolution instead of after it.

    Attributes:
        stem: the first layers.
        stages: `nn.Sequential` of the stages: tap `"stages.0"`, `"stages.1"` ... for intermediate maps.
        out_features: `widths[-1]`.

    Returns:
        From `forward`: (batch, out_features); from `forward_features`: the last map, before averaging.

    Raises:
        ValueError: for impossible widths, blocks, dims or kernel sizes, or inputs of another shape.

    Source: He et al. 2016, arXiv 1512.03385 section 4.2 (small-image form); arXiv 1603.05027 (preactivation).

    Examples:
        >>> import torch
        >>> from coloss.nn import ResNet
        >>> network = ResNet(3)
        >>> network(torch.rand(2, 3, 32, 32)).shape, network.forward_features(torch.rand(2, 3, 32, 32)).shape
        (torch.Size([2, 64]), torch.Size([2, 64, 8, 8]))
        >>> ResNet(12, (16, 32), (1, 1), dims=1, preactivation=True)(torch.rand(2, 12, 100)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (1, 1, 1),
        *,
        dims: Literal[1, 2] = 2,
        kernel_size: int = 3,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        widths, blocks = tuple(widths), tuple(blocks)
        check_architecture(in_channels, widths, dims, kernel_size)
        if len(blocks) != len(widths) or min(blocks) < 1:
            raise ValueError(f"blocks must be {len(widths)} integers >= 1, one for each width, got {blocks}")
        block_type = _PreactivationBlock if preactivation else PostactivationBlock
        self.stem = nn.Sequential(convolution(dims, in_channels, widths[0], kernel_size))
        if not preactivation:
            self.stem.extend([batch_norm(dims, widths[0]), nn.ReLU()])
        self.stages = nn.Sequential()
        channels = widths[0]
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Sequential()
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(block_type(channels, width, stride, dims, kernel_size))
                channels = width
            self.stages.append(stage)
        self.final = nn.Sequential(batch_norm(dims, channels), nn.ReLU()) if preactivation else nn.Identity()
        self.in_channels = in_channels
        self.dims = dims
        self.out_features = channels

    def forward_features(
        self, inputs: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch features *positions"]:
        """Maps of the last stage, before averaging over positions."""
        check_maps(inputs, self.in_channels, self.dims)
        return self.final(self.stages(self.stem(inputs)))

    def forward(self, inputs: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch features"]:
        return global_average_pool(self.forward_features(inputs))


class PostactivationBlock(nn.Module):
    """Two convolutions with batch norm beside a shortcut, ReLU after their sum: the block of the first residual networks.

    The shortcut is a 1 x 1 convolution with batch norm where the width or the resolution changes.

    Args:
        channels: of the input.
        width: of the output.
        stride: of the first convolution.
        dims: 1 for series, 2 for images.
        kernel_size: of both convolutions.

    Source: He et al. 2016, arXiv 1512.03385.

    Examples:
        >>> import torch
        >>> PostactivationBlock(4, 8, stride=2, dims=2, kernel_size=3)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, width: int, stride: int, dims: int, kernel_size: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            convolution(dims, channels, width, kernel_size, stride),
            batch_norm(dims, width),
            nn.ReLU(),
            convolution(dims, width, width, kernel_size),
            batch_norm(dims, width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                convolution(dims, channels, width, 1, stride), batch_norm(dims, width)
            )
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        return self.activation(self.shortcut(maps) + self.branch(maps))


class _PreactivationBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dims: int, kernel_size: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(batch_norm(dims, channels), nn.ReLU())
        self.branch = nn.Sequential(
            convolution(dims, channels, width, kernel_size, stride),
            batch_norm(dims, width),
            nn.ReLU(),
            convolution(dims, width, width, kernel_size),
        )
        self.projection = None
        if stride != 1 or channels != width:
            self.projection = convolution(dims, channels, width, 1, stride)

    def forward(self, maps: Tensor) -> Tensor:
        activated = self.activate(maps)
        shortcut = maps if self.projection is None else self.projection(activated)
        return shortcut + self.branch(activated)
