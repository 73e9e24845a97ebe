"""Triton where it is installed; without it the modules of kernels can be imported, though nothing in them runs."""

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, None

INSTALLED = triton is not None
# Kernels are then interpreted on the CPU, one program after the other, to check what they compute.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable[..., Any]) -> Any:
    """A function that kernels may call.

    Types are those of Triton: such functions bear `typing.no_type_check`.
    """
    return triton.jit(function) if INSTALLED else function


def kernel(key: list[str], *choices: tuple[dict[str, int], int, int]) -> Callable[[Callable[..., Any]], Any]:
    """A kernel, with the fastest of some block sizes; the interpreter takes the first.

    Args:
        key: arguments for each of whose values the choice is made anew, at the first call.
        choices: block sizes, number of warps, and number of stages of a pipelined loop.
    """

    def build(function: Callable[..., Any]) -> Any:
        if not INSTALLED:
            return function
        configs = [
            triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices
        ]
        return triton.autotune(configs[:1] if INTERPRETED else configs, key)(triton.jit(function))

    return build


def power_of_two(least: int, most: int, length: int) -> int:
    """The smallest power of two that holds a length, within two others.

    Examples:
        >>> power_of_two(16, 128, 3), power_of_two(16, 128, 65), power_of_two(16, 128, 300)
        (16, 128, 128)
    """
    return min(max(1 << (length - 1).bit_length(), least), most)
