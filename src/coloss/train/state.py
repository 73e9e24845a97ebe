"""What the hooks of a Method see of the training run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.nn.taps import Taps
from coloss.ops import distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from coloss.train.method import Method


@dataclass
class State:
    """Everything one training run shares between its stations.

    Attributes:
        model: the network being trained. `setup` and `finish` may replace it.
        methods: the methods on this run, in order.
        objective: the user's loss `(outputs, targets) -> scalar or dict of scalars`, or None.
        combine: the combiner, `combine(state, terms) -> scalar`.
        batch: the current batch (`inputs`, `targets`, `ids`, `extras`); `on_batch` may edit it.
        outputs: what the model returned for `batch.inputs`.
        terms: the named loss terms of this step.
        step: optimizer steps done so far.
        epoch: epochs done so far.
        progress: share of the budget spent, in [0, 1].
        optimizer: the optimizer; None during `setup`.
        fabric: the Lightning Fabric, or None in a plain loop.
        generator: randomness that is equal on every process (slices, shared masks).
        local_generator: randomness that differs between processes (views of a process's own rows).
        trainable: the parameters that the optimizer updates.
    """

    model: nn.Module
    methods: Sequence["Method"] = ()
    objective: Any = None
    combine: Any = None
    batch: Batch = field(default_factory=lambda: Batch(inputs=None))
    outputs: Any = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    optimizer: torch.optim.Optimizer | None = None
    fabric: "Fabric | None" = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    local_generator: torch.Generator = field(default_factory=torch.Generator)
    trainable: list[nn.Parameter] = field(default_factory=list)
    _taps: Taps | None = None
    _tapped: dict[str, str] = field(default_factory=dict)

    def tap(self, name: str, path: str) -> None:
        """Keep the output of the submodule at `path` (or its input: `"head:input"`) in `features[name]` at every forward.

        Two methods may share a name if they mean the same place.

        Raises:
            ValueError: if the model has no such submodule, or the name stands for another place already.
        """
        if self._tapped.get(name) != path:
            self.features.add(name, path)
            self._tapped[name] = path

    @property
    def features(self) -> Taps:
        """Tapped features of the last forward, by the name given to `tap`."""
        if self._taps is None:
            self._taps = Taps(self.model, {})
        return self._taps

    def clear_features(self) -> None:
        """Forget the tapped features, and the graph they hold."""
        if self._taps is not None:
            self._taps.clear()

    def close_taps(self) -> None:
        """Remove all hooks from the model."""
        if self._taps is not None:
            self._taps.close()
            self._taps = None
            self._tapped.clear()

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor] | None = None) -> list[Tensor | None]:
        """Gradients of one loss on `parameters` (default: all trainable), averaged over processes; None where it does not reach.

        The graph is kept, so that several losses can be differentiated in turn.
        """
        parameters = self.trainable if parameters is None else parameters
        found: list[Tensor | None] = list(
            torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        )
        if distributed.world_size() > 1:
            for gradient in found:
                if gradient is not None:
                    torch.distributed.all_reduce(gradient)
                    gradient.div_(distributed.world_size())
        return found

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Store gradients of the trainable parameters where the optimizer reads them."""
        for parameter, gradient in zip(self.trainable, gradients, strict=True):
            parameter.grad = gradient
