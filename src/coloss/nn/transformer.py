"""Pre-norm transformer blocks on top of `torch.nn.functional.scaled_dot_product_attention`."""

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values, each (batch, heads, tokens, dim / heads), to what each query gets, of the queries' shape."""


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself.

    Each head gives `softmax(Q K^T / sqrt(dim / heads)) V`; a linear layer mixes the heads.

    Args:
        dim: size of a token.
        heads: number of heads; divides `dim`.
        dropout: probability of dropping an attention weight in training.
        key_value_heads: heads of keys and values, each shared by `heads / key_value_heads` heads of queries; None: `heads`.

    Returns:
        From `forward`: tokens of the same shape. `attend` stands in for the softmax over all tokens (and for `allowed`, `causal` and
        `dropout`): sparse attention, a cache, rotary positions.

    Cost:
        O(batch * tokens^2 * dim) time; memory O(tokens) per head where torch has a fused kernel.

    Examples:
        >>> import torch
        >>> SelfAttention(16, 4)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self, dim: int, heads: int, dropout: float = 0.0, *, key_value_heads: int | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.key_value_heads = heads if key_value_heads is None else key_value_heads
        if self.key_value_heads < 1 or heads % self.key_value_heads:
            raise ValueError(f"key_value_heads must divide heads {heads}, got {key_value_heads}")
        self.query_key_value = nn.Linear(dim, dim + 2 * self.key_value_heads * (dim // heads))
        self.output = nn.Linear(dim, dim)

    def project(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens head_dim"],
        Float[Tensor, "batch key_value_heads tokens head_dim"],
        Float[Tensor, "batch key_value_heads tokens head_dim"],
    ]:
        """Queries, keys and values of the tokens."""
        shared = self.key_value_heads
        projected = self.query_key_value(tokens).unflatten(2, (self.heads + 2 * shared, -1)).transpose(1, 2)
        queries, keys, values = projected.split([self.heads, shared, shared], dim=1)
        return queries, keys, values

    def queries(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Queries alone, without the cost of keys and values."""
        return self._projected(tokens, slice(self.dim)).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[
        Float[Tensor, "batch key_value_heads tokens head_dim"],
        Float[Tensor, "batch key_value_heads tokens head_dim"],
    ]:
        """Keys and values alone, without the cost of queries."""
        projected = self._projected(tokens, slice(self.dim, None))
        keys, values = projected.unflatten(2, (2 * self.key_value_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def _projected(self, tokens: Tensor, rows: slice) -> Tensor:
        layer = self.query_key_value
        if type(layer) is not nn.Linear:  # something that took its place, whose weight may be of another form
            return layer(tokens)[..., rows]
        return F.linear(tokens, layer.weight[rows], layer.bias[rows])

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        allowed: Bool[Tensor, "#batch 1 #tokens tokens"] | None = None,
        *,
        causal: bool = False,
        attend: Attend | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        queries, keys, values = self.project(tokens)
        if attend is not None:
            mixed = attend(queries, keys, values)
        else:
            mixed = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=allowed,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                enable_gqa=self.key_value_heads != self.heads,
            )
        return self.output(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network, each on normalised tokens and each added to its input.

    `x <- x + attention(norm(x))`, then `x <- x + W_2 gelu(W_1 norm(x))`.

    Args:
        dim: size of a token.
        heads: number of attention heads; divides `dim`.
        mlp_ratio: width of the two-layer network in multiples of `dim`.
        dropout: probability for attention weights, hidden activations and both added branches.
        key_value_heads: see `SelfAttention`.

    Returns:
        From `forward(tokens, allowed=None, causal=False, attend=None)`: tokens of the same shape. `attend(queries, keys, values)`, each
        (batch, heads, tokens, dim / heads), stands in for the attention over all tokens.

    Examples:
        >>> import torch
        >>> from coloss.nn import TransformerBlock
        >>> TransformerBlock(16, 4)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        key_value_heads: int | None = None,
    ) -> None:
        super().__init__()
        width = int(dim * mlp_ratio)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout, key_value_heads=key_value_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim), nn.Dropout(dropout)
        )
        self.attention_dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        allowed: Bool[Tensor, "#batch 1 #tokens tokens"] | None = None,
        *,
        causal: bool = False,
        attend: Attend | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        attended = self.attention(self.attention_norm(tokens), allowed, causal=causal, attend=attend)
        tokens = tokens + self.attention_dropout(attended)
        return tokens + self.mlp(self.mlp_norm(tokens))


class Transformer(nn.Module):
    """A stack of pre-norm blocks and a final layer norm.

    Linear weights begin as truncated normals of variance 1 / inputs and biases at 0; the last layer of each
    of the `2 depth` added branches is divided by `sqrt(2 depth)`, so that their sum does not grow with depth.
    (The usual fixed deviation of 0.02 suits widths near 1000 and learns much more slowly at 32.)

    Args:
        dim: size of a token.
        depth: number of blocks; with 0, only the final norm.
        heads: number of attention heads; divides `dim`.
        mlp_ratio: width of each block's two-layer network in multiples of `dim`.
        dropout: probability in [0, 1) inside the blocks.
        key_value_heads: heads of keys and values, which divides `heads`; None: `heads`.

    Attributes:
        blocks: `nn.ModuleList` of `TransformerBlock`.
        norm: the final `nn.LayerNorm`.

    Returns:
        From `forward(tokens, allowed=None, causal=False)`: tokens of the same shape. `allowed` is True where
        a query (third dimension) may attend to a key (fourth); `causal` restricts each token to itself and
        those before it.

    Raises:
        ValueError: for impossible sizes, or `allowed` together with `causal`.

    Source: Xiong et al. 2020, arXiv 2002.04745 (pre-norm); Radford et al. 2019, GPT-2 report, section 2.3
        (scaled initial branches).

    Examples:
        >>> import torch
        >>> from coloss.nn import Transformer
        >>> Transformer(16, depth=2, heads=4)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        key_value_heads: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth must be >= 0, got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim, heads, mlp_ratio=mlp_ratio, dropout=dropout, key_value_heads=key_value_heads
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("attention.output", "mlp.3"))
                branches = 2 * depth if ends_branch else 1
                nn.init.trunc_normal_(module.weight, std=(module.in_features * branches) ** -0.5)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        allowed: Bool[Tensor, "#batch 1 #tokens tokens"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        if causal and allowed is not None:
            raise ValueError("allowed must be None when causal is True, got a mask")
        for block in self.blocks:
            tokens = block(tokens, allowed, causal=causal)
        return self.norm(tokens)
