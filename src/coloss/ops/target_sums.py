"""Sums of scores weighted by a function of their row and column numbers, tile by tile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gradients import first_order_only
from .precision import without_autocast
from .ring import Ring

_SIDE_ON_CPU = 1024
_SIDE_ON_ACCELERATOR = 4096

Targets = Callable[[Tensor, Tensor], Tensor]


def function_target_sums(
    x: Tensor, y: Tensor, targets: Targets, side: int | None, ring: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the targets of each row, and of the scores x @ y.T weighted by them.

    Args:
        x: (rows, dim).
        y: (columns, dim) in the same type.
        targets: of row numbers (r, 1) and column numbers (1, c), the (r, c) targets.
        side: of a square tile.
        ring: columns are those of all processes, numbered in the order of ranks; rows are this process's, numbered from 0.

    Returns:
        (rows,) without gradient, and (rows,).

    Raises:
        ValueError: if the function gives another shape than that of a tile.
    """
    mass, score = _FunctionTargets.apply(x, y, targets, side or _default_side(x.device), ring)
    return mass, score


class _FunctionTargets(torch.autograd.Function):
    """Saves x, y and the targets' product with y; the targets are asked for once more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, targets: Targets, side: int, ring: bool
    ) -> tuple[Tensor, Tensor]:
        mass, centre = x.new_zeros(len(x)), torch.zeros_like(x)
        journey, block = Ring(y) if ring else None, y
        for _ in range(1 if journey is None else len(journey)):
            start = 0 if journey is None else journey.rows.start
            for rows, columns, part in _tiles(x, block, targets, side, start):
                mass[rows] += part.sum(1)
                with without_autocast(x.device):
                    centre[rows].addmm_(part, block[columns])
            if journey is not None:
                (block,) = journey.pass_on(block)
        ctx.save_for_backward(x, y, centre)
        ctx.settings = targets, side, ring
        ctx.mark_non_differentiable(mass)
        return mass, (x * centre).sum(1)

    @staticmethod
    @first_order_only("soft_contrastive_loss")
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, y, centre = ctx.saved_tensors
        targets, side, ring = ctx.settings
        weighted, for_y = gradient.unsqueeze(1) * x, torch.zeros_like(y)
        journey = Ring(y) if ring else None
        for _turn in range(1 if journey is None else len(journey)):
            start = 0 if journey is None else journey.rows.start
            for rows, columns, part in _tiles(x, for_y, targets, side, start):
                with without_autocast(x.device):
                    for_y[columns].addmm_(part.T, weighted[rows])
            if journey is not None:
                (for_y,) = journey.pass_on(for_y)
        return gradient.unsqueeze(1) * centre, for_y, None, None, None


def _tiles(x: Tensor, y: Tensor, targets: Targets, side: int, start: int) -> Any:
    for top in range(0, len(x), side):
        rows = slice(top, min(top + side, len(x)))
        for left in range(0, len(y), side):
            columns = slice(left, min(left + side, len(y)))
            row = torch.arange(rows.start, rows.stop, device=x.device).unsqueeze(1)
            column = torch.arange(start + columns.start, start + columns.stop, device=x.device).unsqueeze(0)
            part = targets(row, column)
            if part.shape != (len(row), column.shape[1]):
                raise ValueError(
                    f"targets must give shape {(len(row), column.shape[1])} for a tile, got {tuple(part.shape)}"
                )
            yield rows, columns, part.detach().to(x.dtype)


def _default_side(device: torch.device) -> int:
    return _SIDE_ON_CPU if device.type == "cpu" else _SIDE_ON_ACCELERATOR
