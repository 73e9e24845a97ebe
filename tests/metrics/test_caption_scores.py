import math

import pytest
import torch
import torch.nn.functional as F

from coloss.metrics import (
    TokenMatchScorer,
    caption_score,
    inverse_document_frequencies,
    overlap_scores,
    token_match_scores,
)


def test_overlap_by_hand() -> None:
    assert overlap_scores(["a b c d"], ["a b c d"]) == pytest.approx({"bleu@1": 1, "bleu@4": 1, "rouge_l": 1})
    found = overlap_scores(["a b x d"], [["a b c d", "q"]])
    assert found["bleu@1"] == pytest.approx(3 / 4)
    assert found["bleu@4"] == 0
    assert found["rouge_l"] == pytest.approx(3 / 4)
    # Too short by two words: the brevity penalty exp(1 - 4 / 2), of the corpus.
    assert overlap_scores(["a b"], ["a b c d"])["bleu@1"] == pytest.approx(math.exp(-1))


def test_overlap_of_longer_texts_by_hand() -> None:
    # Of 6 words 5 are found, of pairs 4 of 5, of threes 3 of 4, of fours 2 of 3: together 1 / 3.
    found = overlap_scores(["a b c d e x"], ["a b c d e f"])
    assert found["bleu@4"] == pytest.approx((1 / 3) ** 0.25)
    # A word counts as often as the reference that has most of it; of two references the one of nearest length sets the penalty.
    found = overlap_scores(["a a a"], [["a b a c d e f", "a b c d"]])
    assert found["bleu@1"] == pytest.approx(2 / 3 * math.exp(1 - 4 / 3))
    # Longest common subsequence "a c": precision 2 / 3, recall 2 / 4 and 2 / 2; the better reference counts.
    assert overlap_scores(["a x c"], [["a b c d", "a c"]])["rouge_l"] == pytest.approx(4 / 5)


def test_an_empty_sentence_finds_nothing_and_shortens_the_corpus() -> None:
    assert overlap_scores([""], ["a b"]) == {"bleu@1": 0, "bleu@4": 0, "rouge_l": 0}
    found = overlap_scores(["", "a b"], ["a b", "a b"])
    assert found["bleu@1"] == pytest.approx(math.exp(1 - 4 / 2))
    assert found["rouge_l"] == pytest.approx(1 / 2)


def test_rare_tokens_weigh_more() -> None:
    weights = inverse_document_frequencies([[1, 2, 2], [1, 3], [1]])
    assert weights == pytest.approx({1: math.log(4 / 4), 2: math.log(4 / 2), 3: math.log(4 / 2)})


def test_matching_is_that_of_a_slow_twin() -> None:
    x, y = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    valid_x, valid_y = torch.rand(3, 4) > 0.3, torch.rand(3, 6) > 0.3
    valid_x[:, 0] = valid_y[:, 0] = True
    w, v = torch.rand(3, 4), torch.rand(3, 6)
    found = token_match_scores(x, y, valid_x, valid_y, candidate_weights=w, reference_weights=v, baseline=0.2)
    for pair in range(3):
        left = [i for i in range(4) if valid_x[pair, i]]
        right = [j for j in range(6) if valid_y[pair, j]]

        def cosine(i: int, j: int, pair: int = pair) -> float:
            return F.cosine_similarity(x[pair, i], y[pair, j], dim=0).item()

        p = sum(w[pair, i] * max(cosine(i, j) for j in right) for i in left) / sum(w[pair, i] for i in left)
        r = sum(v[pair, j] * max(cosine(i, j) for i in left) for j in right) / sum(v[pair, j] for j in right)
        expected = [(value - 0.2) / 0.8 for value in (p, r, 2 * p * r / (p + r))]
        assert [part[pair].item() for part in found] == pytest.approx([float(e) for e in expected], rel=1e-4)


def test_equal_texts_score_one_and_empty_ones_nothing() -> None:
    x = torch.randn(2, 3, 4)
    assert token_match_scores(x, x).f1.tolist() == pytest.approx([1, 1])
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for found in (token_match_scores(x, x, nothing), token_match_scores(x, x, None, nothing)):
        assert [part.tolist() for part in found] == [[0, 0]] * 3
    assert token_match_scores(x, x[:, :0]).f1.tolist() == [0, 0]
    zero = torch.zeros(2, 3)
    even = token_match_scores(x, x, candidate_weights=zero, reference_weights=zero)
    assert even.f1.tolist() == pytest.approx([1, 1])


def test_what_stands_at_padding_reaches_no_score() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    expected = token_match_scores(x, y, valid, valid)
    x[~valid], y[~valid] = torch.nan, torch.inf
    for found, wanted in zip(token_match_scores(x, y, valid, valid), expected):
        torch.testing.assert_close(found, wanted)


def test_precision_and_recall_of_different_sign_have_no_harmonic_mean() -> None:
    # P = 0.2 and R = -0.19: their formula would say -7.6.
    x, y = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.2, 0.96**0.5], [-0.58, 0.6636**0.5]]])
    found = token_match_scores(x, y)
    assert found.precision.item() == pytest.approx(0.2)
    assert found.recall.item() == pytest.approx(-0.19)
    assert found.f1.item() == 0
    assert token_match_scores(x, -x).f1.item() == pytest.approx(-1)


def test_half_precision_is_computed_in_full() -> None:
    x = torch.randn(2, 3, 4).half()
    assert token_match_scores(x, x).f1.dtype is torch.float32


def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(texts), 4, dtype=torch.int64)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split()):
            ids[row, place] = ord(word) - 96
    return F.one_hot(ids, 30).float(), ids > 0, ids


def test_the_scorers_baseline_is_that_of_references_among_each_other() -> None:
    scorer = TokenMatchScorer(encode, weighted=False)
    references = ["a b", "c d", "e f"]
    # References share nothing: the baseline is 0, and one word of two is F1 = 1 / 2.
    assert scorer(["a b", "c x", "y z"], references).tolist() == pytest.approx([1, 0.5, 0])
    weighted = TokenMatchScorer(encode, rescaled=False)
    # b is in every reference, so that it weighs nothing beside a word that is in one.
    assert weighted(["a b", "x b"], ["a b", "c b"]).tolist() == pytest.approx([1, 0])


def test_the_baseline_does_not_pair_a_reference_with_its_like() -> None:
    scorer = TokenMatchScorer(encode, weighted=False)
    # In the order of what they say, as test sets often are: neighbours are equal or nearly so.
    references = ["a b", "a b", "a b", "a c", "d e", "d e", "d e", "d f"]
    found = scorer(["a b", "x y", *references[2:]], references)
    assert found[:2].tolist() == pytest.approx([1, 0])
    assert scorer(["a b", "a x"], ["a b", "a b"]).tolist() == pytest.approx([1, 0.5])


def test_caption_score_is_the_mean_over_motions() -> None:
    scorer = TokenMatchScorer(encode, weighted=False, rescaled=False)
    found = caption_score(
        lambda motions: [f"{motion} b" for motion in motions], scorer, ["a", "x"], ["a b", "a b"]
    )
    assert found == pytest.approx(0.75)


def test_bad_input_is_named(as_users_call: None) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="baseline must be < 1"):
        token_match_scores(x, x, baseline=1.0)
    with pytest.raises(ValueError, match="references must be one text for each candidate"):
        token_match_scores(x, x[:1])
    with pytest.raises(ValueError, match="weights must be >= 0"):
        token_match_scores(x, x, candidate_weights=-torch.ones(2, 3))
    with pytest.raises(
        ValueError, match="references must be one for each of at least one candidate, got 0 for 0"
    ):
        overlap_scores([], [])
    with pytest.raises(ValueError, match="references must hold at least one sentence"):
        overlap_scores(["a"], [[]])
    with pytest.raises(ValueError, match="references must be one for each of 1 candidates, got 2"):
        TokenMatchScorer(encode)(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="captioner must write one sentence for each"):
        caption_score(lambda motions: [], TokenMatchScorer(encode), None, ["a"])
