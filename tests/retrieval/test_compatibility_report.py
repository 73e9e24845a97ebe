"""The report equals a ranking written out, knows what a query may not find, and Procrustes finds the rotation there is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coloss.errors import InputError
from coloss.retrieval import CompatibilityReport, compatibility_report, procrustes_map


def problem(queries=12, gallery=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old_q, old_g = (torch.randn(n, 3, generator=generator) for n in (queries, gallery))
    new_q, new_g = (torch.randn(n, 5, generator=generator) for n in (queries, gallery))
    labels = [torch.randint(3, (n,), generator=generator) for n in (queries, gallery)]
    return old_q, new_q, old_g, new_g, *labels


def twin(queries, gallery, query_labels, gallery_labels, left_out):
    """Query by query: share of hits among the first k, and average precision."""
    q, g = (F.normalize(part.double(), dim=1).numpy() for part in (queries, gallery))
    first, five, precision = [], [], []
    for i, row in enumerate(q @ g.T):
        order = [j for j in np.argsort(-row, kind="stable") if not left_out(i, j)]
        hits = np.array([gallery_labels[j] == query_labels[i] for j in order], dtype=float)
        if not hits.any():
            continue
        first.append(hits[:1].any())
        five.append(hits[:5].any())
        precision.append((np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits).sum() / hits.sum())
    return np.mean(first), np.mean(five), np.mean(precision), len(first)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_ranking_written_out(seed):
    old_q, new_q, old_g, new_g, ql, gl = problem(seed=seed)
    report = compatibility_report(old_q, new_q, old_g, new_g, ql, gl)
    for found, (queries, gallery) in (
        (report.old_old, (old_q, old_g)),
        (report.new_old, (new_q[:, :3], old_g)),
        (report.new_new, (new_q, new_g)),
    ):
        first, five, precision, counted = twin(queries, gallery, ql, gl, lambda i, j: False)
        assert (found["cmc@1"], found["cmc@5"], found["map"]) == pytest.approx((first, five, precision))
        assert found["queries"] == counted


def test_a_query_is_left_out_of_its_own_ranking():
    old, new, *_, labels, _ = problem(queries=15, gallery=15)
    report = compatibility_report(old, new, old, new, labels)
    for found, embeddings in ((report.old_old, old), (report.new_new, new)):
        first, five, precision, counted = twin(embeddings, embeddings, labels, labels, lambda i, j: i == j)
        assert (found["cmc@1"], found["cmc@5"], found["map"]) == pytest.approx((first, five, precision))
        assert found["queries"] == counted
    # Left in, each would find itself first.
    cheating = compatibility_report(old, new, old, new, labels, labels)
    assert cheating.old_old["cmc@1"] == cheating.new_new["cmc@1"] == 1.0 > report.old_old["cmc@1"]


def test_ids_leave_out_items_that_are_the_query_under_another_number():
    old_q, new_q, old_g, new_g, ql, gl = problem()
    ids = torch.arange(12), torch.cat([torch.arange(12), torch.arange(100, 108)]).flip(0)
    report = compatibility_report(old_q, new_q, old_g, new_g, ql, gl, ids=ids)
    expected = twin(old_q, old_g, ql, gl, lambda i, j: ids[0][i] == ids[1][j])
    assert (report.old_old["cmc@1"], report.old_old["cmc@5"], report.old_old["map"]) == pytest.approx(
        expected[:3]
    )


def test_queries_without_anything_to_find_are_skipped_and_counted():
    labels = torch.tensor([0, 0, 1])  # the only sample of class 1 cannot find itself
    vectors = torch.eye(3)
    report = compatibility_report(vectors, vectors, vectors, vectors, labels)
    assert report.old_old["queries"] == 2 and report.old_old["queries_skipped"] == 1
    assert report.old_old["cmc@5"] == 1.0


def test_rankings_in_the_old_index_do_not_depend_on_the_length_of_a_query():
    old_q, new_q, old_g, new_g, ql, gl = problem()
    old_g = F.normalize(old_g, dim=1)
    scaled = new_q * torch.rand(12, 1).add(0.1)
    for metric in ("cosine", "inner", "euclidean"):
        first, second = (
            compatibility_report(old_q, q, old_g, new_g, ql, gl, metric=metric).new_old
            for q in (new_q, scaled)
        )
        assert first == second


def test_an_old_index_that_new_items_join_needs_unit_vectors():
    """Long new vectors would outrank old ones whatever their direction."""
    direction = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    old_item, new_item = (
        F.normalize(direction[:1]),
        5 * F.normalize(direction[2:] + torch.tensor([[0.3, 0.0]])),
    )
    query, labels = F.normalize(direction[1:2]), (torch.tensor([0]), torch.tensor([0, 1]))

    def top(items):
        return compatibility_report(query, query, items, items, *labels, metric="inner").old_old["cmc@1"]

    assert top(torch.cat([old_item, new_item])) == 0.0
    assert top(torch.cat([old_item, F.normalize(new_item)])) == 1.0


def test_gain_is_the_share_of_the_way_from_old_to_new():
    report = CompatibilityReport({"map": 0.5}, {"map": 0.6}, {"map": 0.9})
    assert report.update_gain() == pytest.approx(0.25) and report.is_compatible()
    worse = CompatibilityReport({"map": 0.5}, {"map": 0.4}, {"map": 0.5})
    assert math.isnan(worse.update_gain()) and not worse.is_compatible()


@pytest.mark.parametrize("dim_new, dim_old", [(4, 4), (6, 4), (3, 5)])
def test_procrustes_finds_the_rotation_there_is(dim_new, dim_old):
    dim = min(dim_new, dim_old)
    shared = torch.randn(40, dim, dtype=torch.float64)
    turns = [torch.linalg.qr(torch.randn(d, dim, dtype=torch.float64)).Q for d in (dim_new, dim_old)]
    new, old = (shared @ turn.T for turn in turns)
    found = procrustes_map(new, old)
    torch.testing.assert_close(new @ found, old)
    assert found.shape == (dim_new, dim_old)


def test_procrustes_beats_every_other_rotation_and_keeps_lengths():
    new, old = torch.randn(2, 30, 4, dtype=torch.float64)
    best = procrustes_map(new, old)
    torch.testing.assert_close(best.T @ best, torch.eye(4, dtype=torch.float64))
    cost = (new @ best - old).square().sum()
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        assert (new @ other - old).square().sum() >= cost


def test_procrustes_takes_half_precision():
    new = torch.randn(9, 3).half()
    assert procrustes_map(new, new).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    old_q, new_q, old_g, new_g, ql, gl = problem()
    with pytest.raises(InputError, match="gallery_labels must be given .* got 12 queries and 20 items"):
        compatibility_report(old_q, new_q, old_g, new_g, ql)
    with pytest.raises(
        InputError, match="new_queries must have at least the 5 dimensions of the old gallery, got 3"
    ):
        compatibility_report(new_q, old_q, new_g, old_g, ql, gl)
    given = compatibility_report(new_q, old_q, new_g, old_g, ql, gl, compatible_queries=F.pad(old_q, (0, 2)))
    assert 0 < given.new_old["map"] < 1
    with pytest.raises(InputError, match="new and old must hold the same samples, got 0 and 0"):
        procrustes_map(torch.zeros(0, 2), torch.zeros(0, 2))


def test_row_counts_are_checked(as_users_call):
    old_q, new_q, old_g, new_g, ql, gl = problem()
    with pytest.raises(InputError, match="new_queries must have 12 rows, got 11"):
        compatibility_report(old_q, new_q[:11], old_g, new_g, ql, gl)
    with pytest.raises(InputError, match="gallery_labels must have 20 rows, got 19"):
        compatibility_report(old_q, new_q, old_g, new_g, ql, gl[:19])
