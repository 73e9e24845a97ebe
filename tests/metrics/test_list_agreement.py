"""Agreement of ranked lists: values by hand, limits, and blindness to the scale of scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.metrics import agreement_at_k, exact_match_at_k, rank_biased_overlap

METRICS = [agreement_at_k, exact_match_at_k, rank_biased_overlap]


def rankings(seed, rows=4, items=9):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(np.stack([rng.permutation(items) for _ in range(rows)])) for _ in range(2)]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_lists_agree_wholly_and_disjoint_ones_not_at_all(metric):
    lists = torch.tensor([[3, 1, 2], [7, 8, 9]])
    for k in (1, 2, 3):
        assert metric(lists, lists, k) == pytest.approx(1.0)
        assert metric(lists, lists + 10, k) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_scores_count_by_their_order_alone(metric):
    one, other = torch.randn(2, 5, 20, dtype=torch.float64)
    found = metric(one, other, 6)
    assert metric(one.exp(), 3 * other - 7, 6) == pytest.approx(found)
    lists = [scores.argsort(dim=1, descending=True) for scores in (one, other)]
    assert metric(*lists, 6) == pytest.approx(found)
    assert metric(other, one, 6) == pytest.approx(found)  # no side is the reference


def test_worked_by_hand():
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 5]])
    assert agreement_at_k(one, other, 4) == 0.75 and exact_match_at_k(one, other, 4) == 0.25
    assert agreement_at_k(one, other, 1) == 0.0 and agreement_at_k(one, other, 2) == 1.0
    # Overlaps at depth 1, 2, 3: 0, 2, 3, so agreements 0, 1, 1.
    assert rank_biased_overlap(one, other, 3, persistence=0.5) == pytest.approx(0.25 + 0.125 + 0.125)


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.3, 0.9]))
def test_equal_a_plain_twin(seed, k, p):
    one, other = rankings(seed)
    agreements, matches, overlaps = [], [], []
    for a, b in zip(one.tolist(), other.tolist()):
        shared = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)]
        agreements.append(shared[-1])
        matches.append(sum(x == y for x, y in zip(a[:k], b[:k])) / k)
        overlaps.append((1 - p) * sum(p**d * value for d, value in enumerate(shared)) + p**k * shared[-1])
    assert agreement_at_k(one, other, k) == pytest.approx(np.mean(agreements))
    assert exact_match_at_k(one, other, k) == pytest.approx(np.mean(matches))
    assert rank_biased_overlap(one, other, k, persistence=p) == pytest.approx(np.mean(overlaps))
    assert exact_match_at_k(one, other, k) <= agreement_at_k(one, other, k) + 1e-12


def test_all_items_agree_and_random_ones_by_their_share():
    one, other = rankings(0, rows=3000, items=20)
    assert agreement_at_k(one, other, 20) == 1.0
    assert agreement_at_k(one, other, 5) == pytest.approx(5 / 20, abs=0.01)


def test_ties_are_the_same_on_both_sides():
    flat = torch.zeros(2, 6)
    assert all(metric(flat, flat + 3, 3) == pytest.approx(1.0) for metric in METRICS)
    assert agreement_at_k(flat, -torch.arange(6.0).expand(2, 6), 3) == 1.0  # ties go to the lower number


def test_the_same_items_are_left_out_on_both_sides():
    one, other = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[-math.inf, 1.0, 2.0, 3.0]])
    padding = torch.tensor([[True, False, False, False]])
    assert agreement_at_k(one, other, 2) == 0.5 and agreement_at_k(one, other, 2, padding) == 1.0


def test_short_lists_count_what_is_missing_as_wrong():
    full, short = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1]])
    assert agreement_at_k(full, short, 4) == 0.5 and exact_match_at_k(short, short, 4) == 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_have_no_agreement(metric):
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert math.isnan(metric(empty, empty, 2))


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_ranks_too(metric):
    scores = torch.tensor([[0.5, 2.0, 1.0]])
    assert metric(scores.bfloat16(), scores.bfloat16(), 2) == pytest.approx(1.0)


def test_bad_input_is_refused(as_users_call):
    lists, scores = torch.tensor([[1, 2]]), torch.zeros(1, 4)
    for call, message in (
        (lambda: agreement_at_k(lists, lists, 0), "k must be >= 1, got 0"),
        (lambda: agreement_at_k(lists, scores, 1), "must both be scores or both be lists"),
        (lambda: agreement_at_k(lists, torch.tensor([[1], [2]]), 1), "must have as many rows, got 1 and 2"),
        (
            lambda: agreement_at_k(scores, torch.zeros(1, 5), 1),
            r"scores must have one shape, got \(1, 4\) and \(1, 5\)",
        ),
        (lambda: agreement_at_k(scores, scores, 5), r"k must be in \[1, 4\]"),
        (lambda: agreement_at_k(lists, torch.tensor([[1, 1]]), 2), "lists must hold each item once"),
        (
            lambda: agreement_at_k(lists, lists, 1, torch.zeros(1, 2) > 0),
            "ignore belongs to scores, got lists",
        ),
        (lambda: rank_biased_overlap(lists, lists, 3), "lists must have at least 3 positions, got 2"),
        (
            lambda: rank_biased_overlap(lists, lists, 1, persistence=1.0),
            r"persistence must be in \(0, 1\), got 1.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
