"""Images changed in a way that is known: turned by quarters, or cut into tiles and shuffled."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_MOST_TILES = 9


def rotated_copies(
    images: Float[Tensor, "batch channels side side"],
) -> tuple[Float[Tensor, "copies channels side side"], Int[Tensor, " copies"]]:
    """Each image turned by 0, 90, 180 and 270 degrees, and which of them it is.

    Args:
        images: square.

    Returns:
        4 * batch images, all by 0 degrees first, and their number of quarter turns, counter-clockwise.

    Raises:
        ValueError: if the images are not square.

    Examples:
        >>> copies, turns = rotated_copies(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        >>> copies[1].tolist(), turns.tolist()
        ([[[2.0, 4.0], [1.0, 3.0]]], [0, 1, 2, 3])
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images must be square to be turned, got shape {tuple(images.shape)}")
    copies = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return copies, torch.arange(4, device=images.device).repeat_interleave(len(images))


def jigsaw_permutations(
    count: int = 35, tiles: int = 9, *, generator: torch.Generator | None = None
) -> Int[Tensor, "count tiles"]:
    """Orders of tiles that differ from each other in as many places as possible, chosen one after the other.

    Each next one has the largest smallest Hamming distance to those before, and among such the largest mean distance. The first `tiles` of
    them differ everywhere.

    Args:
        count: how many, from 1 to tiles!.
        tiles: from 2 to 9.
        generator: decides the first one and ties; None starts with the order 0, 1, 2 ... and takes the first of ties.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O(count * tiles! * tiles) time, 0.3 s for 35 of 9 tiles.

    Source:
        Noroozi, Favaro, 2016, arXiv 1603.09246, algorithm 1, there by the mean distance alone.

    Examples:
        >>> jigsaw_permutations(4, 4).tolist()
        [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    """
    if not 2 <= tiles <= _MOST_TILES:
        raise ValueError(f"tiles must be in [2, {_MOST_TILES}], got {tiles}")
    if not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"count must be in [1, {tiles}! = {math.factorial(tiles)}], got {count}")
    orders = _all_permutations(tiles)
    if generator is not None:
        orders = orders[torch.randperm(len(orders), generator=generator)]
    chosen = [0]
    nearest = torch.full((len(orders),), tiles, dtype=torch.int32)
    total = torch.zeros(len(orders), dtype=torch.int32)
    while len(chosen) < count:
        distance = (orders != orders[chosen[-1]]).sum(1, dtype=torch.int32)
        nearest, total = torch.minimum(nearest, distance), total + distance
        # A total is below `tiles` for each one chosen, so it never outweighs one place of the nearest.
        chosen.append(int((nearest * (tiles * count + 1) + total).argmax()))
    return orders[chosen].long()


def shuffled_tiles(
    images: Float[Tensor, "batch channels height width"],
    permutations: Int[Tensor, "permutations tiles"],
    *,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch tiles channels height width"], Int[Tensor, " batch"]]:
    """The tiles of each image in one of several orders, each tile enlarged to the size of the image, and which order it is.

    Tiles are cut before they are enlarged, so no pixel of a neighbour betrays where a tile was. What does not divide into equal tiles is
    left out at the right and at the bottom.

    Args:
        images: at least as high and wide as there are tiles in a column.
        permutations: orders to draw from; place t of the result holds tile `permutation[t]`, tiles counted row by row.
        generator: draws the order of each image.

    Returns:
        (batch, tiles, channels, height, width), and the row of `permutations` of each image.

    Raises:
        ValueError: if the number of tiles is no square, or the images are smaller than the grid.

    Examples:
        >>> tiles, order = shuffled_tiles(torch.rand(5, 3, 32, 32), jigsaw_permutations(4, 4))
        >>> tiles.shape, bool((order < 4).all())
        (torch.Size([5, 4, 3, 32, 32]), True)
    """
    batch, _, height, width = images.shape
    count = permutations.shape[1]
    grid = math.isqrt(count)
    if grid**2 != count:
        raise ValueError(f"permutations must be of a square number of tiles, got {count}")
    tall, wide = height // grid, width // grid
    if min(tall, wide) < 1:
        raise ValueError(f"images must be at least {grid} pixels high and wide, got {height} x {width}")
    cut = images[..., : grid * tall, : grid * wide].unflatten(3, (grid, wide)).unflatten(2, (grid, tall))
    tiles = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    device = images.device if generator is None else generator.device
    order = torch.randint(len(permutations), (batch,), generator=generator, device=device).to(images.device)
    places = permutations.to(images.device)[order]
    moved = tiles[torch.arange(batch, device=images.device).unsqueeze(1), places]
    if batch == 0:
        return images.new_zeros(0, count, *images.shape[1:]), order
    large = F.interpolate(moved.flatten(0, 1), (height, width), mode="bilinear", align_corners=False)
    return large.unflatten(0, (batch, count)), order


def _all_permutations(size: int) -> Tensor:
    """Every order of `size` things, in lexicographic order; int8."""
    orders = torch.zeros(1, 1, dtype=torch.int8)
    for count in range(2, size + 1):
        first = torch.arange(count, dtype=torch.int8).repeat_interleave(len(orders)).unsqueeze(1)
        rest = orders.repeat(count, 1)
        orders = torch.cat([first, rest + (rest >= first).to(torch.int8)], 1)
    return orders
