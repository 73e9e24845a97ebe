"""Retrievers that score documents for queries: by one inner product, or by late interaction of tokens (MaxSim).

Both are called as `retriever(queries, documents)` with the K candidates of each query and give scores (batch, K); and both search a whole
collection, exactly.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.metrics import nearest_neighbours
from coloss.ops import full_precision, top_items
from coloss.retrieval.token_dual_encoder import TokenTower

Index = tuple[Tensor, ...]
"""A collection of documents as a retriever encoded it, documents in the first dimension of each tensor."""

Exclude = tuple[Tensor, Tensor]
"""An id of each query and an id of each document: pairs with equal ids are not found."""

ENCODED_AT_ONCE = 512
"""Documents, or queries of a search, that pass through an encoder together."""


def late_interaction_scores(
    queries: Float[Tensor, "batch query_tokens dim"],
    documents: Float[Tensor, "#batch candidates document_tokens dim"],
    query_padding: Bool[Tensor, "batch query_tokens"] | None = None,
    document_padding: Bool[Tensor, "#batch candidates document_tokens"] | None = None,
) -> Float[Tensor, "batch candidates"]:
    r"""Sum over the tokens of a query of the inner product with its best token of a document (MaxSim of ColBERT).

    $s_j = \sum_t \max_u \langle q_t, d_{j,u} \rangle$

    Args:
        queries: $q$, tokens of each query.
        documents: $d$, tokens of the candidates of each query. A first dimension of 1 stands for the same candidates for all.
        query_padding: True for tokens that only fill up: they add nothing.
        document_padding: likewise: they are never the best.

    Returns:
        At least float32; 0 for a query or a document without tokens.

    Raises:
        ValueError: if shapes disagree.

    Cost:
        O(batch * candidates * query_tokens * document_tokens * dim) time, the same without dim in memory.

    Source:
        Khattab and Zaharia 2020 (ColBERT), arXiv 2004.12832.

    Examples:
        >>> query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> documents = torch.tensor([[[[3.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [-9.0, -9.0]]]])
        >>> late_interaction_scores(query, documents)
        tensor([[5., 2.]])
    """
    if len(documents) not in (1, len(queries)) or documents.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"documents must be (batch, candidates, tokens, dim) for queries {tuple(queries.shape)}, got {tuple(documents.shape)}"
        )
    products = torch.einsum(
        "btd,bkud->bktu", full_precision(queries), full_precision(documents).expand(len(queries), -1, -1, -1)
    )
    if document_padding is not None:
        if document_padding.shape != documents.shape[:3]:
            raise ValueError(
                f"document_padding must have shape {tuple(documents.shape[:3])}, got {tuple(document_padding.shape)}"
            )
        products = products.masked_fill(document_padding[:, :, None, :], -math.inf)
    if not products.shape[3]:
        return products.sum((2, 3))
    best = products.amax(3)
    # A document of padding alone has no best token.
    best = best.masked_fill(best == -math.inf, 0.0)
    if query_padding is not None:
        if query_padding.shape != queries.shape[:2]:
            raise ValueError(
                f"query_padding must have shape {tuple(queries.shape[:2])}, got {tuple(query_padding.shape)}"
            )
        best = best.masked_fill(query_padding[:, None, :], 0.0)
    return best.sum(2)


class DenseRetriever(nn.Module):
    """Scores documents by the inner product of one vector for the query and one for the document.

    Args:
        encoder: has `encode_query` and `encode_document`, each (batch, ...) -> (batch, dim), as `coloss.nn.DualEncoder` and
            `coloss.retrieval.TokenDualEncoder` do.

    Returns:
        From `forward(queries, documents)`, documents (batch, candidates, ...): scores (batch, candidates), at least float32.

    Raises:
        TypeError: for an encoder without those methods.

    Examples:
        >>> from coloss.nn import DualEncoder
        >>> tower = nn.Linear(5, 5)
        >>> retriever = DenseRetriever(DualEncoder(tower, tower))
        >>> documents = torch.randn(100, 5)
        >>> found = retriever.search(documents[:2], retriever.encode_documents(documents), k=3)
        >>> found[:, 0]  # each finds itself
        tensor([0, 1])
        >>> retriever(documents[:2], documents[found]).shape
        torch.Size([2, 3])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for name in ("encode_query", "encode_document"):
            if not callable(getattr(encoder, name, None)):
                raise TypeError(f"encoder must have a method {name}, got {type(encoder).__name__}")
        self.encoder = encoder

    def forward(
        self, queries: Tensor, documents: Float[Tensor, "batch candidates *shape"] | Tensor
    ) -> Float[Tensor, "batch candidates"]:
        encoder: Any = self.encoder
        batch, candidates = documents.shape[:2]
        query = full_precision(encoder.encode_query(queries))
        found = full_precision(encoder.encode_document(documents.flatten(0, 1)))
        return torch.einsum("bd,bkd->bk", query, found.unflatten(0, (batch, candidates)))

    @torch.no_grad()
    def encode_documents(self, documents: Tensor) -> Index:
        """Vectors (documents, dim) of a collection, to be searched."""
        encoder: Any = self.encoder
        return (torch.cat([encoder.encode_document(part) for part in documents.split(ENCODED_AT_ONCE)]),)

    @torch.no_grad()
    def search(
        self, queries: Tensor, index: Index, k: int, exclude: Exclude | None = None
    ) -> Int[Tensor, "batch k"]:
        """Numbers of the k best documents of each query by exact inner product, best first; -1 where there are fewer.

        Cost:
            Queries pass through the encoder 512 at a time, and are compared in tiles, see `coloss.metrics.nearest_neighbours`.
        """
        encoder: Any = self.encoder
        return nearest_neighbours(
            torch.cat([encoder.encode_query(part) for part in queries.split(ENCODED_AT_ONCE)]),
            index[0],
            k,
            metric="inner",
            exclude=False if exclude is None else exclude,
        ).indices


class LateInteractionRetriever(nn.Module):
    """Scores documents token by token, see `late_interaction_scores`.

    Args:
        query_tower, document_tower: give `coloss.retrieval.Tokens` in one space; may be the same.

    Returns:
        From `forward(queries, documents)`, documents (batch, candidates, ...): scores (batch, candidates), at least float32.

    Source:
        Khattab and Zaharia 2020 (ColBERT), arXiv 2004.12832.

    Examples:
        >>> from coloss.nn import TokenEncoder, Words
        >>> tower = TokenTower(TokenEncoder(Words(50, 8, max_length=5), 8, 1, 2, pool="none"), dim=6)
        >>> retriever = LateInteractionRetriever(tower, tower)
        >>> retriever(
        ...     torch.tensor([[4, 9, 0, 0, 0]]), torch.tensor([[[4, 9, 7, 0, 0], [5, 0, 0, 0, 0]]])
        ... ).shape
        torch.Size([1, 2])
    """

    def __init__(self, query_tower: TokenTower, document_tower: TokenTower) -> None:
        super().__init__()
        self.query_tower, self.document_tower = query_tower, document_tower

    def forward(
        self, queries: Tensor, documents: Float[Tensor, "batch candidates *shape"] | Tensor
    ) -> Float[Tensor, "batch candidates"]:
        batch, candidates = documents.shape[:2]
        query = self.query_tower(queries)
        values, padding = self.document_tower(documents.flatten(0, 1))
        return late_interaction_scores(
            query.values,
            values.unflatten(0, (batch, candidates)),
            query.padding,
            None if padding is None else padding.unflatten(0, (batch, candidates)),
        )

    @torch.no_grad()
    def encode_documents(self, documents: Tensor) -> Index:
        """Tokens (documents, tokens, dim) of a collection, and which of them only fill up, to be searched."""
        parts = [self.document_tower(part) for part in documents.split(ENCODED_AT_ONCE)]
        values = torch.cat([part.values for part in parts])
        if parts[0].padding is None:
            return (values, torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device))
        return (values, torch.cat([part.padding for part in parts]))

    @torch.no_grad()
    def search(
        self, queries: Tensor, index: Index, k: int, exclude: Exclude | None = None
    ) -> Int[Tensor, "batch k"]:
        """Numbers of the k best documents of each query among all, best first; no document is left out beforehand.

        Raises:
            ValueError: if a query has fewer than k documents to find.

        Cost:
            512 queries at a time with 512 documents at a time: at most 512^2 * query_tokens * document_tokens numbers of memory beside
            512 * documents scores, however many queries there are.
        """
        found = []
        for start in range(0, max(len(queries), 1), ENCODED_AT_ONCE):
            rows = slice(start, start + ENCODED_AT_ONCE)
            query = self.query_tower(queries[rows])
            scores = [
                late_interaction_scores(query.values, values[None], query.padding, padding[None])
                for values, padding in zip(*(tensor.split(ENCODED_AT_ONCE) for tensor in index), strict=True)
            ]
            ignore = None if exclude is None else exclude[0][rows, None] == exclude[1]
            found.append(top_items(torch.cat(scores, 1), k, ignore))
        return torch.cat(found)
