"""Weights as they lie in a file: fewer distinct values, zeros, factors, packed to the bit, and given back exactly.

What a method of compression does to a weight can be seen in the weight itself: pruned ones hold zeros, quantised ones few distinct
values. So a plain module is all that training has to leave behind; `store_exactly` looks which of these takes the fewest bytes

    dense       as it is, in float16 or bfloat16 where that loses nothing
    dfloat11    bfloat16 values with coded exponents, about 11 bits each; see `coloss.compression.bf16_codec`
    sparse      one bit for each weight, and the values of those that are not zero
    n:m         which n of each m neighbours are not zero, in ceil(log2 C(m, n)) bits, and their values
    codebook    ceil(log2 K) bits for each weight, and K values (for the whole tensor, or for each group of rows)
    low-rank    two factors; the only kind that cannot be read off a weight and has to be given

and the values of the sparse kinds may themselves lie in a codebook, or have coded exponents. The restored weight equals the stored one, entry by entry.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import comb

import torch
from torch import Tensor

from coloss.compression.bf16_codec import MINIMUM_WEIGHTS, encode_bf16, exponent_stats
from coloss.compression.weight_forms import CodebookWeight as CodebookWeight
from coloss.compression.weight_forms import DenseWeight as DenseWeight
from coloss.compression.weight_forms import LowRankWeight as LowRankWeight
from coloss.compression.weight_forms import NMSparseWeight as NMSparseWeight
from coloss.compression.weight_forms import SparseWeight as SparseWeight
from coloss.compression.weight_forms import StoredWeight as StoredWeight
from coloss.compression.weight_forms import code_bits, kept_patterns
from coloss.compression.weight_forms import describe as describe
from coloss.compression.weight_forms import from_description as from_description
from coloss.ops import nm_mask, pack_codes

_NARROW = (torch.float16, torch.bfloat16)
_FLOATS = (*_NARROW, torch.float32, torch.float64)
_SAMPLE = 4096


@dataclass(frozen=True)
class _Plan:
    """A form that could be taken: its bytes, and how it is made."""

    nbytes: float
    make: Callable[[], StoredWeight]

    @classmethod
    def of(cls, stored: StoredWeight) -> "_Plan":
        return cls(stored.nbytes, lambda: stored)


def store_exactly(weight: Tensor) -> StoredWeight:
    """Of the exact kinds, the one that takes the fewest bytes.

    Args:
        weight: any tensor; what is not float16, bfloat16, float32 or float64 stays dense.

    Returns:
        Stored form on the CPU, whose `restore` equals the weight in every entry, NaN included. The sign of a zero is kept by
        the kinds dense and dfloat11 only.

    Cost: O(weights), and a sort of them where the first few thousand hold at most 256 distinct values, or the rows among these fewer values
        than entries. Weights that are exactly bfloat16 and at least 16,384 cost a histogram for each kind that could hold them, and are coded
        once, if that promises the fewest bytes; the promise is good to 0.04 %.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(64, 64, generator=generator)
        >>> store_exactly(weight).kind, store_exactly(weight * nm_mask(weight, 2, 4)).kind
        ('dense', 'n:m')
    """
    return _smallest(weight.detach().cpu().contiguous(), nested=False).make()


def _smallest(weight: Tensor, nested: bool) -> _Plan:
    return min(_exact_kinds(weight, nested), key=lambda plan: plan.nbytes)


def _exact_kinds(weight: Tensor, nested: bool) -> Iterator[_Plan]:
    yield _Plan.of(DenseWeight(_narrowest(weight), weight.dtype))
    if weight.dtype not in _FLOATS or not weight.numel():
        return
    if weight.numel() >= MINIMUM_WEIGHTS and (values := _as_bfloat16(weight)) is not None:
        dtype = weight.dtype
        promised = exponent_stats(values).ratio * values.nbytes
        yield _Plan(promised, lambda: replace(encode_bf16(values), dtype=dtype))
    # Rounding gives zeros of both signs, which are one value to every product: let them be one.
    weight = weight + 0.0
    if (book := _codebook(weight)) is not None:
        yield _Plan.of(book)
    if nested:
        return
    mask = weight != 0
    if not mask.all():
        shape, packed = tuple(weight.shape), pack_codes(mask.byte(), 1)
        inner = _smallest(weight[mask], nested=True)
        yield _Plan(packed.nbytes + inner.nbytes, lambda: SparseWeight(packed, inner.make(), shape))
    yield from _nm_kinds(weight, mask)


def _nm_kinds(weight: Tensor, mask: Tensor) -> Iterator[_Plan]:
    for dim, m in product((-1, 1) if weight.ndim > 2 else (-1,) * (weight.ndim > 0), (4, 8, 16)):
        if weight.shape[dim] % m:
            continue
        moved = mask.movedim(dim, -1)
        n = int(moved.unflatten(-1, (-1, m)).sum(-1).max())
        if not 1 <= n < m or comb(m, n) > 256:
            continue
        # Groups with fewer than n fill up with zeros.
        kept = nm_mask(moved.float(), n, m).reshape(-1, m)
        patterns = kept_patterns(n, m)
        # A pattern's number, found by the weighted sum of its places: all distinct, and sorted once.
        places = 2 ** torch.arange(m)
        known, order = (patterns * places).sum(1).sort()
        numbers = order[torch.searchsorted(known, (kept * places).sum(1))]
        inner = _smallest(weight.movedim(dim, -1).reshape(-1, m)[kept], nested=True)
        packed = pack_codes(numbers, code_bits(len(patterns)))
        make = partial(_nm_weight, inner, packed, tuple(weight.shape), n, m, dim)
        yield _Plan(packed.nbytes + inner.nbytes, make)


def _nm_weight(
    inner: _Plan, packed: Tensor, shape: tuple[int, ...], n: int, m: int, dim: int
) -> StoredWeight:
    return NMSparseWeight(packed, inner.make(), shape, n, m, dim)


def _codebook(weight: Tensor) -> CodebookWeight | None:
    # Bit patterns, so that NaN equals itself.
    words = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    candidates = []
    if len(words.reshape(-1)[:_SAMPLE].unique()) <= 256:
        values, codes = words.unique(return_inverse=True)
        if len(values) <= 256:
            table = _narrowest(values.view(weight.dtype))
            candidates.append(CodebookWeight.from_codes(codes, table, dtype=weight.dtype))
    if words.ndim > 1 and words.shape[0] > 1 and _rows_repeat(words.flatten(1)):
        rows = words.flatten(1).sort(1)
        new = torch.ones_like(rows.values, dtype=torch.bool)
        new[:, 1:] = rows.values[:, 1:] != rows.values[:, :-1]
        count = int(new.sum(1).max())
        if count <= 256:
            ranks = new.cumsum(1) - 1
            row_codes = torch.empty_like(ranks).scatter_(1, rows.indices, ranks)
            # Rows with fewer distinct values repeat their last one.
            row_table = rows.values[:, -1:].repeat(1, count).scatter_(1, ranks, rows.values)
            table = _narrowest(row_table.view(weight.dtype))
            candidates.append(
                CodebookWeight.from_codes(row_codes.reshape(weight.shape), table, dtype=weight.dtype)
            )
    return min(candidates, key=lambda s: s.nbytes, default=None)


def _rows_repeat(words: Tensor) -> bool:
    """Whether a table for each row can pay, by the first rows: at most 256 distinct values in each, and fewer than entries."""
    columns = words.shape[1]
    first = words[: max(1, _SAMPLE // columns), :_SAMPLE].sort(1).values
    distinct = 1 + int((first[:, 1:] != first[:, :-1]).sum(1).max())
    return distinct <= min(256, columns - 1)


def _narrowest(values: Tensor) -> Tensor:
    if values.dtype in (torch.float32, torch.float64):
        for dtype in (*_NARROW, torch.float32):
            narrow = values.to(dtype)
            if torch.equal(narrow.to(values.dtype), values):
                return narrow
    return values


def _as_bfloat16(weight: Tensor) -> Tensor | None:
    """The same values in bfloat16, if they are all exactly that; most others show it in their first few thousand."""
    if weight.dtype == torch.bfloat16:
        return weight
    if weight.dtype == torch.float32:
        # Bit patterns, so that NaN is like any other value.
        words = weight.view(torch.int32)
        exact = not (words.reshape(-1)[:4096] & 0xFFFF).any() and not (words & 0xFFFF).any()
        return (words >> 16).to(torch.int16).view(torch.bfloat16) if exact else None
    if weight.dtype in (torch.float16, torch.float64):
        return narrow if torch.equal((narrow := weight.bfloat16()).to(weight.dtype), weight) else None
    return None
