"""Tables in one safetensors file: with a checksum over all of it, written whole or not at all, read where they are looked at."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coloss.errors import InputError
from coloss.train.atomic_text import whole_file
from coloss.train.provenance import add_to_digest

_FORMAT, _METADATA = 2, "coloss_teacher_table"
_TYPES = {
    "F64": (np.float64, torch.float64),
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    # NumPy has no such type.
    "BF16": (np.int16, torch.bfloat16),
    "I64": (np.int64, torch.int64),
}


def write_table(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Store tensors and plain JSON values; the folder is made.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU, of a float type of 16 bits or more or int64, none empty.
        values: what they were made of.

    Raises:
        InputError: for a tensor of another type; if the file cannot be written.

    Examples:
        >>> import tempfile
        >>> path = write_table(
        ...     Path(tempfile.mkdtemp()) / "table.safetensors", {"ids": torch.arange(3)}, {"seed": 1}
        ... )
        >>> read_table(path)
        ({'ids': tensor([0, 1, 2])}, {'seed': 1})
    """
    known = [dtype for _, dtype in _TYPES.values()]
    for name, value in tensors.items():
        if value.dtype not in known:
            raise InputError(
                f"a table's tensors must be of type {', '.join(map(str, known))}, got {value.dtype} for {name!r}"
            )
    stored: dict[str, Any] = {"format": _FORMAT, "provenance": dict(values)}
    stored["checksum"] = _checksum(stored, tensors)
    try:
        with whole_file(path) as temporary:
            save_file(dict(tensors), temporary, metadata={_METADATA: json.dumps(stored)})
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return path


def read_table(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_table` stored; the tensors' numbers stay in the file until they are looked at.

    Raises:
        InputError: if the file is missing, truncated, altered, of another format or no such table.

    Cost:
        One pass over the file for its checksum.

    Examples:
        >>> read_table(Path("nowhere.safetensors"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        coloss.errors.InputError: cannot read the teacher outputs nowhere.safetensors (...
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
        if text is None:
            raise InputError(f"{path} holds no teacher outputs: coloss.train.cache_teacher makes them")
        stored = json.loads(text)
        if stored.get("format") != _FORMAT:
            raise InputError(
                f"{path} has format {stored.get('format')}, this version of coloss reads {_FORMAT}"
            )
        tensors = _mapped(path)
        checksum = stored.pop("checksum")
        if _checksum(stored, tensors) != checksum:
            raise ValueError("its content does not match its checksum")
        return tensors, stored["provenance"]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"cannot read the teacher outputs {path} ({error}): delete the file and make them again"
        ) from error


def _checksum(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        add_to_digest(digest, name, value)
    return digest.hexdigest()


def _mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file that are read where they are looked at."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        place = 8 + length + entry["data_offsets"][0]
        # Copied where written to, which nobody does: a tensor of a read-only map would warn.
        stored, dtype = _TYPES[entry["dtype"]]
        array = np.memmap(path, stored, "c", place, tuple(entry["shape"]))
        found[name] = torch.from_numpy(array).view(dtype)
    return found
