"""Where to cut a row of layers into blocks: by their number, or by what they keep in memory."""

from collections.abc import Sequence


def block_ends(num_layers: int, blocks: int, joined: int = 0) -> list[int]:
    """Where to cut a row of layers into blocks of nearly equal length.

    Args:
        num_layers: layers, >= 2.
        blocks: wanted, from 1 to `num_layers`.
        joined: layers before the last that must stay in one block with it, >= 0; cuts between them are left out.

    Returns:
        Rising indices of the layers after which there is a cut; one fewer than there are blocks.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> block_ends(16, 4), block_ends(5, 5), block_ends(5, 5, joined=2)
        ([3, 7, 11], [0, 1, 2, 3], [0, 1])
    """
    if num_layers < 2:
        raise ValueError(f"num_layers must be >= 2, got {num_layers}")
    if not 1 <= blocks <= num_layers:
        raise ValueError(f"blocks must be between 1 and the number of layers, {num_layers}, got {blocks}")
    if joined < 0:
        raise ValueError(f"joined must be >= 0, got {joined}")
    ends = [(number * num_layers) // blocks - 1 for number in range(1, blocks)]
    return [end for end in ends if end <= num_layers - 2 - joined]


def balanced_ends(sizes: Sequence[float], heads: Sequence[Sequence[float]], joined: int = 0) -> list[int]:
    """Where to cut a row of layers so that the largest block with its head is as small as can be.

    Early layers, whose maps are large, come in shorter blocks than late ones. With equal sizes and no heads the lengths are nearly equal.

    Args:
        sizes: of the layers, at least two.
        heads: `heads[k][l]`: size of the head of block k if it ends with layer l; one row for each cut wanted, fewer than there are layers.
        joined: layers before the last that must stay in one block with it, >= 0. Where too few layers are left, there are fewer cuts.

    Returns:
        Rising indices of the layers after which there is a cut.

    Raises:
        ValueError: for a number out of range.

    Cost: time grows with the cuts times the layers squared.

    Examples:
        >>> balanced_ends([4, 4, 2, 1, 1, 1], [[0] * 6]), balanced_ends([4, 4, 2, 1, 1, 1], [[5] * 6] * 2)
        ([1], [0, 1])
    """
    layers = len(sizes)
    block_ends(layers, len(heads) + 1, joined)  # checks the numbers
    allowed = max(layers - 1 - joined, 0)
    cuts = min(len(heads), allowed)
    if cuts == allowed:
        return list(range(allowed))
    upto = [0.0]
    for size in sizes:
        upto.append(upto[-1] + size)
    # By the end of the last block so far: its largest block, the sum of squares (which decides between equals), the ends.
    found: dict[int, tuple[float, float, list[int]]] = {-1: (0.0, 0.0, [])}
    for number in range(cuts + 1):
        ends = range(number, allowed) if number < cuts else [layers - 1]
        after: dict[int, tuple[float, float, list[int]]] = {}
        for end in ends:
            own = heads[number][end] if number < cuts else 0.0
            options = []
            for start, (most, squares, before) in found.items():
                if start < end:
                    block = upto[end + 1] - upto[start + 1] + own
                    options.append((max(most, block), squares + block**2, [*before, end]))
            after[end] = min(options)
        found = after
    return found[layers - 1][2][:-1]
