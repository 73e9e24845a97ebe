"""SIGReg without a tensor of (samples, slices, knots) beside the formula as written, plain and compiled."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, cost_in_fresh_process, interleaved, now, silent
from coloss.lab.benchmarks.row import Row
from coloss.ops import epps_pulley, random_directions, sliced_statistic

STREAMED, PLAIN, COMPILED = "coloss", "formula", "formula, torch.compile"
PRODUCTS = "matrix products alone"


def measure(
    report: Report = silent,
    *,
    samples: int = 2048,
    dim: int = 512,
    slices: int = 1024,
    knots: int = 17,
    rounds: int = 3,
    repeats: int = 11,
) -> list[Row]:
    """SIGReg of 2,048 x 512 embeddings on 1,024 slices, forward and backward, in fresh processes: time, memory and gradient.

    Args:
        report: told the share done.
        samples: embeddings.
        dim: of each.
        slices: directions.
        knots: of the quadrature.
        rounds: processes of each route, for time and for memory.
        repeats: runs in a process for time, after two that are not counted; their median is one figure.
    """
    sizes = {"samples": samples, "dim": dim, "slices": slices, "knots": knots}
    obstacle = compiler_obstacle()
    routes = [STREAMED, PLAIN, PRODUCTS] + [COMPILED] * (obstacle is None)

    def run(route: str) -> tuple[float, float, float, float]:
        timed = cost_in_fresh_process(f"{__name__}.timed_route", route=route, repeats=repeats, **sizes)
        cost = cost_in_fresh_process(f"{__name__}.single_route", route=route, **sizes)
        return *timed.result, cost.peak_mb, cost.result

    found = interleaved({route: partial(run, route) for route in routes}, rounds, report)
    seconds = {name: figures[:, :2] for name, figures in found.items()}
    memory, norms = ({name: figures[:, k] for name, figures in found.items()} for k in (2, 3))
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    rows = [Row.of(name, seconds[name], "s", over=seconds[PRODUCTS], note=threads) for name in routes]
    rows += [Row.of(f"peak memory: {name}", memory[name], "MB") for name in routes]
    limits = {PLAIN: 8.0, COMPILED: 2.5}
    for name in (PLAIN, COMPILED):
        case = f"time: {name} / {STREAMED}"
        if name in routes:
            ratio = seconds[name] / seconds[STREAMED]
            rows.append(Row.of(case, ratio, "x", limit=limits[name], at_least=True))
        else:
            rows.append(Row(case, note=f"not measured: {obstacle}"))
    rows.append(Row.of(f"time: {STREAMED} / {PRODUCTS}", seconds[STREAMED] / seconds[PRODUCTS], "x"))
    rows.append(Row.of(f"memory: {STREAMED} / {PLAIN}", memory[STREAMED] / memory[PLAIN], "x", limit=0.1))
    difference = np.abs(norms[STREAMED] / norms[PLAIN] - 1)
    rows.append(Row.of("relative difference of the gradient's norm", difference, "", limit=1e-4))
    return rows


def timed_route(
    route: str, repeats: int, samples: int, dim: int, slices: int, knots: int
) -> Callable[[], list[float]]:
    """Median wall clock and processor seconds of a forward and backward pass over `repeats` of them; two have run before.

    Examples:
        >>> min(timed_route(STREAMED, repeats=3, samples=32, dim=4, slices=8, knots=5)()) > 0
        True
    """
    step = _step(route, samples, dim, slices, knots)
    for _ in range(2):
        step()

    def work() -> list[float]:
        clock = [now()]
        for _ in range(repeats):
            step()
            clock.append(now())
        return np.median(np.diff(clock, axis=0), axis=0).tolist()

    return work


def single_route(route: str, samples: int, dim: int, slices: int, knots: int) -> Callable[[], float]:
    """The norm of the gradient of one pass. Libraries are loaded and, for the compiled route, the code is made before.

    Examples:
        >>> sizes = dict(samples=32, dim=4, slices=8, knots=5)
        >>> abs(single_route(STREAMED, **sizes)() / single_route(PLAIN, **sizes)() - 1) < 1e-4
        True
    """
    if route == COMPILED:
        # The code holds for these sizes only. Making it leaves freed memory behind, which the measurement gives back first.
        step = _step(route, samples, dim, slices, knots)
        step()
    else:
        _step(route, 32, dim, 8, knots)()
        step = _step(route, samples, dim, slices, knots)
    return lambda: step().norm().item()


def compiler_obstacle() -> str | None:
    """Why `torch.compile` cannot make code for this processor; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "no C++ compiler was found"
    return None


def formula(embeddings: Tensor, directions: Tensor, knots: int, t_max: float = 3.0) -> Tensor:
    """SIGReg as its equation is written, with every angle of every sample, slice and knot at once.

    Examples:
        >>> embeddings = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> directions = random_directions(4, 8, torch.Generator().manual_seed(1))
        >>> bool(torch.isclose(formula(embeddings, directions, 17), sliced_statistic(embeddings, directions)))
        True
    """
    t = torch.linspace(0, t_max, knots)
    normal = torch.exp(-(t**2) / 2)
    weight = torch.full((knots,), 2 * t_max / (knots - 1))
    weight[0] = weight[-1] = t_max / (knots - 1)
    angles = (embeddings @ directions).unsqueeze(-1) * t
    distance = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return embeddings.shape[0] * (distance @ (weight * normal)).mean()


def _step(route: str, samples: int, dim: int, slices: int, knots: int) -> Callable[[], Tensor]:
    """A forward and backward pass with respect to the embeddings, which gives their gradient."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(samples, dim, generator=generator).requires_grad_()
    directions = random_directions(dim, slices, generator)
    if route == PRODUCTS:
        fixed = embeddings.detach()
        return lambda: (fixed @ directions) @ directions.T
    statistic: Callable[[Tensor, Tensor], Tensor] = partial(formula, knots=knots)
    if route == STREAMED:
        statistic = partial(sliced_statistic, univariate=partial(epps_pulley, knots=knots))
    if route == COMPILED:
        statistic = torch.compile(statistic, dynamic=False)

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(statistic(embeddings, directions), embeddings)
        return gradient

    return step
