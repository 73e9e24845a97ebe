"""What layers and networks cost, in multiply-adds: by formula for a layer, by counting for a whole forward pass."""

from math import prod
from typing import Any

from torch import nn

from coloss.metrics import evaluation_mode
from coloss.nn.operation_count import count_operations

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def multiply_adds_per_position(layer: nn.Module) -> int:
    """Multiplications of one output position: the cost of a layer whatever the size of its input.

    For an `nn.Sequential` of such layers, per position of its LAST layer: a layer before a stride counts once for
    each position that the stride skips. Borders and biases are not counted.

    Args:
        layer: linear layer, convolution, or `nn.Sequential` of these.

    Raises:
        ValueError: for anything else.

    Examples:
        >>> multiply_adds_per_position(nn.Conv2d(3, 8, 3)), multiply_adds_per_position(nn.Linear(10, 4))
        (216, 40)
        >>> multiply_adds_per_position(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 1, stride=2)))
        64
    """
    if isinstance(layer, nn.Sequential):
        total, positions = 0, 1
        for part in reversed(layer):
            total += positions * multiply_adds_per_position(part)
            positions *= prod(getattr(part, "stride", ()))
        return total
    if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        return layer.weight.numel()
    raise ValueError(
        f"layer must be linear, a convolution or an nn.Sequential of these, got {type(layer).__name__}"
    )


def multiply_adds(model: nn.Module, inputs: Any) -> int:
    """Multiplications of one forward pass, counted while it runs.

    Matrix products, convolutions and attention count; elementwise work does not. The model runs in eval mode,
    without gradients, and is left as it was.

    Args:
        model: any network.
        inputs: what it takes; the count is for this whole batch.

    Examples:
        >>> import torch
        >>> multiply_adds(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.rand(1, 3, 10, 10))
        21600
    """
    with evaluation_mode(model):
        return count_operations(lambda: model(inputs)) // 2
