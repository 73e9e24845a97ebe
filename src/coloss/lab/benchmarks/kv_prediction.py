"""Time and operations to the first token after a prompt: base alone, small model alone, base with the small model's predicted cache.

All three have random weights: neither time nor operations depend on them. The small model has a quarter of the base's layers. In its last
layer each computes keys and values alone of all tokens but the last, whose queries and network nothing needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from coloss.distillation import (
    KVPredictedLM,
    first_token_logits,
    first_token_operations,
    kept_layers,
    pruned_copy,
)
from coloss.lab.benchmarks.measure import Report, interleaved, silent
from coloss.lab.benchmarks.output_layer import timed
from coloss.lab.benchmarks.row import Row
from coloss.nn import CausalLanguageModel

NAMES = ("base", "predicted cache", "small model alone")

_LEAST = {256: 1.6, 1024: 3.0}
"""From which length of the prompt how many times as quick, three quarters of what was measured on one core: 2.2 and 3.9."""


def measure(
    report: Report = silent,
    *,
    prompts: Sequence[int] = (64, 256, 1024),
    dim: int = 256,
    depth: int = 8,
    share: float = 0.25,
    rounds: int = 5,
) -> list[Row]:
    """Milliseconds and operations to the first token on one thread: base, base with predicted cache, small model, by length of the prompt.

    Args:
        report: told the share done.
        prompts: numbers of tokens, rising.
        dim: width of both models.
        depth: layers of the base.
        share: of its layers that the small model has.
        rounds: how often each case is timed, three prompts a round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = dict(zip(NAMES, three_models(dim, depth, share), strict=True))
        cases = {
            _name(name, tokens): partial(timed, _reading(model, tokens), 3)
            for tokens in prompts
            for name, model in models.items()
        }
        found = interleaved(cases, rounds, report)
        operations = {
            _name(name, tokens): np.array([first_token_operations(model, tokens) / 1e9])
            for tokens in prompts
            for name, model in models.items()
        }
    finally:
        torch.set_num_threads(threads)
    rows = []
    for tokens in prompts:
        base = found[_name("base", tokens)]
        for name in NAMES:
            case = _name(name, tokens)
            rows.append(Row.of(case, found[case], "ms", over=None if name == "base" else base))
    for tokens in prompts:
        for name in NAMES:
            case = _name(name, tokens)
            rows.append(Row.of(case, operations[case], "GFLOP"))
    for tokens in prompts:
        whole, predicted = _name("base", tokens), _name("predicted cache", tokens)
        least = [ratio for length, ratio in _LEAST.items() if tokens >= length and share <= 0.25]
        limit = max(least, default=None)
        ratio = found[whole] / found[predicted]
        rows.append(
            Row.of(f"time, base / predicted cache, {tokens:,} tokens", ratio, "x", limit=limit, at_least=True)
        )
        counted = operations[whole] / operations[predicted]
        rows.append(Row.of(f"operations, base / predicted cache, {tokens:,} tokens", counted, "x"))
    return rows


def three_models(dim: int, depth: int, share: float) -> tuple[Any, Any, Any]:
    """Base, base with predicted cache and small model alone, in evaluation mode.

    Examples:
        >>> base, predicted, small = three_models(16, 4, 0.25)
        >>> base.depth, small.depth, predicted.base is base
        (4, 1, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = CausalLanguageModel(256, dim, depth, 4, key_value_heads=2)
        small = pruned_copy(base, kept_layers(depth, share))
        predicted = KVPredictedLM(base, small).eval()
    return base.eval(), predicted, small.eval()


def _reading(model: Any, tokens: int) -> Callable[[], None]:
    prompt = torch.zeros(1, tokens, dtype=torch.int64)

    def read() -> None:
        first_token_logits(model, prompt)

    return read


def _name(model: str, tokens: int) -> str:
    return f"{model}, {tokens:,} tokens"
