"""Any training data as batches whose order is a function of (seed, epoch), so that a run can stop and go on in mid-epoch."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.data.loader import Loader
from coloss.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Feed:
    """Batches of this process, epoch by epoch.

    Args:
        data: `(inputs, targets)` tensors, an `IndexedDataset`, a `Loader`, a torch Dataset or DataLoader, or any re-iterable of batches.
        batch_size: over all processes; for tensors and datasets only.
        seed: of the order.
        fabric: tells this process's rank.

    Raises:
        InputError: if `data` is none of these, or is empty.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, fabric: "Fabric"):
        rank, world_size = fabric.global_rank, fabric.world_size
        self._seed = seed
        self._loader: Any
        if (
            isinstance(data, tuple | list)
            and data
            and all(isinstance(part, Tensor) for part in data)
            and len(data) <= 3
        ):
            data = IndexedDataset(*data)
        if isinstance(data, IndexedDataset):
            size = min(batch_size, len(data))
            # A last batch of a single sample is left out: batch normalisation cannot train on it.
            lonely = len(data) % size == 1 and size > 1
            self._loader = Loader(data, size, drop_last=lonely, seed=seed, rank=rank, world_size=world_size)
        elif isinstance(data, Loader):
            data.rank, data.world_size = rank, world_size
            self._loader = data
        elif isinstance(data, DataLoader):
            self._loader = fabric.setup_dataloaders(data, move_to_device=False) if world_size > 1 else data
        elif isinstance(data, Dataset):
            torch_loader: DataLoader = DataLoader(
                data, batch_size=max(batch_size // world_size, 1), shuffle=True
            )
            self._loader = (
                fabric.setup_dataloaders(torch_loader, move_to_device=False)
                if world_size > 1
                else torch_loader
            )
        elif hasattr(data, "__iter__") and not hasattr(data, "__next__"):
            self._loader = data
        else:
            raise InputError(
                f"data must be (inputs, targets) tensors, a dataset, a loader or a list of batches, got {type(data).__name__}"
            )
        try:
            self.length: int | None = len(self._loader)
        except TypeError:
            self.length = None

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch after the first `skip`.

        A torch DataLoader draws its order from the global random state, which is set by (seed, epoch) first and put back as it was
        when `skip` batches were replayed.
        """
        if isinstance(self._loader, Loader):
            return self._loader.batches(epoch, skip)
        return self._torch_batches(epoch, skip)

    def _torch_batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        saved = torch.get_rng_state()
        torch.manual_seed((self._seed + 1) * 15_485_863 + epoch)
        stream = iter(self._loader)
        for _ in islice(stream, skip):
            pass
        if skip:
            torch.set_rng_state(saved)
        for item in stream:
            yield Batch.of(item)
