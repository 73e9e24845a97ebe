"""A contrastive loss on a graph against meta-nodes of ten clusters, beside the exact loss against all nodes, over growing graphs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.contrastive import meta_node_contrast_loss
from coloss.lab.benchmarks.measure import Report, cost_in_fresh_process, interleaved, silent
from coloss.lab.benchmarks.output_layer import timed
from coloss.lab.benchmarks.row import Row

META, EXACT, MATRIX = "meta-nodes", "exact, streamed", "exact, all scores in memory"
CLUSTERS, DIM, NEIGHBOURS, INVERSE_TEMPERATURE = 10, 10, 10, 0.5


def measure(
    report: Report = silent,
    *,
    nodes: Sequence[int] = (4096, 8192, 16384, 32768),
    largest_matrix: int = 8192,
    calls: int = 3,
    rounds: int = 3,
) -> list[Row]:
    """Graph contrast by meta-nodes and exactly, forward and backward, each in fresh processes: time and extra memory as nodes grow.

    Args:
        report: told the share done.
        nodes: sizes of the graph, rising; 10 neighbours, embeddings of 10 numbers.
        largest_matrix: the largest graph of which all scores are put in memory.
        calls: passes in one process; their median is taken.
        rounds: processes for each size and way.
    """
    cases = {
        f"{way}, {size:,} nodes": (way, size)
        for size in nodes
        for way in WAYS
        if way != MATRIX or size <= largest_matrix
    }
    work = {name: partial(_cost, way, size, calls) for name, (way, size) in cases.items()}
    found = interleaved(work, rounds, report)
    rows: list[Row] = []
    for name, (_, size) in cases.items():
        reference = found[f"{META}, {size:,} nodes"]
        rows.append(Row.of(name, found[name][:, :2], "ms", over=reference[:, :2]))
        rows.append(Row.of(f"  extra memory: {name}", found[name][:, 2], "MB", over=reference[:, 2]))
    limits: dict[str, dict[str, Any]] = {META: {"limit": 1.3}, EXACT: {"limit": 1.5, "at_least": True}}
    for way in WAYS:
        names = [name for name, case in cases.items() if case[0] == way]
        if len(names) > 1:
            milliseconds = np.stack([found[name][:, 1] for name in names], 1)
            slopes = [slope([cases[name][1] for name in names], row) for row in milliseconds.tolist()]
            note = "the exponent of growth, by CPU"
            rows.append(
                Row.of(f"log time over log nodes: {way}", slopes, "", note=note, **limits.get(way, {}))
            )
    return rows


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent by which a cost grows with the size: the slope of the line through their logarithms.

    Examples:
        >>> round(slope([10, 20, 40], [5.0, 20.0, 80.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _cost(way: str, nodes: int, calls: int) -> tuple[float, float, float]:
    cost = cost_in_fresh_process(f"{__name__}.contrast", way=way, nodes=nodes, calls=calls)
    return *cost.result, cost.peak_mb


def contrast(way: str, nodes: int, calls: int) -> Callable[[], tuple[float, float]]:
    """Forward and backward passes of one way, ready to run; they give their median milliseconds, by the wall clock and by CPU.

    Examples:
        >>> contrast("meta-nodes", nodes=20, calls=1)()[0] > 0
        True
    """
    _pass(way, *_graph(64))  # loads the libraries, which costs time and memory once
    graph = _graph(nodes)
    return lambda: timed(lambda: _pass(way, *graph), calls)


def _graph(nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(nodes, DIM, generator=generator).requires_grad_()
    near = torch.randint(nodes, (nodes * NEIGHBOURS,), generator=generator)
    edges = torch.stack([torch.arange(nodes).repeat_interleave(NEIGHBOURS), near])
    return embeddings, edges, torch.randint(CLUSTERS, (nodes,), generator=generator)


def _pass(way: str, embeddings: Tensor, edges: Tensor, assignments: Tensor) -> None:
    torch.autograd.grad(WAYS[way](embeddings, edges, assignments), embeddings)


def _by_meta_nodes(embeddings: Tensor, edges: Tensor, assignments: Tensor) -> Tensor:
    return meta_node_contrast_loss(
        embeddings, edges, assignments, clusters=CLUSTERS, inverse_temperature=INVERSE_TEMPERATURE
    )


def _streamed(embeddings: Tensor, edges: Tensor, assignments: Tensor) -> Tensor:
    return meta_node_contrast_loss(embeddings, edges, exact=True, inverse_temperature=INVERSE_TEMPERATURE)


def _in_memory(embeddings: Tensor, edges: Tensor, assignments: Tensor) -> Tensor:
    """The formula as it stands, with a matrix of all scores."""
    unit = F.normalize(embeddings, dim=1)
    others = ~torch.eye(len(unit), dtype=torch.bool)
    scores = INVERSE_TEMPERATURE * (unit @ unit.T) * others
    terms = scores[edges[0], edges[1]].exp()
    attraction = torch.zeros(len(unit)).index_add(0, edges[0], terms).log()
    return (scores.logsumexp(1) - attraction).mean()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    META: _by_meta_nodes,
    EXACT: _streamed,
    MATRIX: _in_memory,
}
