"""Numbers in groups, each group on its own grid of 2^bits levels between its least and its greatest value, packed to the bit.

For a group with values x the stored zero and scale, both float16, and its codes are

    zero = min x, rounded down        scale = (max x - zero) / (2^bits - 1), rounded up
    code = round((x - zero) / scale)            value = zero + scale code                        (grid "ends")

Rounding zero and scale outwards keeps every value inside the grid, so that none is further than scale / 2 from what comes back. A group
whose values are all equal has scale 0 or next to it, and comes back as it was, to float16's precision: the division by a scale of 0, which
makes such groups NaN in common code, does not take place.

The grid "bins" cuts the range into 2^bits bins and gives back their middles; its b-bit codes are the top bits of its codes of more bits, so
going from 8 to 4 to 2 bits is the same as going to 2 at once, where the grid "ends" adds an error with each step.

The grouping follows KIVI (Liu et al. 2024, arXiv 2402.02750): keys have channels that stand out, so a group is a channel of some tokens; of
values a group is some channels of one token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from coloss.ops import pack_codes, unpack_codes
from coloss.ops.precision import full_precision

Grid = Literal["ends", "bins"]

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantizedGroups:
    """Numbers as packed codes with one scale and zero for each group; made by `quantize_groups`.

    Attributes:
        codes: packed codes of all numbers in the order of `shape`.
        scale: float16, of each group: `shape` with dimension `axis` divided by `group`.
        zero: float16, likewise.
        bits: of a code.
        group: numbers in a group.
        axis: the dimension that is cut into groups, counted from the end (negative).
        shape: of the numbers.
        dtype: in which they come back.
        grid: `"ends"` or `"bins"`.
    """

    codes: UInt8[Tensor, "bytes"]
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    axis: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: Grid

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.scale, self.zero))

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The numbers, each at most half a scale from what it was."""
        steps = self._codes().float()
        if self.grid == "bins":
            steps += 0.5
        grouped = steps.unflatten(self.axis, (-1, self.group))
        # After `unflatten`, the negative axis is that of a group's members.
        values = self.zero.float().unsqueeze(self.axis) + self.scale.float().unsqueeze(self.axis) * grouped
        return values.reshape(self.shape).to(self.dtype)

    def requantize(self, bits: int, valid: Bool[Tensor, "..."] | None = None) -> "QuantizedGroups":
        """The same numbers with fewer bits: from what comes back on the grid "ends", by leaving out low bits on the grid "bins".

        Args:
            bits: of the new codes, at most as many as now.
            valid: as for `quantize_groups`.

        Raises:
            ValueError: for more bits than there are; 1 bit on the grid "ends", for a group that spans more than 65,504.
        """
        if not 1 <= bits <= self.bits:
            raise ValueError(f"bits must be in 1..{self.bits}, got {bits}")
        if self.grid == "ends":
            # A scale rounded up may bring numbers at the end of float16's range back beyond it.
            numbers = self.dequantize().float().clamp(-_LARGEST, _LARGEST)
            found = quantize_groups(numbers, bits, self.group, axis=self.axis, valid=valid)
            return replace(found, dtype=self.dtype)
        dropped = self.bits - bits
        scale = self.scale.float() * 2**dropped
        codes = pack_codes(self._codes() >> dropped, bits)
        return replace(self, codes=codes, bits=bits, scale=scale.to(torch.float16))

    def joined(self, others: Sequence["QuantizedGroups"]) -> "QuantizedGroups":
        """One piece of several that follow one another in the last dimension but one, such as tokens; no number changes."""
        parts = [self, *others]
        codes = torch.cat([part._codes() for part in parts], dim=-2)
        return replace(
            self,
            codes=pack_codes(codes, self.bits),
            scale=torch.cat([part.scale for part in parts], dim=-2),
            zero=torch.cat([part.zero for part in parts], dim=-2),
            shape=tuple(codes.shape),
        )

    def _codes(self) -> Tensor:
        return unpack_codes(self.codes, self.bits, math.prod(self.shape)).view(self.shape)


def quantize_groups(
    x: Float[Tensor, "*shape"],
    bits: int,
    group: int,
    *,
    axis: int = -1,
    grid: Grid = "ends",
    valid: Bool[Tensor, "..."] | None = None,
) -> QuantizedGroups:
    """Cut one dimension into groups and write each on its own grid.

    Args:
        x: the numbers, of any floating type; computed in float32. A group with a NaN or an infinity comes back without a
            finite number.
        bits: of a code, in 1..8.
        group: numbers in a group; divides the size of dimension `axis`.
        axis: the dimension. For keys (batch, heads, tokens, channels) -2: each channel of `group` tokens; for values -1.
        grid: `"ends"`: the range's ends are levels. `"bins"`: levels are the middles of 2^bits equal bins, and fewer bits are a prefix of more.
        valid: False for numbers that may come back as anything (padding), which then have no say in their group's range; broadcasts to `x`.

    Returns:
        Packed codes, scales and zeros: `bits + 32 / group` bits a number.

    Raises:
        ValueError: for bits out of range, a group that does not divide the dimension, a number beyond float16's 65,504, or a group whose
            scale would be: one that spans more than 65,504 with 1 bit on the grid "ends".

    Cost: O(numbers) time; 8 bytes of working memory a number while packing.

    Source: Liu et al. 2024, arXiv 2402.02750 (KIVI); the guards and the grid "bins" are this project's.

    Examples:
        >>> stored = quantize_groups(
        ...     torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]), bits=2, group=4
        ... )
        >>> stored.codes.tolist(), stored.nbytes
        ([228, 0], 10)
        >>> stored.dequantize()
        tensor([[0., 1., 2., 3.],
                [5., 5., 5., 5.]])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")
    if grid not in ("ends", "bins"):
        raise ValueError(f'grid must be "ends" or "bins", got {grid!r}')
    axis = axis if axis < 0 else axis - x.ndim
    size = x.shape[axis]
    if group < 1 or size % group:
        raise ValueError(f"group must divide the {size} numbers of dimension {axis}, got {group}")
    x = x.detach()
    grouped = full_precision(x).float().unflatten(axis, (-1, group))
    low = high = grouped
    if valid is not None:
        counts = valid.expand(x.shape).unflatten(axis, (-1, group))
        low, high = grouped.masked_fill(~counts, torch.inf), grouped.masked_fill(~counts, -torch.inf)
        nothing = ~counts.any(axis, keepdim=True)
        low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
    finite = low.isfinite() & high.isfinite()
    largest = torch.maximum(low.abs(), high.abs()).masked_fill(~finite, 0)
    if bool((largest > _LARGEST).any()):
        raise ValueError(f"x must be within +-65,504, float16's range, got {float(largest.max()):.6g}")
    zero = _towards(low, -torch.inf)
    width = high - zero.float()
    scale = _scale(width, bits, grid)
    overflow = scale.isinf() & finite
    if bool(overflow.any()):
        raise ValueError(
            f"x must span at most 65,504 * (2^bits - 1) in a group, got {float(width[overflow].max()):.6g} for {bits} bits"
        )
    codes = _codes_of(grouped, zero.float(), scale.float(), bits, grid)
    return QuantizedGroups(
        codes=pack_codes(codes.reshape(-1), bits),
        scale=scale.squeeze(axis),
        zero=zero.squeeze(axis),
        bits=bits,
        group=group,
        axis=axis,
        shape=tuple(x.shape),
        dtype=x.dtype,
        grid=grid,
    )


def _scale(width: Tensor, bits: int, grid: Grid) -> Tensor:
    if grid == "ends":
        return _towards(width / (2**bits - 1), torch.inf)
    # The scale of 8 bits, times a power of two: the same whether the bits come at once or by leaving some out.
    finest = _towards(width / 2**8, torch.inf).float()
    return (finest * 2 ** (8 - bits)).to(torch.float16)


def _codes_of(grouped: Tensor, zero: Tensor, scale: Tensor, bits: int, grid: Grid) -> Tensor:
    steps = (grouped - zero) / torch.where(scale > 0, scale, 1.0)
    steps = steps.round() if grid == "ends" else steps.floor()
    # A NaN's code does not matter: its group's scale is NaN.
    return steps.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8)


def _towards(x: Tensor, end: float) -> Tensor:
    """The nearest float16 that is not on the other side of x than `end`."""
    near = x.to(torch.float16)
    beyond = near.float() > x if end < 0 else near.float() < x
    return torch.where(beyond, torch.nextafter(near, torch.full_like(near, end)), near)
