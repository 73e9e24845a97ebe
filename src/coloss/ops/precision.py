"""In which precision a loss or a statistic is computed, decided in one place.

Losses sum many small terms, so they are computed in float32 even where the network runs in half precision,
and in float64 where the caller works in float64.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def full_precision(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision values as float32; float32 and float64 values as they are, without a copy.

    The gradient flows back in the precision of the input.

    Args:
        x: float16, bfloat16, float32 or float64 tensor.

    Returns:
        The same values as float32 or float64.

    Examples:
        >>> full_precision(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest float type in which a device can accumulate sums: float64, on Apple's MPS float32.

    Args:
        device: where the sum is taken.

    Returns:
        A floating point type.

    Examples:
        >>> accumulation_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products on a device keep the precision of their inputs.

    Under `torch.autocast` a product of float32 matrices is computed in half precision, which is too coarse
    for a similarity that is then divided by a small temperature.

    Args:
        device: where the products are computed.

    Returns:
        A context manager.

    Examples:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast(x.device):
        ...     (x @ x).dtype
        torch.float32
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
