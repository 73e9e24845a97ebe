"""Accuracy on few-shot episodes, with the interval that its spread over episodes leaves."""

from typing import Any

import torch
from torch import Tensor, nn

from coloss.data.samplers import EpisodeSampler
from coloss.metrics.inference import extract_features
from coloss.metrics.statistics import MeanInterval, mean_interval
from coloss.ops import prototypes, prototypical_logits
from coloss.ops.class_prototypes import PrototypeMetric


def evaluate_episodes(
    encoder: nn.Module,
    data: Any,
    ways: int,
    shots: int,
    queries: int = 15,
    episodes: int = 600,
    generator: torch.Generator | None = None,
    *,
    metric: PrototypeMetric = "sqeuclidean",
    batch_size: int = 512,
) -> MeanInterval:
    """Mean accuracy of the nearest prototype over random episodes, and its 95% interval.

    In an episode a few classes are drawn; the mean of the embeddings of `shots` samples stands for a class, and `queries` others of each
    are given the nearest one. All data are embedded once, so the encoder must treat samples one by one, as networks in eval mode do.

    Args:
        encoder: gives one feature vector for each input.
        data: with class indices as targets, see `coloss.metrics.predict`; classes with fewer than shots + queries samples are left out.
        ways: classes in an episode, >= 2.
        shots: labelled samples of each class, >= 1.
        queries: samples of each class to classify, >= 1.
        episodes: how many, >= 2.
        generator: of the draws; None draws always the same.
        metric: what is near: `"sqeuclidean"` or `"cosine"`.
        batch_size: samples in one forward pass.

    Returns:
        Mean, (low, high) by Student's t over the episodes, and their number. The interval is that of the draw of episodes for this one
        encoder: another training run, or other classes, may lie outside.

    Raises:
        ValueError: for a value out of range, or if too few classes have enough samples.

    Cost:
        One forward pass over the data, and about 0.2 ms for each episode.

    Source:
        Vinyals et al. 2016, arXiv 1606.04080, for episodes; Snell et al. 2017, arXiv 1703.05175, for prototypes.

    Examples:
        >>> from coloss.data import IndexedDataset
        >>> corners = IndexedDataset(
        ...     torch.eye(3).repeat_interleave(4, 0), torch.arange(3).repeat_interleave(4)
        ... )
        >>> evaluate_episodes(nn.Identity(), corners, ways=2, shots=1, queries=3, episodes=10)
        MeanInterval(mean=1.0, interval=(1.0, 1.0), n=10)
    """
    for name, value, least in (("ways", ways, 2), ("queries", queries, 1), ("episodes", episodes, 2)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    features, targets = extract_features(encoder, data, batch_size=batch_size)
    if not isinstance(targets, Tensor):
        raise ValueError("data must have class indices as targets, got none")
    sampler = EpisodeSampler(targets, ways, shots, queries, episodes)
    classes = torch.arange(ways)
    of_support, of_queries = classes.repeat_interleave(shots), classes.repeat_interleave(queries)
    accuracies = []
    for positions in sampler.batches(torch.Generator().manual_seed(0) if generator is None else generator):
        support, query_set = sampler.parts(features[positions])
        logits = prototypical_logits(query_set, prototypes(support, of_support, ways), metric)
        accuracies.append(float((logits.argmax(1) == of_queries).double().mean()))
    return mean_interval(accuracies)
