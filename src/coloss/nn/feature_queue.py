"""A memory of the newest embeddings of earlier batches: the further negatives of a contrastive loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.ops.distributed import gather_with_gradient


class FeatureQueue(nn.Module):
    """Keeps the newest rows that it was given, first in, first out, and the ids of the samples that they came from.

    It begins empty and gives only rows that were put in: no random rows stand in for missing ones. Batches may have any size, also one
    that does not divide the size of the queue, or is larger. All of it is in buffers: it moves with its owner and is saved with it.

    Args:
        size: rows that it holds at most, >= 1.
        dim: length of a row, >= 1.

    Attributes:
        features: float buffer (size, dim); only the first `len(queue)` rows mean something, in no particular order.
        ids: int64 buffer (size); -1 for rows without an id.

    Returns:
        From `forward()`: the rows that are there, (rows, dim), without a graph.

    Raises:
        ValueError: for a size or dim below 1, rows of another length, or ids that do not fit the rows.

    Cost:
        size * dim numbers. Reading how many rows are there waits for the device.

    Source: He et al. 2020 (MoCo), arXiv 1911.05722.

    Examples:
        >>> queue = FeatureQueue(size=3, dim=2)
        >>> queue.enqueue(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([7, 8]))
        >>> queue.enqueue(torch.tensor([[3.0, 3.0], [4.0, 4.0]]))
        >>> queue()[:, 0].tolist(), queue.row_ids().tolist()
        ([4.0, 2.0, 3.0], [-1, 8, -1])
    """

    features: Tensor
    ids: Tensor
    place: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return int(self.filled)

    def forward(self) -> Float[Tensor, "rows dim"]:
        # A copy: the loss of this step must not see what is put in before its backward pass.
        return self.features[: len(self)].clone()

    def row_ids(self) -> Int[Tensor, " rows"]:
        """Sample ids of the rows that `forward` gives, -1 where there was none."""
        return self.ids[: len(self)].clone()

    @torch.no_grad()
    def enqueue(
        self,
        features: Float[Tensor, "rows length"],
        ids: Int[Tensor, " ids"] | None = None,
        *,
        across_processes: bool = True,
    ) -> None:
        """Put rows in, in place of the oldest.

        Args:
            features: rows; kept in the precision of the buffer. Of more rows than the queue holds, the last stay.
            ids: of the samples they belong to, >= 0.
            across_processes: put in the rows of all processes, so that their queues stay equal.
        """
        size, dim = self.features.shape
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features must be (rows, {dim}), got {tuple(features.shape)}")
        if ids is None:
            ids = self.ids.new_full((len(features),), -1)
        elif ids.shape != features.shape[:1]:
            raise ValueError(f"ids must have shape ({len(features)},), got {tuple(ids.shape)}")
        ids = ids.to(self.ids)
        rows = features.detach().to(self.features)
        if across_processes:
            rows, ids = gather_with_gradient(rows), gather_with_gradient(ids)
        count = len(rows)
        rows, ids = rows[-size:], ids[-size:]
        where = (self.place + torch.arange(count - len(rows), count, device=rows.device)) % size
        self.features[where] = rows
        self.ids[where] = ids
        self.place.copy_((self.place + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
