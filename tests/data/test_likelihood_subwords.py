"""Sub-words by likelihood: the gain is the brute-force difference, counts stay right after merges, cuts are the best of all."""

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import (
    LikelihoodSubwords,
    count_words,
    likelihood_merges,
    merge_encode,
    viterbi_encode,
)
from coloss.errors import InputError

WORDS = {"abab": 3, "aaa": 5, "aab": 4, "ba": 7, "abc": 2, "c": 6, "aaaa": 1, "bcbc": 2}


def replace(pieces, left, right):
    made = []
    for piece in pieces:
        if made and made[-1] == (left,) and piece == right:
            made[-1] = (left, right)
        else:
            made.append((piece,))
    return ["".join(parts) for parts in made]


def likelihood(cut, words):
    """L = sum g(c) - g(N), straight from the pieces."""
    used = Counter()
    for word, pieces in cut.items():
        for piece in pieces:
            used[piece] += words[word]
    total = sum(used.values())
    return sum(n * math.log(n) for n in used.values()) - total * math.log(total)


def merges_by_brute_force(words, size):
    cut = {word: list(word) for word in words}
    known = set("".join(words))
    gains = []
    while len(known) < size:
        pairs = {pair for pieces in cut.values() for pair in itertools.pairwise(pieces)}
        if not pairs:
            break
        tried = {
            pair: likelihood({word: replace(pieces, *pair) for word, pieces in cut.items()}, words)
            for pair in pairs
        }
        best = max(tried, key=tried.get)
        gain = tried[best] - likelihood(cut, words)
        if gain <= 0:
            break
        gains.append(gain)
        cut = {word: replace(pieces, *best) for word, pieces in cut.items()}
        known.add("".join(best))
    return gains, likelihood(cut, words)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=6), st.integers(1, 20), min_size=1, max_size=6),
    st.integers(0, 6),
)
@settings(max_examples=15, deadline=None)
def test_greedy_merges_are_those_of_brute_force(words, more):
    """Self pairs, pieces that come about in two ways and counts after earlier merges included: each step's gain is the greatest."""
    size = len(set("".join(words))) + more
    merges = likelihood_merges(words, size)
    cut = {word: list(word) for word in words}
    for left, right in merges:
        before = likelihood(cut, words)
        pairs = {pair for pieces in cut.values() for pair in itertools.pairwise(pieces)}
        best = max(
            likelihood({word: replace(pieces, *pair) for word, pieces in cut.items()}, words)
            for pair in pairs
        )
        cut = {word: replace(pieces, left, right) for word, pieces in cut.items()}
        after = likelihood(cut, words)
        assert after == pytest.approx(best, abs=1e-9) and after > before - 1e-9


def test_a_whole_run_against_brute_force():
    gains, final = merges_by_brute_force(WORDS, 9)
    merges = likelihood_merges(WORDS, 9)
    assert len(gains) == len(merges)
    cut = {word: list(word) for word in WORDS}
    for left, right in merges:
        cut = {word: replace(pieces, left, right) for word, pieces in cut.items()}
    assert likelihood(cut, WORDS) == pytest.approx(final)


def test_self_pairs_do_not_overlap():
    assert likelihood_merges({"aaa": 5, "b": 40}, 4) == [("a", "a"), ("aa", "a")]
    assert likelihood_merges({"aaa": 5}, 3) == []  # nothing beats one kind of piece
    assert merge_encode("aaaaa", [("a", "a")]) == ["aa", "aa", "a"]


def test_other_scores_are_bpe_and_wordpiece():
    words = {"ab": 10, "ac": 9, "ad": 9, "ef": 4}
    assert likelihood_merges(words, 7, score="count")[0] == ("a", "b")
    assert likelihood_merges(words, 7, score="association")[0] == ("e", "f")  # 4 / 16 against 10 / 280


@given(st.text("ab", min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_viterbi_is_the_best_of_all_cuts(word):
    pieces = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -2.8, "aa": -4.5, "bab": -3.5}
    best = -math.inf
    for ends in itertools.product([False, True], repeat=len(word) - 1):
        places = [0, *(place + 1 for place, cut in enumerate(ends) if cut), len(word)]
        parts = [word[start:end] for start, end in itertools.pairwise(places)]
        best = max(best, sum(pieces.get(part, -math.inf) for part in parts))
    found, value = viterbi_encode(word, pieces)
    assert value == pytest.approx(best) and "".join(found) == word
    assert sum(pieces[part] for part in found) == pytest.approx(value)


def test_the_longest_piece_is_looked_up_once(monkeypatch):
    pieces = {"a": -2.0, "b": -2.5, "ab": -3.0, "bab": -3.5}
    assert viterbi_encode("abab", pieces, longest=3) == viterbi_encode("abab", pieces)
    assert viterbi_encode("abab", pieces, longest=2)[0] == ["ab", "ab"]
    looks = []
    monkeypatch.setattr(
        "coloss.data.likelihood_subwords._longest", lambda of: looks.append(1) or max(map(len, of))
    )
    subwords = LikelihoodSubwords(pieces)
    assert subwords.decode(subwords.encode("abab bab")) == "abab\N{REPLACEMENT CHARACTER}bab"
    assert len(looks) == 1


TEXT = "to be or not to be, that is the question:\nwhether 'tis nobler in the mind to suffer\n"


def test_text_comes_back_and_unknown_characters_are_marked(tmp_path):
    subwords = LikelihoodSubwords.of(TEXT, vocab_size=40)
    assert len(subwords.log_probabilities) == 40
    assert subwords.decode(subwords.encode(TEXT)) == TEXT
    assert math.fsum(math.exp(value) for value in subwords.log_probabilities.values()) == pytest.approx(1)
    ids = subwords.encode("to Ω be")
    assert 0 in ids and subwords.decode(ids) == "to \N{REPLACEMENT CHARACTER} be"
    assert "".join(subwords.pieces("to Ω be")) == "to Ω be" and subwords.encode("") == []
    subwords.save(tmp_path / "pieces.json")
    again = LikelihoodSubwords.load(tmp_path / "pieces.json")
    assert again == subwords and again.encode(TEXT) == subwords.encode(TEXT)
    assert json.loads((tmp_path / "pieces.json").read_text())["format"] == "likelihood subwords 1"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, subwords = tmp_path / "pieces.json", LikelihoodSubwords.of(TEXT, vocab_size=30)
    subwords.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        LikelihoodSubwords({"a": -1.0}).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_cutting_anew_never_takes_more_bits():
    found = [LikelihoodSubwords.of(TEXT, 40, passes=passes).bits_per_character(TEXT) for passes in (0, 1, 3)]
    assert found[0] >= found[1] >= found[2]
    characters = len(set(TEXT))
    assert LikelihoodSubwords.of(TEXT, characters).pieces("to be") == list("to be")


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one word"):
        likelihood_merges({}, 3)
    with pytest.raises(ValueError, match="counts >= 1, got 0 for 'a'"):
        likelihood_merges({"a": 0}, 3)
    with pytest.raises(ValueError, match="vocab_size must be >= 2"):
        likelihood_merges({"ab": 1}, 1)
    with pytest.raises(InputError, match="known pieces"):
        viterbi_encode("ax", {"a": -1.0})
    with pytest.raises(InputError, match="finite and <= 0"):
        LikelihoodSubwords({"a": 0.5})
    with pytest.raises(InputError, match="text must hold at least one word, got none"):
        LikelihoodSubwords.of("", 5)
    with pytest.raises(InputError, match="passes must be >= 0, got -3"):
        LikelihoodSubwords.of("to be", 9, passes=-3)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="in the format"):
        LikelihoodSubwords.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="file of subwords"):
        LikelihoodSubwords.load(tmp_path / "none.json")
    for content in (
        {},
        {"log_probabilities": [1]},
        {"log_probabilities": {"a": "x"}},
        {"log_probabilities": {}},
    ):
        (tmp_path / "wrong.json").write_text(json.dumps({"format": "likelihood subwords 1"} | content))
        with pytest.raises(InputError, match="file of subwords with their log_probabilities"):
            LikelihoodSubwords.load(tmp_path / "wrong.json")
    for number in (-1, 3):
        with pytest.raises(InputError, match=rf"ids must be in 0..2, got {number}"):
            LikelihoodSubwords({"a": -1.0, "b": -1.0}).decode([1, number])
    assert count_words("a  b\n") == {"a": 1, " ": 1, " b": 1, "\n": 1}
