import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import nearest_neighbours
from coloss.metrics.pair_scores import PairScores

METRICS = ("cosine", "inner", "euclidean")
KINDS = ("random", "repeated", "whole numbers", "nearly collapsed", "collapsed", "zeros", "outlier")


def cloud(kind, samples, dimensions, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, dimensions, generator=generator)
    if kind == "repeated":
        x = x[torch.randint(max(1, samples // 5), (samples,), generator=generator)]
    elif kind == "whole numbers":
        x = x.round().clamp(-1, 1)
    elif kind == "nearly collapsed":
        x = 1 + 1e-5 * x
    elif kind == "collapsed":
        x = x[:1].expand(samples, -1)
    elif kind == "zeros":
        x = x * (torch.rand(samples, 1, generator=generator) < 0.5)
    elif kind == "outlier":
        x[0] *= 1e8
    return x.to(dtype)


def all_pairs(queries, base, metric):
    """Scores of all pairs in float64, higher for nearer; each pair by itself."""
    queries, base = queries.double(), base.double()
    if metric == "euclidean":
        return -(queries[:, None] - base).square().sum(-1).sqrt()
    products = (queries[:, None] * base).sum(-1)
    if metric == "inner":
        return products
    lengths = [x.square().sum(1).sqrt() for x in (queries, base)]
    lengths = [torch.where(length > 0, length, 1.0) for length in lengths]
    return (products / (lengths[0][:, None] * lengths[1])).clamp(-1, 1)


def assert_equal_to_sorting(found, scores, k, metric):
    values, order = scores.sort(dim=1, descending=True, stable=True)
    values, order = values[:, :k], order[:, :k].masked_fill(values[:, :k] == -math.inf, -1)
    assert torch.equal(found.indices, order)
    torch.testing.assert_close(found.values, -values if metric == "euclidean" else values, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(METRICS),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(0, 1000),
    st.booleans(),
    st.data(),
)
def test_any_chunks_give_the_order_of_sorted_exact_scores(
    metric, kind, dtype, samples, dimensions, k, seed, within, data
):
    base = cloud(kind, samples, dimensions, seed, dtype)
    queries = base if within else cloud("random", 5, dimensions, seed + 1, dtype)
    query_chunk, base_chunk = data.draw(st.integers(1, 80)), data.draw(st.integers(3, 80))
    found = nearest_neighbours(
        queries, base, k, metric=metric, exclude=within, query_chunk=query_chunk, base_chunk=base_chunk
    )
    scores = all_pairs(queries, base, metric)
    if within:
        scores.fill_diagonal_(-math.inf)
    assert_equal_to_sorting(found, scores, k, metric)


@pytest.mark.parametrize("kind", ["random", "repeated", "whole numbers", "collapsed"])
@pytest.mark.parametrize("metric", METRICS)
def test_large_tiles_are_looked_through_in_groups(metric, kind):
    base, queries = cloud(kind, 3000, 6, 0), cloud("random", 20, 6, 1)
    found = nearest_neighbours(queries, base, 3, metric=metric, base_chunk=1024)
    assert_equal_to_sorting(found, all_pairs(queries, base, metric), 3, metric)


def test_the_quick_scores_keep_their_bound():
    for metric in METRICS:
        for kind in KINDS:
            base, queries = cloud(kind, 300, 40, 3), cloud("outlier", 20, 40, 4)
            scores = PairScores(queries, base, metric)
            rows, columns = torch.arange(20), torch.arange(300)
            left, (right, largest) = scores.left(rows), scores.right(0, 300)
            quick = scores.product(left, right).double()
            pairs = torch.cartesian_prod(rows, columns)
            sure = scores.quick(pairs[:, 0], pairs[:, 1]).view(20, 300)
            assert (
                (quick - sure).abs() <= (scores.slack(left, largest) + scores.row_slack)[:, None]
            ).all(), (metric, kind)


def test_shortened_products_change_nothing():
    base, queries = cloud("random", 400, 16, 0), cloud("random", 30, 16, 1)
    expected = nearest_neighbours(queries, base, 5)
    try:
        torch.set_float32_matmul_precision("medium")
        found = nearest_neighbours(queries, base, 5)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = nearest_neighbours(queries, base, 5)
    for other in (found, under):
        assert torch.equal(other.indices, expected.indices) and torch.equal(other.values, expected.values)


def test_distances_of_a_far_cloud_keep_all_digits():
    base = torch.tensor([[1e6], [1e6 + 0.0625], [1e6 + 0.1875]])
    found = nearest_neighbours(base[:1], base, 3, metric="euclidean")
    assert found.values.tolist() == [[0.0, 0.0625, 0.1875]]


def test_zero_rows_have_cosine_zero():
    base = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = nearest_neighbours(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), base, 3)
    assert found.values.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    assert found.indices.tolist() == [[2, 1, 0], [0, 1, 2]]


def test_equal_ids_are_left_out_and_missing_neighbours_marked():
    base = torch.tensor([[0.0], [1.0], [2.0]])
    ids = (torch.tensor([7, 3]), torch.tensor([7, 7, 5]))
    found = nearest_neighbours(base[:2], base, 5, metric="euclidean", exclude=ids)
    assert found.indices.tolist() == [[2, -1, -1], [1, 0, 2]]
    assert found.values.tolist() == [[2.0, math.inf, math.inf], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize("metric", METRICS)
def test_empty_sets(metric):
    some, none = torch.ones(3, 2), torch.ones(0, 2)
    assert nearest_neighbours(none, some, 2, metric=metric).indices.shape == (0, 2)
    assert nearest_neighbours(some, none, 2, metric=metric).values.shape == (3, 0)
    alone = nearest_neighbours(some[:1], some[:1], 1, metric=metric, exclude=True)
    assert alone.indices.tolist() == [[-1]]


def test_inputs_are_left_as_they_are_and_carry_no_gradient():
    x = cloud("random", 50, 4, 0, torch.float64).requires_grad_()
    before = x.detach().clone()
    for metric in METRICS:
        assert not nearest_neighbours(x, x, 3, metric=metric).values.requires_grad
    assert torch.equal(x.detach(), before)


def test_bad_input_is_refused():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        nearest_neighbours(x, x, 0)
    with pytest.raises(ValueError, match="base_chunk must be >= 1, got 0"):
        nearest_neighbours(x, x, 1, base_chunk=0)
    with pytest.raises(ValueError, match="base must be finite, got NaN or infinity"):
        nearest_neighbours(x, x * math.nan, 1)
    with pytest.raises(ValueError, match="queries must be finite, got NaN or infinity"):
        nearest_neighbours(x * math.inf, x, 1)
    with pytest.raises(ValueError, match="needs as many queries as base rows, got 2 queries and 3 base rows"):
        nearest_neighbours(x[:2], x, 1, exclude=True)
    plain = inspect.unwrap(nearest_neighbours)
    with pytest.raises(ValueError, match="must have one number of dimensions, got 1 and 2"):
        plain(x[:, :1], x, 1)
    with pytest.raises(ValueError, match="metric must be one of cosine, inner, euclidean, got 'manhattan'"):
        plain(x, x, 1, metric="manhattan")
    with pytest.raises(ValueError, match=r"ids of base in exclude must have shape \(3,\), got \(2,\)"):
        plain(x, x, 1, exclude=(torch.arange(3), torch.arange(2)))
