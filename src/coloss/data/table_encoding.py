"""From a table of numbers, words and holes to the numbers and codes that `coloss.nn.TableColumns` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coloss.errors import InputError

FARTHEST = 100.0
"""Standard deviations from the mean beyond which a number counts as this far, so that nothing overflows."""


@dataclass(frozen=True)
class TableEncoding:
    """How the columns of a table become numbers, learnt from some rows and applied to others.

        number    ->  (x - mean) / scale, at most 100 from 0;  a missing one -> NaN
        category  ->  0, 1, ... in the order of the sorted categories;  a missing or unknown one -> -1

    Columns of numbers or booleans are numeric, all others categorical. Nothing is filled in: a missing value is one, and stays one.

    Args:
        numeric: mean and scale of each numeric column by its name.
        categorical: the categories of each other column by its name.

    Attributes:
        columns: names of all columns in the order in which `transform` gives them, numeric ones first.
        cardinalities: number of categories of each categorical column, at least 1.

    Examples:
        >>> table = pd.DataFrame({"city": ["Rome", "Oslo", None], "age": [30.0, 50.0, np.nan]})
        >>> encoding = TableEncoding.learn(table)
        >>> encoding.columns, encoding.cardinalities
        (('age', 'city'), (2,))
        >>> encoding.transform(table).tolist()
        [[-1.0, 1.0], [1.0, 0.0], [nan, -1.0]]
        >>> encoding.transform(pd.DataFrame({"age": [40], "city": ["Bonn"]})).tolist()
        [[0.0, -1.0]]
    """

    numeric: Mapping[str, tuple[float, float]]
    categorical: Mapping[str, tuple[str, ...]]

    @classmethod
    def learn(cls, table: pd.DataFrame, max_categories: int = 100) -> "TableEncoding":
        """Means, scales and categories of a table.

        Args:
            table: rows; columns with distinct names.
            max_categories: of a column with more different values only so many are kept, the most frequent; the others count as unknown.

        Raises:
            InputError: for a table without rows or columns, names that repeat, times, infinite numbers, or `max_categories` < 1.

        Examples:
            >>> words = pd.DataFrame({"word": ["a", "b", "b", "c", "c"]})
            >>> TableEncoding.learn(words, max_categories=2).categorical
            {'word': ('b', 'c')}
        """
        if max_categories < 1:
            raise InputError(f"max_categories must be >= 1, got {max_categories}")
        if 0 in table.shape:
            raise InputError(f"a table must have at least one row and one column, got shape {table.shape}")
        table = table.rename(columns=str)
        if table.columns.has_duplicates:
            raise InputError(
                f"column names must be distinct, got {table.columns[table.columns.duplicated()][0]!r} twice"
            )
        numeric, categorical = {}, {}
        for name in table:
            if _holds_numbers(table[name]):
                numeric[str(name)] = _mean_and_scale(_numbers(table[name]))
            else:
                counts = _categories(table[name]).value_counts(sort=False).sort_index()
                kept = counts.sort_values(ascending=False, kind="stable").index[:max_categories]
                categorical[str(name)] = tuple(sorted(kept))
        return cls(numeric, categorical)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.numeric, *self.categorical)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        return tuple(max(len(found), 1) for found in self.categorical.values())

    def transform(self, table: pd.DataFrame) -> NDArray[np.float32]:
        """Numbers and codes of rows, (rows, columns); columns are found by name, others are ignored.

        Raises:
            InputError: if a column is not there, or does not hold what it held before.
        """
        table = table.rename(columns=str)
        absent = [name for name in self.columns if name not in table]
        if absent:
            raise InputError(
                f"the table must have the column {absent[0]!r}, its columns are {list(table.columns)}"
            )
        encoded = np.empty((len(table), len(self.columns)), dtype=np.float32)
        for place, (name, (mean, scale)) in enumerate(self.numeric.items()):
            with np.errstate(over="ignore"):
                encoded[:, place] = np.clip((_numbers(table[name]) - mean) / scale, -FARTHEST, FARTHEST)
        for place, (name, known) in enumerate(self.categorical.items(), len(self.numeric)):
            encoded[:, place] = pd.Categorical(_categories(table[name]), categories=list(known)).codes
        return encoded

    def one_hot(self, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a linear model can read of encoded rows: missing numbers at the mean, each category an indicator, with one for unknown.

        Examples:
            >>> encoding = TableEncoding({"age": (40.0, 10.0)}, {"city": ("Oslo", "Rome")})
            >>> encoding.one_hot(np.array([[np.nan, 1], [2, -1]], np.float32)).tolist()
            [[0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0]]
        """
        numbers, codes = np.split(encoded, [len(self.numeric)], axis=1)
        parts = [np.nan_to_num(numbers, nan=0.0)]
        for column, count in zip(codes.T, self.cardinalities, strict=True):
            parts.append(
                (np.where(column < 0, count, column)[:, None] == np.arange(count + 1)).astype(np.float32)
            )
        return np.concatenate(parts, axis=1)

    def as_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes back.

        Examples:
            >>> encoding = TableEncoding({"age": (40.0, 10.0)}, {"city": ("Oslo", "Rome")})
            >>> TableEncoding.from_json(encoding.as_json()) == encoding
            True
        """
        return {
            "numeric": {name: list(pair) for name, pair in self.numeric.items()},
            "categorical": {name: list(known) for name, known in self.categorical.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TableEncoding":
        """The encoding that `as_json` described.

        Raises:
            InputError: if the values are not those of an encoding.
        """
        try:
            return cls(
                {str(name): (float(mean), float(scale)) for name, (mean, scale) in values["numeric"].items()},
                {str(name): tuple(map(str, known)) for name, known in values["categorical"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"values must be those of TableEncoding.as_json, got {error!r}") from error


def _holds_numbers(values: pd.Series) -> bool:
    if pd.api.types.is_datetime64_any_dtype(values.dtype) or pd.api.types.is_timedelta64_dtype(values.dtype):
        raise InputError(
            f"column {values.name!r} holds times: turn it into numbers (hour, days since ...), or drop it"
        )
    if pd.api.types.is_complex_dtype(values.dtype):
        raise InputError(f"column {values.name!r} holds complex numbers: split it into two columns")
    return pd.api.types.is_numeric_dtype(values.dtype)


def _numbers(values: pd.Series) -> NDArray[np.float64]:
    try:
        numbers = pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise InputError(f"column {values.name!r} must hold numbers: {error}") from error
    if np.isinf(numbers).any():
        row = int(np.flatnonzero(np.isinf(numbers))[0])
        raise InputError(f"column {values.name!r} must be finite or missing, got infinity in row {row}")
    return numbers


def _mean_and_scale(numbers: NDArray[np.float64]) -> tuple[float, float]:
    known = numbers[~np.isnan(numbers)]
    largest = float(np.abs(known).max(initial=0.0))
    if largest == 0:
        return 0.0, 1.0
    # Relative to the largest, so that no square overflows.
    mean, deviation = float((known / largest).mean()), float((known / largest).std())
    # A constant column has a deviation of rounding size, not always exactly 0.
    return mean * largest, deviation * largest if deviation > 1e-12 else largest


def _categories(values: pd.Series) -> pd.Series:
    """Values as text, missing ones left out; 1 and 1.0 are one category."""
    return values.astype(object).where(values.notna(), None).map(_name, na_action="ignore")


def _name(value: Any) -> str:
    if not isinstance(value, str | bytes | bool | int | float | np.generic):
        # scikit-learn's words for it, and its exception.
        raise TypeError(f"argument must be a string or a number, got {type(value).__name__}")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
