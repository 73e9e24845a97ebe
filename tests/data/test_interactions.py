"""Sequences are split by time, histories end with the most recent item, and negatives are nobody's own."""

import numpy as np
import pandas as pd
import pytest
import torch

from coloss.data import last_items, load_interactions
from coloss.errors import InputError


def write(folder, text, name="rows.csv"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def table(tmp_path):
    """ann: d c b a (by time), bob: a b d; eve has two interactions only."""
    rows = [
        "ann,a,2024-01-09", "bob,a,2024-01-01", "ann,b,2024-01-08", "ann,d,2023-12-01", "eve,c,2024-01-01",
        "bob,b,2024-01-02", "ann,c,2024-01-02", "bob,d,2024-01-02", "eve,a,2024-02-01",
    ]  # fmt: skip
    return write(tmp_path, "user,item,time\n" + "\n".join(rows) + "\n")


def test_a_table_worked_by_hand(table):
    splits = load_interactions(table, min_length=3, max_history=3)
    name = splits.item_names.index
    a, b, c, d = name("a"), name("b"), name("c"), name("d")
    assert splits.user_names == ("ann", "bob") and splits.num_items == 4 and name("") == 0
    # Equal times of bob keep the order of the file.
    assert splits.test.inputs.tolist() == [[d, c, b], [0, a, b]] and splits.test.targets.tolist() == [a, d]
    assert splits.validation.inputs.tolist() == [[0, d, c], [0, 0, a]]
    assert splits.validation.targets.tolist() == [b, b]
    assert splits.train.inputs.tolist() == [[0, 0, d]] and splits.train.targets.tolist() == [[0, 0, c]]
    assert splits.train.ids.tolist() == [0]  # bob has nothing to learn from
    counts = splits.popularity.tolist()
    assert (counts[a], counts[b], counts[c], counts[d], counts[0]) == (1, 0, 1, 1, 0)


def test_items_of_a_csv_are_known_by_their_text(tmp_path):
    """Numbers with and without leading zeros are two items, and NA is a name."""
    path = write(tmp_path, "user,item,time\nann,007,1\nann,7,2\nann,NA,10\nann,1e3,9\n")
    splits = load_interactions(path, min_length=3)
    assert splits.item_names == ("", "007", "7", "NA", "1e3")
    assert splits.sequence.tolist() == [1, 2, 4, 3]  # times are numbers: 9 before 10


def test_dates_of_several_time_zones_are_put_in_order(tmp_path):
    rows = ["b,2024-01-01T12:00+00:00", "a,2024-01-01T12:30+02:00", "c,2024-01-01T13:00"]
    path = write(tmp_path, "user,item,time\n" + "\n".join(f"ann,{row}" for row in rows) + "\n")
    splits = load_interactions(path, min_length=3)
    assert [splits.item_names[item] for item in splits.sequence] == ["a", "b", "c"]


def test_a_parquet_keeps_the_types_that_it_has(tmp_path):
    table = pd.DataFrame({"user": [1, 1, 1], "item": [30, 10, 20], "time": [3, 1, 2]})
    for name, times in (
        ("numbers", table["time"]),
        ("dates", pd.to_datetime(table["time"], unit="D")),
        ("zoned", pd.to_datetime(table["time"], unit="D", utc=True)),
    ):
        table.assign(time=times).to_parquet(tmp_path / f"{name}.parquet")
        splits = load_interactions(tmp_path / f"{name}.parquet", min_length=3)
        assert [splits.item_names[item] for item in splits.sequence] == ["10", "20", "30"]
    table.assign(item=[30.0, None, 20.0]).to_parquet(tmp_path / "holes.parquet")
    with pytest.raises(InputError, match="must have a value of 'item' in every row, row 2 has none"):
        load_interactions(tmp_path / "holes.parquet")


def test_training_never_sees_the_held_out_items(needs):
    splits = load_interactions(needs("amazon-video-games"), items=200, min_length=5, max_history=6)
    lengths = np.diff(splits.start)
    assert lengths.min() >= 5 and splits.num_items <= 200
    assert int(splits.popularity.sum()) == len(splits.sequence) - 2 * len(lengths)
    steps = splits.steps()
    assert len(steps) == int((lengths - 3).sum())
    for row in range(0, len(steps), 501):
        user = int(steps.extras["user"][row])
        own = splits.sequence[splits.start[user] : splits.start[user + 1]].tolist()
        place = own.index(int(steps.targets[row]))
        assert place <= len(own) - 3
        assert [item for item in steps.inputs[row].tolist() if item] == own[:place][-6:]
    users = torch.arange(len(lengths))
    last = torch.from_numpy(splits.sequence[splits.start[1:] - 1])
    assert torch.equal(splits.test.targets, last) and torch.equal(splits.test.ids, users)
    assert torch.equal(splits.steps("test").targets, last)
    # One row for each user holds the same pairs as the steps, where the history is long enough.
    pairs = int((splits.train.targets > 0).sum())
    assert pairs == int(np.minimum(lengths - 3, 6).sum())


def test_the_popular_subset_and_the_draw_of_users_are_stable(needs):
    name = needs("amazon-video-games")
    one, other = (load_interactions(name, items=100, users=50, min_length=6, seed=s) for s in (0, 0))
    assert np.array_equal(one.sequence, other.sequence) and len(one.user_names) == 50
    assert load_interactions(name, items=100, users=50, min_length=6, seed=1).user_names != one.user_names


def test_negatives_were_never_chosen_and_follow_popularity(needs):
    splits = load_interactions(needs("amazon-video-games"), items=100, min_length=6)
    shown = splits.impressions("train", negatives=2, seed=3)
    histories, items = shown.inputs
    assert shown.targets.view(-1, 3).tolist() == [[1.0, 0.0, 0.0]] * (len(shown) // 3)
    for row in np.flatnonzero(shown.targets.numpy() == 0)[::97]:
        user = int(shown.extras["user"][row])
        assert int(items[row]) not in splits.sequence[splits.start[user] : splits.start[user + 1]]
    assert int(items.min()) >= 1 and int(items.max()) <= splits.num_items
    again, other = (splits.impressions("train", negatives=2, seed=s).inputs[1] for s in (3, 4))
    assert torch.equal(again, items) and not torch.equal(other, items)
    popular = splits.impressions("train", negatives=2, popularity_power=1.0, seed=3).inputs[1]
    counts, drawn = splits.popularity.double(), (shown.targets == 0)
    assert counts[popular[drawn]].mean() > counts[items[drawn]].mean() * 1.2


def test_a_user_who_chose_everything_has_no_negatives(tmp_path):
    path = write(tmp_path, "user,item,time\nann,a,1\nann,b,2\nann,c,3\n")
    splits = load_interactions(path, min_length=3)
    with pytest.raises(InputError, match="user 'ann' chose every item there is"):
        splits.impressions("test")


def test_truncated_histories_keep_the_most_recent_items():
    histories = torch.tensor([[1, 2, 3], [0, 0, 4]])
    assert last_items(histories, 1).tolist() == [[0, 0, 3], [0, 0, 4]]
    assert last_items(histories, 0).sum() == 0 and torch.equal(last_items(histories, 9), histories)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        last_items(histories, -1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"items": 1}, "items must be >= 2, got 1"),
        ({"users": 0}, "users must be >= 1, got 0"),
        ({"min_length": 2}, "min_length must be >= 3, one item for each part, got 2"),
        ({"max_history": 0}, "max_history must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"min_length": 99}, "has 99 interactions or more: lower min_length"),
        ({"columns": ("user", "items", "time")}, "must have a column 'items'; did you mean 'item'"),
        ({"columns": ("user", "time", "item")}, "column 'item' of .* must hold numbers or ISO dates"),
    ],
)
def test_bad_options_are_refused(table, options, message):
    with pytest.raises(InputError, match=message):
        load_interactions(table, **options)


def test_bad_sources_are_refused(tmp_path, as_users_call):
    with pytest.raises(InputError, match="did you mean 'amazon-video-games'"):
        load_interactions("amazon-video-game")
    with pytest.raises(InputError, match="there is no file"):
        load_interactions(tmp_path / "none.csv")
    holes = write(tmp_path, "user,item,time\nann,a,1\nann,,2\n")
    with pytest.raises(InputError, match="must have a value of 'item' in every row, row 2 has none"):
        load_interactions(holes)
    for time in ("NaT", "soon"):
        times = write(tmp_path, f"user,item,time\nann,a,1\nann,b,{time}\n")
        with pytest.raises(InputError, match="column 'time' of .* must hold numbers or ISO dates"):
            load_interactions(times)
    splits = load_interactions(
        write(tmp_path, "user,item,time\nann,a,1\nann,b,2\nann,c,3\nbob,d,1\n"), min_length=3
    )
    for call, message in (
        (lambda: splits.steps("tests"), "part must be one of train, validation, test, got 'tests'"),
        (lambda: splits.impressions(negatives=0), "negatives must be >= 1, got 0"),
        (
            lambda: splits.impressions(popularity_power=-1.0),
            "popularity_power must be >= 0 and finite, got -1.0",
        ),
        (lambda: splits.impressions(seed=-1), "seed must be >= 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            call()
