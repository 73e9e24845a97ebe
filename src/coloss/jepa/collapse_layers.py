"""NC1 to NC4 of a network at any of its layers, from two passes over a data set."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.jepa.collapse_measures import (
    between_whitener,
    collapse_metrics,
    moment_means,
    nearest_mean,
)
from coloss.metrics import FeatureBatch, feature_stream
from coloss.nn import Taps, find_classifier
from coloss.ops import RunningMoments

LAST = "the classifier's input"


def collapse_report(
    model: nn.Module,
    data: Any,
    layers: Sequence[str] | None = None,
    *,
    test: Any = None,
    classifier: str | None = None,
    batch_size: int = 512,
) -> dict[str, dict[str, float]]:
    """NC1 to NC4 of a classifier at any of its layers, streamed: no feature is kept, and no covariance matrix.

    Args:
        model: gives logits (batch, classes) from a batch of inputs.
        data: training data that can be read twice: `(inputs, targets)` tensors, a `coloss.data.IndexedDataset`, a torch Dataset, a
            loader or a list of batches; targets are classes. Without augmentation.
        layers: module paths, with ":input" for what enters a module (`coloss.nn.Taps`); None for the classifier's input alone.
        test: data held out, for "nc4_test" and "nearest_mean_accuracy_test".
        classifier: module path of the last layer, an `nn.Linear`; None for the last one in the model.
        batch_size: samples in one forward pass; a loader keeps its own.

    Returns:
        Layer -> measures, as of `coloss.jepa.collapse_metrics` with "nc1_pinv"; "nc4", the share of samples where the network decides as
        the nearest class mean of that layer does; "nearest_mean_accuracy", the share where the nearest mean is right. "nc3" and
        "self_duality" stand where a layer's value is what enters the classifier.

    Raises:
        ValueError: for an unknown module, logits that are no matrix, targets that are no classes, or data that can be read only once.

    Cost:
        Two passes over the data, one over the test data; memory O(classes * features) for each layer.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658; Papyan, Han, Donoho 2020, arXiv 2008.08186.

    Examples:
        >>> from coloss.nn import Classifier, MLP
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, classes = torch.rand(60, 64, generator=generator), torch.arange(3).repeat(20)
        >>> model = Classifier(MLP(64, [16, 8]), 3)
        >>> report = collapse_report(model, (images, classes), ["backbone.layers.2", "backbone.layers.5"])
        >>> for layer, found in report.items():
        ...     print(layer, "nc3" in found, 0 <= found["nc4"] <= 1)
        backbone.layers.2 False True
        backbone.layers.5 True True
    """
    readable, held_out = readable_twice(data), None if test is None else readable_twice(test)
    layers, head = report_places(model, layers, classifier)
    paths = {layer: layer for layer in layers}
    stream = partial(feature_stream, model, batch_size=batch_size)
    moments: dict[str, RunningMoments] = {}
    enters = set(layers)
    with stream(readable, paths | ({LAST: f"{head[0]}:input"} if head else {})) as batches:
        for batch in batches:
            classes, count = _classes(batch)
            for layer in layers:
                new = RunningMoments.of(batch.features[layer], classes, count)
                moments[layer] = moments[layer].merge(new) if layer in moments else new
            last = batch.features.get(LAST)
            # In every batch: values of other layers may coincide with it in some.
            enters = {layer for layer in enters if last is not None and _same(batch.features[layer], last)}
    with stream(readable, paths) as batches:
        passes = _second_pass(batches, moments)
    report = {}
    for layer in layers:
        weight = head[1].weight.detach().cpu() if head is not None and layer in enters else None
        found = collapse_metrics(moments[layer], weight)
        # What has no spread of means to be measured by stays what the trace says it is.
        found["nc1_pinv"] = passes[layer].pop("whitened") if math.isfinite(found["nc1"]) else found["nc1"]
        report[layer] = found | passes[layer]
    if held_out is not None:
        with stream(held_out, paths) as batches:
            for layer, found in _second_pass(batches, moments).items():
                found.pop("whitened")
                report[layer] |= {f"{name}_test": value for name, value in found.items()}
    return report


def readable_twice(data: Any) -> Any:
    """Data as `collapse_report` reads them: a pair of tensors as a data set, anything else as it is.

    Raises:
        InputError: for an iterator, which is empty after one pass.

    Examples:
        >>> len(readable_twice((torch.zeros(3, 2), torch.zeros(3))))
        3
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return IndexedDataset(*data)
    if hasattr(data, "__next__"):
        raise InputError(f"data must be readable twice, got the iterator {type(data).__name__}")
    return data


def report_places(
    model: nn.Module, layers: Sequence[str] | None = None, classifier: str | None = None
) -> tuple[Sequence[str], tuple[str, nn.Linear] | None]:
    """The layers that `collapse_report` looks at, and the last layer with its path; None for a model that has no linear one.

    Raises:
        InputError: for a module that the model has not, or one that is no linear layer; without layers and without a linear one.

    Examples:
        >>> report_places(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
        (['0:input'], ('0', Linear(in_features=2, out_features=3, bias=True)))
    """
    head = None
    if classifier is not None or any(isinstance(module, nn.Linear) for module in model.modules()):
        path = find_classifier(model) if classifier is None else classifier
        last = dict(model.named_modules()).get(path)
        if not isinstance(last, nn.Linear):
            raise InputError(f"classifier must name an nn.Linear of the model, got {path!r}")
        head = path, last
    if layers is None:
        if head is None:
            raise InputError(f"layers must be named: {type(model).__name__} has no linear classifier")
        layers = [f"{head[0]}:input"]
    if isinstance(layers, str) or len(layers) == 0:
        raise InputError(f"layers must be a list of at least one module path, got {layers!r}")
    try:
        Taps(model, {layer: layer for layer in layers}).close()
    except ValueError as error:
        raise InputError(f"layers cannot be read: {error}") from error
    return layers, head


def _classes(batch: FeatureBatch) -> tuple[Tensor, int]:
    """The class of each sample, and the number of classes."""
    outputs, targets = batch.outputs, batch.targets
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"the model must give logits (batch, classes) of at least 2 classes, got {found}")
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        found = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"data must give the class of each sample as a whole number, got {found}")
    return targets.long(), outputs.shape[1]


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tapped values are one: copied to one place they hold the same numbers."""
    return first.shape == second.shape and bool(torch.equal(first, second))


def _second_pass(batches: Any, moments: Mapping[str, RunningMoments]) -> dict[str, dict[str, float]]:
    """What takes the class means of the whole data: sums over samples, divided by their number."""
    means = {layer: moment_means(known) for layer, known in moments.items()}
    whiteners = {layer: between_whitener(known) for layer, known in means.items()}
    sums = {layer: torch.zeros(3, dtype=torch.float64) for layer in moments}
    samples = 0
    for batch in batches:
        classes, _ = _classes(batch)
        samples += len(classes)
        for layer, total in sums.items():
            rows = batch.features[layer].to(means[layer])
            nearest = nearest_mean(rows, means[layer])
            deviations = (rows - moments[layer].mean[classes]) @ whiteners[layer]
            total += torch.stack(
                [
                    deviations.square().sum(),
                    (nearest == batch.outputs.argmax(1)).sum(),
                    (nearest == classes).sum(),
                ]
            )
    names = ("whitened", "nc4", "nearest_mean_accuracy")
    return {layer: dict(zip(names, (total / samples).tolist())) for layer, total in sums.items()}
