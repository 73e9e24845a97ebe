"""Clustering digits by a pretrained encoder, tuned further with and without contrast on the graph of their neighbours."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.contrastive.node_graph import knn_graph
from coloss.contrastive.student_assignment import k_means
from coloss.data import IndexedDataset
from coloss.metrics import clustering_accuracy
from coloss.nn import MLP
from coloss.train import Budget, Setting, fit
from coloss.train.encoder_task import digits_encoder_task


def cluster_digits(
    setting: Setting, arms: Mapping[str, Callable[[Tensor], Any]]
) -> Mapping[str, Mapping[str, float]]:
    """Clustering accuracy of every arm on 597 test images: by its learnt centres, and by k-means on its embeddings, after the last epoch.

    One autoencoder for each seed, 64-128-10-128-64 with 300 steps, starts all arms, which train its encoder for 100 full batches; in
    "k-means" it stays as it is. No arm sees a label, nor a test image. Clusters get their classes by the best assignment.

    Args:
        setting: its seed draws images and weights.
        arms: for each, what makes its method from the graph of 5 nearest neighbours; `method.predict` gives the clusters of embeddings.

    Examples:
        >>> setting = Setting(digits_encoder_task(Budget(1)), 0, None, Budget(1), smoke=True)
        >>> sorted(cluster_digits(setting, {})["k-means"])
        ['accuracy', 'k_means_accuracy']
    """
    splits = digits_encoder_task(Budget(1)).load(setting.seed)
    images = splits.train.inputs
    encoder = _pretrained(images, setting)
    parts = _embedded(encoder, splits)
    found = {"k-means": _by_k_means(parts, splits, setting.seed)}
    found["k-means"]["accuracy"] = found["k-means"]["k_means_accuracy"]
    graph = knn_graph(images, 5)
    for name, new_method in arms.items():
        method = new_method(graph)
        model = fit(
            deepcopy(encoder),
            IndexedDataset(images),
            methods=[method],
            budget=Budget(steps=2 if setting.smoke else 100),
            batch_size=len(images),
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            seed=setting.seed,
        ).model
        parts = _embedded(model.eval(), splits)
        accuracy = clustering_accuracy(method.predict(parts[1]), splits.test.targets)
        found[name] = {"accuracy": accuracy, **_by_k_means(parts, splits, setting.seed)}
    return found


def _embedded(encoder: nn.Module, splits: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return encoder(splits.train.inputs), encoder(splits.test.inputs)


def _by_k_means(parts: tuple[Tensor, Tensor], splits: Any, seed: int) -> dict[str, float]:
    """Test accuracy of the clusters that k-means finds in the training embeddings, each test image in the nearest."""
    _, centres = k_means(parts[0], 10, seed=seed, restarts=20)
    nearest = torch.cdist(parts[1], centres).argmin(1)
    return {"k_means_accuracy": clustering_accuracy(nearest, splits.test.targets)}


def _pretrained(images: Tensor, setting: Setting) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        encoder, decoder = MLP(64, (128,), 10, norm=None), MLP(10, (128,), 64, norm=None)
    fit(
        nn.Sequential(encoder, decoder),
        (images, images.flatten(1)),
        nn.functional.mse_loss,
        budget=Budget(steps=2 if setting.smoke else 300),
        batch_size=128,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        seed=setting.seed,
    )
    return encoder.eval()
