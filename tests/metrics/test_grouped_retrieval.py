import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from coloss.metrics import (
    best_ranks,
    dissimilar_items,
    retrieval_protocols,
    similar_text_relevance,
    small_gallery_retrieval,
    two_way_retrieval,
)


def test_the_identity_finds_everything_first() -> None:
    found = two_way_retrieval(torch.eye(12))
    assert all(value == 1 for value in found.values())
    assert len(found) == 12


def test_constant_scores_share_the_average_rank() -> None:
    for count in (5, 6, 40):
        found = two_way_retrieval(torch.zeros(count, count))
        assert found["row_to_column_medr"] == found["column_to_row_medr"] == (count + 1) / 2
        assert found["row_to_column_r@1"] == 0
        assert found["row_to_column_r@10"] == float((count - 1) / 2 < 10)


@settings(max_examples=15)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_ranks_of_the_diagonal_are_scipys_average_ranks(count: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, (count, count)).astype(float)
    expected = [rankdata(-row)[i] - 1 for i, row in enumerate(scores)]
    assert best_ranks(torch.from_numpy(scores)).tolist() == expected


def test_any_answer_of_the_group_will_do_and_others_of_it_are_not_in_the_way() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.2, 0.1, 0.9, 0.3]])
    relevant = torch.tensor([[True, False, True, True], [False, True, False, True]])
    assert best_ranks(scores, relevant).tolist() == [1, 1]
    # The diagonal alone would put both behind items that say the same.
    found = two_way_retrieval(scores, relevant, ks=(1, 2))
    assert found["row_to_column_r@1"] == 0
    assert found["row_to_column_r@2"] == 1
    assert found["row_to_column_medr"] == 2
    assert found["column_to_row_r@1"] == 0.25  # column 3, for which both rows are right
    nobody = best_ranks(scores, torch.zeros_like(relevant))
    assert nobody.isnan().all()


def test_similarity_is_compared_on_the_scale_of_zero_to_one() -> None:
    cosines = torch.tensor([[1.0, 0.91, 0.89], [0.91, 1.0, 0.0], [0.89, 0.0, -1.0]])
    same = similar_text_relevance(cosines)
    assert same.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_of_two_clusters_and_a_loner_one_of_each_is_kept() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [10.0], [10.1], [50.0]])
    kept = dissimilar_items(-torch.cdist(points, points), 3)
    assert len(set(torch.tensor([0, 0, 0, 1, 1, 2])[kept].tolist())) == 3
    assert dissimilar_items(torch.eye(4), 9).tolist() == [0, 1, 2, 3]


def test_small_galleries_are_averaged_and_drop_what_is_left() -> None:
    scores = torch.randn(70, 70)
    found = small_gallery_retrieval(scores, gallery=32, seed=3)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    parts = [two_way_retrieval(scores[rows][:, rows]) for rows in (order[:32], order[32:64])]
    assert found == pytest.approx({name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_protocols_differ_where_texts_repeat() -> None:
    # Texts 0 and 1 are the same sentence; the model has their motions the wrong way round.
    scores = torch.eye(40)
    scores[:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    similarity = torch.eye(40)
    similarity[0, 1] = similarity[1, 0] = 1.0
    found = retrieval_protocols(scores, similarity, dissimilar=39)
    assert found["all"]["motion_to_text_r@1"] == 38 / 40
    assert found["threshold"]["motion_to_text_r@1"] == 1
    assert found["dissimilar"]["motion_to_text_medr"] == 1
    grouped = retrieval_protocols(scores, similarity, torch.tensor([0, 0, *range(1, 39)]))
    assert grouped["all"]["motion_to_text_r@1"] == 1
    assert "small" not in retrieval_protocols(torch.eye(8), torch.eye(8))


def test_bad_input_is_named(as_users_call: None) -> None:
    with pytest.raises(ValueError, match="relevant must be given where scores are not square"):
        best_ranks(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"relevant must have shape \(2, 3\), got \(3, 2\)"):
        best_ranks(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="scores must not be NaN"):
        best_ranks(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="ks must be >= 1"):
        two_way_retrieval(torch.eye(2), ks=(0,))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        similar_text_relevance(torch.eye(2), 2.0)
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        dissimilar_items(torch.eye(2), 0)
    with pytest.raises(ValueError, match="gallery must be in 1 .. the number of pairs"):
        small_gallery_retrieval(torch.eye(8), gallery=9)
    with pytest.raises(ValueError, match=r"text_similarity must have shape \(3, 3\), got \(2, 2\)"):
        retrieval_protocols(torch.eye(3), torch.eye(2))
