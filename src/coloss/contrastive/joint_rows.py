"""Where the rows of this process stand in the batch of all processes, as it was dealt out: what joint random draws need."""

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.ops import is_distributed, rank
from coloss.ops.distributed import row_counts


def dealt_places(rows: Tensor, across_processes: bool = True) -> list[Int[Tensor, " rows"]]:
    """For each process in the order of ranks: the places of its rows in the joint batch, which was dealt out in turn.

    A draw that is made for the joint batch from a generator in the same state everywhere is then the draw of a single process.

    Args:
        rows: this process's.
        across_processes: False takes this process for the only one.

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
