"""The catalog reads rooms without importing them, and says so when it cannot."""

import inspect
from pathlib import Path

import pytest

import coloss.lab
from coloss.errors import InputError, UnknownNameError
from coloss.lab.catalog import FAMILIES, catalog, find_entry, import_name, read_room
from coloss.lab.room_examples import room_example

ROOM = '''r"""Does it.

At length, with \\ in it.
"""

from torch import nn

import numpy as np


class Method(nn.Module):
    """Acts.

    Examples:
        >>> Method(np.ones(2), SIZE)
        Method()
    """


SIZE = 3

SYSTEM = System(
    slug="it",
    title="It",
    paper="A, 2025",
    family="jepa",
    acts_on=("loss",),
    api=("coloss.jepa.Method",),
    method="coloss.jepa.Method",
)

CLAIM = Claim(
)
'''


def write(tmp_path, text):
    path = tmp_path / "room.py"
    path.write_text(text)
    return path


def test_a_room_is_read_from_its_source(tmp_path):
    entry = read_room(write(tmp_path, ROOM), "jepa")
    assert entry.slug == "it" and entry.api == ("coloss.jepa.Method",) and entry.module == "coloss.jepa.room"
    assert entry.docstring == "Does it.\n\nAt length, with \\ in it." and entry.summary == "Does it."
    assert entry.has_claim and not read_room(write(tmp_path, ROOM.partition("CLAIM")[0]), "jepa").has_claim
    assert read_room(write(tmp_path, ROOM.partition("SYSTEM")[0]), "jepa") is None


def test_an_example_comes_with_its_imports(tmp_path):
    assert room_example(write(tmp_path, ROOM.replace("Examples:", "Example:")), "my.room", ["Method"])
    path = write(tmp_path, ROOM)
    assert room_example(path, "my.room", ["absent", "Method"]).splitlines() == [
        ">>> import numpy as np",
        ">>> from my.room import Method, SIZE",
        ">>> Method(np.ones(2), SIZE)",
        "Method()",
    ]
    assert room_example(path, "my.room", ["absent"]) == ""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('slug="it"', "slug=SLUG", "literal values"),
        ('slug="it"', 'slug="it", sluk="it"', "sluk"),
        ('slug="it",', "", "slug"),
        ('family="jepa"', 'family="motion"', "family must be 'jepa' as the folder is, got 'motion'"),
    ],
)
def test_a_declaration_that_cannot_be_read(tmp_path, before, after, message):
    with pytest.raises(InputError, match=f"room.py must hold the fields of System.*{message}"):
        read_room(write(tmp_path, ROOM.replace(before, after)), "jepa")


def test_systems_are_found_by_slug():
    assert [FAMILIES.index(entry.family) for entry in catalog()] == sorted(
        FAMILIES.index(e.family) for e in catalog()
    )
    assert find_entry("trp").module == "coloss.compression.trained_rank_pruning"
    with pytest.raises(UnknownNameError, match="no system named 'dhdk'; did you mean 'dhkd'"):
        find_entry("dhdk")


@pytest.mark.parametrize("path", ["no.such.module", "json.no_such_name", "json", ""])
def test_what_cannot_be_imported(path):
    with pytest.raises(InputError, match=f"cannot import '{path}'"):
        import_name(path)


def test_no_public_name_is_hidden_by_a_module_of_that_name():
    modules = {path.stem for path in Path(coloss.lab.__file__).parent.glob("*.py")}
    assert {"Comparison", "verify", "find_task"} <= set(coloss.lab.__all__)
    assert not modules & set(coloss.lab.__all__)


def test_options_of_a_run_are_shown_as_they_are_typed():
    from coloss.lab.arms import read_options
    from coloss.motion import train_lamp

    options = find_entry("lamp").options
    assert options["size"] == "small" and options["parts"] == "[1, 2]" and options["limit"] == "none"
    assert "seed" not in options and "folder" not in options
    read = read_options("lamp", train_lamp, [f"{name}={value}" for name, value in options.items()])
    defaults = inspect.signature(train_lamp).parameters
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()} == {
        name: defaults[name].default for name in options
    }
    assert find_entry("trp").options == {}
