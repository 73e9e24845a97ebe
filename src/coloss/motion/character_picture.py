"""A body drawn with characters, for terminals: every character is a cell of 2 x 4 dots (braille)."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_EMPTY = 0x2800


def draw_skeleton(
    joints: Float[Tensor, "joints axes"],
    parents: Sequence[int],
    *,
    columns: int = 24,
    rows: int = 14,
    across: int = 0,
    up: int = 1,
) -> str:
    """The bones of one frame, as large as the field allows, seen along the axis that is neither `across` nor `up`.

    Args:
        joints: positions; NaN for a joint that was not seen, whose bones are left out.
        parents: of each joint, -1 at the root.
        columns: characters across, >= 1.
        rows: characters down, >= 1.
        across: axis that points to the right.
        up: axis that points up.

    Returns:
        `rows` lines of `columns` characters.

    Raises:
        ValueError: for an empty field, or parents that do not fit the joints.

    Examples:
        >>> import torch
        >>> cross = torch.tensor([[0.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [1.0, 1.0]])
        >>> print(draw_skeleton(cross, [-1, 0, -1, 2], columns=4, rows=2))
        ⠀⠀⡇⠀
        ⠉⠉⡏⠉
    """
    if columns < 1 or rows < 1:
        raise ValueError(f"columns and rows must be >= 1, got {columns} and {rows}")
    if len(parents) != len(joints):
        raise ValueError(f"parents must be {len(joints)}, one for each joint, got {len(parents)}")
    points = [(point[across], point[up]) for point in joints.detach().double().cpu().tolist()]
    seen = [all(math.isfinite(value) for value in point) for point in points]
    cells = [[_EMPTY] * columns for _ in range(rows)]
    shown = [point for point, there in zip(points, seen) if there]
    if shown:
        lowest = [min(point[axis] for point in shown) for axis in (0, 1)]
        highest = [max(point[axis] for point in shown) for axis in (0, 1)]
        wide, high = 2 * columns - 1, 4 * rows - 1
        extents = [highest[axis] - lowest[axis] for axis in (0, 1)]
        scales = [size / extent for size, extent in zip((wide, high), extents) if extent > 0]
        scale = min(scales) if scales else 1.0
        centre = [(lowest[axis] + highest[axis]) / 2 for axis in (0, 1)]

        def place(point: tuple[float, float]) -> tuple[float, float]:
            return (
                wide / 2 + scale * (point[0] - centre[0]),
                high / 2 - scale * (point[1] - centre[1]),
            )

        for joint, parent in enumerate(parents):
            other = parent if parent >= 0 and seen[parent] else joint
            if seen[joint] and (other != joint or parent < 0):
                _line(cells, place(points[joint]), place(points[other]))
    return "\n".join("".join(map(chr, row)) for row in cells)


def _line(cells: list[list[int]], start: tuple[float, float], end: tuple[float, float]) -> None:
    steps = max(1, math.ceil(max(abs(end[0] - start[0]), abs(end[1] - start[1]))))
    for step in range(steps + 1):
        column, row = (int(math.floor(a + (b - a) * step / steps + 0.5)) for a, b in zip(start, end))
        column = min(max(column, 0), 2 * len(cells[0]) - 1)
        row = min(max(row, 0), 4 * len(cells) - 1)
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
