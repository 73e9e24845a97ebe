"""From a labelled data set to a trained retriever and reader, in one call: training items are the documents that answers are read from."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset, RetrievalSplits, Splits, load
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.nn import DualEncoder
from coloss.retrieval.document_scorers import DenseRetriever
from coloss.retrieval.joint_retrieval import JointRetrieval
from coloss.retrieval.joint_retrieval_step import JointKind
from coloss.retrieval.retrieval_reader import MeanReader, RetrievalReader, with_candidates
from coloss.train import Budget, cosine, fit, save_model
from coloss.train.run_folder import claim_folder, source_name

_DIM, _CANDIDATES, _READ, _TRIED = 128, 20, 5, 10
_TEMPERATURE = 0.1


def small_retrieval_reader(splits: Splits | RetrievalSplits, kind: JointKind = "pairwise") -> RetrievalReader:
    """Linear retriever and small reader for a classification, with its training items and their labels as the collection.

    Args:
        splits: of a classification; inputs are flattened.
        kind: what the retriever learns from, see `JointRetrieval`: with `"marginal"` the model reads documents apart, else together.

    Raises:
        InputError: if the splits are of another kind, for an unknown kind of learning, or fewer training items than are read at once.

    Examples:
        >>> model = small_retrieval_reader(load("iris"))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """
    if kind not in get_args(JointKind):
        raise InputError(f'kind must be "pairwise", "listwise" or "marginal", got {kind!r}')
    items, labels, classes = _labelled(splits)
    features = items.shape[1]
    tower = nn.Linear(features, min(_DIM, features), bias=False)
    nn.init.orthogonal_(tower.weight)
    return RetrievalReader(
        DenseRetriever(DualEncoder(tower, tower)),
        MeanReader(features, features + classes, classes, hidden=(128,), dropout=0.5),
        items,
        torch.cat([items, F.one_hot(labels, classes).to(items.dtype)], 1),
        n_candidates=_CANDIDATES,
        n_used=_READ,
        reading="apart" if kind == "marginal" else "together",
        temperature=_TEMPERATURE,
    )


def train_retrieval_reader(
    data: str | Path = "banking77",
    folder: str | Path = "runs/jmlr-banking77",
    *,
    kind: JointKind = "pairwise",
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a retriever and a reader on a classification of texts or tables; this is behind `coloss run jmlr`.

    Training items are questions and documents at once; an item never finds itself, nor a copy of itself.

    Args:
        data: name of a data set of `coloss.data`, or path of a table with a target.
        folder: for `model.safetensors` and checkpoints; a run that was stopped goes on there. The model is used again by
            `load_model(small_retrieval_reader(load(data, seed=seed), kind), folder / "model.safetensors")`.
        kind: what the retriever learns from, see `JointRetrieval`.
        budget: default: 300 steps.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        Metrics on test items, which are looked up in the whole collection, and `agreement`, the last one logged in training; it is absent
        where none was, as no training item had candidates that differ in score and in what the answer costs the reader.

    Raises:
        InputError: if data are no classification, or cannot be read; if fewer than 5 training items are left for one of them to read, besides
            itself and its copies; if the folder holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_retrieval_reader("iris", tempfile.mkdtemp(), budget=Budget(steps=20))
        >>> metrics["accuracy"] > 0.5, -1 <= metrics["agreement"] <= 1
        (True, True)
    """
    splits = load(data, seed=seed)
    items, labels, _ = _labelled(splits)
    assert isinstance(splits, Splits)
    _, same, copies = torch.unique(items, dim=0, return_inverse=True, return_counts=True)
    others = len(items) - int(copies.max())
    if others < _READ:
        raise InputError(
            f"data must leave each training item at least {_READ} others to read that are no copies of it, got {others}: "
            f"{int(copies.max())} of {len(items)} items are alike"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = small_retrieval_reader(splits, kind)
    folder, candidates = Path(folder), min(_CANDIDATES, others)
    claim_folder(folder, {"data": source_name(str(data)), "seed": seed, "kind": kind})
    train = with_candidates(model, IndexedDataset(items, labels), candidates, exclude=(same, same))
    run = fit(
        model,
        train,
        F.cross_entropy,
        [JointRetrieval(kind=kind, n_sampled=min(_TRIED, candidates), temperature=_TEMPERATURE)],
        budget=budget or Budget(steps=300),
        learning_rate_schedule=cosine(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
        checkpoint_dir=folder / "checkpoints",
        resume=True,
        progress=None if progress is None else lambda share, terms: progress(share),
        seed=seed,
    )
    shipped = run.model
    assert isinstance(shipped, RetrievalReader)
    save_model(shipped, folder / "model.safetensors")
    shipped.keep_index()
    metrics = evaluate_classifier(shipped, IndexedDataset(_flat(splits.test), splits.test.targets))
    agreement = [point.metrics["agreement"] for point in run.history if "agreement" in point.metrics]
    return dict(metrics) | ({"agreement": agreement[-1]} if agreement else {})


def _labelled(splits: Splits | RetrievalSplits) -> tuple[Tensor, Tensor, int]:
    """Training items as rows, their labels, and the number of classes."""
    if not isinstance(splits, Splits) or splits.kind != "classification" or splits.num_classes is None:
        raise InputError(f"data must be a classification to look answers up in, got a {splits.kind} set")
    labels = splits.train.targets
    assert isinstance(labels, Tensor)
    return _flat(splits.train), labels, splits.num_classes


def _flat(part: IndexedDataset) -> Tensor:
    assert isinstance(part.inputs, Tensor)
    return part.inputs.flatten(1).float()
