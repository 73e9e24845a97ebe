"""What the hooks of a Method see of the training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.nn.taps import Taps
from coloss.ops import distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from coloss.train.method import Method


M = TypeVar("M", bound=nn.Module)


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
        micro_batch: number of the present batch among those whose gradients make one optimizer step, from 0.
        micro_batches: how many those are; 1 without gradient accumulation.
        optimizer: the optimizer; None during `setup`.
        fabric: the Lightning Fabric, or None in a plain loop.
        generator: randomness that is equal on every process (slices, shared masks).
        local_generator: randomness that differs between processes (views of a process's own rows).
        trainable: the parameters that the optimizer updates.
        logged: sum and count of each quantity given to `log` since the last `take_logged`.
        graph_is_cut: True while a batch statistic is computed on joined micro-batches, whose graph ends at the model's outputs.
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
    micro_batch: int = 0
    micro_batches: int = 1
    optimizer: torch.optim.Optimizer | None = None
    fabric: "Fabric | None" = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    local_generator: torch.Generator = field(default_factory=torch.Generator)
    trainable: list[nn.Parameter] = field(default_factory=list)
    logged: dict[str, list[float]] = field(default_factory=dict)
    graph_is_cut: bool = False
    _taps: Taps | None = None
    _tapped: dict[str, str] = field(default_factory=dict)

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Report diagnostics, from any hook: they reach the history, the loggers and the report like evaluation metrics.

        They stand in the `metrics` of the next logged point (that of this step, where `log_every` divides it), each as the mean over
        everything logged under its name since the point before, whoever logged it: two methods that both log "rank" are averaged. A
        name that a loss term or an evaluation metric has is refused there. Several processes log their own values.

        Args:
            metrics: name -> number, or tensor with one element. NaN and infinities are kept.

        Raises:
            InputError: if a value is not one number.

        Cost: nothing but the conversion to a Python number, which waits for the device.

        Examples:
            >>> state = State(nn.Identity())
            >>> state.log({"rank": 2})
            >>> state.log({"rank": torch.tensor(4.0), "share": 0.5})
            >>> state.take_logged(), state.take_logged()
            ({'rank': 3.0, 'share': 0.5}, {})
        """
        for name, value in metrics.items():
            try:
                number = float(value.item() if isinstance(value, Tensor) else value)
            except (TypeError, ValueError, RuntimeError) as error:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"the logged value {name!r} must be one number, got {found}") from error
            entry = self.logged.setdefault(name, [0.0, 0])
            entry[0] += number
            entry[1] += 1

    def take_logged(self) -> dict[str, float]:
        """The means of everything logged since the last call."""
        found = {name: total / count for name, (total, count) in self.logged.items()}
        self.logged = {}
        return found

    def like_model(self, module: M) -> M:
        """Bring a new head to the device and floating type of the model's parameters.

        Examples:
            >>> state = State(nn.Linear(2, 2).double())
            >>> state.like_model(nn.Linear(2, 1)).weight.dtype
            torch.float64
        """
        like = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        return module if like is None else module.to(like)

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

    def reached_features(self) -> dict[str, Any]:
        """The tapped features that the last forward pass gave a value to."""
        return {} if self._taps is None else dict(self._taps._values)

    def replace_features(self, features: Mapping[str, Any]) -> None:
        """Put other values in place of the tapped features, until the next forward pass."""
        self.clear_features()
        if self._taps is not None:
            self._taps._values.update(features)

    def close_taps(self) -> None:
        """Remove all hooks from the model."""
        if self._taps is not None:
            self._taps.close()
            self._taps = None
            self._tapped.clear()

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor] | None = None, *, keep_graph: bool = True
    ) -> list[Tensor | None]:
        """Gradients of one loss on `parameters` (default: all trainable), averaged over processes; None where it does not reach.

        Args:
            loss: a scalar with a graph.
            parameters: to differentiate by.
            keep_graph: so that several losses can be differentiated in turn; False frees it, for the last of them.

        Raises:
            InputError: for parameters of the model, while micro-batches are joined for a batch statistic.
        """
        parameters = self.trainable if parameters is None else parameters
        if self.graph_is_cut:
            own = {id(parameter) for parameter in self.model.parameters()}
            if any(id(parameter) in own for parameter in parameters):
                raise InputError(
                    "a method takes gradients on the model's parameters, but accumulate > 1 with a batch statistic cuts the graph at "
                    "the model's outputs: use accumulate=1"
                )
        found: list[Tensor | None] = list(
            torch.autograd.grad(loss, list(parameters), retain_graph=keep_graph, allow_unused=True)
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
