import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from coloss.metrics import brier_score, expected_calibration_error, negative_log_likelihood


def random_problem(seed, samples=200, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(2, 6))
def test_calibration_error_equals_torchmetrics(seed, bins, classes):
    logits, targets = random_problem(seed, 40, classes)
    expected = multiclass_calibration_error(logits, targets, num_classes=classes, n_bins=bins, norm="l1")
    torch.testing.assert_close(
        expected_calibration_error(logits, targets, bins), expected, atol=1e-6, rtol=1e-5
    )


def test_calibration_error_worked_by_hand():
    # bin (0.5, 0.75]: 2 samples, confidence 0.7, one right; bin (0.75, 1]: 2 samples, confidence 0.9, both right
    probabilities = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.1, 0.9], [0.1, 0.9]])
    found = expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 1]), bins=4)
    assert float(found) == pytest.approx(0.5 * abs(0.5 - 0.7) + 0.5 * abs(1 - 0.9))


def test_one_bin_is_the_gap_of_means():
    logits, targets = random_problem(0)
    confidence, predictions = logits.softmax(1).max(1)
    gap = (confidence.mean() - (predictions == targets).float().mean()).abs()
    torch.testing.assert_close(expected_calibration_error(logits, targets, bins=1), gap)


def test_certain_predictions_share_the_last_bin():
    # 0.96 and 1.0 lie in one of 15 bins: right in one of two, mean confidence 0.98
    probabilities = torch.tensor([[1.0, 0.0], [0.96, 0.04]])
    found = expected_calibration_error(probabilities, torch.tensor([0, 1]))
    assert float(found) == pytest.approx(0.98 - 0.5)


@pytest.mark.parametrize("metric", [expected_calibration_error, brier_score])
def test_probabilities_and_their_logits_agree(metric):
    logits, targets = random_problem(1)
    torch.testing.assert_close(metric(logits.softmax(1), targets), metric(logits, targets))
    torch.testing.assert_close(metric(logits.log_softmax(1), targets), metric(logits, targets))
    half = logits.softmax(1).bfloat16()  # sums are off by up to a hundredth, still probabilities
    torch.testing.assert_close(metric(half, targets), metric(logits, targets), atol=2e-2, rtol=0)


def test_logits_that_look_like_probabilities_need_the_flag():
    lookalike, targets = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert brier_score(lookalike, targets) == 0
    share = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(brier_score(lookalike, targets, from_logits=True), 2 * (1 - share) ** 2)
    assert brier_score(torch.tensor([[2.0, 0.0]]), targets, from_logits=False) == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.01, 1e4))
def test_scores_stay_in_range_at_any_scale(seed, scale):
    logits, targets = random_problem(seed, 20)
    assert 0 <= expected_calibration_error(scale * logits, targets, from_logits=True) <= 1
    assert 0 <= brier_score(scale * logits, targets, from_logits=True) <= 2
    assert 0 <= negative_log_likelihood(scale * logits, targets) < math.inf


def test_brier_score_of_certain_and_uniform_predictions():
    certain = torch.tensor([[100.0, 0.0, 0.0]])
    assert brier_score(certain, torch.tensor([0])) == 0
    assert brier_score(certain, torch.tensor([1])) == 2
    assert float(brier_score(torch.zeros(1, 4), torch.tensor([2]))) == pytest.approx(0.75**2 + 3 / 16)


def test_likelihood_of_extreme_logits():
    assert negative_log_likelihood(torch.tensor([[1e4, 0.0]]), torch.tensor([1])) == 1e4
    assert negative_log_likelihood(torch.tensor([[0.0, -math.inf]]), torch.tensor([0])) == 0
    assert negative_log_likelihood(torch.tensor([[0.0, -math.inf]]), torch.tensor([1])) == math.inf
    half = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)  # the gap overflows float16
    assert float(negative_log_likelihood(half, torch.tensor([1]))) == pytest.approx(120000, rel=1e-3)


def test_likelihood_is_the_mean_cross_entropy_in_float64():
    logits, targets = random_problem(2)
    expected = F.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(negative_log_likelihood(logits.double(), targets), expected)


@pytest.mark.parametrize("metric", [expected_calibration_error, negative_log_likelihood, brier_score])
def test_empty_and_nan_are_nan(metric):
    assert metric(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()
    assert metric(torch.full((2, 3), math.nan), torch.tensor([0, 1])).isnan()


@pytest.mark.parametrize("metric", [expected_calibration_error, negative_log_likelihood, brier_score])
def test_targets_outside_the_classes_are_refused(metric):
    with pytest.raises(ValueError, match=r"targets must be in \[0, 3\), got values from 3 to 3"):
        metric(torch.zeros(1, 3), torch.tensor([3]))


def test_bins_below_one_are_refused():
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        expected_calibration_error(torch.zeros(1, 3), torch.tensor([0]), bins=0)
