"""Fills a token grid from nothing in a few passes, the surest guesses first, with guidance by a condition."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import full_precision

LogitsFunction: TypeAlias = Callable[[Tensor], Tensor]
"""Tokens (sequences, places), with the mask token where one is hidden and -1 at padding, to logits (sequences, places, codes)."""


def guided_logits(
    conditional: Float[Tensor, "*batch codes"], unconditional: Float[Tensor, "*batch codes"], guidance: float
) -> Float[Tensor, "*batch codes"]:
    """Logits moved on from those without the condition towards, and beyond, those with it.

        l = l_u + s (l_c - l_u)                 s = `guidance`, as in the released code (4; 2 for KIT)

    The paper's form, (1 + a) l_c - a l_u, is the same with s = 1 + a: its a = 4 is guidance 5, the code's 4 is a = 3.

    Args:
        conditional: l_c.
        unconditional: l_u.
        guidance: s, finite; 1 gives the conditional logits themselves, 0 the unconditional ones.

    Raises:
        ValueError: for guidance that is not finite.

    Source:
        Ho, Salimans 2022, arXiv 2207.12598.

    Examples:
        >>> guided_logits(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), guidance=2.0)
        tensor([5., 1.])
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance == 1:
        return conditional
    if guidance == 0:
        return unconditional
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def iterative_decode(
    logits_fn: LogitsFunction,
    lengths: Int[Tensor, " sequences"],
    steps: int = 10,
    *,
    mask_id: int,
    unconditional: LogitsFunction | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "sequences tokens"]:
    """Tokens drawn for every place: all at first, then again and again those that seem least sure.

    In step k of S, max(1, round(cos(pi k / (2 (S - 1))) n)) of a sequence's n places are hidden, those whose tokens had the least probability
    when drawn (all in the first step); the model sees the rest, and tokens for the hidden places are drawn from the largest logits. A token that
    was shown once is never drawn again. For a grid of more dimensions reshape what comes back; the function only ever sees places in a row.

    Args:
        logits_fn: logits of the codes with the condition; see `LogitsFunction`.
        lengths: places of each sequence, >= 1.
        steps: S >= 1, calls of the function; 1 draws all at once.
        mask_id: the token that means "hidden", not one of the codes that can be drawn (more logits than `mask_id` are an error).
        unconditional: logits without the condition, called where `guidance` is not 1.
        guidance: see `guided_logits`.
        temperature: of the draws, >= 0; 0 takes the largest logit.
        top_share: share in (0, 1] of the codes that can be drawn at a place, rounded up.
        generator: of the draws.

    Returns:
        int64 codes, -1 after a sequence's end.

    Raises:
        ValueError: for a number out of range, guidance without `unconditional`, or logits of another shape or with NaN.

    Cost:
        S calls, twice that with guidance; O(sequences places codes) besides.

    Source:
        Chang et al. 2022 (MaskGIT), arXiv 2202.04200, section 3.2; schedule and filter of Guo et al. 2024 (MoMask), arXiv 2312.00063.

    Examples:
        >>> always_two = lambda tokens: torch.nn.functional.one_hot(torch.full_like(tokens, 2), 4) * 9.0
        >>> iterative_decode(always_two, torch.tensor([3, 1]), steps=2, mask_id=4, temperature=0.0)
        tensor([[ 2,  2,  2],
                [ 2, -1, -1]])
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share must be in (0, 1], got {top_share}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance != 1 and unconditional is None:
        raise ValueError(f"guidance must be 1 without unconditional logits, got {guidance}")
    if not len(lengths):
        return lengths.new_zeros(0, 0)
    if int(lengths.min()) < 1:
        raise ValueError(f"lengths must be >= 1, got {int(lengths.min())}")
    longest = int(lengths.max())
    there = torch.arange(longest, device=lengths.device) < lengths[:, None]
    tokens = torch.where(there, mask_id, -1)
    confidence = torch.zeros(there.shape, device=lengths.device).masked_fill(~there, math.inf)
    for step in range(steps):
        share = math.cos(math.pi / 2 * step / max(steps - 1, 1))
        number = (lengths * share).round().clamp(min=1)
        hidden = confidence.argsort(dim=1, stable=True).argsort(dim=1) < number[:, None]
        tokens = torch.where(hidden, mask_id, tokens)
        logits = _logits(logits_fn, unconditional, guidance, tokens, mask_id)
        drawn = _draw(logits, temperature, top_share, generator)
        tokens = torch.where(hidden, drawn, tokens)
        sure = logits.softmax(-1).gather(2, drawn[..., None]).squeeze(2)
        # Shown tokens are surer than any that was drawn now, and so stay.
        confidence = torch.where(hidden, sure, math.inf)
    return tokens


def _logits(
    logits_fn: LogitsFunction,
    unconditional: LogitsFunction | None,
    guidance: float,
    tokens: Tensor,
    mask_id: int,
) -> Tensor:
    logits = full_precision(logits_fn(tokens))
    if logits.shape[:-1] != tokens.shape or not 1 <= logits.shape[-1] <= mask_id:
        raise ValueError(
            f"logits must have shape {(*tokens.shape, 'codes')} with at most mask_id = {mask_id} codes, got {tuple(logits.shape)}"
        )
    if unconditional is not None and guidance != 1:
        without = full_precision(unconditional(tokens))
        if without.shape != logits.shape:
            raise ValueError(
                f"unconditional logits must have shape {tuple(logits.shape)}, got {tuple(without.shape)}"
            )
        logits = guided_logits(logits, without, guidance)
    if bool(logits[tokens >= 0].isnan().any()):
        raise ValueError("logits must be numbers, got NaN")
    return logits


def _draw(logits: Tensor, temperature: float, top_share: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    kept = logits.topk(math.ceil(top_share * logits.shape[-1]), -1)
    device = logits.device if generator is None else generator.device
    waiting = torch.empty(kept.values.shape, device=device).exponential_(generator=generator)
    # The largest of logit / T plus Gumbel noise, which is minus the logarithm of an exponential, is a draw by the softmax.
    noisy = kept.values / temperature - waiting.to(logits).log()
    return kept.indices.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
