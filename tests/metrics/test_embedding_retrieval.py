import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import (
    embedding_retrieval,
    pooled_counts,
    retrieval_metrics,
    retrieval_metrics_from_embeddings,
)

SEEDS = st.integers(0, 10_000)


def rows(generator, samples, dimensions, tied):
    if tied:
        return torch.randint(-1, 2, (samples, dimensions), generator=generator).double()
    return torch.randn(samples, dimensions, generator=generator, dtype=torch.float64)


def score_matrix(queries, documents, metric):
    if metric == "euclidean":
        return -(queries[:, None] - documents).square().sum(-1)
    if metric == "cosine":
        queries, documents = (torch.nn.functional.normalize(x, dim=1) for x in (queries, documents))
    return queries @ documents.T


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.booleans(), st.sampled_from(["pairs", "grades", "ids", "many"]), st.data())
def test_equal_to_the_metrics_of_the_score_matrix_for_any_chunks(seed, tied, kind, data):
    generator = torch.Generator().manual_seed(seed)
    queries, documents, dimensions = (
        data.draw(st.integers(1, most), label=name) for name, most in (("q", 12), ("d", 90), ("dim", 6))
    )
    # Whole numbers tie exactly in inner products and distances; cosines round in the matrix.
    metric = data.draw(st.sampled_from(["inner", "euclidean"] if tied else ["inner", "euclidean", "cosine"]))
    q, d = rows(generator, queries, dimensions, tied), rows(generator, documents, dimensions, tied)
    shape = queries, documents
    grades = None
    if kind in ("ids", "many"):
        relevance = tuple(
            torch.randint(1 + 4 * (kind == "ids"), (size,), generator=generator) for size in shape
        )
        matrix = (relevance[0][:, None] == relevance[1]).long()
    elif kind == "pairs":
        matrix = (torch.rand(shape, generator=generator) < 0.1).long()
        relevance = matrix.nonzero()
    else:
        matrix = torch.randint(4, shape, generator=generator)
        relevance = (matrix >= 0).nonzero()[torch.randperm(queries * documents, generator=generator)]
        grades = matrix[relevance[:, 0], relevance[:, 1]]
    ignore = mask = None
    if data.draw(st.booleans(), label="ignore"):
        if data.draw(st.booleans(), label="ignore ids"):
            ignore = tuple(torch.randint(4, (size,), generator=generator) for size in shape)
            mask = ignore[0][:, None] == ignore[1]
        else:
            mask = torch.rand(shape, generator=generator) < 0.2
            ignore = mask.nonzero()
    found = retrieval_metrics_from_embeddings(
        q,
        d,
        relevance,
        (1, 3, 200),
        grades=grades,
        ignore=ignore,
        metric=metric,
        query_chunk=data.draw(st.integers(1, 20)),
        document_chunk=data.draw(st.integers(4, 100)),
    )
    assert_same(found, retrieval_metrics(score_matrix(q, d, metric), matrix, (1, 3, 200), mask))


@pytest.mark.parametrize("compared", [0, 100])
def test_sorting_and_comparing_count_alike_in_any_precision(monkeypatch, compared):
    monkeypatch.setattr(embedding_retrieval, "_COMPARED", compared)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(200, 12, generator=generator)
    documents = torch.cat([documents, documents[:80], documents[:20] * (1 + 1e-7)]).bfloat16()
    queries = documents[:40] + 0.1 * torch.randn(40, 12, generator=generator)
    labels = torch.randint(4, (40,), generator=generator), torch.randint(4, (300,), generator=generator)
    scores = score_matrix(queries.double(), documents.double(), "inner")
    expected = retrieval_metrics(scores, labels[0][:, None] == labels[1])
    for chunks in ((16, 64), (2048, 8192)):
        found = retrieval_metrics_from_embeddings(
            queries, documents, labels, metric="inner", query_chunk=chunks[0], document_chunk=chunks[1]
        )
        assert_same(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_histogram_of_pooled_scores_counts_as_looking_up_does(monkeypatch, tied):
    generator = torch.Generator().manual_seed(0)
    q, d = rows(generator, 40, 5, tied), rows(generator, 90, 5, tied)
    matrix = torch.rand(40, 90, generator=generator) < 0.05
    expected = retrieval_metrics(score_matrix(q, d, "inner"), matrix)["pooled_auc"]
    for cells in (10, 300, 10**6):
        monkeypatch.setattr(pooled_counts, "_CELLS", cells)
        found = retrieval_metrics_from_embeddings(q, d, matrix.nonzero(), metric="inner")
        assert found["pooled_auc"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_collapsed_embeddings_score_by_index_and_by_chance(metric):
    x = torch.full((60, 7), 0.3)
    labels = torch.arange(60) % 3
    found = retrieval_metrics_from_embeddings(x, x, (labels, labels), metric=metric, document_chunk=7)
    expected = retrieval_metrics(torch.zeros(60, 60), labels[:, None] == labels)
    assert_same(found, expected)
    assert found["pooled_auc"] == 0.5


@settings(deadline=None, max_examples=12)
@given(SEEDS, st.sampled_from(["cosine", "inner", "euclidean"]), st.integers(3, 30), st.integers(4, 30))
def test_chunks_change_no_bit(seed, metric, query_chunk, document_chunk):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 5, generator=generator)[torch.randint(10, (25,), generator=generator)]
    labels = torch.randint(3, (25,), generator=generator)
    every = torch.arange(25)
    options = {"ignore": (every, every), "metric": metric}
    whole = retrieval_metrics_from_embeddings(x, x, (labels, labels), **options)
    found = retrieval_metrics_from_embeddings(
        x, x, (labels, labels), query_chunk=query_chunk, document_chunk=document_chunk, **options
    )
    assert found == whole


def test_worked_by_hand():
    documents = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    found = retrieval_metrics_from_embeddings(
        torch.ones(1, 1),
        documents,
        torch.tensor([[0, 3], [0, 1]]),
        (2, 4),
        grades=torch.tensor([1.0, 3.0]),
        metric="inner",
    )
    assert found["recall@2"] == 0.5 and found["mrr"] == 0.5 and found["map"] == 0.5
    gain, best = 3 / math.log2(3) + 1 / math.log2(5), 3 + 1 / math.log2(3)
    assert found["ndcg@4"] == pytest.approx(gain / best)
    assert found["pooled_auc"] == 0.25


def test_the_auc_may_be_left_out():
    x = torch.eye(3)
    found = retrieval_metrics_from_embeddings(x, x, (torch.arange(3), torch.arange(3)), pooled_auc=False)
    assert "pooled_auc" not in found and found["mrr"] == 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_sets_give_nan(shape):
    found = retrieval_metrics_from_embeddings(
        torch.ones(shape[0], 2), torch.ones(shape[1], 2), torch.empty(0, 2, dtype=torch.long)
    )
    assert_same(found, retrieval_metrics(torch.zeros(shape), torch.zeros(shape)))


def test_bad_input_is_refused():
    x, pairs = torch.eye(3), torch.tensor([[0, 1], [2, 2]])
    metrics = retrieval_metrics_from_embeddings
    with pytest.raises(ValueError, match="ks must be >= 1, got 0"):
        metrics(x, x, pairs, (0,))
    with pytest.raises(ValueError, match="queries must be finite"):
        metrics(x * math.nan, x, pairs)
    with pytest.raises(ValueError, match="relevance must hold each pair once, got 1 pairs more than once"):
        metrics(x, x, pairs[[0, 1, 0]])
    with pytest.raises(ValueError, match=r"relevance\[:, 1\] must be indices in \[0, 3\), got 1 to 3"):
        metrics(x, x, pairs + torch.tensor([0, 1]) * (pairs > 1))
    with pytest.raises(ValueError, match="grades must be finite and >= 0, got values from -1.0 to 1.0"):
        metrics(x, x, pairs, grades=torch.tensor([-1.0, 1.0]))
    with pytest.raises(
        ValueError, match=r"grades must be one for each pair of relevance, got shape \(2,\) for ids"
    ):
        metrics(x, x, (torch.arange(3), torch.arange(3)), grades=torch.ones(2))
    with pytest.raises(ValueError, match=r"ids of documents in relevance|ids of base in relevance"):
        inspect.unwrap(metrics)(x, x, (torch.arange(3), torch.arange(2)))
