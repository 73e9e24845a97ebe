"""Which rows train, validate and test: as the data say, or by seed and evenly over the classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coloss.errors import InputError

TRAIN, VALIDATION, TEST = 0, 1, 2
"""The numbers of the parts, as stored in the files."""

HELD_OUT = 0.2
"""Share of the rows that goes to validation, and to test, where the data do not say."""

PART_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
}
"""What parts are called in tables and folders."""


def split_rows(
    labels: NDArray | None, parts: NDArray | None, count: int, seed: int, limit: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of train, validation and test.

    A part that the data name is kept. A missing test part takes a fifth of the training rows, a missing validation part a quarter of
    what then remains (so 60 / 20 / 20 without any given part), or a fifth if the test part was given. Rows are drawn by seed, class by
    class where there are classes; of each class at least one row stays in train.

    Args:
        labels: class of each row, or None to draw without regard to classes.
        parts: `TRAIN`, `VALIDATION` or `TEST` for each row, or None.
        count: number of rows.
        seed: >= 0.
        limit: at most so many rows in each part, drawn in proportion to the classes.

    Returns:
        three increasing arrays of row numbers.

    Raises:
        InputError: if seed < 0 or limit < 1.

    Examples:
        >>> [len(rows) for rows in split_rows(np.repeat([0, 1], 10), None, 20, seed=0)]
        [12, 4, 4]
    """
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    rng = np.random.default_rng(seed)
    given = np.zeros(count, dtype=np.int64) if parts is None else np.asarray(parts, dtype=np.int64)
    train, validation, test = (np.flatnonzero(given == part) for part in (TRAIN, VALIDATION, TEST))
    share = HELD_OUT
    if len(test) == 0:
        train, test = _hold_out(train, labels, share, rng)
        share = HELD_OUT / (1 - HELD_OUT)
    if len(validation) == 0:
        train, validation = _hold_out(train, labels, share, rng)
    if limit is None:
        return train, validation, test
    return (
        _thin(train, labels, limit, rng),
        _thin(validation, labels, limit, rng),
        _thin(test, labels, limit, rng),
    )


def part_numbers(names: Sequence[str] | NDArray) -> NDArray[np.int64] | None:
    """Part number of each row from a column of part names, or None if the column holds anything else.

    Examples:
        >>> part_numbers(["train", "dev", "test"])
        array([0, 1, 2])
        >>> part_numbers(["train", "yes"]) is None
        True
    """
    lowered = [str(name).lower() for name in names]
    if not set(lowered) <= set(PART_NAMES) or not any(PART_NAMES[name] == TRAIN for name in set(lowered)):
        return None
    return np.array([PART_NAMES[name] for name in lowered], dtype=np.int64)


def _hold_out(
    rows: NDArray, labels: NDArray | None, share: float, rng: np.random.Generator
) -> tuple[NDArray, NDArray]:
    held = []
    for members in _groups(rows, labels):
        take = min(int(len(members) * share + 0.5), len(members) - 1)
        held.append(rng.permutation(members)[:take])
    out = np.sort(np.concatenate(held)) if held else rows[:0]
    return np.setdiff1d(rows, out, assume_unique=True), out


def _thin(rows: NDArray, labels: NDArray | None, limit: int, rng: np.random.Generator) -> NDArray:
    if len(rows) <= limit:
        return rows
    # Evenly spaced picks from rows that lie class by class: each class keeps its share, to within one row.
    ordered = np.concatenate([rng.permutation(members) for members in _groups(rows, labels)])
    picks = (np.arange(limit) + rng.random()) * len(rows) / limit
    return np.sort(ordered[picks.astype(np.int64)])


def _groups(rows: NDArray, labels: NDArray | None) -> list[NDArray]:
    if labels is None or len(rows) == 0:
        return [rows]
    order = np.argsort(labels[rows], kind="stable")
    counts = np.unique(labels[rows], return_counts=True)[1]
    return np.split(rows[order], np.cumsum(counts)[:-1])
