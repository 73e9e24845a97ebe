"""Rotary positions: queries and keys are turned by angles that grow with the position, so that their product sees distances alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(
    positions: Int[Tensor, "*batch tokens"], pairs: int, *, base: float = 10000.0
) -> Float[Tensor, "*batch tokens pairs"]:
    """By how much each pair of dimensions is turned at each position: `position * base^(-pair / pairs)`.

    Args:
        positions: of the tokens.
        pairs: how many pairs of dimensions are turned, >= 1.
        base: ratio of the slowest to the fastest wavelength.

    Returns:
        Radians, float32.

    Examples:
        >>> rotary_angles(torch.tensor([0, 1, 2]), 2)
        tensor([[0.0000, 0.0000],
                [1.0000, 0.0100],
                [2.0000, 0.0200]])
    """
    speeds = base ** -(torch.arange(pairs, device=positions.device) / pairs)
    return (positions.unsqueeze(-1) * speeds).to(torch.float32)


def rotate(
    vectors: Float[Tensor, "*batch tokens dim"], angles: Float[Tensor, "*#batch tokens pairs"]
) -> Float[Tensor, "*batch tokens dim"]:
    """Turn the first `2 pairs` dimensions of queries or keys: dimension k with dimension `pairs + k`; the others stay.

    The product of a query turned at position p and a key turned at position q depends on them and on p - q.

    Args:
        vectors: queries or keys.
        angles: of `rotary_angles`; dimensions of size 1 are shared, such as heads.

    Source: Su et al. 2021, arXiv 2104.09864; halves instead of interleaved pairs, as is usual.

    Examples:
        >>> quarter = torch.tensor([[torch.pi / 2]])
        >>> rotate(torch.tensor([[1.0, 0.0, 5.0]]), quarter).round(decimals=4)
        tensor([[-0.,  1.,  5.]])
    """
    pairs = angles.shape[-1]
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second, rest = vectors.split([pairs, pairs, vectors.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)
