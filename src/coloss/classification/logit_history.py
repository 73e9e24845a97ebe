"""A table of what a network said about each sample some epochs ago.

One row for each sample id, one slot for each remembered epoch, and with every entry the epoch it was written in: an entry of
another epoch than the one asked for is reported as missing, never passed off as a prediction. So samples that were
dropped, not yet seen, or lost when a run resumed do no harm.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from coloss.errors import InputError
from coloss.ops import gather_with_gradient
from coloss.ops.precision import full_precision

_TABLES = ("values", "classes", "rest", "epochs")
_CLASS_COUNT = "num_classes"
_NEVER = -1


class LogitHistory(nn.Module):
    """Past logits by sample id, for the last few epochs, in memory that does not depend on how often it is asked.

    A ring: epoch e goes to slot (e / every) mod `depth`. Logits are kept without each row's largest value, which a softmax does
    not see and half precision is glad to lose; rows come back with their largest logit at 0.

    With several processes every process writes the rows of all: each holds the whole table, so reshuffled shards always find
    what another process saw. All processes must call `write` together.

    Args:
        depth: recorded epochs that are remembered, >= 1.
        num_samples: rows; ids must be below. None grows with the largest id seen.
        num_classes: logits in a row; None takes it from the first write.
        dtype: of the table. float16 costs a relative error of 0.0005 in a logit.
        device: of the table; rows travel to and from it.
        pin: page-locked memory, for quicker copies to a GPU; needs one.
        top_k: keep only each row's largest logits; the others read as the mean of what was left out (an extension of the paper).
            None keeps all.
        every: record only epochs divisible by it (an extension of the paper).
        save: keep the table in the state dict, so that a resumed run goes on exactly; without it the table starts empty again.

    Raises:
        InputError: for values out of range.

    Cost:
        num_samples * depth * (2 * num_classes + 4) bytes in float16, on every process. ImageNet with depth 4: 10 GB, `top_k=10`
        0.3 GB; CIFAR-100 with depth 4: 41 MB.

    Examples:
        >>> history = LogitHistory(depth=2)
        >>> history.write(torch.tensor([3, 1]), 0, torch.tensor([[0.0, 2.0], [5.0, 4.0]]))
        >>> logits, seen = history.read(torch.tensor([1, 2]), 0)
        >>> logits[0].tolist(), seen.tolist()
        ([0.0, -1.0], [True, False])
    """

    def __init__(
        self,
        depth: int,
        num_samples: int | None = None,
        num_classes: int | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        pin: bool = False,
        top_k: int | None = None,
        every: int = 1,
        save: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("every", every)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        for name, size in (("num_samples", num_samples), ("num_classes", num_classes), ("top_k", top_k)):
            if size is not None and size < 1:
                raise InputError(f"{name} must be >= 1, got {size}")
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating point type, got {dtype}")
        self.depth, self.every, self.top_k, self.save = depth, every, top_k, save
        self.num_samples, self.num_classes = num_samples, num_classes
        self.dtype, self.device, self.pin = dtype, torch.device(device), pin
        # Not buffers: data-parallel training would send every buffer to every process at every step.
        self._tables: dict[str, Tensor] = {}

    @property
    def memory_bytes(self) -> int:
        """What the table takes now."""
        return sum(table.numel() * table.element_size() for table in self._tables.values())

    def clear(self) -> None:
        """Forget everything."""
        self._tables = {}

    def is_recorded(self, epoch: int) -> bool:
        """Whether this epoch's logits are kept."""
        return epoch % self.every == 0

    @torch.no_grad()
    def write(self, ids: Int[Tensor, " batch"], epoch: int, logits: Float[Tensor, "batch classes"]) -> None:
        """Remember what was said about some samples in an epoch; of a sample that occurs twice, the last time counts.

        Args:
            ids: sample ids, >= 0.
            epoch: from 0.
            logits: of these samples; no gradient is kept.

        Raises:
            InputError: for ids out of range, or another number of classes than before.
        """
        if epoch < 0:
            raise InputError(f"epoch must be >= 0, got {epoch}")
        if not self.is_recorded(epoch):
            return
        ids, logits = gather_with_gradient(ids), gather_with_gradient(logits.detach())
        if not len(ids):
            return
        rows = ids.to(self.device, torch.int64)
        numbers = rows.tolist()
        self._make_room(min(numbers), max(numbers), logits.shape[1])
        slot, last = self._slot(epoch), {number: place for place, number in enumerate(numbers)}
        packed = self._packed(logits)
        if len(last) < len(numbers):
            # Writing the same row twice in one operation leaves either of the two.
            order = torch.tensor(list(last.values()), device=self.device)
            rows, packed = (
                rows[order],
                {name: values[order.to(values.device)] for name, values in packed.items()},
            )
        for name, values in packed.items():
            table = self._tables[name]
            table[slot, rows] = values.to(table)
        self._tables["epochs"][slot, rows] = epoch

    @torch.no_grad()
    def read(
        self, ids: Int[Tensor, " batch"], epoch: int
    ) -> tuple[Float[Tensor, "batch classes"], Bool[Tensor, " batch"]]:
        """What was said about some samples in an epoch, or in the last recorded epoch before it.

        Args:
            ids: sample ids.
            epoch: the epoch asked for; one before the first gives nothing.

        Returns:
            Logits, at least float32 and on the device of `ids`, up to a constant for each row; and which rows are there. Rows that
            are not are 0.

        Raises:
            InputError: if nothing was ever written and `num_classes` is unknown.
        """
        if self.num_classes is None:
            raise InputError("history must be written to before it is read, or be made with num_classes")
        epoch -= epoch % self.every
        rows = ids.to(self.device, torch.int64)
        if epoch < 0 or not self._tables:
            empty = torch.zeros(len(ids), self.num_classes, device=ids.device)
            return empty, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        epochs, slot = self._tables["epochs"], self._slot(epoch)
        known = (rows >= 0) & (rows < epochs.shape[1])
        rows = torch.where(known, rows, 0)
        seen = known & (epochs[slot, rows] == epoch)
        logits = torch.where(seen.unsqueeze(1), self._unpacked(slot, rows), 0.0)
        return logits.to(ids.device), seen.to(ids.device)

    def _slot(self, epoch: int) -> int:
        return epoch // self.every % self.depth

    def _packed(self, logits: Tensor) -> dict[str, Tensor]:
        logits = full_precision(logits)
        # A class that cannot occur stays finite, so that no infinity meets another in a difference.
        shifted = (logits - logits.amax(1, keepdim=True)).clamp(min=max(torch.finfo(self.dtype).min, -1e30))
        if self._is_whole:
            return {"values": shifted}
        assert self.top_k is not None
        values, classes = shifted.topk(self.top_k, dim=1)
        rest = (shifted.sum(1) - values.sum(1)) / (shifted.shape[1] - self.top_k)
        return {
            "values": values,
            "classes": classes,
            "rest": rest.clamp(min=max(torch.finfo(self.dtype).min, -1e30)),
        }

    def _unpacked(self, slot: int, rows: Tensor) -> Tensor:
        values = full_precision(self._tables["values"][slot, rows])
        if self._is_whole:
            return values
        assert self.num_classes is not None
        rest = full_precision(self._tables["rest"][slot, rows])
        whole = rest.unsqueeze(1).repeat(1, self.num_classes)
        return whole.scatter(1, self._tables["classes"][slot, rows].long(), values)

    @property
    def _is_whole(self) -> bool:
        return self.top_k is None or self.num_classes is None or self.top_k >= self.num_classes

    def _make_room(self, smallest: int, largest: int, classes: int) -> None:
        if smallest < 0:
            raise InputError(f"ids must be >= 0, got {smallest}")
        if self.num_samples is not None and largest >= self.num_samples:
            raise InputError(f"ids must be below num_samples = {self.num_samples}, got {largest}")
        if self.num_classes is None:
            self.num_classes = classes
        if classes != self.num_classes:
            raise InputError(f"logits must have {self.num_classes} classes as before, got {classes}")
        present = self._tables["epochs"].shape[1] if self._tables else 0
        if largest < present:
            return
        # A fifth more than needed, or ids that come in increasing order would move the table at every step.
        rows = self.num_samples or max(largest + 1, present + present // 5)
        index = torch.int16 if self.num_classes <= 2**15 else torch.int32
        kept = self.num_classes if self._is_whole else self.top_k
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
            "values": ((kept or 0,), self.dtype, 0),
            "epochs": ((), torch.int32, _NEVER),
        }
        if not self._is_whole:
            wanted |= {"classes": ((kept or 0,), index, 0), "rest": ((), self.dtype, 0)}
        grown = {}
        for name, (shape, dtype, fill) in wanted.items():
            table = torch.full(
                (self.depth, rows, *shape), fill, dtype=dtype, device=self.device, pin_memory=self.pin
            )
            if present:
                table[:, :present] = self._tables[name]
            grown[name] = table
        self._tables = grown

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.save and self._tables:
            destination.update({f"{prefix}{name}": table for name, table in self._tables.items()})
            destination[prefix + _CLASS_COUNT] = torch.tensor(self.num_classes)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = {name: state_dict[prefix + name] for name in _TABLES if prefix + name in state_dict}
        if not stored:
            self.clear()
            return
        classes = int(state_dict.get(prefix + _CLASS_COUNT, 0))
        kept = classes if self.top_k is None else min(self.top_k, classes)
        shape = (self.depth, self.num_samples or stored["epochs"].shape[1], kept)
        if self.num_classes not in (None, classes) or tuple(stored["values"].shape) != shape:
            error_msgs.append(
                f"{prefix}: the stored history has shape {tuple(stored['values'].shape)} of {classes} classes, this one "
                f"{shape} of {self.num_classes or classes}"
            )
            return
        self.num_classes = classes
        self._tables = {}
        for name, table in stored.items():
            own = self.dtype if name in ("values", "rest") else table.dtype
            copied = table.detach().to(self.device, own, copy=True)
            self._tables[name] = copied.pin_memory() if self.pin else copied


class NumberedDataset(Dataset):
    """A torch data set that tells with each sample its position, as the id by which a method remembers it.

    For data sets that are read sample by sample; `coloss.data.IndexedDataset` does the same for tensors, faster. Wrap the whole
    data set before it is divided: a `Subset` of this one keeps the ids.

    Args:
        dataset: map-style; its samples are tuples or lists, such as (input, target).

    Returns:
        From indexing: the sample with its position appended, (input, target, id).

    Examples:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> whole = NumberedDataset(TensorDataset(torch.arange(4.0), torch.tensor([0, 1, 0, 1])))
        >>> Subset(whole, [2])[0]
        (tensor(2.), tensor(0), 2)
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise InputError(
                f"dataset must be a map-style data set with a length, got {type(dataset).__name__}"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        sample = self.dataset[index]
        if not isinstance(sample, tuple | list):
            raise InputError(f"the samples of dataset must be tuples or lists, got {type(sample).__name__}")
        return (*sample, index % len(self))
