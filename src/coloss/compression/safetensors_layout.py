"""How a safetensors file is laid out: the length of its header, the header (JSON), the values."""

import json
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coloss.errors import InputError


def mapped_bytes(path: Path) -> Tensor:
    """A file as uint8 values that are read from disk when they are looked at, and must not be written to.

    Mapped to be read only, which takes no memory of the process, so the file may be larger than it.

    Raises:
        InputError: if the file cannot be read or is empty.
    """
    try:
        values = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(values)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Entries by their place in the file, metadata, and where the values begin.

    Raises:
        InputError: if the file is missing, cut off, or none of this kind.
    """
    try:
        with safe_open(
            path, framework="numpy"
        ):  # refuses holes, overlaps and files that were cut off; maps to read only
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries, metadata = parse_header(file.read(length), path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the safetensors file {path}: {error}") from error
    return entries, metadata, 8 + length


def parse_header(header: bytes, path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Entries by their place in the file, and metadata.

    Raises:
        InputError: if two entries have one name.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise InputError(f"{path} names a tensor twice")
        return dict(pairs)

    found = json.loads(header, object_pairs_hook=unique)
    metadata = found.pop("__metadata__", None) or {}
    return dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"])), metadata


def byte_entries_header(
    places: Mapping[str, tuple[int, int]], metadata: Mapping[str, str], room: int | None = None
) -> bytes:
    """The beginning of a file whose entries are rows of bytes.

    Args:
        places: where each entry begins and ends, counted from the first value.
        metadata: of the file.
        room: bytes to fill with spaces behind it; default: the next multiple of 8.

    Examples:
        >>> (
        ...     len(byte_entries_header({"a": (0, 5)}, {}, room=96)),
        ...     len(byte_entries_header({"a": (0, 5)}, {})) % 8,
        ... )
        (96, 0)
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (low, high) in places.items():
        header[name] = {"dtype": "U8", "shape": [high - low], "data_offsets": [low, high]}
    content = json.dumps(header, separators=(",", ":")).encode()
    length = -(-len(content) // 8) * 8 if room is None else room - 8
    return struct.pack("<Q", length) + content.ljust(length)


def end_to_end(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[list[Any]]]:
    """Tensors one behind the other, each filled up to a multiple of 8 bytes; and the name, type and shape of each.

    Examples:
        >>> content, parts = end_to_end({"a": torch.ones(3, dtype=torch.uint8), "b": torch.tensor([[1.5]])})
        >>> len(content), parts, parts_of(torch.frombuffer(bytearray(content), dtype=torch.uint8), parts)["b"]
        (16, [['a', 'uint8', [3]], ['b', 'float32', [1, 1]]], tensor([[1.5000]]))
    """
    pieces, parts = [], []
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        pieces.append(content.ljust(-(-len(content) // 8) * 8, b"\0"))
        parts.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
    return b"".join(pieces), parts


def parts_of(content: Tensor, parts: Iterable[Sequence[Any]]) -> dict[str, Tensor]:
    """What `end_to_end` joined, sharing the memory of the content.

    Raises:
        RuntimeError: if the content is too short.
    """
    found, offset = {}, 0
    for name, kind, shape in parts:
        dtype = getattr(torch, kind)
        size = dtype.itemsize * torch.Size(shape).numel()
        found[name] = content[offset : offset + size].view(dtype).view(shape)
        offset += -(-size // 8) * 8
    return found
