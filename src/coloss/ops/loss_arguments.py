"""What the losses on pairs share at their edges: checks, types, temperatures, ids and reductions."""

import math
from typing import Literal

import torch
from torch import Tensor

from .distributed import all_reduce_mean, gather_with_gradient, world_size
from .pair_sums import group_index
from .precision import full_precision

Reduction = Literal["mean", "sum", "none"]


def check_options(
    temperature: float | Tensor, reduction: str, chunk_size: int | None, rows: int, none: bool = True
) -> None:
    """Refuse options out of range; values of tensors are not looked at while `torch.compile` traces.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != (rows,):
            allowed = f"be a scalar or have shape ({rows},)" if none else "be a scalar"
            raise ValueError(f"temperature must {allowed}, got shape {tuple(temperature.shape)}")
        if not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be > 0, got {temperature.min().item()}")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if reduction == "none" and not none:
        raise ValueError(
            'reduction must be "mean" or "sum", got \'none\': costs are summed over pairs, not by sample'
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean" or "sum"{", or none" * none}, got {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")


def check_pairs(name: str, pairs: Tensor, rows: int, columns: int) -> None:
    """Refuse pairs that name no query or no key; not looked at while `torch.compile` traces.

    Raises:
        ValueError: naming the argument.
    """
    if torch.compiler.is_compiling() or not pairs.numel():
        return
    for side, index, count in (("query", pairs[0], rows), ("key", pairs[1], columns)):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= count:
            raise ValueError(
                f"{name} must hold {side} numbers in [0, {count}), got {low if low < 0 else high}"
            )


def same_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32, or both as float64 where one of them is."""
    first, second = full_precision(x), full_precision(y)
    if first.dtype != second.dtype:
        first, second = first.double(), second.double()
    return first, second


def over_temperature(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Rows divided by one temperature, or each by its own."""
    if not isinstance(temperature, Tensor):
        return x / temperature
    temperature = temperature.to(x.dtype)
    return x / (temperature.unsqueeze(1) if temperature.ndim else temperature)


def joint_groups(rows: Tensor, columns: Tensor, ring: bool) -> tuple[Tensor, Tensor]:
    """Ids of this process's rows, and of the columns of all processes, as numbers from 0."""
    across = gather_with_gradient(columns) if ring else columns
    index = group_index(torch.cat([rows, across]))
    return index[: len(rows)], index[len(rows) :]


def reduced(loss: Tensor, counted: Tensor | None, reduction: str, ring: bool) -> Tensor:
    """Sum, or mean over the rows that count, of all processes; or the rows as they are."""
    if reduction == "none":
        return loss
    total = (loss if counted is None else torch.where(counted, loss, 0.0)).sum()
    count = loss.new_full((), len(loss)) if counted is None else counted.sum().to(loss.dtype)
    return reduced_total(total, count, reduction, ring)


def reduced_total(total: Tensor, count: Tensor, reduction: str, ring: bool) -> Tensor:
    """Sum over all processes, divided by the count of all unless it is the sum that is wanted."""
    if ring:
        total = all_reduce_mean(total) * world_size()
        count = all_reduce_mean(count) * world_size()
    return total if reduction == "sum" else total / count.clamp(min=1)
