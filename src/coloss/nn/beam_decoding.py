"""The likeliest continuations of texts by any model of the next token, searched along several at once."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops.precision import full_precision


class Beams(NamedTuple):
    """Continuations found, best first.

    Attributes:
        ids: int64 (texts, beams, tokens), without the given start; after the end token, and where nothing was found, -1.
        scores: (texts, beams), sum of log-probabilities divided by tokens to the power of the length penalty; -inf where nothing was found.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    next_logits: Callable[[Int[Tensor, "rows tokens"]], Float[Tensor, "rows vocabulary"]],
    start: Int[Tensor, "texts tokens"],
    *,
    end_id: int,
    max_tokens: int,
    beams: int = 5,
    length_penalty: float = 1.0,
) -> Beams:
    """Keep the best few continuations of each text, lengthen each by every token, and again keep the best, until all have ended.

    A continuation that ends is put aside; it counts by (sum of log-probabilities) / tokens^length_penalty, its end token counted. What has not
    ended after `max_tokens` is taken as it is.

    Args:
        next_logits: of the token after each row; rows are those of `start` with each repeated `beams` times (text 0, text 0, ..., text 1).
        start: what each text begins with, at least one token.
        end_id: the token that ends a text; it is in the result.
        max_tokens: longest continuation, >= 1.
        beams: how many are kept, >= 1; 1 is greedy decoding.
        length_penalty: 0 compares sums, 1 means.

    Returns:
        See `Beams`.

    Raises:
        ValueError: for an empty start or a number out of range.

    Cost: `max_tokens` calls of `next_logits`, on texts * beams rows.

    Examples:
        >>> likely = torch.tensor(
        ...     [[0.0, 3.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
        ... )  # after 0 comes 1, after 1 the end
        >>> found = beam_search(
        ...     lambda ids: likely[ids[:, -1]], torch.tensor([[0]]), end_id=2, max_tokens=4, beams=2
        ... )
        >>> found.ids[0, 0].tolist()
        [1, 2, -1, -1]
    """
    if start.shape[1] < 1:
        raise ValueError(f"start must have at least one token, got shape {tuple(start.shape)}")
    for name, value in (("max_tokens", max_tokens), ("beams", beams)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    texts, given = start.shape
    rows = torch.arange(texts, device=start.device)[:, None]
    alive = start[:, None].expand(-1, beams, -1)
    # At first all beams of a text are equal: only one of them may be lengthened.
    sums = torch.full((texts, beams), -math.inf, device=start.device)
    sums[:, 0] = 0.0
    done = start.new_full((texts, beams, max_tokens), -1)
    done_scores = torch.full((texts, beams), -math.inf, device=start.device)
    for length in range(1, max_tokens + 1):
        logits = full_precision(next_logits(alive.flatten(0, 1)))
        # A row where nothing may follow has no softmax: such a text ends without a continuation.
        steps = torch.log_softmax(logits, -1).masked_fill(logits == -math.inf, -math.inf)
        totals = sums[..., None] + steps.to(sums.dtype).unflatten(0, (texts, beams))
        vocabulary = totals.shape[-1]
        # Of twice as many, at least as many as there are beams have not ended.
        best = totals.flatten(1).topk(min(2 * beams, beams * vocabulary), 1)
        source, token = best.indices // vocabulary, best.indices % vocabulary
        lengthened = torch.cat([alive[rows, source], token[..., None]], 2)
        ends = (token == end_id) | (length == max_tokens)
        scores = (best.values / length**length_penalty).masked_fill(~ends, -math.inf)
        written = F.pad(lengthened[..., given:], (0, max_tokens - length), value=-1)
        done_scores, order = torch.cat([done_scores, scores], 1).topk(beams, 1)
        done = torch.cat([done, written], 1)[rows, order]
        going = best.values.masked_fill(ends, -math.inf)
        sums, order = _widened(going, beams)
        alive = lengthened[rows, order]
        if not bool(sums.isfinite().any()):
            break
    return Beams(done.masked_fill((done_scores == -math.inf)[..., None], -1), done_scores)


def _widened(values: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The best few of each row, filled up with minus infinity where a row has fewer."""
    missing = max(0, beams - values.shape[1])
    found = F.pad(values, (0, missing), value=-math.inf).topk(beams, 1)
    return found.values, found.indices.clamp(max=values.shape[1] - 1)
