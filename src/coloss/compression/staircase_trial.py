"""What is measured of the staircase cache: a small character model's loss on Shakespeare with caches of as many bits each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.cached_loss import cached_loss
from coloss.compression.staircase_cache import StaircaseCache
from coloss.data import character_windows, load_characters
from coloss.data.characters import spaced_windows
from coloss.nn import CausalLanguageModel, KeyValueCache, next_token_loss, sampled_block_attention
from coloss.train import Budget, Setting, cosine, fit

LENGTH, STEP, WINDOWS = 256, 32, 64
"""Characters of a window, tokens of a chunk (and read at once), and test windows."""

STEPS, BATCH, RATE, DIM, DEPTH, HEADS = 400, 4, 8e-3, 64, 2, 2

CACHES: dict[str, dict[str, Any]] = {
    "uniform": {"bits": (16, 3), "group": 32, "grid": "ends"},
    "staircase": {"bits": (16, 4, 2, 1), "group": 16, "grid": "bins"},
    "staircase, half the size at last": {"bits": (16, 4, 2, 1), "group": 32, "grid": "bins"},
    "staircase 8 4 2, own grid": {"bits": (16, 8, 4, 2), "group": 32, "grid": "bins"},
    "staircase 8 4 2, published grid": {"bits": (16, 8, 4, 2), "group": 32, "grid": "ends"},
    "staircase 4 2, published grid": {"bits": (16, 4, 2), "group": 32, "grid": "ends"},
    "uniform 2 bits": {"bits": (16, 2), "group": 32, "grid": "ends"},
    "uniform 3 bits, nested grid": {"bits": (16, 3), "group": 32, "grid": "bins"},
    "uniform 4 bits": {"bits": (16, 4), "group": 32, "grid": "ends"},
}
"""The caches; "uniform" and "staircase" are the best of their kind of at most as many bits, on validation text."""


def staircase_against_uniform(setting: Setting) -> dict[str, dict[str, float]]:
    """Loss in nats a character, accuracy, and bits for each cached number, of one trained model with every cache.

    Beside the caches, of the same model: plain float32, and float16 for the newest two or three chunks with nothing kept of what is older.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    text = load_characters()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model: Any = fit(
            CausalLanguageModel(len(text.characters), DIM, DEPTH, HEADS, context=LENGTH),
            character_windows(text.train, LENGTH, stride=LENGTH // 2),
            next_token_loss,
            budget=Budget(steps=2 if setting.smoke else STEPS),
            batch_size=BATCH,
            optimizer=partial(torch.optim.AdamW, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1),
            learning_rate_schedule=cosine(warmup=0.1),
            clip_norm=1.0,
            seed=setting.seed,
        ).model
    device = next(model.parameters()).device
    ids = spaced_windows(text.test, LENGTH + 1, 2 if setting.smoke else WINDOWS).to(device)
    # Pieces of a step leave the cache as it is token by token: what is in a piece would not be quantised yet.
    found = {"float32": cached_loss(model, ids, KeyValueCache, piece=LENGTH)}
    for name, levels in CACHES.items():
        make = partial(StaircaseCache, step=STEP, kept=torch.float16, **levels)
        found[name] = cached_loss(model, ids, make, piece=STEP) | {
            "mean_bits": mean_bits(make, STEP if setting.smoke else LENGTH)
        }
    for chunks in (2, 3):
        model.causal_attention = _Newest(chunks)
        judged = cached_loss(model, ids, KeyValueCache, piece=LENGTH)
        found[f"newest {chunks} chunks alone"] = {
            "loss": judged["loss"],
            "accuracy": judged["accuracy"],
            "cache_bits": 16 * chunks * STEP / LENGTH,
        }
    for judged in found.values():
        judged["loss_above_float32"] = judged["loss"] - found["float32"]["loss"]
    return found


class _Newest(nn.Module):
    """Attention to a token's own chunk and the ones just before it: a cache that forgets the others."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        used = torch.arange(-(-queries.shape[2] // STEP)) < self.chunks
        return sampled_block_attention(queries, keys, values, used, STEP)


def mean_bits(
    make_cache: Callable[[], StaircaseCache], tokens: int = LENGTH, dim: int = DIM // HEADS
) -> float:
    """Stored bits for each cached number, over all numbers held at any time while a text is written token by token.

    Args:
        make_cache: gives an empty cache with chunks of `STEP` tokens, within which every token adds the same bytes.
        tokens: of the text.
        dim: of a head.

    Examples:
        >>> round(mean_bits(partial(StaircaseCache, (16, 4), 32, 32, kept=torch.float16), tokens=32), 3)
        15.333
    """
    cache = make_cache()
    held = before = 0
    for start in range(0, tokens, STEP):
        count = min(STEP, tokens - start)
        first, others = torch.zeros(1, 1, count, dim).split([1, count - 1], dim=2)
        cache.update(0, first, first)
        added = cache.nbytes() - before
        cache.update(0, others, others)
        held += sum(before + added * token for token in range(1, count)) + cache.nbytes()
        before = cache.nbytes()
    return 8 * held / (dim * tokens * (tokens + 1))
