"""Every sample is in one part, no class is in two, and training classes come first."""

import pytest
import torch

from coloss.data import load, unseen_class_split
from coloss.errors import DataNotFoundError, InputError


def needs(name: str):
    try:
        return load(name)
    except DataNotFoundError as error:
        pytest.skip(str(error))


def test_parts_share_no_class_and_keep_every_sample():
    whole = load("digits")
    splits = unseen_class_split(whole, test=3, validation=2, seed=1)
    parts = [splits.train, splits.validation, splits.test]
    classes = [part.targets.unique().tolist() for part in parts]
    assert classes == [list(range(5)), [5, 6], [7, 8, 9]]
    assert splits.num_classes == 5
    ids = torch.cat([part.ids for part in parts])
    assert ids.sort().values.tolist() == list(range(1797))
    names = {}
    for part in (whole.train, whole.validation, whole.test):
        names |= {i: whole.class_names[c] for i, c in zip(part.ids.tolist(), part.targets.tolist())}
    for part in parts:
        assert all(
            names[i] == splits.class_names[c] for i, c in zip(part.ids.tolist(), part.targets.tolist())
        )


def test_the_seed_draws_and_names_decide():
    whole = load("digits")
    drawn = {unseen_class_split(whole, test=3, seed=seed).class_names[-3:] for seed in range(4)}
    assert len(drawn) > 1
    named = unseen_class_split(whole, test=("3", "5"), validation=("0",))
    assert named.class_names[-3:] == ("0", "3", "5")
    mixed = unseen_class_split(whole, test=4, validation=("0", "1"), seed=2)
    assert set(mixed.class_names[4:6]) == {"0", "1"} and not {"0", "1"} & set(mixed.class_names[6:])


def test_alphabets_stay_together():
    splits = unseen_class_split(needs("omniglot"), test=3, validation=1, by="group", seed=0)
    first, second = splits.num_classes, int(splits.test.targets.min())
    alphabets = [
        {name.split("/")[0] for name in names}
        for names in (
            splits.class_names[:first],
            splits.class_names[first:second],
            splits.class_names[second:],
        )
    ]
    assert [len(part) for part in alphabets] == [4, 1, 3]
    assert not alphabets[0] & alphabets[1] and not (alphabets[0] | alphabets[1]) & alphabets[2]


def test_cifar10_is_divided_by_class():
    splits = unseen_class_split(needs("cifar10"), test=5)
    assert (splits.num_classes, len(splits.train), len(splits.test)) == (5, 4000, 4000)


def test_bad_input_is_named():
    digits = load("digits")
    for options, message in (
        ({"test": 0}, "test must be >= 1, got 0"),
        ({"test": 10}, "must leave a class to train on: there are 10, got 10 and 0"),
        ({"test": 5, "validation": 5}, "must leave a class to train on"),
        ({"test": ("11",)}, "test names no class '11'"),
        ({"test": ("1", "1")}, "test must name each class once"),
        ({"test": ("1",), "validation": ("1",)}, "validation must name each class once and in one part"),
        ({"test": 1, "by": "alphabet"}, 'by must be "class" or "group"'),
        ({"test": 1, "seed": -1}, "seed must be >= 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            unseen_class_split(digits, **options)
    with pytest.raises(InputError, match="splits must be of a classification with class names"):
        unseen_class_split(load("diabetes"), test=1)
