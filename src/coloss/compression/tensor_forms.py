"""Tensors of any type as they lie in a compressed checkpoint: to be given back bit by bit, signs of zeros and payloads of NaN included.

Of these forms, as far as a sample lets each hope, the smallest is taken, and only if reading it back gives the very same bytes:

    dfloat11    bfloat16: exponents entropy coded, the rest as it is (`coloss.compression.bf16_codec`)
    float32     its upper 16 bits are a bfloat16 and coded like one, the lower 16 as they are, or left out where all are zero
    others      zeros and few distinct values, `coloss.compression.store_exactly`, where a sample shows them
    deflated    zlib, where a sample promises that it takes less than the forms above: masks, counters, position tables
    bytes       as they are
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coloss.compression.bf16_codec import DFloat11Tensor, encode_bf16, exponent_stats
from coloss.compression.stored_weights import StoredWeight, describe, from_description, store_exactly
from coloss.errors import InputError

TORCH_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Types of safetensors that are read as tensors; others (numbers of 4 and 6 bits, float8_e8m0) stay bytes."""

_FLOATS = ("BF16", "F16", "F32", "F64")
_SAMPLE = 4096
_SHRINKS = 0.95


@dataclass(frozen=True)
class Float32Weight(StoredWeight):
    """A float32 tensor by halves: the upper 16 bits of each number are a bfloat16.

    Attributes:
        upper: the bfloat16 tensor, in any form.
        lower: int16, the lower halves in row-major order; None where all are zero, that is where every number is a bfloat16.

    Examples:
        >>> weight = torch.tensor([[1.5, float("nan")], [-0.0, 3.0]])
        >>> stored = Float32Weight.of(weight)
        >>> stored.lower is None, torch.equal(stored.restore().view(torch.int32), weight.view(torch.int32))
        (True, True)
    """

    kind: ClassVar[str] = "float32"
    upper: StoredWeight
    lower: Tensor | None

    @classmethod
    def of(cls, weight: Tensor) -> "Float32Weight":
        """Code a float32 tensor.

        Raises:
            ValueError: for another type.
        """
        if weight.dtype != torch.float32:
            raise ValueError(f"weight must be float32, got {weight.dtype}")
        # Little-endian: the lower half comes first.
        halves = weight.detach().cpu().contiguous().reshape(-1).view(torch.int16).view(-1, 2)
        lower = halves[:, 0]
        upper = halves[:, 1].contiguous().view(torch.bfloat16).view(weight.shape)
        return cls(encode_bf16(upper), lower.contiguous() if lower.any() else None)

    def tensors(self) -> dict[str, Tensor]:
        upper = {f"upper.{name}": tensor for name, tensor in self.upper.tensors().items()}
        return upper if self.lower is None else {**upper, "lower": self.lower}

    def settings(self) -> dict[str, Any]:
        return {"upper": describe(self.upper)}

    def restore(self) -> Tensor:
        upper = self.upper.restore()
        halves = torch.zeros(upper.numel(), 2, dtype=torch.int16, device=upper.device)
        halves[:, 1] = upper.reshape(-1).view(torch.int16)
        if self.lower is not None:
            halves[:, 0] = self.lower
        return halves.view(torch.float32).view(upper.shape)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Float32Weight":
        inner = {n.removeprefix("upper."): t for n, t in tensors.items() if n.startswith("upper.")}
        return cls(from_description(inner, settings["upper"]), tensors.get("lower"))


@dataclass(frozen=True)
class PlainBytes(StoredWeight):
    """The bytes of a tensor of any type.

    Attributes:
        content: uint8, one-dimensional; what `restore` gives.
    """

    kind: ClassVar[str] = "bytes"
    content: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"content": self.content}

    def settings(self) -> dict[str, Any]:
        return {}

    def restore(self) -> Tensor:
        return self.content.clone()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "PlainBytes":
        return cls(tensors["content"])


@dataclass(frozen=True)
class DeflatedBytes(StoredWeight):
    """The bytes of a tensor of any type, by zlib.

    Attributes:
        content: uint8, one-dimensional.
        size: bytes that `restore` gives.
    """

    kind: ClassVar[str] = "deflated"
    content: Tensor
    size: int

    @classmethod
    def of(cls, content: Tensor) -> "DeflatedBytes":
        """Deflate uint8 values."""
        return cls(_uint8(_deflated(content)), content.numel())

    def tensors(self) -> dict[str, Tensor]:
        return {"content": self.content}

    def settings(self) -> dict[str, Any]:
        return {"size": self.size}

    def restore(self) -> Tensor:
        stream: Any = self.content.numpy()
        try:
            # A limit, so that a few forged bytes cannot fill the memory.
            content = zlib.decompressobj().decompress(stream, max(self.size, 1))
        except zlib.error as error:
            raise InputError(f"deflated bytes cannot be read: {error}") from error
        if len(content) != self.size:
            raise InputError(f"deflated bytes must give {self.size} bytes, got {len(content)}")
        return _uint8(content)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "DeflatedBytes":
        return cls(tensors["content"], settings["size"])


def store_bytes(content: Tensor, dtype: str, shape: tuple[int, ...]) -> StoredWeight:
    """Of the forms that give back every bit and that a sample does not rule out, the one that takes the fewest bytes.

    Args:
        content: uint8, one-dimensional: the tensor's bytes, little-endian and row-major.
        dtype: name of its type in safetensors: "BF16", "F32", "I64" ...
        shape: of the tensor.

    Cost: coding and decoding of the tensor; memory of three times the tensor.

    Examples:
        >>> mask = torch.ones(64, 64, dtype=torch.uint8).tril().reshape(-1)
        >>> stored = store_bytes(mask, "BOOL", (64, 64))
        >>> stored.kind, stored.nbytes < 512, torch.equal(restored_bytes(stored), mask)
        ('deflated', True, True)
    """
    found: StoredWeight = PlainBytes(content)
    weight = as_tensor(content, dtype, shape)
    if weight is not None and dtype in _FLOATS and weight.numel():
        if dtype == "BF16":
            found = _better(encode_bf16(weight), found)
        elif dtype == "F32":
            found = _better(Float32Weight.of(weight), found)
        if _repeats(weight):
            found = _better(store_exactly(weight), found)
    share = _deflated_share(content)
    if share < _SHRINKS and share * content.numel() < found.nbytes:
        found = _better(DeflatedBytes.of(content), found)
    return found


def restored_bytes(stored: StoredWeight) -> Tensor:
    """Bytes of the restored tensor, uint8 and one-dimensional."""
    restored = stored.restore().contiguous().reshape(-1)
    return restored.view(torch.uint8) if restored.numel() else torch.zeros(0, dtype=torch.uint8)


def as_tensor(content: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor that bytes stand for, sharing their memory where it is aligned; None for types that torch has not."""
    if dtype not in TORCH_TYPES:
        return None
    kind = TORCH_TYPES[dtype]
    if not content.numel():
        return torch.empty(shape, dtype=kind)
    if content.data_ptr() % kind.itemsize or content.storage_offset() % kind.itemsize:
        content = content.clone()
    return content.view(kind).view(shape)


def entropy_bound(stored: StoredWeight, content: Tensor) -> float | None:
    """Bytes that no code of single exponents goes below, all else being raw; None for what holds no coded bfloat16.

    Args:
        stored: the tensor as it is stored.
        content: its bytes.

    Examples:
        >>> content = torch.zeros(40_000, dtype=torch.uint8)
        >>> (
        ...     entropy_bound(encode_bf16(content.view(torch.bfloat16)), content),
        ...     entropy_bound(PlainBytes(content), content),
        ... )
        (20000.0, None)
    """
    wide = isinstance(stored, Float32Weight)
    upper = stored.upper if isinstance(stored, Float32Weight) else stored
    if not isinstance(upper, DFloat11Tensor) or not upper.coded:
        return None
    content = content.clone() if content.storage_offset() % 2 else content
    if wide or upper.dtype == torch.float32:
        numbers = content.view(torch.int16)[1::2].contiguous().view(torch.bfloat16)
    elif upper.dtype == torch.bfloat16:
        numbers = content.view(torch.bfloat16)
    else:
        numbers = upper.decode().reshape(-1)
    lower = stored.lower.nbytes if isinstance(stored, Float32Weight) and stored.lower is not None else 0
    return lower + numbers.numel() * (8 + exponent_stats(numbers).entropy) / 8


def _better(candidate: StoredWeight, found: StoredWeight) -> StoredWeight:
    """The candidate where it is smaller and exact to the bit; a codec is not believed, but tried."""
    if candidate.nbytes >= found.nbytes:
        return found
    return candidate if torch.equal(restored_bytes(candidate), restored_bytes(found)) else found


def _repeats(weight: Tensor) -> bool:
    """Whether a sample shows many zeros or few distinct values."""
    sample = weight.reshape(-1)[:: max(1, weight.numel() // _SAMPLE)]
    words = sample.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    zeros = int((sample == 0).sum())
    return 4 * zeros > len(sample) or 4 * len(words.unique()) < len(words)


def _deflated_share(content: Tensor) -> float:
    """What zlib leaves of a sample of the content, over the sample; 0 for so little content that it is tried in any case."""
    size = 1 << 14
    if content.numel() <= 4 * size:
        return 0.0
    pieces = [
        content[start : start + size] for start in range(0, content.numel() - size, content.numel() // 4)
    ]
    return sum(len(_deflated(piece)) for piece in pieces) / (size * len(pieces))


def _deflated(content: Tensor) -> bytes:
    stream: Any = content.contiguous().numpy()
    return zlib.compress(stream, 6)


def _uint8(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.zeros(0, dtype=torch.uint8)
    )
