"""What became of a checkpoint that was compressed: its tensors, and their sizes before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[float], None]


@dataclass(frozen=True)
class StoredTensor:
    """What became of one tensor of a checkpoint.

    Attributes:
        name: in the checkpoint; with the file before it, `file:name`, where a folder was compressed.
        dtype: as safetensors calls it: "BF16", "F32" ...
        kind: its form, see `coloss.compression.tensor_forms`; "same" for one that equals an earlier tensor.
        bytes_before, bytes_after: of its values.
        bound: bytes that no code of single exponents can go below (sign and mantissa raw); None for what holds no coded bfloat16.
    """

    name: str
    dtype: str
    kind: str
    bytes_before: int
    bytes_after: int
    bound: float | None


@dataclass(frozen=True)
class CheckpointReport:
    """Sizes of a checkpoint before and after.

    Attributes:
        path: of the compressed file or folder.
        bytes_before, bytes_after: of the safetensors files, headers included.
        tensors: one row for each.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    tensors: tuple[StoredTensor, ...]

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0
