"""Heads that classify every token of an image or a text: a linear one, and learned queries that draw a mask for each class."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class TokenLogits(NamedTuple):
    """What a per-token head gives; `coloss.ops.token_probabilities` turns it into probabilities.

    Attributes:
        logits: of each class at each token; mask logits of a query head.
        presence: of a query head: logits of "this class is in the sample" and "it is not"; None of a linear head.
    """

    logits: Float[Tensor, "batch classes tokens"]
    presence: Float[Tensor, "batch classes 2"] | None = None


class LinearTokenHead(nn.Module):
    """A layer norm and a linear layer, for each token by itself.

    Args:
        dim: size of a token.
        num_classes: number of classes, >= 1.

    Returns:
        From `forward(tokens, key_padding_mask=None)`: `TokenLogits` without presence. Padding gets logits that mean nothing.

    Raises:
        ValueError: for `num_classes` < 1.

    Examples:
        >>> LinearTokenHead(8, 3)(torch.rand(2, 5, 8)).logits.shape
        torch.Size([2, 3, 5])
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)

    def multiply_adds(self, tokens: int) -> int:
        """Of one sample with so many tokens."""
        return tokens * self.linear.in_features * self.linear.out_features

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        key_padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> TokenLogits:
        return TokenLogits(self.linear(self.norm(tokens)).transpose(1, 2))


class SegmentationQueryHead(nn.Module):
    """One learned query for each class reads the tokens; how similar it is to a token says whether the class is there.

    Tokens `m = norm(W x)`; queries pass decoder layers of self-attention, attention to m, and a two-layer network, with a norm after each.
    Mask logits are the last layer's attention before its softmax, `q_c . k_n / sqrt(dim / heads)`, averaged over heads; `presence` is a
    linear layer on each query that comes out.

    Args:
        dim: size of a token.
        num_classes: number of classes and queries, >= 1.
        width: size of a query; default: `dim`.
        layers: decoder layers, >= 1.
        heads: attention heads; divides `width`.
        mlp_ratio: width of the two-layer networks in multiples of `width`.

    Returns:
        From `forward(tokens, key_padding_mask=None)`: `TokenLogits` with presence. Queries do not see tokens of padding (True), whose
        logits mean nothing; a sample of padding alone gives finite values.

    Raises:
        ValueError: for sizes out of range.

    Source:
        Zhang et al. 2022, arXiv 2210.05844 (attention to mask).

    Examples:
        >>> found = SegmentationQueryHead(16, 3, layers=1, heads=2)(torch.rand(2, 5, 16))
        >>> found.logits.shape, found.presence.shape
        (torch.Size([2, 3, 5]), torch.Size([2, 3, 2]))
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        width: int | None = None,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        for name, value in (("num_classes", num_classes), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width {width}, got {heads}")
        self.reads = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.02))
        self.layers = nn.ModuleList(_QueryLayer(width, heads, mlp_ratio) for _ in range(layers))
        self.presence = nn.Linear(width, 2)

    def multiply_adds(self, tokens: int) -> int:
        """Of one sample with so many tokens; matrix products alone."""
        queries, width = self.queries.shape
        dim = self.reads.in_features
        once = tokens * dim * width + queries * width * 2
        hidden = self.layers[0].mlp[0].out_features  # type: ignore[union-attr, index]
        of_queries = queries * (4 * width**2 + 2 * queries * width + 2 * width**2 + 2 * width * hidden)
        return once + len(self.layers) * (of_queries + tokens * (2 * width**2 + 2 * queries * width))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        key_padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> TokenLogits:
        memory = self.norm(self.reads(tokens))
        queries = self.queries.repeat(len(tokens), 1, 1)
        visible = None
        if key_padding_mask is not None:
            # A softmax over nothing would be NaN: a sample of padding alone sees all of it.
            visible = (~key_padding_mask | key_padding_mask.all(1, keepdim=True))[:, None, None]
        masks = queries
        for layer in self.layers:
            queries, masks = layer(queries, memory, visible)
        return TokenLogits(masks, self.presence(queries))


class _QueryLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, queries: Tensor, memory: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        attended, _ = self.self_attention(queries, queries, queries, need_weights=False)
        queries = self.norms[0](queries + attended)
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(memory), self.value(memory))
        )
        similarity = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = similarity if visible is None else similarity.masked_fill(~visible, -torch.inf)
        mixed = scores.softmax(-1) @ v
        queries = self.norms[1](queries + self.output(mixed.transpose(1, 2).flatten(2)))
        return self.norms[2](queries + self.mlp(queries)), similarity.mean(1)
