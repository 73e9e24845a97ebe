"""Folders of shards: every safetensors file compressed, every other file copied, and a list of what was in it with checksums.

Links are followed: the copy holds what they lead to. Empty folders are left out.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from coloss.compression.compressed_checkpoint import (
    SUFFIX,
    CheckpointReport,
    CompressedCheckpoint,
    Progress,
    check_target,
    compress_file,
    decompress_file,
)
from coloss.errors import InputError

CONTENTS = "compressed_checkpoint.json"
_VERSION = 1
_ENDING = ".safetensors"


def compress_folder(
    source: Path, target: Path, *, force: bool, progress: Progress | None
) -> CheckpointReport:
    """See `coloss.compression.compress_checkpoint`."""
    check_target(source, target, force=force)
    files = _files(source)
    shards = [path for path in files if path.name.endswith(_ENDING)]
    if CONTENTS in {str(path) for path in files}:
        raise InputError(f"{source} is compressed already")
    if not shards:
        raise InputError(f"{source} has no {_ENDING} file in it")
    _check_index(source, files)
    taken = {str(path) for path in files}
    for shard in shards:
        if f"{shard}{SUFFIX}" in taken:
            raise InputError(f"{source} has both {shard} and {shard}{SUFFIX}: move one of them away")
    contents: dict[str, Any] = {"version": _VERSION, "compressed": {}, "copied": {}}
    reports = []
    report = _shared_progress([(source / shard).stat().st_size for shard in shards], progress)
    with _whole_folder(source, target) as folder:
        for number, shard in enumerate(shards):
            place = folder / f"{shard}{SUFFIX}"
            place.parent.mkdir(parents=True, exist_ok=True)
            reports.append(compress_file(source / shard, place, report(number)))
            contents["compressed"][shard.as_posix()] = CompressedCheckpoint(place).source_sha256
        for path in files:
            if path not in shards:
                contents["copied"][path.as_posix()] = _copied(source / path, folder / path)
        (folder / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    return _joined(target, [shard.as_posix() for shard in shards], reports)


def decompress_folder(
    source: Path, target: Path, *, force: bool, progress: Progress | None
) -> CheckpointReport:
    """See `coloss.compression.decompress_checkpoint`."""
    check_target(source, target, force=force)
    contents = read_contents(source)
    shards = list(contents["compressed"])
    reports = []
    report = _shared_progress([(source / f"{shard}{SUFFIX}").stat().st_size for shard in shards], progress)
    with _whole_folder(source, target) as folder:
        for number, shard in enumerate(shards):
            place = folder / shard
            place.parent.mkdir(parents=True, exist_ok=True)
            compressed = source / f"{shard}{SUFFIX}"
            reports.append(decompress_file(compressed, place, report(number)))
            if CompressedCheckpoint(compressed).source_sha256 != contents["compressed"][shard]:
                raise InputError(f"{compressed} is not the file that {source / CONTENTS} names")
        for name, digest in contents["copied"].items():
            if _copied(source / name, folder / name) != digest:
                raise InputError(f"{source / name} was altered since the folder was compressed")
    return _joined(target, shards, reports)


def read_contents(folder: Path) -> dict[str, Any]:
    """What a compressed folder holds, all of it there: `compressed` (file -> SHA-256 of the original) and `copied` (file -> SHA-256).

    Raises:
        InputError: for a folder of another kind or a newer version, and for files that are missing.
    """
    try:
        found = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        if found["version"] > _VERSION:
            raise InputError(
                f"{folder} has format version {found['version']}, this coloss reads up to {_VERSION}: install a newer one"
            )
        names = [*(f"{name}{SUFFIX}" for name in found["compressed"]), *found["copied"]]
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no compressed checkpoint: it has no {CONTENTS}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {folder / CONTENTS}: {error}") from error
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / CONTENTS} names a file outside the folder: {name}")
        if not (folder / name).is_file():
            raise InputError(f"{folder} misses {name}")
    return found


def _files(folder: Path, inside: Path = Path(), above: tuple[Path, ...] = ()) -> list[Path]:
    """All files in a folder or one inside it, relative to the folder; links are followed, empty folders give none.

    Raises:
        InputError: for what cannot be read or copied, so that nothing is left out in silence: a folder without the right to list it, a link
            to nothing or to a folder around it, a socket or device.
    """
    here = folder / inside
    try:
        whole = here.resolve()
        if whole in above:
            raise InputError(f"{here} is a link to a folder that it lies in: take it out")
        found: list[Path] = []
        for path in sorted(here.iterdir()):
            if path.is_dir():
                found += _files(folder, inside / path.name, (*above, whole))
            elif path.is_file():
                found.append(inside / path.name)
            else:
                kind = "a link to nothing" if path.is_symlink() else "neither file nor folder"
                raise InputError(f"{path} is {kind}: take it out")
    except OSError as error:
        raise InputError(f"cannot read {error.filename or here}: {error.strerror or error}") from error
    return found


def _check_index(source: Path, files: list[Path]) -> None:
    """Refuse an index that names shards which are not there."""
    there = set(files)
    for index in files:
        if not index.name.endswith(f"{_ENDING}.index.json"):
            continue
        try:
            named = set(json.loads((source / index).read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in named if index.parent / name not in there)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"cannot read the index {source / index}: {error!r}") from error
        if missing:
            raise InputError(f"{source / index} names shards that are not there: {', '.join(missing)}")


@contextmanager
def _whole_folder(source: Path, target: Path) -> Iterator[Path]:
    """A temporary folder that takes the target's place at the end, and is removed after an error."""
    whole = target.absolute()
    if source.resolve() in (whole.resolve(), *whole.resolve().parents):
        raise InputError(f"target must lie outside of the source, got {target}")
    ending = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary, old = (whole.with_name(f".{whole.name}.{ending}{end}") for end in ("", "-old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if whole.exists():
            whole.rename(old)
        temporary.rename(whole)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        # Before anything is removed, also after Ctrl-C between the two renames.
        if old.exists() and not whole.exists():
            old.rename(whole)
        shutil.rmtree(temporary, ignore_errors=True)
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _copied(source: Path, target: Path) -> str:
    """Copy a file, and give its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as copy:
        for chunk in _chunks(source):
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def _chunks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error


def _shared_progress(sizes: list[int], progress: Progress | None) -> Callable[[int], Progress]:
    total = sum(sizes) or 1

    def of(number: int) -> Progress:
        def told(share: float) -> None:
            if progress is not None:
                progress((sum(sizes[:number]) + share * sizes[number]) / total)

        return told

    return of


def _joined(path: Path, names: list[str], reports: list[CheckpointReport]) -> CheckpointReport:
    rows = tuple(
        replace(row, name=f"{name}:{row.name}")
        for name, report in zip(names, reports, strict=True)
        for row in report.tensors
    )
    before, after = (
        sum(report.bytes_before for report in reports),
        sum(report.bytes_after for report in reports),
    )
    return CheckpointReport(path, before, after, rows)
