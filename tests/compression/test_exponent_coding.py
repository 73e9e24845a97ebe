import heapq
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.compression.exponent_coding import (
    LOOK_AHEAD,
    PER_LOOK,
    canonical_codes,
    code_lengths,
    decoding_tables,
    entropy_bits,
)
from coloss.errors import InputError

FIBONACCI = [1, 1]
while len(FIBONACCI) < 80:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def _histogram(counts: list[int]) -> np.ndarray:
    histogram = np.zeros(256, dtype=np.int64)
    histogram[: len(counts)] = counts
    return histogram


def _kraft(lengths: np.ndarray) -> float:
    used = lengths[lengths > 0].astype(float)
    return float((2.0**-used).sum())


def _huffman_cost(counts: list[int]) -> int:
    """Bits of the whole text: every merge of two nodes costs one bit for each symbol below them."""
    heap, cost = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256))
def test_lengths_are_those_of_huffman_and_lie_within_a_bit_of_the_entropy(counts: list[int]) -> None:
    histogram = _histogram(counts)
    lengths = code_lengths(histogram)
    assert ((lengths > 0) == (histogram > 0)).all()
    assert _kraft(lengths) <= 1
    if (histogram > 0).sum() > 1:
        bits = int((histogram * lengths).sum())
        assert bits == _huffman_cost(counts)
        mean = bits / histogram.sum()
        assert entropy_bits(histogram) - 1e-9 <= mean < entropy_bits(histogram) + 1


@pytest.mark.parametrize("limit", [3, 4])
def test_limited_lengths_are_the_best_of_all(limit: int) -> None:
    counts = [1, 1, 2, 3, 5, 8]
    best = min(
        sum(c * n for c, n in zip(counts, choice))
        for choice in product(range(1, limit + 1), repeat=len(counts))
        if sum(2.0**-n for n in choice) <= 1
    )
    lengths = code_lengths(_histogram(counts), limit)
    assert lengths.max() <= limit and _kraft(lengths) <= 1
    assert int((_histogram(counts) * lengths).sum()) == best > _huffman_cost(counts)


@pytest.mark.parametrize("symbols", [33, 34, 60, 80])
def test_histograms_that_ask_for_longer_codes_get_32_bits(symbols: int) -> None:
    # Huffman's tree of Fibonacci counts is a chain: one level for each symbol.
    lengths = code_lengths(_histogram(FIBONACCI[:symbols]))
    assert lengths.max() == 32 and _kraft(lengths) == 1.0
    assert (np.diff(lengths[:symbols].astype(int)) <= 0).all()


def test_a_symbol_that_occurs_alone_takes_one_bit_and_no_symbol_none() -> None:
    assert code_lengths(_histogram([0, 0, 7])).tolist() == [0, 0, 1] + [0] * 253
    assert not code_lengths(_histogram([])).any()
    assert entropy_bits(_histogram([])) == 0.0


def test_codes_are_canonical_and_none_starts_another() -> None:
    # By hand: the tree of 2, 9, 5, 30 joins 2 and 5, then 9, then 30.
    codes = canonical_codes(code_lengths(_histogram([2, 9, 5, 30])))
    assert codes[:4].tolist() == [0b110, 0b10, 0b111, 0b0]
    lengths = code_lengths(_histogram([5, 1, 1, 2, 9, 30, 1, 17, 300]))
    codes = canonical_codes(lengths)
    words = [f"{codes[s]:0{lengths[s]}b}" for s in sorted(range(9), key=lambda s: (lengths[s], s))]
    assert words == sorted(words)
    assert not [a for a in words for b in words if a != b and b.startswith(a)]


def test_a_look_finds_what_single_codes_spell() -> None:
    lengths = code_lengths(_histogram(FIBONACCI[:20]))
    codes = canonical_codes(lengths)
    words = {f"{codes[s]:0{lengths[s]}b}": s for s in range(20)}
    tables = decoding_tables(lengths)
    for window in range(1 << LOOK_AHEAD):
        bits, expected, used = f"{window:0{LOOK_AHEAD}b}", [], 0
        while len(expected) < PER_LOOK:
            fitting = [w for w in words if bits[used:].startswith(w)]
            if not fitting:
                break
            expected.append(words[fitting[0]])
            used += len(fitting[0])
        look = int(tables.looks[window])
        number = look >> 40 & 255
        assert [look >> 8 * k & 255 for k in range(number)] == expected
        assert look >> 48 == used


@pytest.mark.parametrize(
    ("lengths", "words"), [([1, 1, 1], "2\\^-length"), ([33], "<= 32"), ([], "at least one")]
)
def test_lengths_without_a_code_are_refused(lengths: list[int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        decoding_tables(_histogram(lengths).astype(np.uint8))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="limit must be in 1..32, got 33"):
        code_lengths(_histogram([1, 2]), 33)
    with pytest.raises(ValueError, match="limit must allow 3 codes, got 1 bits"):
        code_lengths(_histogram([1, 2, 3]), 1)
    with pytest.raises(ValueError, match="counts must be >= 0, got -1"):
        code_lengths(_histogram([1, -1]))
