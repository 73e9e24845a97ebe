"""One training step as a line of stations, for `fit`, for Lightning and for a loop of your own."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.train.accumulation import check_averaging
from coloss.train.combine import WeightedSum
from coloss.train.method import Method, overrides
from coloss.train.state import State

Objective: TypeAlias = Callable[[Any, Any], Tensor | Mapping[str, Tensor]]


class TrainingStep(nn.Module):
    """Model, objective and methods as one module: its forward gives the loss terms, its `backward` the gradients.

    batch -> `on_batch` -> model -> objective and `terms` -> combine -> backward -> `on_gradients` -> (your optimizer) ->
    `after_step` -> `on_step`.

    Args:
        model: any network; called as `model(inputs)`.
        objective: `(outputs, targets) -> scalar, or dict of named scalars`; None when a method supplies the loss.
        methods: methods, applied in this order; `setup` runs here.
        combine: how terms become one loss; default: a sum with the methods' own weights.
        total_steps: length of training, if known: gives `state.progress` to schedules in a plain loop.
        state: a state made beforehand (generators, Fabric); default: a new one.

    Raises:
        InputError: if two methods (or a method and the combiner) both take over the backward pass; if there is no objective and no
            method; at the first step, if two sources give a term of the same name, or a term is not a scalar; at `backward`, if
            micro-batches are accumulated whose gradients may not be averaged.

    Examples:
        >>> import torch
        >>> model = nn.Linear(4, 3)
        >>> step = TrainingStep(model, nn.functional.cross_entropy, total_steps=2)
        >>> optimizer = torch.optim.SGD(step.trainable, lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     step.backward(step(torch.randn(8, 4), torch.randint(3, (8,))))
        ...     optimizer.step()
        ...     step.after_step()
        >>> step.finish() is model, step.state.progress
        (True, 1.0)

        Several micro-batches for one optimizer step: tell each its place, and the gradients of their mean add up.

        >>> inputs, targets = torch.randn(32, 4), torch.randint(3, (32,))
        >>> step = TrainingStep(model, nn.functional.cross_entropy)
        >>> optimizer.zero_grad()
        >>> for number, micro_batch in enumerate(zip(inputs.split(8), targets.split(8))):
        ...     step.state.micro_batch, step.state.micro_batches = number, 4
        ...     step.backward(step(*micro_batch))
        >>> optimizer.step()
        >>> step.after_step()
        >>> step.state.step
        1
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        methods: Sequence[Method] = (),
        *,
        combine: nn.Module | Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        state: State | None = None,
    ):
        super().__init__()
        for method in methods:
            if not isinstance(method, Method):
                raise InputError(f"methods must be coloss.Method objects, got {type(method).__name__}")
        if len({id(method) for method in methods}) != len(methods):
            raise InputError("methods must be distinct objects, got the same one twice")
        replaced = any(method.replaces_objective for method in methods)
        self.objective = None if replaced else objective
        if self.objective is None and not methods:
            raise InputError("there is no loss: give an objective, or a method that adds terms")
        self.state = state if state is not None else State(model)
        self.state.model, self.state.methods, self.state.objective = model, tuple(methods), self.objective
        self.total_steps = total_steps
        self.returns_views = False
        self.methods = nn.ModuleList(methods)
        self.combine = combine if isinstance(combine, nn.Module) else WeightedSum(combine)
        self.state.combine = self.combine
        self._objective_name = term_name(self.objective)
        self.taker = self._find_taker()
        for method in methods:
            method.setup(self.state)
        self.model = self.state.model
        self._batch_hooks, self._term_hooks, self._gradient_hooks, self._step_hooks, self._epoch_hooks = (
            [method for method in methods if overrides(method, hook)]
            for hook in ("on_batch", "terms", "on_gradients", "on_step", "on_epoch")
        )
        self.refresh_trainable()

    def _find_taker(self) -> Any:
        takers: list[nn.Module] = [method for method in self.state.methods if method.takes_backward]
        if hasattr(type(self.combine), "backward"):
            takers.append(self.combine)
        if len(takers) > 1:
            names = " and ".join(type(taker).__name__ for taker in takers)
            raise InputError(f"{names} each take over the backward pass: a run can have one at most")
        return takers[0] if takers else None

    @property
    def reads_outputs(self) -> bool:
        """Whether anything of this run needs the model's forward pass on the batch."""
        return (
            self.objective is not None
            or len(self.state.features) > 0
            or any(method.reads_outputs for method in self.state.methods)
        )

    def refresh_trainable(self) -> None:
        """List the trainable parameters anew, after something replaced or froze parameters."""
        self.state.trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters to give to the optimizer: of the model, the methods, the objective and the combiner."""
        return self.state.trainable

    def forward(self, *batch: Any) -> dict[str, Tensor]:
        """Run the model and collect the loss terms.

        Args:
            batch: `inputs`, or `inputs, targets[, ids]`, or one Batch or dict; nothing if `state.batch` is set already.

        Returns:
            The named scalar loss terms, unweighted.
        """
        state = self.state
        self.start(Batch.of(batch[0] if len(batch) == 1 else batch) if batch else state.batch)
        state.outputs = self.model(state.batch.inputs) if self.reads_outputs else None
        terms = self.collect_terms()
        return {name: term.view_as(term) for name, term in terms.items()} if self.returns_views else terms

    def start(self, batch: Batch) -> None:
        """Take up a batch: the stations before the model."""
        state = self.state
        # The last step's graph must be gone before this one's grows.
        state.outputs, state.terms = None, {}
        state.clear_features()
        state.batch = batch
        for method in self._batch_hooks:
            method.on_batch(state)  # type: ignore[operator]

    def collect_terms(self) -> dict[str, Tensor]:
        """The named loss terms of `state.outputs`, from the objective and the methods."""
        state = self.state
        terms: dict[str, Tensor] = {}
        if self.objective is not None:
            found = self.objective(state.outputs, state.batch.targets)
            terms.update(found if isinstance(found, Mapping) else {self._objective_name: found})
        for method in self._term_hooks:
            for name, term in method.terms(state).items():  # type: ignore[operator]
                if name in terms:
                    raise InputError(
                        f"the loss term {name!r} of {type(method).__name__} exists already: rename one of the two"
                    )
                terms[name] = term
        if state.step == 0:
            _check_terms(terms)
        state.terms = terms
        return terms

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Leave the gradients of the combined loss on the parameters, then let methods edit them.

        Of several micro-batches (`state.micro_batches`) each adds its share of the mean, and the methods edit after the last.
        """
        state = self.state
        accumulating = state.micro_batches > 1
        if accumulating:
            check_averaging(self)
        if self.taker is not None:
            self.taker.backward(state, terms)
        else:
            total = self.combine(state, terms)
            self.propagate(total / state.micro_batches if accumulating else total)
        if state.micro_batch + 1 == state.micro_batches:
            self.edit_gradients()

    def propagate(self, loss: Tensor) -> None:
        """Add the gradients of one loss to those of the parameters."""
        if self.state.fabric is None:
            loss.backward()
        else:
            self.state.fabric.backward(loss)

    def edit_gradients(self) -> None:
        """Let the methods edit the gradients."""
        state = self.state
        for method in self._gradient_hooks:
            method.on_gradients(state)  # type: ignore[operator]

    def after_step(self) -> None:
        """Count the optimizer step and run the hooks after it."""
        state = self.state
        state.step += 1
        if self.total_steps is not None:
            state.progress = min(state.step / self.total_steps, 1.0)
        for method in self._step_hooks:
            method.on_step(state)  # type: ignore[operator]

    def after_epoch(self) -> None:
        """Count the epoch and run the hooks at its end."""
        self.state.epoch += 1
        for method in self._epoch_hooks:
            method.on_epoch(self.state)  # type: ignore[operator]

    def finish(self) -> nn.Module:
        """Let every method clean up, remove all hooks, and return the model as it ships."""
        for method in self.state.methods:
            method.finish(self.state)
        self.state.close_taps()
        self.model = self.state.model
        return self.model


def term_name(objective: Any) -> str:
    """The name a bare objective's term is logged by: `cross_entropy` for `F.cross_entropy` and for `nn.CrossEntropyLoss()`.

    Examples:
        >>> (
        ...     term_name(nn.CrossEntropyLoss()),
        ...     term_name(nn.functional.mse_loss),
        ...     term_name(lambda outputs, targets: 0),
        ... )
        ('cross_entropy', 'mse', 'objective')
    """
    name = getattr(objective, "__name__", None) or type(objective).__name__
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().removesuffix("_loss")
    return name if name.isidentifier() and name not in ("partial", "none_type") else "objective"


def _check_terms(terms: Mapping[str, Tensor]) -> None:
    if not terms:
        raise InputError("there is no loss: give an objective, or a method that adds terms")
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.dim() != 0:
            shape = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise InputError(f"the loss term {name!r} must be a scalar tensor, got {shape}")
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        raise InputError(f"no loss term depends on a trainable parameter (terms: {sorted(terms)})")
