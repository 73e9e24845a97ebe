"""A prediction for a long series as the mean over crops of the length a network was trained on."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def crop_average(
    model: nn.Module, inputs: Float[Tensor, "batch channels steps"], size: int, stride: int
) -> Float[Tensor, "batch *outputs"]:
    """Mean output of a network over evenly spaced crops of a series.

    Crops begin at 0, stride, 2 stride, ... and, where the last of these ends before the series does, one more ends with it, so that
    with stride <= size every step is seen. Modes and gradients are as they are: call `model.eval()` and use `torch.no_grad()`, or see
    `coloss.metrics.evaluation_mode`.

    Args:
        model: gives one tensor for a batch of series of `size` steps, such as logits or features.
        inputs: series of one length.
        size: steps of a crop, in [1, steps].
        stride: steps between beginnings, >= 1.

    Returns:
        The mean over crops of what the model gives, in its shape.

    Raises:
        ValueError: for a size or stride out of range.

    Cost:
        One forward pass of batch * crops series.

    Source:
        Weimann and Conrad, 2024 (ECG-JEPA), arXiv 2410.13867 (crops of 2.5 s, 1.25 s apart).

    Examples:
        >>> series = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]])
        >>> crop_average(nn.Flatten(), series, size=2, stride=2)
        tensor([[1.6667, 2.6667]])
    """
    steps = inputs.shape[-1]
    if not 1 <= size <= steps:
        raise ValueError(f"size must be in [1, {steps}], the steps of the series, got {size}")
    if stride < 1:
        raise ValueError(f"stride must be >= 1, got {stride}")
    starts = list(range(0, steps - size + 1, stride))
    if starts[-1] + size < steps:
        starts.append(steps - size)
    outputs = model(torch.cat([inputs[..., start : start + size] for start in starts]))
    return outputs.unflatten(0, (len(starts), len(inputs))).mean(0)
