"""Text files that are there whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

from coloss.errors import InputError


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
