"""Pairs of a query and a document to learn from, cut from two tables when they are asked for."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset


class QueryDocumentPairs(IndexedDataset):
    """Samples `(query, document)` that share two tables of features: a document that answers many queries is stored once.

    `inputs` are the pair of features; `targets`, and `extras["query"]` and `extras["document"]`, the row of each in its table, by which
    losses know a document of the batch that answers a query too. Reading `inputs` of the whole set makes all pairs at once; `take`
    those of a batch.

    Args:
        queries: features of each query.
        documents: features of each document.
        pairs: row of a query and row of a document.
        ids: of the pairs, distinct; 0, 1, 2 ... by default.

    Raises:
        IndexError: at `take`, if a row is out of range.

    Examples:
        >>> pairs = QueryDocumentPairs(torch.eye(2), 5 * torch.eye(3), torch.tensor([[0, 2], [1, 2]]))
        >>> batch = pairs.take(torch.tensor([1]))
        >>> batch.inputs, batch.extras["document"]
        ((tensor([[0., 1.]]), tensor([[0., 0., 5.]])), tensor([2]))
    """

    def __init__(
        self,
        queries: Float[Tensor, "queries query_features"],
        documents: Float[Tensor, "documents document_features"],
        pairs: Int[Tensor, "pairs 2"],
        ids: Int[Tensor, " pairs"] | None = None,
    ) -> None:
        rows = pairs.unbind(1)
        self._rows = IndexedDataset(rows, rows, ids, {"query": rows[0], "document": rows[1]})
        self._length, self.ids = len(self._rows), self._rows.ids
        self.targets, self.extras = self._rows.targets, self._rows.extras
        self.queries, self.documents = queries, documents

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Features of every pair, made anew at each reading."""
        return self.all().inputs

    def take(self, indices: Int[Tensor, " batch"]) -> Batch:
        """Pairs at many positions."""
        return self._with_features(self._rows.take(indices))

    def all(self) -> Batch:
        """Every pair in order, its features made anew."""
        return self._with_features(self._rows.all())

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        """Pair at a position: the two vectors, their rows, and the id of the pair."""
        rows, targets, number = self._rows[index]
        return (self.queries[rows[0]], self.documents[rows[1]]), targets, number

    def subset(self, indices: Int[Tensor, " samples"]) -> "QueryDocumentPairs":
        """Pairs at some positions, which keep their ids; the tables are shared."""
        return self._over(self._rows.take(indices), self.queries, self.documents)

    def to(self, device: torch.device | str | int) -> "QueryDocumentPairs":
        """Same pairs with the tables on a device."""
        return self._over(self._rows.all().to(device), self.queries.to(device), self.documents.to(device))

    def _with_features(self, rows: Batch) -> Batch:
        query, document = rows.inputs
        features = self.queries.index_select(0, query), self.documents.index_select(0, document)
        return Batch(features, rows.targets, rows.ids, rows.extras)

    @staticmethod
    def _over(rows: Batch, queries: Tensor, documents: Tensor) -> "QueryDocumentPairs":
        return QueryDocumentPairs(queries, documents, torch.stack(rows.inputs, 1), rows.ids)
