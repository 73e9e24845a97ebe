"""Weights as indices into short tables, one table for each group of alike output neurons.

A layer's weight W (rows are output neurons or channels) becomes codes I of b bits and K = 2^b codewords C_g for each group g of rows:

    W_hat[r] = C_g(r)[I[r]]          or, with one table for all groups,          W_hat[r] = s_g(r) C[I[r]]

    bits     b for each weight, 16 K for each table, 16 for each scale, ceil(log2 groups) for each row

Rows are grouped by what their weights are distributed like: 16 quantiles of each row, clustered by k-means. Rows of a group need not be
neighbours: which group a row belongs to is stored, in fewer bits than a permutation takes, unless `permute_neurons` has brought each group
together; then the groups' bounds say it, a few numbers in the header.

Source: Yvinec, Dapogny, Bailly 2024, arXiv 2309.17361. What "similarly distributed" neurons are is not to be found in its public parts: the
quantiles are this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn

from coloss.compression.stored_weights import CodebookWeight, StoredWeight
from coloss.errors import InputError
from coloss.ops import kmeans_1d, nearest_codes, pack_codes, unpack_codes
from coloss.ops.precision import full_precision

_QUANTILES = 16
_SMALLEST, _LARGEST = 2.0**-14, 65504.0


@dataclass(frozen=True)
class Codebook:
    """A weight as codes and tables.

    Attributes:
        codes: uint8, in the shape of the weight, rows ordered by their group.
        table: float16 (groups, K), or (1, K) where groups have scales.
        row_group_bounds: group g has the rows of `codes` from `row_group_bounds[g]` to `row_group_bounds[g + 1]`.
        perm: row i of `codes` is row `perm[i]` of the weight; None where they are in the same order.
        scales: float16 (groups,), or None.
        dtype: of the weight.

    Examples:
        >>> codebook = kmeans_codebook(torch.tensor([[0.5, -0.5], [0.25, 0.5]]), bits=2)
        >>> codebook.dequantize(), codebook.nbits()
        (tensor([[ 0.5000, -0.5000],
                [ 0.2500,  0.5000]]), 72)
    """

    codes: UInt8[Tensor, "rows *shape"]
    table: Float[Tensor, "tables codes"]
    row_group_bounds: tuple[int, ...]
    perm: Integer[Tensor, "rows"] | None = None
    scales: Float[Tensor, "groups"] | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls,
        codes: UInt8[Tensor, "rows *shape"],
        table: Float[Tensor, "tables codes"],
        group: Integer[Tensor, "rows"],
        *,
        scales: Float[Tensor, "groups"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Codebook":
        """From codes in the order of the weight's rows, and the group of each row.

        Args:
            codes: see the class.
            table: rounded to float16.
            group: in [0, groups).
            scales: rounded to float16.
            dtype: of the weight.

        Examples:
            >>> codes = torch.tensor([[1], [0]], dtype=torch.uint8)
            >>> Codebook.of(codes, torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([1, 0])).dequantize()
            tensor([[3.],
                    [0.]])
        """
        groups = len(table) if scales is None else len(scales)
        perm = group.argsort(stable=True)
        bounds = (0, *torch.bincount(group, minlength=groups).cumsum(0).tolist())
        ordered = bool((group.diff() >= 0).all())
        return cls(
            codes if ordered else codes[perm],
            table.half(),
            bounds,
            None if ordered else perm,
            None if scales is None else scales.half(),
            dtype,
        )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return max(1, (self.table.shape[1] - 1).bit_length())

    @property
    def groups(self) -> int:
        """Number of groups of rows."""
        return len(self.row_group_bounds) - 1

    def group_of_row(self) -> Integer[Tensor, "rows"]:
        """Group of each row of the weight."""
        sizes = torch.tensor(self.row_group_bounds, device=self.codes.device).diff()
        group = torch.repeat_interleave(torch.arange(self.groups, device=self.codes.device), sizes)
        return group if self.perm is None else torch.empty_like(group).scatter_(0, self.perm, group)

    def row_codes(self) -> UInt8[Tensor, "rows *shape"]:
        """Codes in the order of the weight's rows."""
        return (
            self.codes
            if self.perm is None
            else torch.empty_like(self.codes).index_copy_(0, self.perm, self.codes)
        )

    def group_tables(self) -> Float[Tensor, "groups codes"]:
        """Codewords of each group in float32, its scale included."""
        return (
            self.table.float() if self.scales is None else self.scales.float()[:, None] * self.table.float()
        )

    def dequantize(self) -> Float[Tensor, "rows *shape"]:
        """The weight that the codes stand for."""
        return _looked_up(self.row_codes(), self.group_tables(), self.group_of_row(), self.dtype)

    def stored(self) -> StoredWeight:
        """As a file holds it: `restore` gives what `dequantize` gives."""
        codes, table = self.row_codes().cpu(), self.table.cpu()
        if self.perm is None and self.scales is None:
            return CodebookWeight.from_codes(codes, table, self.row_group_bounds, self.dtype)
        group = None
        if self.perm is not None:
            group = pack_codes(self.group_of_row().cpu(), _group_bits(self.groups))
        scales = None if self.scales is None else self.scales.cpu()
        packed = pack_codes(codes, self.bits)
        return GroupedCodebookWeight(
            packed, table, self.row_group_bounds, tuple(codes.shape), self.dtype, group, scales
        )

    def nbits(self) -> int:
        """Stored bits, each part filled up to whole bytes: 8 times the bytes of `stored`.

        A file's header holds the bounds beside them, as text.
        """
        ids = 0 if self.perm is None else _bytes(_group_bits(self.groups) * len(self.codes))
        numbers = self.table.numel() + (0 if self.scales is None else len(self.scales))
        return 8 * (_bytes(self.bits * self.codes.numel()) + ids) + 16 * numbers

    def in_order(self) -> "Codebook":
        """The same rows in the order of their groups: of the layer after `permute_neurons(layer, next_layer, codebook.perm)`."""
        return replace(self, perm=None)

    def with_rows(self, perm: Integer[Tensor, "rows"]) -> "Codebook":
        """The weight's rows in another order, row `perm[i]` as row i: of a depthwise convolution that `permute_neurons(..., perm)` had between."""
        codes, group = self.row_codes()[perm], self.group_of_row()[perm]
        return Codebook.of(codes, self.table, group, scales=self.scales, dtype=self.dtype)

    def with_inputs(self, perm: Integer[Tensor, "neurons"]) -> "Codebook":
        """The same rows with their inputs reordered: of the next layer after `permute_neurons(layer, next_layer, perm)`."""
        blocks = self.codes.reshape(len(self.codes), len(perm), -1)
        return replace(self, codes=blocks[:, perm].reshape(self.codes.shape))


@dataclass(frozen=True)
class GroupedCodebookWeight(StoredWeight):
    """Codes into tables of groups of rows that are no neighbours, or that have a scale each.

    Attributes:
        codes: packed, in the order of the weight's rows.
        table: (groups, K), or (1, K) with scales.
        bounds: of the groups, as in `Codebook`.
        shape: of the weight.
        dtype: of the restored weight.
        group: packed group of each row; None where groups are neighbours.
        scales: of the groups, or None.
    """

    kind: ClassVar[str] = "grouped-codebook"
    codes: Tensor
    table: Tensor
    bounds: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: Tensor | None = None
    scales: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        parts = {"codes": self.codes, "table": self.table, "group": self.group, "scales": self.scales}
        return {name: part for name, part in parts.items() if part is not None}

    def settings(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "bounds": list(self.bounds), "dtype": dtype}

    def restore(self) -> Tensor:
        groups = len(self.bounds) - 1
        bits = max(1, (self.table.shape[1] - 1).bit_length())
        codes = unpack_codes(self.codes, bits, prod(self.shape)).reshape(self.shape)
        if self.group is None:
            group = torch.repeat_interleave(torch.arange(groups), torch.tensor(self.bounds).diff())
        else:
            group = unpack_codes(self.group, _group_bits(groups), self.shape[0]).long()
        tables = (
            self.table.float() if self.scales is None else self.scales.float()[:, None] * self.table.float()
        )
        return _looked_up(codes, tables, group, self.dtype)

    @classmethod
    def from_parts(
        cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> "GroupedCodebookWeight":
        shape, bounds = tuple(settings["shape"]), tuple(settings["bounds"])
        dtype = getattr(torch, settings["dtype"])
        return cls(
            tensors["codes"],
            tensors["table"],
            bounds,
            shape,
            dtype,
            tensors.get("group"),
            tensors.get("scales"),
        )


def kmeans_codebook(
    weight: Float[Tensor, "rows *shape"], bits: int, groups: int = 1, *, scale_per_group: bool = False
) -> Codebook:
    """Codes and tables of least squared error in the weight itself.

    Args:
        weight: of a layer, rows first.
        bits: of each code, in 1..8.
        groups: of rows, in 1..256; there are never more than rows.
        scale_per_group: one table for all groups, and a scale for each: the root mean square of its weights.

    Returns:
        Tables rounded to float16, and each weight's nearest codeword in them.

    Raises:
        InputError: for bits or groups out of range, a weight with fewer than two dimensions, without entries or with NaN, or one whose
            largest entry is outside float16's normal range.

    Cost: a sort of each group's weights, and see `kmeans_1d`; the grouping sorts each row.

    Examples:
        >>> weight = torch.tensor([[1.0, -1.0], [0.1, -0.1], [-1.0, 1.0], [-0.1, 0.1]])
        >>> one, two = (kmeans_codebook(weight, bits=1, groups=groups) for groups in (1, 2))
        >>> [round(float((weight - codebook.dequantize()).abs().max()), 3) for codebook in (one, two)]
        [0.667, 0.0]
        >>> two.row_group_bounds, two.perm
        ((0, 2, 4), tensor([1, 3, 0, 2]))
    """
    check_size(bits, groups)
    check_weight(weight)
    rows = full_precision(weight.detach()).flatten(1)
    group = group_rows(rows, groups)
    count = int(group.max()) + 1
    scales = None
    if scale_per_group:
        squares = torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add_(
            0, group, rows.square().mean(1)
        )
        scales = (squares / torch.bincount(group, minlength=count)).sqrt().half()
        scales = scales.where(scales > 0, 1.0)
        importance = scales.to(rows.dtype).square()[group][:, None].expand_as(rows)
        scaled = rows / scales.to(rows.dtype)[group][:, None]
        table = kmeans_1d(scaled.reshape(1, -1), 2**bits, weights=importance.reshape(1, -1)).table
    else:
        members = [rows[group == g].reshape(-1) for g in range(count)]
        padded = nn.utils.rnn.pad_sequence(members, batch_first=True)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in members], batch_first=True)
        table = kmeans_1d(padded, 2**bits, weights=real).table
    blank = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    return with_nearest_codes(Codebook.of(blank, table, group, scales=scales, dtype=weight.dtype), rows)


def with_nearest_codes(codebook: Codebook, weight: Float[Tensor, "rows *shape"]) -> Codebook:
    """The same tables, with each weight's nearest codeword."""
    rows, group, tables = full_precision(weight).flatten(1), codebook.group_of_row(), codebook.group_tables()
    codes = nearest_codes(rows, tables.to(rows.dtype)[group]).reshape(codebook.codes.shape)
    return replace(codebook, codes=codes if codebook.perm is None else codes[codebook.perm])


def group_rows(weight: Float[Tensor, "rows *shape"], groups: int) -> Integer[Tensor, "rows"]:
    """Group of each row, rows of alike distribution together; groups in the order of their spread.

    Args:
        weight: of a layer.
        groups: number of groups at most, in 1..256; rows that are all alike make fewer.

    Raises:
        InputError: if `groups` is out of range.

    Cost: a sort of each row, and k-means in 16 dimensions (scikit-learn, seeded).

    Examples:
        >>> group_rows(torch.tensor([[2.0, -2.0], [0.1, -0.1], [1.9, -1.9]]), 2)
        tensor([1, 0, 1])
    """
    check_size(1, groups)
    rows = full_precision(weight.detach()).flatten(1)
    if groups == 1 or len(rows) == 1:
        return torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    from sklearn.cluster import KMeans

    spread = rows.double().square().mean(1).sqrt()
    levels = (torch.arange(_QUANTILES, device=rows.device) + 0.5) / _QUANTILES * (rows.shape[1] - 1)
    ordered = rows.sort(1).values
    low = levels.floor().long()
    share = (levels - low).to(rows.dtype)
    descriptors = (
        ordered[:, low].lerp(ordered[:, (low + 1).clamp(max=rows.shape[1] - 1)], share).double().cpu()
    )
    count = min(groups, len(descriptors.unique(dim=0)))
    found = KMeans(count, n_init=4, random_state=0).fit_predict(descriptors.numpy())
    group = torch.as_tensor(found, dtype=torch.long)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, group, spread.cpu())
    rank = (sums / torch.bincount(group, minlength=count)).argsort(stable=True).argsort()
    return rank[group].to(weight.device)


def groups_within(shape: Sequence[int], bits: int, bits_per_weight: float) -> int:
    """The most groups of rows, each with a table, that a size allows.

    Args:
        shape: of the weight.
        bits: of each code, in 1..8.
        bits_per_weight: everything stored, over the number of weights.

    Raises:
        InputError: for bits out of range, or if not even one table fits.

    Examples:
        >>> groups_within((512, 512), bits=2, bits_per_weight=2.05)
        140
    """
    check_size(bits)
    rows, count = shape[0], prod(shape)

    def size(groups: int) -> int:
        ids = _bytes(_group_bits(groups) * rows) if groups > 1 else 0
        return 8 * (_bytes(bits * count) + ids) + 16 * 2**bits * groups

    fitting = [groups for groups in range(1, min(rows, 256) + 1) if size(groups) <= bits_per_weight * count]
    if not fitting:
        raise InputError(
            f"bits_per_weight must be >= {size(1) / count:.4g} for {bits} bits and one table, got {bits_per_weight}"
        )
    return fitting[-1]


def check_size(bits: int, groups: int = 1) -> None:
    """Refuse other numbers than codes and groups can have."""
    for name, value, most in (("bits", bits, 8), ("groups", groups, 256)):
        if not 1 <= value <= most:
            raise InputError(f"{name} must be in 1..{most}, got {value}")


def check_weight(weight: Tensor) -> None:
    """Refuse what float16 tables cannot stand for."""
    if weight.ndim < 2 or not weight.numel():
        raise InputError(
            f"weight must have two dimensions or more, and entries, got shape {tuple(weight.shape)}"
        )
    if not weight.isfinite().all():
        raise InputError("weight must be finite, got NaN or infinity")
    largest = float(weight.detach().abs().max())
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise InputError(
            f"weight must have its largest entry in [{_SMALLEST:.2g}, {_LARGEST:.0f}] for float16 tables, got {largest:.3g}"
        )


def _looked_up(codes: Tensor, tables: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    places = codes.flatten(1).long() + (group.to(codes.device) * tables.shape[1])[:, None]
    return tables.to(dtype).reshape(-1)[places].reshape(codes.shape)


def _group_bits(groups: int) -> int:
    return max(1, (groups - 1).bit_length())


def _bytes(bits: int) -> int:
    return -(-bits // 8)
