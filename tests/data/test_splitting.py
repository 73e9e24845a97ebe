import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data.splitting import TEST, TRAIN, VALIDATION, part_numbers, split_rows
from coloss.errors import InputError


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 3))
def test_the_parts_divide_the_rows_and_train_keeps_every_class(labels: list[int], seed: int) -> None:
    classes = np.array(labels)
    train, validation, test = split_rows(classes, None, len(classes), seed)
    together = np.concatenate([train, validation, test])
    assert sorted(together) == list(range(len(classes)))
    assert set(classes[train]) == set(labels)
    for label, count in zip(*np.unique(classes, return_counts=True), strict=True):
        assert abs((classes[test] == label).sum() - 0.2 * count) <= 1


def test_sixty_twenty_twenty_in_every_class() -> None:
    classes = np.repeat([0, 1, 2], [50, 20, 5])
    parts = split_rows(classes, None, 75, 0)
    assert [np.bincount(classes[part]).tolist() for part in parts] == [[30, 12, 3], [10, 4, 1], [10, 4, 1]]


def test_given_parts_are_kept() -> None:
    given_parts = np.array([TRAIN] * 10 + [TEST] * 7 + [VALIDATION] * 3)
    train, validation, test = split_rows(None, given_parts, 20, 0)
    assert (
        test.tolist() == list(range(10, 17))
        and validation.tolist() == [17, 18, 19]
        and train.tolist() == list(range(10))
    )
    train, validation, test = split_rows(None, given_parts[:17], 17, 0)
    assert test.tolist() == list(range(10, 17)) and (len(train), len(validation)) == (8, 2)


def test_the_seed_decides() -> None:
    draws = [split_rows(None, None, 50, seed)[2].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@settings(deadline=None)
@given(st.integers(1, 80))
def test_a_limit_keeps_the_shares_of_the_classes(limit: int) -> None:
    classes = np.repeat([0, 1], [90, 10])
    given_parts = np.repeat([TRAIN, VALIDATION], [50, 50])[np.arange(100) % 2 * 50 + np.arange(100) // 2]
    for part in split_rows(classes, given_parts, 100, 0, limit):
        counts = np.bincount(classes[part], minlength=2)
        assert counts.sum() <= limit
        assert abs(counts[1] - 0.1 * counts.sum()) <= 1.5


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="limit must be >= 1, got 0"):
        split_rows(None, None, 10, 0, limit=0)
    with pytest.raises(InputError, match="seed must be >= 0, got -1"):
        split_rows(None, None, 10, -1)


def test_part_names() -> None:
    numbers = part_numbers(["Train", "valid", "dev", "test", "training"])
    assert numbers is not None and numbers.tolist() == [0, 1, 1, 2, 0]
    assert part_numbers(["test", "test"]) is None  # nothing to learn from: the column means something else
    assert part_numbers(["train", "holdout"]) is None
