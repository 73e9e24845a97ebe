import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import self_retrieval_metrics


def slow_twin(distances, labels, ks):
    found = {name: [] for name in [*(f"recall@{k}" for k in ks), "r_precision", "map@r"]}
    for i, label in enumerate(labels):
        others = [j for j in np.argsort(distances[i], kind="stable") if j != i]
        hits = np.array([labels[j] == label for j in others])
        relevant = hits.sum()
        if not relevant:
            continue
        for k in ks:
            found[f"recall@{k}"].append(hits[:k].any())
        found["r_precision"].append(hits[:relevant].mean())
        found["map@r"].append(sum(hits[: j + 1].mean() for j in range(relevant) if hits[j]) / relevant)
    return {name: np.mean(values) if values else math.nan for name, values in found.items()}


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(-2, 3), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_equal_to_a_slow_twin_with_ties_for_any_chunks(seed, classes, query_chunk, base_chunk):
    x = np.random.default_rng(seed).integers(-2, 3, (len(classes), 2)).astype(float)
    found = self_retrieval_metrics(
        torch.tensor(x),
        torch.tensor(classes),
        (1, 3, 50),
        metric="euclidean",
        query_chunk=query_chunk,
        base_chunk=base_chunk,
    )
    distances = ((x[:, None] - x) ** 2).sum(-1)
    expected = slow_twin(distances, classes, (1, 3, 50))
    counted = sum(classes.count(c) > 1 for c in classes)
    assert found == pytest.approx(
        expected | {"queries": counted, "queries_skipped": len(classes) - counted}, nan_ok=True
    )


def test_equal_to_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (120,), generator=generator)
    x = torch.randn(6, 8, generator=generator)[labels] + torch.randn(120, 8, generator=generator)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    )
    expected = calculator.get_accuracy(x, labels)
    found = self_retrieval_metrics(x, labels, (1,))
    assert found["recall@1"] == pytest.approx(expected["precision_at_1"])
    assert found["r_precision"] == pytest.approx(expected["r_precision"])
    assert found["map@r"] == pytest.approx(expected["mean_average_precision_at_r"])


def test_collapsed_classes_are_found_and_samples_alone_skipped():
    labels = torch.tensor([0, 1, 0, 1, 2])
    found = self_retrieval_metrics(torch.eye(3)[labels], labels, (1,))
    assert found == {"recall@1": 1, "r_precision": 1, "map@r": 1, "queries": 4, "queries_skipped": 1}


def test_no_sample_and_no_pair_give_nan():
    for samples in (0, 1, 3):
        found = self_retrieval_metrics(torch.ones(samples, 2), torch.arange(samples))
        assert math.isnan(found["recall@1"]) and math.isnan(found["map@r"])
        assert found["queries"] == 0 and found["queries_skipped"] == samples


def test_bad_input_is_refused():
    x, labels = torch.eye(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="ks must be >= 1, got 0"):
        self_retrieval_metrics(x, labels, (2, 0))
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        self_retrieval_metrics(x * math.nan, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        inspect.unwrap(self_retrieval_metrics)(x, labels[:2])
