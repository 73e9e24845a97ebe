"""Measuring fairly: cases in turn within each round, and the time and memory of one piece of work in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from coloss.lab.catalog import import_name

Report: TypeAlias = Callable[[float], object]


def silent(share: float) -> None:
    """Report nothing about progress."""


def now() -> tuple[float, float]:
    """Wall clock and processor time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int, report: Report = silent
) -> dict[str, np.ndarray]:
    """Run every case once in each round, so that a slow spell of the machine hits all of them alike.

    Every second round runs backwards: no case always follows the same one.

    Args:
        cases: what to run, by name; each returns one number or a tuple of numbers.
        rounds: how often, >= 1.
        report: told the share done after every case.

    Returns:
        By name, the results of all rounds, rounds in the first dimension: row r of two cases may be compared as a pair.

    Raises:
        ValueError: if `rounds` < 1.

    Examples:
        >>> interleaved({"one": lambda: 1.0, "two": lambda: (2.0, 3.0)}, rounds=2)["two"].tolist()
        [[2.0, 3.0], [2.0, 3.0]]
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    found: dict[str, list[Any]] = {name: [] for name in cases}
    done = 0
    for turn in range(rounds):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            found[name].append(cases[name]())
            done += 1
            report(done / (rounds * len(cases)))
    return {name: np.asarray(results, dtype=np.float64) for name, results in found.items()}


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: wall and processor seconds, memory, and what it returned.

    Attributes:
        seconds: by the wall clock.
        cpu_seconds: processor time, over all threads.
        peak_mb: highest resident memory above what was in use when the work began, 10^6 bytes.
        result: what the work returned; a JSON value.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    result: Any


def cost_here(path: str, **arguments: Any) -> Cost:
    """Time and memory of a piece of work in this process.

    Args:
        path: import path of a function that prepares the work (imports, inputs, warm-up), which is not measured, and returns the work:
            a callable without arguments that returns a JSON value.
        arguments: of the function at `path`.

    Raises:
        InputError: if there is nothing at `path`.

    Examples:
        >>> cost = cost_here("coloss.lab.benchmarks.rankme.svd_route", samples=64, features=4)
        >>> cost.seconds > 0, 1 <= cost.result <= 4
        (True, True)
    """
    work = import_name(path)(**arguments)
    import torch

    from coloss.train.cost import PeakMemory

    with PeakMemory(torch.device("cpu")) as memory:
        start = now()
        result = work()
        seconds, cpu_seconds = np.subtract(now(), start).tolist()
        return Cost(seconds, cpu_seconds, memory.megabytes(), result)


def cost_in_fresh_process(path: str, **arguments: Any) -> Cost:
    """Time and memory of a piece of work in a new Python process, where nothing that ran before can help or hinder it.

    Args:
        path: import path of a function that prepares the work, as for `cost_here`.
        arguments: of that function; JSON values.

    Raises:
        RuntimeError: if the process fails; with its last words.

    Cost: starting Python and importing torch, seconds that are not counted.

    Examples:
        >>> path = "coloss.lab.benchmarks.rankme.svd_route"
        >>> cost = cost_in_fresh_process(path, samples=64, features=4)
        >>> abs(cost.result - cost_here(path, samples=64, features=4).result) < 1e-9
        True
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
        input=json.dumps([path, arguments]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{path} failed in its process (exit code {done.returncode}): {words}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _serve() -> None:
    path, arguments = json.load(sys.stdin)
    cost = cost_here(path, **arguments)
    sys.stdout.write("\n" + json.dumps(asdict(cost)))
