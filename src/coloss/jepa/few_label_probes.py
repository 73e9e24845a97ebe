"""What features are worth when labels are few: probes averaged over several draws of the labels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.metrics import knn_probe, linear_probe


def few_label_probes(
    train_features: Float[Tensor, "train *dimensions"],
    train_targets: Int[Tensor, " train"],
    test_features: Float[Tensor, "test *dimensions"],
    test_targets: Int[Tensor, " test"],
    *,
    labels_per_class: int = 5,
    draws: int = 5,
    k: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Test accuracy of a linear and a nearest-neighbour probe with a few labels, the mean over draws of which these are.

    With few labels the draw moves an accuracy more than most encoders differ; the mean over draws moves less. Features are first
    scaled to mean 0 and variance 1 by all training samples, which needs no labels: in features that share a large part, such as
    means over tokens with positions, plain cosines see that part alone.

    Args:
        train_features: one row for each training sample.
        train_targets: classes.
        test_features, test_targets: likewise.
        labels_per_class: labels for each class on average, drawn class by class until a class runs out (see `label_budget`), >= 1.
        draws: of labels, >= 1, the same for the same seed and targets.
        k: neighbours.
        seed: of the draws.

    Returns:
        `linear_probe` and `knn`.

    Raises:
        ValueError: for a value out of range, or as the probes.

    Examples:
        >>> features = torch.tensor([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0], [0.9, 0.1]])
        >>> classes = torch.tensor([0, 0, 1, 1])
        >>> few_label_probes(features, classes, features, classes, labels_per_class=1)
        {'linear_probe': 1.0, 'knn': 1.0}
    """
    for name, value in (("labels_per_class", labels_per_class), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    labels = min(labels_per_class * len(train_targets.unique()), len(train_targets))
    train = train_features.detach().float().flatten(1)
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    parts = (
        (train - mean) / std,
        train_targets,
        (test_features.float().flatten(1) - mean) / std,
        test_targets,
    )
    linear = [linear_probe(*parts, labels=labels, seed=seed * draws + n).accuracy for n in range(draws)]
    nearest = [knn_probe(*parts, k=k, labels=labels, seed=seed * draws + n).accuracy for n in range(draws)]
    return {"linear_probe": sum(linear) / draws, "knn": sum(nearest) / draws}
