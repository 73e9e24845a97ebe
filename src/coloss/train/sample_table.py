"""A table of numbers by sample id, for methods that remember something of every sample from one visit to the next."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import gather_with_gradient, segment_mean

_IDS = "ids"


class SampleTable(nn.Module):
    """Numbers kept for each sample, found by the sample's stable id and saved with the run.

    A sample that was never written reads as the initial values and is reported as unseen. Nothing that is stored has a gradient. Every
    process writes the rows of all, so each holds the whole table and reshuffled shards always find what another process wrote; all must
    call `write` together. Of an id that occurs several times in one write, here or on other processes, the mean is kept: the result does
    not depend on the order.

    The state dict holds the ids seen, in rising order, and their rows, whatever the order of visits. Moving the module moves the table;
    its floating point type stays as it was given, also where the rest of a model is trained in half precision.

    Args:
        initial: name of each column -> its value for an unseen sample: a number, or a float tensor for several numbers each.
        num_samples: None takes any int64 ids and grows with those seen, which costs some 100 bytes of host memory for each id and a
            look-up in Python. With a number, ids are row numbers in [0, num_samples) and the table is made at once.
        dtype: of the columns.

    Raises:
        InputError: for no column, a column named "ids", a type that is no floating point type, or `num_samples` < 1.

    Cost:
        Memory of the columns on every process; a write exchanges the rows of one batch.

    Examples:
        >>> table = SampleTable({"temperature": 0.1, "loss": 0.0})
        >>> table.write(torch.tensor([7, -2, 7]), {"loss": torch.tensor([1.0, 5.0, 3.0])})
        >>> values, seen = table.read(torch.tensor([-2, 7, 8]))
        >>> values["loss"], values["temperature"], seen
        (tensor([5., 2., 0.]), tensor([0.1000, 0.1000, 0.1000]), tensor([ True,  True, False]))
    """

    def __init__(
        self,
        initial: Mapping[str, float | Tensor],
        *,
        num_samples: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not initial or _IDS in initial:
            raise InputError(
                f"initial must name at least one column, none of them {_IDS!r}, got {[*initial]}"
            )
        if num_samples is not None and num_samples < 1:
            raise InputError(f"num_samples must be >= 1, got {num_samples}")
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating point type, got {dtype}")
        self.num_samples = num_samples
        self._initial = {
            name: torch.as_tensor(value, dtype=dtype).detach() for name, value in initial.items()
        }
        self.clear()

    def clear(self) -> None:
        """Forget every sample."""
        # Row 0 is that of all unseen samples. Not buffers: data-parallel training would send every buffer to every process at each step.
        capacity = 1 + (self.num_samples or 0)
        device = next(iter(self._initial.values())).device
        self._columns = {
            name: value.expand(capacity, *value.shape).clone() for name, value in self._initial.items()
        }
        self._seen = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of samples seen."""
        return int(self._seen.sum()) if self.num_samples is not None else len(self._row_of)

    @property
    def ids(self) -> Int[Tensor, " seen"]:
        """Ids of the samples seen, in rising order."""
        if self.num_samples is not None:
            return self._seen[1:].nonzero().flatten()
        return torch.tensor(sorted(self._row_of), dtype=torch.int64, device=self._seen.device)

    def column(self, name: str) -> Float[Tensor, "seen *shape"]:
        """One column of the samples seen, in the order of `ids`."""
        return self._columns[name][self._rows(self.ids)]

    @torch.no_grad()
    def read(
        self, ids: Int[Tensor, " batch"]
    ) -> tuple[dict[str, Float[Tensor, "batch ..."]], Bool[Tensor, " batch"]]:
        """What is known of some samples.

        Args:
            ids: of the samples; may repeat.

        Returns:
            Every column by name, on the device of the ids; and which samples were ever written.

        Raises:
            InputError: for ids outside [0, num_samples), where that is given.
        """
        rows = self._rows(ids)
        values = {name: column[rows].to(ids.device) for name, column in self._columns.items()}
        return values, self._seen[rows].to(ids.device)

    @torch.no_grad()
    def write(self, ids: Int[Tensor, " batch"], values: Mapping[str, Float[Tensor, "batch ..."]]) -> None:
        """Store new values of some samples; columns that are not given keep theirs.

        Args:
            ids: of the samples of this process, none included; may repeat.
            values: by name of the column; the same names on all processes.

        Raises:
            InputError: for a name or shape that the table does not have, or ids outside [0, num_samples).
        """
        for name, value in values.items():
            if name not in self._columns:
                raise InputError(f"values must be of the columns {', '.join(self._columns)}, got {name!r}")
            if value.shape != (len(ids), *self._initial[name].shape):
                shape = (len(ids), *self._initial[name].shape)
                raise InputError(f"values of {name!r} must have shape {shape}, got {tuple(value.shape)}")
        widths = [self._initial[name].numel() for name in values]
        parts = [value.detach().reshape(len(ids), width) for value, width in zip(values.values(), widths)]
        packed = torch.cat(parts, 1)
        ids, packed = gather_with_gradient(ids), gather_with_gradient(packed)
        distinct, place = torch.unique(ids, return_inverse=True)
        packed = segment_mean(packed, place, len(distinct))
        rows = self._new_rows(distinct)
        for name, part in zip(values, packed.split(widths, 1), strict=True):
            column = self._columns[name]
            column[rows] = part.reshape(-1, *column.shape[1:]).to(column)
        self._seen[rows] = True

    def _rows(self, ids: Tensor) -> Tensor:
        """Row of each sample; without `num_samples` that of unseen ones is 0."""
        if self.num_samples is None:
            found = [self._row_of.get(number, 0) for number in ids.tolist()]
            return torch.tensor(found, dtype=torch.int64, device=self._seen.device)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_samples:
            outside = next(number for number in ids.tolist() if not 0 <= number < self.num_samples)
            raise InputError(f"ids must be in [0, {self.num_samples}) as num_samples says, got {outside}")
        return ids.to(self._seen.device) + 1

    def _new_rows(self, distinct: Tensor) -> Tensor:
        """Row of each sample, made where it is unseen."""
        if self.num_samples is None:
            for number in distinct.tolist():
                self._row_of.setdefault(number, len(self._row_of) + 1)
            present, needed = len(self._seen), len(self._row_of) + 1
            if needed > present:
                # Doubled, or a first epoch would copy the table at every step.
                more = max(needed, 2 * present) - present
                self._seen = torch.cat([self._seen, self._seen.new_zeros(more)])
                self._columns = {
                    name: torch.cat([column, self._initial[name].expand(more, *column.shape[1:])])
                    for name, column in self._columns.items()
                }
        return self._rows(distinct)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampleTable":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._seen.device)).device
        self._initial = {name: value.to(device) for name, value in self._initial.items()}
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        self._seen = self._seen.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + _IDS] = self.ids
        destination.update({prefix + name: self.column(name) for name in self._columns})

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
        wanted = {_IDS, *self._columns}
        missing = sorted(prefix + name for name in wanted if prefix + name not in state_dict)
        if missing:
            missing_keys.extend(missing)
            return
        ids = state_dict[prefix + _IDS].to(self._seen.device, torch.int64)
        stored = {name: state_dict[prefix + name] for name in self._columns}
        outside = (
            ids[(ids < 0) | (ids >= (self.num_samples or 0))] if self.num_samples is not None else ids[:0]
        )
        if len(outside):
            error_msgs.append(
                f"{prefix}ids: the stored table holds id {int(outside[0])}, this one has {self.num_samples} samples"
            )
            return
        for name, value in stored.items():
            if value.shape != (len(ids), *self._initial[name].shape):
                error_msgs.append(f"{prefix}{name}: the stored column has shape {tuple(value.shape)}")
                return
        self.clear()
        rows = self._new_rows(ids)
        for name, value in stored.items():
            self._columns[name][rows] = value.detach().to(self._columns[name])
        self._seen[rows] = True
