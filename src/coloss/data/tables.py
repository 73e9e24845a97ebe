"""A user's table, or arrays, as labelled rows; whatever a model could not learn from is refused with a way to mend it."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coloss.data.prepare import Labelled
from coloss.data.splitting import part_numbers
from coloss.errors import InputError, suggest_names

FEWEST_ROWS = 10
"""Fewer rows than this are refused."""

MOST_CATEGORIES = 50
"""A text column with more different values than this is not a category: it is read as sentences, or refused."""

MOST_NUMERIC_CLASSES = 20
"""A target of floats with more different values than this is a regression."""

TARGET_COLUMNS = ("target", "label")
"""The columns looked for, in this order, where no target is named."""

_NAMELESS = "Unnamed: 0"  # what pandas calls the row numbers that it writes into a CSV file by default


def labelled_table(
    table: pd.DataFrame, name: str, target: str | None = None, kind: str | None = None, note: str = ""
) -> Labelled:
    """Rows of a table with a target column.

    - Numbers and booleans stay one column each. A text column is read as sentences if its values have two words or more on average,
      and it has more than 50 different ones or repeats few of them (more different values than half the rows). Otherwise it is a
      category, or refused if it has more than 50 different values (names, identifiers). A first column without a name, the row
      numbers that pandas writes, is left out.
    - A column `split` that holds only train / val / validation / dev / test (at least train) divides the rows; otherwise it is a
      feature like others.
    - A float target with fractions or more than 20 different values is a regression; so are whole numbers with more than 20 different
      values and fewer than three rows for each on average. Any other target is a classification.

    Args:
        table: one row for each sample.
        name: what messages call the table.
        target: the column to predict; `target` or `label` by default.
        kind: `classification` or `regression`, where the rule above guesses wrong.
        note: kept.

    Raises:
        InputError: for an unknown target, missing or infinite values, a single class, fewer than 10 rows, or a column that is neither
            number, category nor sentence.

    Examples:
        >>> table = pd.DataFrame(
        ...     {"age": range(12), "city": ["Rome", "Oslo"] * 6, "target": ["yes", "no", "no"] * 4}
        ... )
        >>> rows = labelled_table(table, "people.csv")
        >>> rows.kind, rows.class_names, list(rows.inputs)
        ('classification', ('no', 'yes'), ['age', 'city'])
    """
    table = table.reset_index(drop=True).rename(columns=str).drop(columns=_NAMELESS, errors="ignore")
    target = _target_column(table, name, target)
    require_rows(len(table), name)
    _refuse_missing(table, name, target)
    parts = None
    features = table.drop(columns=[target])
    if "split" in features and (parts := part_numbers(features["split"].to_numpy())) is not None:
        features = features.drop(columns=["split"])
    if features.shape[1] == 0:
        raise InputError(
            f"{name} has no column besides the target {target!r}: there is nothing to learn from"
        )
    texts = _text_columns(features, name)
    found, targets, class_names = encode_targets(
        table[target].to_numpy(), f"column {target!r} of {name}", kind
    )
    return Labelled(
        name, found, "table", features, targets, class_names, parts, text_columns=texts, note=note
    )


def encode_targets(
    values: NDArray, where: str, kind: str | None = None, class_names: tuple[str, ...] | None = None
) -> tuple[str, NDArray, tuple[str, ...] | None]:
    """Kind, array and class names of a target column or array.

    Args:
        values: (rows) of numbers, booleans or strings, or 0 / 1 (rows, labels) of a multilabel target.
        where: what messages call it.
        kind: `classification` or `regression` to overrule the guess by dtype and number of different values.
        class_names: by class number, if the values are class numbers.

    Returns:
        kind; class numbers (rows), float32 numbers (rows) or float32 0 / 1 (rows, labels); names, None for a regression.

    Raises:
        InputError: if nothing can be learnt from it: one class, a constant, missing values, words for a regression.

    Examples:
        >>> encode_targets(np.array(["b", "a", "b"]), "y")
        ('classification', array([1, 0, 1]), ('a', 'b'))
        >>> encode_targets(np.array([0.5, 0.25, 2.0]), "y")[0]
        'regression'
    """
    if kind not in (None, "classification", "regression"):
        raise InputError(f"kind must be 'classification' or 'regression', got {kind!r}")
    numeric = np.issubdtype(values.dtype, np.number)
    if numeric and not np.isfinite(values).all():
        raise InputError(
            f"{where} has {int((~np.isfinite(values)).sum())} missing or infinite values: drop those rows"
        )
    if values.ndim == 2 and values.shape[1] > 1:
        if not np.isin(values, (0, 1)).all():
            raise InputError(
                f"{where} must be one-dimensional, or 0 / 1 (rows, labels), got shape {values.shape} with other values"
            )
        return "multilabel", values.astype(np.float32), class_names or tuple(map(str, range(values.shape[1])))
    values = values.reshape(len(values)) if values.ndim == 2 else values
    if values.ndim != 1:
        raise InputError(
            f"{where} must be one-dimensional, or 0 / 1 (rows, labels), got shape {values.shape}"
        )
    distinct, codes = np.unique(values if numeric else values.astype(str), return_inverse=True)
    if kind is None:
        kind = "regression" if numeric and _looks_continuous(values, distinct) else "classification"
    if len(distinct) < 2:
        raise InputError(
            f"{where} holds one value only ({distinct[0] if len(distinct) else 'none'}): there is nothing to learn"
        )
    if kind == "regression":
        if not numeric:
            raise InputError(f"{where} must hold numbers for a regression, got {str(values[0])!r}")
        return "regression", values.astype(np.float32), None
    if class_names is not None:
        if not numeric or distinct[0] < 0 or distinct[-1] >= len(class_names):
            raise InputError(
                f"{where} must hold numbers in [0, {len(class_names)}) as there are {len(class_names)} class names"
            )
        return "classification", values.astype(np.int64), class_names
    whole = numeric and bool((distinct == np.round(distinct)).all())
    return "classification", codes, tuple(str(int(value)) if whole else str(value) for value in distinct)


def _looks_continuous(values: NDArray, distinct: NDArray) -> bool:
    many = len(distinct) > MOST_NUMERIC_CLASSES
    if np.issubdtype(values.dtype, np.floating):
        return many or bool((distinct != np.round(distinct)).any())
    return many and len(values) < 3 * len(distinct)


def require_rows(count: int, name: str) -> None:
    """Refuse fewer rows than can be divided and learnt from.

    Raises:
        InputError: if there are fewer than `FEWEST_ROWS`.

    Examples:
        >>> require_rows(3, "people.csv")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: people.csv has 3 rows: at least 10 are needed to train, validate and test
    """
    if count < FEWEST_ROWS:
        raise InputError(
            f"{name} has {count} rows: at least {FEWEST_ROWS} are needed to train, validate and test"
        )


def _target_column(table: pd.DataFrame, name: str, target: str | None) -> str:
    columns = list(table.columns)
    if table.columns.has_duplicates:
        repeated = table.columns[table.columns.duplicated()][0]
        raise InputError(f"{name} has more than one column called {repeated!r}: rename one")
    if target is None:
        for candidate in TARGET_COLUMNS:
            if candidate in columns:
                return candidate
        raise InputError(
            f"{name} has no column 'target' or 'label': say which column to predict (target=...); {_listing(columns)}"
        )
    if target not in columns:
        raise InputError(
            f"{name} has no column {target!r}{suggest_names(target, columns) or '; ' + _listing(columns)}"
        )
    return target


def _listing(columns: list[Any]) -> str:
    shown = ", ".join(map(str, columns[:12]))
    return f"its columns are {shown}" + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")


def _refuse_missing(table: pd.DataFrame, name: str, target: str) -> None:
    for column in [target, *table.columns.drop(target)]:
        values = table[column]
        missing = values.isna()
        if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
            missing = missing | np.isinf(values.to_numpy(dtype=np.float64, na_value=np.nan))
        count = int(missing.sum())
        if not count:
            continue
        mend = (
            "drop those rows"
            if column == target
            else "fill them (mean, 'unknown' ...), or drop the column or those rows"
        )
        rows = ", ".join(str(row + 1) for row in np.flatnonzero(missing)[:5])
        raise InputError(
            f"column {column!r} of {name} has {count} missing or infinite value{'s' if count > 1 else ''} "
            f"(row{'s' if count > 1 else ''} {rows}{' ...' if count > 5 else ''}): {mend}"
        )


def _text_columns(features: pd.DataFrame, name: str) -> tuple[str, ...]:
    found = []
    for column in features:
        values = features[column]
        if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype):
            if pd.api.types.is_complex_dtype(values.dtype):
                raise InputError(
                    f"column {column!r} of {name} holds complex numbers: split it into two columns"
                )
            continue
        if pd.api.types.is_datetime64_any_dtype(values.dtype) or pd.api.types.is_timedelta64_dtype(
            values.dtype
        ):
            raise InputError(
                f"column {column!r} of {name} holds times: turn it into numbers (hour, days since ...), or drop it"
            )
        if not values.map(lambda value: isinstance(value, str | bool | int | float)).all():
            odd = next(value for value in values if not isinstance(value, str | bool | int | float))
            raise InputError(
                f"column {column!r} of {name} holds {type(odd).__name__} values: only numbers and text are read"
            )
        distinct = values.astype(str).unique()
        several_words = np.mean([len(text.split()) for text in distinct]) >= 2
        if several_words and len(distinct) > min(MOST_CATEGORIES, len(values) / 2):
            found.append(str(column))
        elif len(distinct) > MOST_CATEGORIES:
            raise InputError(
                f"column {column!r} of {name} has {len(distinct)} different texts of one word, more than "
                f"{MOST_CATEGORIES} categories: drop it if it names the rows, or group its values"
            )
    return tuple(found)
