"""Text as characters: stretches in order, windows that miss and repeat nothing."""

import pytest
import torch

from coloss.data import CharacterText, character_windows, load_characters
from coloss.data.characters import spaced_windows
from coloss.errors import InputError


def test_the_stretches_are_the_text_in_order():
    text = "the quick brown fox jumps over the lazy dog"
    found = CharacterText.of(text, validation_share=0.2, test_share=0.1)
    assert "".join(map(found.decode, (found.train, found.validation, found.test))) == text
    assert (len(found.validation), len(found.test)) == (9, 4)
    assert list(found.characters) == sorted(set(text))
    assert torch.equal(found.encode("the"), found.train[:3])


def test_every_character_but_the_first_is_a_target_once():
    ids = torch.arange(31)
    windows = character_windows(ids, 5)
    assert windows.targets.flatten().tolist() == list(range(1, 31))
    assert torch.equal(windows.targets, windows.inputs + 1)
    assert len(character_windows(ids, 5, stride=1)) == 26


def test_spaced_windows_reach_from_the_first_character_to_the_last():
    found = spaced_windows(torch.arange(100), 10, 4)
    assert found[:, 0].tolist() == [0, 30, 60, 90]
    assert spaced_windows(torch.arange(5), 4, 100).tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_the_bundled_text_has_65_characters():
    text = load_characters()
    assert (len(text.characters), len(text.train) + len(text.validation) + len(text.test)) == (65, 1_115_394)
    assert text.decode(text.train[:14]) == "First Citizen:"


def test_a_text_of_ones_own_is_read_from_its_file(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("to be or not to be")
    text = load_characters(str(path), validation_share=0.2, test_share=0.2)
    assert "".join(map(text.decode, (text.train, text.validation, text.test))) == "to be or not to be"
    assert torch.equal(load_characters("tinyshakespeare").test, load_characters().test)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        load_characters("nowhere.txt")


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="must leave characters for all stretches of 4, got 0.9 and 0.1"):
        CharacterText.of("abcd", validation_share=0.9, test_share=0.1)
    with pytest.raises(InputError, match="must consist of the 4 known characters, got 'z'"):
        CharacterText.of("abcd", validation_share=0.25, test_share=0.25).encode("az")
    with pytest.raises(InputError, match="stride must be >= 1, got 0"):
        character_windows(torch.arange(9), 2, stride=0)
    with pytest.raises(InputError, match="ids must be at least length = 9 characters, got 8"):
        spaced_windows(torch.arange(8), 9, 2)
    with pytest.raises(InputError, match="ids must be more than length = 9 characters, got 9"):
        character_windows(torch.arange(9), 9)
    with pytest.raises(InputError, match="name must be that of a running text"):
        load_characters("sst2")
