"""From labelled rows to splits that a model can take: divide, encode, and scale by the training part alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from coloss.data.dataset import IndexedDataset, Splits, Standardization
from coloss.data.splitting import split_rows
from coloss.data.text import MAX_FEATURES, TextFeatures, fit_text_encoder
from coloss.errors import InputError

Form = Literal["image", "table", "series", "text", "pair"]


@dataclass
class Labelled:
    """Rows with targets, before anything is divided or encoded.

    Args:
        name: of the data set.
        kind: `classification`, `regression` or `multilabel`.
        form: what the inputs are: `image` (uint8 or [0, 1] floats, (rows, height, width[, channels])), `table` (DataFrame of numbers and
            strings, or a float matrix), `series` ((rows, channels, steps...), NaN where missing), `text` (array of strings) or `pair`
            (array of strings (rows, 2)).
        inputs: these; anything that an array of row numbers indexes (a DataFrame is indexed by position).
        targets: class numbers (rows), numbers (rows), or 0 / 1 (rows, labels).
        class_names: by class number, or None.
        parts: `TRAIN`, `VALIDATION` or `TEST` of each row, or None.
        feature_names: of the columns of a matrix, or None.
        text_columns: columns of a DataFrame that hold sentences.
        note: what a reader should know of the reading.
    """

    name: str
    kind: str
    form: Form
    inputs: Any
    targets: NDArray
    class_names: tuple[str, ...] | None = None
    parts: NDArray | None = None
    feature_names: tuple[str, ...] | None = None
    text_columns: tuple[str, ...] = ()
    note: str = ""


@dataclass
class _Encoded:
    parts: list[NDArray]
    feature_names: tuple[str, ...] | None = None
    scaled: Any = (
        False  # which features to standardise: True (all), False (none) or a mask over the last dimension
    )


def prepare(
    data: Labelled,
    *,
    seed: int = 0,
    limit: int | None = None,
    text_features: TextFeatures = "tfidf",
    standardize: bool = True,
) -> Splits:
    """Splits of labelled rows.

    Args:
        data: the rows.
        seed: of the division.
        limit: at most so many rows in each part.
        text_features: how text becomes numbers, see `fit_text_encoder`.
        standardize: bring numeric columns, series channels and regression targets to mean 0 and deviation 1 of the training part.

    Raises:
        InputError: if a part would be empty.

    Examples:
        >>> rows = Labelled(
        ...     "toy",
        ...     "classification",
        ...     "table",
        ...     np.arange(20.0)[:, None],
        ...     np.repeat([0, 1], 10),
        ...     ("low", "high"),
        ... )
        >>> splits = prepare(rows)
        >>> len(splits.train), abs(splits.train.inputs.mean().item()) < 1e-6
        (12, True)
    """
    labels = data.targets if data.kind == "classification" else None
    rows = split_rows(labels, data.parts, len(data.targets), seed, limit)
    for part, numbers in zip(("train", "validation", "test"), rows, strict=True):
        if len(numbers) == 0:
            raise InputError(
                f"{data.name} has too few rows to hold some out for {part}: {len(data.targets)} rows"
                + (f" of {len(np.unique(data.targets))} classes" if labels is not None else "")
                + "; give at least 3 rows of each class"
            )
    encoded = _ENCODERS[data.form](data, rows, text_features)
    mean, scale = _fill_and_measure(encoded, standardize)
    targets = [_target_array(data, numbers) for numbers in rows]
    target_mean, target_scale = 0.0, 1.0
    if data.kind == "regression" and standardize:
        target_mean = float(targets[0].mean(dtype=np.float64))
        target_scale = float(targets[0].std(dtype=np.float64)) or 1.0
        targets = [((part - target_mean) / target_scale).astype(np.float32) for part in targets]
    train, validation, test = (
        IndexedDataset(
            torch.from_numpy(np.ascontiguousarray(part)), torch.from_numpy(target), torch.from_numpy(numbers)
        )
        for part, target, numbers in zip(encoded.parts, targets, rows, strict=True)
    )
    changed = mean is not None or target_scale != 1.0 or target_mean != 0.0
    return Splits(
        data.name,
        data.kind,
        train,
        validation,
        test,
        input_shape=tuple(encoded.parts[0].shape[1:]),
        num_classes=_class_count(data),
        class_names=data.class_names,
        feature_names=encoded.feature_names,
        standardize=Standardization(mean, scale, target_mean, target_scale) if changed else None,
        description=_description(data, [len(numbers) for numbers in rows], seed),
    )


def _image_parts(data: Labelled, rows: tuple[NDArray, ...], _: TextFeatures) -> _Encoded:
    parts = []
    for numbers in rows:
        images = data.inputs[numbers]
        planes = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        planes = np.ascontiguousarray(planes)
        parts.append(
            planes.astype(np.float32) / np.float32(255)
            if planes.dtype == np.uint8
            else planes.astype(np.float32)
        )
    return _Encoded(parts)


def _series_parts(data: Labelled, rows: tuple[NDArray, ...], _: TextFeatures) -> _Encoded:
    return _Encoded([np.asarray(data.inputs[numbers], dtype=np.float32) for numbers in rows], scaled=True)


def _text_parts(data: Labelled, rows: tuple[NDArray, ...], how: TextFeatures) -> _Encoded:
    encoder = fit_text_encoder(list(data.inputs[rows[0]]), how)
    return _Encoded([encoder(list(data.inputs[numbers])) for numbers in rows], encoder.feature_names)


def _pair_parts(data: Labelled, rows: tuple[NDArray, ...], how: TextFeatures) -> _Encoded:
    # |a - b| and a * b are symmetric and keep what a linear model needs of a pair; half the vocabulary keeps the width.
    encoder = fit_text_encoder(list(data.inputs[rows[0]].ravel()), how, max_features=MAX_FEATURES // 2)
    parts = []
    for numbers in rows:
        first, second = encoder(list(data.inputs[numbers, 0])), encoder(list(data.inputs[numbers, 1]))
        parts.append(np.concatenate([np.abs(first - second), first * second], axis=1))
    names = encoder.feature_names
    if names is not None:
        names = tuple(f"|a - b| {name}" for name in names) + tuple(f"a * b {name}" for name in names)
    return _Encoded(parts, names)


def _table_parts(data: Labelled, rows: tuple[NDArray, ...], how: TextFeatures) -> _Encoded:
    if not isinstance(data.inputs, pd.DataFrame):
        return _Encoded(
            [np.asarray(data.inputs[numbers], dtype=np.float32) for numbers in rows],
            data.feature_names,
            scaled=True,
        )
    tables = [data.inputs.iloc[numbers] for numbers in rows]
    numeric = [name for name in data.inputs if pd.api.types.is_numeric_dtype(data.inputs[name].dtype)]
    words = [name for name in data.inputs if name not in numeric and name not in data.text_columns]
    blocks = [[table[numeric].to_numpy(dtype=np.float32)] for table in tables]
    names = [str(name) for name in numeric]
    for name in words:
        categories = sorted({_category(value) for value in tables[0][name]})
        for block, table in zip(blocks, tables, strict=True):
            codes = pd.Categorical([_category(value) for value in table[name]], categories=categories).codes
            block.append((codes[:, None] == np.arange(len(categories))).astype(np.float32))
        names += [f"{name}={category}" for category in categories]
    if data.text_columns:
        texts = [
            table[list(data.text_columns)].astype(str).agg(" ".join, axis=1).tolist() for table in tables
        ]
        encoder = fit_text_encoder(texts[0], how)
        for block, part in zip(blocks, texts, strict=True):
            block.append(encoder(part))
        width = blocks[0][-1].shape[1]
        names += [f"text:{name}" for name in encoder.feature_names or map(str, range(width))]
    joined = [np.concatenate(block, axis=1) for block in blocks]
    return _Encoded(joined, tuple(names), scaled=np.arange(joined[0].shape[1]) < len(numeric))


_ENCODERS: dict[str, Callable[[Labelled, tuple[NDArray, ...], TextFeatures], _Encoded]] = {
    "image": _image_parts,
    "series": _series_parts,
    "text": _text_parts,
    "pair": _pair_parts,
    "table": _table_parts,
}


def _category(value: Any) -> str:
    return "missing" if pd.isna(value) else str(value)


def _fill_and_measure(
    encoded: _Encoded, standardize: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Replace NaN by the training mean and standardise, in place; returns mean and scale if it standardised."""
    if encoded.scaled is False:
        return None, None
    train = encoded.parts[0]
    axes = (0, *range(2, train.ndim))
    known = np.where(np.isnan(train), 0.0, train).astype(np.float64)
    count = np.maximum((~np.isnan(train)).sum(axis=axes, keepdims=True), 1)
    mean = known.sum(axis=axes, keepdims=True) / count
    scale = np.sqrt((np.where(np.isnan(train), 0.0, known - mean) ** 2).sum(axis=axes, keepdims=True) / count)
    # A constant feature has a deviation of rounding size, not always exactly 0.
    constant = scale <= 1e-7 * np.maximum(np.abs(mean), 1e-30)
    chosen = np.broadcast_to(encoded.scaled, mean.shape)
    mean32 = np.where(chosen, mean, 0.0).astype(np.float32)
    scale32 = np.where(chosen & ~constant, scale, 1.0).astype(np.float32)
    for number, part in enumerate(encoded.parts):
        filled = np.where(np.isnan(part), mean.astype(np.float32), part)
        encoded.parts[number] = (filled - mean32) / scale32 if standardize else filled
    if not standardize or not chosen.any():
        return None, None
    return torch.from_numpy(mean32[0]), torch.from_numpy(scale32[0])


def _target_array(data: Labelled, numbers: NDArray) -> NDArray:
    return data.targets[numbers].astype(np.int64 if data.kind == "classification" else np.float32)


def _class_count(data: Labelled) -> int | None:
    if data.kind == "regression":
        return None
    if data.class_names is not None:
        return len(data.class_names)
    return data.targets.shape[1] if data.kind == "multilabel" else int(data.targets.max()) + 1


def _description(data: Labelled, counts: list[int], seed: int) -> str:
    given = set() if data.parts is None else set(np.unique(data.parts).tolist())
    if 2 not in given:
        origin = f"drawn by seed {seed}"
    else:
        origin = "as the data say" if 1 in given else f"test as the data say, validation drawn by seed {seed}"
    text = f"{counts[0]} train, {counts[1]} validation, {counts[2]} test; {origin}"
    return f"{text}; {data.note}" if data.note else text
