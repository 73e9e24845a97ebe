"""Label noise and imbalance do what they say to training and validation data, and nothing to the rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.data import Corruption, IndexedDataset, Splits, load, with_imbalance, with_label_noise
from coloss.errors import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def splits(counts, kind="classification"):
    """Samples of each class in each part, in mixed order; ids number all of them."""
    parts, start = [], 0
    for _ in range(3):
        targets = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
        targets = targets[torch.randperm(len(targets), generator=generator(start))]
        ids = torch.arange(start, start + len(targets))
        parts.append(IndexedDataset(ids.float().unsqueeze(1), targets, ids, {"half": ids / 2}))
        start += len(targets)
    return Splits("toy", kind, *parts, (1,), num_classes=len(counts), description="made up")


def same(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(
            (first.inputs, first.targets, first.ids, first.extras["half"]),
            (second.inputs, second.targets, second.ids, second.extras["half"]),
        )
    )


@given(st.integers(0, 999), st.floats(0, 1), st.sampled_from(["symmetric", "pairwise"]), st.integers(2, 6))
def test_the_share_of_wrong_labels_is_the_rate(seed, rate, kind, classes):
    clean = splits([11] * classes)
    noisy = with_label_noise(clean, rate, kind=kind, generator=generator(seed))
    for part in ("train", "validation"):
        before, after = getattr(clean, part), getattr(noisy, part)
        assert int((before.targets != after.targets).sum()) == round(rate * len(before))
        assert 0 <= after.targets.min() <= after.targets.max() < classes
        assert torch.equal(before.ids, after.ids) and before.inputs is after.inputs
        assert torch.equal(before.extras["half"], after.extras["half"])
    assert noisy.test is clean.test


def test_symmetric_noise_reaches_every_other_class_equally():
    clean = splits([3000] * 4)
    noisy = with_label_noise(clean, 0.6, generator=generator())
    pairs = torch.stack([clean.train.targets, noisy.train.targets], 1)
    table = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).view(4, 4) / 3000
    expected = torch.full((4, 4), 0.2).fill_diagonal_(0.4)
    assert (table - expected).abs().max() < 0.03


def test_pairwise_noise_reaches_the_next_class_only():
    clean = splits([50] * 3)
    noisy = with_label_noise(clean, 0.4, kind="pairwise", generator=generator())
    wrong = clean.train.targets != noisy.train.targets
    assert torch.equal(noisy.train.targets[wrong], (clean.train.targets[wrong] + 1) % 3)
    everything = with_label_noise(clean, 1.0, kind="pairwise")
    assert torch.equal(everything.train.targets, (clean.train.targets + 1) % 3)


def test_what_was_given_is_left_as_it_was():
    clean = splits([20, 20])
    before = clean.train.targets.clone()
    noisy = with_label_noise(clean, 0.5, generator=generator())
    rare = with_imbalance(clean, 0.1, generator=generator())
    assert torch.equal(clean.train.targets, before) and len(clean.train) == 40
    assert with_label_noise(clean, 0.0) is clean and with_imbalance(clean, 1.0) is clean
    assert noisy.description == "made up; 50% of the labels wrong (symmetric)"
    assert rare.description == "made up; rarest class at 0.1 of the most frequent (long-tailed)"


def test_the_generator_decides():
    clean = splits([30, 20, 30])
    for change in (with_label_noise, with_imbalance):
        first, again, other = (change(clean, 0.3, generator=generator(seed)).train for seed in (0, 0, 1))
        assert same(first, again)
        assert not torch.equal(first.ids, other.ids) or not torch.equal(first.targets, other.targets)


def test_validation_data_can_be_left_clean():
    clean = splits([30, 20])
    for change in (with_label_noise, with_imbalance):
        changed = change(clean, 0.3, parts=["train"], generator=generator())
        assert changed.validation is clean.validation and changed.test is clean.test
        assert changed.train is not clean.train
        changed = change(clean, 0.3, parts=["validation"], generator=generator())
        assert changed.train is clean.train and changed.validation is not clean.validation


@pytest.mark.parametrize(
    ("counts", "ratio", "kind", "expected"),
    [
        ([100, 100], 0.05, "long-tailed", [100, 5]),
        ([100, 100], 0.05, "step", [100, 5]),
        ([40, 100], 0.05, "long-tailed", [5, 100]),  # the rarer class gets rarer
        ([100, 100, 100], 0.01, "long-tailed", [100, 10, 1]),
        ([100, 100, 100], 0.01, "step", [100, 100, 1]),
        ([100, 100, 100, 100], 0.1, "step", [100, 100, 10, 10]),
        ([80, 100, 90], 0.25, "long-tailed", [25, 100, 50]),
        ([100, 3], 0.05, "long-tailed", [100, 3]),  # rare enough already
        ([100, 100], 0.001, "long-tailed", [100, 1]),  # one sample is left
    ],
)
def test_classes_keep_their_share_of_the_most_frequent(counts, ratio, kind, expected):
    full = splits(counts)
    rare = with_imbalance(full, ratio, kind=kind, generator=generator())
    assert rare.train.targets.bincount().tolist() == expected
    assert rare.validation.targets.bincount().tolist() == expected
    assert rare.test is full.test and rare.num_classes == full.num_classes


def test_the_samples_that_are_left_keep_id_and_order():
    full = splits([60, 50, 40])
    rare = with_imbalance(full, 0.1, generator=generator()).train
    rows = rare.ids - full.train.ids[0]
    assert bool((rows.diff() > 0).all())
    assert same(rare, full.train.subset(rows))


def test_real_data():
    full = load("digits")
    rare = with_imbalance(full, 0.1, generator=generator())
    counts = rare.train.targets.bincount().sort(descending=True).values
    largest = int(full.train.targets.bincount().max())
    assert counts.tolist() == [round(largest * 0.1 ** (place / 9)) for place in range(10)]
    both = Corruption(0.4, "symmetric", 0.1, "long-tailed").apply(full, seed=3)
    assert torch.equal(both.train.targets.bincount().sum(), counts.sum())
    known = dict(zip(full.train.ids.tolist(), full.train.targets.tolist()))
    wrong = sum(known[i] != t for i, t in zip(both.train.ids.tolist(), both.train.targets.tolist()))
    assert wrong == round(0.4 * len(both.train))


def test_a_corruption_is_drawn_by_its_seed():
    clean, change = splits([30, 30]), Corruption(label_noise=0.3, imbalance=0.5)
    assert same(change.apply(clean, 1).train, change.apply(clean, 1).train)
    assert not torch.equal(change.apply(clean, 1).train.ids, change.apply(clean, 2).train.ids)
    assert Corruption().apply(clean, 0) is clean and Corruption().description == ""
    assert Corruption(0.125, "pairwise").description == "12.5% of the training labels pairwise wrong"
    assert (
        Corruption(imbalance=0.05, imbalance_kind="step").description
        == "rarest class at 0.05 of the most frequent, in a step"
    )


def test_without_a_generator_the_global_randomness_draws():
    clean = splits([30, 30])
    torch.manual_seed(4)
    first = with_label_noise(clean, 0.3)
    torch.manual_seed(4)
    assert same(first.train, with_label_noise(clean, 0.3).train)
    assert not torch.equal(first.train.targets, with_label_noise(clean, 0.3).train.targets)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(InputError, match=rf"label noise must be in \[0, 1\], got {value}"):
        with_label_noise(splits([4, 4]), value)
    with pytest.raises(InputError, match=rf"imbalance must be in \(0, 1\], got {value}"):
        with_imbalance(splits([4, 4]), value)
    with pytest.raises(InputError, match="must be in"):
        Corruption(label_noise=value).apply(splits([4, 4]), 0)


@pytest.mark.usefixtures("as_users_call")
def test_other_bad_input_is_refused():
    with pytest.raises(InputError, match=r"imbalance must be in \(0, 1\], got 0"):
        with_imbalance(splits([4, 4]), 0.0)
    with pytest.raises(InputError, match="label noise must be symmetric or pairwise, got 'uniform'"):
        with_label_noise(splits([4, 4]), 0.1, kind="uniform")
    with pytest.raises(InputError, match="imbalance must be long-tailed or step, got 'linear'"):
        with_imbalance(splits([4, 4]), 0.1, kind="linear")
    with pytest.raises(InputError, match=r"parts must be of train and validation, got \['test'\]"):
        with_label_noise(splits([4, 4]), 0.1, parts=["test"])
    with pytest.raises(InputError, match="label noise needs at least 2 classes, toy has 1"):
        with_label_noise(splits([4]), 0.1)
    with pytest.raises(InputError, match="label noise is for classification, toy is a regression set"):
        with_label_noise(splits([4, 4], "regression"), 0.1)
    with pytest.raises(InputError, match="imbalance is for classification, diabetes is a regression set"):
        with_imbalance(load("diabetes"), 0.1)
    with pytest.raises(InputError, match="label noise and imbalance are for classification"):
        Corruption(label_noise=0.1).apply(load("diabetes"), 0)
