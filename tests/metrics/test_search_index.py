"""An index finds what an exact search finds, keeps it on disk, and says what is wrong."""

import builtins
import json

import pytest
import torch

from coloss.errors import DataNotFoundError, InputError
from coloss.metrics import SearchIndex, nearest_neighbours

METRICS = ("cosine", "inner", "euclidean")


def embeddings(rows, seed=0, dimensions=12):
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
def test_the_default_is_the_exact_search(metric):
    documents, queries = embeddings(300), embeddings(20, seed=1)
    expected = nearest_neighbours(queries, documents, 7, metric=metric)
    found = SearchIndex(documents, metric=metric).search(queries, 7)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("metric", METRICS)
def test_a_flat_index_of_faiss_is_exact(metric):
    pytest.importorskip("faiss")
    documents, queries = embeddings(500), embeddings(40, seed=1)
    documents[3] = 0  # a zero row
    expected = nearest_neighbours(queries, documents, 11, metric=metric)
    gaps = expected.values.diff(dim=1).abs().min()
    assert gaps > 1e-6  # wider than the rounding of float32, so the order must agree
    found = SearchIndex(documents, metric=metric, backend="faiss").search(queries, 10)
    assert torch.equal(found.indices, expected.indices[:, :10])
    torch.testing.assert_close(found.values, expected.values[:, :10], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_documents_come_in_order(metric):
    pytest.importorskip("faiss")
    documents = torch.eye(3).repeat(4, 1)
    for backend in ("exact", "faiss"):
        found = SearchIndex(documents, metric=metric, backend=backend).search(torch.eye(3), 4)
        assert found.indices.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
@pytest.mark.parametrize("metric", METRICS)
def test_approximate_indexes_find_most_and_more_with_effort(kind, metric):
    pytest.importorskip("faiss")
    documents, queries = embeddings(2000), embeddings(50, seed=1)
    exact = nearest_neighbours(queries, documents, 10, metric=metric).indices
    shares = []
    for effort in (1, 1000):
        index = SearchIndex(documents, metric=metric, backend="faiss", kind=kind, effort=effort)
        found = index.search(queries, 10).indices
        shares.append(float((found[:, :, None] == exact[:, None]).any(2).float().mean()))
    assert shares[0] < shares[1] and shares[1] > 0.97


def test_too_few_found_are_filled_up():
    pytest.importorskip("faiss")
    documents = torch.cat([torch.zeros(3, 2), torch.full((5, 2), 9.0)]) + 0.01 * embeddings(8, dimensions=2)
    for metric, rest in (("euclidean", torch.inf), ("inner", -torch.inf)):
        index = SearchIndex(documents, metric=metric, backend="faiss", kind="ivf", cells=2, effort=1)
        found = index.search(torch.tensor([[-1.0, -1.0]]), 8)
        missing = found.indices[0] < 0
        assert 0 < missing.sum() < 8 and not missing[0]
        assert (found.values[0, missing] == rest).all() and found.values[0, ~missing].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"backend": "faiss"}, {"backend": "faiss", "kind": "hnsw"}, {"backend": "faiss", "kind": "ivf"}],
)
@pytest.mark.parametrize("metric", METRICS)
def test_a_stored_index_answers_as_before(tmp_path, options, metric):
    if options:
        pytest.importorskip("faiss")
    index = SearchIndex(embeddings(200), metric=metric, **options)
    queries = embeddings(5, seed=1)
    before = index.search(queries, 4)
    loaded = SearchIndex.load(index.save(tmp_path / "index"))
    after = loaded.search(queries, 4)
    assert torch.equal(before.values, after.values) and torch.equal(before.indices, after.indices)
    assert len(loaded) == 200 and loaded.effort == index.effort
    index.save(tmp_path / "index")  # again into the same folder
    assert len(SearchIndex.load(tmp_path / "index")) == 200
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_an_index_in_place_of_another_backend_leaves_nothing_of_it(tmp_path):
    pytest.importorskip("faiss")
    for backend, name in (("exact", "safetensors"), ("faiss", "faiss"), ("exact", "safetensors")):
        SearchIndex(embeddings(9), backend=backend).save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"index.json", f"documents.{name}"}
        assert SearchIndex.load(tmp_path).backend == backend


def test_without_documents_any_number_of_cells_will_do():
    assert len(SearchIndex(embeddings(0), backend="faiss", kind="ivf", cells=4)) == 0


def test_half_precision_is_kept(tmp_path):
    index = SearchIndex(embeddings(20).half())
    loaded = SearchIndex.load(index.save(tmp_path))
    assert torch.equal(index.search(embeddings(2)).values, loaded.search(embeddings(2)).values)


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_few_documents_and_no_queries(backend, tmp_path):
    if backend == "faiss":
        pytest.importorskip("faiss")
    index = SearchIndex(embeddings(3), backend=backend)
    assert index.search(embeddings(2), 10).indices.shape == (2, 3)
    assert index.search(embeddings(0), 10).indices.shape == (0, 3)
    empty = SearchIndex(embeddings(0), backend=backend)
    assert empty.search(embeddings(2)).indices.shape == (2, 0)
    assert len(SearchIndex.load(empty.save(tmp_path))) == 0


def test_without_faiss_the_error_says_how_to_get_it(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs the package faiss-cpu: pip install 'coloss\[search\]'"):
        SearchIndex(embeddings(3), backend="faiss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "hamming"}, "metric must be one of cosine, inner, euclidean, got 'hamming'"),
        ({"backend": "annoy"}, "backend must be one of exact, faiss, got 'annoy'"),
        ({"backend": "faiss", "kind": "pq"}, "kind must be one of flat, hnsw, ivf, got 'pq'"),
        ({"kind": "hnsw"}, "kind must be 'flat' for the backend 'exact', got 'hnsw'"),
        ({"effort": 3}, "effort is of the kinds hnsw and ivf"),
        ({"backend": "faiss", "kind": "hnsw", "effort": 0}, "effort must be >= 1, got 0"),
        ({"links": 16}, "links is of the kind hnsw, leave it out for 'flat', got 16"),
        (
            {"backend": "faiss", "kind": "ivf", "links": 16},
            "links is of the kind hnsw, leave it out for 'ivf'",
        ),
        (
            {"backend": "faiss", "kind": "hnsw", "cells": 2},
            "cells is of the kind ivf, leave it out for 'hnsw'",
        ),
        ({"backend": "faiss", "kind": "hnsw", "links": 1}, "links must be >= 2, got 1"),
        ({"backend": "faiss", "kind": "ivf", "cells": 9}, r"cells must be in \[1, 3\], got 9"),
        ({"backend": "faiss", "kind": "ivf", "cells": 0}, "cells must be >= 1, got 0"),
    ],
)
def test_options_out_of_range(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        SearchIndex(embeddings(3), **options)


def test_values_that_cannot_be_searched(as_users_call):
    with pytest.raises(ValueError, match="documents must be finite"):
        SearchIndex(embeddings(3) * torch.inf)
    with pytest.raises(ValueError, match=r"documents must be \(documents, dimensions\), got shape \(4,\)"):
        SearchIndex(torch.zeros(4))
    index = SearchIndex(embeddings(3))
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        index.search(embeddings(1), 0)
    with pytest.raises(ValueError, match=r"queries must be \(queries, 12\), got shape \(1, 5\)"):
        index.search(embeddings(1, dimensions=5))
    with pytest.raises(ValueError, match="queries must be finite"):
        index.search(embeddings(1) * torch.nan)
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="queries must be finite"):
        SearchIndex(embeddings(3), backend="faiss").search(embeddings(1) * torch.nan)


def test_folders_that_hold_no_index(tmp_path):
    with pytest.raises(DataNotFoundError, match="there is no index in .*: index.json is missing"):
        SearchIndex.load(tmp_path)
    SearchIndex(embeddings(3)).save(tmp_path)
    plan = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(plan | {"format": 9}))
    with pytest.raises(InputError, match="is of version 9, this one reads 1"):
        SearchIndex.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(plan))
    (tmp_path / "documents.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="is broken .*checksum.*: build it anew"):
        SearchIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match="is broken .*: build it anew"):
        SearchIndex.load(tmp_path)
