"""The forms in which a file holds a weight: dense, by a table of values, without its zeros, by factors; each packed to the bit and given back.

`coloss.compression.stored_weights` says what they are for, and finds the smallest.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import matricize, pack_codes, unpack_codes


class StoredWeight(ABC):
    """A weight in the form in which a file holds it.

    A subclass with a `kind` of its own is read back from files by that name.

    Examples:
        >>> weight = torch.tensor([[0.5, -0.5, -0.5, 0.5]])
        >>> stored = CodebookWeight.from_codes(
        ...     (weight > 0).int(), torch.tensor([-0.5, 0.5], dtype=torch.float16), dtype=weight.dtype
        ... )
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
            ValueError: if the bounds do not cut the rows into as many groups as the table has, K > 256, or a code is not in [0, K).
        """
        table = table[None] if table.ndim == 1 else table
        rows = codes.shape[0] if codes.ndim else 1
        if bounds is None:
            bounds = _equal_slices(rows, len(table))
        rises = all(low <= high for low, high in zip(bounds, bounds[1:], strict=False))
        if len(bounds) != len(table) + 1 or bounds[0] != 0 or bounds[-1] != rows or not rises:
            raise ValueError(
                f"bounds must rise from 0 to {rows} in {len(table)} steps, one for each row of the table, got {bounds}"
            )
        if not 1 <= table.shape[1] <= 256:
            raise ValueError(f"table must have 1 to 256 values in a row, got {table.shape[1]}")
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if low < 0 or high >= table.shape[1]:
            raise ValueError(f"codes must be in [0, {table.shape[1]}), got {low} to {high}")
        packed = pack_codes(codes, code_bits(table.shape[1]))
        return cls(packed, table, bounds, tuple(codes.shape), dtype or table.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "table": self.table}

    def settings(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        # Written out, the bounds of a table for each row take as much room as narrow rows themselves.
        left_out = len(self.table) > 1 and self.bounds == _equal_slices(
            self.shape[0] if self.shape else 1, len(self.table)
        )
        return {
            "shape": list(self.shape),
            **({} if left_out else {"bounds": list(self.bounds)}),
            "dtype": dtype,
        }

    def restore(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        codes = unpack_codes(self.codes, code_bits(self.table.shape[1]), count).int()
        rows = self.shape[0] if self.shape else 1
        sizes = torch.tensor(self.bounds).diff()
        group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        offsets = (group * self.table.shape[1]).to(codes.device)
        places = codes.view(rows, -1 if count else 0) + offsets[:, None]
        return self.table.to(self.dtype).reshape(-1)[places].reshape(self.shape)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "CodebookWeight":
        shape = tuple(settings["shape"])
        # Files of the first version name the bounds of equal slices too.
        bounds = settings.get("bounds") or _equal_slices(shape[0] if shape else 1, len(tensors["table"]))
        return cls(
            tensors["codes"], tensors["table"], tuple(bounds), shape, getattr(torch, settings["dtype"])
        )


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
        patterns = kept_patterns(self.n, self.m).to(self.patterns.device)
        numbers = unpack_codes(self.patterns, code_bits(len(patterns)), groups).int()
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


def _equal_slices(rows: int, groups: int) -> tuple[int, ...]:
    return tuple(round(i * rows / groups) for i in range(groups + 1))


@cache
def kept_patterns(n: int, m: int) -> Tensor:
    """All ways to keep n of m neighbours, (C(m, n), m) booleans in the order of `itertools.combinations`.

    Examples:
        >>> kept_patterns(1, 3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    return torch.tensor([[i in chosen for i in range(m)] for chosen in combinations(range(m), n)])


def code_bits(codes: int) -> int:
    """Bits that tell so many codes apart, at least 1.

    Examples:
        >>> code_bits(1), code_bits(16), code_bits(17)
        (1, 4, 5)
    """
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
