"""Turns the tokens of a sample into one vector, or into logits, by learned queries that attend to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class AttentivePool(nn.Module):
    """Cross-attention of a few learned queries to all tokens, and one linear layer; no two-layer network.

    With queries q, keys K = W_k x and values V = W_v x of the tokens x, each head gives softmax(q K^T / sqrt(dim / heads)) V, and a
    linear layer maps the joined heads to `out` numbers. As the head of a probe it reads frozen tokens; it finds what a mean over tokens
    dilutes.

    Args:
        dim: size of a token.
        heads: number of attention heads; divides `dim`.
        n_queries: learned queries, >= 1.
        out: size of a result, such as the number of classes; None for `dim`.

    Returns:
        From `forward(tokens, padding=None)`: (batch, out) with one query, else (batch, queries, out). The order of tokens does not
        matter. A sample of padding alone is pooled as if nothing were padding.

    Raises:
        ValueError: for sizes that do not fit one another.

    Cost:
        O(batch * tokens * dim^2): linear in tokens.

    Source:
        Lee et al., 2019 (Set Transformer), arXiv 1810.00825, section 3.2; as a probe: Weimann and Conrad, 2024, arXiv 2410.13867.

    Examples:
        >>> import torch
        >>> pool = AttentivePool(16, heads=4, out=3)
        >>> pool(torch.rand(5, 9, 16)).shape, AttentivePool(16, 2, n_queries=2)(torch.rand(5, 9, 16)).shape
        (torch.Size([5, 3]), torch.Size([5, 2, 16]))
    """

    def __init__(self, dim: int, heads: int, n_queries: int = 1, out: int | None = None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        if n_queries < 1:
            raise ValueError(f"n_queries must be >= 1, got {n_queries}")
        if out is not None and out < 1:
            raise ValueError(f"out must be >= 1, got {out}")
        self.heads = heads
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(n_queries, dim), std=0.02))
        self.keys_and_values = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim if out is None else out)
        self.out_features = self.output.out_features

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], padding: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch *queries out"]:
        keys, values = self.keys_and_values(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries = self.queries.to(keys).unflatten(1, (self.heads, -1)).transpose(0, 1)
        allowed = None
        if padding is not None:
            allowed = (~padding | padding.all(1, keepdim=True))[:, None, None, :]
        pooled = F.scaled_dot_product_attention(
            queries.expand(len(tokens), -1, -1, -1), keys, values, attn_mask=allowed
        )
        found = self.output(pooled.transpose(1, 2).flatten(2))
        return found[:, 0] if len(self.queries) == 1 else found
