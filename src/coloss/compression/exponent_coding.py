"""The best prefix code for the exponents of bfloat16 weights: lengths from a histogram, codes from lengths, tables to read them.

A bfloat16 has 8 bits of exponent, but trained weights use about 40 of its 256 values and these so unevenly that 2.6 bits suffice.
With p(s) the share of weights whose exponent is s, and l(s) the length of its code,

    H = -sum_s p(s) log2 p(s)  <=  sum_s p(s) l(s)  <  H + 1        (the right side while no length meets the limit)
    sum_s 2^-l(s)  <=  1                                            (Kraft: a prefix code with these lengths exists)

Lengths come from package-merge (Larmore & Hirschberg 1990), which is optimal among all codes of at most `limit` bits, and so needs none of
the usual repairs (raising rare counts until the tree is flat enough). Codes are canonical: in the order of (length, symbol), each the last
one plus one; 256 lengths are all that a file has to hold.

`DecodingTables` looks 11 bits ahead: an entry holds all symbols that are complete within these bits (up to 5), their number and their
length together. An exponent of trained weights takes 2.6 bits, so one look gives about four. Codes longer than 11 bits, one weight in
thousands, are found by comparing 32 bits with the first code beyond each length.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8, UInt32, UInt64

from coloss.errors import InputError

LIMIT = 32
LOOK_AHEAD = 11
PER_LOOK = 5


class DecodingTables(NamedTuple):
    """What a reader of the code looks up.

    Attributes:
        looks: for each next 11 bits: symbol k in bits 8k to 8k + 7, the number of symbols from bit 40 on, their bits together from bit 48
            on; 0 where not even one symbol is complete.
        beyond: for each length l, the least 32 next bits that do not start with a code of at most l bits.
        first: for each length, its first code.
        place: for each length, the place of that code's symbol in `symbols`.
        symbols: in the order of their codes.
        lengths: of each symbol's code, 0 where it has none.
    """

    looks: UInt64[np.ndarray, "2048"]
    beyond: UInt64[np.ndarray, "33"]
    first: Integer[np.ndarray, "33"]
    place: Integer[np.ndarray, "33"]
    symbols: UInt8[np.ndarray, "used"]
    lengths: UInt8[np.ndarray, "256"]


def code_lengths(counts: Integer[np.ndarray, "256"], limit: int = LIMIT) -> UInt8[np.ndarray, "256"]:
    """Lengths of the best prefix code none of whose codes is longer than a limit.

    Args:
        counts: how often each symbol occurs, >= 0.
        limit: most bits of a code, in 1..32.

    Returns:
        Bits of each symbol's code; 0 for symbols that do not occur, 1 for one that occurs alone.

    Raises:
        ValueError: if a count is negative, the limit is out of range, or too small for the number of symbols.

    Cost: `limit` sorts of at most 512 numbers, below a millisecond.

    Source: Larmore & Hirschberg 1990, "A fast algorithm for optimal length-limited Huffman codes".

    Examples:
        >>> counts = np.zeros(256, dtype=np.int64)
        >>> counts[[7, 8, 9]] = 1, 1, 6
        >>> code_lengths(counts)[6:11].tolist()
        [0, 2, 2, 1, 0]
    """
    if not 1 <= limit <= LIMIT:
        raise ValueError(f"limit must be in 1..{LIMIT}, got {limit}")
    if counts.min() < 0:
        raise ValueError(f"counts must be >= 0, got {counts.min()}")
    lengths = np.zeros(256, dtype=np.uint8)
    used = np.flatnonzero(counts)
    if len(used) <= 1:
        lengths[used] = 1
        return lengths
    if len(used) > 2**limit:
        raise ValueError(f"limit must allow {len(used)} codes, got {limit} bits")
    used = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[used].astype(np.int64)
    # Level by level, two by two the cheapest items become one item of the next level, beside all leaves again.
    items, is_leaf = leaves, [np.ones(len(used), dtype=bool)]
    for _ in range(limit - 1):
        pairs = items[: len(items) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([leaves, pairs])
        order = np.argsort(both, kind="stable")
        items = both[order]
        is_leaf.append(order < len(leaves))
    # The cheapest 2n - 2 items of the last level, and what they are made of: each time a leaf is met, its code is one bit longer.
    take = 2 * len(used) - 2
    for level in reversed(is_leaf):
        found = int(level[:take].sum())
        lengths[used[:found]] += 1
        take = 2 * (take - found)
    return lengths


def canonical_codes(lengths: UInt8[np.ndarray, "256"]) -> UInt32[np.ndarray, "256"]:
    """The codes that lengths stand for, each in the lowest bits of its number.

    Args:
        lengths: as `code_lengths` gives them.

    Raises:
        InputError: if there is no prefix code of these lengths.

    Examples:
        >>> lengths = np.zeros(256, dtype=np.uint8)
        >>> lengths[[7, 8, 9]] = 2, 2, 1
        >>> [f"{code:b}" for code in canonical_codes(lengths)[7:10]]
        ['10', '11', '0']
    """
    first, place, symbols = _canonical_order(lengths)
    codes = np.zeros(256, dtype=np.uint32)
    of = lengths[symbols]
    codes[symbols] = first[of] + np.arange(len(symbols)) - place[of]
    return codes


def decoding_tables(lengths: UInt8[np.ndarray, "256"]) -> DecodingTables:
    """Tables that read the code of these lengths several symbols at a time.

    Args:
        lengths: as `code_lengths` gives them.

    Raises:
        InputError: if there is no prefix code of these lengths, or no code at all.

    Cost: about 0.2 ms, 16 KiB: half of what a core's nearest cache holds.

    Examples:
        >>> lengths = np.zeros(256, dtype=np.uint8)
        >>> lengths[[7, 8, 9]] = 2, 2, 1
        >>> look = int(decoding_tables(lengths).looks[0b10_0_0_11_0_10_11])
        >>> [look >> 8 * k & 255 for k in range(5)], look >> 40 & 255, look >> 48
        ([7, 9, 9, 8, 9], 5, 7)
    """
    first, place, symbols = _canonical_order(lengths)
    if not len(symbols):
        raise InputError("lengths of codes must give at least one symbol a code, got none")
    numbers = np.bincount(lengths[symbols], minlength=LIMIT + 1)
    beyond = np.zeros(LIMIT + 1, dtype=np.uint64)
    beyond[1:] = (first + numbers)[1:].astype(np.uint64) << np.arange(LIMIT - 1, -1, -1, dtype=np.uint64)
    size = 1 << LOOK_AHEAD
    windows = np.arange(size)
    # Short codes in their order fill the windows from zero on without a gap.
    short = symbols[lengths[symbols] <= LOOK_AHEAD]
    spans = 1 << (LOOK_AHEAD - lengths[short].astype(np.int64))
    symbol, length = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.int64)
    symbol[: spans.sum()] = np.repeat(short, spans)
    length[: spans.sum()] = np.repeat(lengths[short], spans)
    looks = np.zeros(size, dtype=np.uint64)
    number, used = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.int64)
    open_ = np.ones(size, dtype=bool)
    for k in range(PER_LOOK):
        rest = (windows << used) & (size - 1)
        open_ &= (length[rest] > 0) & (used + length[rest] <= LOOK_AHEAD)
        looks[open_] |= symbol[rest[open_]] << np.uint64(8 * k)
        used[open_] += length[rest[open_]]
        number[open_] += np.uint64(1)
    looks |= number << np.uint64(40) | used.astype(np.uint64) << np.uint64(48)
    return DecodingTables(looks, beyond, first, place, symbols, lengths)


def entropy_bits(counts: Integer[np.ndarray, "symbols"]) -> float:
    """Least bits for each symbol that any code of single symbols can take: -sum p log2 p; 0 where nothing is counted.

    Examples:
        >>> entropy_bits(np.array([2, 1, 1, 0]))
        1.5
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum() + 0.0)


def _canonical_order(
    lengths: UInt8[np.ndarray, "256"],
) -> tuple[Integer[np.ndarray, "33"], Integer[np.ndarray, "33"], UInt8[np.ndarray, "used"]]:
    """First code and its place for each length, and the symbols in the order of their codes."""
    if lengths.max() > LIMIT:
        raise InputError(f"lengths of codes must be <= {LIMIT}, got {lengths.max()}")
    numbers = np.bincount(lengths, minlength=LIMIT + 1)
    numbers[0] = 0
    if int((numbers << np.arange(LIMIT, -1, -1)).sum()) > 1 << LIMIT:
        raise InputError("lengths of codes must keep sum 2^-length <= 1, got more")
    first = np.zeros(LIMIT + 1, dtype=np.int64)
    for length in range(1, LIMIT + 1):
        first[length] = (first[length - 1] + numbers[length - 1]) << 1
    place = np.concatenate([[0], numbers.cumsum()[:-1]])
    order = np.lexsort((np.arange(256), lengths))
    return first, place, order[lengths[order] > 0].astype(np.uint8)
