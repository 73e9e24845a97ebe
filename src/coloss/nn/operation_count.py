"""Floating-point operations of a piece of work, counted while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_operations(work: Callable[[], Any]) -> int:
    """How many floating-point operations something takes, two for each multiplication of a matrix product or convolution.

    Attention counts as two plain products over all places, masked or not, whichever kernel would run it otherwise; torch's counter knows
    nothing of the fused one of CPUs, nor of the fused layers that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in eval mode.
    Element-wise work is left out.

    Args:
        work: called once.

    Examples:
        >>> import torch
        >>> count_operations(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    with operation_counter() as counter:
        work()
    return counter.get_total_flops()


@contextmanager
def operation_counter() -> Iterator[FlopCounterMode]:
    """Torch's counter, with the rules of `count_operations`, for those who ask it for the counts of single modules.

    Examples:
        >>> import torch
        >>> with operation_counter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> counter.get_total_flops()
        60
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
