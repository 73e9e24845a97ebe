"""Reads data files of each format; a broken file gives one line that names it."""

import csv
import gzip
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coloss.errors import DataNotFoundError, InputError

# What the readers raise on a file that was cut off, changed or is of another format (pyarrow's errors are ValueError and OSError).
_BROKEN = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    zlib.error,
    zipfile.BadZipFile,
    MemoryError,
    NotImplementedError,
)


# A cell that is quoted as a whole, quotes within it doubled.
_QUOTED = re.compile('"(?:[^"]|"")*"')


def read_arrays(path: Path) -> dict[str, NDArray]:
    """Arrays of an `.npz` file by name.

    Raises:
        DataNotFoundError: if there is no such file.
        InputError: if it is broken, or holds pickled objects, which are never read.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "points.npz"
        >>> np.savez(path, x=np.zeros(3))
        >>> read_arrays(path)["x"].shape
        (3,)
    """
    _check_file(path)
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _BROKEN as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path} holds Python objects, which are not read: store numbers or fixed-length strings"
            ) from error
        raise _broken(path, "npz", error) from error


def read_table(path: Path, *, as_text: bool = False) -> pd.DataFrame:
    """Table of a `.parquet`, `.csv` or `.tsv` file (the last two possibly with `.gz`).

    Quotes hold cells of a `.csv` together. Those of a `.tsv` are text like any other, where each line has a cell for each column, unless
    every cell that begins with one is quoted as a whole.

    Args:
        path: of the file.
        as_text: keep every cell of the last two as it is written: `007` and `NA` stay text.

    Raises:
        DataNotFoundError: if there is no such file.
        InputError: if it is broken or empty.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "people.csv"
        >>> path.write_text("age,target\\n31,yes\\n")
        18
        >>> read_table(path).columns.tolist()
        ['age', 'target']
    """
    _check_file(path)
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "").lower()
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False} if as_text else {}
        if suffix == ".tsv":
            options |= {
                "sep": "\t",
                "quoting": csv.QUOTE_NONE if _quotes_are_text(path) else csv.QUOTE_MINIMAL,
            }
        # In parts, as pandas reads by default, the same id can be a number in one and text in the next.
        table = pd.read_csv(path, low_memory=False, **options)
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty: a table must have a line of column names and rows") from error
    except _BROKEN as error:
        raise _broken(path, suffix.lstrip(".") or "csv", error) from error
    if table.shape[1] == 1 and ";" in str(table.columns[0]):
        raise InputError(f"{path} separates its columns by semicolons: write it with commas")
    return table


def column_names(path: Path) -> list[str]:
    """Names of the columns of a `.parquet`, `.csv` or `.tsv` file, of which no more than the head is read; none where there is no such table.

    Examples:
        >>> column_names(Path("/nowhere.csv"))
        []
    """
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "").lower()
    if suffix not in (".parquet", ".csv", ".tsv") or not path.is_file():
        return []
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        return [
            str(name) for name in pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", nrows=0).columns
        ]
    except _BROKEN:
        return []


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, unpacked if it ends in `.gz`.

    Raises:
        DataNotFoundError: if there is no such file.
        InputError: if it is broken.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "poem.txt.gz"
        >>> _ = path.write_bytes(gzip.compress(b"To be"))
        >>> read_text(path)
        'To be'
    """
    _check_file(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" and not content:
            raise EOFError("it is empty")
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except _BROKEN as error:
        raise _broken(path, "gzip" if path.suffix == ".gz" else "text", error) from error


def read_json_lines(path: Path) -> list[Any]:
    """Values of a file with one JSON value on each line, objects as a rule, unpacked if it ends in `.gz`.

    Raises:
        DataNotFoundError: if there is no such file.
        InputError: if it is broken.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"id": 1}\\n{"id": 2}\\n')
        >>> [row["id"] for row in read_json_lines(path)]
        [1, 2]
    """
    # Not `splitlines`, which also splits at separators that may stand within a text, such as U+2028.
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            raise _broken(path, "JSON lines", ValueError(f"line {number}: {error}")) from error
    return rows


def _quotes_are_text(path: Path) -> bool:
    """Whether lines are the rows of a `.tsv`, and a cell begins with a quote that does not close at its end."""
    columns, open_quote = None, False
    unpacked = gzip.open if path.suffix.lower() == ".gz" else open
    with unpacked(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            cells = line.rstrip("\n").split("\t")
            if cells == [""]:
                continue
            columns = columns or len(cells)
            if len(cells) != columns:
                return False
            open_quote = open_quote or any(
                cell.startswith('"') and not _QUOTED.fullmatch(cell) for cell in cells
            )
    return open_quote


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataNotFoundError(f"there is no file {path}")


def _broken(path: Path, kind: str, error: Exception) -> InputError:
    if isinstance(error, PermissionError):
        return InputError(f"{path} may not be read: permission denied")
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return InputError(f"{path} cannot be read as {kind}, it is broken or cut off ({reason}): get it anew")
