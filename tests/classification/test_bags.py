"""Facts about bags: how they are drawn, kept whole in batches, and released under differential privacy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.classification import (
    BagSampler,
    LaplaceBagRelease,
    bag_dataset,
    nearest_proportions,
    random_bags,
)
from coloss.data import Loader


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_no_bag_is_smaller_than_asked_and_sizes_differ_by_one_at_most_where_they_can(
    samples: int, size: int, seed: int
) -> None:
    if samples < size:
        with pytest.raises(ValueError, match=f"at least one bag of {size}, got {samples}"):
            random_bags(samples, size)
        return
    counts = random_bags(samples, size, seeded(seed)).bincount()
    assert len(counts) == samples // size
    assert size <= counts.min() <= counts.max() <= counts.min() + 1
    assert counts.sum() == samples


def test_bags_are_drawn_by_the_generator() -> None:
    first, again, other = (random_bags(100, 4, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 8), st.booleans())
def test_each_epoch_holds_every_bag_whole_and_once(bags: list[int], count: int, drop: bool) -> None:
    index = torch.tensor(bags)
    distinct = len(set(bags))
    if drop and distinct < count:
        with pytest.raises(ValueError, match="bags_per_batch must be <="):
            BagSampler(index, count, drop)
        return
    sampler = BagSampler(index, count, drop)
    batches = list(sampler.batches(seeded()))
    assert len(batches) == len(sampler) == (distinct // count if drop else math.ceil(distinct / count))
    seen = torch.cat(batches)
    assert len(seen.unique()) == len(seen)
    for batch in batches:
        for bag in index[batch].unique():
            assert set((index == bag).nonzero().flatten().tolist()) <= set(batch.tolist())
    if not drop:
        assert len(seen) == len(index)


def test_epochs_differ_and_repeat_by_seed() -> None:
    data = bag_dataset(torch.zeros(40, 1), torch.arange(10.0), torch.arange(40) // 4)
    loader = Loader(data, None, sampler=BagSampler(data.extras["bag"], 3), seed=5)
    first, again, second = ([b.ids.tolist() for b in loader.batches(epoch)] for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(sum(second, [])) == list(range(40))


def test_a_bag_dataset_knows_bags_sizes_and_ids() -> None:
    data = bag_dataset(
        torch.arange(3.0),
        torch.tensor([[0.2, 0.8], [1.0, 0.0]]),
        torch.tensor([1, 0, 1]),
        torch.tensor([7, 8, 9]),
    )
    assert data.targets.tolist() == torch.tensor([[1.0, 0.0], [0.2, 0.8], [1.0, 0.0]]).tolist()
    assert data.extras["bag_size"].tolist() == [2, 1, 2]
    assert data.ids.tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="index must be"):
        bag_dataset(torch.zeros(2), torch.zeros(1), torch.tensor([0, 1]))


def test_the_noise_has_the_variance_of_the_laplace_mechanism() -> None:
    release = LaplaceBagRelease(0.5, 4, clip=3.0, generator=seeded())
    noise, bags = release(torch.zeros(4 * 40_000))
    assert noise.shape == (40_000,)
    assert bags.bincount().unique().tolist() == [4]
    scale = 2 * 3.0 / (4 * 0.5)
    assert release.noise_scale() == scale
    assert noise.var().item() == pytest.approx(2 * scale**2, rel=0.05)
    # Heavier tails than a normal distribution of that variance: P(|noise| > 5 scales) = e^-5.
    assert (noise.abs() > 5 * scale).float().mean().item() == pytest.approx(math.exp(-5), rel=0.2)


@pytest.mark.parametrize(("clip", "num_classes"), [(2.0, None), (None, 4)])
def test_one_changed_label_moves_the_release_by_no_more_than_the_noise_covers(clip, num_classes) -> None:
    labels = torch.randint(4, (103,)) if clip is None else 3 * torch.randn(103)
    other = labels.clone()
    other[5] = (labels[5] + 1) % 4 if clip is None else -100 * labels[5].sign()

    def releases(y):
        options = {"clip": clip, "num_classes": num_classes, "project": False, "generator": seeded(3)}
        return LaplaceBagRelease(1.0, 10, **options)

    (first, bags), (second, same_bags) = (releases(y)(y) for y in (labels, other))
    assert torch.equal(bags, same_bags)
    moved = (first - second).abs().flatten(1).sum(1) if first.ndim > 1 else (first - second).abs()
    assert moved.count_nonzero() == 1
    # Sensitivity / scale = epsilon at most, here in the bag of label 5.
    scale = releases(labels).noise_scale(int((bags == bags[5]).sum()))
    assert 0 < moved.max() <= 1.0 * scale + 1e-5
    if clip is None:
        assert moved.max().item() == pytest.approx(scale, rel=1e-4)


def test_every_release_is_paid_for() -> None:
    release = LaplaceBagRelease(0.1, 2, clip=1.0, total_epsilon=0.3)
    labels = torch.randn(10)
    for count in (1, 2, 3):
        release(labels)
        assert release.spent_epsilon == pytest.approx(0.1 * count)
    with pytest.raises(
        ValueError, match=r"total_epsilon is 0.3, 0.3\d* of it is spent, and a release costs 0.1"
    ):
        release(labels)
    once = LaplaceBagRelease(0.1, 2, clip=1.0)
    once(labels)
    with pytest.raises(ValueError, match="total_epsilon is 0.1"):
        once(labels)


def test_without_noise_to_speak_of_the_release_is_the_clipped_average() -> None:
    labels = torch.tensor([-9.0, 1.0, 0.5, 9.0])
    means, _ = LaplaceBagRelease(1e9, 4, clip=2.0)(labels)
    assert means.item() == pytest.approx((-2 + 1 + 0.5 + 2) / 4, abs=1e-6)
    shares, _ = LaplaceBagRelease(1e9, 4, num_classes=3)(torch.tensor([0, 2, 2, 2]))
    torch.testing.assert_close(shares, torch.tensor([[0.25, 0.0, 0.75]]))


def test_noisy_proportions_are_made_proportions_again() -> None:
    shares, _ = LaplaceBagRelease(0.1, 5, num_classes=6, generator=seeded())(torch.randint(6, (50,)))
    assert shares.min() >= 0
    torch.testing.assert_close(shares.sum(1), torch.ones(10))


@settings(max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.integers(0, 50))
def test_no_other_proportions_are_nearer(values: list[float], seed: int) -> None:
    point = torch.tensor(values, dtype=torch.float64)
    found = nearest_proportions(point)
    assert found.min() >= 0
    assert found.sum().item() == pytest.approx(1)
    others = torch.rand(200, len(values), generator=seeded(seed), dtype=torch.float64).pow(3)
    others = torch.cat([others / others.sum(1, keepdim=True), torch.eye(len(values), dtype=torch.float64)])
    assert (found - point).norm() <= (others - point).norm(dim=1).min() + 1e-9


def test_bad_input_is_named() -> None:
    good = {"epsilon": 1.0, "bag_size": 2, "clip": 1.0}
    for wrong, message in (
        ({"epsilon": 0.0}, "epsilon must be > 0 and finite, got 0.0"),
        ({"bag_size": 0}, "bag_size must be >= 1, got 0"),
        ({"clip": -1.0}, "clip must be > 0 and finite, got -1.0"),
        ({"clip": None}, "either clip or num_classes, got None and None"),
        ({"num_classes": 3}, "either clip or num_classes, got 1.0 and 3"),
        ({"clip": None, "num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"total_epsilon": 0.5}, r"total_epsilon must be >= epsilon \(1.0\), got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            LaplaceBagRelease(**(good | wrong))
    with pytest.raises(ValueError, match="labels must be finite"):
        LaplaceBagRelease(**good)(torch.tensor([1.0, torch.nan]))
    for labels in (torch.tensor([0, 3]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"labels must be whole numbers in \[0, 3\) classes"):
            LaplaceBagRelease(1.0, 2, num_classes=3)(labels)
    with pytest.raises(ValueError, match="bag_size must be >= 1, got 0"):
        random_bags(4, 0)
    with pytest.raises(ValueError, match="bags_per_batch must be >= 1, got 0"):
        BagSampler(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        BagSampler(torch.zeros(0, dtype=torch.int64), 1)
