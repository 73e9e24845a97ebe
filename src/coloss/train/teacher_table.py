"""What a teacher said of every sample, looked up by sample id, with its provenance, and refused where it no longer applies.

A table holds the teacher's outputs (and inner features, where asked) by sample id, and beside them what they were made of: the sha256 of the
teacher's state, the augmentation's seed, the sha256 of the data, and a sketch of the inputs that the teacher saw, 8 numbers for each
tensor of a sample. At every look-up the sketch of the batch's inputs is compared: a run that augments, scales or mixes them otherwise,
wherever it does so, gets an error instead of outputs that belong to other inputs, unless the numbers move by less than about a per cent. A file is safetensors with a checksum, and only the rows of a batch
are read from it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.errors import InputError, suggest_names
from coloss.nn.shared_teacher import LastPass
from coloss.ops import full_precision
from coloss.train.provenance import (
    Provenance,
    data_fingerprint,
    input_sketch,
    teacher_fingerprint,
)
from coloss.train.seeded_augmentation import augmentation_of
from coloss.train.table_file import read_table, write_table

OUTPUT = ""
"""Name of the output of the whole network, as in `coloss.nn.Taps`."""
# How far sketches, which are of logarithms, may differ, or the share of a size below 1: more than half precision changes, less than
# an augmentation does.
_TOLERANCE = 0.01


class TeacherTable:
    """Outputs of a teacher by sample id, for any batch of the data that they were made for.

    Made by `cache_teacher`, read from a file by `load`, or by `of` from a tensor of any origin. Methods take it where they take a
    table: `LogitDistillation(teacher_logits=table)`, `FeatureDistillation(table, ...)`. It cannot be changed; a copy is the same table.

    Attributes:
        ids: of its samples, in rising order.
        provenance: what it was made of.
        names: what it holds of each sample: `""` for the teacher's output, and the module paths of inner features.

    Examples:
        >>> table = TeacherTable.of(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        >>> table.rows(Batch(torch.zeros(2, 8), ids=torch.tensor([1, 0])))
        tensor([[5., 5.],
                [1., 3.]])
    """

    def __init__(
        self,
        ids: Int[Tensor, " rows"],
        columns: Mapping[str, Tensor],
        sketch: Tensor | None,
        provenance: Provenance,
        path: Path | None = None,
    ) -> None:
        self.ids, self.provenance, self.path = ids, provenance, path
        self._columns, self._sketch = dict(columns), sketch
        self._last = LastPass()

    @classmethod
    def of(cls, table: Float[Tensor, "rows *shape"], name: str = "teacher_logits") -> "TeacherTable":
        """Table of a tensor whose row i belongs to the sample with id i; a row with a NaN counts as absent.

        Nothing is known of its provenance, so neither teacher nor inputs are checked. It stays on its device.

        Raises:
            InputError: if it is no float tensor of two dimensions or more, with one row or more.
        """
        if table.ndim < 2 or not len(table) or not table.is_floating_point():
            raise InputError(
                f"{name} must be a float (samples, ...) table, got {table.dtype} {tuple(table.shape)}"
            )
        ids = torch.arange(len(table), device=table.device)
        return cls(ids, {OUTPUT: table.detach()[None]}, None, Provenance())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._columns, key=lambda name: (name != OUTPUT, name)))

    def __len__(self) -> int:
        return len(self.ids)

    def shape(self, name: str = OUTPUT) -> tuple[int, ...]:
        """Shape of what is stored of one sample."""
        return tuple(self._column(name, "teacher outputs").shape[2:])

    def rows(
        self, batch: Batch, name: str = OUTPUT, called: str = "teacher outputs", one: str = "a row"
    ) -> Float[Tensor, "batch *shape"]:
        """What the teacher said of the samples of a batch, on the device of its ids; at least float32.

        Args:
            batch: with ids; its inputs and its augmentation are compared with those that the teacher saw.
            name: of what is stored.
            called: what errors call the table.
            one: what errors call a row of it.

        Raises:
            InputError: if the batch has no ids, or one without a row, or was augmented otherwise; if its inputs are others than the
                teacher saw; for an unknown name.

        Cost:
            Reads the batch's rows alone, from the file where the table came from one, and a product of the inputs with 8 vectors, once for
            all look-ups of one batch.
        """
        column = self._column(name, called)
        if batch.ids is None:
            raise InputError(
                f"{called} are looked up by sample id, and the batch has none: "
                "train on a coloss.data.IndexedDataset, or call step(inputs, targets, ids)"
            )
        version = self._version(batch, called)
        ids = batch.ids.to(self.ids.device)
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        absent = self.ids[place] != ids
        if len(ids) and not self.ids[0] <= ids.min() <= ids.max() <= self.ids[-1]:
            raise InputError(
                f"{called} must have a row for every sample id, got {len(self.ids)} rows and ids from {int(ids.min())} to {int(ids.max())}"
            )
        _refuse(absent, ids, called, one)
        if self._sketch is not None:
            self._check_inputs(batch, self._sketch[version, place], ids, called)
        found = column[version].index_select(0, place)
        _refuse(found.isnan().flatten(1).any(1), ids, called, one)
        return full_precision(found.to(batch.ids.device))

    def require(
        self,
        *,
        teacher: nn.Module | str | None = None,
        dataset: IndexedDataset | str | None = None,
        augmentation_seed: int | Literal["none"] | None = None,
        versions: int | None = None,
        names: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> "TeacherTable":
        """Refuse a table that was made of something else; what is None is not compared.

        Args:
            teacher: the network, or its `teacher_fingerprint`.
            dataset: the data, before augmentation, or the `data` of a `Provenance`.
            augmentation_seed: "none" for inputs as they are.
            versions: different augmentations of each sample.
            names: what must be stored.
            dtype: that it must be stored in.

        Returns:
            The table itself.

        Raises:
            InputError: in one line, with all that differs.

        Examples:
            >>> from coloss.train import cache_teacher
            >>> data, teacher = IndexedDataset(torch.eye(2)), nn.Linear(2, 3)
            >>> table = cache_teacher(teacher, data).require(teacher=teacher, augmentation_seed="none")
            >>> table.require(augmentation_seed=7)
            Traceback (most recent call last):
            coloss.errors.InputError: the teacher outputs in memory do not apply: augmentation seed none stored, 7 wanted
        """
        stored = self.provenance
        wanted: list[tuple[str, Any, Any]] = []
        if teacher is not None:
            asked = teacher if isinstance(teacher, str) else teacher_fingerprint(teacher)
            wanted.append(("teacher", _short(stored.teacher), _short(asked)))
        if dataset is not None:
            data = dataset if isinstance(dataset, str) else data_fingerprint(dataset)
            wanted.append(("data", _short(stored.data), _short(data)))
        if augmentation_seed is not None:
            found = "none" if stored.augmentation_seed is None else stored.augmentation_seed
            wanted.append(("augmentation seed", found, augmentation_seed))
        if versions is not None:
            wanted.append(("versions", stored.versions, versions))
        if dtype is not None:
            wanted += [("type", column.dtype, dtype) for column in list(self._columns.values())[:1]]
        differing = [f"{what} {old} stored, {new} wanted" for what, old, new in wanted if old != new]
        missing = [name for name in names if name not in self._columns]
        if missing:
            differing.append(f"{_listed(self.names)} stored, {_listed(missing)} wanted")
        if differing:
            raise InputError(f"the teacher outputs in {self._where} do not apply: {'; '.join(differing)}")
        return self

    def state(self) -> dict[str, Any]:
        """Its provenance as plain values, for the extra state of what learns from it; empty where nothing is known."""
        return dict(vars(self.provenance)) if self.provenance.teacher is not None else {}

    def require_state(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on where a run that stored `state` learned from another table.

        Raises:
            InputError: as from `require`.
        """
        if state:
            made = Provenance(**state)
            seed: int | Literal["none"] = "none" if made.augmentation_seed is None else made.augmentation_seed
            self.require(
                teacher=made.teacher, dataset=made.data, augmentation_seed=seed, versions=made.versions
            )

    def dense(self, name: str = OUTPUT) -> Float[Tensor, "ids *shape"]:
        """One row for each id from 0 to the largest, on the CPU; NaN where there is no such id.

        Raises:
            InputError: for negative ids, or several versions of each sample.
        """
        if int(self.ids[0]) < 0 or self.provenance.versions > 1:
            raise InputError("a dense table needs ids >= 0 and one version of each sample")
        column = full_precision(self._column(name, "teacher outputs")[0])
        table = column.new_full((int(self.ids[-1]) + 1, *column.shape[1:]), math.nan)
        table[self.ids] = column
        return table

    def save(self, path: str | Path) -> Path:
        """Store the table as one safetensors file, whole or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        tensors = {name: value.cpu().contiguous() for name, value in self._tensors().items()}
        return write_table(Path(path), tensors, vars(self.provenance))

    @classmethod
    def load(cls, path: str | Path) -> "TeacherTable":
        """Open a stored table; its numbers stay in the file until a batch needs them.

        Raises:
            InputError: if the file is missing, truncated, altered, of another format or no such table.

        Cost:
            One pass over the file for its checksum, some seconds for 10 GB; no memory.
        """
        path = Path(path)
        tensors, values = read_table(path)
        ids, sketch = tensors.pop("/ids"), tensors.pop("/sketch", None)
        columns = {name.removeprefix("="): value for name, value in tensors.items()}
        return cls(ids, columns, sketch, Provenance(**values), path)

    @property
    def _where(self) -> str:
        return "memory" if self.path is None else str(self.path)

    def _tensors(self) -> dict[str, Tensor]:
        sketch = {} if self._sketch is None else {"/sketch": self._sketch}
        columns = {f"={name}": column for name, column in self._columns.items()}
        return {"/ids": self.ids, **sketch, **columns}

    def _column(self, name: str, called: str) -> Tensor:
        if name not in self._columns:
            raise InputError(
                f"{called} hold no {name or 'output'!r}{suggest_names(name, self.names)} (stored: {_listed(self.names)})"
            )
        return self._columns[name]

    def _version(self, batch: Batch, called: str) -> int:
        seed, version, versions = augmentation_of(batch)
        if self._sketch is None:
            return 0
        stored = self.provenance.augmentation_seed
        if seed != stored:
            made = "of inputs as they are" if stored is None else f"with augmentation seed {stored}"
            runs = "does not augment" if seed is None else f"augments with seed {seed}"
            raise InputError(
                f"{called} were made {made} and this run {runs}: give the run the SeededAugmentation of cache_teacher, or make them again"
            )
        if versions > self.provenance.versions:
            raise InputError(
                f"{called} hold {self.provenance.versions} versions of each sample and this run shows {versions}: "
                "give both as many versions"
            )
        return version

    def _check_inputs(self, batch: Batch, stored: Tensor, ids: Tensor, called: str) -> None:
        if batch.inputs is None:
            return
        if not self._last.was_of(batch.inputs):
            self._last = LastPass(batch.inputs, input_sketch(batch.inputs))
        sketch, size = (part.to(stored.device) for part in self._last.outputs)
        if len(sketch) != len(stored):
            raise InputError(f"{called} need one id for each sample, got {len(stored)} and {len(sketch)}")
        if sketch.shape != stored.shape:
            raise InputError(
                f"{called} were made of inputs of {stored.shape[1]} tensors, got {sketch.shape[1]}"
            )
        gap = (sketch - stored).abs().amax(2)
        # Not "gap > bound": what is NaN is no match.
        other = ~(gap <= _TOLERANCE * size.clamp(max=1)).all(1)
        if bool(other.any()):
            raise InputError(
                f"the inputs of sample {int(ids[other][0])} are not those that the teacher saw: this run augments, scales or mixes them otherwise "
                f"than {called} were made with (use SeededAugmentation for both, or let the teacher run)"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherTable":
        return self

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.path is None else (TeacherTable.load, (self.path,))


def _refuse(absent: Tensor, ids: Tensor, called: str, one: str) -> None:
    if bool(absent.any()):
        raise InputError(f"{called} must have {one} of every sample, got none for id {int(ids[absent][0])}")


def _short(fingerprint: str | None) -> str:
    return "unknown" if fingerprint is None else fingerprint[:12]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or "output" for name in names)
