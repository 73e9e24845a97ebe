"""The graph is scikit-learn's, made mutual; influence is the sum of matrix powers in either layout."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import kneighbors_graph

from coloss.contrastive import influence, knn_graph


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("self_loops", [False, True])
def test_it_joins_nearest_neighbours_both_ways(metric, self_loops):
    features = torch.randn(25, 3)
    theirs = kneighbors_graph(features.numpy(), 4, metric=metric).toarray()
    theirs = np.maximum(theirs, theirs.T) + self_loops * np.eye(25)
    ours = knn_graph(features, 4, metric=metric, self_loops=self_loops)
    assert ours.is_sparse and ours.is_coalesced()
    np.testing.assert_allclose(ours.to_dense(), theirs / theirs.sum(1, keepdims=True), rtol=1e-6)


def test_small_graphs():
    assert knn_graph(torch.zeros(1, 2)).to_dense().tolist() == [[1.0]]
    assert knn_graph(torch.zeros(1, 2), self_loops=False)._nnz() == 0
    assert knn_graph(torch.zeros(3, 2), 9).to_dense().tolist() == [[pytest.approx(1 / 3)] * 3] * 3


@pytest.mark.parametrize(("order", "cumulative"), [(1, True), (3, True), (3, False)])
def test_influence_is_the_powers_of_the_graph(order, cumulative):
    adjacency = knn_graph(torch.randn(12, 2), 2)
    dense = adjacency.to_dense().double()
    powers = [torch.linalg.matrix_power(dense, power) for power in range(1, order + 1)]
    expected = sum(powers) if cumulative else powers[-1]
    sparse = influence(adjacency, order, cumulative=cumulative)
    assert sparse.is_sparse and sparse.is_coalesced()
    torch.testing.assert_close(sparse.to_dense().double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(influence(dense, order, cumulative=cumulative), expected)
    torch.testing.assert_close(
        expected.sum(1),
        torch.full((12,), float(order if cumulative else 1), dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        knn_graph(torch.randn(4, 2), 0)
    with pytest.raises(ValueError, match=r"adjacency must be a square matrix, got shape \(2, 3\)"):
        influence(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="order must be >= 1, got 0"):
        influence(torch.zeros(2, 2), 0)
