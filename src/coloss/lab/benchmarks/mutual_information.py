"""Mutual information of one pair of tables: a trained set network beside neighbour distances and a bound trained for the pair."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, interleaved, now, silent
from coloss.lab.benchmarks.row import Row

MIST, INTERVAL, GRADIENT = "mist, estimate", "mist, 90 % interval", "mist, gradient to both sides"
NEIGHBOURS, HALVES, BOUND = "KSG, estimate", "KSG, interval by halves", "InfoNCE, estimate"


def measure(
    report: Report = silent,
    *,
    sizes: tuple[int, ...] = (100, 1000),
    columns: int = 2,
    rounds: int = 5,
    steps: int = 300,
) -> list[Row]:
    """Estimates and intervals of mutual information for 100 and 1,000 samples of 2 + 2 columns: time of each way.

    Args:
        report: told the share done.
        sizes: numbers of samples.
        columns: on each side.
        rounds: repeats of each way.
        steps: of training of the bound, for each half of the samples.
    """
    rows = []
    for place, samples in enumerate(sizes):
        ways = {name: _timed(way) for name, way in estimates(samples, columns, steps).items()}
        share_done = partial(_share_done, report, place, len(sizes))
        found = interleaved(ways, rounds, share_done)
        for name in ways:
            rows.append(Row.of(f"{name}, {samples} samples", 1e3 * found[name], "ms", over=1e3 * found[MIST]))
        rows.append(
            Row.of(
                f"time: {BOUND} / {MIST}, {samples} samples",
                found[BOUND][:, 0] / found[MIST][:, 0],
                "x",
                limit=10.0,
                at_least=True,
            )
        )
    return rows


def estimates(samples: int, columns: int, steps: int) -> dict[str, Callable[[], Any]]:
    """The ways to be timed, each on the same samples, with its libraries loaded.

    Examples:
        >>> ways = estimates(samples=50, columns=1, steps=1)
        >>> all(abs(float(ways[name]()) - 0.22) < 0.2 for name in (MIST, NEIGHBOURS))
        True
    """
    from coloss.jepa import KSG, InfoNCE, SupervisedMI

    x, y = correlated_tables(samples, columns)
    mist, neighbours, bound = SupervisedMI.pretrained(), KSG(), InfoNCE(steps=steps)
    neighbours.estimate(x, y)

    def gradient() -> tuple[Tensor, ...]:
        sides = x.clone().requires_grad_(), y.clone().requires_grad_()
        return torch.autograd.grad(mist(*sides), sides)

    def estimate() -> Tensor:
        with torch.no_grad():
            return mist(x, y)

    estimate()
    return {
        MIST: estimate,
        INTERVAL: lambda: mist.interval(x, y),
        GRADIENT: gradient,
        NEIGHBOURS: lambda: neighbours.estimate(x, y),
        HALVES: lambda: neighbours.interval(x, y),
        BOUND: lambda: bound.estimate(x, y),
    }


def correlated_tables(samples: int, columns: int) -> tuple[Tensor, Tensor]:
    """Normal tables whose columns are correlated by 0.6 in pairs: 0.223 nats for each.

    Examples:
        >>> x, y = correlated_tables(50, 2)
        >>> x.shape == y.shape
        True
    """
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, samples, columns, generator=generator)
    return x, 0.6 * x + 0.8 * noise


def _share_done(report: Report, place: int, count: int, share: float) -> None:
    report((place + share) / count)


def _timed(work: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        before = now()
        work()
        after = now()
        return after[0] - before[0], after[1] - before[1]

    return run
