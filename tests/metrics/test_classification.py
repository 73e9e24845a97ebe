import inspect
import math

import pytest
import sklearn.metrics
import torch
import torchmetrics.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import accuracy, balanced_accuracy, macro_f1, mean_squared_error, r2_score


def random_problem(seed, samples=60, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, classes, generator=generator), torch.randint(
        classes, (samples,), generator=generator
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 5))
def test_class_metrics_equal_scikit_learn(seed, samples, classes):
    logits, targets = random_problem(seed, samples, classes)
    truth, predicted = targets.numpy(), logits.argmax(1).numpy()
    recall = [(predicted[truth == c] == c).mean() for c in set(truth)]
    assert float(accuracy(logits, targets)) == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
    assert float(balanced_accuracy(logits, targets)) == pytest.approx(sum(recall) / len(recall))
    assert float(macro_f1(logits, targets)) == pytest.approx(
        sklearn.metrics.f1_score(truth, predicted, average="macro")
    )


def test_class_metrics_equal_torchmetrics_where_all_classes_occur():
    logits, targets = random_problem(0)
    found = reference.accuracy(logits, targets, task="multiclass", num_classes=4, average="micro")
    torch.testing.assert_close(accuracy(logits, targets), found)
    found = reference.recall(logits, targets, task="multiclass", num_classes=4, average="macro")
    torch.testing.assert_close(balanced_accuracy(logits, targets), found)
    found = reference.f1_score(logits, targets, task="multiclass", num_classes=4, average="macro")
    torch.testing.assert_close(macro_f1(logits, targets), found)


def test_single_class_makes_balanced_accuracy_plain():
    logits, _ = random_problem(1)
    targets = torch.full((60,), 2)
    assert balanced_accuracy(logits, targets) == accuracy(logits, targets)


def test_predicting_the_majority_is_balanced_chance():
    logits = torch.tensor([[1.0, 0.0, 0.0]]).repeat(100, 1)
    targets = torch.tensor([0] * 98 + [1, 2])
    assert float(accuracy(logits, targets)) == pytest.approx(0.98)
    assert float(balanced_accuracy(logits, targets)) == pytest.approx(1 / 3)
    assert float(macro_f1(logits, targets)) == pytest.approx(2 * 98 / 198 / 3)


def test_nan_logits_are_wrong_whatever_the_target():
    logits = torch.full((4, 2), math.nan)
    for target in (0, 1):
        targets = torch.full((4,), target)
        assert (
            accuracy(logits, targets) == balanced_accuracy(logits, targets) == macro_f1(logits, targets) == 0
        )


@pytest.mark.parametrize("metric", [accuracy, balanced_accuracy, macro_f1])
def test_empty_batch_is_nan(metric):
    assert metric(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()


@pytest.mark.parametrize("metric", [accuracy, balanced_accuracy, macro_f1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_logits_does_not_matter(metric, dtype):
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0], [math.inf, 0.0]])
    targets = torch.tensor([0, 0, 0], dtype=torch.int32)
    torch.testing.assert_close(metric(logits.to(dtype), targets), metric(logits, targets))


@pytest.mark.parametrize("metric", [accuracy, balanced_accuracy, macro_f1])
def test_targets_outside_the_classes_are_refused(metric):
    for target in (-1, 3):
        with pytest.raises(
            ValueError, match=rf"targets must be in \[0, 3\), got values from {target} to {target}"
        ):
            metric(torch.zeros(1, 3), torch.tensor([target]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 10), st.sampled_from([(), (1,), (3,)]))
def test_regression_metrics_equal_scikit_learn(seed, samples, outputs):
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = torch.randn(2, samples, *outputs, generator=generator, dtype=torch.float64)
    assert float(mean_squared_error(predictions, targets)) == pytest.approx(
        sklearn.metrics.mean_squared_error(targets, predictions)
    )
    assert float(r2_score(predictions, targets)) == pytest.approx(
        sklearn.metrics.r2_score(targets, predictions)
    )


def test_r2_of_the_mean_is_zero_and_of_the_truth_one():
    targets = torch.tensor([1e4, 1e4 + 1, 1e4 + 5])
    assert r2_score(targets, targets) == 1
    assert float(r2_score(targets.mean().expand(3), targets)) == pytest.approx(0, abs=1e-5)


def test_r2_of_constant_targets_is_one_or_zero_as_in_scikit_learn():
    targets = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    assert r2_score(targets, targets) == 1
    off = targets + torch.tensor([0.5, 0.0])
    assert float(r2_score(off, targets)) == 0.5 == sklearn.metrics.r2_score(targets, off)


def test_too_few_samples_are_nan():
    assert r2_score(torch.ones(1), torch.ones(1)).isnan()
    assert mean_squared_error(torch.ones(0), torch.ones(0)).isnan()
    assert mean_squared_error(torch.ones(1), torch.zeros(1)) == 1


def test_half_precision_is_computed_in_float32():
    predictions = torch.full((4,), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert mean_squared_error(predictions, torch.zeros(4, dtype=torch.float16)) == 90000


def test_shapes_that_would_broadcast_are_refused():
    # jaxtyping refuses these first in tests; the plain check is what users meet.
    for metric in (mean_squared_error, r2_score):
        with pytest.raises(ValueError, match="must have one shape"):
            inspect.unwrap(metric)(torch.zeros(3, 1), torch.zeros(3))
