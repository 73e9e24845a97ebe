"""A retriever and a reader as one network, which looks documents up in its collection and answers with them."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.nn import MLP
from coloss.ops import full_precision
from coloss.retrieval.document_scorers import Exclude, Index
from coloss.retrieval.joint_retrieval_step import each_alone
from coloss.retrieval.marginal import marginal_class_log_probs
from coloss.retrieval.reader_ranked import best_documents

Reading = Literal["together", "apart"]


class MeanReader(nn.Module):
    """A small reader: a perceptron on the query and the mean of the documents it is given.

    Args:
        query_features: of a query.
        document_features: of a document, label included where documents are labelled examples.
        num_outputs: classes.
        hidden: width of each hidden layer.
        dropout: probability in [0, 1).

    Returns:
        From `forward(queries, documents)`: logits (batch, num_outputs). The order of the documents does not matter.

    Examples:
        >>> reader = MeanReader(4, 6, 3)
        >>> reader(torch.randn(2, 4), torch.randn(2, 5, 6)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        query_features: int,
        document_features: int,
        num_outputs: int,
        *,
        hidden: tuple[int, ...] = (128,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = MLP(
            query_features + document_features, hidden, num_outputs, norm="layer", dropout=dropout
        )

    def forward(
        self,
        queries: Float[Tensor, "batch features"],
        documents: Float[Tensor, "batch documents other_features"],
    ) -> Float[Tensor, "batch outputs"]:
        return self.network(torch.cat([queries, documents.mean(1)], dim=1))


class ReaderLoss(nn.Module):
    """A reader with its loss, as `coloss.retrieval.JointRetrievalStep` wants it.

    Args:
        reader: `(queries, documents) -> outputs`.
        loss: `(outputs, targets) -> (rows,)`, without a mean over rows; default: cross-entropy.

    Examples:
        >>> loss = ReaderLoss(MeanReader(4, 6, 3))
        >>> loss(torch.randn(2, 4), torch.randn(2, 5, 6), torch.tensor([0, 2])).shape
        torch.Size([2])
    """

    def __init__(self, reader: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        super().__init__()
        self.reader, self.loss = reader, loss if loss is not None else row_cross_entropy

    def forward(self, queries: Any, documents: Any, targets: Any) -> Tensor:
        return self.loss(self.reader(queries, documents), targets)


def row_cross_entropy(outputs: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"]) -> Tensor:
    """Cross-entropy of each row.

    Examples:
        >>> row_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(outputs, targets, reduction="none")


class RetrievalReader(nn.Module):
    """A reader with a collection of documents and a retriever that finds some for each query.

    Called with queries, it searches the whole collection, exactly; called with `(queries, candidates)`, it chooses among those. Both times
    the `n_used` best by the retriever's scores are read: `"together"`, the best one last, or `"apart"`, each alone, the class probabilities
    averaged under the softmax of the scores (`marginal_class_log_probs`). In the first the answer gives the retriever no gradient, as a
    choice has none; in the second it does.

    The collection is data: it moves with the module, as an index that is kept does, and is not in its state dict. Neither are `reading` and
    `temperature`: build a model that is loaded with those that it had.

    Args:
        retriever: `coloss.retrieval.DenseRetriever`, `LateInteractionRetriever`, or a module with the same three methods.
        reader: `(queries, documents (batch, read together, ...)) -> outputs`; (batch, classes) logits where documents are read apart.
        documents: tensor (documents, ...) as the retriever encodes them.
        contents: what the reader reads of them, documents in the first dimension; None: the same.
        n_candidates: found for each query by a search, >= n_used; capped at the size of the collection.
        n_used: documents to read, >= 1.
        reading: see above.
        temperature: tau > 0 of the softmax over documents that are read apart.

    Returns:
        From `forward(queries)` or `forward((queries, candidates))`, candidates int64 (batch, K) document numbers: what the reader returns;
        log-probabilities of classes for documents read apart.

    Raises:
        InputError: for values out of range, contents that do not match, or fewer documents or candidates than `n_used`.

    Cost:
        A search encodes the collection anew unless `keep_index` was called; documents read apart cost n_used passes of the reader.

    Source:
        Lewis et al. 2020 (RAG), arXiv 2005.11401; Wang et al. 2024 (JMLR), arXiv 2402.17887.

    Examples:
        >>> from coloss.nn import DualEncoder
        >>> from coloss.retrieval import DenseRetriever
        >>> tower, facts = nn.Linear(8, 4), torch.randn(50, 8)
        >>> retriever = DenseRetriever(DualEncoder(tower, tower))
        >>> model = RetrievalReader(retriever, MeanReader(8, 8, 3), facts, n_candidates=10, n_used=2)
        >>> queries = torch.randn(4, 8)
        >>> logits = model(queries)
        >>> candidates = model.search(queries)
        >>> candidates.shape, torch.equal(model((queries, candidates)), logits)
        (torch.Size([4, 10]), True)
    """

    def __init__(
        self,
        retriever: nn.Module,
        reader: nn.Module,
        documents: Tensor,
        contents: Tensor | None = None,
        *,
        n_candidates: int = 20,
        n_used: int = 5,
        reading: Reading = "together",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if n_used < 1:
            raise InputError(f"n_used must be >= 1, got {n_used}")
        if len(documents) < n_used:
            raise InputError(f"n_used must be at most the number of documents {len(documents)}, got {n_used}")
        if n_candidates < n_used:
            raise InputError(f"n_candidates must be >= n_used {n_used}, got {n_candidates}")
        if reading not in ("together", "apart"):
            raise InputError(f'reading must be "together" or "apart", got {reading!r}')
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, got {temperature}")
        if contents is not None and len(contents) != len(documents):
            raise InputError(f"contents must hold {len(documents)} documents, got {len(contents)}")
        self.retriever, self.reader = retriever, reader
        self.n_candidates, self.n_used = n_candidates, n_used
        self.reading, self.temperature = reading, temperature
        self.documents: Tensor
        self.contents: Tensor | None
        self.register_buffer("documents", documents, persistent=False)
        self.register_buffer("contents", contents, persistent=False)
        self.index: Index | None = None

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor] | list[Tensor]) -> Tensor:
        queries, candidates = (inputs, self.search(inputs)) if isinstance(inputs, Tensor) else inputs
        if candidates.shape[1] < self.n_used:
            raise InputError(
                f"candidates must be at least n_used {self.n_used} for each query, got {candidates.shape[1]}"
            )
        scores = self.retriever(queries, self.documents[candidates])
        columns = best_documents(scores, self.n_used)
        contents = self.read_contents(candidates.gather(1, columns))
        if self.reading == "together":
            return self.reader(queries, contents)
        logits = self.reader(*each_alone(queries, contents)).unflatten(0, columns.shape)
        return marginal_class_log_probs(
            scores.gather(1, columns), full_precision(logits).log_softmax(-1), temperature=self.temperature
        )

    def read_contents(self, numbers: Int[Tensor, "batch n"]) -> Tensor:
        """What the reader reads of documents: (batch, n, ...)."""
        return (self.documents if self.contents is None else self.contents)[numbers]

    def search(
        self, queries: Tensor, k: int | None = None, exclude: Exclude | None = None
    ) -> Int[Tensor, "batch k"]:
        """Numbers of the k best documents of the whole collection for each query, best first, with the retriever in evaluation mode.

        Args:
            queries: as the retriever takes them.
            k: >= 1, and at least `n_used` if they are to be read; default: `n_candidates`. Capped at the size of the collection.
            exclude: an id of each query and one of each document: pairs with equal ids are not found. Give training queries that stand in
                the collection their own number, and duplicates of a text one common id, or the retriever learns to look up
                the query itself.

        Raises:
            InputError: if k < 1, or a query has fewer than k documents to find.

        Cost:
            The retriever's: ours encode queries 512 at a time, so memory does not grow with the tokens of all of them.
        """
        retriever: Any = self.retriever
        k = min(self.n_candidates if k is None else k, len(self.documents))
        if exclude is not None:
            exclude = (exclude[0].to(self.documents.device), exclude[1].to(self.documents.device))
        fewest = len(self.documents) - _most_excluded(exclude)
        if not 1 <= k <= fewest:
            raise InputError(
                f"k (n_candidates unless it is given) must be in [1, {fewest}], the fewest documents of a query that are not excluded, got {k}"
            )
        with evaluation_mode(self.retriever):
            index = self.index if self.index is not None else retriever.encode_documents(self.documents)
            return retriever.search(queries, index, k, exclude)

    def keep_index(self) -> None:
        """Encode the collection once, for many searches; call it again, or `drop_index`, after the retriever has changed."""
        retriever: Any = self.retriever
        with evaluation_mode(self.retriever):
            self.index = retriever.encode_documents(self.documents)

    def drop_index(self) -> None:
        """Encode the collection at every search again."""
        self.index = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetrievalReader":
        super()._apply(fn, recurse)
        if self.index is not None:
            self.index = tuple(fn(part) for part in self.index)
        return self


def with_candidates(
    model: RetrievalReader, dataset: IndexedDataset, k: int | None = None, *, exclude: Exclude | None = None
) -> IndexedDataset:
    """The data set with the documents that a retriever finds for each query at present: inputs become `(queries, candidates)`.

    Training then chooses among these, as published, and the collection need not be searched at each step.

    Args:
        model: searches its collection.
        dataset: inputs are queries, or queries with candidates, which are found anew.
        k: documents for each query, see `RetrievalReader.search`.
        exclude: likewise.

    Examples:
        >>> from coloss.nn import DualEncoder
        >>> from coloss.retrieval import DenseRetriever
        >>> facts = torch.randn(50, 8)
        >>> retriever = DenseRetriever(DualEncoder(nn.Identity(), nn.Identity()))
        >>> model = RetrievalReader(retriever, MeanReader(8, 8, 3), facts, n_candidates=10)
        >>> own = torch.arange(50)
        >>> data = with_candidates(model, IndexedDataset(facts, own % 3), exclude=(own, own))
        >>> data.inputs[1].shape, bool((data.inputs[1] == own[:, None]).any())
        (torch.Size([50, 10]), False)
    """
    queries = dataset.inputs if isinstance(dataset.inputs, Tensor) else dataset.inputs[0]
    candidates = model.search(queries, k, exclude)
    return IndexedDataset((queries, candidates), dataset.targets, dataset.ids, dataset.extras)


def _most_excluded(exclude: Exclude | None) -> int:
    """The most documents that are left out of the search of a query."""
    if exclude is None or not len(exclude[0]):
        return 0
    distinct, number = torch.cat(exclude).unique(return_inverse=True)
    own, documents = number.split([len(ids) for ids in exclude])
    return int(documents.bincount(minlength=len(distinct))[own].max())
