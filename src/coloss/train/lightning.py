"""The same methods inside a PyTorch Lightning `Trainer`, as one callback."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.train.accumulation import check_averaging
from coloss.train.method import Method
from coloss.train.schedules import Schedule
from coloss.train.state import State
from coloss.train.step import TrainingStep

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "the Lightning callback needs the package lightning: pip install 'coloss[lightning]'"
    ) from error


class MethodCallback(Callback):
    """Runs methods at the hooks of a Lightning `Trainer`.

    The LightningModule keeps its own `training_step`, whose loss becomes the term "objective"; the methods' terms are added to it.
    Where a method replaces the objective, `training_step` still runs, for its forward pass, and its loss is left out.
    Their heads are submodules of the LightningModule during training, so `configure_optimizers` must build the optimizer from
    `self.parameters()`, and Lightning's checkpoints hold them. After training, `finish` has run and the heads are gone. What methods
    report with `state.log` goes to `pl_module.log`, and from there to the Trainer's loggers.

    Args:
        methods: the methods, in order.
        model: attribute of the LightningModule that holds the network ("model"), or "" for the LightningModule itself.
        weights: as for `WeightedSum`; the LightningModule's own loss is named "objective".

    Raises:
        InputError: if the attribute is missing, or two methods take over the backward pass; if the Trainer accumulates gradients that may not be averaged.

    Examples:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from coloss import MethodCallback
        >>> callback = MethodCallback([])
        >>> trainer = Trainer(
        ...     callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        model: str = "model",
        weights: Mapping[str, Schedule] | None = None,
    ):
        super().__init__()
        self.methods = list(methods)
        self.attribute = model
        self.weights = weights
        self._step: _LightningStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._step is not None:
            return
        network: Any = getattr(pl_module, self.attribute, None) if self.attribute else pl_module
        if not isinstance(network, nn.Module):
            raise InputError(
                f"the LightningModule has no module {self.attribute!r}: name the attribute that holds the network"
            )
        state = State(network)
        state.generator.manual_seed(0)
        state.local_generator.manual_seed(1_000_003 + trainer.global_rank)
        self._step = _LightningStep(network, self.methods, self.weights, state)
        if trainer.accumulate_grad_batches > 1:
            check_averaging(self._step)
        if state.model is not network:
            if not self.attribute:
                raise InputError(
                    "a method replaced the model: give the network its own attribute in the LightningModule"
                )
            setattr(pl_module, self.attribute, state.model)
        pl_module.coloss_methods = self._step.methods
        self._outputs_hook = state.model.register_forward_hook(self._step.keep_outputs)
        self._own_training_step, self._own_backward = pl_module.training_step, pl_module.backward
        pl_module.training_step = self._training_step  # type: ignore[method-assign]
        if self._step.taker is not None:
            if trainer.precision == "16-mixed":
                raise InputError(
                    "precision 16-mixed scales gradients, which a method edits: use bf16-mixed or 32-true"
                )
            pl_module.backward = self._backward  # type: ignore[method-assign,assignment]

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        step = self._step
        assert step is not None
        step.state.batch = Batch.of(batch)
        edited = step.prepare(batch)
        result = self._own_training_step(edited, *args, **kwargs)
        loss: Any = result["loss"] if isinstance(result, Mapping) else result
        total = step.total(loss)
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        assert self._step is not None
        self._step.backward_terms()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._step is not None
        self._step.state.optimizer = trainer.optimizers[0] if trainer.optimizers else None
        self._step.state.trainable = [p for p in pl_module.parameters() if p.requires_grad]
        # A Trainer that resumes from its checkpoint starts in the middle.
        self._step.state.step, self._step.state.epoch = trainer.global_step, trainer.current_epoch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert self._step is not None
        for method in self._step._gradient_hooks:
            method.on_gradients(self._step.state)  # type: ignore[operator]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = self._step
        assert step is not None
        if trainer.global_step > step.state.step:
            total = trainer.estimated_stepping_batches
            step.state.progress = min((step.state.step + 1) / total, 1.0) if total and total > 0 else 0.0
            step.after_step()
            self._forward_log(pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._step is not None
        self._step.after_epoch()
        self._forward_log(pl_module, on_step=False)

    def _forward_log(self, pl_module: LightningModule, on_step: bool) -> None:
        assert self._step is not None
        if self._step.state.logged:
            logged = self._step.state.take_logged()
            pl_module.log_dict(logged, on_step=on_step, on_epoch=not on_step, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self._step
        assert step is not None
        self._outputs_hook.remove()
        pl_module.training_step, pl_module.backward = self._own_training_step, self._own_backward  # type: ignore[method-assign]
        model = step.finish()
        logged = step.state.take_logged()
        for logger in trainer.loggers if logged else ():
            logger.log_metrics(logged, step=trainer.global_step)
        if self.attribute:
            setattr(pl_module, self.attribute, model)
        del pl_module.coloss_methods
        self._step = None


class _LightningStep(TrainingStep):
    """A training step whose forward pass and objective are the LightningModule's own."""

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        weights: Mapping[str, Schedule] | None,
        state: State,
    ):
        super().__init__(model, _own_objective, methods, combine=weights, state=state)
        self._terms: dict[str, Tensor] = {}

    def keep_outputs(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.state.outputs = outputs

    def prepare(self, batch: Any) -> Any:
        """Run `on_batch`, and give the edited batch back in the form that came in."""
        if not self._batch_hooks:
            return batch
        for method in self._batch_hooks:
            method.on_batch(self.state)  # type: ignore[operator]
        edited = self.state.batch
        if isinstance(batch, tuple | list):
            return type(batch)([edited.inputs, edited.targets, edited.ids][: len(batch)])
        if isinstance(batch, Mapping):
            named = {"inputs": edited.inputs, "targets": edited.targets, "ids": edited.ids, **edited.extras}
            return {name: named[name] for name in batch}
        return edited if isinstance(batch, Batch) else edited.inputs

    def total(self, loss: Tensor) -> Tensor:
        """The module's own loss and the methods' terms, combined."""
        terms = {} if self.objective is None else {"objective": loss}
        for method in self._term_hooks:
            terms.update(method.terms(self.state))  # type: ignore[operator]
        self.state.terms = self._terms = terms
        return self.combine(self.state, terms)

    def backward_terms(self) -> None:
        self.taker.backward(self.state, self._terms)


def _own_objective(outputs: Any, targets: Any) -> Tensor:
    raise RuntimeError("Lightning's training_step computes the objective")
