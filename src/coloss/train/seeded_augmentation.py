"""Augmented training inputs that are a function of seed, epoch and sample alone, so that what a teacher says of them can be stored."""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.data.loader import epoch_generator
from coloss.data.stacking import View, default_views, stacked_views
from coloss.errors import InputError
from coloss.train.method import Method
from coloss.train.state import State

_SEED, _VERSION, _VERSIONS = "augmentation_seed", "augmentation_version", "augmentation_versions"
# Samples that are augmented at a time; the random draws depend on it.
_AT_ONCE = 1024


class SeededAugmentation(Method):
    """Train on one random view of each sample, the same one in every run with this seed.

    Epoch e shows version e mod `versions` of each sample, and a version is drawn for the whole data set by (seed, version), so it depends neither
    on the order of the batches nor on the number of processes or on a kill and resumption. Give the object to `coloss.train.cache_teacher`
    too, and teacher and student see the same views; with another seed the stored outputs are refused. It stands before the methods that
    read the batch.

    Args:
        dataset: that the run trains on; inputs are one float tensor.
        view: called as `view(inputs, generator=generator)`, gives (views, batch, ...), of which the first is shown; by default
            `coloss.data.default_views`.
        seed: >= 0.
        versions: of each sample, >= 1.

    Raises:
        InputError: for values out of range; in a run, if the batch has no ids, ids that the data set has not, or views already; or
            if the first batch of an epoch shows other inputs than the data set.

    Cost:
        The data set is augmented once for each epoch, and one augmented copy is kept in memory.

    Examples:
        >>> import coloss
        >>> from torch import nn
        >>> data = IndexedDataset(torch.randn(32, 4), torch.randint(3, (32,)))
        >>> run = coloss.fit(
        ...     nn.Linear(4, 3),
        ...     data,
        ...     nn.functional.cross_entropy,
        ...     [SeededAugmentation(data, seed=1, versions=2)],
        ...     budget=coloss.Budget(epochs=3),
        ... )
        >>> run.epochs
        3
    """

    def __init__(
        self, dataset: IndexedDataset, view: View | None = None, *, seed: int = 0, versions: int = 1
    ) -> None:
        super().__init__()
        if seed < 0:
            raise InputError(f"seed must be >= 0, got {seed}")
        if versions < 1:
            raise InputError(f"versions must be >= 1, got {versions}")
        self.dataset, self.seed, self.versions = dataset, seed, versions
        self.view: View = view if view is not None else partial(default_views, views=1)
        self._ids, self._order = dataset.ids.sort()
        self._kept: tuple[int, Tensor] | None = None
        self._compared: int | None = None

    def inputs(self, version: int) -> Float[Tensor, "samples ..."]:
        """One version of all inputs, in the order of the data set."""
        if self._kept is None or self._kept[0] != version:
            inputs = self.dataset.inputs
            if not isinstance(inputs, Tensor):
                raise InputError("the inputs to augment must be one tensor, got several")
            self._kept = None
            generator = epoch_generator(self.seed, version)
            parts = [stacked_views(self.view, part, generator)[0] for part in inputs.split(_AT_ONCE)]
            self._kept = version, torch.cat(parts)
        return self._kept[1]

    def setup(self, state: State) -> None:
        self._compared = None

    def on_batch(self, state: State) -> None:
        batch = state.batch
        if batch.ids is None:
            raise InputError("SeededAugmentation needs sample ids: train on a coloss.data.IndexedDataset")
        if "views" in batch.extras or _SEED in batch.extras:
            raise InputError("SeededAugmentation must stand before other methods that make views")
        ids = batch.ids.to(self._ids.device)
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        if not torch.equal(self._ids[place], ids):
            strange = int(ids[self._ids[place] != ids][0])
            raise InputError(
                f"SeededAugmentation must be given the data set of the run, got one without id {strange}"
            )
        if state.epoch != self._compared:
            self._compare(batch, self._order[place])
            self._compared = state.epoch
        version = state.epoch % self.versions
        shown = self.inputs(version)[self._order[place]].to(batch.ids.device)
        if isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
            shown = shown.to(batch.inputs)
        state.batch = self.marked(replace(batch, inputs=shown), version)

    def marked(self, batch: Batch, version: int) -> Batch:
        """A batch of `inputs(version)` that says so, for a table of stored outputs to compare."""
        extras = {**batch.extras, _SEED: self.seed, _VERSION: version, _VERSIONS: self.versions}
        return replace(batch, extras=extras)

    def _compare(self, batch: Batch, places: Tensor) -> None:
        """Refuse to replace inputs that are not those of the data set."""
        own, shown = self.dataset.inputs, batch.inputs
        if not isinstance(own, Tensor) or not isinstance(shown, Tensor):
            return
        own = own[places].to(shown)
        # Half precision may be reached in two steps of rounding.
        tolerance = 4 * torch.finfo(shown.dtype).eps if shown.is_floating_point() else 0
        if own.shape != shown.shape or not torch.allclose(own, shown, rtol=tolerance, atol=0, equal_nan=True):
            raise InputError(
                "SeededAugmentation must be given the data set of the run, and stand before methods that change inputs: "
                "got one with other inputs for the same ids"
            )


def augmentation_of(batch: Batch) -> tuple[int | None, int, int]:
    """Seed, version and number of versions of a batch's augmentation; None, 0 and 1 where no `SeededAugmentation` made it.

    Examples:
        >>> augmentation_of(Batch(torch.zeros(1)))
        (None, 0, 1)
    """
    extras = batch.extras
    return extras.get(_SEED), extras.get(_VERSION, 0), extras.get(_VERSIONS, 1)
