"""Pieces of words chosen by the likelihood they give a text, and the most likely way to cut a word into them.

A project definition after an idea of Fu Li 2024, arXiv 2410.18441 (the algorithm there is not public). Every word begins as its characters.
With c(u) the number of times that piece u is used, N all pieces, and g(x) = x log x, the likeliest unigram model gives the text

    L = sum_u g(c(u)) - g(N)

and writing all n neighbours a, b as one piece ab changes it by exactly

    g(c(ab) + n) - g(c(ab)) + g(c(a) - n) + g(c(b) - n) - g(c(a)) - g(c(b)) + g(N) - g(N - n)        (a != b)
    g(c(aa) + n) - g(c(aa)) + g(c(a) - 2n) - g(c(a)) + g(N) - g(N - n)        (a = b; n pairs that do not overlap)

where c(ab) > 0 if the same text came about as a piece in another way. The pair with the greatest gain is merged, until the vocabulary is full.
The greedy choice promises nothing; encoding is exact: the likeliest cut for the given pieces, by dynamic programming (Viterbi).

Measured on held-out Shakespeare, bits a character of the unigram model, every vocabulary cut by Viterbi (`coloss bench generative`):

    pieces                        500     1,000   2,000
    likelihood                    3.79    3.58    3.31
    count (BPE)                   3.80    3.57    3.39
    association (WordPiece)       4.74    4.68    4.60

When it helps: larger vocabularies, by 2 % over BPE at 2,000. When not: small ones, where BPE is as good; WordPiece's score without a least count
prefers rare pairs and is far behind.
"""

import contextlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coloss.data.pair_merges import Score as Score
from coloss.data.pair_merges import likelihood_merges as likelihood_merges
from coloss.data.pair_merges import merge_encode as merge_encode
from coloss.data.pair_merges import merge_order as merge_order
from coloss.errors import InputError

_WORDS = re.compile(r" ?[^\s]+|\s")
_FORMAT = "likelihood subwords 1"


def count_words(text: str) -> Counter[str]:
    """Words of a text and how often each occurs; a word keeps the space before it, so that joining the words gives the text.

    Examples:
        >>> count_words("to be or not to be")[" be"]
        2
    """
    return Counter(_WORDS.findall(text))


def viterbi_encode(
    word: str,
    log_probabilities: Mapping[str, float],
    *,
    unknown: float = -math.inf,
    longest: int | None = None,
) -> tuple[list[str], float]:
    """The likeliest way to cut a word into known pieces.

    Args:
        word: the text to cut, not longer than matters: words, not books.
        log_probabilities: of the pieces.
        unknown: log probability of a single character that is no piece, which then becomes a piece of its own; -inf: there must be none.
        longest: characters of the longest piece, which saves a look through all pieces for each word; None: looked up.

    Returns:
        The pieces, and the sum of their log probabilities. Of equally likely cuts, the one with the longest last piece, and so on backwards.

    Raises:
        InputError: if the word cannot be cut.

    Cost: characters times the longest piece's length; without `longest`, the number of pieces besides.

    Examples:
        >>> viterbi_encode("aab", {"a": -1.0, "b": -1.0, "ab": -1.5, "aa": -1.6})
        (['a', 'ab'], -2.5)
    """
    if longest is None:
        longest = _longest(log_probabilities)
    best, length = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - longest), end):
            value = log_probabilities.get(word[start:end], unknown if end - start == 1 else -math.inf)
            if best[start] + value > best[end]:
                best[end], length[end] = best[start] + value, end - start
    if best[-1] == -math.inf:
        raise InputError(f"word must consist of known pieces, or unknown be given, got {word[:40]!r}")
    pieces: list[str] = []
    end = len(word)
    while end:
        pieces.append(word[end - length[end] : end])
        end -= length[end]
    return pieces[::-1], best[-1]


@dataclass(frozen=True)
class LikelihoodSubwords:
    """Turns text into ids of pieces, by the likeliest cut of each word, and back.

    Attributes:
        log_probabilities: of the pieces, in the order of their ids, which begin at 1; 0 stands for unknown characters.

    Examples:
        >>> subwords = LikelihoodSubwords.of("the cat, the hat, the thing", vocab_size=16)
        >>> ids = subwords.encode("the hat")
        >>> subwords.decode(ids), subwords.pieces("the cat!")
        ('the hat', ['the', ' ', 'c', 'at', '!'])
    """

    log_probabilities: Mapping[str, float]
    _cuts: dict[str, list[str]] = field(default_factory=dict, repr=False, compare=False)
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)
    _longest: int = field(init=False, repr=False, compare=False)
    _unknown: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.log_probabilities or "" in self.log_probabilities:
            raise InputError("log_probabilities must hold at least one piece, and none that is empty")
        for piece, value in self.log_probabilities.items():
            if not -math.inf < value <= 0:
                raise InputError(f"log_probabilities must be finite and <= 0, got {value} for {piece!r}")
        # Frozen, but looked up for every word.
        numbers = {piece: number for number, piece in enumerate(self.log_probabilities, start=1)}
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "_longest", _longest(self.log_probabilities))
        object.__setattr__(self, "_unknown", min(self.log_probabilities.values()) - 10.0)

    @classmethod
    def of(
        cls, text: str | Mapping[str, int], vocab_size: int, *, score: Score = "likelihood", passes: int = 2
    ) -> "LikelihoodSubwords":
        """Choose pieces for a text.

        Args:
            text: or its words and how often each occurs.
            vocab_size: as for `likelihood_merges`, which chooses.
            score: likewise.
            passes: how often all words are cut anew by the likeliest cut and pieces counted again; none lowers the text's likelihood but for
                the floor: pieces that nothing uses count as one.

        Raises:
            InputError: for a text without words, or passes < 0; ValueError as from `likelihood_merges`.
        """
        words = count_words(text) if isinstance(text, str) else text
        if not words:
            raise InputError("text must hold at least one word, got none")
        if passes < 0:
            raise InputError(f"passes must be >= 0, got {passes}")
        merges = likelihood_merges(words, vocab_size, score=score)
        characters = sorted(set().union(*words))
        pieces = [*characters, *dict.fromkeys(left + right for left, right in merges)]
        order = merge_order(merges)
        used = Counter[str]()
        for word, count in words.items():
            for piece in merge_encode(word, order):
                used[piece] += count
        found, longest = _log_shares(pieces, used), _longest(pieces)
        for _ in range(passes):
            used = Counter()
            for word, count in words.items():
                for piece in viterbi_encode(word, found, longest=longest)[0]:
                    used[piece] += count
            found = _log_shares(pieces, used)
        return cls(found)

    @property
    def unknown(self) -> float:
        """Log probability by which an unknown character counts while a word is cut: below every piece's."""
        return self._unknown

    def pieces(self, text: str) -> list[str]:
        """The likeliest pieces of each word; joined, they are the text."""
        found: list[str] = []
        for word in _WORDS.findall(text):
            if word not in self._cuts:
                self._cuts[word] = viterbi_encode(
                    word, self.log_probabilities, unknown=self.unknown, longest=self._longest
                )[0]
            found += self._cuts[word]
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text's pieces; 0 for an unknown character."""
        return [self._numbers.get(piece, 0) for piece in self.pieces(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; U+FFFD for an unknown character.

        Raises:
            InputError: for an id that no piece has.
        """
        pieces = ["\N{REPLACEMENT CHARACTER}", *self.log_probabilities]
        found: list[str] = []
        for number in ids:
            if not 0 <= number < len(pieces):
                raise InputError(f"ids must be in 0..{len(pieces) - 1}, got {int(number)}")
            found.append(pieces[number])
        return "".join(found)

    def bits_per_character(self, text: str) -> float:
        """Bits that the unigram model of pieces takes for each character of a text, unknown characters at `unknown`."""
        if not text:
            raise InputError("text must have at least one character, got none")
        total = sum(self.log_probabilities.get(piece, self.unknown) for piece in self.pieces(text))
        return -total / math.log(2) / len(text)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads, whole or not at all."""
        content = {"format": _FORMAT, "log_probabilities": dict(self.log_probabilities)}
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=0))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "LikelihoodSubwords":
        """Read what `save` wrote.

        Raises:
            InputError: for another file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"path must be a file of subwords, got {path} ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"path must be a file in the format {_FORMAT!r}, got {path}")
        try:
            return cls({piece: float(value) for piece, value in content["log_probabilities"].items()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"path must be a file of subwords with their log_probabilities, got {path} ({error!r})"
            ) from error


def _longest(pieces: Iterable[str]) -> int:
    return max((len(piece) for piece in pieces), default=1)


def _log_shares(pieces: Sequence[str], used: Mapping[str, int]) -> dict[str, float]:
    counts = {piece: max(used.get(piece, 0), 1) for piece in pieces}
    total = sum(counts.values())
    return {piece: math.log(count / total) for piece, count in counts.items()}
