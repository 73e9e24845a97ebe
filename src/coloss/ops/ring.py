"""Blocks of rows that travel from process to process until each has met all the others."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .distributed import rank, row_counts, world_size


class Ring:
    """One journey of a block from every process around all of them.

    Every process holds one block of rows at a time; `pass_on` sends it to the next process and takes the one of the process before.
    After as many passes as there are processes each block is home again.

    Args:
        block: local rows, whose number may differ between processes.

    Attributes:
        owner: the process whose block is here.
        counts: number of rows of each process.
    """

    def __init__(self, block: Tensor) -> None:
        self.counts = row_counts(block)
        self.owner = rank()

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def rows(self) -> slice:
        """Where the rows of the block that is here stand among those of all processes."""
        start = sum(self.counts[: self.owner])
        return slice(start, start + self.counts[self.owner])

    @property
    def at_home(self) -> bool:
        """Whether the block that is here is this process's own."""
        return self.owner == rank()

    def pass_on(self, *parts: Tensor) -> list[Tensor]:
        """Send the tensors of the block on, one row for each of its rows, and receive those of the process before."""
        size = world_size()
        self.owner = (self.owner - 1) % size
        arrived = [part.new_empty(self.counts[self.owner], *part.shape[1:]) for part in parts]
        following, previous = (rank() + 1) % size, (rank() - 1) % size
        # Empty blocks are not sent: some backends never deliver them.
        operations = [dist.P2POp(dist.isend, part.contiguous(), following) for part in parts if part.numel()]
        operations += [dist.P2POp(dist.irecv, part, previous) for part in arrived if part.numel()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return arrived


def own_rows(counts: Sequence[int]) -> slice:
    """Where this process's rows stand among those of all processes."""
    start = sum(counts[: rank()])
    return slice(start, start + counts[rank()])
