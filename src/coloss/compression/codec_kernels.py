"""Compiled loops of the bfloat16 codec; `codec_arrays` does the same work without numba.

Importing this module imports numba; `bf16_codec` does so when it first has something to code. The functions take ranges of blocks and work
without the interpreter's lock, so that plain threads can share the work: numba's own pool of threads is not used, because it ends the
process when two threads call it at once or after a fork.

No stream can make them leave their arrays or run on for ever: places in the stream are held below its end, a block's symbols are counted
before they are written, and every turn of a loop gives at least one symbol. Two blocks are read in turns, since each look-up has to wait
for the one before it in its block. Indices are unsigned: signed ones would be checked for negative values, which takes half the time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy import uint8, uint16, uint32
from numpy import uint64 as u64

from coloss.compression.exponent_coding import LIMIT, LOOK_AHEAD, PER_LOOK, DecodingTables

_LOOK_SHIFT = u64(64 - LOOK_AHEAD)
_PER_TURN = u64(2 * PER_LOOK)
_WORD = u64(32)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(function)  # a checker of types may stand around it
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to keep compiled code in
        return njit(nogil=True)(function)


@_compiled
def split(words: Any, sign_mantissa: Any, exponents: Any, counts: Any) -> None:
    """Take 16-bit words apart, and count the exponents."""
    for i in range(words.size):
        word = uint16(words[i])
        exponents[i] = uint8(word >> uint16(7))
        sign_mantissa[i] = uint8(((word >> uint16(8)) & uint16(128)) | (word & uint16(127)))
    # Four counts at once: the same exponent twice in a row would have to wait for itself.
    quarter = exponents.size // 4
    found = np.zeros((4, 256), np.int64)
    a, b, c, d = exponents[:quarter], exponents[quarter:], exponents[2 * quarter :], exponents[3 * quarter :]
    for i in range(quarter):
        found[u64(0), u64(a[i])] += 1
        found[u64(1), u64(b[i])] += 1
        found[u64(2), u64(c[i])] += 1
        found[u64(3), u64(d[i])] += 1
    for exponent in exponents[4 * quarter :]:
        found[u64(0), u64(exponent)] += 1
    for symbol in range(256):
        counts[symbol] += found[0, symbol] + found[1, symbol] + found[2, symbol] + found[3, symbol]


@_compiled
def measure(exponents: Any, lengths: Any, block: int, first: int, last: int, block_words: Any) -> None:
    """How many 32-bit words each block takes."""
    for b in range(first, last):
        bits = u64(0)
        for exponent in exponents[b * block : (b + 1) * block]:
            bits += u64(lengths[u64(exponent)])
        block_words[b] = np.int64((bits + u64(31)) >> u64(5))


@_compiled
def write(
    exponents: Any, lengths: Any, codes: Any, block: int, first: int, last: int, starts: Any, encoded: Any
) -> None:
    """Write the codes of each block from the word on at which it starts."""
    for b in range(first, last):
        words = encoded[starts[b] : starts[b + 1]]
        o, held, bits = u64(0), u64(0), u64(0)
        for exponent in exponents[b * block : (b + 1) * block]:
            length = u64(lengths[u64(exponent)])
            held = (held << length) | u64(codes[u64(exponent)])
            bits += length
            if bits >= _WORD:
                bits -= _WORD
                words[o] = uint32(held >> bits)
                o += u64(1)
        if bits > u64(0):
            words[o] = uint32(held << (_WORD - bits))


@_compiled
def _window(encoded: Any, at: Any) -> Any:
    """The next bits from bit `at` on, at least 33 of them, in the highest places."""
    i = min(at >> u64(5), u64(encoded.size - 2))
    return ((u64(encoded[i]) << _WORD) | u64(encoded[i + u64(1)])) << (at & u64(31))


@_compiled
def _put(buffer: Any, n: Any, look: Any) -> Any:
    """Write what a look-up found; the place after its last symbol."""
    buffer[n] = uint8(look)
    buffer[n + u64(1)] = uint8(look >> u64(8))
    buffer[n + u64(2)] = uint8(look >> u64(16))
    buffer[n + u64(3)] = uint8(look >> u64(24))
    buffer[n + u64(4)] = uint8(look >> u64(32))
    return n + ((look >> u64(40)) & u64(255))


@_compiled
def _one_by_one(encoded: Any, at: Any, tables: Any, buffer: Any, n: Any, until: Any) -> Any:
    """Read single symbols; where the stream and the buffer then are, and how many codes stood for nothing."""
    bad = 0
    while n < until:
        held = _window(encoded, at)
        look = tables.looks[held >> _LOOK_SHIFT]
        if look > u64(0):
            buffer[n] = uint8(look)
            at += u64(tables.lengths[u64(uint8(look))])
        else:
            bits = held >> _WORD
            length = LOOK_AHEAD + 1
            while length <= LIMIT and bits >= tables.beyond[length]:
                length += 1
            if length <= LIMIT:
                code = np.int64(bits >> u64(LIMIT - length))
                buffer[n] = tables.symbols[tables.place[length] + code - tables.first[length]]
                at += u64(length)
            else:
                bad += 1
                buffer[n] = 0
                at += u64(1)
        n += u64(1)
    return at, n, bad


@_compiled
def join(exponents: Any, sign_mantissa: Any, out: Any) -> None:
    """Put 16-bit words together again."""
    for i in range(out.size):
        rest = uint16(sign_mantissa[i])
        exponent = uint16(exponents[i])
        out[i] = uint16(((rest & uint16(128)) << uint16(8)) | (exponent << uint16(7)) | (rest & uint16(127)))


@_compiled
def _finish(
    encoded: Any,
    starts: Any,
    tables: Any,
    rest: Any,
    out: Any,
    block: int,
    b: int,
    at: Any,
    n: Any,
    buffer: Any,
) -> int:
    """Read what is left of a block and write its words; how many places show that it was altered."""
    low, high = b * block, min((b + 1) * block, out.size)
    at, n, bad = _one_by_one(encoded, at, tables, buffer, n, u64(high - low))
    join(buffer, rest[low:high], out[low:high])
    return bad + (np.int64((at + u64(31)) >> u64(5)) != starts[b + 1])


@_compiled
def read(
    encoded: Any, starts: Any, tables: DecodingTables, rest: Any, out: Any, block: int, first: int, last: int
) -> int:
    """Read blocks back into words; how many places show that the stream was altered.

    Args:
        encoded: words of the stream; at least two.
        starts: first word of each block, and the end of the last.
        tables: of the code.
        rest: sign and mantissa of each weight.
        out: one word for each weight.
        block: weights of a block.
        first, last: which blocks.
    """
    one, two = np.empty(block, np.uint8), np.empty(block, np.uint8)
    bad = 0
    for b in range(first, last, 2):
        at, n = u64(32 * starts[b]), u64(0)
        if b + 1 < last:
            at_two, n_two = u64(32 * starts[b + 1]), u64(0)
            want, want_two = u64(block), u64(min(block, out.size - (b + 1) * block))
            while n + _PER_TURN <= want and n_two + _PER_TURN <= want_two:
                held, held_two = _window(encoded, at), _window(encoded, at_two)
                look, look_two = tables.looks[held >> _LOOK_SHIFT], tables.looks[held_two >> _LOOK_SHIFT]
                if look == u64(0) or look_two == u64(0):
                    at, n, wrong = _one_by_one(encoded, at, tables, one, n, n + u64(1))
                    at_two, n_two, wrong_two = _one_by_one(
                        encoded, at_two, tables, two, n_two, n_two + u64(1)
                    )
                    bad += wrong + wrong_two
                    continue
                # 33 bits are held: enough for a second look. It may find nothing, and then moves nothing.
                used, used_two = look >> u64(48), look_two >> u64(48)
                n, n_two = _put(one, n, look), _put(two, n_two, look_two)
                look = tables.looks[(held << used) >> _LOOK_SHIFT]
                look_two = tables.looks[(held_two << used_two) >> _LOOK_SHIFT]
                n, n_two = _put(one, n, look), _put(two, n_two, look_two)
                at += used + (look >> u64(48))
                at_two += used_two + (look_two >> u64(48))
            bad += _finish(encoded, starts, tables, rest, out, block, b + 1, at_two, n_two, two)
        bad += _finish(encoded, starts, tables, rest, out, block, b, at, n, one)
    return bad
