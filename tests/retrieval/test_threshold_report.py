import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import threshold_at_fpr
from coloss.retrieval import threshold_report


def problem(seed, queries=20, documents=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(queries, documents, generator=generator), torch.eye(queries, documents)


def test_worked_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5], [0.0, 0.0, 9.0, 0.0, 0.0]])
    relevance = torch.zeros(3, 5)
    relevance[0, 0] = relevance[1, 1] = 1
    relevance[2] = 1  # nothing irrelevant: no cut-off of its own
    report = threshold_report(scores, relevance, 0.25, quantiles=(0.0, 1.0))
    # Irrelevant: 0.4 0.3 0.2 0.1 and 0.9 0.7 0.6 0.5; two of eight may pass, so 0.7 is the cut-off.
    assert report.threshold == pytest.approx(0.7) and report.recall == pytest.approx(3 / 7)
    assert report.precision == pytest.approx(3 / 5)
    assert report.query_thresholds == pytest.approx((0.3, 0.7))  # each lets pass one of its four above it
    assert report.query_false_positive_rates == (0.0, 0.5)
    assert report.quantiles == (0.0, 1.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_query_at_its_own_cut_off_keeps_the_rate(seed, fpr):
    scores, relevance = problem(seed)
    report = threshold_report(scores, relevance, fpr)
    assert (report.threshold, report.recall) == threshold_at_fpr(scores, relevance, fpr)[:2]
    for row, relevant in zip(scores, relevance):
        alone = threshold_report(row[None], relevant[None], fpr, quantiles=(0.5,)).query_thresholds[0]
        irrelevant = row[relevant == 0].double()
        assert (irrelevant > alone).double().mean() <= fpr + 1e-9
        assert fpr == 1 or (irrelevant >= alone).double().mean() > fpr


def test_offsets_of_queries_show_as_spread():
    scores, relevance = problem(0)
    shifted = scores + 5 * torch.randn(20, 1, generator=torch.Generator().manual_seed(1))

    def spread(s):
        report = threshold_report(s, relevance, 0.05)
        return report.query_thresholds[2] - report.query_thresholds[0]

    assert spread(shifted) > 3 * spread(scores)
    worst = [
        threshold_report(s, relevance, 0.05, quantiles=(1.0,)).query_false_positive_rates[0]
        for s in (scores, shifted)
    ]
    assert worst[1] > worst[0] + 0.2


def test_ignored_pairs_are_as_if_absent():
    scores, relevance = problem(2)
    ignore = torch.zeros(20, 30, dtype=torch.bool)
    ignore[:, 25:] = True
    expected = threshold_report(scores[:, :25], relevance[:, :25], 0.1)
    assert threshold_report(scores.masked_fill(ignore, math.nan), relevance, 0.1, ignore=ignore) == expected


def test_at_a_rate_of_one_everything_passes_and_at_zero_no_irrelevant_pair():
    scores, relevance = problem(3)
    report = threshold_report(scores, relevance, 1)
    assert report.recall == 1 and report.query_false_positive_rates == (1, 1, 1)
    assert report.query_thresholds == (-math.inf,) * 3
    assert threshold_report(scores, relevance, 0).query_false_positive_rates == (0, 0, 0)


def test_half_precision_scores():
    scores, relevance = problem(4)
    scores = scores.half()
    assert threshold_report(scores, relevance, 0.1) == threshold_report(scores.float(), relevance, 0.1)


def test_bad_input_is_refused():
    scores, relevance = problem(5)
    with pytest.raises(ValueError, match="quantiles must be in .0, 1., got 1.5"):
        threshold_report(scores, relevance, quantiles=(0.5, 1.5))
    with pytest.raises(ValueError, match="fpr must be in .0, 1., got 2"):
        threshold_report(scores, relevance, 2)
    with pytest.raises(ValueError, match="relevance must hold relevant and irrelevant pairs"):
        threshold_report(scores, torch.zeros(20, 30))
