"""Numbers and codes of a table: what is learnt from which rows, and what becomes of the values it never saw."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import TableEncoding
from coloss.errors import InputError

PEOPLE = pd.DataFrame(
    {
        "city": ["Rome", "Oslo", None, "Rome"],
        "age": [20.0, 40.0, np.nan, 60.0],
        "member": [True, False, True, True],
        "level": pd.Categorical([3, 1, 1, 3]),
        "visits": pd.array([1, None, 3, 5], dtype="Int64"),
    }
)


def test_numbers_come_first_scaled_by_the_rows_that_were_learnt_from() -> None:
    encoding = TableEncoding.learn(PEOPLE)
    assert encoding.columns == ("age", "member", "visits", "city", "level")
    assert encoding.cardinalities == (2, 2)
    rows = encoding.transform(PEOPLE)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[:, 0], [-(1.5**0.5), 0, np.nan, 1.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(np.nanmean(rows[:, :3], axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(rows[:, :3], axis=0), 1, rtol=1e-6)
    assert np.isnan(rows[:, 2]).tolist() == [False, True, False, False]
    assert rows[:, 3].tolist() == [1, 0, -1, 1]
    assert rows[:, 4].tolist() == [1, 0, 0, 1]
    # The scale is that of the first table, whatever is to be transformed.
    one = encoding.transform(PEOPLE.assign(age=1000.0).iloc[:1])
    assert one[0, 0] == pytest.approx((1000 - 40) / np.std([20, 40, 60]), rel=1e-6)


def test_what_was_not_seen_is_unknown_and_further_columns_do_not_matter() -> None:
    encoding = TableEncoding.learn(PEOPLE)
    strange = PEOPLE.assign(city="Bonn", level=9, extra=1)[["extra", *reversed(PEOPLE.columns)]]
    rows = encoding.transform(strange)
    assert (rows[:, 3:] == -1).all()
    np.testing.assert_array_equal(rows[:, :3], encoding.transform(PEOPLE)[:, :3])


def test_one_and_one_point_zero_are_one_category() -> None:
    encoding = TableEncoding.learn(pd.DataFrame({"code": pd.Series([1, "a", 2.0], dtype=object)}))
    assert encoding.categorical == {"code": ("1", "2", "a")}
    assert encoding.transform(pd.DataFrame({"code": [1.0, 2.0]}))[:, 0].tolist() == [0, 1]


def test_rare_categories_are_dropped_and_ties_go_by_name() -> None:
    table = pd.DataFrame({"word": list("ddccbba")})
    encoding = TableEncoding.learn(table, max_categories=2)
    assert encoding.categorical == {"word": ("b", "c")}
    assert encoding.transform(table)[:, 0].tolist() == [-1, -1, 1, 1, 0, 0, -1]


@pytest.mark.parametrize(
    "values", [[np.nan] * 3, [7.0] * 3, [0.1] * 3, [1e300, -1e300, 1e300], [1e-300, 0, 0]]
)
def test_empty_constant_and_extreme_columns_stay_finite_or_missing(values: list[float]) -> None:
    encoding = TableEncoding.learn(pd.DataFrame({"x": values}))
    rows = encoding.transform(pd.DataFrame({"x": [*values, 1e308, -1e308, 0.0]}))
    assert not np.isinf(rows).any()
    assert np.abs(rows[~np.isnan(rows)]).max() <= 100
    assert np.isnan(rows[:3, 0]).all() == np.isnan(values).all()
    if len(set(values)) == 1 and not np.isnan(values).any():
        assert (rows[:3] == 0).all()


def test_a_column_of_nothing_but_holes_takes_words_later() -> None:
    encoding = TableEncoding.learn(pd.DataFrame({"note": pd.Series([None, None], dtype=object)}))
    assert encoding.cardinalities == (1,)
    assert encoding.transform(pd.DataFrame({"note": ["word", None]})).tolist() == [[-1], [-1]]


def test_json_and_back() -> None:
    encoding = TableEncoding.learn(PEOPLE)
    again = TableEncoding.from_json(json.loads(json.dumps(encoding.as_json())))
    assert again == encoding
    np.testing.assert_array_equal(again.transform(PEOPLE), encoding.transform(PEOPLE))


@settings(max_examples=25)
@given(st.lists(st.one_of(st.none(), st.sampled_from("abcd")), min_size=1, max_size=12))
def test_each_row_has_one_indicator_that_tells_its_category(words: list[str | None]) -> None:
    table = pd.DataFrame({"word": pd.Series(words, dtype=object)})
    encoding = TableEncoding.learn(table)
    hot = encoding.one_hot(encoding.transform(table))
    known = sorted({word for word in words if word is not None})
    assert (hot.sum(1) == 1).all()
    assert [known[place] if place < len(known) else None for place in hot.argmax(1)] == words


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TableEncoding.learn(PEOPLE.iloc[:0]), "at least one row and one column"),
        (lambda: TableEncoding.learn(PEOPLE, max_categories=0), "max_categories must be >= 1, got 0"),
        (lambda: TableEncoding.learn(pd.DataFrame({"1": [1], 1: [2]})), "distinct, got '1' twice"),
        (lambda: TableEncoding.learn(pd.DataFrame({"x": [1.0, np.inf]})), "infinity in row 1"),
        (lambda: TableEncoding.learn(pd.DataFrame({"x": pd.to_datetime(["2020-01-01"])})), "holds times"),
        (lambda: TableEncoding.learn(pd.DataFrame({"x": [1j]})), "complex"),
        (lambda: TableEncoding.learn(PEOPLE).transform(PEOPLE[["age"]]), "must have the column 'member'"),
        (
            lambda: TableEncoding.learn(PEOPLE).transform(PEOPLE.assign(age="old")),
            "column 'age' must hold numbers",
        ),
        (lambda: TableEncoding.from_json({"numeric": {}}), "must be those of TableEncoding.as_json"),
    ],
)
def test_what_cannot_be_encoded_is_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
