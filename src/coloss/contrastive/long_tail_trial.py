"""How temperatures of samples are held against the frequency of their class: digits with a long tail, and as many without one."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coloss.data import IndexedDataset, Splits, load, with_imbalance
from coloss.errors import InputError
from coloss.metrics import extract_features, knn_probe, linear_probe, rank_correlation
from coloss.ops import segment_mean
from coloss.train import Fit, Method, Setting

CLASSES, PER_CLASS, RATIO = 10, 100, 0.08


def long_tailed_digits(seed: int) -> Splits:
    """100, 76, 57 ... 8 training images of the ten digits, 0 the most frequent class; all other images of all digits are the test part.

    Which digit is which class is drawn by the seed, so that frequency and shape are not confounded.

    Examples:
        >>> splits = long_tailed_digits(0)
        >>> splits.train.targets.bincount().tolist(), len(splits.test)
        ([100, 76, 57, 43, 33, 25, 19, 14, 11, 8], 797)
    """
    full = _relabelled(seed)
    generator = torch.Generator().manual_seed(seed)
    return with_imbalance(full, RATIO, parts=("train",), generator=generator)


def balanced_digits(seed: int) -> Splits:
    """As many training images as `long_tailed_digits` has, up to nine fewer, equally many of each class; the same test images.

    Examples:
        >>> balanced_digits(0).train.targets.bincount().tolist()
        [38, 38, 38, 38, 38, 38, 38, 38, 38, 38]
    """
    full = _relabelled(seed)
    each = len(long_tailed_digits(seed).train) // CLASSES
    places = torch.cat([_of_class(full.train, label)[:each] for label in range(CLASSES)])
    return replace(full, train=full.train.subset(places))


def measure_arms(
    setting: Setting,
    arms: Mapping[str, Callable[[], Method]],
    balanced: Mapping[str, Callable[[], Method]],
) -> dict[str, dict[str, float]]:
    """Train every arm with one seed and measure it.

    Args:
        setting: on `long_tailed_digits`.
        arms: trained on the long tail.
        balanced: trained on as many images without a tail.

    Returns:
        For each arm `balanced_accuracy` and `tail_accuracy` (of the five rarest classes) of a linear probe with the arm's training labels,
        `knn`; and of a method with temperatures of samples `frequency_correlation`: Spearman's, between a class' frequency in the
        long tail and the mean temperature of its samples.
    """
    plain = replace(setting, splits=balanced_digits(setting.seed))
    frequency = _targets(setting.splits.train).bincount(minlength=CLASSES)
    found = {}
    for place, named in ((setting, arms), (plain, balanced)):
        for name, build in named.items():
            method = build()
            run = place.fit(place.new_model(), methods=[method])
            found[name] = _probed(run, place.splits) | _correlation(method, place.splits.train, frequency)
    return found


def _probed(run: Fit, splits: Splits) -> dict[str, float]:
    features, targets = extract_features(run.model.eval(), splits.train)
    test, truth = extract_features(run.model, splits.test)
    assert isinstance(targets, Tensor) and isinstance(truth, Tensor)
    probe = linear_probe(features, targets, test, truth)
    right = segment_mean((probe.predictions == truth).double(), truth, CLASSES)
    return {
        "balanced_accuracy": float(right.mean()),
        "tail_accuracy": float(right[CLASSES // 2 :].mean()),
        "knn": knn_probe(features, targets, test, truth, k=5).accuracy,
    }


def _correlation(method: Method, train: IndexedDataset, frequency: Tensor) -> dict[str, float]:
    loss = getattr(method, "loss", None)
    if loss is None or not loss.individual:
        return {}
    means = segment_mean(loss.temperatures(train.ids), _targets(train), CLASSES)
    return {
        "frequency_correlation": rank_correlation(frequency, means),
        "mean_temperature": float(means.mean()),
        "at_bounds": loss.stats()["at_bounds"],
    }


def _relabelled(seed: int) -> Splits:
    """Digits under permuted class numbers, 100 of each for training, the others for the test."""
    splits = load("digits", seed=seed)
    if not isinstance(splits, Splits):
        raise InputError("digits must be a classification set")
    parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")
    )
    generator = torch.Generator().manual_seed(seed)
    everything = IndexedDataset(inputs, torch.randperm(CLASSES, generator=generator)[targets], ids)
    everything = everything.subset(torch.randperm(len(ids), generator=generator))
    of_classes = [_of_class(everything, label) for label in range(CLASSES)]
    return replace(
        splits,
        train=everything.subset(torch.cat([places[:PER_CLASS] for places in of_classes])),
        validation=everything.subset(torch.zeros(0, dtype=torch.int64)),
        test=everything.subset(torch.cat([places[PER_CLASS:] for places in of_classes])),
    )


def _of_class(data: IndexedDataset, label: int) -> Tensor:
    return (_targets(data) == label).nonzero().flatten()


def _targets(data: IndexedDataset) -> Tensor:
    assert isinstance(data.targets, Tensor)
    return data.targets
