import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.motion import (
    contrastive_max_loss,
    hard_negatives,
    matching_loss,
    next_words,
    prefix_lm_loss,
    query_text_scores,
    query_token_loss,
)

# Contrastive


def test_scores_are_cosines_with_the_nearest_query() -> None:
    queries, texts = torch.randn(4, 3, 5), torch.randn(6, 5)
    scores = query_text_scores(queries, texts)
    for b in range(4):
        for c in range(6):
            best = max(F.cosine_similarity(queries[b, k], texts[c], dim=0).item() for k in range(3))
            assert scores[b, c].item() == pytest.approx(best, abs=1e-6)


def test_with_distinct_texts_the_loss_is_torchs_cross_entropy_both_ways() -> None:
    queries, texts = torch.randn(6, 3, 5), torch.randn(6, 5)
    scores = query_text_scores(queries, texts) * 7.0
    own = torch.arange(6)
    expected = (
        F.cross_entropy(scores, own, label_smoothing=0.1)
        + F.cross_entropy(scores.T, own, label_smoothing=0.1)
    ) / 2
    torch.testing.assert_close(contrastive_max_loss(queries, texts, 7.0), expected)


def test_pairs_with_the_same_text_do_not_compete() -> None:
    queries, texts = torch.randn(4, 2, 5), torch.randn(4, 5)
    texts[3] = texts[0]
    groups = torch.tensor([0, 1, 2, 0])
    scores = query_text_scores(queries, texts)
    expected = 0.0
    for table in (scores, scores.T):
        for i in range(4):
            kept = [j for j in range(4) if j == i or groups[j] != groups[i]]
            own = torch.tensor(kept.index(i))
            expected += F.cross_entropy(table[i, kept], own, label_smoothing=0.1).item() / 8
    found = contrastive_max_loss(queries, texts, 1.0, groups=groups)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_a_pair_reaches_its_nearest_query_alone() -> None:
    queries = torch.tensor([[[1.0, 0.1], [0.2, 1.0]]], requires_grad=True)
    query_text_scores(queries, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert queries.grad is not None
    assert (queries.grad[0, 0] != 0).any()
    assert (queries.grad[0, 1] == 0).all()


def test_a_single_pair_and_equal_texts_cost_nothing() -> None:
    assert contrastive_max_loss(torch.randn(1, 2, 3), torch.randn(1, 3)).item() == 0
    groups = torch.zeros(4, dtype=torch.int64)
    loss = contrastive_max_loss(torch.randn(4, 2, 3), torch.randn(4, 3), groups=groups)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    queries, texts = (
        torch.randn(3, 2, 4).double().requires_grad_(),
        torch.randn(3, 4).double().requires_grad_(),
    )
    scale = torch.tensor(3.0).double().requires_grad_()
    groups = torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(
        lambda q, t, s: contrastive_max_loss(q, t, s, groups=groups), (queries, texts, scale)
    )


def test_half_precision_is_computed_in_full() -> None:
    queries, texts = torch.randn(5, 2, 4).half(), torch.randn(5, 4).half()
    found = contrastive_max_loss(queries, texts, 100.0)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, contrastive_max_loss(queries.float(), texts.float(), 100.0))


# Hard negatives


@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 50))
def test_no_own_pair_and_no_same_text_is_ever_drawn(count: int, texts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(texts, (count,), generator=generator)
    # The true pair has by far the highest score, as after training.
    scores = torch.randn(count, count, generator=generator) + 1000 * torch.eye(count)
    found = hard_negatives(scores, groups, generator=generator)
    for drawn in found:
        for row, other in enumerate(drawn.tolist()):
            possible = (groups != groups[row]).nonzero().flatten().tolist()
            assert other in possible if possible else other == -1


def test_without_groups_the_diagonal_alone_is_barred() -> None:
    for _ in range(20):
        found = hard_negatives(100 * torch.eye(3))
        assert all(int(drawn[row]) in {0, 1, 2} - {row} for drawn in found for row in range(3))


def test_draws_follow_the_softmax_of_the_scores() -> None:
    groups = torch.arange(900) % 3
    by_group = torch.tensor([[9.0, 0.0, 1.0], [2.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    found = hard_negatives(by_group[groups][:, groups], groups, generator=torch.Generator().manual_seed(0))
    texts, motions = groups[found.text_of_motion[groups == 0]], groups[found.motion_of_text[groups == 0]]
    assert (texts == 2).float().mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)
    # Column 0 without its own group: scores 2 and 0.
    assert (motions == 1).float().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.06)


def test_half_precision_scores_that_would_round_to_no_probability_still_give_a_draw() -> None:
    scores = torch.full((4, 4), -60000.0).half().fill_diagonal_(60000.0)
    assert (hard_negatives(scores).motion_of_text >= 0).all()


def test_what_has_no_chance_is_not_drawn_for_want_of_others() -> None:
    scores = torch.zeros(3, 3)
    scores[:, 2] = -math.inf
    scores[0, 1] = -math.inf
    found = hard_negatives(scores)
    assert found.text_of_motion.tolist() == [-1, 0, found.text_of_motion[2].item()]
    assert found.motion_of_text.tolist()[1:] == [2, -1]


def test_an_order_moves_the_noise_with_the_rows() -> None:
    scores, order = torch.randn(5, 5), torch.tensor([3, 0, 4, 1, 2])
    plain = hard_negatives(scores, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    moved = hard_negatives(scores[order][:, order], generator=torch.Generator().manual_seed(1), order=order)
    assert torch.equal(place[plain.text_of_motion[order]], moved.text_of_motion)
    assert torch.equal(place[plain.motion_of_text[order]], moved.motion_of_text)


# Matching, captions, codes


def test_matching_is_the_cross_entropy_of_the_mean_over_queries() -> None:
    logits, matches = torch.randn(5, 3, 2), torch.tensor([True, False, True, False, False])
    expected = F.cross_entropy(logits.mean(1), matches.long())
    torch.testing.assert_close(matching_loss(logits, matches), expected)
    assert matching_loss(torch.zeros(0, 3, 2), torch.zeros(0, dtype=torch.bool)).item() == 0


def test_each_word_is_asked_of_the_place_before_it_and_padding_is_not() -> None:
    words = torch.tensor([[3, 4, 0], [5, 6, 7]])
    assert next_words(words, end_id=9).tolist() == [[3, 4, 9, -100], [5, 6, 7, 9]]
    logits = torch.randn(2, 4, 10)
    places = [(0, 0, 3), (0, 1, 4), (0, 2, 9), (1, 0, 5), (1, 1, 6), (1, 2, 7), (1, 3, 9)]
    expected = sum(-torch.log_softmax(logits[b, t], 0)[word].item() for b, t, word in places) / 7
    found = prefix_lm_loss(logits, words, 9, label_smoothing=0.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    changed = logits.clone()
    changed[0, 3] = torch.nan  # what stands at padding does not matter
    assert prefix_lm_loss(changed, words, 9, label_smoothing=0.0).item() == pytest.approx(expected, rel=1e-5)


def test_query_i_is_held_to_code_i_and_padding_to_nothing() -> None:
    logits, codes = torch.randn(2, 4, 6), torch.tensor([[1, 5, 2], [0, -100, -100]])
    found = query_token_loss(logits, codes, label_smoothing=0.0)
    wanted = [(0, 0, 1), (0, 1, 5), (0, 2, 2), (1, 0, 0)]
    expected = sum(-torch.log_softmax(logits[b, q], 0)[code].item() for b, q, code in wanted) / 4
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert query_token_loss(logits, torch.full((2, 4), -100)).item() == 0


def test_bad_input_is_named(as_users_call: None) -> None:
    queries, texts = torch.randn(3, 2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="texts must have the width of queries, 4, got 5"):
        query_text_scores(queries, torch.randn(3, 5))
    with pytest.raises(ValueError, match="queries must be at least 1 to a motion, got 0"):
        query_text_scores(queries[:, :0], texts)
    with pytest.raises(ValueError, match="texts must be one for each of 3 motions, got 2"):
        contrastive_max_loss(queries, texts[:2])
    with pytest.raises(ValueError, match="scale must be > 0 and finite, got 0"):
        contrastive_max_loss(queries, texts, 0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        contrastive_max_loss(queries, texts, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"groups must have shape \(3,\), got \(2,\)"):
        contrastive_max_loss(queries, texts, groups=torch.zeros(2))
    with pytest.raises(ValueError, match=r"groups must have shape \(3,\), got \(2,\)"):
        hard_negatives(torch.zeros(3, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="matches must be one for each of 3 pairs, got 2"):
        matching_loss(torch.zeros(3, 2, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"logits must have shape \(1, 3, vocabulary\), got \(1, 2, 5\)"):
        prefix_lm_loss(torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="codes must have 1 rows of at most 2 tokens"):
        query_token_loss(torch.zeros(1, 2, 5), torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes must be -100 or in 0 .. 4, got -1"):
        query_token_loss(torch.zeros(1, 2, 5), torch.tensor([[1, -1]]))
