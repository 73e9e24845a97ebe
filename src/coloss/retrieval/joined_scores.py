"""The score matrix of a batch of retrieval, over all processes, and who answers whom in it, as a mask or as pairs."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.ops import (
    full_precision,
    gather_with_gradient,
    is_distributed,
    rank,
    relevance_from_ids,
    without_autocast,
)
from coloss.ops.distributed import row_counts


class JoinedScores(NamedTuple):
    """Scores of all queries against all documents of a step.

    Attributes:
        scores: (queries, documents), at least float32, with a gradient.
        relevance: bool, like `scores`.
        ignore: bool, like `scores`: pairs to leave out; None if there are none.

    Examples:
        >>> joined_scores((torch.eye(2), torch.eye(2)), Batch(None)).scores
        tensor([[1., 0.],
                [0., 1.]])
    """

    scores: Tensor
    relevance: Tensor
    ignore: Tensor | None


def joined_scores(outputs: Any, batch: Batch) -> JoinedScores:
    """Dot products of every query with every document of the batch, under several processes of all their batches.

    What is relevant:

    - document i to query i, if the batch says nothing else;
    - every document that equals the query's own one, or belongs to an equal query, by ids in `batch.extras`: `"document"`, one
      for each document, and `"query"`, one for each query (the names of `coloss.data.RetrievalSplits`);
    - where `batch.extras["relevance"]` (queries, documents) is > 0, which replaces the two above.

    `batch.extras["ignore"]` (queries, documents) leaves pairs out. Both masks are of a process's own pairs: pairs across processes
    are then irrelevant and not ignored.

    Args:
        outputs: a pair (query embeddings (B, dim), document embeddings (M, dim)), M >= B; the first B documents are the queries'
            own, the rest further candidates.
        batch: what was embedded, for its `extras`.

    Raises:
        InputError: if the outputs are no such pair, or an extra does not fit them.

    Cost:
        Every process holds all pairs: W^2 B M scores for W processes.

    Examples:
        >>> embeddings = torch.eye(3), torch.eye(3)
        >>> joined_scores(
        ...     embeddings, Batch(None, extras={"document": torch.tensor([5, 6, 5])})
        ... ).relevance.int()
        tensor([[1, 0, 1],
                [0, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    if not (
        isinstance(outputs, tuple | list)
        and len(outputs) == 2
        and all(isinstance(part, Tensor) and part.ndim == 2 for part in outputs)
    ):
        raise InputError(
            f"the model must return (query embeddings, document embeddings), got {type(outputs).__name__}"
        )
    queries, documents = (full_precision(part) for part in outputs)
    shape, device = (len(queries), len(documents)), queries.device
    if shape[1] < shape[0]:
        raise InputError(f"a batch must hold a document for each query, got {shape[1]} for {shape[0]}")
    relevance, ignore = (_joined_mask(batch.extras, name, shape, device) for name in ("relevance", "ignore"))
    if relevance is None:
        relevance = _relevance_by_ids(batch.extras, shape, device)
    with without_autocast(device):
        scores = gather_with_gradient(queries) @ gather_with_gradient(documents).T
    return JoinedScores(scores, relevance, ignore)


def positive_pairs(batch: Batch, queries: int, documents: Tensor) -> tuple[Tensor, Tensor | None]:
    """Query and document number of every relevant pair of a batch's own queries, relevant in the sense of `joined_scores`.

    Documents are numbered over all processes, in the order of ranks. Ids find positives on other processes too.

    Args:
        batch: for its extras.
        queries: number of queries of this process.
        documents: embeddings, of which only the number of rows counts.

    Returns:
        (2, pairs) int64, and the relevance of each pair where `extras["relevance"]` grades it, else None.

    Raises:
        InputError: if an extra does not fit.

    Cost:
        A bool for each query of this process and document of all.

    Examples:
        >>> batch = Batch(None, extras={"document": torch.tensor([5, 6, 5])})
        >>> positive_pairs(batch, 3, torch.zeros(3, 2))[0].tolist()
        [[0, 0, 1, 2, 2], [0, 2, 1, 0, 2]]
    """
    shape, device = (queries, len(documents)), documents.device
    if "relevance" in batch.extras:
        relevance = _extra(batch.extras, "relevance", shape, device)
        start = sum(row_counts(documents)[: rank()]) if is_distributed() else 0
        pairs = (relevance > 0).nonzero().T
        grades = relevance[pairs[0], pairs[1]].float()
        return torch.stack([pairs[0], pairs[1] + start]), grades
    if shape[1] < shape[0]:
        raise InputError(f"a batch must hold a document for each query, got {shape[1]} for {shape[0]}")
    own = _ids(batch.extras, shape, device)
    return _equal(own[:queries], gather_with_gradient(own)).nonzero().T.contiguous(), None


def _relevance_by_ids(extras: dict[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor:
    table = gather_with_gradient(_ids(extras, shape, device))
    return _equal(table[table[:, 2].bool()], table)


def _ids(extras: dict[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Of each document: its id, that of the query it belongs to, and whether it belongs to one."""
    queries, documents = shape
    place = torch.arange(documents, device=device)
    different = place + (rank() << 32)  # from all others, on whatever process
    document_ids = _extra(extras, "document", (documents,), device, different)
    query_ids = F.pad(
        _extra(extras, "query", (queries,), device, different[:queries]), (0, documents - queries)
    )
    return torch.stack([document_ids, query_ids, place < queries], dim=1)


def _equal(queries: Tensor, documents: Tensor) -> Tensor:
    """Which of two tables of ids belong together: the same document, or one that belongs to an equal query."""
    same_document = relevance_from_ids(queries[:, 0], documents[:, 0])
    return same_document | relevance_from_ids(queries[:, 1], documents[:, 1]) & documents[:, 2].bool()


def _joined_mask(
    extras: dict[str, Any], name: str, shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Masks of the processes' own pairs, in the places that these have among the pairs of all processes."""
    if name not in extras:
        return None
    mask = _extra(extras, name, shape, device) > 0
    sizes = gather_with_gradient(torch.tensor([shape], device=device)).tolist()
    blocks = gather_with_gradient(mask.flatten()).split([rows * columns for rows, columns in sizes])
    return torch.block_diag(*(block.view(size) for block, size in zip(blocks, sizes, strict=True))).bool()


def _extra(
    extras: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    default: Tensor | None = None,
) -> Tensor:
    value = extras.get(name, default)
    if not isinstance(value, Tensor) or value.shape != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"batch.extras[{name!r}] must have shape {shape}, got {found}")
    if default is not None and (value.is_floating_point() or value.is_complex()):
        raise InputError(f"batch.extras[{name!r}] must hold whole numbers, got {value.dtype}")
    return value.to(device)
