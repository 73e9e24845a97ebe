"""What a training loop adds to the step itself: a hand-written loop, Fabric, `coloss.fit` and Lightning's `Trainer`.

All of them train the same small network with Adam on the same batches in the same order, and end with the same weights. A step is the time
from the start of one epoch to the start of the next over its number of steps, so what happens once in a run (setup, the first epoch)
is not counted, and what happens once in an epoch is.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from coloss.data import IndexedDataset, Loader
from coloss.data.batch import Batch
from coloss.data.loader import epoch_generator
from coloss.lab.benchmarks.measure import Report, interleaved, now, silent
from coloss.lab.benchmarks.row import Row
from coloss.train import Budget, ConflictMonitor, Method, fit

BATCH = 32
FEATURES = 20
PLAIN, FABRIC, FIT, AGAIN = "plain PyTorch loop", "Fabric's wrappers", "coloss.fit", "coloss.fit, again"
IDLE, MONITOR = "coloss.fit, idle Method", "coloss.fit, ConflictMonitor off"
TRAINER, BAREBONES = "Lightning Trainer", "Lightning Trainer, barebones"

_adam = partial(torch.optim.Adam, lr=1e-3)
_loss = nn.functional.cross_entropy

Course = Callable[["Work"], nn.Module]


class Work:
    """The same task for every loop, and the moments at which its epochs began."""

    def __init__(self, steps: int, epochs: int):
        self.steps, self.epochs = steps, epochs
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(steps * BATCH, FEATURES, generator=generator)
        self.targets = (self.inputs[:, 0] > 0).long()
        self.began: list[tuple[float, float]] = []

    def network(self) -> nn.Module:
        """The network, with the same weights each time; the global random state is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 2))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of batches, as a careful person cuts them from tensors in memory."""
        self.began.append(now())
        inputs, targets = self.inputs, self.targets
        order = torch.randperm(len(inputs), generator=epoch_generator(0, len(self.began) - 1))
        for indices in order.view(-1, BATCH).unbind():
            yield inputs.index_select(0, indices), targets.index_select(0, indices)

    def loader(self) -> Loader:
        """The same batches as `fit` makes them."""
        return _MarkedLoader(self)

    def seconds_per_step(self) -> tuple[float, float]:
        """Median over the epochs, the first left out: by the wall clock and by processor time."""
        wall, cpu = np.median(np.diff(self.began, axis=0)[1:], axis=0) / self.steps
        return float(wall), float(cpu)


class _MarkedLoader(Loader):
    def __init__(self, work: Work):
        super().__init__(IndexedDataset(work.inputs, work.targets), BATCH)
        self._work = work

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        self._work.began.append(now())
        return super().batches(epoch, skip)


class _Idle(Method):
    """A method that does nothing."""


def plain_loop(work: Work) -> nn.Module:
    """The loop that everybody writes."""
    model = work.network()
    optimizer = _adam(model.parameters())
    model.train()
    for _ in range(work.epochs):
        for inputs, targets in work:
            optimizer.zero_grad()
            _loss(model(inputs), targets).backward()
            optimizer.step()
    return model


def fabric_loop(work: Work) -> nn.Module:
    """The same loop on Fabric's wrappers, which give it devices, precision and several processes."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = work.network()
    wrapped, optimizer = fabric.setup(model, _adam(model.parameters()))
    wrapped.train()
    for _ in range(work.epochs):
        for inputs, targets in work:
            optimizer.zero_grad()
            fabric.backward(_loss(wrapped(inputs), targets))
            optimizer.step()
    return model


def coloss_fit(
    work: Work, methods: Sequence[type[Method]] = (), monitor: ConflictMonitor | None = None
) -> nn.Module:
    """`coloss.fit`, which also checks, averages and records the loss."""
    run = fit(
        work.network(),
        work.loader(),
        _loss,
        [method() for method in methods],
        optimizer=_adam,
        budget=Budget(epochs=work.epochs),
        monitor=monitor,
        fabric=Fabric(accelerator="cpu", devices=1),
    )
    return run.model


def lightning_trainer(work: Work, **options: Any) -> nn.Module:
    """Lightning's `Trainer` without progress bar, logger, checkpoints and summary."""
    from lightning.pytorch import LightningModule, Trainer

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            inputs, targets = batch
            return _loss(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _adam(self.parameters())

    off = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False
    )
    module = Classifier()
    with _quiet():
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=work.epochs, **(options or off))
        trainer.fit(module, work)
    return module.model


def loops() -> dict[str, Course]:
    """The loops to compare, by name; Lightning's only where it is installed."""
    found: dict[str, Course] = {
        PLAIN: plain_loop,
        FABRIC: fabric_loop,
        FIT: coloss_fit,
        AGAIN: coloss_fit,
        IDLE: partial(coloss_fit, methods=[_Idle]),
        MONITOR: lambda work: coloss_fit(work, monitor=ConflictMonitor(every=10**9)),
    }
    if find_spec("lightning") is not None:
        found |= {TRAINER: lightning_trainer, BAREBONES: partial(lightning_trainer, barebones=True)}
    return found


def measure(report: Report = silent, *, steps: int = 200, epochs: int = 3, rounds: int = 25) -> list[Row]:
    """Microseconds that a training loop adds to a step of a small network.

    Args:
        report: told the share done.
        steps: in an epoch.
        epochs: in a run, >= 3; the first is not counted.
        rounds: runs of each loop.

    Raises:
        ValueError: if `epochs` < 3.
    """
    if epochs < 3:
        raise ValueError(f"epochs must be >= 3, got {epochs}")

    def timed(course: Course) -> tuple[float, float]:
        work = Work(steps, epochs)
        course(work)
        wall, cpu = work.seconds_per_step()
        return wall * 1e6, cpu * 1e6

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = interleaved(
            {name: partial(timed, course) for name, course in loops().items()}, rounds, report
        )
    finally:
        torch.set_num_threads(threads)
    rows = [Row.of(name, us, "µs", over=found[PLAIN]) for name, us in found.items()]
    added = {name: us - found[PLAIN] for name, us in found.items()}
    rows += [Row.of(f"added by {name}", added[name], "µs") for name in (FABRIC, FIT)]
    rows.append(Row.of("coloss.fit over Fabric's wrappers", found[FIT] - found[FABRIC], "µs", limit=60.0))
    if TRAINER in found:
        rows.append(Row.of(f"added by {TRAINER}", added[TRAINER], "µs"))
        rows.append(
            Row.of(
                "what coloss.fit adds / what the Trainer adds", added[FIT] / added[TRAINER], "", limit=1 / 3
            )
        )
    else:
        rows.append(Row(TRAINER, note="not installed: pip install 'coloss[lightning]'"))
    # Twice the same shows how far apart equals come out in this run.
    rows.append(Row.of("added to coloss.fit: nothing", 100 * (found[AGAIN] / found[FIT] - 1), "%"))
    both = (found[FIT] + found[AGAIN]) / 2
    for name, what in ((IDLE, "idle Method"), (MONITOR, "ConflictMonitor off")):
        rows.append(Row.of(f"added to coloss.fit: {what}", 100 * (found[name] / both - 1), "%", limit=1.0))
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning announces the machine, its tips and the end of training; none of it belongs into a table."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
