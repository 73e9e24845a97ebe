import inspect
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.retrieval as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import pooled_auc, retrieval_metrics, roc_curve_pooled, threshold_at_fpr


def random_problem(seed, queries=12, documents=9, grades=2):
    """Scores without ties, all positive since torchmetrics drops relevant documents with scores <= 0."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(documents, generator=generator) for _ in range(queries)])
    relevance = torch.randint(grades, (queries, documents), generator=generator)
    return (ranks + 1) / documents, relevance


def torchmetrics_means(scores, relevance, ks):
    positive = relevance > 0
    kept = [q for q in range(len(scores)) if positive[q].any()]
    measures = {
        "precision@1": lambda s, r: reference.retrieval_precision(s, r > 0, top_k=1),
        "mrr": lambda s, r: reference.retrieval_reciprocal_rank(s, r > 0),
        "map": lambda s, r: reference.retrieval_average_precision(s, r > 0),
        "r_precision": lambda s, r: reference.retrieval_r_precision(s, r > 0),
    }
    for k in ks:
        measures[f"recall@{k}"] = lambda s, r, k=k: reference.retrieval_recall(s, r > 0, top_k=k)
        measures[f"ndcg@{k}"] = lambda s, r, k=k: reference.retrieval_normalized_dcg(s, r, top_k=k)
    return {name: np.mean([float(f(scores[q], relevance[q])) for q in kept]) for name, f in measures.items()}


@pytest.mark.parametrize("grades", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_rankings_equal_torchmetrics(seed, grades):
    scores, relevance = random_problem(seed, grades=grades)
    found = retrieval_metrics(scores, relevance, ks=(1, 3, 9))
    for name, expected in torchmetrics_means(scores, relevance, (1, 3, 9)).items():
        assert found[name] == pytest.approx(expected, abs=1e-6), name


def test_ignored_pairs_are_as_if_absent():
    scores, relevance = random_problem(7, documents=12, grades=3)
    columns = torch.randperm(12)[:5]
    ignore = torch.zeros_like(relevance, dtype=torch.bool)
    ignore[:, columns] = True
    rest = torch.tensor([c for c in range(12) if c not in columns])
    expected = retrieval_metrics(scores[:, rest], relevance[:, rest])
    for value in (0.0, math.inf, -math.inf, math.nan):
        found = retrieval_metrics(scores.masked_fill(ignore, value), relevance, ignore=ignore)
        assert found == pytest.approx(expected, rel=1e-12)


def test_ignored_pairs_stay_behind_scores_of_minus_infinity():
    scores = torch.tensor([[5.0, -math.inf, -math.inf]])
    relevance, ignore = torch.tensor([[1, 0, 1]]), torch.tensor([[True, False, False]])
    assert retrieval_metrics(scores, relevance, ignore=ignore)["mrr"] == 0.5


def test_worked_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    found = retrieval_metrics(scores, torch.tensor([[0, 3, 0, 1]]), ks=(1, 2, 4))
    assert found["recall@1"] == 0 and found["recall@2"] == 0.5 and found["recall@4"] == 1
    assert found["mrr"] == 0.5 and found["r_precision"] == 0.5 and found["precision@1"] == 0
    assert found["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    gain, best = 3 / math.log2(3) + 1 / math.log2(5), 3 + 1 / math.log2(3)
    assert found["ndcg@4"] == pytest.approx(gain / best)
    assert found["pooled_auc"] == pytest.approx(1 / 4)


def test_ties_go_to_the_lower_column():
    scores = torch.zeros(2, 3)
    found = retrieval_metrics(scores, torch.tensor([[1, 0, 0], [0, 0, 1]]))
    assert found["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["pooled_auc"] == 0.5


def test_queries_without_positives_are_skipped_and_counted():
    scores, relevance = random_problem(3)
    relevance[[1, 4]] = 0
    kept = [q for q in range(12) if relevance[q].any()]
    found, expected = retrieval_metrics(scores, relevance), retrieval_metrics(scores[kept], relevance[kept])
    assert found["queries"] == len(kept) and found["queries_skipped"] == 12 - len(kept) >= 2
    for name in set(found) - {"queries_skipped", "pooled_auc"}:
        assert found[name] == expected[name]


def test_ignoring_the_only_positive_skips_the_query():
    found = retrieval_metrics(torch.rand(2, 3), torch.eye(2, 3), ignore=torch.eye(2, 3, dtype=torch.bool))
    assert found["queries_skipped"] == 2 and math.isnan(found["mrr"]) and math.isnan(found["pooled_auc"])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_matrices_give_nan(shape):
    found = retrieval_metrics(torch.zeros(shape), torch.zeros(shape))
    assert math.isnan(found["recall@1"]) and math.isnan(found["pooled_auc"])
    assert found["queries"] == 0 and found["queries_skipped"] == shape[0]


def test_large_matrices_in_parts_give_the_same(monkeypatch):
    scores, relevance = random_problem(5, queries=40)
    whole = retrieval_metrics(scores, relevance)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, dim=0: split(self, 7, dim))
    assert retrieval_metrics(scores, relevance) == whole


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500))
def test_monotone_transforms_and_shuffled_documents_change_nothing(seed):
    scores, relevance = random_problem(seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    expected = retrieval_metrics(scores, relevance)
    found = retrieval_metrics((3 * scores).exp()[:, order].half(), relevance[:, order].bool())
    assert found == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=20))
def test_pooled_auc_equals_scikit_learn_and_the_pair_count(pairs):
    scores, relevant = torch.tensor([float(s) for s, _ in pairs]), torch.tensor([r for _, r in pairs])
    found = float(pooled_auc(scores, relevant))
    positive, negative = scores[relevant], scores[~relevant]
    if not len(positive) or not len(negative):
        assert math.isnan(found)
        return
    gap = positive[:, None] - negative
    assert found == pytest.approx(float(((gap > 0) + 0.5 * (gap == 0)).mean()))
    assert found == pytest.approx(sklearn.metrics.roc_auc_score(relevant, scores))


def test_pooled_auc_sees_query_offsets_that_rankings_do_not():
    generator = torch.Generator().manual_seed(0)
    scores, relevance = 3 * torch.eye(30) + torch.randn(30, 30, generator=generator), torch.eye(30)
    shifted = scores + 10 * torch.randn(30, 1, generator=generator)
    assert retrieval_metrics(scores, relevance)["mrr"] == retrieval_metrics(shifted, relevance)["mrr"]
    assert pooled_auc(shifted, relevance) < pooled_auc(scores, relevance) - 0.3
    assert pooled_auc(scores + 100, relevance) == pytest.approx(
        float(pooled_auc(scores, relevance)), abs=1e-3
    )


def test_pooled_auc_takes_infinities_and_large_pools():
    assert pooled_auc(torch.tensor([math.inf, -math.inf, -math.inf]), torch.tensor([1, 1, 0])) == 0.75
    scores, relevant = torch.arange(200_000.0), torch.arange(200_000) >= 100_000  # 10^10 pairs
    assert pooled_auc(scores, relevant) == 1 and pooled_auc(-scores, relevant) == 0


def test_pooled_auc_leaves_ignored_pairs_out():
    scores, relevance = random_problem(2)
    ignore = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert pooled_auc(scores, relevance, ignore) == pooled_auc(scores[~ignore], relevance[~ignore])


def test_curve_equals_scikit_learn_and_its_area_the_auc():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(6, (10, 8), generator=generator).float()
    relevance = torch.randint(2, (10, 8), generator=generator)
    curve = roc_curve_pooled(scores, relevance)
    expected = sklearn.metrics.roc_curve(relevance.flatten(), scores.flatten(), drop_intermediate=False)
    for found, value in zip(curve, expected):
        np.testing.assert_allclose(found, value, atol=1e-6)
    area = torch.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    torch.testing.assert_close(area, pooled_auc(scores, relevance))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500), st.floats(0, 1))
def test_threshold_is_the_loosest_that_keeps_the_limit(seed, fpr):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(5, (30,), generator=generator) / 5
    relevant = torch.arange(30) % 3 == 0
    point = threshold_at_fpr(scores, relevant, fpr)
    accepted = scores >= point.threshold
    assert accepted[~relevant].double().mean() <= fpr + 1e-9
    assert point.recall == pytest.approx(float(accepted[relevant].double().mean()))
    if accepted.any():
        assert point.precision == pytest.approx(float(relevant[accepted].double().mean()))
    else:
        assert point.threshold == math.inf and math.isnan(point.precision)
    looser = scores[scores < point.threshold]
    if len(looser):
        assert (scores >= looser.max())[~relevant].double().mean() > fpr


@pytest.mark.parametrize("percent", range(0, 101, 7))
def test_threshold_meets_a_rate_exactly_in_spite_of_rounding(percent):
    scores = torch.cat([torch.arange(100.0), torch.tensor([1000.0])])
    point = threshold_at_fpr(scores, scores == 1000, percent / 100)
    assert int((scores[:100] >= point.threshold).sum()) == percent and point.recall == 1


@pytest.mark.parametrize(
    "relevance, counts", [(torch.ones(3), "3 relevant and 0"), (torch.zeros(3), "0 relevant and 3")]
)
def test_one_class_has_no_threshold_and_no_auc(relevance, counts):
    scores = torch.rand(3)
    assert pooled_auc(scores, relevance).isnan()
    for function in (roc_curve_pooled, lambda s, r: threshold_at_fpr(s, r, 0.1)):
        with pytest.raises(
            ValueError, match=f"relevance must hold relevant and irrelevant pairs, got {counts}"
        ):
            function(scores, relevance)


def test_bad_input_is_refused():
    scores, relevance = torch.rand(2, 3), torch.eye(2, 3)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        retrieval_metrics(scores * math.nan, relevance)
    with pytest.raises(ValueError, match="ks must be >= 1, got 0"):
        retrieval_metrics(scores, relevance, ks=(0,))
    with pytest.raises(ValueError, match="relevance must be finite and >= 0"):
        retrieval_metrics(scores, -relevance)
    with pytest.raises(ValueError, match="fpr must be in .0, 1., got 1.5"):
        threshold_at_fpr(scores, relevance, 1.5)
    with pytest.raises(ValueError, match=r"relevance must have the shape of scores \(2, 3\), got \(3, 2\)"):
        inspect.unwrap(pooled_auc)(scores, relevance.T)
