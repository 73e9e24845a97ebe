"""Series from the catalog or from a user's own array file, with or without classes, as they were recorded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.catalog import DATASETS, dataset_info
from coloss.data.formats import read_arrays
from coloss.data.sources import labelled
from coloss.data.splitting import TEST, TRAIN, VALIDATION, split_rows
from coloss.data.tables import encode_targets
from coloss.errors import DataNotFoundError, InputError


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """Raw series to learn from and to test on, NaN where missing.

    Attributes:
        name: of the set, or the path it was read from.
        train: every series that may be learnt from.
        test: the others.
        train_targets: class numbers, or None where there are none.
        test_targets: likewise.
        classes: how many there are, or None.
        channels: names of the channels, or None.
    """

    name: str
    train: Float[Tensor, "train channels steps"]
    test: Float[Tensor, "test channels steps"]
    train_targets: Int[Tensor, " train"] | None = None
    test_targets: Int[Tensor, " test"] | None = None
    classes: int | None = None
    channels: tuple[str, ...] | None = None


def read_series(data: str | Path, seed: int = 0) -> SeriesSet:
    """Series by name or path.

    - a name of the catalog: a classification set of series; the bands of a spectrogram become channels.
    - `.npy`: one array (samples, channels, steps) or (samples, steps), without classes.
    - `.npz`: `x`, and `y` if there are classes; or `x_train`, `x_test` (and `x_val`), likewise with `y_...`; and, if the
      channels have names, `channels`.

    Gaps (NaN) are welcome, and so is half precision. A test part that the data name is kept; else it is a fifth, drawn by seed, evenly
    over classes. There is no validation part: it is joined to the training part.

    Args:
        data: see above. A name of the catalog wins over a file.
        seed: of the division, >= 0.

    Raises:
        UnknownNameError: if it is neither a name nor a path.
        DataNotFoundError: if the file is not there.
        InputError: for something else than series, or targets that are no classes.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "heart.npy"
        >>> np.save(path, np.zeros((10, 2, 50), np.float16))
        >>> found = read_series(path)
        >>> found.train.shape, found.test.shape, found.classes
        (torch.Size([8, 2, 50]), torch.Size([2, 2, 50]), None)
    """
    name = str(data)
    if not isinstance(data, Path) and (name in DATASETS or not _is_file_name(name)):
        info = dataset_info(name)
        rows = labelled(name) if info.kind == "classification" else None
        if rows is None or rows.form != "series":
            raise InputError(
                f"data must be a classification set of series, or an array file, got {name!r} ({info.kind})"
            )
        every = np.asarray(rows.inputs[np.arange(len(rows.targets))])
        return _divided(name, every, rows.targets, rows.parts, None, seed)
    path = Path(data).expanduser()
    if path.suffix.lower() == ".npy":
        return _divided(name, _read_array(path), None, None, None, seed)
    if path.suffix.lower() != ".npz":
        raise InputError(
            f"data must be the name of a data set, or a file ending in .npy or .npz, got {name!r}"
        )
    arrays = read_arrays(path)
    names = tuple(map(str, arrays["channels"])) if "channels" in arrays else None
    if "x" in arrays:
        return _divided(name, arrays["x"], _classes(arrays.get("y"), name), None, names, seed)
    given = [part for part in ("train", "val", "test") if f"x_{part}" in arrays]
    if "train" not in given:
        raise InputError(
            f"{name} must hold x, or x_train and x_test; it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    inputs = [arrays[f"x_{part}"] for part in given]
    if len({part.shape[1:] for part in inputs}) > 1:
        raise InputError(
            f"the parts of {name} must have series of one shape, got {[part.shape for part in inputs]}"
        )
    labels = [arrays[f"y_{part}"] for part in given if f"y_{part}" in arrays]
    if labels and len(labels) < len(given):
        raise InputError(f"{name} must hold y for each of its parts {', '.join(given)}, or for none")
    targets = _classes(np.concatenate(labels), name) if labels else None
    numbers = {"train": TRAIN, "val": VALIDATION, "test": TEST}
    parts = np.repeat([numbers[part] for part in given], [len(part) for part in inputs])
    return _divided(name, np.concatenate(inputs), targets, parts, names, seed)


def _is_file_name(name: str) -> bool:
    return Path(name).suffix.lower() in (".npy", ".npz") or "/" in name or Path(name).is_file()


def _read_array(path: Path) -> NDArray:
    if not path.exists():
        raise DataNotFoundError(f"there is no file or folder {path}")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is no npy file of numbers that can be read ({error})") from error


def _classes(targets: NDArray | None, name: str) -> NDArray | None:
    if targets is None:
        return None
    kind, encoded, _ = encode_targets(targets, f"y of {name}")
    if kind != "classification":
        raise InputError(f"y of {name} must hold one class for each series, got a {kind} target: leave y out")
    return encoded


def _divided(
    name: str,
    inputs: NDArray,
    targets: NDArray | None,
    parts: NDArray | None,
    channels: tuple[str, ...] | None,
    seed: int,
) -> SeriesSet:
    if inputs.ndim == 4 and inputs.shape[1] == 1:
        inputs = inputs[:, 0]
    if inputs.ndim == 2:
        inputs = inputs[:, None]
    if (
        inputs.ndim != 3
        or 0 in inputs.shape
        or not np.issubdtype(inputs.dtype, np.number)
        or np.iscomplexobj(inputs)
    ):
        raise InputError(
            f"series of {name} must be numbers (samples, channels, steps), got {inputs.dtype} of shape {inputs.shape}"
        )
    if targets is not None and len(targets) != len(inputs):
        raise InputError(
            f"y of {name} must hold {len(inputs)} classes, one for each series, got {len(targets)}"
        )
    if channels is not None and len(channels) != inputs.shape[1]:
        raise InputError(
            f"channels of {name} must name each of {inputs.shape[1]} channels, got {len(channels)}"
        )
    train, validation, test = split_rows(targets, parts, len(inputs), seed)
    learnt = np.sort(np.concatenate([train, validation]))
    if len(learnt) < 2 or len(test) == 0:
        raise InputError(
            f"{name} must hold series to learn from and to test on, got {len(learnt)} and {len(test)}"
        )
    if not np.issubdtype(inputs.dtype, np.floating):
        inputs = inputs.astype(np.float32)
    series = [torch.from_numpy(np.ascontiguousarray(inputs[rows])) for rows in (learnt, test)]
    if targets is None:
        return SeriesSet(name, series[0], series[1], channels=channels)
    labels = [torch.from_numpy(targets[rows].astype(np.int64)) for rows in (learnt, test)]
    return SeriesSet(
        name,
        series[0],
        series[1],
        labels[0],
        labels[1],
        classes=int(targets.max()) + 1,
        channels=channels,
    )
