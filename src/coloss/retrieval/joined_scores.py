"""The score matrix of a batch of retrieval, over all processes, and who answers whom in it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.data.batch import Batch
from coloss.errors import InputError
from coloss.ops import full_precision, gather_with_gradient, rank, relevance_from_ids, without_autocast


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


def _relevance_by_ids(extras: dict[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor:
    queries, documents = shape
    place = torch.arange(documents, device=device)
    different = place + (rank() << 32)  # from all others, on whatever process
    owned = place < queries
    document_ids = _extra(extras, "document", (documents,), device, different)
    query_ids = F.pad(
        _extra(extras, "query", (queries,), device, different[:queries]), (0, documents - queries)
    )
    table = torch.stack([document_ids, query_ids, owned], dim=1)
    document_ids, query_ids, owned = gather_with_gradient(table).unbind(1)
    owned = owned.bool()
    same_document = relevance_from_ids(document_ids[owned], document_ids)
    return same_document | relevance_from_ids(query_ids[owned], query_ids) & owned


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
