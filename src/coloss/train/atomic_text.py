"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from coloss.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder to write to; after the block it is flushed to disk and renamed, after an error removed.

    Args:
        path: of the file; its folder is made.

    Raises:
        InputError: if the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "deep" / "numbers.bin"
        >>> with whole_file(path) as temporary:
        ...     _ = temporary.write_bytes(bytes(3))
        >>> path.read_bytes(), len(list(path.parent.iterdir()))
        (b'\\x00\\x00\\x00', 1)
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, flushed to disk, then renamed.

    Args:
        path: of the file; its folder is made.
        text: its new content.

    Raises:
        InputError: if the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "deep" / "note.txt"
        >>> write_atomically(path, "done")
        >>> path.read_text()
        'done'
    """
    with whole_file(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)
