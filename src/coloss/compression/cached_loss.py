"""What a language model loses when its cache of keys and values is stored with fewer bits."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.compression.staircase_cache import StaircaseCache
from coloss.nn import CausalLanguageModel, KeyValueCache, next_token_loss


@torch.no_grad()
def cached_loss(
    model: CausalLanguageModel,
    ids: Int[Tensor, "batch tokens"],
    make_cache: Callable[[], KeyValueCache],
    *,
    piece: int = 1,
    skip: int = 0,
) -> dict[str, float]:
    """Next-token loss and accuracy of texts read piece by piece through a cache, and the cache's size at their end.

    Args:
        model: put into evaluation mode while it reads.
        ids: of texts, at least two tokens each.
        make_cache: gives an empty cache, such as `StaircaseCache` or `KeyValueCache`.
        piece: tokens read at once; those of a piece see one another exactly, so 1 is what writing token by token meets.
        skip: predictions at the beginning of a text that are not judged, as their past is short.

    Returns:
        `loss` in nats a token, `accuracy`, `cache_bytes` (of what a `KeyValueCache` holds, its numbers as they are) and
        `cache_bits`, stored bits for each number of keys and values.

    Raises:
        ValueError: for texts too short, or a piece below 1.

    Examples:
        >>> model = CausalLanguageModel(10, dim=32, depth=1, heads=2)
        >>> found = cached_loss(model, torch.randint(10, (2, 33)), lambda: StaircaseCache((16, 4), 16, 16))
        >>> found["cache_bits"], found["cache_bytes"]
        (6.0, 3072.0)
    """
    tokens = ids.shape[1] - 1
    if tokens <= skip or skip < 0:
        raise ValueError(
            f"ids must have more than skip + 1 = {skip + 1} tokens, skip >= 0, got {ids.shape[1]}"
        )
    if piece < 1:
        raise ValueError(f"piece must be >= 1, got {piece}")
    was_training = model.training
    model.eval()
    cache = make_cache()
    try:
        logits = torch.cat([model(part, cache=cache) for part in ids[:, :-1].split(piece, 1)], dim=1)
    finally:
        model.train(was_training)
    logits, targets = logits[:, skip:], ids[:, 1 + skip :]
    if isinstance(cache, StaircaseCache):
        size, bits = cache.nbytes(), cache.bits_per_value()
    else:
        parts = [part for layer in cache.layers for part in layer]
        size = sum(part.nbytes for part in parts)
        bits = 8 * size / sum(part.numel() for part in parts)
    return {
        "loss": next_token_loss(logits, targets).item(),
        "accuracy": (logits.argmax(-1) == targets).float().mean().item(),
        "cache_bytes": float(size),
        "cache_bits": bits,
    }
