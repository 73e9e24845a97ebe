"""Attention over a prompt of many documents: three dense problems over blocks, beside dense causal attention and beside a dense mask.

One pass of each on one busy core at 2.5 GHz, processor time and extra memory, all in one process; documents of 32 tokens, 4 heads of 16:

    documents            10              40              160               500
    block attention      1.7 ms, 1 MB    3.5 ms, 3 MB    12 ms, 11 MB      29 ms, 36 MB
    dense causal         1.0 ms, 0 MB    7.2 ms, 2 MB    79 ms, 3 MB       702 ms, 6 MB
    dense with a mask    2.3 ms, 1 MB    29 ms, 15 MB    475 ms, 244 MB    4,895 ms, 1,296 MB

So time grows about linearly over blocks (with an exponent of 0.76, as small prompts are overhead) and quadratically without them (1.76
and 2.05). Memory is quadratic with a mask only: a fused kernel for dense causal attention takes even less than the blocks, which repeat the
instruction's keys and values for each document.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, cost_in_fresh_process, interleaved, silent
from coloss.lab.benchmarks.meta_nodes import slope
from coloss.lab.benchmarks.output_layer import timed
from coloss.lab.benchmarks.row import Row
from coloss.retrieval import blockrank_attention, blockrank_mask

BLOCK, CAUSAL, MASK = "block attention", "dense causal", "dense with a mask"
HEADS, HEAD_DIM = 4, 16


def measure(
    report: Report = silent,
    *,
    documents: Sequence[int] = (10, 40, 160, 500),
    tokens: int = 32,
    calls: int = 2,
    rounds: int = 3,
) -> list[Row]:
    """Attention of a prompt to itself, forward, one thread, each in fresh processes: time and extra memory as its documents grow.

    Args:
        report: told the share done.
        documents: numbers of documents, rising.
        tokens: in each document, the instruction and the query.
        calls: passes in one process; their median is taken.
        rounds: processes for each number and way.
    """
    cases = {_name(way, count): (way, count) for count in documents for way in WAYS}
    work = {name: partial(_cost, *case, tokens, calls) for name, case in cases.items()}
    found = interleaved(work, rounds, report)
    rows: list[Row] = []
    for name, (_, count) in cases.items():
        reference = found[_name(BLOCK, count)]
        rows.append(Row.of(name, found[name][:, :2], "ms", over=reference[:, :2]))
        rows.append(
            Row.of(f"  extra memory: {name}", found[name][:, 2], "MB", over=reference[:, 2].clip(0.1))
        )
    limits: dict[str, dict[str, Any]] = {BLOCK: {"limit": 1.3}, CAUSAL: {"limit": 1.5, "at_least": True}}
    for way in WAYS:
        milliseconds = np.stack([found[_name(way, count)][:, 1] for count in documents], axis=1)
        slopes = [slope([(count + 2) * tokens for count in documents], row) for row in milliseconds.tolist()]
        note = "the exponent of growth, by CPU"
        rows.append(Row.of(f"log time over log tokens: {way}", slopes, "", note=note, **limits.get(way, {})))
    return rows


def attention(way: str, documents: int, tokens: int, calls: int) -> Callable[[], tuple[float, float]]:
    """Forward passes of one way, ready to run; they give their median milliseconds, by the wall clock and by CPU.

    Examples:
        >>> attention("block attention", documents=3, tokens=4, calls=1)()[0] > 0
        True
    """
    torch.set_num_threads(1)
    _pass(way, *_prompt(3, tokens))  # loads the libraries, which costs time and memory once
    prompt = _prompt(documents, tokens)
    return lambda: timed(lambda: _pass(way, *prompt), calls)


def _name(way: str, documents: int) -> str:
    return f"{way}, {documents:,} documents"


def _cost(way: str, documents: int, tokens: int, calls: int) -> tuple[float, float, float]:
    path = f"{__name__}.attention"
    cost = cost_in_fresh_process(path, way=way, documents=documents, tokens=tokens, calls=calls)
    return *cost.result, cost.peak_mb


def _prompt(documents: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of full blocks, and which tokens are valid: all."""
    valid = torch.ones(1, documents + 2, tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = torch.randn(3, 1, HEADS, valid[0].numel(), HEAD_DIM, generator=generator).unbind()
    return queries, keys, values, valid


def _pass(way: str, *prompt: Tensor) -> None:
    with torch.no_grad():
        WAYS[way](*prompt)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def _masked(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=blockrank_mask(valid))


WAYS: dict[str, Callable[..., Tensor]] = {BLOCK: blockrank_attention, CAUSAL: _causal, MASK: _masked}
