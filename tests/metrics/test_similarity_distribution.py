"""The metric has its bounds, equals its definition written out, ignores the gallery's order, and sees margins that mAP does not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from coloss.metrics import SimilarityDistribution, mean_similarity_distribution, retrieval_metrics

W = 1 - math.exp(-1)


def problem(seed=0, queries=8, gallery=15, identities=4):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.rand(queries, gallery, generator=generator) - 1
    ids = [torch.randint(identities, (n,), generator=generator) for n in (queries, gallery)]
    return scores, *ids


def twin(scores, query_ids, gallery_ids, sort=True):
    """Rank by rank; with sort=False the similarities stay in the gallery's order while matches are sorted."""
    values = []
    for row, identity in zip((scores.double().numpy() + 1) / 2, query_ids.tolist()):
        order = np.argsort(-row, kind="stable")
        match = gallery_ids.numpy()[order] == identity
        s = row[order] if sort else row
        if not match.any():
            continue
        total = sum((s[: r + 1] * match[: r + 1]).sum() / s[: r + 1].sum() for r in np.flatnonzero(match))
        weight = 1.0 if match.all() else 1 - np.exp(-s[match].mean() / s[~match].mean())
        values.append(weight * total / match.sum())
    return 100 * np.mean(values)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_written_out(seed):
    found = mean_similarity_distribution(*problem(seed))
    assert found.msd == pytest.approx(twin(*problem(seed)), rel=1e-9)


def test_a_perfect_ranking_scores_from_63_to_100():
    ids, gallery = torch.tensor([0]), torch.tensor([0, 0, 1, 1])
    best = mean_similarity_distribution(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), ids, gallery, in_range="unit")
    flat = mean_similarity_distribution(torch.full((1, 4), 0.3), ids, gallery, in_range="unit")
    nearly = mean_similarity_distribution(
        torch.tensor([[1.0, 1.0, 1e-4, 1e-4]]), ids, gallery, in_range="unit"
    )
    assert best.msd == 100.0 and flat.msd == pytest.approx(100 * W)
    assert nearly.msd == pytest.approx(100.0, abs=0.05)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_the_gallerys_order_does_not_matter(seed):
    scores, query_ids, gallery_ids = problem(seed)
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(seed + 1))
    first = mean_similarity_distribution(scores, query_ids, gallery_ids)
    second = mean_similarity_distribution(scores[:, shuffled], query_ids, gallery_ids[shuffled])
    assert first.msd == pytest.approx(second.msd, rel=1e-12, nan_ok=True)
    assert math.isnan(first.msd) or 0 <= first.msd <= 100


def test_the_released_calculators_result_changes_with_the_gallerys_order():
    scores, query_ids, gallery_ids = problem(1)
    found = mean_similarity_distribution(scores, query_ids, gallery_ids, compat="released").msd
    assert found == pytest.approx(twin(scores, query_ids, gallery_ids, sort=False), rel=1e-9)
    turned = mean_similarity_distribution(
        scores.flip(1), query_ids, gallery_ids.flip(0), compat="released"
    ).msd
    assert abs(found - turned) > 0.5
    assert abs(found - mean_similarity_distribution(scores, query_ids, gallery_ids).msd) > 1
    # A gallery that is in the order of the ranking is the one case in which both agree.
    row, order = scores[:1].sort(dim=1, descending=True)
    for compat in ("released", None):
        ordered = mean_similarity_distribution(row, query_ids[:1], gallery_ids[order[0]], compat=compat)
        assert ordered.msd == pytest.approx(
            mean_similarity_distribution(scores[:1], query_ids[:1], gallery_ids).msd
        )


def test_equal_similarities_give_average_precision_by_a_constant():
    scores, query_ids, gallery_ids = torch.zeros(8, 15), *problem(2)[1:]
    found = mean_similarity_distribution(scores, query_ids, gallery_ids)
    average = retrieval_metrics(scores, query_ids[:, None] == gallery_ids, (1,))["map"]
    assert found.msd == pytest.approx(100 * W * average, rel=1e-6)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_relevant_item_scores_its_share_of_what_stands_above(place):
    similarity = torch.tensor([[0.9, 0.7, 0.5, 0.3, 0.1]])
    gallery = torch.arange(5)
    found = mean_similarity_distribution(similarity, torch.tensor([place]), gallery, in_range="unit")
    own, rest = similarity[0, place], torch.cat([similarity[0, :place], similarity[0, place + 1 :]])
    weight = 1 - torch.exp(-own / rest.mean())
    expected = weight * own / similarity[0, : place + 1].sum()
    assert found.msd == pytest.approx(100 * expected.item(), rel=1e-6)


def test_squeezed_similarities_keep_the_average_precision_and_lose_here():
    data = load_digits()
    rows = torch.tensor(data.data[:200], dtype=torch.float32)
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    labels = torch.tensor(data.target[:200])
    scores = rows[:50] @ rows[50:].T
    ids = labels[:50], labels[50:]
    previous = math.inf
    for part in (1.0, 0.5, 0.1):
        squeezed = (1 - part) + part * scores
        average = retrieval_metrics(squeezed.double(), ids[0][:, None] == ids[1], (1,))["map"]
        assert average == pytest.approx(
            retrieval_metrics(scores.double(), ids[0][:, None] == ids[1], (1,))["map"], abs=1e-3
        )
        found = mean_similarity_distribution(squeezed, *ids).msd
        assert found < previous - 0.5
        previous = found


def test_queries_without_relevant_items_are_skipped_and_counted():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = mean_similarity_distribution(scores, torch.tensor([0, 9]), torch.tensor([0, 1]), in_range="unit")
    assert (found.msd, found.queries, found.queries_skipped) == (100.0, 1, 1)
    assert found.per_query[1].isnan()
    nothing = mean_similarity_distribution(scores, torch.tensor([8, 9]), torch.tensor([0, 1]))
    assert math.isnan(nothing.msd) and nothing.queries == 0


def test_edges_are_defined():
    one, two = torch.tensor([0]), torch.tensor([0, 0])
    all_relevant = mean_similarity_distribution(torch.tensor([[0.4, 0.2]]), one, two, in_range="unit")
    assert all_relevant.msd == 100.0  # nothing to stand above: w is 1
    nothing_similar = mean_similarity_distribution(torch.full((1, 3), -1.0), one, torch.tensor([0, 1, 2]))
    assert nothing_similar.msd == 0.0
    assert math.isnan(mean_similarity_distribution(torch.zeros(0, 3), one[:0], torch.arange(3)).msd)
    assert mean_similarity_distribution(torch.zeros(2, 0), two, one[:0]).queries_skipped == 2
    rounded = mean_similarity_distribution(torch.tensor([[1.00001, -1.00001]]), one, torch.tensor([0, 1]))
    assert rounded.msd == 100.0


def test_ties_are_broken_by_the_lower_index():
    tied = torch.zeros(1, 3)
    first, last = (
        mean_similarity_distribution(tied, torch.tensor([0]), torch.tensor(gallery)).msd
        for gallery in ([0, 1, 1], [1, 1, 0])
    )
    assert first == pytest.approx(100 * W) and last == pytest.approx(100 * W / 3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_similarities_are_summed_in_full(half):
    scores, *ids = problem(3)
    found = mean_similarity_distribution(scores.to(half), *ids).msd
    assert found == pytest.approx(mean_similarity_distribution(scores.to(half).double(), *ids).msd, rel=1e-12)


def test_batches_of_queries_add_up():
    scores, query_ids, gallery_ids = problem(5, queries=20, identities=6)
    metric = SimilarityDistribution()
    for rows in torch.arange(20).split(7):
        metric.update(scores[rows], query_ids[rows], gallery_ids)
    whole = mean_similarity_distribution(scores, query_ids, gallery_ids)
    assert metric.compute().item() == pytest.approx(whole.msd, rel=1e-6)
    assert (int(metric.queries), int(metric.queries_skipped)) == (whole.queries, whole.queries_skipped)
    metric.reset()
    metric.update(scores[:1], torch.tensor([99]), gallery_ids)
    assert metric.compute().isnan()


def test_bad_input_is_named(as_users_call):
    scores, query_ids, gallery_ids = problem()
    for arguments, message in (
        ((scores, query_ids[:3], gallery_ids), r"query_ids must have shape \(8,\), got \(3,\)"),
        ((scores, query_ids, gallery_ids[:3]), r"gallery_ids must have shape \(15,\), got \(3,\)"),
        ((2 * scores, query_ids, gallery_ids), r"similarity must be in \[-1, 1\], got values from"),
        (
            (scores * math.nan, query_ids, gallery_ids),
            r"similarity must be in \[-1, 1\], got values from nan",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mean_similarity_distribution(*arguments)
    with pytest.raises(ValueError, match=r"similarity must be in \[0, 1\]"):
        mean_similarity_distribution(scores, query_ids, gallery_ids, in_range="unit")
    with pytest.raises(ValueError, match='in_range must be "cosine" or "unit", got \'degrees\''):
        SimilarityDistribution(in_range="degrees")
    with pytest.raises(ValueError, match="compat must be \"released\" or None, got 'paper'"):
        mean_similarity_distribution(scores, query_ids, gallery_ids, compat="paper")
