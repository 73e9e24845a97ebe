"""Attention blocks for sets: the order of elements does not matter, and a mask says which of them are there.

The blocks of the Set Transformer (Lee et al. 2019, arXiv 1810.00825), known there as MAB, SAB, ISAB and PMA.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class MultiheadAttentionBlock(nn.Module):
    """Queries look at a set of keys, then pass a two-layer network; each part is added to its input and normalised (MAB).

        h = LayerNorm(q + attention(q, k, k)),    result = LayerNorm(h + W_2 gelu(W_1 h))

    A query that may look at nothing gets 0 from the attention, not NaN.

    Args:
        dim: size of an element.
        heads: number of attention heads; divides `dim`.
        mlp_ratio: width of the two-layer network in multiples of `dim`.
        dropout: probability in [0, 1) for what the two parts add.

    Returns:
        From `forward(queries, keys, allowed=None)`: one element for each query. `allowed` is True where a query (third dimension)
        may look at a key (fourth), for each sample and head; dimensions of size 1 stand for all.

    Raises:
        ValueError: for impossible sizes.

    Cost:
        O(batch * queries * keys * dim).

    Source:
        Lee et al. 2019, arXiv 1810.00825, equation 6.

    Examples:
        >>> block = MultiheadAttentionBlock(16, heads=4)
        >>> block(torch.rand(2, 3, 16), torch.rand(2, 7, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        width = int(dim * mlp_ratio)
        if width < 1:
            raise ValueError(f"mlp_ratio must give at least one hidden unit, got {mlp_ratio}")
        self.heads = heads
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "#batch queries dim"],
        keys: Float[Tensor, "batch keys dim"],
        allowed: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        asked = self.query(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        known, told = self.key_value(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        asked = asked.expand(len(keys), -1, -1, -1)
        if keys.shape[1] == 0:
            mixed = torch.zeros_like(asked)
        elif allowed is None:
            mixed = F.scaled_dot_product_attention(asked, known, told)
        else:
            something = allowed.any(-1, keepdim=True)
            mixed = F.scaled_dot_product_attention(asked, known, told, attn_mask=allowed | ~something)
            mixed = mixed.masked_fill(~something, 0.0)
        attended = self.output(mixed.transpose(1, 2).flatten(2))
        hidden = self.attention_norm(queries + self.dropout(attended))
        return self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))


class SetAttentionBlock(nn.Module):
    """Every element of a set looks at all of them (SAB).

    Args:
        dim, heads, mlp_ratio, dropout: as for `MultiheadAttentionBlock`.

    Returns:
        From `forward(elements, valid=None)`: elements of the same shape. `valid` is True for elements that are there; nothing that
        is not there is looked at, and what stands in its place in the result means nothing.

    Raises:
        ValueError: for impossible sizes.

    Cost:
        O(batch * elements^2 * dim).

    Source:
        Lee et al. 2019, arXiv 1810.00825, equation 8.

    Examples:
        >>> block = SetAttentionBlock(16, heads=4)
        >>> elements, order = torch.rand(2, 5, 16), torch.tensor([3, 0, 4, 1, 2])
        >>> torch.allclose(block(elements)[:, order], block(elements[:, order]), atol=1e-6)
        True
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = MultiheadAttentionBlock(dim, heads, mlp_ratio=mlp_ratio, dropout=dropout)

    def forward(
        self,
        elements: Float[Tensor, "batch elements dim"],
        valid: Bool[Tensor, "batch elements"] | None = None,
    ) -> Float[Tensor, "batch elements dim"]:
        return self.block(elements, elements, _for_all_queries(valid))


class InducedSetAttentionBlock(nn.Module):
    """Elements look at a few learned points that have looked at all elements: linear cost in the size of the set (ISAB).

        s = MAB(points, elements),    result = MAB(elements, s)

    Args:
        dim: size of an element.
        heads: number of attention heads; divides `dim`.
        inducing: number of learned points, >= 1.
        mlp_ratio, dropout: as for `MultiheadAttentionBlock`.

    Returns:
        From `forward(elements, valid=None)`: as for `SetAttentionBlock`.

    Raises:
        ValueError: for impossible sizes.

    Cost:
        O(batch * elements * inducing * dim).

    Source:
        Lee et al. 2019, arXiv 1810.00825, equations 9 and 10.

    Examples:
        >>> block = InducedSetAttentionBlock(16, heads=4, inducing=3)
        >>> block(torch.rand(2, 100, 16)).shape
        torch.Size([2, 100, 16])
    """

    def __init__(
        self, dim: int, heads: int, inducing: int, *, mlp_ratio: float = 2.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pool = MultiheadAttentionPooling(dim, heads, inducing, mlp_ratio=mlp_ratio, dropout=dropout)
        self.block = MultiheadAttentionBlock(dim, heads, mlp_ratio=mlp_ratio, dropout=dropout)

    def forward(
        self,
        elements: Float[Tensor, "batch elements dim"],
        valid: Bool[Tensor, "batch elements"] | None = None,
    ) -> Float[Tensor, "batch elements dim"]:
        return self.block(elements, self.pool(elements, valid))


class MultiheadAttentionPooling(nn.Module):
    """A set as a fixed number of vectors: learned seeds look at its elements (PMA).

        result = MAB(seeds, elements)

    Args:
        dim: size of an element.
        heads: number of attention heads; divides `dim`.
        seeds: vectors in the result, >= 1.
        mlp_ratio, dropout: as for `MultiheadAttentionBlock`.

    Returns:
        From `forward(elements, valid=None)`: (batch, seeds, dim). `valid` is True for elements that are there; the others do not
        change the result. A set without elements gives finite numbers that depend on the seeds alone.

    Raises:
        ValueError: for impossible sizes.

    Cost:
        O(batch * elements * seeds * dim).

    Source:
        Lee et al. 2019, arXiv 1810.00825, equation 11, without the extra layer in front of the elements.

    Examples:
        >>> pooling = MultiheadAttentionPooling(16, heads=4, seeds=2)
        >>> elements, valid = torch.rand(1, 5, 16), torch.tensor([[True, True, True, False, False]])
        >>> torch.allclose(pooling(elements, valid), pooling(elements[:, :3]), atol=1e-6)
        True
    """

    def __init__(
        self, dim: int, heads: int, seeds: int = 1, *, mlp_ratio: float = 2.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if seeds < 1:
            raise ValueError(f"the number of seeds or inducing points must be >= 1, got {seeds}")
        self.block = MultiheadAttentionBlock(dim, heads, mlp_ratio=mlp_ratio, dropout=dropout)
        self.seeds = nn.Parameter(torch.randn(seeds, dim))

    def forward(
        self,
        elements: Float[Tensor, "batch elements dim"],
        valid: Bool[Tensor, "batch elements"] | None = None,
    ) -> Float[Tensor, "batch seeds dim"]:
        return self.block(self.seeds.unsqueeze(0), elements, _for_all_queries(valid))


def _for_all_queries(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[:, None, None, :]
