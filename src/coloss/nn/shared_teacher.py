"""One frozen teacher for several methods, which runs once for each batch however many ask it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from coloss.nn.frozen import Frozen
from coloss.nn.taps import Taps


class SharedTeacher(Frozen):
    """A frozen network that remembers its last pass, and gives inner features besides its output.

    Give one object to all methods of a run that learn from the network: as long as they ask for the same inputs (the same tensor
    objects, unchanged), it runs once. Inputs that are merely equal are run again.

    Args:
        module: the network, frozen in place; a `SharedTeacher` or `Frozen` is unwrapped, not wrapped twice.

    Attributes:
        passes: forward passes of the network so far.

    Returns:
        From `forward(inputs)`: the network's output, without a graph.

    Raises:
        ValueError: from `watch`, for a path that the network does not have, with close ones.

    Cost:
        The output and the watched features of one batch stay in memory until the next one, or `forget`.

    Examples:
        >>> teacher = SharedTeacher(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
        >>> teacher.watch(["0"])
        >>> inputs = torch.randn(5, 4)
        >>> teacher(inputs).shape, teacher.features(inputs)["0"].shape, teacher.passes
        (torch.Size([5, 3]), torch.Size([5, 8]), 1)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.module if isinstance(module, Frozen) else module)
        self.passes = 0
        self._taps = Taps(self.module, {})
        self._last = LastPass()

    def watch(self, paths: Iterable[str]) -> None:
        """Keep the features at some module paths (with ":input" for what goes in) at every pass from now on."""
        for path in paths:
            if path not in self._taps:
                self._taps.add(path, path)
                self.forget()

    def features(self, inputs: Any) -> Taps:
        """The watched features of some inputs, by path."""
        self(inputs)
        return self._taps

    def forget(self) -> None:
        """Drop what is remembered of the last pass."""
        self._last = LastPass()
        self._taps.clear()

    def unwatch(self) -> None:
        """Take all hooks out of the network, and drop what is remembered."""
        self._taps.close()
        self._taps = Taps(self.module, {})
        self.forget()

    @torch.no_grad()
    def forward(self, inputs: Any) -> Any:
        if not self._last.was_of(inputs):
            self._taps.clear()
            self._last = LastPass(inputs, self.module(inputs))
            self.passes += 1
        return self._last.outputs

    def _apply(self, fn: Any, recurse: bool = True) -> "SharedTeacher":
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called for each module of what is loaded, so also where a method around this teacher is.
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class LastPass:
    """Inputs (not kept alive) of a pass over a batch, and what it gave; a copy knows of none."""

    def __init__(self, inputs: Any = None, outputs: Any = None) -> None:
        self.seen = None if inputs is None else _marks(inputs)
        self.outputs = outputs

    def was_of(self, inputs: Any) -> bool:
        """Whether these are the same tensor objects, unchanged, in the same nesting and under the same autocast."""
        if self.seen is None:
            return False
        (structure, marks), (seen_structure, seen) = _marks(inputs), self.seen
        return structure == seen_structure and all(
            one[1:] == other[1:] and one[0]() is other[0]() for one, other in zip(marks, seen, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "LastPass":
        return LastPass()

    def __reduce__(self) -> tuple[Any, ...]:
        return LastPass, ()


def _marks(inputs: Any) -> tuple[TreeSpec, list[tuple[Any, ...]]]:
    """The nesting, and what tells tensors apart: the object, how often it was written to, and the precision that is computed in."""
    leaves, structure = tree_flatten(inputs)
    marks: list[tuple[Any, ...]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            device = leaf.device.type
            mixed = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
            version = None if leaf.is_inference() else leaf._version
            marks.append((weakref.ref(leaf), version, mixed))
        else:
            marks.append((lambda value=leaf: value, None, None))
    return structure, marks
