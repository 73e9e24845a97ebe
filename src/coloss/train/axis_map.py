"""How the units of one width of a network become those of another: averaged, copied, selected; and what becomes of those that read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Side = Literal["made", "read"]
"""Whether a tensor's axis makes a width or reads it."""

_FEW = 16  # entries in a row up to which rows are gathered and added, in place of a matrix product


class AxisMap:
    """How the units of one width become those of another: F where the width is made, rownorm(F^T)^T where it is read.

    Args:
        made: F, (new, old), entries >= 0.
        block: features in each unit, >= 1, such as the size of a head: units move whole.
        read: what acts on axes that read the width, (new, old); None: `rownorm(F^T)^T`, F with columns that sum to 1.

    Raises:
        ValueError: for a matrix without entries, with one below 0 or not finite, or a `block` below 1.

    Examples:
        >>> halve = AxisMap.averaging([[0, 2], [1, 3]])
        >>> made, read = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
        >>> halve(made), halve(read, side="read")
        (tensor([2., 3.]), tensor([2., 2.]))
        >>> halve.reversed()(torch.tensor([5.0, 6.0]))
        tensor([5., 6., 5., 6.])
    """

    def __init__(
        self,
        made: Float[Tensor, "new old"],
        block: int = 1,
        *,
        read: Float[Tensor, "new old"] | None = None,
    ) -> None:
        made = made.detach().to("cpu", torch.float64)
        if not made.numel() or not bool((made >= 0).all()) or not bool(made.isfinite().all()):
            raise ValueError(f"made must hold finite entries >= 0, got shape {tuple(made.shape)}")
        if block < 1:
            raise ValueError(f"block must be >= 1, got {block}")
        if read is None:
            read = _row_normalised(made.T).T
        # Cloned, for a transposed row counts as contiguous and `torch.kron` cannot view it.
        self.made = made.clone(memory_format=torch.contiguous_format)
        self.read = read.detach().to("cpu", torch.float64).clone(memory_format=torch.contiguous_format)
        self.block = block
        self._rows = {"made": _Rows(self.made), "read": _Rows(self.read)}

    @classmethod
    def averaging(cls, groups: Sequence[Sequence[int]], block: int = 1) -> "AxisMap":
        """Each new unit is the mean of a group of old ones.

        Args:
            groups: the old units 0, 1, ... each in exactly one group.
            block: features in each unit.

        Raises:
            ValueError: if a unit is missing or there twice, or a group is empty.
        """
        members = sorted(unit for group in groups for unit in group)
        if members != list(range(len(members))) or not all(groups):
            raise ValueError(
                f"groups must hold each unit 0, 1, ... once and none may be empty, got {[list(g) for g in groups]}"
            )
        made = torch.zeros(len(groups), len(members), dtype=torch.float64)
        for row, group in enumerate(groups):
            made[row, list(group)] = 1 / len(group)
        return cls(made, block)

    @classmethod
    def selecting(cls, kept: Sequence[int], size: int, block: int = 1) -> "AxisMap":
        """Keep some of `size` units, in the order given, and drop the others.

        Raises:
            ValueError: for no unit, or one outside [0, size).
        """
        if not kept or min(kept) < 0 or max(kept) >= size:
            raise ValueError(f"kept must name units in [0, {size}), got {list(kept)}")
        rows = torch.eye(size, dtype=torch.float64)[list(kept)]
        return cls(rows, block, read=rows)

    def reversed(self) -> "AxisMap":
        """The map back: what was averaged is copied, what was copied is averaged. T = rownorm(F^T); read is F^T, F's rows having sum 1."""
        return AxisMap(self.read.T, self.block, read=self.made.T)

    def swapped(self) -> "AxisMap":
        """The same with made and read exchanged: what happens to gradients, see `StateMap.of_gradients`."""
        return AxisMap(self.read, self.block, read=self.made)

    def __matmul__(self, first: "AxisMap") -> "AxisMap":
        """`first`, then this one, as one map.

        Raises:
            ValueError: if the sizes do not fit.
        """
        block = min(self.block, first.block)
        if max(self.block, first.block) % block or self.old != first.new:
            raise ValueError(f"first must give {self.old} features, got {first.new}")
        second, first = self._in_blocks(block), first._in_blocks(block)
        return AxisMap(second.made @ first.made, block, read=second.read @ first.read)

    @property
    def old(self) -> int:
        """Features before."""
        return self.made.shape[1] * self.block

    @property
    def new(self) -> int:
        """Features after."""
        return self.made.shape[0] * self.block

    @property
    def copies(self) -> set[int]:
        """How many copies of an old unit there are, over all units; one number where growing keeps what a LayerNorm sees."""
        return {int(count) for count in (self.made > 0).sum(0).tolist()}

    def __call__(self, tensor: Tensor, dim: int = 0, side: Side = "made") -> Tensor:
        """Map one axis of a tensor; where nothing changes, the tensor itself.

        Raises:
            ValueError: if the axis has another size than `old`.
        """
        if tensor.shape[dim] != self.old:
            raise ValueError(
                f"dimension {dim} must have {self.old} features, got shape {tuple(tensor.shape)}"
            )
        rows = self._rows[side]
        if rows.identity:
            return tensor
        dim %= tensor.ndim
        if self.block == 1:
            return rows(tensor, dim)
        return rows(tensor.unflatten(dim, (-1, self.block)), dim).flatten(dim, dim + 1)

    def _in_blocks(self, block: int) -> "AxisMap":
        if block == self.block:
            return self
        one = torch.eye(self.block // block, dtype=torch.float64)
        return AxisMap(torch.kron(self.made, one), block, read=torch.kron(self.read, one))


@dataclass(frozen=True)
class Axis:
    """What one dimension of a parameter holds: one width, or several in a row as in a fused layer of queries, keys and values.

    Args:
        maps: of the widths, in their order.
        side: whether the parameter makes them or reads them.
    """

    maps: tuple[AxisMap, ...]
    side: Side = "made"

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return all(axis._rows[self.side].identity for axis in self.maps)

    def __call__(self, tensor: Tensor, dim: int) -> Tensor:
        if len(self.maps) == 1:
            return self.maps[0](tensor, dim, self.side)
        sizes = [axis.old for axis in self.maps]
        if tensor.shape[dim] != sum(sizes):
            raise ValueError(
                f"dimension {dim} must have {sum(sizes)} features, got shape {tuple(tensor.shape)}"
            )
        if self.identity:
            return tensor
        parts = tensor.split(sizes, dim)
        return torch.cat([axis(part, dim, self.side) for axis, part in zip(self.maps, parts)], dim)


class _Rows:
    """A matrix with few entries in each row: rows of the new axis are gathered from the old one and added."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        counts = (matrix != 0).sum(1)
        self.widest = max(int(counts.max()), 1)
        # A row with fewer entries is filled up with its own largest entry times 0.
        order = (matrix != 0).int().argsort(dim=1, descending=True, stable=True)[:, : self.widest]
        shares = matrix.gather(1, order)
        self.indices = torch.where(shares != 0, order, order[:, :1]).T.contiguous()
        self.shares = shares.T.contiguous()
        self.selects = self.widest == 1 and bool((self.shares == 1).all())
        self.identity = (
            self.selects
            and matrix.shape[0] == matrix.shape[1]
            and bool((self.indices[0] == torch.arange(len(matrix))).all())
        )

    def __call__(self, tensor: Tensor, dim: int) -> Tensor:
        indices = self.indices.to(tensor.device)
        if self.selects:
            return tensor.index_select(dim, indices[0])
        if self.widest > _FEW:
            matrix = self.matrix.to(tensor.device, tensor.dtype)
            return torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)
        shape = [1] * tensor.ndim
        shape[dim] = -1
        shares = self.shares.to(tensor.device, tensor.dtype)
        total = tensor.index_select(dim, indices[0]) * shares[0].view(shape)
        for index, share in zip(indices[1:], shares[1:]):
            total += tensor.index_select(dim, index) * share.view(shape)
        return total


def _row_normalised(matrix: Tensor) -> Tensor:
    sums = matrix.sum(1, keepdim=True)
    return torch.where(sums > 0, matrix / sums.where(sums > 0, 1.0), 0.0)
