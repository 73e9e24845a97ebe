"""One call for one kind of network: its usual metrics on held-out data, as plain numbers.

Every function runs the network in eval mode and leaves it, and all global random state, as it was; the same
network and data give the same numbers. A network that diverged does not raise: where its outputs hold NaN the
metrics that they leave undefined are NaN, and its classifications count as wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.ops import effective_rank, full_precision, gram_singular_values

from .calibration import expected_calibration_error, negative_log_likelihood
from .classification import accuracy, balanced_accuracy, macro_f1, mean_squared_error, r2_score
from .embedding import feature_standard_deviation, tolerance, uniformity
from .embedding_retrieval import retrieval_metrics_from_embeddings
from .inference import extract_features, predict
from .probes import knn_probe, linear_probe


def evaluate_classifier(model: nn.Module, dataset: Any, batch_size: int = 1024) -> dict[str, float]:
    """Accuracy and calibration of a classifier.

    Args:
        model: gives logits (batch, classes).
        dataset: inputs with class indices as targets; any kind that `predict` takes.
        batch_size: samples in one forward pass.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_f1`, `nll` (nats) and `ece` (15 bins).

    Raises:
        ValueError: if the data hold no sample, no targets, or targets that do not fit the logits.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> data = [(torch.randn(8, 2), torch.tensor([0, 1] * 4))]
        >>> sorted(evaluate_classifier(model, data))
        ['accuracy', 'balanced_accuracy', 'ece', 'macro_f1', 'nll']
    """
    logits, targets = _tensors(model, dataset, batch_size)
    return {
        "accuracy": float(accuracy(logits, targets)),
        "balanced_accuracy": float(balanced_accuracy(logits, targets)),
        "macro_f1": float(macro_f1(logits, targets)),
        "nll": float(negative_log_likelihood(logits, targets)),
        "ece": float(expected_calibration_error(logits, targets, from_logits=True)),
    }


def evaluate_multilabel(model: nn.Module, dataset: Any, batch_size: int = 1024) -> dict[str, float]:
    """Ranking quality, F1 and likelihood of a network that says of each label whether it applies.

    Args:
        model: gives one logit for each label, (batch, labels); a label is predicted where its logit is > 0.
        dataset: inputs with 0 / 1 targets (batch, labels); any kind that `predict` takes.
        batch_size: samples in one forward pass.

    Returns:
        `average_precision` (area under precision-recall of each label that occurs in the targets, averaged
        over these labels), `micro_f1` (over all sample-label pairs together), `macro_f1` (F1 of each label
        that occurs in targets or predictions, averaged) and `nll` (binary cross-entropy in nats, averaged
        over pairs).

    Raises:
        ValueError: if the data hold no sample, no targets, or targets of another shape than the logits.

    Examples:
        >>> logits = torch.tensor([[2.0, -1.0], [-2.0, -1.0], [1.0, 3.0]])
        >>> found = evaluate_multilabel(nn.Identity(), [(logits, (logits > 0).float())])
        >>> found["average_precision"], found["micro_f1"], found["macro_f1"]
        (1.0, 1.0, 1.0)
    """
    logits, targets = _tensors(model, dataset, batch_size)
    if logits.ndim != 2 or logits.shape != targets.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits and targets must both be (batch, labels), got {shapes}")
    logits, applies = full_precision(logits), targets > 0
    predicted = logits > 0
    hits = (predicted & applies).sum(0)
    total = predicted.sum(0) + applies.sum(0)
    return {
        "average_precision": _mean_average_precision(logits, applies),
        "micro_f1": float(2 * hits.sum() / total.sum()),
        "macro_f1": float((2 * hits[total > 0] / total[total > 0]).mean()),
        "nll": float(F.binary_cross_entropy_with_logits(logits, applies.to(logits.dtype))),
    }


def evaluate_regressor(model: nn.Module, dataset: Any, batch_size: int = 1024) -> dict[str, float]:
    """Squared error and explained variance of a regressor.

    Args:
        model: gives predictions in the shape of the targets; (batch, 1) is accepted for targets (batch,).
        dataset: inputs with values as targets; any kind that `predict` takes.
        batch_size: samples in one forward pass.

    Returns:
        `mse` and `r2`.

    Raises:
        ValueError: if the data hold no sample, no targets, or targets of another shape than the predictions.

    Examples:
        >>> x = torch.linspace(-1, 1, 10)[:, None]
        >>> evaluate_regressor(nn.Identity(), [(x, x[:, 0])])
        {'mse': 0.0, 'r2': 1.0}
    """
    predictions, targets = _tensors(model, dataset, batch_size)
    if predictions.shape == (*targets.shape, 1):
        predictions = predictions[..., 0]
    targets = targets.to(predictions.dtype)
    return {
        "mse": float(mean_squared_error(predictions, targets)),
        "r2": float(r2_score(predictions, targets)),
    }


def evaluate_dual_encoder(
    model: nn.Module,
    data: Any,
    *,
    split: str = "test",
    relevance: Tensor | None = None,
    ignore: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 1024,
) -> dict[str, float]:
    """Retrieval metrics of a pair of encoders, every query against every document.

    Scores are dot products of the embeddings that the model gives, hence cosines where it normalises them.

    Args:
        model: takes a pair (queries, documents) and gives their embeddings (batch, dimensions), such as
            `coloss.nn.DualEncoder`; for retrieval splits also has its `encode_query` and `encode_document`.
        data: a data set whose inputs are pairs (queries, documents), or splits with queries, documents and
            judgements of their own, such as `coloss.data.RetrievalSplits`.
        split: whose queries are asked, for retrieval splits: "train", "validation" or "test".
        relevance: (queries, documents), relevant where > 0, with grades for nDCG. By default the splits' own judgements, or
            for pairs that query i is answered by document i alone.
        ignore: (queries, documents) bool, pairs to leave out, such as other documents of the same group. By default those
            of the splits' judgements.
        ks: cut-offs of recall and nDCG.
        batch_size: samples in one forward pass.

    Returns:
        See `retrieval_metrics_from_embeddings`: scores are compared exactly, in a stream of tiles. NaN if an embedding is not
        finite.

    Raises:
        ValueError: if the data hold no sample, the model gives no pair of embeddings, or a mask has another
            shape.

    Cost:
        O(queries * documents) time; memory of the embeddings, the judgements and a tile of scores.

    Examples:
        >>> from coloss.nn import DualEncoder
        >>> pairs = (torch.eye(3), 2 * torch.eye(3))
        >>> evaluate_dual_encoder(DualEncoder(nn.Identity(), nn.Identity()), [(pairs, None)])["recall@1"]
        1.0
    """
    judgements = None
    if hasattr(data, "documents"):
        encoder: Any = model
        queries, _ = predict(model, _part(data, f"{split}_queries"), batch_size, call=encoder.encode_query)
        documents, _ = predict(model, data.documents, batch_size, call=encoder.encode_document)
        judgements = _part(data, f"{split}_judgements")
    else:
        outputs, _ = predict(model, data, batch_size)
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise ValueError(f"model must give a pair of embeddings, got {type(outputs).__name__}")
        queries, documents = outputs
    shape = (len(queries), len(documents))
    options: dict[str, Any] = {"ignore": None if judgements is None else judgements.ignore}
    if relevance is not None:
        pairs = _nonzero("relevance", relevance, shape)
        options["grades"] = relevance.cpu()[pairs[:, 0], pairs[:, 1]]
    elif judgements is not None:
        pairs, options["grades"] = judgements.pairs, judgements.grades
    else:
        pairs = torch.arange(shape[0])[:, None].expand(-1, 2)
    if ignore is not None:
        options["ignore"] = _nonzero("ignore", ignore, shape)
    diverged = not bool(queries.isfinite().all() and documents.isfinite().all())
    if diverged:  # what can still be told is how many queries there are
        queries, documents = torch.zeros_like(queries), torch.zeros_like(documents)
    metrics = retrieval_metrics_from_embeddings(queries, documents, pairs, ks, metric="inner", **options)
    return {name: math.nan if diverged and "queries" not in name else metrics[name] for name in metrics}


def evaluate_encoder(
    encoder: nn.Module,
    splits: Any,
    labels: int | None = 100,
    seed: int = 0,
    *,
    split: str = "test",
    module_path: str | None = None,
    k: int = 5,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Probes and collapse meters of a self-supervised encoder.

    Args:
        encoder: gives one tensor for a batch of inputs.
        splits: has data sets `train` and `test` (or `validation`) with class indices as targets, such as
            `coloss.data.Splits`.
        labels: budget of training labels that both probes get, drawn class by class (see `label_budget`). It
            is raised to the number of classes and cut to the number of samples; None gives all labels.
        seed: of that draw.
        split: the part that is scored, "validation" or "test"; the probes always learn from `train`.
        module_path: submodule whose output is probed; None probes the output of the encoder.
        k: neighbours of the nearest-neighbour probe, few because labels are few; a vote has weight
            exp(cosine / 0.07).
        batch_size: samples in one forward pass.

    Returns:
        Accuracies `linear_probe` and `knn`, and of the scored features `feature_std` (see
        `feature_standard_deviation`; 0 is collapsed), `uniformity` (0 is collapsed), `tolerance` (how similar a class's
        samples are; 1 is collapsed too) and `rankme` (effective rank, not centred, with RankMe's epsilon 1e-7; 1 is one
        direction).

    Raises:
        ValueError: if a part is empty or has no targets, or k < 1.

    Examples:
        >>> from types import SimpleNamespace
        >>> part = [(torch.eye(2).repeat(5, 1), torch.tensor([0, 1] * 5))]
        >>> evaluate_encoder(nn.Identity(), SimpleNamespace(train=part, test=part), labels=4)["linear_probe"]
        1.0
    """
    train, train_targets = extract_features(encoder, _part(splits, "train"), module_path, batch_size)
    test, test_targets = extract_features(encoder, _part(splits, split), module_path, batch_size)
    for name, targets in (("train", train_targets), (split, test_targets)):
        if not isinstance(targets, Tensor):
            raise ValueError(f"splits.{name} must have one tensor of targets, got {type(targets).__name__}")
    if not bool(train.isfinite().all() and test.isfinite().all()):
        names = ("linear_probe", "knn", "feature_std", "uniformity", "tolerance", "rankme")
        return dict.fromkeys(names, math.nan)
    if labels is not None:
        labels = min(max(labels, len(train_targets.unique())), len(train_targets))
    parts = (train, train_targets, test, test_targets)
    return {
        "linear_probe": linear_probe(*parts, labels=labels, seed=seed).accuracy,
        "knn": knn_probe(*parts, k=k, labels=labels, seed=seed).accuracy,
        "feature_std": float(feature_standard_deviation(test)),
        "uniformity": float(uniformity(test)),
        "tolerance": float(tolerance(test, test_targets)),
        "rankme": float(effective_rank(gram_singular_values(test), 1e-7)),
    }


def _nonzero(name: str, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    if mask.shape != shape:
        raise ValueError(f"{name} must be (queries, documents) {shape}, got {tuple(mask.shape)}")
    return mask.cpu().nonzero()


def _part(splits: Any, name: str) -> Any:
    if not hasattr(splits, name):
        raise ValueError(f"splits must have a part {name!r}, got a {type(splits).__name__} without it")
    return getattr(splits, name)


def _tensors(model: nn.Module, dataset: Any, batch_size: int) -> tuple[Tensor, Tensor]:
    outputs, targets = predict(model, dataset, batch_size)
    for name, value in (("model outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be one tensor, got {type(value).__name__}")
    return outputs, targets


def _mean_average_precision(logits: Tensor, applies: Tensor) -> float:
    from sklearn.metrics import average_precision_score

    occurs = applies.any(0)
    if not bool(occurs.any()) or bool(logits.isnan().any()):
        return math.nan
    # One label at a time: scikit-learn takes a one-column problem for a binary one.
    columns = zip(applies[:, occurs].T.numpy(), logits[:, occurs].T.numpy())
    scores = [average_precision_score(truth, score) for truth, score in columns]
    return float(sum(scores) / len(scores))
