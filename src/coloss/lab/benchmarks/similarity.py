"""Losses on the similarities of a batch: streamed tile by tile, beside the plain formula and pytorch-metric-learning."""

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, cost_in_fresh_process, interleaved, now, silent
from coloss.lab.benchmarks.row import Row

PEER = "pytorch_metric_learning"


@dataclass(frozen=True)
class Case:
    """One loss at one size, and what it should reach beside the other way to compute it.

    Attributes:
        title: for the table.
        work: name of the function of this module that prepares it.
        peer: name of the other way, as that function takes it; None if there is none that fits the machine.
        sizes: arguments of the function.
        calls: forward and backward passes in one process; their median is taken.
        rounds: processes.
        faster: how many times faster than the peer it should be.
        leaner: how many times less extra memory it should take.
        megabytes: largest extra memory, in place of `leaner`.
    """

    title: str
    work: str
    peer: str | None
    sizes: Mapping[str, int]
    calls: int = 3
    rounds: int = 3
    faster: float | None = None
    leaner: float | None = None
    megabytes: float | None = None


CASES = (
    Case("InfoNCE both ways, 1,024 x 256", "info_nce", "plain", {"batch": 1024, "dim": 256}, 15, faster=1.0),
    Case(
        "InfoNCE both ways, 4,096 x 256",
        "info_nce",
        "plain",
        {"batch": 4096, "dim": 256},
        5,
        faster=1.8,
        leaner=5,
    ),
    Case(
        "InfoNCE both ways, 16,384 x 256",
        "info_nce",
        "plain",
        {"batch": 16384, "dim": 256},
        1,
        1,
        faster=2.0,
        leaner=25,
    ),
    Case(
        "InfoNCE both ways, 65,536 x 512",
        "info_nce",
        None,
        {"batch": 65536, "dim": 512},
        1,
        1,
        megabytes=1500,
    ),
    Case("NT-Xent, 2 x 256 x 256", "nt_xent", PEER, {"batch": 256, "dim": 256}, 1, 1, faster=200, leaner=50),
    Case(
        "SupCon, 2 x 4,096 x 256", "supervised", PEER, {"batch": 4096, "dim": 256}, 1, 1, faster=10, leaner=20
    ),
    Case(
        "Decoupled softmax, 512 queries, 100,000 labels x 64",
        "decoupled",
        "plain",
        {"batch": 512, "labels": 100_000, "dim": 64},
        1,
        2,
        leaner=10,
    ),
    Case("Mann-Whitney, 8,192 x 8,192", "mann_whitney", "plain", {"batch": 8192}, 3, faster=3, leaner=50),
)


def measure(report: Report = silent, *, cases: tuple[Case, ...] = CASES) -> list[Row]:
    """Losses on a batch's similarities, forward and backward, each in fresh processes: time and extra memory beside the usual way.

    Args:
        report: told the share done.
        cases: what to measure.
    """
    rows: list[Row] = []
    total = sum(case.rounds for case in cases)
    done = 0
    for case in cases:
        share = partial(_part, report, done / total, case.rounds / total)
        rows += _rows(case, share)
        done += case.rounds
    return rows


def _part(report: Report, start: float, width: float, share: float) -> None:
    report(start + width * share)


def _rows(case: Case, report: Report) -> list[Row]:
    missing = case.peer == PEER and importlib.util.find_spec(PEER) is None
    ways = ["streamed"] if case.peer is None or missing else ["streamed", case.peer]

    def run(way: str) -> tuple[float, float, float]:
        cost = cost_in_fresh_process(f"{__name__}.{case.work}", way=way, calls=case.calls, **case.sizes)
        return cost.result, cost.result, cost.peak_mb

    found = interleaved({way: partial(run, way) for way in ways}, case.rounds, report)
    ours = found["streamed"]
    rows = [Row.of(f"{case.title}: streamed", ours[:, 0], "s")]
    if "dim" in case.sizes:
        product = [product_seconds(**_product_sizes(case)) for _ in range(case.rounds)]
        note = "2 products are needed" if case.work in _OF_ONE_SET else "4 products are needed"
        rows.append(Row.of("  over one matrix product", ours[:, 0] / product, "x", note=note))
    memory = Row.of("  extra memory", ours[:, 2], "MB", limit=case.megabytes)
    if missing:
        return [*rows, memory, Row("  beside pytorch-metric-learning", note="is not installed")]
    if case.peer is None:
        return [*rows, memory]
    other = found[case.peer]
    return [
        *rows,
        Row.of(f"  {_NAMES[case.peer]}", other[:, 0], "s", over=ours[:, 0]),
        Row.of("  times faster", other[:, 0] / ours[:, 0], "x", limit=case.faster, at_least=True),
        memory,
        Row.of(f"  extra memory, {_NAMES[case.peer]}", other[:, 2], "MB"),
        Row.of(
            "  times less memory",
            other[:, 2] / ours[:, 2].clip(min=0.1),
            "x",
            limit=case.leaner,
            at_least=True,
        ),
    ]


_NAMES = {"plain": "plain PyTorch", PEER: "pytorch-metric-learning"}


# Losses of two views of one set, whose scores are those of the set with itself.
_OF_ONE_SET = ("nt_xent", "supervised")


def _product_sizes(case: Case) -> dict[str, int]:
    rows = case.sizes["batch"] * (2 if case.work in _OF_ONE_SET else 1)
    return {"rows": rows, "columns": case.sizes.get("labels", rows), "dim": case.sizes["dim"]}


def product_seconds(rows: int, columns: int, dim: int) -> float:
    """Seconds of the scores' matrix product alone, made in blocks that stay in cache: the machine's own limit.

    Examples:
        >>> product_seconds(64, 32, 8) > 0
        True
    """
    x, y = torch.randn(rows, dim), torch.randn(columns, dim)
    block = torch.empty(min(512, rows) * min(1024, columns))
    started, _ = now()
    for left in x.split(512):
        for right in y.split(1024):
            out = block[: len(left) * len(right)].view(len(left), len(right))
            torch.mm(left, right.T, out=out)
    return now()[0] - started


def info_nce(way: str, batch: int, dim: int, calls: int) -> Callable[[], float]:
    """InfoNCE both ways, ready to run.

    Examples:
        >>> info_nce("streamed", 8, 4, calls=1)() > 0
        True
    """
    from coloss.ops import info_nce_loss

    def plain(x: Tensor, y: Tensor) -> Tensor:
        scores, own = x @ y.T / 0.07, torch.arange(len(x))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    loss = plain if way == "plain" else partial(info_nce_loss, temperature=0.07, symmetric=True)
    return _timed(loss, _embeddings(batch, dim, 0), _embeddings(batch, dim, 1), calls=calls)


def nt_xent(way: str, batch: int, dim: int, calls: int) -> Callable[[], float]:
    """NT-Xent of two views, ready to run.

    Examples:
        >>> nt_xent("streamed", 8, 4, calls=1)() > 0
        True
    """
    return _labelled(way, "NTXentLoss", batch, dim, torch.arange(batch).repeat(2), calls)


def supervised(way: str, batch: int, dim: int, calls: int) -> Callable[[], float]:
    """Supervised contrastive loss of two views of ten classes, ready to run.

    Examples:
        >>> supervised("streamed", 20, 4, calls=1)() > 0
        True
    """
    return _labelled(way, "SupConLoss", batch, dim, (torch.arange(batch) % 10).repeat(2), calls)


def decoupled(way: str, batch: int, labels: int, dim: int, calls: int) -> Callable[[], float]:
    """Decoupled softmax of queries with one to forty positives among many labels, ready to run.

    Examples:
        >>> decoupled("plain", 8, 50, 4, calls=1)() > 0
        True
    """
    from coloss.ops import decoupled_softmax_loss
    from coloss.retrieval import decoupled_score_loss

    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(1, min(40, labels) + 1, (batch,), generator=generator)
    rows = torch.arange(batch).repeat_interleave(counts)
    pairs = torch.stack([rows, torch.randint(labels, (len(rows),), generator=generator)]).unique(dim=1)

    def own(queries: Tensor, keys: Tensor) -> Tensor:
        return pairs[:, (pairs[0] < len(queries)) & (pairs[1] < len(keys))]

    def plain(queries: Tensor, keys: Tensor) -> Tensor:
        relevance = torch.zeros(len(queries), len(keys))
        relevance[tuple(own(queries, keys))] = 1.0
        return decoupled_score_loss(queries @ keys.T, relevance, 0.05)

    def streamed(queries: Tensor, keys: Tensor) -> Tensor:
        return decoupled_softmax_loss(queries, keys, own(queries, keys), 0.05)

    loss = plain if way == "plain" else streamed
    return _timed(loss, _embeddings(batch, dim, 0), _embeddings(labels, dim, 1), calls=calls)


def mann_whitney(way: str, batch: int, calls: int) -> Callable[[], float]:
    """The logistic cost of as many positive as negative scores, pair by pair, ready to run.

    Examples:
        >>> mann_whitney("plain", 8, calls=1)() > 0
        True
    """
    from coloss.ops import pairwise_logistic_loss

    def plain(positive: Tensor, negative: Tensor) -> Tensor:
        return F.softplus((negative.unsqueeze(0) - positive.unsqueeze(1)) / 0.1).mean()

    scores = _embeddings(batch, 2, 0)
    positive, negative = (scores.detach()[:, side].clone().requires_grad_() for side in (0, 1))
    loss = plain if way == "plain" else partial(pairwise_logistic_loss, temperature=0.1)
    return _timed(loss, positive, negative, calls=calls)


def _labelled(way: str, peer: str, batch: int, dim: int, labels: Tensor, calls: int) -> Callable[[], float]:
    from coloss.ops import supervised_contrastive_loss

    loss: Any = partial(supervised_contrastive_loss, temperature=0.07)
    if way == PEER:
        from pytorch_metric_learning import losses

        loss = getattr(losses, peer)(temperature=0.07)
    return _timed(lambda x: loss(x, labels[: len(x)]), _embeddings(2 * batch, dim, 0), calls=calls)


def _embeddings(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator)).requires_grad_()


def _timed(loss: Callable[..., Tensor], *leaves: Tensor, calls: int) -> Callable[[], float]:
    """Seconds of a forward and backward pass, the median of some calls, after a small one that loads the libraries."""

    def once(*inputs: Tensor) -> float:
        started, _ = now()
        torch.autograd.grad(loss(*inputs), inputs)
        return now()[0] - started

    once(*(leaf.detach()[:16].requires_grad_() for leaf in leaves))
    return lambda: statistics.median(once(*leaves) for _ in range(calls))
