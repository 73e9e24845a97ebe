"""Who chose what in which order: sequences of items of users, split in time, with padded histories."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.dataset import IndexedDataset
from coloss.data.formats import column_names, read_table
from coloss.data.raw import load_raw
from coloss.errors import InputError, suggest_names

Part = Literal["train", "validation", "test"]

_PARTS: tuple[Part, ...] = ("train", "validation", "test")
_NAMES = ("amazon-video-games",)

# Of the user, item and time column of a table; the first of each is what messages ask for.
_COLUMNS = (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"))


@dataclass
class InteractionSplits:
    """Sequences of items, ready for a model of what comes next.

    Items are numbered from 1; 0 fills up short histories, on the left: the last column of a history is the most recent item. Of each user
    the last item is for the test, the one before it for validation, all earlier ones for training. Sample ids are user numbers.

    Args:
        name: of the data set, or the path it was read from.
        train: one sample for each user with at least two training items: inputs int64 (users, max_history), targets alike, the item
            that follows each one of the inputs (0 where nothing is to be learnt).
        validation: inputs (users, max_history), targets int64 (users), the item that came next.
        test: alike; the histories include the validation item.
        num_items: items are 1 .. num_items.
        popularity: int64 (num_items + 1), how often each item occurs in the training parts.
        max_history: columns of a history.
        item_names: by item number; the first is empty.
        user_names: by user number.
        description: one line on what was kept.
        sequence: all items of all users, in order, users after one another.
        start: where each user begins in it, and its length behind them.

    Examples:
        >>> splits = load_interactions("amazon-video-games", items=100, min_length=6)
        >>> history, following = splits.train.inputs[0], splits.train.targets[0]
        >>> bool((history[1:] == following[:-1])[following[:-1] > 0].all())
        True
    """

    name: str
    train: IndexedDataset
    validation: IndexedDataset
    test: IndexedDataset
    num_items: int
    popularity: Int[Tensor, " items"]
    max_history: int
    item_names: tuple[str, ...]
    user_names: tuple[str, ...]
    description: str
    sequence: NDArray[np.int64] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)

    def steps(self, part: Part = "train") -> IndexedDataset:
        """One sample for each item that is to be predicted: the history before it, and the item.

        Args:
            part: "train" gives every training item but each user's first; "validation" and "test" give one for each user.

        Returns:
            Inputs (samples, max_history), targets (samples); `extras["user"]` holds user numbers.

        Examples:
            >>> splits = load_interactions("amazon-video-games", items=100, min_length=6)
            >>> len(splits.steps("test")) == len(splits.test), len(splits.steps()) > len(splits.train)
            (True, True)
        """
        user, end = self._ends(part)
        history = _windows(self.sequence, self.start[user], end, self.max_history)
        target = torch.from_numpy(self.sequence[end])
        return IndexedDataset(history, target, extras={"user": torch.from_numpy(user)})

    def impressions(
        self, part: Part = "train", *, negatives: int = 1, popularity_power: float = 0.0, seed: int = 0
    ) -> IndexedDataset:
        """Items shown to users, and whether each was the one they chose: what a click model learns from and is judged on.

        Each chosen item is followed by `negatives` items that the user never chose, before or after.

        Args:
            part: as for `steps`.
            negatives: for each chosen item, >= 1.
            popularity_power: items are drawn in proportion to their popularity to this power, >= 0; 0 draws all alike, with 1 the
                popularity of an item tells next to nothing about whether it was chosen.
            seed: of the draw, >= 0.

        Returns:
            Inputs (histories (samples, max_history), items (samples)), float32 targets 1 or 0; `extras["user"]` holds user numbers.

        Raises:
            InputError: for a value out of range, or a user who chose all the items that could be drawn.

        Examples:
            >>> splits = load_interactions("amazon-video-games", items=100, min_length=6)
            >>> shown = splits.impressions("test", negatives=3)
            >>> shown.targets[:8].tolist(), len(shown) == 4 * len(splits.test)
            ([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], True)
        """
        if negatives < 1:
            raise InputError(f"negatives must be >= 1, got {negatives}")
        if not 0 <= popularity_power < np.inf:
            raise InputError(f"popularity_power must be >= 0 and finite, got {popularity_power}")
        if seed < 0:
            raise InputError(f"seed must be >= 0, got {seed}")
        steps = self.steps(part)
        user = steps.extras["user"].numpy()
        rng = np.random.default_rng([seed, _PARTS.index(part)])
        drawn = self._never_chosen(np.repeat(user, negatives), popularity_power, rng)
        chosen: Any = steps.targets
        items = torch.cat([chosen[:, None], torch.from_numpy(drawn).view(-1, negatives)], dim=1)
        targets = torch.zeros(items.shape)
        targets[:, 0] = 1.0
        rows = torch.arange(len(steps)).repeat_interleave(negatives + 1)
        histories: Any = steps.inputs
        return IndexedDataset(
            (histories[rows], items.flatten()), targets.flatten(), extras={"user": steps.extras["user"][rows]}
        )

    def _ends(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """User and place in the sequence of each item to be predicted."""
        if part not in _PARTS:
            raise InputError(f"part must be one of {', '.join(_PARTS)}, got {part!r}")
        first, last = self.start[:-1], self.start[1:]
        users = np.arange(len(first))
        if part != "train":
            return users, last - (2 if part == "validation" else 1)
        counts = last - first - 3
        user = np.repeat(users, counts)
        place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return user, first[user] + 1 + place

    def _never_chosen(
        self, user: NDArray[np.int64], power: float, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """An item for each of some users, none of their own."""
        weights = self.popularity[1:].double().numpy() ** power
        owner = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))
        taken = np.unique(owner * (self.num_items + 1) + self.sequence)
        left = np.count_nonzero(weights) - np.bincount(
            (taken // (self.num_items + 1))[weights[taken % (self.num_items + 1) - 1] > 0],
            minlength=len(self.start) - 1,
        )
        full = np.flatnonzero(left[np.unique(user)] < 1)
        if len(full):
            raise InputError(
                f"user {self.user_names[np.unique(user)[full[0]]]!r} chose every item there is: nothing is left to draw"
            )
        edges = weights.cumsum() / weights.sum()
        items = np.zeros(len(user), dtype=np.int64)
        todo = np.arange(len(user))
        while len(todo):
            drawn = np.searchsorted(edges, rng.random(len(todo)), side="right")
            items[todo] = np.minimum(drawn, self.num_items - 1) + 1
            keys = user[todo] * (self.num_items + 1) + items[todo]
            place = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
            todo = todo[taken[place] == keys]
        return items


def load_interactions(
    source: str | Path = "amazon-video-games",
    *,
    items: int | None = None,
    users: int | None = None,
    min_length: int = 5,
    max_history: int = 20,
    columns: tuple[str, str, str] | None = None,
    seed: int = 0,
) -> InteractionSplits:
    """Sequences of users' items from a data set or a table of your own, split in time.

    A table (csv, tsv, parquet) has one row for each interaction: who, what and when. Users and items of a csv or tsv are known by their
    text as it is written: 007 is not 7. Rows of a user are put in order of time, of equal times in the order of the file; times are
    numbers or ISO dates, those without a time zone in UTC.

    Args:
        source: "amazon-video-games" (which games customers reviewed), or the path of a table.
        items: keep the most frequent items only, so many (of equally frequent ones the first seen): runs take seconds then.
        users: keep at most so many users, drawn by seed.
        min_length: leave out users with fewer interactions (of those kept), >= 3.
        max_history: columns of a history; only the most recent items of longer ones are seen.
        columns: names of the user, item and time column of a table; None looks for `user` or `user_id`, `item` or `item_id`, `time` or
            `timestamp`.
        seed: of the draw of users.

    Raises:
        InputError: if the source cannot be read, lacks a column or holds missing values, an option is out of range, or nobody is left.

    Source:
        Kang, McAuley 2018 (SASRec), arXiv 1808.09781, section 4.1, for the data set and the split.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "plays.csv"
        >>> _ = path.write_text("user,item,time\\nann,a,3\\nann,b,1\\nann,c,2\\nbob,a,1\\n")
        >>> splits = load_interactions(path, min_length=3, max_history=4)
        >>> splits.test.inputs.tolist(), splits.test.targets.tolist(), splits.item_names
        ([[0, 0, 2, 3]], [1], ('', 'a', 'b', 'c'))
    """
    for name, value, least in (("items", items, 2), ("users", users, 1), ("max_history", max_history, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} must be >= {least}, got {value}")
    if min_length < 3:
        raise InputError(f"min_length must be >= 3, one item for each part, got {min_length}")
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    if source in _NAMES:
        raw = load_raw(str(source))
        item = raw["item"].astype(np.int64)
        user = np.repeat(np.arange(len(raw["length"])), raw["length"])
        item_names, user_names = (np.arange(int(part.max()) + 1).astype(str) for part in (item, user))
    elif isinstance(source, Path) or "/" in source or Path(source).suffix:
        user, item, user_names, item_names = _read(Path(source).expanduser(), columns)
    else:
        raise InputError(
            f"source must be {' or '.join(_NAMES)} or the path of a table, got {source!r}{suggest_names(source, _NAMES)}"
        )
    if items is not None:
        count = np.bincount(item, minlength=len(item_names))
        kept = np.zeros(len(item_names), dtype=bool)
        kept[np.argsort(-count, kind="stable")[:items]] = True
        user, item = user[kept[item]], item[kept[item]]
    length = np.bincount(user, minlength=len(user_names))
    chosen = np.flatnonzero(length >= min_length)
    if users is not None and users < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:users])
    if len(chosen) == 0:
        mend = "lower min_length" if min_length > 3 else "each part takes one"
        raise InputError(f"no user of {source} has {min_length} interactions or more: {mend}")
    stay = np.isin(user, chosen)
    item, numbers = item[stay], np.unique(item[stay])
    sequence = np.searchsorted(numbers, item) + 1
    start = np.concatenate([[0], length[chosen].cumsum()])
    return _splits(
        str(source),
        sequence,
        start,
        max_history,
        ("", *(str(item_names[number]) for number in numbers)),
        tuple(str(user_names[number]) for number in chosen),
    )


def holds_interactions(path: str | Path) -> bool:
    """Whether a table has the columns of users, items and times that `load_interactions` looks for; only its head is read.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "plays.csv"
        >>> _ = path.write_text("user,item,timestamp\\nann,a,3\\n")
        >>> holds_interactions(path), holds_interactions("/nowhere.csv")
        (True, False)
    """
    names = column_names(Path(path).expanduser())
    return all(any(name in names for name in known) for known in _COLUMNS)


def last_items(histories: Int[Tensor, "rows columns"], count: int) -> Int[Tensor, "rows columns"]:
    """Histories of which only the most recent items are known, as those of a new user are.

    Args:
        histories: padded with 0 on the left.
        count: items to keep, >= 0.

    Raises:
        ValueError: if `count` < 0.

    Examples:
        >>> last_items(torch.tensor([[0, 4, 5, 6]]), 2)
        tensor([[0, 0, 5, 6]])
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    kept = torch.arange(histories.shape[1], device=histories.device) >= histories.shape[1] - count
    return histories * kept


def _read(
    path: Path, columns: tuple[str, str, str] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray, NDArray]:
    """Users and items by number, users one after another, each in order of time; and their names."""
    table = read_table(path, as_text=True)
    found = [str(column) for column in table.columns]
    if columns is None:
        user_column, item_column, time_column = (
            next((name for name in known if name in found), known[0]) for known in _COLUMNS
        )
        columns = user_column, item_column, time_column
    for name in columns:
        if name not in found:
            raise InputError(
                f"{path} must have a column {name!r}{suggest_names(name, found)} (it has: {', '.join(found)})"
            )
        missing = np.flatnonzero(table[name].isna() | (table[name] == ""))
        if len(missing):
            raise InputError(
                f"{path} must have a value of {name!r} in every row, row {missing[0] + 1} has none"
            )
    if not len(table):
        raise InputError(f"{path} must have at least one row, got none")
    user, user_names = pd.factorize(table[columns[0]])
    item, item_names = pd.factorize(table[columns[1]], sort=False)
    order = np.lexsort((np.arange(len(user)), _times(table[columns[2]], path), user))
    return (
        user[order].astype(np.int64),
        item[order].astype(np.int64),
        np.asarray(user_names),
        np.asarray(item_names),
    )


def _times(column: pd.Series, path: Path) -> NDArray:
    """Numbers that grow with time; of text those that it says, or else the dates."""
    try:
        time = pd.to_numeric(column) if not pd.api.types.is_datetime64_any_dtype(column) else column
    except (ValueError, TypeError):
        time = column
    if not pd.api.types.is_numeric_dtype(time):
        try:
            time = pd.to_datetime(time, format="ISO8601", utc=True).dt.tz_localize(None)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"column {column.name!r} of {path} must hold numbers or ISO dates ({str(error).splitlines()[0]})"
            ) from error
    unknown = np.flatnonzero(time.isna())
    if len(unknown):
        raise InputError(
            f"column {column.name!r} of {path} must hold numbers or ISO dates, "
            f"got {column.iloc[unknown[0]]!r} in row {unknown[0] + 1}"
        )
    return time.to_numpy()


def _splits(
    name: str,
    sequence: NDArray[np.int64],
    start: NDArray[np.int64],
    max_history: int,
    item_names: tuple[str, ...],
    user_names: tuple[str, ...],
) -> InteractionSplits:
    first, last = start[:-1], start[1:]
    users = torch.arange(len(first))
    held_out = np.zeros(len(sequence), dtype=bool)
    held_out[last - 1] = held_out[last - 2] = True
    popularity = np.bincount(sequence[~held_out], minlength=len(item_names))
    learns = last - first >= 4
    inputs = _windows(sequence, first[learns], last[learns] - 3, max_history)
    following = _windows(sequence, first[learns] + 1, last[learns] - 2, max_history)
    validation, test = (
        IndexedDataset(
            _windows(sequence, first, last - back, max_history),
            torch.from_numpy(sequence[last - back]),
            users,
        )
        for back in (2, 1)
    )
    return InteractionSplits(
        name=name,
        train=IndexedDataset(inputs, following, users[torch.from_numpy(learns)]),
        validation=validation,
        test=test,
        num_items=len(item_names) - 1,
        popularity=torch.from_numpy(popularity),
        max_history=max_history,
        item_names=item_names,
        user_names=user_names,
        description=f"{len(users)} users, {len(item_names) - 1} items, {len(sequence)} interactions",
        sequence=sequence,
        start=start,
    )


def _windows(
    sequence: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64], size: int
) -> Int[Tensor, "rows columns"]:
    """The last `size` items before each end, not going before `first`; 0 on the left where there are fewer."""
    place = end[:, None] + np.arange(-size, 0)
    inside = place >= first[:, None]
    return torch.from_numpy(np.where(inside, sequence[np.maximum(place, 0)], 0))
