"""Soft assignments that share rows out over columns: entropic optimal transport, in logarithms."""

import math

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from .distributed import all_reduce_mean, is_distributed, world_size
from .precision import full_precision


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*batch rows columns"],
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    capacity: float | None = None,
    across_processes: bool = False,
) -> Float[Tensor, "*batch rows columns"]:
    r"""Share each row out over the columns by score, so that no column gets more than it should.

    $Q_{ij} = e^{f_i + s_{ij} / \epsilon + g_j}$, with $f, g$ found by turns: $g$ from the sums of columns, $f$ from those of rows, last.
    Rows sum to 1 exactly. Columns come near to equal sums (rows / columns), or with a capacity near to sums of at most that: a column
    that is not full is left alone ($g_j \le 0$).

    Args:
        scores: higher attracts more; minus infinity forbids a pair. A row or column of which all pairs are forbidden counts for nothing
            and stays 0.
        epsilon: > 0; near 0 the assignment is hard.
        iterations: >= 0; with 0 it is a softmax over columns.
        capacity: largest sum of a column, > 0; None for equal sums. Where the columns have no room for all rows, rows go on summing to 1.
        across_processes: the rows of all processes are one matrix, of which each holds some; for two dimensions. Columns must be the
            same everywhere.

    Returns:
        The assignment, at least float32, without gradient.

    Raises:
        ValueError: for a value out of range, or scores that are NaN or plus infinity.

    Cost:
        O(rows * columns) time for each iteration, and memory of two such matrices.

    Source:
        Cuturi 2013, arXiv 1306.0895; capacities: Chizat et al. 2018, arXiv 1607.05816; as targets: Caron et al. 2020, arXiv 2006.09882.

    Examples:
        >>> scores = torch.tensor([[1.0, 0.9], [1.0, 0.1]])  # both rows like the first column best
        >>> sinkhorn(scores, 0.05, 20).round(decimals=2)
        tensor([[0.0200, 0.9800],
                [1.0000, 0.0000]])
        >>> sinkhorn(scores, 0.05, 20, capacity=2.0).round(decimals=2)
        tensor([[0.8800, 0.1200],
                [1.0000, 0.0000]])
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}")
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0, got {iterations}")
    if capacity is not None and not 0 < capacity < math.inf:
        raise ValueError(f"capacity must be > 0 and finite, got {capacity}")
    joint = across_processes and is_distributed()
    if joint and scores.ndim != 2:
        raise ValueError(f"scores must be a matrix with across_processes, got shape {tuple(scores.shape)}")
    logs = full_precision(scores) / epsilon
    if not bool((logs < math.inf).all()):
        raise ValueError(
            "scores must not be NaN or infinite, got such values (minus infinity forbids a pair)"
        )
    if not logs.numel():
        return logs
    allowed = logs > -math.inf
    rows, columns = allowed.any(-1, keepdim=True), allowed.any(-2, keepdim=True)
    count = rows.to(logs.dtype).sum(-2, keepdim=True)
    if joint:
        columns = all_reduce_mean(columns.to(logs.dtype)) > 0
        count = all_reduce_mean(count) * world_size()
    room = count / columns.sum(-1, keepdim=True).clamp(min=1)
    limit = room.log() if capacity is None else torch.full_like(room, math.log(capacity))
    of_rows = -_finite(logs.logsumexp(-1, keepdim=True))
    of_columns = torch.zeros_like(logs[..., :1, :])
    for _ in range(iterations):
        of_columns = limit - _finite(_over_rows(logs + of_rows, joint))
        if capacity is not None:
            of_columns = of_columns.clamp(max=0.0)
        of_rows = -_finite((logs + of_columns).logsumexp(-1, keepdim=True))
    return (of_rows + logs + of_columns).exp()


def _finite(logs: Tensor) -> Tensor:
    """0 for what is forbidden altogether."""
    return torch.where(logs > -math.inf, logs, 0.0)


def _over_rows(logs: Tensor, joint: bool) -> Tensor:
    """Log-sum-exp of each column, over the rows of all processes where they are joined."""
    if not joint:
        return logs.logsumexp(-2, keepdim=True)
    highest = logs.amax(-2, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest = _finite(highest)
    total = (logs - highest).exp().sum(-2, keepdim=True)
    dist.all_reduce(total)
    return total.log() + highest
