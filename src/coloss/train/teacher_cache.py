"""Runs a teacher over a data set once, and keeps what it says of every sample in a `TeacherTable`, in memory or in a file."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.nn import Frozen, Taps
from coloss.train.provenance import (
    Provenance,
    data_fingerprint,
    input_sketch,
    teacher_fingerprint,
)
from coloss.train.seeded_augmentation import SeededAugmentation
from coloss.train.teacher_table import OUTPUT, TeacherTable

# Share of the size of stored rows up to which the teacher may now say something else: devices differ by less.
_SAME = 0.02


def cache_teacher(
    teacher: nn.Module,
    dataset: IndexedDataset,
    path: str | Path | None = None,
    *,
    taps: Sequence[str] = (),
    augmentation: SeededAugmentation | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 512,
) -> TeacherTable:
    """Run a teacher over a data set once, so that it need not run at every training step.

    Args:
        teacher: runs in evaluation mode and is left as it was.
        dataset: samples by id, before augmentation.
        path: file to keep the outputs in. If it is there it is opened instead, after it was checked against all other arguments; the
            teacher then runs on one batch, whose outputs are compared.
        taps: module paths of inner features to store besides the output (with ":input" for what goes in). Where they are given, the output
            of a teacher that returns no tensor is left out.
        augmentation: of the run that will learn from the table; each of its versions is stored.
        dtype: `torch.float32`, or `torch.float16` for half the space (it keeps 3 digits).
        batch_size: samples in one forward pass.

    Returns:
        The table, in memory, or in the file that `path` names.

    Raises:
        InputError: if `path` holds outputs of another teacher, augmentation or data set, or in another type (the message says which), or is
            damaged; if an output is no tensor with one row of one shape for each sample, is NaN, or does not fit `dtype`; for an unknown
            module path, or a batch_size < 1.

    Cost:
        One pass over the data for each version; all that is stored is in memory once while it is made, and one batch.

    Examples:
        >>> data, teacher = IndexedDataset(torch.randn(6, 4), ids=[3, 8, 1, 9, 4, 5]), nn.Linear(4, 3)
        >>> table = cache_teacher(teacher, data)
        >>> batch = data.take(torch.tensor([2, 0]))
        >>> torch.allclose(table.rows(batch), teacher(batch.inputs)), table.ids.tolist()
        (True, [1, 3, 4, 5, 8, 9])
    """
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    if augmentation is not None and augmentation.dataset is not dataset:
        same = data_fingerprint(augmentation.dataset) == data_fingerprint(dataset)
        if not same or not torch.equal(augmentation.dataset.ids, dataset.ids):
            raise InputError("augmentation must be of the same data set, in the same order")
    if batch_size < 1:
        raise InputError(f"batch_size must be >= 1, got {batch_size}")
    run = _Run(teacher, dataset, augmentation, taps, batch_size)
    if path is not None and Path(path).exists():
        stored = TeacherTable.load(path).require(
            teacher=teacher,
            dataset=dataset,
            augmentation_seed="none" if augmentation is None else augmentation.seed,
            versions=1 if augmentation is None else augmentation.versions,
            names=tuple(taps) or (OUTPUT,),
            dtype=dtype,
        )
        run.compare(stored)
        return stored
    table = run.table(dtype)
    return table if path is None else TeacherTable.load(table.save(path))


class _Run:
    """The passes of a teacher over one data set."""

    def __init__(
        self,
        teacher: nn.Module,
        dataset: IndexedDataset,
        augmentation: SeededAugmentation | None,
        taps: Sequence[str],
        batch_size: int,
    ) -> None:
        self.module = teacher.module if isinstance(teacher, Frozen) else teacher
        self.dataset, self.augmentation = dataset, augmentation
        self.versions = 1 if augmentation is None else augmentation.versions
        self.taps, self.batch_size = tuple(taps), batch_size
        tensor = next(chain(self.module.parameters(), self.module.buffers()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        try:
            Taps(self.module, {tap: tap for tap in self.taps}).close()
        except ValueError as error:
            raise InputError(f"taps must name modules of the teacher: {error}") from error

    def table(self, dtype: torch.dtype) -> TeacherTable:
        """All outputs, in the order of ids, each written once to where it stays."""
        ids, order = self.dataset.ids.cpu().sort()
        if not len(ids):
            raise InputError("dataset must hold at least one sample, got none")
        rank = order.argsort()
        columns: dict[str, Tensor] = {}
        sketches = torch.empty(0)
        for version in range(self.versions):
            data = self._shown(version)
            with evaluation_mode(self.module):
                for places in torch.arange(len(ids)).split(self.batch_size):
                    inputs = data.take(places.to(data.ids.device)).inputs
                    sketch = input_sketch(inputs)[0].cpu()
                    if not len(sketches):
                        sketches = sketch.new_empty(self.versions, len(ids), *sketch.shape[1:])
                    sketches[version, rank[places]] = sketch
                    some = ids[rank[places]]
                    for name, values in self._outputs(inputs).items():
                        kept = _checked(values, name or "output", some, dtype)
                        if name not in columns:
                            columns[name] = kept.new_empty(self.versions, len(ids), *kept.shape[1:])
                        if kept.shape[1:] != columns[name].shape[2:]:
                            shapes = tuple(columns[name].shape[2:]), tuple(kept.shape[1:])
                            raise InputError(
                                f"the teacher's {name or 'output'} must have one shape for all samples, got {shapes[0]} and {shapes[1]}"
                            )
                        columns[name][version, rank[places]] = kept
        made = Provenance(
            teacher_fingerprint(self.module),
            data_fingerprint(self.dataset),
            None if self.augmentation is None else self.augmentation.seed,
            self.versions,
        )
        return TeacherTable(ids, columns, sketches, made)

    def compare(self, stored: TeacherTable) -> None:
        """Refuse a table if the teacher, or the view, does something else with the first batch: code has no fingerprint."""
        places = torch.arange(min(self.batch_size, len(self.dataset)))
        batch = self._shown(0).take(places.to(self.dataset.ids.device))
        if self.augmentation is not None:
            batch = self.augmentation.marked(batch, 0)
        with evaluation_mode(self.module):
            outputs = self._outputs(batch.inputs)
        for name in self.taps or (OUTPUT,):
            rows, now = stored.rows(batch, name), outputs[name]
            if not _alike(rows.cpu(), now):
                raise InputError(
                    f"the teacher outputs in {stored.path} do not apply: the teacher's weights are those stored, but its "
                    f"{name or 'output'} for the same samples is not: its code differs"
                )

    def _shown(self, version: int) -> IndexedDataset:
        if self.augmentation is None:
            return self.dataset
        return IndexedDataset(self.augmentation.inputs(version), ids=self.dataset.ids)

    def _outputs(self, inputs: Any) -> dict[str, Any]:
        with Taps(self.module, {tap: tap for tap in self.taps}) as reader:
            output = self.module(Batch(inputs).to(self.device).inputs)
        found = dict(reader)
        if isinstance(output, Tensor) or not self.taps:
            found = {OUTPUT: output, **found}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found.items()}


def _checked(values: Any, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Outputs of some samples, in the type to store."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape[:1] != ids.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the teacher's {name} must be a float tensor with one row for each of {len(ids)} samples, got {found}"
        )
    if values.ndim < 2:
        raise InputError(f"the teacher's {name} must have two dimensions or more, got {tuple(values.shape)}")
    kept = values.to(dtype)
    bad = values.isnan() | (kept.isinf() & values.isfinite())
    if bool(bad.any()):
        first = int(ids[bad.flatten(1).any(1)][0])
        raise InputError(
            f"the teacher's {name} must be numbers that fit {dtype}, got none such for sample id {first}"
        )
    return kept


def _alike(rows: Tensor, now: Any) -> bool:
    """Whether outputs are equal up to the rounding of devices and of half precision."""
    if not isinstance(now, Tensor) or now.shape != rows.shape:
        return False
    now, finite = now.to(rows), rows.isfinite()
    if not torch.equal(rows[~finite], now[~finite]):
        return False
    rows, now = rows[finite], now[finite]
    return bool(((rows - now).abs() <= _SAME * (rows.abs() + rows.square().mean().sqrt())).all())
