"""Two towers that keep their tokens, and a decoder both share that asks each modality the same learned questions."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.ops import full_precision


class Tokens(NamedTuple):
    """Tokens of a batch.

    Attributes:
        values: (batch, tokens, dim).
        padding: (batch, tokens), True where a token only fills up; None where none does.
    """

    values: Tensor
    padding: Tensor | None


class GranularityDecoder(nn.Module):
    """Learned queries that read a sample's tokens: fine details in as many vectors for every sample and modality.

    Each block is self-attention of the queries, cross-attention to the tokens and a two-layer network, each on normalised input and added
    to it. One decoder serves both modalities, with the same weights and queries, so that result k of one can be compared with result k
    of the other.

    Args:
        dim: of a token and of a result.
        num_queries: results for each sample, >= 1.
        depth: blocks, >= 1.
        heads: of attention; divides `dim`.
        dropout: probability in [0, 1).

    Returns:
        From `forward(tokens, key_padding_mask=None)`: (batch, num_queries, dim). A sample of padding alone is read as if it had none.

    Raises:
        InputError: for sizes that do not fit.

    Cost:
        O(batch * depth * num_queries * (num_queries + tokens) * dim).

    Source:
        Zuo et al. 2024 (CFAM), arXiv 2312.03441.

    Examples:
        >>> decoder = GranularityDecoder(8, num_queries=4, depth=1, heads=2)
        >>> decoder(torch.randn(3, 10, 8)).shape, decoder(torch.randn(3, 6, 8)).shape
        (torch.Size([3, 4, 8]), torch.Size([3, 4, 8]))
    """

    def __init__(
        self, dim: int, num_queries: int = 16, depth: int = 2, heads: int = 4, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_queries", num_queries), ("depth", depth), ("heads", heads)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if dim % heads:
            raise InputError(f"heads must divide dim {dim}, got {heads}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_queries, dim), std=dim**-0.5))
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                dim, heads, 4 * dim, dropout, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        key_padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask & ~key_padding_mask.all(1, keepdim=True)
        found = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
        for block in self.blocks:
            found = block(found, tokens, memory_key_padding_mask=key_padding_mask)
        return self.norm(found)


class TokenTower(nn.Module):
    """An encoder whose tokens are brought to the joint space, and its global feature there.

    Args:
        encoder: gives tokens (batch, tokens, width), such as `coloss.nn.TokenEncoder` with `pool="none"`; or feature maps
            (batch, width, height, width), whose places are taken as tokens.
        dim: of the joint space.
        width: of the encoder's tokens; default: its `out_features`.
        padding: `inputs -> (batch, tokens)` bool or None, True for tokens that only fill up; default: that of the encoder's tokenizer, if
            it has one.
        pool: the global feature is the "mean" of the tokens, or the "first" of them (a class token).

    Returns:
        From `forward(inputs)`: `Tokens`. `pooled(tokens)` gives the global feature, a unit vector.

    Raises:
        InputError: for an encoder without `out_features` where `width` is not given, or an unknown `pool`.

    Examples:
        >>> from coloss.nn import TokenEncoder, Words
        >>> tower = TokenTower(TokenEncoder(Words(50, 8, max_length=5), 8, 1, 2, pool="none"), dim=6)
        >>> tokens = tower(torch.tensor([[4, 9, 0, 0, 0]]))
        >>> tokens.values.shape, tokens.padding.tolist(), tower.pooled(tokens).shape
        (torch.Size([1, 5, 6]), [[False, False, True, True, True]], torch.Size([1, 6]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        *,
        width: int | None = None,
        padding: Callable[[Any], Tensor | None] | None = None,
        pool: Literal["mean", "first"] = "mean",
    ) -> None:
        super().__init__()
        width = width if width is not None else getattr(encoder, "out_features", None)
        if not isinstance(width, int):
            raise InputError(f"{type(encoder).__name__} does not declare out_features: give width")
        if pool not in ("mean", "first"):
            raise InputError(f'pool must be "mean" or "first", got {pool!r}')
        self.encoder, self.pool = encoder, pool
        self.projection = nn.Linear(width, dim)
        self.padding = padding
        self.out_features = dim

    def forward(self, inputs: Any) -> Tokens:
        values = self.encoder(inputs)
        if values.ndim == 4:
            values = values.flatten(2).transpose(1, 2)
        if values.ndim != 3:
            raise InputError(
                f"an encoder must give tokens (batch, tokens, width), got shape {tuple(values.shape)}"
            )
        padding = self.padding
        if padding is None:
            padding = getattr(getattr(self.encoder, "tokenizer", None), "padding", None)
        return Tokens(self.projection(values), None if padding is None else padding(inputs))

    def pooled(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        """Unit global features; of a sample of padding alone, that of all its tokens."""
        values = full_precision(tokens.values)
        if self.pool == "first":
            return F.normalize(values[:, 0], dim=1)
        if tokens.padding is None:
            return F.normalize(values.mean(1), dim=1)
        counted = ~tokens.padding | tokens.padding.all(1, keepdim=True)
        return F.normalize((values * counted.unsqueeze(2)).sum(1), dim=1)


class TokenDualEncoder(nn.Module):
    """Two towers in one space, compared by their global features and, with a decoder, by what it reads from their tokens.

    An embedding is the global unit vector, or with a decoder that beside the unit vector of granularity (the mean of the decoder's
    normalised results), divided by sqrt 2: its inner products are means of both cosines. The towers stay independent, so either side can
    be embedded beforehand.

    Args:
        query_tower, document_tower: `TokenTower`s of one `dim`.
        decoder: None compares global features alone.

    Attributes:
        dim: of each part of an embedding.

    Returns:
        From `forward((queries, documents))`: a pair of embeddings; `encode_query` and `encode_document` give one side.

    Raises:
        InputError: for towers of different dims, or a batch that is no pair.

    Examples:
        >>> from coloss.nn import ImagePatches, TokenEncoder, Words
        >>> texts = TokenTower(TokenEncoder(Words(50, 8, max_length=5), 8, 1, 2, pool="none"), dim=6)
        >>> images = TokenTower(TokenEncoder(ImagePatches(8, 4, 3, 8), 8, 1, 2, pool="none"), dim=6)
        >>> model = TokenDualEncoder(texts, images, GranularityDecoder(6, 4, 1, 2))
        >>> queries, documents = model((torch.tensor([[4, 9, 0, 0, 0]]), torch.rand(1, 3, 8, 8)))
        >>> queries.shape, [part.shape for part in model.parts(documents)]
        (torch.Size([1, 12]), [torch.Size([1, 6]), torch.Size([1, 6])])
    """

    def __init__(
        self, query_tower: TokenTower, document_tower: TokenTower, decoder: GranularityDecoder | None = None
    ) -> None:
        super().__init__()
        if query_tower.out_features != document_tower.out_features:
            raise InputError(
                f"both towers must have one dim, got {query_tower.out_features} and {document_tower.out_features}"
            )
        self.query_tower, self.document_tower, self.decoder = query_tower, document_tower, decoder
        self.dim = query_tower.out_features

    def encode_query(self, queries: Any) -> Float[Tensor, "batch embedding"]:
        """Embeddings of a batch of queries, unit vectors."""
        return self._embed(self.query_tower, queries)

    def encode_document(self, documents: Any) -> Float[Tensor, "batch embedding"]:
        """Embeddings of a batch of documents, unit vectors."""
        return self._embed(self.document_tower, documents)

    def parts(self, embeddings: Float[Tensor, "batch embedding"]) -> list[Tensor]:
        """The unit vectors that embeddings are made of: the global ones and, with a decoder, those of granularity."""
        count = embeddings.shape[1] // self.dim
        return [count**0.5 * part for part in embeddings.split(self.dim, dim=1)]

    def forward(
        self, pair: Sequence[Any]
    ) -> tuple[Float[Tensor, "queries embedding"], Float[Tensor, "documents embedding"]]:
        if isinstance(pair, Tensor) or len(pair) != 2:
            raise InputError(f"the batch must be a pair (queries, documents), got {type(pair).__name__}")
        return self.encode_query(pair[0]), self.encode_document(pair[1])

    def _embed(self, tower: TokenTower, inputs: Any) -> Tensor:
        tokens = tower(inputs)
        parts = [tower.pooled(tokens)]
        if self.decoder is not None:
            read = full_precision(self.decoder(tokens.values, tokens.padding))
            parts.append(F.normalize(F.normalize(read, dim=2).mean(1), dim=1))
        return torch.cat(parts, dim=1) / len(parts) ** 0.5
