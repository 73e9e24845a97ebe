"""The convolution pieces that image and series backbones share, by number of spatial dimensions."""

from jaxtyping import Float
from torch import Tensor, nn


def convolution(
    dims: int, channels_in: int, channels_out: int, kernel_size: int, stride: int = 1
) -> nn.Module:
    """A bias-free convolution over `dims` dimensions that keeps the size at stride 1, with He initialisation.

    Source: He et al. 2015, arXiv 1502.01852 (normal weights of variance 2 / (channels_out * kernel volume)).

    Examples:
        >>> import torch
        >>> convolution(1, 3, 8, 5, stride=2)(torch.rand(2, 3, 9)).shape
        torch.Size([2, 8, 5])
    """
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](
        channels_in, channels_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
    )
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch normalisation for maps with `dims` spatial dimensions.

    Examples:
        >>> type(batch_norm(2, 8)).__name__
        'BatchNorm2d'
    """
    return (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](channels)


def global_average_pool(maps: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels"]:
    """The mean of each channel over all positions.

    Examples:
        >>> import torch
        >>> global_average_pool(torch.arange(8.0).reshape(1, 2, 2, 2))
        tensor([[1.5000, 5.5000]])
    """
    return maps.flatten(2).mean(2)


def check_architecture(in_channels: int, widths: tuple[int, ...], dims: int, kernel_size: int) -> None:
    """Reject arguments that no convolutional backbone accepts.

    Raises:
        ValueError: naming the argument, the rule and the value.

    Examples:
        >>> check_architecture(1, (8,), dims=3, kernel_size=3)
        Traceback (most recent call last):
        ValueError: dims must be 1 (series) or 2 (images), got 3
    """
    if dims not in (1, 2):
        raise ValueError(f"dims must be 1 (series) or 2 (images), got {dims}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be >= 1, got {in_channels}")
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be one or more integers >= 1, got {widths}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and >= 1, got {kernel_size}")


def check_maps(inputs: Tensor, in_channels: int, dims: int) -> None:
    """Reject a batch of another rank or number of channels than the backbone was built for.

    Raises:
        ValueError: with the expected and the given shape.

    Examples:
        >>> import torch
        >>> check_maps(torch.rand(4, 8, 8), in_channels=1, dims=2)
        Traceback (most recent call last):
        ValueError: inputs must have shape (batch, 1, height, width), got (4, 8, 8)
    """
    if inputs.ndim != dims + 2 or inputs.shape[1] != in_channels:
        space = "length" if dims == 1 else "height, width"
        raise ValueError(f"inputs must have shape (batch, {in_channels}, {space}), got {tuple(inputs.shape)}")
