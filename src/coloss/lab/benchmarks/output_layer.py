"""A training step of an output layer with very many classes: the factored Z-loss layer beside softmax and cross-entropy.

Both layers hold the same weights, see the same features and targets, return the gradient of the features and take one step of plain
SGD. What lies below the layer is not part of it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from coloss.classification import FactoredSphericalLinear
from coloss.lab.benchmarks.measure import Report, interleaved, now, silent
from coloss.lab.benchmarks.row import Row

LEARNING_RATE = 0.01

Step = Callable[[], None]


def measure(
    report: Report = silent,
    *,
    classes: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000),
    features: int = 64,
    batch: int = 256,
    rounds: int = 3,
) -> list[Row]:
    """Milliseconds for a step of an output layer on one thread: factored Z-loss beside dense cross-entropy, by number of classes.

    Args:
        report: told the share done.
        classes: numbers of classes, rising.
        features: width of the layer.
        batch: samples in a step.
        rounds: how often each case is timed; the factored layer takes several steps a round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # One size at a time: at a million classes a dense step takes gigabytes.
        found: dict[str, np.ndarray] = {}
        for number, count in enumerate(classes):
            cases = {
                _name("factored", count): partial(timed, factored_step(count, features, batch), 30),
                _name("dense", count): partial(timed, dense_step(count, features, batch), 1),
            }
            share = lambda done, number=number: report((number + done) / len(classes))
            found |= interleaved(cases, rounds, share)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for count in classes:
        factored, dense = found[_name("factored", count)], found[_name("dense", count)]
        rows.append(Row.of(_name("factored", count), factored, "ms"))
        rows.append(Row.of(_name("dense", count), dense, "ms", over=factored))
    for count in classes:
        ratio = found[_name("dense", count)] / found[_name("factored", count)]
        limit = 100.0 if count == 100_000 else None
        rows.append(Row.of(f"dense / factored, {count:,} classes", ratio, "x", limit=limit, at_least=True))
    growth = found[_name("factored", classes[-1])] / found[_name("factored", classes[0])]
    rows.append(Row.of(f"factored, {classes[-1]:,} / {classes[0]:,} classes", growth, "x", limit=2.0))
    return rows


def factored_step(classes: int, features: int, batch: int) -> Step:
    """A step of `FactoredSphericalLinear`, ready to run.

    Examples:
        >>> factored_step(classes=50, features=4, batch=8)()
    """
    layer = FactoredSphericalLinear.from_linear(_linear(classes, features), LEARNING_RATE)
    hidden, target = _batch(classes, features, batch)

    def step() -> None:
        hidden.grad = None
        layer(hidden, target).backward()
        layer.step()

    return step


def dense_step(classes: int, features: int, batch: int) -> Step:
    """A step of a linear layer with cross-entropy and SGD, ready to run.

    Examples:
        >>> dense_step(classes=50, features=4, batch=8)()
    """
    layer = _linear(classes, features)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)
    hidden, target = _batch(classes, features, batch)

    def step() -> None:
        hidden.grad = None
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(hidden), target).backward()
        optimizer.step()

    return step


def timed(step: Step, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step, after one that is not counted: by the wall clock and by processor time.

    Examples:
        >>> timed(lambda: None, 3)[0] < 1000
        True
    """
    step()
    marks = [now()]
    for _ in range(steps):
        step()
        marks.append(now())
    wall, cpu = np.median(np.diff(marks, axis=0), axis=0) * 1000
    return float(wall), float(cpu)


def _linear(classes: int, features: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(features, classes)


def _batch(classes: int, features: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, features, generator=generator).requires_grad_()
    return hidden, torch.randint(classes, (batch,), generator=generator)


def _name(layer: str, classes: int) -> str:
    return f"{layer}, {classes:,} classes"
