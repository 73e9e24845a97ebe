"""RankMe through the eigenvalues of a Gram matrix beside a singular value decomposition of the whole embedding matrix."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from coloss.lab.benchmarks.measure import Cost, Report, cost_in_fresh_process, interleaved, silent
from coloss.lab.benchmarks.row import Row
from coloss.ops import effective_rank

# Added to each share, as RankMe was published.
EPS = 1e-7
GRAM, SVD64, SVD32 = "Gram, float64", "SVD, float64", "SVD, float32"


def measure(
    report: Report = silent, *, samples: int = 20_000, features: int = 512, rounds: int = 5
) -> list[Row]:
    """RankMe of 20,000 embeddings of 512 features, in fresh processes: time, memory and value of each route.

    Args:
        report: told the share done.
        samples: embeddings.
        features: of each.
        rounds: processes of each route.
    """
    routes = {GRAM: "gram_route", SVD64: "svd_route", SVD32: "single_svd_route"}

    def run(name: str) -> tuple[float, float, float, float]:
        cost: Cost = cost_in_fresh_process(f"{__name__}.{routes[name]}", samples=samples, features=features)
        return cost.seconds, cost.cpu_seconds, cost.peak_mb, cost.result

    found = interleaved({name: partial(run, name) for name in routes}, rounds, report)
    seconds = {name: figures[:, :2] for name, figures in found.items()}
    memory = {name: figures[:, 2] for name, figures in found.items()}
    value = {name: figures[:, 3] for name, figures in found.items()}
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    rows = [Row.of(name, seconds[name], "s", over=seconds[GRAM], note=threads) for name in routes]
    rows += [Row.of(f"peak memory: {name}", memory[name], "MB") for name in routes]
    rows.append(
        Row.of(f"time: {SVD64} / {GRAM}", seconds[SVD64] / seconds[GRAM], "x", limit=3.0, at_least=True)
    )
    rows.append(Row.of(f"time: {SVD32} / {GRAM}", seconds[SVD32] / seconds[GRAM], "x"))
    difference = {name: np.abs(value[name] / value[SVD64] - 1) for name in (GRAM, SVD32)}
    rows.append(Row.of(f"relative difference from {SVD64}: {GRAM}", difference[GRAM], "", limit=1e-6))
    rows.append(Row.of(f"relative difference from {SVD64}: {SVD32}", difference[SVD32], ""))
    return rows


def gram_route(samples: int, features: int) -> Callable[[], float]:
    """RankMe as coloss computes it, ready to run.

    Examples:
        >>> 1 <= gram_route(samples=64, features=4)() <= 4
        True
    """
    from coloss.metrics import rankme

    return _ready(samples, features, rankme)


def svd_route(samples: int, features: int) -> Callable[[], float]:
    """RankMe from all singular values in float64, ready to run.

    Examples:
        >>> abs(svd_route(64, 4)() / gram_route(64, 4)() - 1) < 1e-6
        True
    """
    return _ready(samples, features, lambda rows: effective_rank(torch.linalg.svdvals(rows.double()), EPS))


def single_svd_route(samples: int, features: int) -> Callable[[], float]:
    """RankMe from all singular values in float32, the precision of the embeddings, ready to run.

    Examples:
        >>> abs(single_svd_route(64, 4)() / gram_route(64, 4)() - 1) < 1e-4
        True
    """
    return _ready(samples, features, lambda rows: effective_rank(torch.linalg.svdvals(rows), EPS))


def _ready(samples: int, features: int, rank: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    embeddings = correlated_embeddings(samples, features)
    rank(embeddings[:features])  # loads the libraries, which costs time and memory once
    return lambda: rank(embeddings).item()


def correlated_embeddings(samples: int, features: int) -> Tensor:
    """Embeddings whose singular values fall like those of a trained network, about as 1 / k, in a rotated basis.

    Examples:
        >>> correlated_embeddings(50, 4).shape
        torch.Size([50, 4])
    """
    generator = torch.Generator().manual_seed(0)
    scale = 1 / torch.arange(1, features + 1)
    rotation = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return (torch.randn(samples, features, generator=generator) * scale) @ rotation
