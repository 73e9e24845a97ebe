"""Text as a stream of characters, for small language models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.data.dataset import IndexedDataset
from coloss.data.formats import read_text
from coloss.data.raw import load_raw
from coloss.errors import InputError


@dataclass(frozen=True)
class CharacterText:
    """A text cut into three stretches, each character a number.

    Attributes:
        characters: the vocabulary; a character's place in it is its id.
        train, validation, test: ids of the stretches, in this order in the text, each one-dimensional.

    Examples:
        >>> text = CharacterText.of("to be or not to be", validation_share=0.2, test_share=0.2)
        >>> len(text.characters), text.decode(text.train)
        (7, 'to be or n')
    """

    characters: str
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    test: Int[Tensor, " test"]

    @classmethod
    def of(cls, text: str, *, validation_share: float = 0.05, test_share: float = 0.05) -> "CharacterText":
        """Number the characters of a text; its last stretches are for validation and testing.

        Raises:
            InputError: for shares that leave a stretch empty.
        """
        characters = "".join(sorted(set(text)))
        number = {character: place for place, character in enumerate(characters)}
        ids = torch.tensor([number[character] for character in text], dtype=torch.int64)
        held = [round(len(ids) * share) for share in (validation_share, test_share)]
        sizes = [len(ids) - sum(held), *held]
        if min(sizes) < 1:
            raise InputError(
                f"validation_share and test_share must leave characters for all stretches of {len(ids)}, "
                f"got {validation_share} and {test_share}"
            )
        return cls(characters, *ids.split(sizes))

    def encode(self, text: str) -> Int[Tensor, " characters"]:
        """Ids of a text's characters.

        Raises:
            InputError: for a character that the vocabulary does not have.
        """
        unknown = set(text) - set(self.characters)
        if unknown:
            raise InputError(
                f"text must consist of the {len(self.characters)} known characters, got {min(unknown)!r}"
            )
        return torch.tensor([self.characters.index(character) for character in text], dtype=torch.int64)

    def decode(self, ids: Int[Tensor, " characters"]) -> str:
        """The text of ids."""
        return "".join(self.characters[number] for number in ids.tolist())


def character_windows(
    ids: Int[Tensor, " characters"], length: int, *, stride: int | None = None
) -> IndexedDataset:
    """Stretches of equal length to train a language model on; the targets are the inputs one character later.

    Args:
        ids: of a text.
        length: characters in an input, >= 1.
        stride: from one window's beginning to the next; None: `length`, so that every character is predicted once.

    Returns:
        inputs and targets, each int64 (windows, length); what does not fill a window is left out.

    Raises:
        InputError: for a value below 1, or a text of no more than `length` characters.

    Examples:
        >>> windows = character_windows(torch.arange(8), 3)
        >>> windows.inputs.tolist(), windows.targets.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    if len(ids) <= length:
        raise InputError(f"ids must be more than length = {length} characters, got {len(ids)}")
    windows = ids.unfold(0, length + 1, stride)
    return IndexedDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def spaced_windows(ids: Int[Tensor, " characters"], length: int, count: int) -> Int[Tensor, "windows length"]:
    """Up to `count` stretches of a text, evenly spaced over all of it.

    Raises:
        InputError: for a text of fewer than `length` characters.

    Examples:
        >>> spaced_windows(torch.arange(7), 3, 2)
        tensor([[0, 1, 2],
                [4, 5, 6]])
    """
    if len(ids) < length:
        raise InputError(f"ids must be at least length = {length} characters, got {len(ids)}")
    starts = torch.linspace(0, len(ids) - length, min(count, len(ids) - length + 1)).long()
    return ids[starts[:, None] + torch.arange(length)]


def load_characters(
    name: str = "tiny-shakespeare", *, validation_share: float = 0.05, test_share: float = 0.05
) -> CharacterText:
    """A text as characters: 1,115,394 of 65 kinds in tiny Shakespeare.

    Args:
        name: of a bundled running text, or path of a text file (`.txt`, `.txt.gz`) of one's own.
        validation_share: of the text, just before its last stretch.
        test_share: of the text, its last stretch.

    Raises:
        InputError: if the data set is no text, its file is not there, or shares leave a stretch empty.

    Examples:
        >>> len(load_characters().characters)  # doctest: +SKIP
        65
    """
    if name.endswith((".txt", ".txt.gz")):
        text = read_text(Path(name).expanduser())
        return CharacterText.of(text, validation_share=validation_share, test_share=test_share)
    raw = load_raw("tiny-shakespeare" if name == "tinyshakespeare" else name)
    if not isinstance(raw, dict) or set(raw) != {"text"}:
        raise InputError(f"name must be that of a running text, such as tiny-shakespeare, got {name!r}")
    return CharacterText.of(raw["text"], validation_share=validation_share, test_share=test_share)
