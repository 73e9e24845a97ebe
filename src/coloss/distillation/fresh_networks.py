"""What a small training set is worth: fresh networks trained on it to the end, and their final accuracy on real test images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits
from coloss.distillation.distillation_networks import distillation_network, named_augmentation, seeded
from coloss.distillation.distilled_dataset import DistilledDataset
from coloss.distillation.expert_trajectories import Augment
from coloss.distillation.representatives import (
    kmeans_centres,
    kmeans_representatives,
    random_representatives,
)
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier, mean_interval
from coloss.ops import soft_cross_entropy_loss
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.outcome import NonFiniteLossError
from coloss.train.state import State

NewNetwork = Callable[[], nn.Module]
Progress = Callable[[float], None]

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What a set without a learning rate of its own chooses from, by validation accuracy."""

REFERENCES = ("random", "kmeans", "means", "whole")
"""Sets of real images that `evaluate_references` knows."""

_BATCH_SIZE = 128


@dataclass(frozen=True)
class FreshAccuracy:
    """Final test accuracy of several fresh networks.

    Args:
        values: one for each network.
        learning_rate: they were trained with.
        mean: of the values.
        interval: 95% (low, high) of the mean; None for one network.
    """

    values: tuple[float, ...]
    learning_rate: float
    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float], learning_rate: float) -> "FreshAccuracy":
        """Mean and interval of values.

        Examples:
            >>> FreshAccuracy.of([0.5, 0.7], 0.1).mean
            0.6
        """
        found = mean_interval(list(values))
        return cls(tuple(values), learning_rate, found.mean, found.interval)


def train_on_distilled(
    distilled: DistilledDataset | str | Path,
    network: NewNetwork | None = None,
    *,
    steps: int = 300,
    seed: int = 0,
) -> nn.Module:
    """A fresh network of any architecture, trained on a distilled data set with its own learning rate, momentum and augmentation.

    Args:
        distilled: the data set, or the path of its file.
        network: builds it; default: `distillation_network`. It sees images as `DistilledDataset.normalize` gives them.
        steps: of SGD, on at most 128 images each.
        seed: of the initial weights, the order and the augmentation.

    Returns:
        The network after the last step, in evaluation mode.

    Raises:
        InputError: for a file that cannot be read.
        NonFiniteLossError: that names the learned rate, if it diverges, as an architecture may for which that rate is too high.

    Examples:
        >>> stats = (torch.zeros(1), torch.ones(1))
        >>> distilled = DistilledDataset(torch.eye(2), torch.eye(2), 0.5, 0.0, *stats, "two points", 0, 1)
        >>> model = train_on_distilled(distilled, lambda: nn.Linear(2, 2), steps=20)
        >>> model(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    if not isinstance(distilled, DistilledDataset):
        distilled = DistilledDataset.load(distilled)
    shape, classes = distilled.images.shape[1:], distilled.num_classes
    try:
        return train_fresh(
            distilled.images,
            distilled.labels,
            network or partial(distillation_network, shape, classes),
            learning_rate=distilled.learning_rate,
            momentum=distilled.momentum,
            augment=named_augmentation(distilled.augmentation),
            steps=steps,
            seed=seed,
        )
    except NonFiniteLossError as error:
        raise NonFiniteLossError(
            f"a network diverged at the learned rate {distilled.learning_rate:g}: {error}"
        ) from error


def evaluate_distilled(
    distilled: DistilledDataset | str | Path,
    splits: Splits,
    network: NewNetwork | None = None,
    *,
    networks: int = 5,
    steps: int = 300,
    seed: int = 0,
) -> FreshAccuracy:
    """Test accuracy of fresh networks trained on a distilled data set: that of the last step, never the best one on test data.

    Args:
        distilled: the data set, or the path of its file.
        splits: real data as `coloss.data.load` gives them; only the test part is looked at.
        network, steps: as of `train_on_distilled`.
        networks: how many, seeds `seed`, `seed + 1`, ...; >= 1.
        seed: of the first.

    Returns:
        The accuracies; that of a network which diverges is 0.

    Raises:
        InputError: for splits of another shape or other classes, or networks < 1.

    Examples:
        >>> from coloss.data import load
        >>> splits = load("iris")
        >>> rows = torch.tensor([int((splits.train.targets == k).nonzero()[0]) for k in range(3)])
        >>> stats = (torch.zeros(1), torch.ones(1))
        >>> three = DistilledDataset(splits.train.inputs[rows], torch.eye(3), 0.1, 0.0, *stats, "iris", 0, 1)
        >>> found = evaluate_distilled(three, splits, networks=2, steps=20)
        >>> found.mean > 0.6, len(found.values)
        (True, 2)
    """
    if not isinstance(distilled, DistilledDataset):
        distilled = DistilledDataset.load(distilled)
    wanted = (tuple(splits.input_shape), splits.num_classes)
    if wanted != (tuple(distilled.images.shape[1:]), distilled.num_classes):
        raise InputError(
            f"splits must be of shape {tuple(distilled.images.shape[1:])} with {distilled.num_classes} classes "
            f"as the distilled images are, got {wanted[0]} with {wanted[1]}"
        )
    test = normalized(splits.test, distilled.normalize)
    values = [
        _accuracy(partial(train_on_distilled, distilled, network, steps=steps, seed=one), test)
        for one in _seeds(networks, seed)
    ]
    return FreshAccuracy.of(values, distilled.learning_rate)


def evaluate_references(
    distilled: DistilledDataset,
    splits: Splits,
    network: NewNetwork | None = None,
    *,
    names: Sequence[str] = REFERENCES,
    networks: int = 5,
    steps: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, FreshAccuracy]:
    """What a distilled data set must be seen beside: fresh networks trained as long on real images.

    Each set chooses its learning rate from `LEARNING_RATES` by the validation accuracy of one network; momentum and augmentation are those
    of the distilled set.

    Args:
        distilled: says how many images a class, and how to train.
        splits: the real data.
        network, networks, steps, seed: as of `evaluate_distilled`.
        names: "random" (random real images, drawn anew for each network), "kmeans" (real images near K-means centres of the pixels),
            "means" (the centres themselves; with one image a class the class means), "whole" (the whole training part).
        progress: called with the share done.

    Returns:
        The accuracies by name; that of a network which diverges is 0.

    Raises:
        InputError: for an unknown name, networks < 1, or a class with too few images.
    """
    train = normalized(splits.train, distilled.normalize)
    validation = normalized(splits.validation, distilled.normalize)
    test = normalized(splits.test, distilled.normalize)
    assert isinstance(train.inputs, Tensor) and isinstance(train.targets, Tensor)
    chosen = _references(names, train.inputs, train.targets, distilled)
    build = network or partial(distillation_network, distilled.images.shape[1:], distilled.num_classes)
    fit_options: dict[str, Any] = {
        "momentum": distilled.momentum,
        "augment": named_augmentation(distilled.augmentation),
        "steps": steps,
    }
    found: dict[str, FreshAccuracy] = {}
    done, total = 0, len(names) * (len(LEARNING_RATES) + networks)
    for name in names:

        def accuracy(rate: float, one: int, part: IndexedDataset, name: str = name) -> float:
            nonlocal done
            train_one = partial(
                train_fresh, *chosen(name, one), build, learning_rate=rate, seed=one, **fit_options
            )
            value = _accuracy(train_one, part)
            done += 1
            if progress is not None:
                progress(done / total)
            return value

        rates = {rate: accuracy(rate, seed, validation) for rate in LEARNING_RATES}
        best = max(rates, key=lambda rate: rates[rate])
        found[name] = FreshAccuracy.of([accuracy(best, one, test) for one in _seeds(networks, seed)], best)
    return found


def train_fresh(
    images: Float[Tensor, "samples *shape"],
    labels: Float[Tensor, "samples classes"],
    network: NewNetwork,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    augment: Augment | None = None,
    steps: int = 300,
    seed: int = 0,
) -> nn.Module:
    """A fresh network trained by SGD on images with class probabilities, in evaluation mode.

    Args:
        images: on the scale that it shall see.
        labels: probabilities of each class.
        network: builds it.
        learning_rate, momentum: of SGD.
        augment: of the images of a step.
        steps: >= 1, of at most 128 images.
        seed: of everything random.

    Raises:
        NonFiniteLossError: if it diverges.

    Examples:
        >>> model = train_fresh(
        ...     torch.eye(2), torch.eye(2), lambda: nn.Linear(2, 2), learning_rate=0.5, steps=20
        ... )
        >>> model(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    run = fit(
        seeded(network, seed),
        IndexedDataset(images, labels),
        soft_cross_entropy_loss,
        [_Augmented(augment)] if augment is not None else [],
        budget=Budget(steps=steps),
        optimizer=partial(torch.optim.SGD, lr=learning_rate, momentum=momentum),
        batch_size=min(_BATCH_SIZE, len(images)),
        log_every=steps,
        seed=seed,
    )
    return run.model.eval()


def normalized(part: IndexedDataset, normalize: Callable[[Tensor], Tensor]) -> IndexedDataset:
    """A data set whose inputs were brought to another scale; ids and targets stay.

    Examples:
        >>> normalized(IndexedDataset(torch.ones(2, 3)), lambda raw: raw / 2).inputs[0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    assert isinstance(part.inputs, Tensor)
    return IndexedDataset(normalize(part.inputs), part.targets, part.ids, part.extras)


class _Augmented(Method):
    """Augments the inputs of every batch."""

    def __init__(self, augment: Augment) -> None:
        super().__init__()
        self.augment = augment

    def on_batch(self, state: State) -> None:
        state.batch.inputs = self.augment(state.batch.inputs, state.local_generator)


def _accuracy(train: Callable[[], nn.Module], part: IndexedDataset) -> float:
    """Accuracy of a network to be trained; 0 if it diverges."""
    try:
        return evaluate_classifier(train(), part)["accuracy"]
    except NonFiniteLossError:
        return 0.0


def _references(
    names: Sequence[str], images: Tensor, targets: Tensor, distilled: DistilledDataset
) -> Callable[[str, int], tuple[Tensor, Tensor]]:
    """Sets of real images by name and seed, each made once."""
    for name in names:
        if name not in REFERENCES:
            raise InputError(f"names must be of {', '.join(REFERENCES)}, got {name!r}")
    count, pixels = distilled.images_per_class, images.flatten(1)

    @cache
    def centres() -> tuple[Tensor, Tensor]:
        return kmeans_centres(pixels, targets, count)

    @cache
    def chosen(name: str, seed: int) -> tuple[Tensor, Tensor]:
        if name == "whole":
            return images, targets
        if name == "means":
            means, labels = centres()
            return means.view(-1, *images.shape[1:]).to(images), labels
        if name == "random":
            rows = random_representatives(targets, count, torch.Generator().manual_seed(seed))
        else:
            rows = kmeans_representatives(pixels, targets, count, centres=centres()[0])
        return images[rows], targets[rows]

    def labelled(name: str, seed: int) -> tuple[Tensor, Tensor]:
        try:
            found, labels = chosen(name, seed if name == "random" else 0)
        except ValueError as error:
            raise InputError(str(error)) from error
        return found, torch.nn.functional.one_hot(labels, distilled.num_classes).float()

    return labelled


def as_metrics(found: Mapping[str, FreshAccuracy]) -> dict[str, float]:
    """Means and bounds under flat names.

    Examples:
        >>> as_metrics({"random": FreshAccuracy.of([0.5, 0.5], 0.1)})
        {'random_accuracy': 0.5, 'random_accuracy_low': 0.5, 'random_accuracy_high': 0.5}
    """
    metrics = {}
    for name, one in found.items():
        metrics[f"{name}_accuracy"] = one.mean
        if one.interval is not None:
            metrics[f"{name}_accuracy_low"], metrics[f"{name}_accuracy_high"] = one.interval
    return metrics


def _seeds(networks: int, seed: int) -> range:
    if networks < 1:
        raise InputError(f"networks must be >= 1, got {networks}")
    return range(seed, seed + networks)
