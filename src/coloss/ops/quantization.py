"""Values on a uniform grid, with gradients: rounding, learned step sizes, and integers that are rounded a second time to fewer bits.

Signed integers of b bits are -2^(b-1) .. 2^(b-1) - 1, unsigned ones 0 .. 2^b - 1; the zero point is 0. Ties: a real number is rounded
half to even, as `torch.round` does; an integer that loses bits is rounded half up, as the shift `(code + 2^(D-1)) >> D` does.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from .gradients import straight_through
from .precision import full_precision

SecondRounding: TypeAlias = Literal["nearest", "floor", "middle"]


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest integers, half to even, through which gradients pass unchanged.

    Args:
        x: any values.

    Source:
        Bengio, Leonard, Courville 2013, arXiv 1308.3432.

    Examples:
        >>> x = torch.tensor([0.5, 1.5, -0.7], requires_grad=True)
        >>> round_ste(x).sum().backward()
        >>> round_ste(x).tolist(), x.grad.tolist()
        ([0.0, 2.0, -1.0], [1.0, 1.0, 1.0])
    """
    return straight_through(x.detach().round(), x)


def integer_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest integer of so many bits.

    Args:
        bits: 2..8; 1 too for unsigned ones.
        signed: two's complement, or from 0.

    Raises:
        ValueError: for other bits.

    Examples:
        >>> integer_range(2), integer_range(4, signed=False)
        ((-2, 1), (0, 15))
    """
    least = 2 if signed else 1
    if not least <= bits <= 8:
        raise ValueError(f"bits must be in {least}..8, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def fake_quantize(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "*scales"], bits: int, *, signed: bool = True
) -> Float[Tensor, "*shape"]:
    """Values moved to the nearest of 2^b levels s n .. s p, with the gradient of a learned step size (LSQ).

    y = s clip(round(x / s), n, p). With v = x / s the gradients are

        dy/dx   1 where n < v < p, else 0
        dy/ds   round(v) - v where n < v < p, else n or p

    Multiply the second by LSQ's 1 / sqrt(entries p) with `scale_gradient(scale, ...)`.

    Args:
        x: any values; half precision is computed in float32 and returned as it came.
        scale: s > 0, one number or a shape that spreads to that of `x`.
        bits: b in 2..8, also 1 for unsigned integers.
        signed: whether the integers have a sign; unsigned ones suit what a ReLU gives.

    Returns:
        Quantised values in the type of `x`. NaN stays NaN.

    Raises:
        ValueError: for other bits, or a scale that does not spread to `x`.

    Cost: two tensors of the size of `x` are kept for the backward pass. Once differentiable.

    Source:
        Esser et al. 2020 (LSQ), arXiv 1902.08153.

    Examples:
        >>> x, scale = torch.tensor([0.3, 9.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
        >>> fake_quantize(x, scale, bits=2).tolist()
        [0.5, 0.5]
        >>> fake_quantize(x, scale, bits=2).sum().backward()
        >>> x.grad.tolist(), round(scale.grad.item(), 3)
        ([1.0, 0.0], 1.4)
    """
    low, high = integer_range(bits, signed)
    values, _ = _quantize(x, scale, low, high, 0, "nearest")
    return values


def double_round(
    weight: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*scales"],
    high_bits: int,
    bits: int,
    rounding: SecondRounding = "nearest",
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Integers of h bits, rounded once more to l <= h bits, and the values they stand for: one stored integer serves all precisions.

    With D = h - l and [n_b, p_b] the signed range of b bits,

        W_h = clip(round(W / s), n_h, p_h)
        W_l = clip(floor(W_h / 2^D + 1/2), n_l, p_l)        as the shift (W_h + 2^(D-1)) >> D
        y   = W_l 2^D s

    and with v = W / s the gradients are those of one quantiser with the composed rounding: dy/dW = 1 where n_l 2^D < v < p_l 2^D, else
    0; dy/ds = W_l 2^D - v there, else n_l 2^D or p_l 2^D. At l = h this is `fake_quantize`.

    Args:
        weight: W, any values; half precision is computed in float32.
        scale: s > 0 of the h-bit integers, one number or a shape that spreads to that of `weight`.
        high_bits: h in 2..8.
        bits: l in 2..h.
        rounding: "nearest"; "floor" cuts the lowest bits off (W_h >> D), which moves all values down by half a step on average; "middle"
            cuts them off and puts (2^D - 1) / 2 back, the mean of the integers that become one.

    Returns:
        The integers W_l, and y in the type of `weight`.

    Raises:
        ValueError: for bits out of range, an unknown rounding, or a scale that does not spread to `weight`.

    Cost: as `fake_quantize`. Once differentiable.

    Source:
        Double Rounding 2025, arXiv 2502.01199. The gradient of the scale through both roundings is this library's reading: the paper prints
        it for one quantiser.

    Examples:
        >>> weight = torch.tensor([0.30, 0.24, -0.90])
        >>> codes, values = double_round(weight, torch.tensor(0.01), high_bits=8, bits=4)
        >>> codes.tolist(), [round(value, 2) for value in values.tolist()]
        ([2, 2, -6], [0.32, 0.32, -0.96])
    """
    shift = _shift(high_bits, bits, rounding)
    low, high = integer_range(high_bits)
    values, codes = _quantize(weight, scale, low, high, shift, rounding)
    return codes, values


def shift_codes(
    codes: Int[Tensor, "*shape"], high_bits: int, bits: int, rounding: SecondRounding = "nearest"
) -> Int8[Tensor, "*shape"]:
    """Stored integers with fewer bits, by integer arithmetic alone: the second half of `double_round`, equal to it in every entry.

    Args:
        codes: signed integers of `high_bits` bits.
        high_bits: 2..8.
        bits: 2..`high_bits`.
        rounding: as in `double_round`.

    Raises:
        ValueError: for bits out of range or an unknown rounding.

    Examples:
        >>> shift_codes(torch.tensor([24, 23, -24, -25, 127]), high_bits=8, bits=4).tolist()
        [2, 1, -1, -2, 7]
    """
    shift = _shift(high_bits, bits, rounding)
    low, high = integer_range(bits)
    offset = 2 ** (shift - 1) if shift and rounding == "nearest" else 0
    return ((codes.int() + offset) >> shift).clamp(low, high).to(torch.int8)


def code_values(
    codes: Int[Tensor, "*shape"],
    scale: Float[Tensor, "*scales"],
    high_bits: int,
    bits: int,
    rounding: SecondRounding = "nearest",
) -> Float[Tensor, "*shape"]:
    """What integers of `bits` bits stand for, equal to the values of `double_round` bit for bit, for weights of the same type.

    Args:
        codes: as `shift_codes` gives them.
        scale: of the integers of `high_bits` bits.
        high_bits, bits, rounding: as there.

    Returns:
        Values in the type of the scale, in float32 where that is a half-precision one.

    Raises:
        ValueError: for bits out of range or an unknown rounding.

    Examples:
        >>> code_values(torch.tensor([2, -1]), torch.tensor(0.5), high_bits=8, bits=6).tolist()
        [4.0, -2.0]
    """
    shift = _shift(high_bits, bits, rounding)
    scale = full_precision(scale)
    return (codes.to(scale.dtype) * 2.0**shift + _offset(shift, rounding)) * scale


def _offset(shift: int, rounding: str) -> float:
    return (2**shift - 1) / 2 if rounding == "middle" else 0.0


def check_rounding(rounding: str) -> None:
    """Refuse an unknown second rounding.

    Raises:
        ValueError: unless it is "nearest", "floor" or "middle".
    """
    if rounding not in get_args(SecondRounding):
        raise ValueError(f'rounding must be "nearest", "floor" or "middle", got {rounding!r}')


def _shift(high_bits: int, bits: int, rounding: str) -> int:
    """By how many bits integers get narrower."""
    integer_range(bits)
    integer_range(high_bits)
    if bits > high_bits:
        raise ValueError(f"bits must be <= high_bits {high_bits}, got {bits}")
    check_rounding(rounding)
    return high_bits - bits


def _quantize(
    x: Tensor, scale: Tensor, low: int, high: int, shift: int, rounding: str
) -> tuple[Tensor, Tensor]:
    try:
        spread = torch.broadcast_shapes(x.shape, scale.shape)
    except RuntimeError:
        spread = torch.Size([-1])
    if spread != x.shape:
        raise ValueError(
            f"scale must spread to the shape {tuple(x.shape)} of the values, got {tuple(scale.shape)}"
        )
    # A half-precision scale would move the grid itself.
    full = full_precision(x)
    values, codes = _Quantize.apply(full, scale.to(full.dtype), low, high, shift, rounding)
    return values.to(x.dtype), codes


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, shift: int, rounding: str
    ) -> tuple[Tensor, Tensor]:
        steps = x / scale
        codes = steps.round().clamp(low, high)
        if shift:
            half = 0.5 if rounding == "nearest" else 0.0
            codes = (codes * 2.0**-shift + half).floor()
            codes = codes.clamp(low >> shift, high >> shift)
        units = codes * 2.0**shift + _offset(shift, rounding)
        # Cutting bits off clips nowhere; rounding up clips at the highest level.
        ends = (low, (high >> shift) << shift) if rounding == "nearest" else (low, high)
        ctx.save_for_backward(steps, units)
        ctx.ends, ctx.shape = ends, scale.shape
        integers = codes.to(torch.int8) if low < 0 else codes.to(torch.uint8)
        ctx.mark_non_differentiable(integers)
        return units * scale, integers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, units = ctx.saved_tensors
        low, high = ctx.ends
        inside = (steps > low) & (steps < high)
        gradient = gradients[0]
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * (units - steps.masked_fill(~inside, 0.0))).sum_to_size(ctx.shape)
        return gradient.masked_fill(~inside, 0.0), of_scale, None, None, None, None
