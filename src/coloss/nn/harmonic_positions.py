"""A penalty that grows with the distance from query to key, beside rotary positions, so that attention also works beyond the trained length.

A project definition after an idea of Fu Li 2024, arXiv 2410.18441 (the exact form there is not public):

    logit_h(m, n) = (R_m q_m)^T (R_n k_n) / sqrt(d) - s_h D(m - n)        for keys n <= m of head h = 1, 2, ...

with rotary turns R, slopes s_h = 1 / h of the harmonic series in place of ALiBi's 2^(-8 h / heads), and D either the distance itself or the
harmonic number 1 + 1/2 + ... + 1/distance, which grows like its logarithm. With s = 0 these are rotary positions; without turns, ALiBi.

`CausalLanguageModel(positions="rotary-harmonic")` has the first and `"rotary-harmonic-log"` the second; here are the pieces for any attention:
an additive mask for `scaled_dot_product_attention`, and a `score_mod` for `flex_attention`.

When it helps: texts longer than those trained on. A character model trained on 128 tokens has, at tokens 384 to 512, 2.41 nats with rotary
positions alone, 2.04 with harmonic slopes and 2.11 on harmonic numbers, and 2.08 within the trained length with all three (one seed,
`coloss bench generative`). When not: far tokens that must be looked up exactly;
heads with steep slopes see their neighbours alone.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Distance = Literal["linear", "harmonic"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def harmonic_slopes(heads: int) -> Float[Tensor, " heads"]:
    """Slopes 1, 1/2, 1/3, ...

    Examples:
        >>> harmonic_slopes(4)
        tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    return 1 / _numbers(heads)


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """ALiBi's slopes 2^(-8 h / heads), h = 1, 2, ... (Press et al. 2022, arXiv 2108.12409).

    Examples:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    return 2 ** (-8 * _numbers(heads) / heads)


def harmonic_numbers(
    distances: Int[Tensor, "*shape"] | Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """1 + 1/2 + ... + 1/distance; 0 for distance 0.

    Examples:
        >>> harmonic_numbers(torch.tensor([0, 1, 2, 3]))
        tensor([0.0000, 1.0000, 1.5000, 1.8333])
    """
    # The digamma function is the harmonic number less Euler's constant.
    exact = torch.special.digamma(distances.double() + 1) + 0.5772156649015329
    return exact.float().masked_fill(distances == 0, 0.0)


def rotary_alibi_bias(
    query_positions: Int[Tensor, "... queries"],
    key_positions: Int[Tensor, "... keys"],
    slopes: Float[Tensor, " heads"],
    *,
    distance: Distance = "linear",
    allowed: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "... heads queries keys"]:
    """What is added to the logits of attention: `-slope * D(query position - key position)`, and -inf for keys that come later.

    Args:
        query_positions: of the queries.
        key_positions: of the keys.
        slopes: of the heads, such as `harmonic_slopes`.
        distance: `"linear"`, or `"harmonic"` for harmonic numbers.
        allowed: which keys a query may attend to, in place of those that do not come later; broadcasts to the result. A key at a later position
            that it allows counts as distance 0.

    Returns:
        A mask for `scaled_dot_product_attention(attn_mask=...)` of queries and keys that rotary positions have turned.

    Raises:
        ValueError: for slopes below 0 or another distance.

    Cost: heads * queries * keys numbers; `rotary_alibi_score_mod` needs none of that.

    Examples:
        >>> places = torch.arange(3)
        >>> rotary_alibi_bias(places, places, torch.tensor([0.5]))[0]
        tensor([[ 0.0000,    -inf,    -inf],
                [-0.5000,  0.0000,    -inf],
                [-1.0000, -0.5000,  0.0000]])
    """
    _check(slopes, distance)
    gaps = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    if allowed is None:
        allowed = (gaps >= 0).unsqueeze(-3)
    gaps = gaps.clamp(min=0)
    cost = gaps.float() if distance == "linear" else harmonic_numbers(gaps)
    bias = -slopes[:, None, None] * cost.unsqueeze(-3) + 0.0  # no -0.0
    return bias.masked_fill(~allowed, -torch.inf)


def rotary_alibi_score_mod(
    slopes: Float[Tensor, " heads"], length: int, *, distance: Distance = "linear"
) -> ScoreMod:
    """The same for `torch.nn.attention.flex_attention`, without a mask in memory.

    Args:
        slopes: of the heads, on the device of the attention.
        length: greatest distance that counts; a longer one counts as this.
        distance: as for `rotary_alibi_bias`.

    Returns:
        `score_mod(score, batch, head, query, key)`; positions are the places of queries and keys.

    Raises:
        ValueError: for slopes below 0, a length below 1 or another distance.

    Examples:
        >>> change = rotary_alibi_score_mod(harmonic_slopes(2), length=8)
        >>> score, batch, head, query, key = torch.tensor(1.0), *map(torch.tensor, (0, 1, 5, 2))
        >>> change(score, batch, head, query, key)  # 1 - 3 / 2
        tensor(-0.5000)
    """
    _check(slopes, distance)
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    gaps = torch.arange(length + 1, device=slopes.device)
    costs = gaps.float() if distance == "linear" else harmonic_numbers(gaps)

    # No `def`: a type checker in tests would wrap that, and compilers of attention cannot trace it then.
    return lambda score, batch, head, query, key: torch.where(
        query >= key, score - slopes[head] * costs[(query - key).clamp(0, length)], -torch.inf
    )


def _numbers(heads: int) -> Tensor:
    if heads < 1:
        raise ValueError(f"heads must be >= 1, got {heads}")
    return torch.arange(1, heads + 1, dtype=torch.float32)


def _check(slopes: Tensor, distance: str) -> None:
    if not bool((slopes >= 0).all()):
        raise ValueError(f"slopes must be >= 0, got {slopes.tolist()}")
    if distance not in ("linear", "harmonic"):
        raise ValueError(f'distance must be "linear" or "harmonic", got {distance!r}')
