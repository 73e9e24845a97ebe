"""Checkpoints in a third less space, given back byte for byte: a safetensors file becomes a smaller file, a folder a smaller folder.

    model.safetensors          ->  model.safetensors.coloss
    folder of shards           ->  folder.coloss, in which every safetensors file is compressed and every other file is copied

A compressed file is a safetensors file itself, of one entry of bytes for each tensor of the checkpoint (its parts end to end, each from a
multiple of 8 bytes on) and, as its last entry, a directory: zlib over JSON, with the version of the format, the header of the original file
as it was, and for each tensor its form (`coloss.compression.tensor_forms`), the type and shape of each part, and the SHA-256 of the entry
and of the restored bytes; equal tensors have one entry. The header holds the SHA-256 of the directory. So the file can be mapped into memory,
a tensor can be read and checked alone, and what comes back is the original file, for which the directory holds a SHA-256, too.
"""

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coloss.compression.checkpoint_report import CheckpointReport as CheckpointReport
from coloss.compression.checkpoint_report import Progress as Progress
from coloss.compression.checkpoint_report import StoredTensor as StoredTensor
from coloss.compression.safetensors_layout import (
    byte_entries_header,
    end_to_end,
    mapped_bytes,
    parse_header,
    parts_of,
    read_header,
)
from coloss.compression.stored_weights import StoredWeight, describe, from_description
from coloss.compression.tensor_forms import as_tensor, entropy_bound, restored_bytes, store_bytes
from coloss.errors import InputError
from coloss.train.atomic_text import whole_file

VERSION = 1
SUFFIX = ".coloss"
_MARK = "coloss_checkpoint"


def compress_checkpoint(
    source: str | Path,
    target: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Write a smaller checkpoint from which the original can be restored byte for byte.

    Every coded tensor is decoded and compared before it is written.

    Args:
        source: a safetensors file (of `coloss.save_model`, too), or a folder with such files in it, at any depth.
        target: where to write; default: the name of the source with ".coloss" behind it. Written whole or not at all.
        force: whether an existing target may be replaced.
        progress: called with the share that is done.

    Raises:
        InputError: if the source is no readable safetensors checkpoint, is compressed already, or misses shards that its index names; if the
            target exists, is the source or cannot be written.

    Cost: one tensor in memory, with room to code it.

    Source: Zhang et al. 2025, arXiv 2504.11651 (DFloat11), for the coding of bfloat16.

    Examples:
        >>> import tempfile, torch
        >>> from coloss.train import save_model
        >>> folder = Path(tempfile.mkdtemp())
        >>> path = save_model(torch.nn.Linear(300, 100).bfloat16(), folder / "model.safetensors")
        >>> report = compress_checkpoint(path)
        >>> report.path.name, report.ratio < 0.7
        ('model.safetensors.coloss', True)
        >>> restored = decompress_checkpoint(report.path, folder / "again.safetensors").path
        >>> restored.read_bytes() == path.read_bytes()
        True
    """
    source = Path(source)
    target = Path(f"{_named(source)}{SUFFIX}") if target is None else Path(target)
    if source.is_dir():
        from coloss.compression.checkpoint_folder import compress_folder

        return compress_folder(source, target, force=force, progress=progress)
    check_target(source, target, force=force)
    return compress_file(source, target, progress or _silent)


def decompress_checkpoint(
    source: str | Path,
    target: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Restore what `compress_checkpoint` compressed, byte for byte, and check that it is.

    Args:
        source: a compressed file or folder.
        target: where to write; default: the name of the source without ".coloss". Written whole or not at all.
        force: whether an existing target may be replaced.
        progress: called with the share that is done.

    Returns:
        The report that `compress_checkpoint` gave, with the path of the restored checkpoint.

    Raises:
        InputError: if the source is missing, cut off, altered, of another kind, or written by a newer version; if the target exists, is the
            source or cannot be written.

    Cost: one tensor in memory, with room to decode it.

    Examples:
        >>> decompress_checkpoint("nothing.coloss")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: there is no file or folder nothing.coloss
    """
    source = Path(source)
    if target is None:
        whole = _named(source)
        if whole.suffix != SUFFIX:
            raise InputError(f"{source} does not end in {SUFFIX}: say where to write it with target")
        target = whole.with_suffix("")
    target = Path(target)
    if source.is_dir():
        from coloss.compression.checkpoint_folder import decompress_folder

        return decompress_folder(source, target, force=force, progress=progress)
    check_target(source, target, force=force)
    return decompress_file(source, target, progress or _silent)


class CompressedCheckpoint:
    """A compressed safetensors file, mapped into memory to be read only; each tensor is read, and checked, when it is asked for.

    Args:
        path: of a file that `compress_checkpoint` wrote.

    Attributes:
        names: of its tensors, in the order in which they lie in the original file.
        metadata: of the original file.
        source_bytes, source_sha256: of the original file.

    Raises:
        InputError: if the file is missing, cut off, altered, of another kind, or written by a newer version; from the methods, for a name
            that it does not have, or a tensor that was altered.

    Examples:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"a": torch.arange(3), "b": torch.ones(2)}, path, {"step": "7"})
        >>> opened = CompressedCheckpoint(compress_checkpoint(path).path)
        >>> sorted(opened.names), opened.metadata, opened.tensor("a")
        (['a', 'b'], {'step': '7'}, tensor([0, 1, 2]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        entries, metadata, start = read_header(self.path)
        if _MARK not in metadata:
            raise InputError(f"{path} is a safetensors file, but no compressed checkpoint of coloss")
        if not metadata[_MARK].isdecimal() or int(metadata[_MARK]) > VERSION:
            raise InputError(
                f"{path} has format version {metadata[_MARK]}, this coloss reads up to {VERSION}: install a newer one"
            )
        self._start, self._entries = start, entries
        self._mapped = mapped_bytes(self.path)
        place = metadata.get("directory", "")
        if place not in entries or _digest(self._entry(place)) != metadata.get("sha256"):
            raise InputError(f"{path} was altered since it was written: its directory does not fit; {_AGAIN}")
        packed: Any = self._entry(place).numpy()
        self._directory = json.loads(zlib.decompress(packed))
        self.source_bytes: int = self._directory["bytes"]
        self.source_sha256: str = self._directory["sha256"]
        self.header = self._directory["header"].encode()
        self._tensors: dict[str, dict[str, Any]] = self._directory["tensors"]
        self._original, self.metadata = parse_header(self.header, self.path)
        self.names = tuple(self._original)
        stored = {name for name, entry in self._tensors.items() if "same" not in entry}
        if stored | {place} != set(entries) or set(self.names) != set(self._tensors):
            raise InputError(f"{path} was altered since it was written: its header does not fit; {_AGAIN}")

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def stored(self, name: str, *, check: bool = True) -> StoredWeight:
        """A tensor as it is stored; its parts lie in the mapped file, which must not be written to.

        Args:
            name: of the tensor.
            check: whether its bytes are compared with their SHA-256 first, for which all of them are read.
        """
        name, entry = self._found(name)
        content = self._entry(name)
        if check and _digest(content) != entry["stored"]:
            raise self._altered(name)
        try:
            parts = parts_of(content, entry["parts"])
        except RuntimeError as error:
            raise self._altered(name) from error
        return from_description(parts, entry["form"])

    def bytes_of(self, name: str) -> Tensor:
        """The bytes of a tensor as the original file holds them, uint8 and checked."""
        try:
            content = restored_bytes(self.stored(name))
        except (RuntimeError, KeyError) as error:
            raise self._altered(name) from error
        if _digest(content) != self.digest(name):
            raise self._altered(name)
        # The file is mapped to be read only: what is handed out must not lie in it.
        mapped = content.untyped_storage().data_ptr() == self._mapped.untyped_storage().data_ptr()
        return content.clone() if mapped else content

    def digest(self, name: str) -> str:
        """SHA-256 of the bytes of a tensor in the original file."""
        digest: str = self._found(name)[1]["sha256"]
        return digest

    def tensor(self, name: str) -> Tensor:
        """A tensor of the original file, on the CPU, checked.

        Raises:
            InputError: also for a type that this torch does not have.
        """
        content = self.bytes_of(name)
        original = self._original[name]
        found = as_tensor(content, original["dtype"], tuple(original["shape"]))
        if found is None:
            raise InputError(f"{name} has type {original['dtype']}, which is read as bytes only")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        self._found(name)
        return tuple(self._original[name]["shape"])

    def report(self) -> CheckpointReport:
        """What the file's tensors take, before and after."""
        rows = []
        for name, entry in self._original.items():
            first, found = self._found(name)
            low, high = entry["data_offsets"]
            same = first != name
            size = 0 if same else len(self._entry(first))
            kind = "same" if same else found["form"]["kind"]
            bound = None if same else found.get("bound")
            rows.append(StoredTensor(name, entry["dtype"], kind, high - low, size, bound))
        return CheckpointReport(self.path, self.source_bytes, self.path.stat().st_size, tuple(rows))

    def _found(self, name: str) -> tuple[str, dict[str, Any]]:
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name!r}")
        entry = self._tensors[name]
        return (entry["same"], self._tensors[entry["same"]]) if "same" in entry else (name, entry)

    def _entry(self, name: str) -> Tensor:
        low, high = self._entries[name]["data_offsets"]
        return self._mapped[self._start + low : self._start + high]

    def _altered(self, name: str) -> InputError:
        return InputError(
            f"{self.path} was altered since it was written: {name} does not fit its checksum; {_AGAIN}"
        )


_AGAIN = "compress the original again"


def compress_file(source: Path, target: Path, progress: Progress) -> CheckpointReport:
    """One safetensors file; see `compress_checkpoint`."""
    entries, metadata, start = read_header(source)
    if _MARK in metadata:
        raise InputError(f"{source} is compressed already")
    content = mapped_bytes(source)
    header = bytes(content[8:start].numpy())
    whole = hashlib.sha256(bytes(content[:start].numpy()))
    names = list(entries)
    place = "directory"
    while place in entries:
        place += "_"
    # Room for the header comes first in the file, and what it says last: no number has more digits than these.
    most = 2 * len(content) + 4096 * (len(names) + 1)
    widest = {name: (10 ** len(str(most)), 2 * 10 ** len(str(most))) for name in (*names, place)}
    room = len(byte_entries_header(widest, _metadata(place, "0" * 64)))
    tensors: dict[str, dict[str, Any]] = {}
    places: dict[str, tuple[int, int]] = {}
    seen: dict[tuple[str, str, tuple[int, ...]], str] = {}
    position = 0
    with whole_file(target) as temporary, temporary.open("wb") as file:
        file.seek(room)
        for name, entry in entries.items():
            low, high = entry["data_offsets"]
            raw = content[start + low : start + high]
            digest = _digest(raw, whole)
            key = (digest, entry["dtype"], tuple(entry["shape"]))
            if key in seen:
                tensors[name] = {"same": seen[key]}
                continue
            seen[key] = name
            stored = store_bytes(raw, entry["dtype"], tuple(entry["shape"]))
            blob, parts = end_to_end(stored.tensors())
            file.write(blob)
            tensors[name] = {
                "form": describe(stored),
                "parts": parts,
                "stored": hashlib.sha256(blob).hexdigest(),
                "sha256": digest,
            }
            if (bound := entropy_bound(stored, raw)) is not None:
                tensors[name]["bound"] = bound
            places[name] = (position, position + len(blob))
            position += len(blob)
            progress(min(1.0, (start + high) / len(content)))
        directory = {
            "bytes": len(content),
            "sha256": whole.hexdigest(),
            "header": header.decode(),
            "tensors": tensors,
        }
        packed = zlib.compress(json.dumps(directory).encode(), 9)
        file.write(packed)
        places[place] = (position, position + len(packed))
        file.seek(0)
        metadata = _metadata(place, hashlib.sha256(packed).hexdigest())
        file.write(byte_entries_header(places, metadata, room))
    progress(1.0)
    return CompressedCheckpoint(target).report()


def decompress_file(source: Path, target: Path, progress: Progress) -> CheckpointReport:
    """One compressed file; see `decompress_checkpoint`."""
    opened = CompressedCheckpoint(source)
    head = struct.pack("<Q", len(opened.header)) + opened.header
    whole, written = hashlib.sha256(head), len(head)
    with whole_file(target) as temporary:
        with temporary.open("wb") as file:
            file.write(head)
            for name in opened.names:
                content: Any = opened.bytes_of(name).numpy()
                whole.update(content)
                file.write(content)
                written += len(content)
                progress(min(1.0, written / opened.source_bytes))
        if whole.hexdigest() != opened.source_sha256 or written != opened.source_bytes:
            raise InputError(
                f"{source} does not give back the original file: its checksum does not fit; {_AGAIN}"
            )
    progress(1.0)
    return replace(opened.report(), path=target)


def check_target(source: Path, target: Path, *, force: bool) -> None:
    """Refuse, before any work, a target that must not be written.

    Raises:
        InputError: if the source is not there, the target exists, or is the source.
    """
    if not source.exists():
        raise InputError(f"there is no file or folder {source}")
    if target.exists() and target.resolve() == source.resolve():
        raise InputError(f"target must be another path than the source, got {target}")
    if target.is_dir() and not source.is_dir():
        raise InputError(f"target must be a file, got the folder {target}")
    if target.exists() and not force:
        raise InputError(f"{target} exists: say force to replace it, or name another target")


def _named(source: Path) -> Path:
    """The whole path, with a name at its end."""
    return source.resolve() if source.name in ("", "..") else source.absolute()


def _metadata(directory: str, digest: str) -> dict[str, str]:
    return {_MARK: str(VERSION), "directory": directory, "sha256": digest}


def _digest(content: Tensor, also: Any = None) -> str:
    values: Any = content.numpy()
    if also is not None:
        also.update(values)
    return hashlib.sha256(values).hexdigest()


def _silent(share: float) -> None:
    return None
