"""The one contract of every training method: an nn.Module with hooks that do nothing by default."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coloss.train.schedules import Schedule
from coloss.train.state import State

if TYPE_CHECKING:
    from coloss.train.task import Setting


class Method(nn.Module):
    """A training method: override the hooks it acts on, leave the rest.

    A method is an `nn.Module`, so heads it owns are moved, optimised and checkpointed like the model. Anything else it must
    remember (counters, tables) belongs in buffers, or in `get_extra_state` as plain JSON values: then a resumed run is
    bit-identical. Randomness comes from `state.generator` or `state.local_generator`.

    Attributes:
        term_weights: default weight (number or schedule) of each term it returns; 1 where absent. The combiner may override.
        replaces_objective: if True, the run's objective is not computed: the terms of this method stand in for it.
        batch_statistic: if True, its terms belong to the batch as a whole, not to its samples one by one: gradient accumulation then
            joins the micro-batches instead of averaging their gradients.
        reads_outputs: whether its hooks need the model's forward pass on the batch (its outputs, tapped features, or the statistics that a
            batch norm gathers in it). In a run without objective in which no method needs it, the pass is left out and `state.outputs`
            is None.
        accumulates: for a method with a `backward` of its own: True if that is right under gradient accumulation, being called for
            each of `state.micro_batches` and leaving the gradients of their mean with the last one; otherwise such a run is refused.

    Under `fit(accumulate=k)`, `on_batch` and `terms` run for each micro-batch, the other hooks once for each optimizer step, when
    `state.batch` is the last micro-batch; where micro-batches are joined, all hooks run once, on the joined batch.
    `state.log({"rank": 12.3})` in any hook reports a diagnostic into the run's history, its loggers and the report.

    Examples:
        >>> import torch, coloss
        >>> class Smoothness(Method):
        ...     def terms(self, state):
        ...         return {"smoothness": state.outputs.square().mean()}
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> run = coloss.fit(
        ...     nn.Linear(4, 3),
        ...     data,
        ...     nn.functional.cross_entropy,
        ...     [Smoothness()],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> sorted(run.history[-1].terms)
        ['cross_entropy', 'smoothness']
    """

    term_weights: Mapping[str, Schedule] = {}
    replaces_objective: bool = False
    batch_statistic: bool = False
    reads_outputs: bool = True
    accumulates: bool = False

    @property
    def takes_backward(self) -> bool:
        """Whether `backward` of this method stands in for the plain backward pass; by default, whether it is overridden."""
        return overrides(self, "backward")

    def setup(self, state: State) -> None:
        """Once, before the optimizer exists: add heads, swap layers, tap features, freeze."""

    def on_batch(self, state: State) -> None:
        """Before the forward pass: edit or extend `state.batch`; edit weights that the forward must see."""

    def terms(self, state: State) -> dict[str, Tensor]:
        """After the forward pass: named scalar loss terms to add."""
        return {}

    def backward(self, state: State, terms: dict[str, Tensor]) -> None:
        """Instead of the plain backward pass: leave gradients on `state.trainable`. At most one method of a run may.

        `state.gradients(loss)` gives the gradients of one loss, averaged over processes; `state.combine(state, some_terms)` the weighted
        sum of some terms; `state.set_gradients` stores the result.
        """

    def on_gradients(self, state: State) -> None:
        """After backward, before the step: edit gradients."""

    def on_step(self, state: State) -> None:
        """After the optimizer step: project, prune, update averages. `state.step` already counts this step."""

    def on_epoch(self, state: State) -> None:
        """At the end of an epoch. `state.epoch` already counts it."""

    def finish(self, state: State) -> None:
        """Leave `state.model` as it ships: strip auxiliary heads, merge adapters, apply masks."""

    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        """After training: numbers about the shipped model that need the method's own parts, such as meters of its projector's output.

        The lab adds them to an arm's metrics.

        Args:
            model: as it ships, in eval mode.
            data: the training data, any kind that `coloss.metrics.extract_features` takes.
        """
        return {}

    @classmethod
    def for_setting(cls, setting: "Setting", **parameters: Any) -> "Method":
        """Build the method for a task of the lab; override when it needs something of the task (a teacher, a class count)."""
        return cls(**parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is a method with hooks, not a layer: pass it to fit(methods=[...])"
        )


def overrides(method: nn.Module, hook: str) -> bool:
    """Tell whether a method does anything at a hook."""
    return getattr(type(method), hook, None) is not getattr(Method, hook)
