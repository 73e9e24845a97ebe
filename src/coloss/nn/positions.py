"""Position vectors for tokens: fixed sine-cosine tables in one or two dimensions, learned tables, or none."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

PositionKind = Literal["learned", "sinusoidal"] | None


def sinusoidal_positions(
    grid: int | Sequence[int], dim: int, *, base: float = 10000.0
) -> Float[Tensor, "positions dim"]:
    r"""A fixed vector of sines and cosines for each position of a sequence or of a grid.

    For a sequence, position `p` gets `[sin(p w_0), ..., sin(p w_{h-1}), cos(p w_0), ..., cos(p w_{h-1})]`
    with `h = dim / 2` and `w_k = base^{-k / h}`. For a grid of `n` axes the vector is the concatenation of
    one such part of `dim / n` values per axis, and positions are listed in row-major order.

    Args:
        grid: number of positions, or number of positions along each axis.
        dim: size of a vector; a multiple of twice the number of axes.
        base: ratio of the slowest to the fastest wavelength.

    Returns:
        (product of grid, dim), float32; every vector has squared norm `dim / 2`.

    Raises:
        ValueError: for an axis without positions, a `dim` that does not divide, or `base <= 0`.

    Source: Vaswani et al. 2017, arXiv 1706.03762 section 3.5; halves instead of interleaved pairs, as is
        usual.

    Examples:
        >>> sinusoidal_positions(2, 4)
        tensor([[0.0000, 0.0000, 1.0000, 1.0000],
                [0.8415, 0.0100, 0.5403, 0.9999]])
        >>> sinusoidal_positions((3, 5), 8).shape
        torch.Size([15, 8])
    """
    axes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not axes or min(axes) < 1:
        raise ValueError(f"grid must hold at least one position along each axis, got {grid}")
    if dim < 1 or dim % (2 * len(axes)):
        raise ValueError(f"dim must be a multiple of {2 * len(axes)} for {len(axes)} axes, got {dim}")
    if not base > 0:
        raise ValueError(f"base must be > 0, got {base}")
    half = dim // (2 * len(axes))
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    coordinates = torch.cartesian_prod(*[torch.arange(axis, dtype=torch.float64) for axis in axes])
    angles = coordinates.reshape(math.prod(axes), len(axes), 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


class PositionTable(nn.Module):
    """Adds one vector per position to a sequence of tokens.

    Args:
        grid: number of positions along each axis; tokens come in row-major order.
        dim: size of a token.
        kind: `"learned"` (a parameter, initialised at 0.02 times a truncated normal), `"sinusoidal"` (fixed,
            see `sinusoidal_positions`, recomputed rather than saved), or `None` (tokens pass unchanged).

    Attributes:
        table: (positions, dim) vectors, or `None`.

    Returns:
        From `forward`: tokens of the same shape; fewer tokens than positions take the first ones.

    Raises:
        ValueError: for an unknown kind, or more tokens than positions.

    Examples:
        >>> import torch
        >>> from coloss.nn import PositionTable
        >>> PositionTable((4, 4), 8, "sinusoidal")(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    table: Tensor | None

    def __init__(self, grid: Sequence[int], dim: int, kind: PositionKind = "learned") -> None:
        super().__init__()
        if kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(math.prod(grid), dim), std=0.02))
        elif kind == "sinusoidal":
            self.register_buffer("table", sinusoidal_positions(grid, dim), persistent=False)
        elif kind is None:
            self.register_buffer("table", None)
        else:
            raise ValueError(f'positions must be "learned", "sinusoidal" or None, got {kind!r}')

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.table is None:
            return tokens
        if tokens.shape[1] > self.table.shape[0]:
            raise ValueError(f"there are {self.table.shape[0]} positions, got {tokens.shape[1]} tokens")
        return tokens + self.table[: tokens.shape[1]]
