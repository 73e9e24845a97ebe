"""The loops of the bfloat16 codec as whole-array operations: what runs where numba is not installed.

Reading is serial within a block, so all blocks advance together: each turn looks up the next bits of every block at once. That takes one thread: the
calls are too short for a second one to find the interpreter free.
"""

from typing import Any

import numpy as np

from coloss.compression.exponent_coding import LIMIT, LOOK_AHEAD, DecodingTables

# Blocks at a time: enough that a turn is worth its calls, few enough that what a turn keeps stays small.
_LANES = 2048
_WRITTEN = 256
_U64 = np.uint64
_SHIFT = _U64(64 - LOOK_AHEAD)
_SECOND = _U64(33 - LOOK_AHEAD)


def split(words: Any, sign_mantissa: Any, exponents: Any, counts: Any) -> None:
    """Take 16-bit words apart, and count the exponents."""
    for low in range(0, len(words), 1 << 20):
        part = words[low : low + (1 << 20)]
        exponents[low : low + (1 << 20)] = (part >> 7) & 255
        sign_mantissa[low : low + (1 << 20)] = ((part >> 8) & 128) | (part & 127)
        counts += np.bincount(exponents[low : low + (1 << 20)], minlength=256)


def measure(exponents: Any, lengths: Any, block: int, first: int, last: int, block_words: Any) -> None:
    """How many 32-bit words each block takes."""
    for low in range(first, last, _LANES):
        part = exponents[low * block : min(low + _LANES, last) * block]
        bits = np.add.reduceat(lengths[part], np.arange(0, len(part), block), dtype=np.int64)
        block_words[low : low + len(bits)] = (bits + 31) >> 5


def write(
    exponents: Any, lengths: Any, codes: Any, block: int, first: int, last: int, starts: Any, encoded: Any
) -> None:
    """Write the codes of each block from the word on at which it starts."""
    for low in range(first, last, _WRITTEN):
        high = min(low + _WRITTEN, last)
        part = exponents[low * block : high * block]
        of = lengths[part].astype(np.int64)
        ends = of.cumsum()
        # The bits before a block are those of the symbols before it; its own start at a whole word.
        before = np.concatenate([[0], ends])[np.arange(0, len(part), block)]
        shift = 32 * (starts[low:high] - starts[low]) - before
        at = ends - of + np.repeat(shift, block)[: len(part)]
        words = starts[high] - starts[low]
        held = codes[part].astype(np.uint64) << (64 - (at & 31) - of).astype(np.uint64)
        # Bits of one word never overlap, so their sum is their union, and below 2^32 exact in float64.
        for side, bits in ((0, held >> np.uint64(32)), (1, held & np.uint64(0xFFFFFFFF))):
            summed = np.bincount((at >> 5) + side, weights=bits, minlength=words + 1)
            encoded[starts[low] : starts[high]] |= summed[:words].astype(np.uint32)


def read(
    encoded: Any, starts: Any, tables: DecodingTables, rest: Any, out: Any, block: int, first: int, last: int
) -> int:
    """Read blocks back into words; how many places show that the stream was altered.

    Args: as for the compiled one.
    """
    bad = 0
    for low in range(first, last, _LANES):
        high = min(low + _LANES, last)
        here = slice(low * block, min(high * block, len(out)))
        want = np.full(high - low, block)
        want[-1] = here.stop - (high - 1) * block
        found, wrong = _advance(encoded, starts[low : high + 1], tables, block, want)
        bits = np.add.reduceat(tables.lengths[found], np.arange(0, len(found), block), dtype=np.int64)
        bad += wrong + int(((bits + 31) >> 5 != np.diff(starts[low : high + 1])).sum())
        join(found, rest[here], out[here])
    return bad


def join(exponents: Any, sign_mantissa: Any, out: Any) -> None:
    """Put 16-bit words together again."""
    for low in range(0, len(out), 1 << 20):
        here = slice(low, low + (1 << 20))
        rest = sign_mantissa[here].astype(np.uint16)
        out[here] = ((rest & 128) << 8) | (exponents[here].astype(np.uint16) << 7) | (rest & 127)


def _advance(encoded: Any, starts: Any, tables: DecodingTables, block: int, want: Any) -> tuple[Any, int]:
    """The symbols of some blocks one after the other, and how many codes there were that stand for nothing."""
    pairs = (encoded[starts[0] : starts[-1] + 1].astype(_U64) << _U64(32)) | encoded[
        starts[0] + 1 : starts[-1] + 2
    ]
    last = _U64(len(pairs) - 1)
    at = (32 * (starts[:-1] - starts[0])).astype(_U64)
    # All symbols of a look-up are written at once, as the 8 bytes from any place on; what follows them is overwritten by the next ones.
    row = block + 8
    buffer = np.zeros((len(want), row), np.uint8)
    eight_bytes = np.ndarray((buffer.size - 7,), "<u8", buffer, strides=(1,))
    n = np.arange(len(want)) * row
    stop = n + want
    wrong = 0
    while (n < stop).any():
        held = pairs[np.minimum(at >> _U64(5), last)] << (at & _U64(31))
        look = tables.looks[held >> _SHIFT]
        if len(long := np.flatnonzero(look == 0)):
            look[long], nothing = _long_codes(held[long] >> _U64(32), tables)
            wrong += int((nothing & (n[long] < stop[long])).sum())
        for second in (False, True):
            eight_bytes[n] = look
            n = np.minimum(n + ((look >> _U64(40)) & _U64(255)).astype(np.int64), stop)
            used = look >> _U64(48)
            at += used
            if not second:
                # A long code may leave too few bits for a second look, which then would see zeros.
                look = np.where(used <= _SECOND, tables.looks[(held << used) >> _SHIFT], 0)
    return buffer[:, :block].reshape(-1)[: want.sum()], wrong


def _long_codes(bits: Any, tables: DecodingTables) -> tuple[Any, Any]:
    """Entries like those of the table for codes that it is too short for, and which of them stand for nothing."""
    length = np.searchsorted(tables.beyond[1:], bits, side="right") + 1
    nothing = length > LIMIT
    length[nothing] = 1
    code = (bits >> (LIMIT - length).astype(_U64)).astype(np.int64)
    place = np.where(nothing, 0, tables.place[length] + code - tables.first[length])
    symbol = np.where(nothing, 0, tables.symbols[place]).astype(_U64)
    return symbol | _U64(1 << 40) | length.astype(_U64) << _U64(48), nothing
