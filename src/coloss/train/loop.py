"""The training loop: any model, any objective, any methods, on Lightning Fabric."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.train import checkpoint as disk
from coloss.train.budget import Budget
from coloss.train.conflict import Conflict, ConflictMonitor
from coloss.train.cost import Clock, PeakMemory
from coloss.train.feed import Feed
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.step import Objective, TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class NonFiniteLossError(ArithmeticError):
    """A loss term or a weight became NaN or infinite."""


@dataclass(frozen=True)
class Target:
    """A metric value to reach; the run records the training seconds it took.

    Examples:
        >>> Target("accuracy", 0.95).met({"accuracy": 0.96})
        True
    """

    metric: str
    value: float
    direction: str = "higher"

    def met(self, metrics: dict[str, float]) -> bool:
        """Tell whether these metrics reach the target."""
        found = metrics.get(self.metric, math.nan)
        return found >= self.value if self.direction == "higher" else found <= self.value


@dataclass
class LogPoint:
    """One logged moment: means of the loss terms since the last one, and metrics if it was an evaluation."""

    step: int
    epoch: int
    seconds: float
    terms: dict[str, float]
    metrics: dict[str, float]


@dataclass
class Fit:
    """What training gives back.

    Attributes:
        model: the network as it ships, after every method's `finish`.
        methods: the methods, with their trained parts.
        metrics: of the shipped model, if `evaluate` was given.
        history: loss terms and metrics over time.
        conflicts: gradient cosines over time, if a monitor was given.
        steps, epochs, seconds: what was done; seconds of training only.
        prepare_seconds: setting up before the clock started.
        steps_per_second: over the training seconds.
        peak_memory_mb: highest memory in use above the start of training, 10^6 bytes.
        time_to_target: training seconds until the target was met first; None if it never was.
    """

    model: nn.Module
    methods: Sequence[Method]
    metrics: dict[str, float]
    history: list[LogPoint]
    conflicts: list[Conflict]
    steps: int
    epochs: int
    seconds: float
    prepare_seconds: float
    steps_per_second: float
    peak_memory_mb: float
    time_to_target: float | None


def fit(
    model: nn.Module,
    data: Any,
    objective: Objective | None = None,
    methods: Sequence[Method] = (),
    *,
    budget: Budget,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = partial(torch.optim.AdamW, lr=1e-3),
    learning_rate_schedule: Schedule | None = None,
    combine: Any = None,
    batch_size: int = 64,
    clip_norm: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    target: Target | None = None,
    monitor: ConflictMonitor | None = None,
    log_every: int = 10,
    loggers: Sequence[Any] = (),
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    fabric: "Fabric | None" = None,
    progress: Callable[[float, dict[str, float]], None] | None = None,
    seed: int = 0,
) -> Fit:
    """Train a network on an objective and any number of methods.

    Args:
        model: called as `model(inputs)`; trained in place.
        data: a `(inputs, targets)` pair of tensors, a `coloss.data.IndexedDataset` or `Loader`, a torch Dataset or DataLoader.
        objective: `(outputs, targets) -> scalar or dict of named scalars`; None if a method supplies the loss.
        methods: applied in this order at every hook.
        budget: when to stop.
        optimizer: makes the optimizer from the list of trainable parameters (the model's and the methods').
        learning_rate_schedule: factor on the learning rate, a function of progress in [0, 1].
        combine: weights as a dict, or `WeightedSum`, `UncertaintyWeighting`, `JacobianDescent`.
        batch_size: over all processes together; for tensors and datasets (a loader brings its own).
        clip_norm: largest gradient norm; larger ones are scaled down.
        evaluate: `model -> {metric: value}`; called in eval mode, outside the training clock and its randomness.
        evaluate_every: steps between evaluations; default: at the end of each epoch. The shipped model is evaluated always.
        target: metric value whose first crossing is timed.
        monitor: measures gradient conflicts between the loss terms.
        log_every: steps between points of `history`.
        loggers: objects with `log_metrics(dict, step)`, such as Lightning's CSV, TensorBoard and MLflow loggers.
        checkpoint_dir: folder for checkpoints; none are written without it.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        resume: go on from the newest checkpoint in `checkpoint_dir`, if there is one.
        fabric: devices, precision and strategy; default: one device, float32. Launch it first for several processes.
        progress: called a few times a second with the share done and the last loss terms.
        seed: of batch order, dropout, and the methods' randomness. The global random state is left as it was.

    Returns:
        The shipped model and the record of the run.

    Raises:
        InputError: for inputs that cannot work; the message names argument, rule and value.
        NonFiniteLossError: if a loss term becomes NaN or infinite; names term, step and the last good checkpoint.

    Cost: no copies of the data; per step, microseconds over Fabric's own (`coloss bench loop`).

    Examples:
        >>> import torch
        >>> inputs = torch.randn(64, 4)
        >>> model = nn.Linear(4, 2)
        >>> run = fit(
        ...     model,
        ...     (inputs, (inputs[:, 0] > 0).long()),
        ...     nn.functional.cross_entropy,
        ...     budget=Budget(epochs=2),
        ... )
        >>> run.steps, run.model is model
        (2, True)
    """
    for name, value in (
        ("batch_size", batch_size),
        ("log_every", log_every),
        ("checkpoint_every", checkpoint_every),
    ):
        if value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    if evaluate_every is not None and evaluate_every < 1:
        raise InputError(f"evaluate_every must be >= 1, got {evaluate_every}")
    if resume and checkpoint_dir is None:
        raise InputError("resume=True needs checkpoint_dir")
    from lightning_fabric import Fabric

    fabric = fabric or Fabric(accelerator="auto", devices=1)
    with torch.random.fork_rng():
        run = _Run(locals())
        return run.go()


@dataclass
class _Progress:
    """The part of a run that a checkpoint stores besides tensors."""

    batch_index: int = 0
    seconds: float = 0.0
    history: list[LogPoint] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    time_to_target: float | None = None


class _Run:
    """One call of `fit`, taken apart so that each piece can be read alone."""

    def __init__(self, given: dict[str, Any]):
        from lightning_fabric.plugins import Precision
        from lightning_fabric.strategies import SingleDeviceStrategy

        started = time.perf_counter()
        self.fabric: Fabric = given["fabric"]
        self.budget: Budget = given["budget"]
        self.schedule = given["learning_rate_schedule"]
        self.clip_norm = given["clip_norm"]
        self.evaluate, self.evaluate_every = given["evaluate"], given["evaluate_every"]
        self.target, self.monitor = given["target"], given["monitor"]
        self.log_every, self.loggers = given["log_every"], given["loggers"]
        self.report_progress = given["progress"]
        self.folder = Path(given["checkpoint_dir"]) if given["checkpoint_dir"] is not None else None
        self.checkpoint_every = given["checkpoint_every"]
        seed, rank = given["seed"], self.fabric.global_rank
        torch.manual_seed(seed)
        state = State(given["model"], fabric=self.fabric)
        state.generator.manual_seed(seed)
        state.local_generator.manual_seed((seed + 1) * 1_000_003 + rank)
        self.step = TrainingStep(
            given["model"], given["objective"], given["methods"], combine=given["combine"], state=state
        )
        self.state = state
        _check_strategy(self.fabric, self.step, self.folder)
        self.wrapped = self.fabric.setup(self.step)
        self.step.refresh_trainable()
        if not state.trainable:
            raise InputError("the model and the methods have no trainable parameter")
        self.raw_optimizer = given["optimizer"](state.trainable)
        self.optimizer = state.optimizer = self.fabric.setup_optimizers(self.raw_optimizer)
        self.base_rates = [group["lr"] for group in self.raw_optimizer.param_groups]
        self.feed = Feed(given["data"], given["batch_size"], seed, self.fabric)
        self.convert = _input_conversion(self.fabric, self.step)
        # Mixed precision guards what the wrapper returns against autograd.grad, which monitors and methods need: it gets views.
        strategy = self.fabric.strategy
        full_precision = type(strategy.precision) is Precision
        self.step.returns_views = not full_precision
        # With one process in full precision the wrapper has nothing to do, and costs as much as a small network's forward pass.
        self.forward = (
            self.step if full_precision and type(strategy) is SingleDeviceStrategy else self.wrapped
        )
        self.manual_sync = self.step.taker is not None and self.fabric.world_size > 1
        torch.manual_seed((seed + 1) * 7_368_787 + rank)
        self.done = _Progress()
        self.last_checkpoint: Path | None = None
        if self.folder is not None:
            self._resume(self.folder, given["resume"])
        self.clock = Clock(self.done.seconds)
        self.prepare_seconds = time.perf_counter() - started

    def go(self) -> Fit:
        """Train to the end of the budget, finish, evaluate the shipped model."""
        memory = PeakMemory(self.fabric.device)
        self.wrapped.train()
        self.clock.start()
        over = False
        while True:
            over = over or self._spent() >= 1.0 or self._epoch()
            if self.done.batch_index and self.done.batch_index == self.feed.length:
                self.done.batch_index = 0
                self.step.after_epoch()
                if self.evaluate_every is None and not over:
                    self._evaluate()
            if over:
                break
        self.clock.pause()
        if self.folder is not None:
            self._save(self.folder)
        peak = memory.megabytes()
        model = self.step.finish()
        metrics = self._evaluate() if self.evaluate is not None else {}
        if not metrics:
            self._log({})
        seconds = self.clock.seconds()
        return Fit(
            model=model,
            methods=self.state.methods,
            metrics=metrics,
            history=self.done.history,
            conflicts=list(self.monitor.found) if self.monitor is not None else [],
            steps=self.state.step,
            epochs=self.state.epoch,
            seconds=seconds,
            prepare_seconds=self.prepare_seconds,
            steps_per_second=self.state.step / seconds if seconds > 0 else math.inf,
            peak_memory_mb=peak,
            time_to_target=self.done.time_to_target,
        )

    def _epoch(self) -> bool:
        """Train on the rest of the current epoch; tell whether the budget is spent."""
        state, done = self.state, self.done
        before, last_report = done.batch_index, 0.0
        for batch in self.feed.batches(state.epoch, done.batch_index):
            self._train_on(batch)
            done.batch_index += 1
            state.progress = self._spent(state.step + 1)
            self.step.after_step()
            if state.step % self.log_every == 0:
                self._log({})
            if self.evaluate_every is not None and state.step % self.evaluate_every == 0:
                self._evaluate()
            if self.folder is not None and state.step % self.checkpoint_every == 0:
                self.clock.pause()
                self._save(self.folder)
                self.clock.start()
            if self.report_progress is not None and time.perf_counter() - last_report > 0.1:
                last_report = time.perf_counter()
                self.report_progress(
                    state.progress, {name: term.item() for name, term in state.terms.items()}
                )
            if state.progress >= 1.0:
                return True
        if done.batch_index == before == 0:
            raise InputError(
                "data must give at least one batch, got none (more rows, or a smaller batch_size, are needed)"
            )
        if self.feed.length is None:
            self.feed.length = done.batch_index
        return False

    def _train_on(self, batch: Batch) -> None:
        state = self.state
        state.batch = self.convert(batch)
        if self.schedule is not None:
            factor = value_at(self.schedule, state.progress)
            for group, rate in zip(self.raw_optimizer.param_groups, self.base_rates):
                group["lr"] = rate * factor
        if self.manual_sync:
            with self.fabric.no_backward_sync(self.wrapped):
                self._forward_and_backward()
        else:
            self._forward_and_backward()
        if self.clip_norm is not None:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.clip_norm)
        self.optimizer.step()
        self.raw_optimizer.zero_grad()

    def _forward_and_backward(self) -> None:
        self.forward()
        terms = self.state.terms
        self._before_backward(terms)
        self.step.backward(terms)

    def _before_backward(self, terms: dict[str, Tensor]) -> None:
        """Check and count the terms' values, and let the monitor look while the graph is whole."""
        sums, total = self.done.sums, 0.0
        for name, term in terms.items():
            value = term.item()
            total += value
            sums[name] = sums.get(name, 0.0) + value
        self.done.count += 1
        if not math.isfinite(total):
            name, term = next((n, t) for n, t in terms.items() if not math.isfinite(t.item()))
            raise NonFiniteLossError(
                f"loss term {name!r} is {term.item()} at step {self.state.step}; {self._last_good()}"
            )
        if self.monitor is not None and self.monitor.is_due(self.state, terms):
            # Looking is no training: a budget in seconds must not favour the arm with fewer terms.
            self.clock.pause()
            self.monitor.look(self.state, terms)
            self.clock.start()

    def _last_good(self) -> str:
        if self.last_checkpoint is not None:
            return f"last good checkpoint: {self.last_checkpoint}"
        return (
            "no checkpoint yet" if self.folder is not None else "no checkpoint was kept (give checkpoint_dir)"
        )

    def _spent(self, step: int | None = None) -> float:
        step = self.state.step if step is None else step
        share = self.state.epoch + (self.done.batch_index / self.feed.length if self.feed.length else 0.0)
        spent = self.budget.progress(step, share, self.clock.seconds())
        if self.budget.seconds is not None and self.fabric.world_size > 1:
            spent = float(self.fabric.broadcast(spent))
        return spent

    def _log(self, metrics: dict[str, float]) -> None:
        done = self.done
        terms = {name: value / done.count for name, value in done.sums.items()} if done.count else {}
        done.sums, done.count = {}, 0
        if not terms and not metrics:
            return
        point = LogPoint(self.state.step, self.state.epoch, self.clock.seconds(), terms, metrics)
        if done.history and done.history[-1].step == point.step and not done.history[-1].metrics:
            point.terms = point.terms or done.history[-1].terms
            done.history.pop()
        done.history.append(point)
        for logger in self.loggers:
            logger.log_metrics({**terms, **metrics}, step=self.state.step)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate outside the clock and the training randomness; the model is left in training mode."""
        if self.evaluate is None:
            return {}
        running = self.clock._since is not None
        self.clock.pause()
        model = self.state.model
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate(model).items()}
        model.train(running)
        self._log(metrics)
        if self.target is not None and self.done.time_to_target is None and self.target.met(metrics):
            self.done.time_to_target = self.clock.seconds()
        if running:
            self.clock.start()
        return metrics

    def _save(self, folder: Path) -> None:
        """Write a checkpoint; weights that are not finite are refused, so the newest checkpoint is a good one."""
        for name, value in self.step.named_parameters():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(
                    f"weight {name} is not finite at step {self.state.step}; {self._last_good()}"
                )
        random = torch.stack([torch.get_rng_state(), self.state.local_generator.get_state()])
        gathered: Any = self.fabric.all_gather(random) if self.fabric.world_size > 1 else random
        every = gathered.reshape(-1, *random.shape)
        if self.fabric.global_rank == 0:
            tensors, values = disk.split_state("step/", self.step.state_dict())
            optimizer_tensors, optimizer_values = disk.split_optimizer(self.raw_optimizer)
            self.done.seconds = self.clock.seconds()
            self.last_checkpoint = disk.save_checkpoint(
                folder,
                self.state.step,
                tensors
                | optimizer_tensors
                | {"random/local": every, "random/shared": self.state.generator.get_state()},
                {
                    "epoch": self.state.epoch,
                    "progress": self.state.progress,
                    "run": asdict(self.done),
                    "module": values,
                    "optimizer": optimizer_values,
                    "conflicts": [asdict(c) for c in self.monitor.found] if self.monitor is not None else [],
                },
            )
        self.fabric.barrier()

    def _resume(self, folder: Path, resume: bool) -> None:
        found = disk.checkpoints(folder)
        if not found:
            return
        if not resume:
            raise InputError(
                f"{folder} holds checkpoints of a run already: pass resume=True, or choose another checkpoint_dir"
            )
        tensors, values = disk.load_checkpoint(found[-1])
        try:
            self.step.load_state_dict(disk.join_state("step/", tensors, values["module"]))
            disk.join_optimizer(self.raw_optimizer, tensors, values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{found[-1]} is of another run (model, methods or optimizer differ): {reason}"
            ) from error
        local = tensors["random/local"]
        if len(local) != self.fabric.world_size:
            raise InputError(
                f"{found[-1]} was written by {len(local)} processes, this run has {self.fabric.world_size}"
            )
        torch.set_rng_state(local[self.fabric.global_rank][0].clone())
        self.state.local_generator.set_state(local[self.fabric.global_rank][1].clone())
        self.state.generator.set_state(tensors["random/shared"])
        self.state.step, self.state.epoch, self.state.progress = (
            values["step"],
            values["epoch"],
            values["progress"],
        )
        run = values["run"]
        run["history"] = [LogPoint(**point) for point in run["history"]]
        self.done = _Progress(**run)
        if self.monitor is not None:
            self.monitor.found[:] = [Conflict(**conflict) for conflict in values["conflicts"]]
        self.last_checkpoint = found[-1]


def _check_strategy(fabric: "Fabric", step: TrainingStep, folder: Path | None) -> None:
    """Refuse what sharded weights would silently get wrong."""
    strategy = type(fabric.strategy).__name__
    if strategy not in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        return
    if folder is not None:
        raise InputError(
            f"checkpoint_dir works on one device and with ddp, not with {strategy}: store the weights with fabric.save"
        )
    if step.taker is not None:
        raise InputError(
            f"{type(step.taker).__name__} needs whole gradients, which {strategy} shards: use strategy ddp"
        )


def _input_conversion(fabric: "Fabric", step: TrainingStep) -> Callable[[Batch], Batch]:
    """How a batch reaches device and precision; nothing is done where nothing is needed."""
    from lightning_fabric.plugins import Precision

    precision = fabric.strategy.precision
    if getattr(precision, "scaler", None) is not None and (step.taker is not None or step._gradient_hooks):
        raise InputError(
            "precision 16-mixed scales gradients, which a method of this run edits: use bf16-mixed or 32-true"
        )
    same_precision = type(precision) is Precision
    if same_precision and fabric.device.type == "cpu":
        return lambda batch: batch

    def convert(batch: Batch) -> Batch:
        batch = batch.to(fabric.device)
        if not same_precision:
            batch = Batch(precision.convert_input(batch.inputs), batch.targets, batch.ids, batch.extras)
        return batch

    return convert


__all__ = ["Fit", "LogPoint", "NonFiniteLossError", "Target", "fit"]
