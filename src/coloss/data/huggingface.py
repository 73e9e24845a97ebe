"""Data sets of the Hugging Face hub, or files read through its library (extra `coloss[hf]`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coloss.data.image_folder import LazyImages
from coloss.data.prepare import Labelled
from coloss.data.splitting import part_numbers
from coloss.data.tables import TARGET_COLUMNS, encode_targets, labelled_table, require_rows
from coloss.errors import DataNotFoundError, InputError, suggest_names

FILE_BUILDERS = ("parquet", "csv", "json")
"""Names that are followed by a path: `hf:parquet:/data/rows.parquet`."""


def labelled_from_hub(address: str, target: str | None = None, kind: str | None = None) -> Labelled:
    """Rows of `hf:NAME`, `hf:NAME:CONFIG`, or `hf:parquet:PATH` (also csv, json).

    The parts train, validation and test are kept. A column of images is the input if there is one; otherwise the columns are read as a
    table, with sentences as text (see `labelled_table`).

    Args:
        address: starting with `hf:`.
        target: the column to predict; `target` or `label` by default.
        kind: `classification` or `regression`, where the guess by the target's values is wrong.

    Raises:
        InputError: if the package `datasets` is missing, or the data cannot be fetched or learnt from.
        DataNotFoundError: if the file is not there.

    Examples:
        >>> labelled_from_hub("hf:")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: a Hugging Face data set must be hf:NAME, hf:NAME:CONFIG or hf:parquet:PATH, got 'hf:'
    """
    name, _, rest = address.removeprefix("hf:").partition(":")
    if not name or (name in FILE_BUILDERS and not rest):
        raise InputError(
            f"a Hugging Face data set must be hf:NAME, hf:NAME:CONFIG or hf:parquet:PATH, got {address!r}"
        )
    if name in FILE_BUILDERS and not Path(rest).expanduser().is_file():
        raise DataNotFoundError(f"there is no file {rest}")
    parts = _fetch(address, name, rest)
    features = next(iter(parts.values())).features
    class_names = {
        column: tuple(feature.names)
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    wanted = target or next((column for column in TARGET_COLUMNS if column in features), None)
    parts, note = _without_hidden_labels(parts, wanted if wanted in class_names else None)
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    if images:
        return _images(address, parts, images[0], wanted, kind, class_names, note)
    frames = []
    for part, rows in parts.items():
        frame = rows.to_pandas()
        frames.append(frame.assign(split=part) if len(parts) > 1 else frame)
    table = pd.concat(frames, ignore_index=True)
    for column, names in class_names.items():
        table[column] = [names[code] if 0 <= code < len(names) else None for code in table[column]]
    return labelled_table(table, address, target, kind, note)


def _fetch(address: str, name: str, rest: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{address} needs the package 'datasets': pip install 'coloss[hf]'") from error
    try:
        if name in FILE_BUILDERS:
            loaded = datasets.load_dataset(name, data_files=str(Path(rest).expanduser()))
        else:
            loaded = datasets.load_dataset(name, rest or None)
    except Exception as error:  # the library passes on errors of many others: network, builders, file formats
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{address} could not be loaded: {reason}") from error
    parts = dict(loaded.items())
    known = {part: rows for part, rows in parts.items() if part_numbers(["train", part]) is not None}
    return known if "train" in known else {"train": next(iter(parts.values()))}


def _without_hidden_labels(parts: dict[str, Any], target: str | None) -> tuple[dict[str, Any], str]:
    # -1 stands for an unknown label, as the test parts of competitions have throughout.
    hidden = [part for part, rows in parts.items() if target and len(rows) and max(rows[target]) < 0]
    kept = {part: rows for part, rows in parts.items() if part not in hidden}
    return (
        (kept, f"without labels and left out: {', '.join(hidden)}")
        if hidden and "train" in kept
        else (parts, "")
    )


def _images(
    address: str,
    parts: dict[str, Any],
    column: str,
    wanted: str | None,
    kind: str | None,
    class_names: dict[str, tuple[str, ...]],
    note: str,
) -> Labelled:
    columns = list(next(iter(parts.values())).features)
    if wanted is None or wanted not in columns:
        hint = suggest_names(wanted or "", columns) or f"; its columns are {', '.join(columns)}"
        raise InputError(f"{address} has no column {wanted or 'target or label'!r}{hint}")
    values = np.concatenate([np.asarray(rows[wanted]) for rows in parts.values()])
    require_rows(len(values), address)
    found, targets, names = encode_targets(
        values, f"column {wanted!r} of {address}", kind, class_names.get(wanted)
    )
    images = LazyImages([image for rows in parts.values() for image in rows[column]])
    numbers = part_numbers([part for part, rows in parts.items() for _ in range(len(rows))])
    return Labelled(
        address,
        found,
        "image",
        images,
        targets,
        names,
        numbers if len(parts) > 1 else None,
        note="; ".join(filter(None, [images.note, note])),
    )
