r"""Batch statistics over all processes of a run, with gradients. On one process every function is a no-op.

One convention holds throughout. Let $L_r$ be the loss that process $r$ calls `backward` on. The functions
here give each process the gradient of $\sum_r L_r$ with respect to its own tensors. `DistributedDataParallel`
then averages parameter gradients over the $W$ processes, so what a step follows is the gradient of
$\frac{1}{W}\sum_r L_r$:

- every process computes the same loss on gathered data: after averaging, exactly the gradient of that loss on
  the joined batch;
- every process computes the mean over its own rows (equal numbers), against gathered data: the same again.

Without that averaging the gradient is $W$ times larger. All processes must call these functions, forward and
backward, the same number of times and in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .precision import full_precision


def is_distributed() -> bool:
    """Whether this run has more than one process that can exchange tensors.

    Returns:
        True when the default process group exists and holds at least two processes.

    Examples:
        >>> is_distributed()
        False
    """
    return world_size() > 1


def world_size() -> int:
    """Number of processes of this run; 1 when there is no process group.

    Returns:
        A number >= 1.

    Examples:
        >>> world_size()
        1
    """
    return dist.get_world_size() if _has_process_group() else 1


def rank() -> int:
    """Number of this process among all of the run, from 0; 0 when there is no process group.

    Returns:
        A number in [0, world_size()).

    Examples:
        >>> rank()
        0
    """
    return dist.get_rank() if _has_process_group() else 0


def gather_with_gradient(x: Shaped[Tensor, "rows *features"]) -> Shaped[Tensor, "all_rows *features"]:
    """Rows of every process, in the order of ranks; gradients return to the process a row came from.

    The number of rows may differ between processes, the other dimensions may not. Integer tensors (ids,
    labels) are gathered as well, without a gradient. The gradient of the local rows is the sum over processes
    of the gradients which those rows received there; see the module's text for what this means under
    `DistributedDataParallel`.

    Args:
        x: local rows, at least one dimension, the same type on every process.

    Returns:
        All rows; `x` itself on one process.

    Raises:
        ValueError: if `x` has no dimension to stack along.

    Cost:
        Two collectives forward (row counts, rows), one backward; memory of all rows.

    Examples:
        >>> gather_with_gradient(torch.eye(2)).shape
        torch.Size([2, 2])
    """
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    return _Gather.apply(x) if is_distributed() else x


def all_reduce_mean(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Mean of a tensor over the processes, differentiable.

    $y = \frac{1}{W} \sum_r x_r$ is the same on every process; its backward averages the incoming gradients
    over the processes, which is the gradient of $\sum_r L_r(y)$ with respect to the local $x_r$.

    Args:
        x: local values, of one shape on every process.

    Returns:
        The mean, in the shape and type of `x`; `x` itself on one process.

    Cost:
        One collective forward and one backward. Half precision is summed in float32.

    Examples:
        >>> all_reduce_mean(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _AllReduceSum.apply(x) / world_size() if is_distributed() else x


def dealt_places(
    rows: Shaped[Tensor, "rows *features"], across_processes: bool = True
) -> list[Int[Tensor, " own"]]:
    """For each process in the order of ranks: the places of its rows in the joint batch, which was dealt out in turn.

    A draw that is made for the joint batch from a generator in the same state everywhere is then the draw of a single process.

    Args:
        rows: this process's; only their number counts.
        across_processes: False takes this process for the only one.

    Returns:
        int64 on the CPU, one tensor for each process.

    Cost:
        One collective (row counts).

    Examples:
        >>> [places.tolist() for places in dealt_places(torch.zeros(3, 2))]
        [[0, 1, 2]]
    """
    counts = row_counts(rows) if across_processes and is_distributed() else [len(rows)]
    turns = torch.cat([torch.arange(count) * len(counts) + place for place, count in enumerate(counts)])
    return list(turns.argsort().argsort().split(counts))


def own_place(places: list[Tensor]) -> int:
    """Which entry of `dealt_places` is this process's.

    Examples:
        >>> own_place(dealt_places(torch.zeros(3, 2)))
        0
    """
    return rank() if len(places) > 1 else 0


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_ranks(x: Tensor) -> Tensor:
    total = full_precision(x).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total.to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        counts = row_counts(x)
        ctx.start, ctx.rows = sum(counts[: rank()]), x.shape[0]
        # Collectives exchange equal shapes: short processes pad, and the padding is dropped on arrival.
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: x.shape[0]] = x
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded)
        return torch.cat([rows[:count] for rows, count in zip(received, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)[ctx.start : ctx.start + ctx.rows]


def row_counts(x: Tensor) -> list[int]:
    local = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(counts, local)
    return torch.cat(counts).tolist()
