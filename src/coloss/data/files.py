"""A user's own data: tables, arrays and folders of images."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coloss.data.formats import read_arrays, read_table
from coloss.data.image_folder import labelled_images
from coloss.data.prepare import Labelled
from coloss.data.splitting import TEST, TRAIN, VALIDATION
from coloss.data.tables import encode_targets, labelled_table, require_rows
from coloss.errors import DataNotFoundError, InputError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz")
"""Endings of files read as tables."""


def labelled_file(path: Path, target: str | None = None, kind: str | None = None) -> Labelled:
    """Rows of a user's file or folder.

    - `.csv`, `.tsv` (also `.gz`), `.parquet`: a table, see `labelled_table`.
    - `.npz`: `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test` (and `x_val`, `y_val`), and `class_names` if they have names.
      uint8 of three or four dimensions are images (rows, height, width[, channels]); other numbers are a feature matrix
      (rows, features) or series (rows, channels, steps).
    - a folder: images by class, see `labelled_images`.

    Args:
        path: of the file or folder.
        target: column to predict, of a table only.
        kind: `classification` or `regression`, where the guess by the target's values is wrong.

    Raises:
        DataNotFoundError: if there is nothing at the path.
        InputError: if it cannot be read or learnt from; the message says what to mend.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "points.npz"
        >>> np.savez(path, x=np.random.default_rng(0).normal(size=(20, 3)), y=np.arange(20) % 2)
        >>> labelled_file(path).kind
        'classification'
    """
    path = path.expanduser()
    if not path.exists():
        raise DataNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir() and path.name.lower().endswith(TABLE_SUFFIXES):
        return labelled_table(read_table(path), str(path), target, kind)
    if target is not None:
        raise InputError(
            f"target names a column of a table, which {path} is not: leave target out, got {target!r}"
        )
    if path.is_dir():
        return labelled_images(path)
    if path.suffix.lower() == ".npz":
        return labelled_arrays(read_arrays(path), str(path), kind)
    raise InputError(f"{path} must be a folder of images, or end in {', '.join(TABLE_SUFFIXES)} or .npz")


def labelled_arrays(arrays: dict[str, NDArray], name: str, kind: str | None = None) -> Labelled:
    """Rows of arrays under the field names that `labelled_file` documents.

    Raises:
        InputError: for missing fields, shapes that do not fit, or values that cannot be learnt from.

    Examples:
        >>> arrays = {"x": np.zeros((12, 8, 8), np.uint8), "y": np.arange(12) % 3}
        >>> labelled_arrays(arrays, "pictures.npz").form
        'image'
    """
    given = [
        (part, arrays[f"x_{suffix}"], arrays[f"y_{suffix}"])
        for part, suffix in [(TRAIN, "train"), (VALIDATION, "val"), (TEST, "test")]
        if f"x_{suffix}" in arrays and f"y_{suffix}" in arrays
    ]
    if "x" in arrays and "y" in arrays:
        inputs, targets, parts = arrays["x"], arrays["y"], None
    elif given and given[0][0] == TRAIN:
        shapes = {x.shape[1:] for _, x, _ in given} | {y.shape[1:] for _, _, y in given}
        if len({x.shape[1:] for _, x, _ in given}) > 1 or len({y.shape[1:] for _, _, y in given}) > 1:
            raise InputError(f"the parts of {name} must have samples of one shape, got {sorted(shapes)}")
        inputs, targets = (np.concatenate(part) for part in list(zip(*given, strict=True))[1:])
        parts = np.repeat([part for part, _, _ in given], [len(x) for _, x, _ in given])
    else:
        raise InputError(
            f"{name} must hold x and y, or x_train, y_train, x_test, y_test; it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise InputError(
            f"x and y of {name} must have as many rows as each other, got shapes {inputs.shape} and {targets.shape}"
        )
    require_rows(len(inputs), name)
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
    kind_found, encoded, class_names = encode_targets(targets, f"y of {name}", kind, names)
    columns = tuple(map(str, arrays["feature_names"])) if "feature_names" in arrays else None
    if columns is not None and (inputs.ndim != 2 or len(columns) != inputs.shape[1]):
        raise InputError(
            f"feature_names of {name} must name each column of x, got {len(columns)} for shape {inputs.shape}"
        )
    form, inputs = _form(inputs, name)
    return Labelled(name, kind_found, form, inputs, encoded, class_names, parts, columns)


def _form(inputs: NDArray, name: str):
    if inputs.dtype == np.uint8 and (inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[3] in (1, 3))):
        return "image", inputs
    if not (np.issubdtype(inputs.dtype, np.number) or inputs.dtype == bool) or np.iscomplexobj(inputs):
        raise InputError(f"x of {name} must hold numbers, got {inputs.dtype}")
    if inputs.ndim not in (2, 3) or inputs.dtype == np.uint8 and inputs.ndim != 2 or 0 in inputs.shape:
        raise InputError(
            f"x of {name} must be uint8 images (rows, height, width[, 1 or 3 channels]), a matrix (rows, features) or series "
            f"(rows, channels, steps), got {inputs.dtype} of shape {inputs.shape}"
        )
    if not np.isfinite(inputs).all():
        bad = ~np.isfinite(inputs).reshape(len(inputs), -1)
        raise InputError(
            f"x of {name} has {int(bad.sum())} missing or infinite values in {int(bad.any(axis=1).sum())} rows: "
            f"fill them, or drop those rows"
        )
    return ("table" if inputs.ndim == 2 else "series"), inputs.astype(np.float32)
