"""Meters of embeddings, neighbours and retrieval in a stream of tiles, beside the plain formulas where these fit in memory."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss import metrics
from coloss.lab.benchmarks.measure import Cost, Report, cost_in_fresh_process, interleaved, silent
from coloss.lab.benchmarks.row import Row
from coloss.ops import effective_rank, gram_singular_values

# Classes of the labelled sets, about as many as an image benchmark has.
CLASSES = 1000
# Extra memory that no meter should need at 200,000 x 256, in 10^6 bytes.
MOST_MB = 2000.0

Run = Callable[[], float]


class Case(NamedTuple):
    """A meter, on how many samples, for how many queries (0: the samples themselves), and whether the formula is run too."""

    meter: str
    samples: int
    queries: int = 0
    plain: bool = True

    @property
    def name(self) -> str:
        """For a table.

        Examples:
            >>> Case("neighbours", 200_000, 2_000).name
            'neighbours, 2,000 in 200,000'
        """
        within = f"{self.queries:,} in " if self.queries else ""
        return f"{self.meter}, {within}{self.samples:,}"


def cases(samples: int, queries: int, pairs: int) -> list[Case]:
    """What is measured: linear meters on all samples, quadratic ones on fewer.

    Examples:
        >>> sum(case.plain for case in cases(200_000, 2_000, 20_000))
        7
    """
    return [
        Case("alignment", samples),
        Case("tolerance", samples, plain=False),
        Case("feature_std", samples),
        Case("effective_rank", samples, plain=False),
        Case("uniformity", pairs),
        Case("uniformity", 5 * pairs // 2, plain=False),
        Case("neighbours", samples, queries),
        Case("self neighbours", pairs),
        Case("retrieval", samples, queries, plain=False),
        Case("retrieval", pairs, queries),
        Case("self retrieval", pairs),
    ]


def measure(
    report: Report = silent,
    *,
    samples: int = 200_000,
    features: int = 256,
    queries: int = 2_000,
    pairs: int = 20_000,
    rounds: int = 3,
) -> list[Row]:
    """Meters of 200,000 x 256 embeddings in fresh processes: time and memory beside the inputs, and the plain formulas.

    Args:
        report: told the share done.
        samples: embeddings of the meters that take time in proportion, and of the base of a search.
        features: of each.
        queries: of a search.
        pairs: embeddings of the meters of all pairs.
        rounds: processes of each case.
    """
    chosen = cases(samples, queries, pairs)
    routes = [(case, plain) for case in chosen for plain in (False, True) if case.plain or not plain]

    def run(case: Case, plain: bool) -> tuple[float, float, float, float]:
        route = "plain_route" if plain else "streamed_route"
        cost: Cost = cost_in_fresh_process(
            f"{__name__}.{route}",
            meter=case.meter,
            samples=case.samples,
            features=features,
            queries=case.queries,
        )
        return cost.seconds, cost.cpu_seconds, cost.peak_mb, cost.result

    names = {(case, plain): case.name + (", plain formula" if plain else "") for case, plain in routes}
    found = interleaved({names[route]: partial(run, *route) for route in routes}, rounds, report)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    rows = []
    for case, plain in routes:
        over = found[case.name][:, :2] if plain else None
        figures = found[names[case, plain]][:, :2]
        rows.append(Row.of(names[case, plain], figures, "s", over=over, note="" if plain else threads))
    for case, plain in routes:
        limit = {} if plain else {"limit": MOST_MB}
        rows.append(
            Row.of(f"peak memory: {names[case, plain]}", found[names[case, plain]][:, 2], "MB", **limit)
        )
    for case in chosen:
        if case.plain:
            streamed, formula = found[case.name][:, 3], found[names[case, True]][:, 3]
            difference = np.abs(streamed - formula) / np.maximum(np.abs(formula), 1e-12)
            rows.append(Row.of(f"relative difference: {case.name}", difference, "", limit=1e-3))
    return rows


def streamed_route(meter: str, samples: int, features: int, queries: int) -> Run:
    """One meter as coloss computes it, ready to run.

    Examples:
        >>> 0 < streamed_route("alignment", 64, 4, 0)() < 1
        True
    """
    x, labels, asked, answers = _inputs(samples, features, queries)
    other = x + _noise(samples, features) if meter == "alignment" else x
    runs: dict[str, Run] = {
        "alignment": lambda: float(metrics.alignment(x, other)),
        "tolerance": lambda: float(metrics.tolerance(x, labels)),
        "feature_std": lambda: float(metrics.feature_standard_deviation(x)),
        "effective_rank": lambda: float(effective_rank(gram_singular_values(x))),
        "uniformity": lambda: float(metrics.uniformity(x)),
        "neighbours": lambda: float(metrics.nearest_neighbours(asked, x, 10).values.mean()),
        "self neighbours": lambda: float(metrics.nearest_neighbours(x, x, 10, exclude=True).values.mean()),
        "retrieval": lambda: metrics.retrieval_metrics_from_embeddings(asked, x, answers)["mrr"],
        "self retrieval": lambda: metrics.self_retrieval_metrics(x, labels)["map@r"],
    }
    return runs[meter]


def plain_route(meter: str, samples: int, features: int, queries: int) -> Run:
    """One meter by its formula on whole matrices, ready to run.

    Examples:
        >>> for case in cases(300, 20, 100):
        ...     sizes = {"meter": case.meter, "samples": case.samples, "features": 8, "queries": case.queries}
        ...     if case.plain:
        ...         assert abs(plain_route(**sizes)() / streamed_route(**sizes)() - 1) < 1e-3, case
    """
    x, labels, asked, answers = _inputs(samples, features, queries)
    other = x + _noise(samples, features) if meter == "alignment" else x

    def cosines(queries: Tensor) -> Tensor:
        return F.normalize(queries, dim=1) @ F.normalize(x, dim=1).T

    def retrieval() -> float:
        relevance = torch.zeros(queries, samples, dtype=torch.bool)
        relevance[answers[:, 0], answers[:, 1]] = True
        return metrics.retrieval_metrics(cosines(asked), relevance)["mrr"]

    def self_retrieval() -> float:
        order = cosines(x).fill_diagonal_(-2).argsort(dim=1, descending=True, stable=True)
        hits = labels[order[:, :-1]] == labels[:, None]
        wanted = hits.sum(1, keepdim=True)
        place = torch.arange(1, samples)
        share = (hits.cumsum(1) / place * (hits & (place <= wanted))).sum(1) / wanted[:, 0]
        return float(share[wanted[:, 0] > 0].mean())

    runs: dict[str, Run] = {
        "alignment": lambda: float(
            (F.normalize(x, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean()
        ),
        "feature_std": lambda: float(F.normalize(x, dim=1).std(0).mean()),
        "uniformity": lambda: float(
            torch.pdist(F.normalize(x, dim=1)).square_().mul_(-2).exp_().mean().log()
        ),
        "neighbours": lambda: float(cosines(asked).topk(10, dim=1).values.mean()),
        "self neighbours": lambda: float(cosines(x).fill_diagonal_(-2).topk(10, dim=1).values.mean()),
        "retrieval": retrieval,
        "self retrieval": self_retrieval,
    }
    return runs[meter]


def _inputs(samples: int, features: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings in loose classes, their labels, queries near some of them, and which of them each query is near."""
    generator = torch.Generator().manual_seed(0)
    classes = min(CLASSES, max(1, samples // 20))
    labels = torch.randint(classes, (samples,), generator=generator)
    x = torch.randn(samples, features, generator=generator)
    x += 0.5 * torch.randn(classes, features, generator=generator)[labels]
    answers = torch.randint(samples, (queries,), generator=generator)
    asked = x[answers] + 4 * torch.randn(queries, features, generator=generator)
    return x, labels, asked, torch.stack([torch.arange(queries), answers], 1)


def _noise(samples: int, features: int) -> Tensor:
    return 0.3 * torch.randn(samples, features, generator=torch.Generator().manual_seed(1))
