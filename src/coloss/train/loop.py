"""The training loop: any model, any objective, any methods, on Lightning Fabric."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.train.accumulation import batch_statistics, check_averaging, check_joining, joined_backward
from coloss.train.budget import Budget
from coloss.train.conflict import ConflictMonitor
from coloss.train.cost import Clock, PeakMemory
from coloss.train.feed import Feed
from coloss.train.method import Method
from coloss.train.outcome import Fit, LogPoint, NonFiniteLossError, Progress, Target
from coloss.train.resume import RunCheckpoints
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.step import Objective, TrainingStep
from coloss.train.strategies import check_strategy, input_conversion

if TYPE_CHECKING:
    from lightning_fabric import Fabric


REPORT_SECONDS = 0.1
"""Least time from one report of the progress to the next."""


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
    accumulate: int = 1,
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
        accumulate: micro-batches of `batch_size` whose gradients are averaged for one optimizer step. Budget, `state.step`, history and
            intervals count optimizer steps; logged terms are means over micro-batches; what is left at the end of an epoch makes a step of
            its own, with its own mean. The mean is over micro-batches, so a smaller last one counts as much as the others. Where the
            objective or a method says `batch_statistic = True`, the micro-batches are joined instead: the gradients are those of one
            batch of `accumulate * batch_size` samples (batch normalisation apart), at the cost of a second forward pass.
        clip_norm: largest gradient norm; larger ones are scaled down.
        evaluate: `model -> {metric: value}`; called in eval mode, outside the training clock and its randomness.
        evaluate_every: steps between evaluations; default: at the end of each epoch. The shipped model is evaluated always.
        target: metric value whose first crossing is timed.
        monitor: measures gradient conflicts between the loss terms (in the first micro-batch of a step).
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
        ("accumulate", accumulate),
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
        folder = Path(given["checkpoint_dir"]) if given["checkpoint_dir"] is not None else None
        self.accumulate, self.checkpoint_every = given["accumulate"], given["checkpoint_every"]
        seed, rank = given["seed"], self.fabric.global_rank
        torch.manual_seed(seed)
        state = State(given["model"], fabric=self.fabric)
        state.generator.manual_seed(seed)
        state.local_generator.manual_seed((seed + 1) * 1_000_003 + rank)
        # Before `setup`, so that what a method freezes there in eval mode stays so.
        for part in (given["model"], *given["methods"], given["objective"], given["combine"]):
            if isinstance(part, nn.Module):
                part.train()
        self.step = TrainingStep(
            given["model"], given["objective"], given["methods"], combine=given["combine"], state=state
        )
        self.state = state
        self.joins = self.accumulate > 1 and bool(batch_statistics(self.step))
        if self.joins:
            check_joining(self.step, self.monitor is not None)
        elif self.accumulate > 1:
            check_averaging(self.step)
        check_strategy(self.fabric, self.step, folder, self.joins)
        self.wrapped = self.fabric.setup(self.step)
        self.step.refresh_trainable()
        if not state.trainable:
            raise InputError("the model and the methods have no trainable parameter")
        self.raw_optimizer = given["optimizer"](state.trainable)
        self.optimizer = state.optimizer = self.fabric.setup_optimizers(self.raw_optimizer)
        self.base_rates = [group["lr"] for group in self.raw_optimizer.param_groups]
        # Under the name that torch's schedulers give it, for methods that follow the schedule at a rate of their own.
        for group in self.raw_optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.feed = Feed(given["data"], given["batch_size"], seed, self.fabric)
        self.convert = input_conversion(self.fabric, self.step)
        # Mixed precision guards what the wrapper returns against autograd.grad, which monitors and methods need: it gets views.
        strategy = self.fabric.strategy
        full_precision = type(strategy.precision) is Precision
        self.step.returns_views = not full_precision
        # With one process in full precision the wrapper has nothing to do, and costs as much as a small network's forward pass.
        self.forward = (
            self.step if full_precision and type(strategy) is SingleDeviceStrategy else self.wrapped
        )
        self.processes = self.fabric.world_size
        torch.manual_seed((seed + 1) * 7_368_787 + rank)
        self.done = Progress()
        self.diagnostics: set[str] = set()
        self.checkpoints: RunCheckpoints | None = None
        if folder is not None:
            self.checkpoints = RunCheckpoints(
                folder, self.step, self.raw_optimizer, self.fabric, self.monitor
            )
            self.done = self.checkpoints.restore(given["resume"]) or self.done
        self.clock = Clock(self.done.seconds)
        self.prepare_seconds = time.perf_counter() - started

    def go(self) -> Fit:
        """Train to the end of the budget, finish, evaluate the shipped model."""
        with PeakMemory(self.fabric.device) as memory:
            self._train()
            peak = memory.megabytes()
        model = self.step.finish().eval()
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

    def _train(self) -> None:
        """Train to the end of the budget, and leave the last checkpoint."""
        self.clock.start()
        over = self._spent() >= 1.0
        while True:
            over = over or self._epoch()
            if self.done.batch_index and self.done.batch_index == self.feed.length:
                self.done.batch_index = 0
                self.step.after_epoch()
                over = over or self._spent() >= 1.0
                if self.evaluate_every is None and not over:
                    self._evaluate()
            if over:
                break
        self.clock.pause()
        self._save()

    def _epoch(self) -> bool:
        """Train on the rest of the current epoch; tell whether the budget is spent."""
        state, done = self.state, self.done
        before, last_report = done.batch_index, 0.0
        for group in _groups(self.feed.batches(state.epoch, done.batch_index), self.accumulate):
            self._train_on(group)
            done.batch_index += len(group)
            state.progress = self._spent(state.step + 1)
            self.step.after_step()
            if state.step % self.log_every == 0:
                self._log({})
            over = state.progress >= 1.0
            # At the last step the shipped model is evaluated, and nothing else.
            if self.evaluate_every is not None and state.step % self.evaluate_every == 0 and not over:
                self._evaluate()
            if self.checkpoints is not None and state.step % self.checkpoint_every == 0:
                self.clock.pause()
                self._save()
                self.clock.start()
            if self.report_progress is not None and time.perf_counter() - last_report > REPORT_SECONDS:
                last_report = time.perf_counter()
                self.report_progress(
                    state.progress, {name: term.item() for name, term in state.terms.items()}
                )
            if over:
                return True
        if done.batch_index == before == 0:
            raise InputError(
                "data must give at least one batch, got none (more rows, or a smaller batch_size, are needed)"
            )
        if self.feed.length is None:
            self.feed.length = done.batch_index
        return False

    def _train_on(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step from one or several micro-batches."""
        state = self.state
        if self.schedule is not None:
            factor = value_at(self.schedule, state.progress)
            for group, rate in zip(self.raw_optimizer.param_groups, self.base_rates):
                group["lr"] = rate * factor
        if self.joins and len(micro_batches) > 1:
            batches = [self.convert(batch) for batch in micro_batches]
            joined_backward(self.step, batches, self.fabric.autocast, self._before_backward)
        else:
            state.micro_batches = len(micro_batches)
            for number, batch in enumerate(micro_batches, 1):
                state.micro_batch, state.batch = number - 1, self.convert(batch)
                # Processes meet in the last micro-batch; a taker of the backward pass lets them meet by itself.
                if self.processes > 1 and (number < len(micro_batches) or self.step.taker is not None):
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
        if (
            self.monitor is not None
            and self.state.micro_batch == 0
            and self.monitor.is_due(self.state, terms)
        ):
            # Looking is no training: a budget in seconds must not favour the arm with fewer terms.
            self.clock.pause()
            self.monitor.look(self.state, terms)
            self.clock.start()

    def _last_good(self) -> str:
        if self.checkpoints is None:
            return "no checkpoint was kept (give checkpoint_dir)"
        return self.checkpoints.last_good()

    def _save(self) -> None:
        if self.checkpoints is not None:
            self.done.seconds = self.clock.seconds()
            self.checkpoints.save(self.done)

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
        if self.state.logged:
            logged = self.state.take_logged()
            self.diagnostics |= logged.keys()
            self._refuse_clash(terms, "a loss term")
            metrics = {**logged, **metrics}
        if not terms and not metrics:
            return
        point = LogPoint(self.state.step, self.state.epoch, self.clock.seconds(), terms, metrics)
        if done.history and done.history[-1].step == point.step:
            before = done.history.pop()
            point.terms, point.metrics = point.terms or before.terms, {**before.metrics, **metrics}
        done.history.append(point)
        for logger in self.loggers:
            logger.log_metrics({**terms, **metrics}, step=self.state.step)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate outside the clock and the training randomness; every submodule keeps its mode."""
        if self.evaluate is None:
            return {}
        running = self.clock._since is not None
        self.clock.pause()
        with evaluation_mode(self.state.model):
            metrics = {name: float(value) for name, value in self.evaluate(self.state.model).items()}
        self.diagnostics |= self.state.logged.keys()
        self._refuse_clash(metrics, "an evaluation metric")
        self._log(metrics)
        if self.target is not None and self.done.time_to_target is None and self.target.met(metrics):
            self.done.time_to_target = self.clock.seconds()
        if running:
            self.clock.start()
        return metrics

    def _refuse_clash(self, names: Iterable[str], kind: str) -> None:
        clash = self.diagnostics.intersection(names)
        if clash:
            raise InputError(
                f"{sorted(clash)[0]!r} given to state.log is the name of {kind} already: rename one of the two"
            )


def _groups(batches: Iterator[Batch], size: int) -> Iterator[Sequence[Batch]]:
    """The micro-batches of one optimizer step after the other; fewer in the last."""
    return zip(batches) if size == 1 else iter(lambda: list(islice(batches, size)), [])


__all__ = ["Fit", "LogPoint", "NonFiniteLossError", "Target", "fit"]
