"""GAUC against scikit-learn group by group, and next-item metrics against ranks counted by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from coloss.data import IndexedDataset
from coloss.metrics import evaluate_recommender, grouped_auc, pooled_auc
from coloss.nn import SequentialRecommender


@given(st.integers(0, 10**6), st.sampled_from(["rows", "groups"]))
def test_equals_scikit_learn_in_each_group(seed, weighting):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 60).astype(np.float32)  # many ties
    labels, groups = rng.integers(0, 2, 60), rng.integers(-3, 5, 60) * 1000
    areas, weights = [], []
    for group in np.unique(groups):
        own = groups == group
        if 0 < labels[own].sum() < own.sum():
            areas.append(roc_auc_score(labels[own], scores[own]))
            weights.append(own.sum() if weighting == "rows" else 1)
    found = grouped_auc(*map(torch.from_numpy, (scores, labels, groups)), weighting)
    assert found == pytest.approx(np.average(areas, weights=weights))


def test_one_group_is_the_pooled_area_and_offsets_of_groups_do_not_count():
    scores, labels = torch.randn(40), torch.randint(2, (40,))
    assert grouped_auc(scores, labels, torch.zeros(40)) == pytest.approx(pooled_auc(scores, labels).item())
    groups = torch.arange(40) % 4
    assert grouped_auc(scores + 100.0 * groups, labels, groups) == pytest.approx(
        grouped_auc(scores, labels, groups)
    )


def test_without_a_group_of_both_classes_there_is_no_area():
    assert math.isnan(grouped_auc(torch.randn(4), torch.ones(4), torch.arange(4)))
    assert math.isnan(grouped_auc(torch.zeros(0), torch.zeros(0), torch.zeros(0)))
    infinite = torch.tensor([math.inf, -math.inf])
    assert grouped_auc(infinite, torch.tensor([1, 0]), torch.zeros(2)) == 1.0


def test_bad_scores_are_refused(as_users_call):
    one = torch.ones(2)
    for call, message in (
        (
            lambda: grouped_auc(one, torch.ones(3), one),
            r"labels must have the shape of scores \(2,\), got \(3,\)",
        ),
        (lambda: grouped_auc(one, one, one, "users"), 'weighting must be "rows" or "groups"'),
        (lambda: grouped_auc(one * math.nan, one, one), "scores must not be NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ranks_counted_by_hand():
    torch.manual_seed(2)
    model = SequentialRecommender(30, 8, max_history=4)
    with torch.no_grad():
        model.item_embeddings.normal_()
    histories, targets = torch.randint(31, (25, 4)), torch.randint(1, 31, (25,))
    histories[:, -1] = histories[:, -1].clamp(min=1)
    histories[0, 1], targets[0] = 7, 7  # has been seen: cannot be ranked
    ranks = []
    for history, target in zip(histories, targets):
        if target in history:
            continue
        scores = model.eval().scores(history[None])[0]
        rivals = [i for i in range(1, 31) if i not in history.tolist()]
        ranks.append(1 + sum(bool(scores[i] > scores[target]) for i in rivals))
    model.train()
    found = evaluate_recommender(model, IndexedDataset(histories, targets), ks=(1, 5), batch_size=7)
    assert model.training and found["users"] == len(ranks)
    assert found["recall@5"] == pytest.approx(np.mean([r <= 5 for r in ranks]))
    assert found["mrr"] == pytest.approx(np.mean([1 / r for r in ranks]))
    assert found["ndcg@5"] == pytest.approx(np.mean([1 / math.log2(r + 1) if r <= 5 else 0 for r in ranks]))
    with pytest.raises(ValueError, match="at least one user whose next item can be ranked"):
        evaluate_recommender(model, IndexedDataset(histories[:1], targets[:1]))


def test_histories_come_to_the_device_of_the_model():
    """A parameter on "meta" stands for a model that training left on an accelerator."""

    class Reached(Exception):
        pass

    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def unwanted(self, histories, *, seen):
            raise Reached(histories.device)

    data = IndexedDataset(torch.ones(4, 3, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
    with pytest.raises(Reached, match="meta"):
        evaluate_recommender(Elsewhere(), data)
