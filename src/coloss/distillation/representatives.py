"""Real images, and means of real images, that stand for their class: where distillation starts, and what it must beat."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import full_precision


def kmeans_centres(
    features: Float[Tensor, "samples features"],
    labels: Int[Tensor, " samples"],
    per_class: int,
    seed: int = 0,
) -> tuple[Float[Tensor, "centres features"], Int[Tensor, " centres"]]:
    """K-means centres of each class, by scikit-learn; with one for each class they are the class means.

    Args:
        features: what nearness is measured in.
        labels: class numbers.
        per_class: clusters of each class, >= 1.
        seed: of K-means.

    Returns:
        The centres, class by class in order of the class numbers, and their classes.

    Raises:
        ValueError: if per_class < 1, the lengths differ, or a class has fewer samples.

    Examples:
        >>> features = torch.tensor([[0.0], [2.0], [7.0], [9.0]])
        >>> kmeans_centres(features, torch.tensor([0, 0, 1, 1]), 1)
        (tensor([[1.],
                [8.]]), tensor([0, 1]))
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rows = full_precision(features).detach()
    centres = []
    for own in _members(rows, labels, per_class):
        model = KMeans(per_class, n_init=3, random_state=seed)
        with warnings.catch_warnings():
            # Fewer distinct samples than clusters give centres twice, which is no trouble here.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows[own].cpu().double().numpy())
        centres.append(torch.from_numpy(model.cluster_centers_).to(rows))
    return torch.cat(centres), labels.unique().repeat_interleave(per_class)


def kmeans_representatives(
    features: Float[Tensor, "samples features"],
    labels: Int[Tensor, " samples"],
    per_class: int,
    seed: int = 0,
    centres: Float[Tensor, "centres features"] | None = None,
) -> Int[Tensor, " chosen"]:
    """Samples that stand for their class: a real sample near each of `per_class` K-means centres of the class.

    No sample is taken twice: the samples of a class are assigned to its centres at the least total squared distance. Serves as a
    coreset and for active learning as well.

    Args:
        features: what nearness is measured in, such as an expert's logits.
        labels: class numbers.
        per_class: clusters of each class, >= 1.
        seed: of K-means.
        centres: of `kmeans_centres`, if they are known already.

    Returns:
        Places of the samples, class by class in order of the class numbers.

    Raises:
        ValueError: if per_class < 1, the lengths differ, a class has fewer samples, or the centres are not as many.

    Source:
        Shen, Yang, Lam, 2023, arXiv 2310.10541 (whose code has ten clusters always, and takes nothing for one image per class).

    Examples:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.4], [9.5]])
        >>> kmeans_representatives(features, torch.zeros(6, dtype=torch.int64), 2).sort().values
        tensor([1, 4])
    """
    from scipy.optimize import linear_sum_assignment

    rows = full_precision(features).detach()
    members = _members(rows, labels, per_class)
    if centres is None:
        centres, _ = kmeans_centres(rows, labels, per_class, seed)
    if centres.shape != (len(members) * per_class, rows.shape[1]):
        wanted = (len(members) * per_class, rows.shape[1])
        raise ValueError(f"centres must have shape {wanted}, got {tuple(centres.shape)}")
    chosen = []
    for own, means in zip(members, centres.split(per_class)):
        distances = torch.cdist(means, rows[own]).square()
        _, nearest = linear_sum_assignment(distances.cpu().numpy())
        chosen.append(own[torch.from_numpy(nearest).to(own.device)])
    return torch.cat(chosen)


def random_representatives(
    labels: Int[Tensor, " samples"], per_class: int, generator: torch.Generator | None = None
) -> Int[Tensor, " chosen"]:
    """Random samples, as many of each class.

    Args:
        labels: class numbers.
        per_class: of each class, >= 1.
        generator: on the CPU.

    Returns:
        Places of the samples, class by class in order of the class numbers.

    Raises:
        ValueError: if per_class < 1, or a class has fewer samples.

    Examples:
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> labels[random_representatives(labels, 1)]
        tensor([0, 1])
    """
    members = _members(labels, labels, per_class)
    return torch.cat(
        [own[torch.randperm(len(own), generator=generator)[:per_class].to(own.device)] for own in members]
    )


def _members(rows: Tensor, labels: Tensor, per_class: int) -> list[Tensor]:
    """Places of the samples of each class."""
    if per_class < 1:
        raise ValueError(f"per_class must be >= 1, got {per_class}")
    if len(rows) != len(labels):
        raise ValueError(f"labels must be one for each of the {len(rows)} samples, got {len(labels)}")
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    if not members:
        raise ValueError("labels must hold at least one sample, got none")
    fewest = min(len(own) for own in members)
    if fewest < per_class:
        raise ValueError(f"per_class must be <= {fewest}, the samples of the smallest class, got {per_class}")
    return members
