"""Images with captions: OpenMoji, or a folder of one's own; captions as word ids, with the words kept."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from coloss.data.dataset import IndexedDataset, Splits
from coloss.data.formats import read_arrays, read_json_lines, read_table
from coloss.data.image_folder import IMAGE_SUFFIXES, LazyImages
from coloss.data.raw import load_raw
from coloss.data.splitting import part_numbers, split_rows
from coloss.data.tables import encode_targets
from coloss.errors import InputError

Caption = Literal["name", "tags", "name+tags"]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_LISTS = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_FILE_COLUMNS = ("file_name", "file", "image", "path")
_CAPTION_COLUMNS = ("caption", "text", "sentence")
_CLASS_COLUMNS = ("label", "class", "target", "category")
_PART_COLUMNS = ("split", "part")


class WordVocabulary:
    """Words by number, the most frequent first, after ids for padding, unknown words and a mask.

    Words are runs of letters and digits, in lower case.

    Args:
        words: without the three special ones, each once.
        max_words: length of encoded texts; what goes beyond is cut.

    Attributes:
        words: by id, the special ones included.
        padding_id: 0; `unknown_id`: 1; `mask_id`: 2.

    Raises:
        ValueError: for a word given twice, or `max_words` < 1.

    Examples:
        >>> vocabulary = WordVocabulary.of_texts(["a red cat", "A cat, asleep"], size=5, max_words=3)
        >>> vocabulary.words[3:], vocabulary.encode(["cat", "red a b c"]).tolist()
        (('a', 'cat'), [[4, 0, 0], [1, 3, 1]])
    """

    padding_id, unknown_id, mask_id = 0, 1, 2

    def __init__(self, words: Sequence[str], max_words: int = 16) -> None:
        if max_words < 1:
            raise ValueError(f"max_words must be >= 1, got {max_words}")
        self.words = ("<padding>", "<unknown>", "<mask>", *words)
        self.max_words = max_words
        self._ids = {word: number for number, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words must hold each word once, got {twice!r} twice")

    @classmethod
    def of_texts(cls, texts: Iterable[str], size: int = 2000, max_words: int = 16) -> "WordVocabulary":
        """The most frequent words of some texts; of equally frequent ones the alphabetically first.

        Args:
            texts: usually the training captions.
            size: ids in all, > 3, the special ones included.
            max_words: as above.
        """
        if size <= 3:
            raise ValueError(f"size must be > 3, got {size}")
        counts = Counter(word for text in texts for word in words_of(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: size - 3], max_words)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> Int[Tensor, "texts max_words"]:
        """Ids of the words of each text, filled up with padding."""
        ids = torch.full((len(texts), self.max_words), self.padding_id)
        for row, text in enumerate(texts):
            found = [self._ids.get(word, self.unknown_id) for word in words_of(text)[: self.max_words]]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids

    def decode(self, ids: Int[Tensor, "texts words"]) -> list[str]:
        """Texts of ids, without padding.

        Examples:
            >>> vocabulary = WordVocabulary(["cat", "red"])
            >>> vocabulary.decode(torch.tensor([[4, 3, 0], [1, 0, 0]]))
            ['red cat', '<unknown>']
        """
        return [
            " ".join(self.words[number] for number in row if number != self.padding_id)
            for row in ids.tolist()
        ]


@dataclass
class ImageTextSplits(Splits):
    """Pairs of images and captions; see `Splits` for the rest.

    Each part's `inputs` are (images float32 (samples, channels, height, width) in [0, 1], word ids int64 (samples, max_words)); its
    targets are class numbers, or None where the data name no classes. Pair i of the images belongs to pair i of the captions.

    Args:
        vocabulary: of the word ids, made from the training captions.
        captions: by sample id, as they were written.

    Examples:
        >>> splits = load_image_text("openmoji", limit=40)
        >>> [part.shape for part in splits.train.inputs], splits.captions[int(splits.train.ids[0])]
        ([torch.Size([40, 3, 64, 64]), torch.Size([40, 16])], 'badminton birdie, game, racquet, shuttlecock')
    """

    vocabulary: WordVocabulary = None  # type: ignore[assignment]
    captions: tuple[str, ...] = ()


def load_image_text(
    source: str | Path,
    *,
    seed: int = 0,
    size: int | None = None,
    caption: Caption = "name+tags",
    max_words: int = 16,
    vocabulary_size: int = 2000,
    limit: int | None = None,
) -> ImageTextSplits:
    """Images with captions, divided into train, validation and test.

    A folder lists its images in `captions.csv` or `captions.jsonl` (or `metadata.*`): a column of file names (`file_name`, `file`,
    `image` or `path`), one of captions (`caption`, `text` or `sentence`) and, if you like, one of classes (`label`, `class`,
    `target` or `category`) and one of parts (`split`: train, validation, test). Without a list, each image's caption stands in a text
    file of its name (`cat.png`, `cat.txt`). An image may have several rows; they go to the same part. An npz file holds `image`
    (rows, height, width[, 3]) uint8, `caption`, and perhaps `label` and `split`.

    Args:
        source: "openmoji", or a folder, a list (csv, jsonl) beside the images, or an npz file.
        seed: of the split, where the data give none, and of the draw of `limit`.
        size: resize images to so many pixels a side; None keeps them (images of different sizes are brought to 64 x 64).
        caption: of OpenMoji: the name people gave the drawing, its tags, or both.
        max_words: length of a caption in word ids.
        vocabulary_size: ids in all; rarer words are unknown.
        limit: at most so many pairs in each part.

    Raises:
        InputError: if there is no such source, or no images with captions in it; the message says what was looked for.

    Examples:
        >>> splits = load_image_text("openmoji", size=16, caption="name", max_words=6, limit=30)
        >>> splits.input_shape, splits.class_names[:2], len(splits.test)
        ((3, 16, 16), ('activities', 'animals-nature'), 30)
    """
    if size is not None and size < 1:
        raise InputError(f"size must be >= 1, got {size}")
    if caption not in ("name", "tags", "name+tags"):
        raise InputError(f'caption must be "name", "tags" or "name+tags", got {caption!r}')
    rows = _openmoji(caption) if source == "openmoji" else _read(Path(source).expanduser())
    labels, class_names = None, None
    if rows.classes is not None:
        _, labels, class_names = encode_targets(
            np.array(rows.classes), f"classes of {source}", "classification"
        )
    parts = _divide(rows, labels, seed, limit)
    vocabulary = WordVocabulary.of_texts((rows.captions[i] for i in parts[0]), vocabulary_size, max_words)
    train, validation, test = (_dataset(rows, labels, vocabulary, part, size) for part in parts)
    images: Any = train.inputs
    counts = " / ".join(str(len(part)) for part in parts)
    return ImageTextSplits(
        name=str(source),
        kind="retrieval",
        train=train,
        validation=validation,
        test=test,
        input_shape=tuple(images[0].shape[1:]),
        num_classes=None if class_names is None else len(class_names),
        class_names=class_names,
        description=f"{counts} images with captions, {len(vocabulary)} word ids",
        vocabulary=vocabulary,
        captions=tuple(rows.captions),
    )


def holds_captions(source: str | Path) -> bool:
    """Whether `load_image_text` would look here: a folder with a list of captions, or with images and text files of the same name.

    Examples:
        >>> holds_captions("/nowhere")
        False
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return False
    if any((folder / name).is_file() for name in _LISTS):
        return True
    images = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return any(path.with_suffix(".txt").is_file() for path in images)


def words_of(text: str) -> list[str]:
    """Words of a text in lower case: letters and digits, with an apostrophe inside.

    Examples:
        >>> words_of("Rock-climber's HAT, no. 2")
        ['rock', "climber's", 'hat', 'no', '2']
    """
    return _WORD.findall(text.lower())


@dataclass
class _Rows:
    """Pairs before they are divided: `images[rows]` decodes, `groups` tells rows of one image."""

    images: Any
    captions: list[str]
    groups: NDArray[np.integer]
    classes: list[str] | None = None
    parts: NDArray[np.integer] | None = None


def _openmoji(caption: Caption) -> _Rows:
    raw = load_raw("openmoji")
    texts = {
        "name": raw["caption"],
        "tags": raw["tags"],
        "name+tags": [f"{name} {tags}".strip() for name, tags in zip(raw["caption"], raw["tags"])],
    }[caption]
    names = raw["group_names"][raw["group"]]
    count = np.arange(len(raw["image"]))
    return _Rows(raw["image"], [str(text) for text in texts], count, [str(n) for n in names], raw["split"])


def _read(source: Path) -> _Rows:
    if not source.exists():
        raise InputError(f"no file or folder {str(source)!r}")
    if source.suffix == ".npz":
        return _arrays(source)
    if source.is_file():
        return _listed(source)
    for name in _LISTS:
        if (source / name).is_file():
            return _listed(source / name)
    return _beside(source)


def _arrays(source: Path) -> _Rows:
    arrays = read_arrays(source)
    missing = [name for name in ("image", "caption") if name not in arrays]
    if missing:
        raise InputError(f"{source} must hold image and caption, got {', '.join(arrays) or 'nothing'}")
    images, captions = arrays["image"], [str(text) for text in arrays["caption"]]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(captions):
        raise InputError(
            f"image must be uint8 ({len(captions)}, height, width[, 3]), got {images.dtype} {images.shape}"
        )
    classes = [str(value) for value in arrays["label"]] if "label" in arrays else None
    parts = arrays.get("split")
    if parts is not None and parts.dtype.kind in "US":
        parts = part_numbers(parts)
    return _Rows(images, captions, np.arange(len(images)), classes, parts)


def _listed(path: Path) -> _Rows:
    if path.suffix == ".jsonl":
        table: Any = read_json_lines(path)
        columns = sorted({key for row in table for key in row})
        values = {column: [row.get(column) for row in table] for column in columns}
    else:
        frame = read_table(path)
        columns = [str(name) for name in frame.columns]
        values = {str(name): frame[name].tolist() for name in frame.columns}

    def column(names: Sequence[str]) -> list[Any] | None:
        return next((values[name] for name in names if name in values), None)

    files, captions = column(_FILE_COLUMNS), column(_CAPTION_COLUMNS)
    for what, names, found in (("file", _FILE_COLUMNS, files), ("caption", _CAPTION_COLUMNS, captions)):
        if found is None:
            raise InputError(
                f"{path} must have a {what} column ({', '.join(names)}), got {', '.join(columns)}"
            )
    assert files is not None and captions is not None
    for row, (file, text) in enumerate(zip(files, captions)):
        if not isinstance(file, str) or not isinstance(text, str) or not text.strip():
            raise InputError(
                f"{path} must name a file and a caption in every row, row {row} has {file!r}, {text!r}"
            )
        if not (path.parent / file).is_file():
            raise InputError(f"{path} names {file!r} in row {row}, and there is no such file beside it")
    classes, parts = column(_CLASS_COLUMNS), column(_PART_COLUMNS)
    if classes is not None and any(value is None for value in classes):
        raise InputError(f"{path} must have a class in every row, or no class column")
    distinct = {file: number for number, file in enumerate(dict.fromkeys(files))}
    groups = np.array([distinct[file] for file in files])
    pictures = LazyImages([path.parent / file for file in distinct])
    return _Rows(
        _Repeated(pictures, groups),
        captions,
        groups,
        None if classes is None else [str(value) for value in classes],
        None if parts is None else part_numbers(parts),
    )


def _beside(folder: Path) -> _Rows:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = [path for path in images if path.with_suffix(".txt").is_file()]
    if not images:
        raise InputError(
            f"{folder} must hold {' or '.join(_LISTS[:2])}, or images with a text file of the same name, got neither"
        )
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in images]
    empty = next((path for path, text in zip(images, captions) if not text), None)
    if empty is not None:
        raise InputError(f"{empty.with_suffix('.txt')} must hold a caption, got an empty file")
    return _Rows(LazyImages(images), captions, np.arange(len(images)))


class _Repeated:
    """Each picture once, for rows that name it several times."""

    def __init__(self, pictures: LazyImages, groups: NDArray[np.int64]) -> None:
        self._pictures, self._groups = pictures, groups

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        wanted, place = np.unique(self._groups[rows], return_inverse=True)
        return self._pictures[wanted][place]


def _divide(rows: _Rows, labels: NDArray | None, seed: int, limit: int | None) -> list[NDArray[np.int64]]:
    """Row numbers of the parts; all rows of an image in one of them."""
    _, first = np.unique(rows.groups, return_index=True)
    labels = None if labels is None else labels[first]
    parts = None if rows.parts is None else np.asarray(rows.parts)[first]
    if len(first) < 3:
        raise InputError(f"there must be at least 3 images with captions, got {len(first)}")
    return [
        np.flatnonzero(np.isin(rows.groups, rows.groups[first[chosen]]))
        for chosen in split_rows(labels, parts, len(first), seed, limit)
    ]


def _dataset(
    rows: _Rows, labels: NDArray | None, vocabulary: WordVocabulary, part: NDArray[np.int64], size: int | None
) -> IndexedDataset:
    pictures = rows.images[part]
    planes = pictures[:, None] if pictures.ndim == 3 else pictures.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(planes)).float() / 255
    if size is not None and images.shape[2:] != (size, size) and len(images):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    ids = vocabulary.encode([rows.captions[row] for row in part])
    targets = None if labels is None else torch.from_numpy(labels[part]).long()
    return IndexedDataset((images, ids), targets, torch.from_numpy(part))
