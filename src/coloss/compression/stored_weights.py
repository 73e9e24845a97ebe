"""Weights as they lie in a file: fewer distinct values, zeros, factors, packed to the bit, and given back exactly.

What a method of compression does to a weight can be seen in the weight itself: pruned ones hold zeros, quantised ones few distinct
values. So a plain module is all that training has to leave behind; `store_exactly` looks which of these takes the fewest bytes

    dense       as it is, in float16 or bfloat16 where that loses nothing
    sparse      one bit for each weight, and the values of those that are not zero
    n:m         which n of each m neighbours are not zero, in ceil(log2 C(m, n)) bits, and their values
    codebook    ceil(log2 K) bits for each weight, and K values (for the whole tensor, or for each group of rows)
    low-rank    two factors; the only kind that cannot be read off a weight and has to be given

and the values of the sparse kinds may themselves lie in a codebook. The restored weight equals the stored one, entry by entry.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from math import comb
from typing import Any, ClassVar

import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import matricize, nm_mask, pack_codes, unpack_codes

_NARROW = (torch.float16, torch.bfloat16)


class StoredWeight(ABC):
    """A weight in the form in which a file holds it.

    A subclass with a `kind` of its own is read back from files by that name.

    Examples:
        >>> weight = torch.tensor([[0.5, -0.5, -0.5, 0.5]])
        >>> stored = store_exactly(weight)
        >>> stored.kind, stored.nbytes, torch.equal(stored.restore(), weight)
        ('codebook', 5, True)
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["StoredWeight"]]] = {}

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        StoredWeight.kinds[cls.kind] = cls

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that has to be stored, by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What else is needed to read it, as plain JSON."""

    @abstractmethod
    def restore(self) -> Tensor:
        """The weight."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "StoredWeight":
        """Undo `tensors` and `settings`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True)
class DenseWeight(StoredWeight):
    """Every value, in the order of the tensor.

    Attributes:
        values: any tensor.
        dtype: of the restored weight.
    """

    kind: ClassVar[str] = "dense"
    values: Tensor
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def settings(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    def restore(self) -> Tensor:
        return self.values.to(self.dtype, copy=True)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "DenseWeight":
        return cls(tensors["values"], getattr(torch, settings["dtype"]))


@dataclass(frozen=True)
class CodebookWeight(StoredWeight):
    """An index for each weight into a short table of values.

    Attributes:
        codes: packed indices of the rows' entries, see `pack_codes`.
        table: (groups, K) values; group g serves the rows `bounds[g]` to `bounds[g + 1]` of the first dimension.
        bounds: groups + 1 row numbers, from 0 to the number of rows; `(0, rows)` for one table.
        shape: of the weight.
        dtype: of the restored weight.
    """

    kind: ClassVar[str] = "codebook"
    codes: Tensor
    table: Tensor
    bounds: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        table: Tensor,
        bounds: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "CodebookWeight":
        """Pack plain indices.

        Args:
            codes: integers in [0, K), in the shape of the weight.
            table: (groups, K) or (K,) values, K <= 256.
            bounds: see the class; None for equal slices of rows, one for each row of the table.
            dtype: of the restored weight; the table's where None.

        Raises:
            ValueError: if the bounds do not cut the rows into as many groups as the table has, or K > 256.
        """
        table = table[None] if table.ndim == 1 else table
        rows = codes.shape[0] if codes.ndim else 1
        if bounds is None:
            bounds = tuple(round(i * rows / len(table)) for i in range(len(table) + 1))
        rises = all(low <= high for low, high in zip(bounds, bounds[1:], strict=False))
        if len(bounds) != len(table) + 1 or bounds[0] != 0 or bounds[-1] != rows or not rises:
            raise ValueError(
                f"bounds must rise from 0 to {rows} in {len(table)} steps, one for each row of the table, got {bounds}"
            )
        if not 1 <= table.shape[1] <= 256:
            raise ValueError(f"table must have 1 to 256 values in a row, got {table.shape[1]}")
        packed = pack_codes(codes, _bits(table.shape[1]))
        return cls(packed, table, bounds, tuple(codes.shape), dtype or table.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "table": self.table}

    def settings(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "bounds": list(self.bounds), "dtype": dtype}

    def restore(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        codes = unpack_codes(self.codes, _bits(self.table.shape[1]), count).int()
        rows = self.shape[0] if self.shape else 1
        sizes = torch.tensor(self.bounds).diff()
        group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        offsets = (group * self.table.shape[1]).to(codes.device)
        places = codes.view(rows, -1 if count else 0) + offsets[:, None]
        return self.table.to(self.dtype).reshape(-1)[places].reshape(self.shape)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "CodebookWeight":
        shape, bounds = tuple(settings["shape"]), tuple(settings["bounds"])
        return cls(tensors["codes"], tensors["table"], bounds, shape, getattr(torch, settings["dtype"]))


@dataclass(frozen=True)
class SparseWeight(StoredWeight):
    """One bit for each weight, and the values that are not zero.

    Attributes:
        mask: packed bits, 1 where a value follows.
        values: these values, in row-major order.
        shape: of the weight.
    """

    kind: ClassVar[str] = "sparse"
    mask: Tensor
    values: StoredWeight
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask, **_nested(self.values)}

    def settings(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "values": describe(self.values)}

    def restore(self) -> Tensor:
        mask = unpack_codes(self.mask, 1, torch.Size(self.shape).numel()).bool()
        return _placed(self.values.restore(), mask, self.shape)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "SparseWeight":
        return cls(tensors["mask"], _inner(tensors, settings["values"]), tuple(settings["shape"]))


@dataclass(frozen=True)
class NMSparseWeight(StoredWeight):
    """Which n of each m neighbours along one dimension are kept, and their values.

    Attributes:
        patterns: packed numbers of the groups' patterns, in the order of `itertools.combinations`.
        values: n for each group, in row-major order with `dim` moved to the end.
        shape: of the weight; m divides its size along `dim`.
        n, m: C(m, n) <= 256.
        dim: along which neighbours are counted: the last, or the second (input channels of a convolution).
    """

    kind: ClassVar[str] = "n:m"
    patterns: Tensor
    values: StoredWeight
    shape: tuple[int, ...]
    n: int
    m: int
    dim: int = -1

    def tensors(self) -> dict[str, Tensor]:
        return {"patterns": self.patterns, **_nested(self.values)}

    def settings(self) -> dict[str, Any]:
        sizes = {"n": self.n, "m": self.m, "dim": self.dim}
        return {"shape": list(self.shape), **sizes, "values": describe(self.values)}

    def restore(self) -> Tensor:
        groups = torch.Size(self.shape).numel() // self.m
        patterns = _patterns(self.n, self.m).to(self.patterns.device)
        numbers = unpack_codes(self.patterns, _bits(len(patterns)), groups).int()
        moved = torch.empty(self.shape, device="meta").movedim(self.dim, -1).shape
        weight = _placed(self.values.restore(), patterns[numbers].reshape(-1), tuple(moved))
        return weight.movedim(-1, self.dim).contiguous()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "NMSparseWeight":
        sizes = settings["n"], settings["m"], settings["dim"]
        return cls(tensors["patterns"], _inner(tensors, settings["values"]), tuple(settings["shape"]), *sizes)


@dataclass(frozen=True)
class LowRankWeight(StoredWeight):
    """Two factors whose product, laid back, is the weight.

    Attributes:
        left, right: (*batch, rows, rank) and (*batch, rank, columns).
        scheme: how the weight is laid out as a matrix, see `coloss.ops.matricize`.
        shape: of the weight.
    """

    kind: ClassVar[str] = "low-rank"
    left: Tensor
    right: Tensor
    scheme: str
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def settings(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "shape": list(self.shape)}

    def restore(self) -> Tensor:
        scheme: Any = self.scheme
        _, lay_back = matricize(self.left.new_zeros(()).expand(self.shape), scheme)
        return lay_back(self.left @ self.right).contiguous()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "LowRankWeight":
        return cls(tensors["left"], tensors["right"], settings["scheme"], tuple(settings["shape"]))


def store_exactly(weight: Tensor) -> StoredWeight:
    """Of the exact kinds, the one that takes the fewest bytes.

    Args:
        weight: any tensor; integers and booleans stay dense.

    Returns:
        Stored form on the CPU, whose `restore` equals the weight in every entry, NaN included. The sign of a zero is kept by
        the dense kind only.

    Cost: O(weights), and a sort of them where the first few thousand hold at most 256 distinct values.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(64, 64, generator=generator)
        >>> store_exactly(weight).kind, store_exactly(weight * nm_mask(weight, 2, 4)).kind
        ('dense', 'n:m')
    """
    return min(_exact_kinds(weight.detach().cpu().contiguous(), nested=False), key=lambda s: s.nbytes)


def describe(stored: StoredWeight) -> dict[str, Any]:
    """What a file's header says of a weight: its kind and settings, as plain JSON."""
    return {"kind": stored.kind, **stored.settings()}


def from_description(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> StoredWeight:
    """Undo `describe` and `StoredWeight.tensors`.

    Raises:
        InputError: for a kind that this version does not know.
    """
    kind = description.get("kind")
    if kind not in StoredWeight.kinds:
        known = ", ".join(sorted(StoredWeight.kinds))
        raise InputError(f"kind of a stored weight must be one of {known}, got {kind!r}")
    return StoredWeight.kinds[kind].from_parts(tensors, description)


def _exact_kinds(weight: Tensor, nested: bool) -> Iterator[StoredWeight]:
    narrow = _narrowest(weight)
    yield DenseWeight(narrow, weight.dtype)
    if not weight.is_floating_point() or not weight.numel():
        return
    # Rounding gives zeros of both signs, which are one value to every product: let them be one.
    weight = weight + 0.0
    if (book := _codebook(weight)) is not None:
        yield book
    if nested:
        return
    mask = weight != 0
    if not mask.all():
        values = min(_exact_kinds(weight[mask], nested=True), key=lambda s: s.nbytes)
        yield SparseWeight(pack_codes(mask.byte(), 1), values, tuple(weight.shape))
    yield from _nm_kinds(weight, mask)


def _nm_kinds(weight: Tensor, mask: Tensor) -> Iterator[StoredWeight]:
    for dim, m in product((-1, 1) if weight.ndim > 2 else (-1,) * (weight.ndim > 0), (4, 8, 16)):
        if weight.shape[dim] % m:
            continue
        moved = mask.movedim(dim, -1)
        n = int(moved.unflatten(-1, (-1, m)).sum(-1).max())
        if not 1 <= n < m or comb(m, n) > 256:
            continue
        # Groups with fewer than n fill up with zeros.
        kept = nm_mask(moved.float(), n, m).reshape(-1, m)
        patterns = _patterns(n, m)
        # A pattern's number, found by the weighted sum of its places: all distinct, and sorted once.
        places = 2 ** torch.arange(m)
        known, order = (patterns * places).sum(1).sort()
        numbers = order[torch.searchsorted(known, (kept * places).sum(1))]
        inner = weight.movedim(dim, -1).reshape(-1, m)[kept]
        values = min(_exact_kinds(inner, nested=True), key=lambda s: s.nbytes)
        packed = pack_codes(numbers, _bits(len(patterns)))
        yield NMSparseWeight(packed, values, tuple(weight.shape), n, m, dim)


def _codebook(weight: Tensor) -> CodebookWeight | None:
    # Bit patterns, so that NaN equals itself.
    words = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    if len(words.reshape(-1)[:4096].unique()) > 256 * max(1, min(len(words) if words.ndim else 1, 4)):
        return None
    candidates = []
    values, codes = words.unique(return_inverse=True)
    if len(values) <= 256:
        table = _narrowest(values.view(weight.dtype))
        candidates.append(CodebookWeight.from_codes(codes, table, dtype=weight.dtype))
    if words.ndim > 1 and words.shape[0] > 1:
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


def _narrowest(values: Tensor) -> Tensor:
    if values.dtype in (torch.float32, torch.float64):
        for dtype in (*_NARROW, torch.float32):
            narrow = values.to(dtype)
            if torch.equal(narrow.to(values.dtype), values):
                return narrow
    return values


@cache
def _patterns(n: int, m: int) -> Tensor:
    return torch.tensor([[i in chosen for i in range(m)] for chosen in combinations(range(m), n)])


def _bits(codes: int) -> int:
    return max(1, (codes - 1).bit_length())


def _placed(values: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    weight = values.new_zeros(mask.numel())
    weight[mask] = values
    return weight.reshape(shape)


def _nested(values: StoredWeight) -> dict[str, Tensor]:
    return {f"values.{name}": tensor for name, tensor in values.tensors().items()}


def _inner(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> StoredWeight:
    inner = {n.removeprefix("values."): t for n, t in tensors.items() if n.startswith("values.")}
    return from_description(inner, description)
