"""Representatives: as many as asked for, the class means as a limit, centres given from outside."""

import pytest
import torch

from coloss.distillation import kmeans_centres, kmeans_representatives, random_representatives


def test_kmeans_takes_as_many_images_as_asked_for_also_below_and_between_tens() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 2, generator=generator), torch.arange(60) % 3
    for per_class in (1, 3, 13):
        chosen = kmeans_representatives(features, labels, per_class)
        assert len(chosen.unique()) == 3 * per_class
        assert torch.equal(labels[chosen], torch.arange(3).repeat_interleave(per_class))
    means, _ = kmeans_centres(features, labels, 1)
    torch.testing.assert_close(means, torch.stack([features[labels == k].mean(0) for k in range(3)]))
    alike = torch.zeros(4, 2)  # fewer distinct samples than clusters
    assert len(kmeans_representatives(alike, torch.zeros(4, dtype=torch.int64), 3).unique()) == 3
    drawn = random_representatives(labels, 5, generator)
    assert len(drawn.unique()) == 15
    for choose in (lambda: kmeans_centres(features, labels, 21), lambda: random_representatives(labels, 21)):
        with pytest.raises(
            ValueError, match="per_class must be <= 20, the samples of the smallest class, got 21"
        ):
            choose()
    with pytest.raises(ValueError, match="per_class must be >= 1, got 0"):
        random_representatives(labels, 0)


def test_centres_that_are_known_are_used() -> None:
    features, labels = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.zeros(4, dtype=torch.int64)
    given = torch.tensor([[9.5], [0.2]])
    assert kmeans_representatives(features, labels, 2, centres=given).tolist() == [3, 0]
    found, _ = kmeans_centres(features, labels, 2)
    own = kmeans_representatives(features, labels, 2)
    assert torch.equal(own, kmeans_representatives(features, labels, 2, centres=found))
    with pytest.raises(ValueError, match=r"centres must have shape \(2, 1\), got \(1, 1\)"):
        kmeans_representatives(features, labels, 2, centres=given[:1])
