"""Neighbouring pieces of words written as one, again and again: chosen by the likelihood they give a text, as BPE or as WordPiece does.

The gain of a merge is that of `coloss.data.likelihood_subwords`, which also has the cut that is the likeliest for given pieces.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Score = Literal["likelihood", "count", "association"]


def likelihood_merges(
    word_counts: Mapping[str, int], vocab_size: int, *, score: Score = "likelihood"
) -> list[tuple[str, str]]:
    """Which neighbouring pieces to write as one, in order, so that a text's likelihood grows the most with each.

    Args:
        word_counts: words and how often each occurs, >= 1.
        vocab_size: pieces at last: the characters, which all stay, and what merges make; at least as many as characters.
        score: what is greatest in the pair that is merged: `"likelihood"`, the gain above; `"count"`, its number, as in BPE;
            `"association"`, number over the product of its parts' numbers, as in WordPiece.

    Returns:
        (left, right) of each merge; fewer than asked for if no neighbours are left, or no merge gains.

    Raises:
        ValueError: for no words, an empty word, a count below 1, or a vocabulary below the number of characters.

    Cost: one pass over the words to begin with; a merge then takes the words that hold its pair, and one look over all pairs (NumPy).

    Source: Gage 1994, Sennrich et al. 2016 (BPE); Schuster and Nakajima 2012 (WordPiece); Fu Li 2024, arXiv 2410.18441 (the idea).

    Examples:
        >>> likelihood_merges({"aab": 10, "ab": 5, "c": 4}, vocab_size=5)
        [('a', 'b'), ('a', 'ab')]
    """
    _check_words(word_counts)
    if score not in ("likelihood", "count", "association"):
        raise ValueError(f'score must be "likelihood", "count" or "association", got {score!r}')
    characters = set().union(*word_counts)
    if vocab_size < len(characters):
        raise ValueError(f"vocab_size must be >= {len(characters)} characters, got {vocab_size}")
    table = _PairTable(word_counts)
    merges: list[tuple[str, str]] = []
    known = set(characters)
    while len(known) < vocab_size:
        pair = table.best(score)
        if pair is None:
            break
        table.merge(pair)
        merges.append(pair)
        known.add(pair[0] + pair[1])
    return merges


class _PairTable:
    """Words as pieces, how often each piece and each pair of neighbours occurs, and in which words a pair stands."""

    def __init__(self, word_counts: Mapping[str, int]) -> None:
        ordered = sorted(word_counts.items())  # ties then fall the same way whatever the order of the words
        self.words = [list(word) for word, _ in ordered]
        self.counts = [count for _, count in ordered]
        self.numbers: dict[str, int] = {}  # of pieces
        self.used = np.zeros(256)
        self.slots: dict[tuple[str, str], int] = {}  # of pairs
        self.pairs: list[tuple[str, str]] = []
        self.parts = np.zeros((3, 256), dtype=np.int64)  # left, right and joined piece's number of each pair
        self.found = np.zeros(256)
        self.where: dict[tuple[str, str], set[int]] = defaultdict(set)
        used: Counter[str] = Counter()
        found: Counter[tuple[str, str]] = Counter()
        for word, pieces in enumerate(self.words):
            count = self.counts[word]
            for piece in pieces:
                used[piece] += count
            for pair, times in _pairs(pieces).items():
                found[pair] += count * times
                self.where[pair].add(word)
        self._change(used, found)

    def best(self, score: Score) -> tuple[str, str] | None:
        slots = len(self.pairs)
        n = self.found[:slots]
        if not slots or n.max() < 1:
            return None
        left, right, joined = self.parts[:, :slots]
        a, b, ab, same = self.used[left], self.used[right], self.used[joined], left == right
        if score == "likelihood":
            total = self.used.sum()
            lost = np.where(same, _g(a - 2 * n) - _g(a), _g(a - n) + _g(b - n) - _g(a) - _g(b))
            values = _g(ab + n) - _g(ab) + lost + _g(total) - _g(total - n)
        else:
            values = n if score == "count" else n / np.maximum(a * b, 1)
        values = np.where(n > 0, values, -np.inf)
        place = int(values.argmax())
        return self.pairs[place] if values[place] > 0 else None

    def merge(self, pair: tuple[str, str]) -> None:
        left, right = pair
        merged = 0
        found: Counter[tuple[str, str]] = Counter()
        for word in list(self.where[pair]):
            pieces, count = self.words[word], self.counts[word]
            joined = self.words[word] = _joined(pieces, left, right)
            merged += count * (len(pieces) - len(joined))
            before, after = _pairs(pieces), _pairs(joined)
            for own, times in before.items():
                found[own] -= count * times
                if own not in after:
                    self.where[own].discard(word)
            for own, times in after.items():
                found[own] += count * times
                if own not in before:
                    self.where[own].add(word)
        used = Counter({left + right: merged})
        used.subtract({left: merged})
        used.subtract({right: merged})
        self._change(used, found)

    def _change(self, used: Mapping[str, int], found: Mapping[tuple[str, str], int]) -> None:
        for piece, change in used.items():
            number = self._number(piece)
            self.used[number] += change
        for pair, change in found.items():
            if change:
                slot = self._slot(pair)
                self.found[slot] += change

    def _number(self, piece: str) -> int:
        number = self.numbers.setdefault(piece, len(self.numbers))
        if number >= len(self.used):
            self.used = np.concatenate([self.used, np.zeros_like(self.used)])
        return number

    def _slot(self, pair: tuple[str, str]) -> int:
        slot = self.slots.get(pair)
        if slot is None:
            slot = self.slots[pair] = len(self.pairs)
            self.pairs.append(pair)
            if slot >= len(self.found):
                self.found = np.concatenate([self.found, np.zeros_like(self.found)])
                self.parts = np.concatenate([self.parts, np.zeros_like(self.parts)], axis=1)
            self.parts[:, slot] = [self._number(part) for part in (*pair, pair[0] + pair[1])]
        return slot


def _g(x: Any) -> Any:
    return x * np.log(np.maximum(x, 1))


def _pairs(pieces: Sequence[str]) -> dict[tuple[str, str], int]:
    """Neighbours and how often each pair can be merged in the word: of a run of equal pieces, every other one."""
    found: dict[tuple[str, str], int] = {}
    run = 0
    for left, right in zip(pieces, pieces[1:], strict=False):
        run = run + 1 if left == right else 0
        if run == 0 or run % 2:  # else the second of two overlapping pairs
            found[left, right] = found.get((left, right), 0) + 1
    return found


def _joined(pieces: Sequence[str], left: str, right: str) -> list[str]:
    made: list[str] = []
    place = 0
    while place < len(pieces):
        both = place + 1 < len(pieces) and pieces[place] == left and pieces[place + 1] == right
        made.append(left + right if both else pieces[place])
        place += 2 if both else 1
    return made


def merge_encode(word: str, merges: Sequence[tuple[str, str]] | Mapping[tuple[str, str], int]) -> list[str]:
    """Cut a word by merges in their order, as BPE does.

    Args:
        word: the text to cut.
        merges: in order, or the place of each, which saves making that table for each word.

    Examples:
        >>> merge_encode("aab", [("a", "b"), ("a", "ab")])
        ['aab']
    """
    pieces = list(word)
    order = merges if isinstance(merges, Mapping) else merge_order(merges)
    while len(pieces) > 1:
        pair = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: order.get(pair, math.inf))
        if pair not in order:
            break
        pieces = _joined(pieces, *pair)
    return pieces


def merge_order(merges: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The first place of each merge.

    Examples:
        >>> merge_order([("a", "b"), ("c", "d"), ("a", "b")])
        {('a', 'b'): 0, ('c', 'd'): 1}
    """
    order: dict[tuple[str, str], int] = {}
    for place, pair in enumerate(merges):
        order.setdefault(pair, place)
    return order


def _check_words(word_counts: Mapping[str, int]) -> None:
    if not word_counts:
        raise ValueError("word_counts must hold at least one word, got none")
    for word, count in word_counts.items():
        if not word or count < 1:
            raise ValueError(f"word_counts must map words to counts >= 1, got {count} for {word!r}")
