"""How much a frozen representation knows: linear, ridge and nearest-neighbour probes on feature vectors.

A probe is fitted on training features and scored on test features; the network that made them is not touched.
Compare probes only at equal budgets of labels, equal standardisation and equal k: all of these move the
number more than most methods do. A linear probe is forgiving (random features score well), the
nearest-neighbour probe shows collapse; report both.

`extract_features` (from `coloss.metrics.inference`) makes the features.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .classification import mean_squared_error, r2_score
from .inference import extract_features as extract_features
from .neighbours import nearest_neighbours


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """How a classification probe did.

    Attributes:
        accuracy: share of test samples classified correctly.
        labels: number of training labels the probe was given.
        predictions: predicted class of each test sample.
    """

    accuracy: float
    labels: int
    predictions: Tensor


@dataclass(frozen=True, eq=False)
class RegressionProbeResult:
    """How a regression probe did.

    Attributes:
        r2: share of the test targets' variance explained, averaged over outputs.
        mean_squared_error: in the squared unit of the targets.
        predictions: float64, in the shape of the test targets.
    """

    r2: float
    mean_squared_error: float
    predictions: Tensor


def linear_probe(
    train_features: Float[Tensor, "train *dimensions"],
    train_targets: Int[Tensor, " train"],
    test_features: Float[Tensor, "test *dimensions"],
    test_targets: Int[Tensor, " test"],
    *,
    penalty: float | int = 1.0,
    labels: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Test accuracy of a logistic regression on standardised features.

    With x the features, shifted and scaled to mean 0 and variance 1 by the training samples, weights W and
    biases b minimise

        sum_i cross_entropy(W x_i + b, y_i) + (penalty / 2) * ||W||^2

    Args:
        train_features: one row for each training sample; further dimensions are flattened.
        train_targets: class of each training sample, any integers.
        test_features: one row for each test sample.
        test_targets: class of each test sample; a class that is absent in training cannot be predicted and
            counts as wrong.
        penalty: strength of the L2 penalty, > 0; scikit-learn's C is 1 / penalty.
        labels: budget of training labels, drawn by `label_budget`; None uses all.
        seed: of the draw; the fit itself holds no randomness.

    Returns:
        Accuracy, labels used and predictions. If only one class is in training it is predicted for all.

    Raises:
        ValueError: if sizes disagree, features are not finite, a set is empty or an option is out of range.

    Examples:
        >>> train, targets = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> test, test_targets = torch.tensor([[0.5], [4.5], [3.5]]), torch.tensor([0, 1, 0])
        >>> linear_probe(train, targets, test, test_targets).accuracy
        0.6666666666666666
    """
    train, test = _checked_features(train_features, train_targets, test_features, test_targets)
    _check_positive("penalty", penalty)
    chosen = _chosen(train_targets, labels, seed)
    classes = train_targets[chosen].unique()
    if len(classes) == 1:
        predictions = classes.expand(len(test)).long()
    else:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=5000))
        probe.fit(_array(train[chosen]), train_targets[chosen].cpu().numpy())
        predictions = torch.from_numpy(probe.predict(_array(test))).long()
    return _scored(predictions, test_targets, len(chosen))


def ridge_probe(
    train_features: Float[Tensor, "train *dimensions"],
    train_targets: Float[Tensor, "train *outputs"],
    test_features: Float[Tensor, "test *dimensions"],
    test_targets: Float[Tensor, "test *outputs"],
    *,
    penalty: float | int = 1.0,
) -> RegressionProbeResult:
    """Test r2 and squared error of a ridge regression on standardised features.

    With x the features, shifted and scaled to mean 0 and variance 1 by the training samples, W and b minimise

        sum_i || W x_i + b - y_i ||^2 + penalty * ||W||^2

    Args:
        train_features: one row for each training sample; further dimensions are flattened.
        train_targets: (train,) or (train, outputs).
        test_features: one row for each test sample.
        test_targets: (test,) or (test, outputs).
        penalty: strength of the L2 penalty, > 0.

    Returns:
        r2 (see `r2_score`), mean squared error and predictions.

    Raises:
        ValueError: if sizes disagree, features are not finite, a set is empty or penalty <= 0.

    Examples:
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> result = ridge_probe(x, 3 * x[:, 0] + 1, x, 3 * x[:, 0] + 1, penalty=1e-6)
        >>> round(result.r2, 6)
        1.0
    """
    train, test = _checked_features(train_features, train_targets, test_features, test_targets)
    _check_positive("penalty", penalty)
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(_array(train), _array(train_targets))
    predictions = torch.from_numpy(probe.predict(_array(test))).reshape(test_targets.shape)
    targets = test_targets.detach().cpu().double()
    error = float(mean_squared_error(predictions, targets))
    return RegressionProbeResult(float(r2_score(predictions, targets)), error, predictions)


def knn_probe(
    train_features: Float[Tensor, "train *dimensions"],
    train_targets: Int[Tensor, " train"],
    test_features: Float[Tensor, "test *dimensions"],
    test_targets: Int[Tensor, " test"],
    *,
    k: int = 20,
    temperature: float | int | None = 0.07,
    metric: Literal["cosine", "euclidean"] = "cosine",
    labels: int | None = None,
    seed: int = 0,
    chunk_size: int = 2048,
) -> ProbeResult:
    """Test accuracy of a vote among the k nearest training samples, weighted by similarity.

        vote of class c = sum over the k nearest i with y_i = c of exp(s_i / temperature)

    with s_i the cosine, or minus the Euclidean distance. Features enter as they are, not standardised.

    Args:
        train_features: one row for each training sample; further dimensions are flattened.
        train_targets: class of each training sample, any integers.
        test_features: one row for each test sample.
        test_targets: class of each test sample.
        k: neighbours that vote, >= 1; capped at the number of training samples.
        temperature: > 0, in units of the similarity; None gives each neighbour one vote. The default suits
            cosines; distances have no natural scale, so prefer None with them.
        metric: "cosine" (a zero vector has cosine 0 with all) or "euclidean".
        labels: budget of training labels, drawn by `label_budget`; None uses all.
        seed: of the draw.
        chunk_size: test samples compared at a time, >= 1; changes memory, not the result.

    Returns:
        Accuracy, labels used and predictions. Of training samples equally near as the k-th the earlier ones
        vote; of classes with equally many votes the lowest wins.

    Raises:
        ValueError: if sizes disagree, features are not finite, a set is empty or an option is out of range.

    Cost:
        O(test * train * dimensions) time; memory as `nearest_neighbours`, never test * train. Runs on the device of
        the features.

    Source:
        Wu et al. 2018, arXiv 1805.01978, section 3.4, for the weighted vote.

    Examples:
        >>> train, targets = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> test, test_targets = torch.tensor([[2.0, 0.1], [0.1, 2.0]]), torch.tensor([0, 1])
        >>> knn_probe(train, targets, test, test_targets, k=1).accuracy
        1.0
    """
    train, test = _checked_features(train_features, train_targets, test_features, test_targets)
    for name, value in (("k", k), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if temperature is not None:
        _check_positive("temperature", temperature)
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    targets = train_targets.to(train.device)
    if labels is not None:
        chosen = label_budget(train_targets, labels, seed).to(train.device)
        train, targets = train[chosen], targets[chosen]
    classes, votes_for = targets.unique(return_inverse=True)
    found = nearest_neighbours(test, train, k, metric=metric, query_chunk=chunk_size)
    predictions = []
    for values, neighbours in zip(found.values.split(chunk_size), found.indices.split(chunk_size)):
        # Relative to the nearest neighbour, whose weight is 1: no temperature makes all votes vanish.
        weights = torch.ones_like(values)
        if temperature is not None:
            weights = (-(values - values[:, :1]).abs() / temperature).exp()
        votes = values.new_zeros(len(values), len(classes)).scatter_add_(1, votes_for[neighbours], weights)
        predictions.append(classes[votes.argmax(1)].long())
    return _scored(torch.cat(predictions), test_targets, len(train))


def label_budget(targets: Int[Tensor, " samples"], labels: int, seed: int = 0) -> Int[Tensor, " labels"]:
    """Indices of a class-balanced random subset, for probes and training with few labels.

    Classes are drawn from in turn, so class sizes in the subset differ by at most 1 until a class runs out.
    With one seed a smaller budget is a part of a larger one.

    Args:
        targets: class of each sample, any integers.
        labels: size of the subset, from the number of classes to the number of samples.
        seed: of the draw; the same on every machine, and independent of global random state.

    Returns:
        Indices into `targets` in rising order, on the CPU.

    Raises:
        ValueError: if labels are fewer than classes or more than samples.

    Examples:
        >>> targets = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
        >>> targets[label_budget(targets, 5)]
        tensor([0, 0, 1, 1, 2])
    """
    targets = targets.cpu()
    classes = len(targets.unique())
    if not classes <= labels <= len(targets):
        limits = f"the number of classes {classes} and of samples {len(targets)}"
        raise ValueError(f"labels must be between {limits}, got {labels}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=generator)
    _, index, counts = targets[shuffled].unique(return_inverse=True, return_counts=True)
    turn_of_class = torch.randperm(classes, generator=generator)
    by_class = index.argsort(stable=True)
    place = torch.empty_like(index)
    place[by_class] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[by_class]]
    turns = (place * classes + turn_of_class[index]).argsort()
    return shuffled[turns[:labels]].sort().values


def _checked_features(
    train_features: Tensor, train_targets: Tensor, test_features: Tensor, test_targets: Tensor
) -> tuple[Tensor, Tensor]:
    checked = []
    given = {"train": (train_features, train_targets), "test": (test_features, test_targets)}
    for name, (features, targets) in given.items():
        if len(features) == 0:
            raise ValueError(f"{name}_features must hold at least one sample, got {tuple(features.shape)}")
        if len(targets) != len(features):
            raise ValueError(
                f"{name}_targets must be {len(features)}, one for each sample, got {len(targets)}"
            )
        if not all(bool(part.isfinite().all()) for part in features.split(4096)):
            raise ValueError(f"{name}_features must be finite, got NaN or infinity")
        checked.append(features.detach().reshape(len(features), -1))
    if checked[0].shape[1] != checked[1].shape[1]:
        sizes = f"{checked[0].shape[1]} and {checked[1].shape[1]}"
        raise ValueError(f"train_features and test_features must have one number of dimensions, got {sizes}")
    return checked[0], checked[1]


def _check_positive(name: str, value: float | int) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _chosen(targets: Tensor, labels: int | None, seed: int) -> Tensor:
    return torch.arange(len(targets)) if labels is None else label_budget(targets, labels, seed)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _scored(predictions: Tensor, targets: Tensor, labels: int) -> ProbeResult:
    predictions = predictions.cpu()
    return ProbeResult(float((predictions == targets.cpu()).double().mean()), labels, predictions)
