"""Splits made harder on purpose: wrong labels, rare classes.

Training and validation data are changed, test data never: what a user tunes on comes from the same source as what is trained on,
while the reported number is that of clean data in their own class shares. Samples keep their ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from coloss.data.dataset import IndexedDataset, Splits
from coloss.errors import InputError

NoiseKind = Literal["symmetric", "pairwise"]
ImbalanceKind = Literal["long-tailed", "step"]
Part = Literal["train", "validation"]

NOISE_KINDS: tuple[NoiseKind, ...] = ("symmetric", "pairwise")
IMBALANCE_KINDS: tuple[ImbalanceKind, ...] = ("long-tailed", "step")


def with_label_noise(
    splits: Splits,
    rate: float,
    *,
    kind: NoiseKind = "symmetric",
    parts: Sequence[Part] = ("train", "validation"),
    generator: torch.Generator | None = None,
) -> Splits:
    """The same splits with a share of the labels wrong, as annotators or crawlers leave them.

    Of each part round(rate * samples) samples, drawn at random, get another class: any of the others with equal chance
    (`"symmetric"`), or the next one by number, the last becoming the first (`"pairwise"`, where the wrong labels agree with each
    other and are harder to resist). From a rate of 1 - 1 / classes, pairwise 1/2, the right class is no longer the most frequent.

    Args:
        splits: of a classification; left as they are.
        rate: share of the labels that become wrong, in [0, 1].
        kind: `"symmetric"` or `"pairwise"`.
        parts: what is changed. Validation data are, since clean labels to tune on are what a user with noisy data does not have.
        generator: of the draw; default: torch's global one.

    Returns:
        Splits that share all inputs with the given ones.

    Raises:
        InputError: if the splits are no classification, or a value is out of range.

    Source:
        Symmetric and pair flips as in Han et al., 2018, arXiv 1804.06872 (Co-teaching).

    Examples:
        >>> from coloss.data import load
        >>> clean = load("digits")
        >>> noisy = with_label_noise(clean, 0.4, generator=torch.Generator().manual_seed(0))
        >>> wrong = noisy.train.targets != clean.train.targets
        >>> round(float(wrong.float().mean()), 3), bool((noisy.test.targets == clean.test.targets).all())
        (0.4, True)
    """
    classes = _check(splits, "label noise", parts)
    if not 0 <= rate <= 1:
        raise InputError(f"label noise must be in [0, 1], got {rate}")
    if kind not in NOISE_KINDS:
        raise InputError(f"the kind of label noise must be {' or '.join(NOISE_KINDS)}, got {kind!r}")
    if rate == 0:
        return splits
    changed: dict[str, Any] = {}
    for part in ("train", "validation"):
        if part not in parts:
            continue
        dataset = getattr(splits, part)
        count = len(dataset)
        rows = torch.randperm(count, generator=generator)[: round(rate * count)]
        shift = torch.ones(len(rows), dtype=torch.int64)
        if kind == "symmetric":
            shift = torch.randint(1, classes, (len(rows),), generator=generator)
        targets = _targets(dataset).clone()
        targets[rows] = (targets[rows] + shift) % classes
        changed[part] = IndexedDataset(dataset.inputs, targets, dataset.ids, dataset.extras)
    return replace(
        splits, **changed, description=_described(splits, f"{rate:.0%} of the labels wrong ({kind})")
    )


def with_imbalance(
    splits: Splits,
    ratio: float,
    *,
    kind: ImbalanceKind = "long-tailed",
    parts: Sequence[Part] = ("train", "validation"),
    generator: torch.Generator | None = None,
) -> Splits:
    """The same splits with rare classes: samples of some classes are left out until the rarest has `ratio` times the most frequent.

    Classes are taken in the order of their frequency in the training data (of equally frequent ones that with the smaller number
    counts as more frequent), c = 0, 1, ..., C - 1. With n the samples of the most frequent class, class c keeps at most

        n * ratio^(c / (C - 1))                                  "long-tailed"
        n for the first half of the classes, then n * ratio      "step"

    of its samples, at least one. For two classes both reduce the rarer one to `ratio` times the other.

    Args:
        splits: of a classification; left as they are.
        ratio: in (0, 1], the inverse of what is called imbalance factor.
        kind: `"long-tailed"` or `"step"`.
        parts: what is changed; each part by its own n.
        generator: of the draw; default: torch's global one.

    Returns:
        Splits of the samples that are left, in the order they had.

    Raises:
        InputError: if the splits are no classification, or a value is out of range.

    Source:
        Cui et al., 2019, arXiv 1901.05555 (long-tailed); Buda et al., 2018, arXiv 1710.05381 (step).

    Examples:
        >>> from coloss.data import load
        >>> full = load("breast-cancer")
        >>> rare = with_imbalance(full, 0.05, generator=torch.Generator().manual_seed(0))
        >>> full.train.targets.bincount().tolist(), rare.train.targets.bincount().tolist()
        ([127, 214], [11, 214])
    """
    classes = _check(splits, "imbalance", parts)
    if not 0 < ratio <= 1:
        raise InputError(f"imbalance must be in (0, 1], got {ratio}")
    if kind not in IMBALANCE_KINDS:
        raise InputError(f"the kind of imbalance must be {' or '.join(IMBALANCE_KINDS)}, got {kind!r}")
    if ratio == 1:
        return splits
    order = torch.bincount(_targets(splits.train), minlength=classes).argsort(descending=True, stable=True)
    changed: dict[str, Any] = {}
    for part in ("train", "validation"):
        if part not in parts:
            continue
        dataset = getattr(splits, part)
        targets = _targets(dataset)
        counts = torch.bincount(targets, minlength=classes)
        largest = int(counts.max()) if len(counts) else 0
        kept = []
        for place, number in enumerate(order.tolist()):
            share = ratio ** (
                place / (classes - 1) if kind == "long-tailed" else float(place >= classes - classes // 2)
            )
            members = (targets == number).nonzero().squeeze(1)
            wanted = max(round(largest * share), 1)
            kept.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
        changed[part] = dataset.subset(torch.cat(kept).sort().values)
    note = f"rarest class at {ratio:g} of the most frequent ({kind})"
    return replace(splits, **changed, description=_described(splits, note))


@dataclass(frozen=True)
class Corruption:
    """What to do to the training and validation data of a classification: rare classes first, then wrong labels.

    Args:
        label_noise: share of wrong labels, in [0, 1].
        noise_kind: `"symmetric"` or `"pairwise"`.
        imbalance: rarest class's share of the most frequent one, in (0, 1].
        imbalance_kind: `"long-tailed"` or `"step"`.

    Examples:
        >>> Corruption(label_noise=0.4, imbalance=0.1).description
        '40% of the training labels wrong, rarest class at 0.1 of the most frequent'
    """

    label_noise: float = 0.0
    noise_kind: NoiseKind = "symmetric"
    imbalance: float = 1.0
    imbalance_kind: ImbalanceKind = "long-tailed"

    @property
    def description(self) -> str:
        """What it does, in words; empty if nothing."""
        pairwise = " pairwise" if self.noise_kind == "pairwise" else ""
        step = ", in a step" if self.imbalance_kind == "step" else ""
        noise = (
            f"{self.label_noise * 100:g}% of the training labels{pairwise} wrong" if self.label_noise else ""
        )
        rare = f"rarest class at {self.imbalance:g} of the most frequent{step}" if self.imbalance != 1 else ""
        return ", ".join(text for text in (noise, rare) if text)

    def apply(self, splits: Splits, seed: int) -> Splits:
        """The splits made harder, all draws by a seed.

        Raises:
            InputError: if the splits are no classification, or a value is out of range.
        """
        _check(splits, "label noise and imbalance", ())
        generator = torch.Generator().manual_seed((seed + 1) * 32_452_843)
        if self.imbalance != 1:
            splits = with_imbalance(splits, self.imbalance, kind=self.imbalance_kind, generator=generator)
        if self.label_noise != 0:
            splits = with_label_noise(splits, self.label_noise, kind=self.noise_kind, generator=generator)
        return splits


def _check(splits: Splits, what: str, parts: Sequence[str]) -> int:
    if splits.kind != "classification" or splits.num_classes is None:
        verb = "are" if " and " in what else "is"
        raise InputError(f"{what} {verb} for classification, {splits.name} is a {splits.kind} set")
    if splits.num_classes < 2:
        raise InputError(f"{what} needs at least 2 classes, {splits.name} has {splits.num_classes}")
    if not set(parts) <= {"train", "validation"}:
        raise InputError(f"parts must be of train and validation, got {list(parts)}")
    return splits.num_classes


def _targets(dataset: IndexedDataset) -> Tensor:
    assert isinstance(dataset.targets, Tensor)  # as every classification has
    return dataset.targets


def _described(splits: Splits, note: str) -> str:
    return f"{splits.description}; {note}" if splits.description else note
