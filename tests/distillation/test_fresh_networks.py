"""What a small set is worth: the last step counts, rates are chosen without test data, divergence is a score of 0."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from coloss.data import IndexedDataset, Splits, load
from coloss.distillation import (
    DistilledDataset,
    evaluate_distilled,
    evaluate_references,
    fresh_networks,
    random_representatives,
    train_on_distilled,
)
from coloss.errors import InputError
from coloss.nn import MLP
from coloss.train import NonFiniteLossError


@pytest.fixture(scope="module")
def blobs() -> Splits:
    """Two classes far apart, as 8 x 8 images."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 2
    images = 0.1 * torch.randn(60, 1, 8, 8, generator=generator) + targets[:, None, None, None]
    parts = [IndexedDataset(images[rows], targets[rows], rows) for rows in torch.arange(60).split(20)]
    return Splits("blobs", "classification", *parts, input_shape=(1, 8, 8), num_classes=2)


def two_points() -> DistilledDataset:
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    half = torch.full((1, 1, 1), 0.5)
    return DistilledDataset(2 * images - 1, torch.eye(2), 0.2, 0.0, half, half, "blobs", 3, 1)


def test_any_architecture_trains_from_a_file_and_the_last_step_counts(blobs: Splits, tmp_path: Path) -> None:
    path = two_points().save(tmp_path / "two.npz")
    with_batch_norm = lambda: nn.Sequential(nn.Flatten(), MLP(64, [8], 2))
    found = evaluate_distilled(path, blobs, with_batch_norm, networks=3, steps=40)
    assert found.mean == 1.0
    assert found.interval == (1.0, 1.0)
    assert found.learning_rate == 0.2
    # The network as it is after the last step: one that is trained to the opposite at the end scores 0, whatever came before.
    reversed_labels = replace(two_points(), labels=torch.eye(2).flip(0))
    assert evaluate_distilled(reversed_labels, blobs, with_batch_norm, networks=1, steps=40).mean == 0.0
    one, other = (train_on_distilled(path, steps=5, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert not one.training


def test_references_choose_their_rate_without_a_look_at_test_data(blobs: Splits) -> None:
    found = evaluate_references(two_points(), blobs, networks=1, steps=8)
    assert set(found) == {"random", "kmeans", "means", "whole"}
    assert all(one.mean == 1.0 for one in found.values())
    upside_down = replace(blobs, test=IndexedDataset(blobs.test.inputs, 1 - blobs.test.targets))
    turned = evaluate_references(two_points(), upside_down, names=["random"], networks=1, steps=8)["random"]
    assert turned.mean == 0.0
    assert turned.learning_rate == found["random"].learning_rate
    with pytest.raises(InputError, match="names must be of random, kmeans, means, whole, got 'herding'"):
        evaluate_references(two_points(), blobs, names=["herding"], networks=1, steps=1)
    with pytest.raises(
        InputError, match="per_class must be <= 10, the samples of the smallest class, got 11"
    ):
        evaluate_references(replace(two_points(), images_per_class=11), blobs, networks=1, steps=1)


def test_data_of_another_kind_are_refused_and_a_rate_that_diverges_is_named(blobs: Splits) -> None:
    with pytest.raises(InputError, match=r"splits must be of shape \(1, 8, 8\) with 2 classes"):
        evaluate_distilled(two_points(), load("iris"), networks=1)
    with pytest.raises(InputError, match="networks must be >= 1, got 0"):
        evaluate_distilled(two_points(), blobs, networks=0)
    wild = replace(two_points(), learning_rate=1e38)
    with pytest.raises(NonFiniteLossError, match=r"at the learned rate 1e\+38"):
        train_on_distilled(wild, steps=20)
    # As for the sets of real images, a network that diverged is one that got nothing right.
    assert evaluate_distilled(wild, blobs, networks=2, steps=20).values == (0.0, 0.0)


def test_clusters_are_found_once_for_all_networks_and_rates(
    blobs: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn.cluster

    fitted = []

    class Counted(sklearn.cluster.KMeans):
        def fit(self, *args, **options):
            fitted.append(self.n_clusters)
            return super().fit(*args, **options)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Counted)
    two = replace(two_points(), images_per_class=2)
    evaluate_references(two, blobs, names=["kmeans", "means"], networks=3, steps=1)
    assert fitted == [2, 2]  # one run for each class


def test_random_images_are_drawn_once_for_each_network(
    blobs: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def drawn(labels, per_class, generator):
        seeds.append(generator.initial_seed())
        return random_representatives(labels, per_class, generator)

    monkeypatch.setattr(fresh_networks, "random_representatives", drawn)
    evaluate_references(two_points(), blobs, names=["random"], networks=3, steps=1, seed=5)
    assert seeds == [5, 6, 7]


def test_the_rates_to_choose_from_reach_one() -> None:
    assert fresh_networks.LEARNING_RATES == (0.01, 0.03, 0.1, 0.3, 1.0)
