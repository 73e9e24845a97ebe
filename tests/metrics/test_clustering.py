"""Clustering accuracy is the best over all ways to name clusters, whatever their numbers."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.metrics import clustering_accuracy


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=20))
def test_it_is_the_best_of_all_namings(pairs):
    clusters, targets = (torch.tensor(side) for side in zip(*pairs))
    best = max(
        sum(names[cluster] == target for cluster, target in pairs) for names in permutations(range(4), 3)
    )
    assert clustering_accuracy(clusters, targets) == pytest.approx(best / len(pairs))


def test_names_of_clusters_do_not_matter():
    clusters, targets = torch.randint(5, (50,)), torch.randint(5, (50,))
    renamed = torch.tensor([9, -3, 0, 44, 7])[clusters]
    assert clustering_accuracy(renamed, targets) == clustering_accuracy(clusters, targets)
    assert clustering_accuracy(targets + 3, targets) == 1.0


def test_a_class_is_given_once():
    assert clustering_accuracy(torch.arange(4), torch.zeros(4, dtype=torch.int64)) == 0.25


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match="one length >= 1, got 2 and 3"):
        clustering_accuracy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="one length >= 1, got 0 and 0"):
        clustering_accuracy(torch.zeros(0), torch.zeros(0))
