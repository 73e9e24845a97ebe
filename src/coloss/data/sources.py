"""The supervised data sets of the catalog, each turned into labelled rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from coloss.data.catalog import dataset_info
from coloss.data.prepare import Labelled
from coloss.data.raw import load_raw
from coloss.data.spectrogram import log_mel_spectrogram
from coloss.data.splitting import TEST, TRAIN, part_numbers
from coloss.errors import InputError, suggest_names

TARGETS: dict[str, tuple[str, ...]] = {
    "openmoji": ("group", "subgroup"),
    "omniglot": ("character", "alphabet"),
    "spoken-digits": ("digit", "speaker"),
    "sick": ("score", "entailment"),
}
"""What can be predicted in the sets that offer a choice; the first is the default."""


def labelled(name: str, target: str | None = None) -> Labelled:
    """Rows of a supervised data set of the catalog.

    Args:
        name: of a classification, multilabel or regression set.
        target: which of its `TARGETS`.

    Raises:
        InputError: if it has no such target.

    Examples:
        >>> labelled("iris").class_names
        ('setosa', 'versicolor', 'virginica')
    """
    offered = TARGETS.get(name)
    if offered is None and target is not None:
        raise InputError(f"data set {name!r} has one target: leave target out, got {target!r}")
    if offered is not None and target is not None and target not in offered:
        raise InputError(
            f"target of {name!r} must be {' or '.join(offered)}, got {target!r}{suggest_names(target, offered)}"
        )
    info = dataset_info(name)
    raw = load_raw(name)
    if info.file is None:
        return _embedded(name, info.kind, raw)
    if info.file in _BY_FILE:
        return _BY_FILE[info.file](name, info.kind, raw)
    return _BY_NAME[name](raw, target or (offered[0] if offered else ""))


def _embedded(name: str, kind: str, raw: dict[str, Any]) -> Labelled:
    if name == "digits":
        return Labelled(
            name, kind, "image", raw["x"].astype(np.float32) / 16, raw["y"], _names(raw["class_names"])
        )
    names = _names(raw["class_names"]) if "class_names" in raw else None
    return Labelled(
        name, kind, "table", raw["x"], raw["y"], names, feature_names=_names(raw["feature_names"])
    )


def _uci(name: str, kind: str, raw: dict[str, Any]) -> Labelled:
    return Labelled(
        name, kind, "table", raw["x"], raw["y"], _names(raw["classes"]) if "classes" in raw else None
    )


def _ucr(name: str, kind: str, raw: dict[str, Any]) -> Labelled:
    inputs, targets, parts = _joined(raw["train_x"], raw["train_y"], raw["test_x"], raw["test_y"])
    note = "series padded with their mean to one length" if np.isnan(inputs).any() else ""
    return Labelled(name, kind, "series", inputs, targets, _names(raw["classes"]), parts, note=note)


def _cifar10(raw: dict[str, Any], _: str) -> Labelled:
    inputs, targets, parts = _joined(raw["x_train"], raw["y_train"], raw["x_test"], raw["y_test"])
    return Labelled("cifar10", "classification", "image", inputs, targets, _names(raw["class_names"]), parts)


def _mnist(raw: dict[str, Any], _: str) -> Labelled:
    digits = tuple("0123456789")
    return Labelled("mnist", "classification", "image", raw["x"], raw["y"], digits, raw["split"])


def _fashion_mnist(raw: dict[str, Any], _: str) -> Labelled:
    names = _names(raw["class_names"])
    return Labelled("fashion-mnist", "classification", "image", raw["x"], raw["y"], names, raw["split"])


def _omniglot(raw: dict[str, Any], target: str) -> Labelled:
    field, names = ("y", "char_names") if target == "character" else ("alphabet", "alphabet_names")
    return Labelled("omniglot", "classification", "image", raw["x"], raw[field], _names(raw[names]))


def _openmoji(raw: dict[str, Any], target: str) -> Labelled:
    names = _names(raw[f"{target}_names"])
    return Labelled("openmoji", "classification", "image", raw["image"], raw[target], names, raw["split"])


def _ecg5000(raw: dict[str, Any], _: str) -> Labelled:
    names = _names(raw["class_names"])
    return Labelled("ecg5000", "classification", "series", raw["x"][:, None], raw["y"], names, raw["split"])


class _Spectrograms:
    """Log-mel pictures of recordings, made when rows are asked for: one second in the middle, padded with silence."""

    def __init__(self, raw: dict[str, Any]):
        self.raw, self.samples = raw, int(raw["rate"])

    def __getitem__(self, rows: NDArray) -> NDArray[np.float32]:
        pictures = []
        for chunk in np.array_split(rows, max(1, -(-len(rows) // 256))):
            waveforms = torch.zeros(len(chunk), self.samples)
            for waveform, row in zip(waveforms, chunk, strict=True):
                start, length = int(self.raw["start"][row]), int(self.raw["length"][row])
                kept = min(length, self.samples)
                start += (length - kept) // 2
                offset = (self.samples - kept) // 2
                sound = torch.from_numpy(self.raw["audio"][start : start + kept].astype(np.float32))
                waveform[offset : offset + kept] = sound / 32768
            pictures.append(log_mel_spectrogram(waveforms, float(self.raw["rate"])))
        return torch.cat(pictures).numpy()


def _spoken_digits(raw: dict[str, Any], target: str) -> Labelled:
    names = tuple("0123456789") if target == "digit" else _names(raw["speaker_names"])
    note = "log-mel spectrogram (40 bands, 16 ms steps) of the middle second"
    return Labelled(
        "spoken-digits",
        "classification",
        "series",
        _Spectrograms(raw),
        raw[target],
        names,
        raw["split"],
        note=note,
    )


def _adult(raw: dict[str, Any], _: str) -> Labelled:
    table: pd.DataFrame = raw["table"]
    targets, names = _codes(table["income"])
    inputs = table.drop(columns=["income", "split"])
    return Labelled(
        "adult", "classification", "table", inputs, targets, names, part_numbers(table["split"].to_numpy())
    )


def _text(
    name: str, columns: tuple[str, ...], label: str, names: tuple[str, ...] | None = None
) -> Callable[..., Labelled]:
    def build(raw: dict[str, Any], _: str) -> Labelled:
        table: pd.DataFrame = raw["table"]
        texts = table[columns[0]].astype(object)
        for column in columns[1:]:
            texts = texts + " " + table[column].astype(object)
        targets, found = (table[label].to_numpy(), names) if names else _codes(table[label])
        parts = part_numbers(table["split"].to_numpy())
        return Labelled(name, "classification", "text", texts.to_numpy(), targets, found, parts)

    return build


def _sick(raw: dict[str, Any], target: str) -> Labelled:
    table: pd.DataFrame = raw["table"]
    pairs = table[["sentence_A", "sentence_B"]].to_numpy(dtype=object)
    parts = part_numbers(table["split"].to_numpy())
    note = "pairs as |a - b| and a * b of the two text vectors"
    if target == "score":
        return Labelled(
            "sick", "regression", "pair", pairs, table["score"].to_numpy(), None, parts, note=note
        )
    targets, names = _codes(table["entailment"])
    return Labelled("sick", "classification", "pair", pairs, targets, names, parts, note=note)


def _sts(raw: dict[str, Any], _: str) -> Labelled:
    table: pd.DataFrame = raw["table"]
    pairs = table[["sentence_A", "sentence_B"]].to_numpy(dtype=object)
    parts = np.where(table["year"] < 2015, TRAIN, TEST)
    note = "pairs as |a - b| and a * b of the two text vectors; test: the years 2015 and 2016"
    return Labelled("sts", "regression", "pair", pairs, table["score"].to_numpy(), None, parts, note=note)


def _reuters(raw: dict[str, Any], _: str) -> Labelled:
    table: pd.DataFrame = raw["table"]
    topics = [set(entry.split()) for entry in table["topics"]]
    parts = part_numbers(table["split"].to_numpy())
    assert parts is not None
    seen = [
        set().union(*(found for found, part in zip(topics, parts, strict=True) if part == one))
        for one in (TRAIN, TEST)
    ]
    names = tuple(sorted(seen[0] & seen[1]))
    targets = np.array([[name in found for name in names] for found in topics], dtype=np.float32)
    kept = targets.any(axis=1)
    texts = (table["title"].astype(object) + " " + table["body"].astype(object)).to_numpy()
    note = "the 90 topics that occur in train and test; articles without any of them are left out"
    return Labelled(
        "reuters", "multilabel", "text", texts[kept], targets[kept], names, parts[kept], note=note
    )


_BY_FILE: dict[str, Callable[[str, str, dict[str, Any]], Labelled]] = {
    "tabular_uci_seven.npz": _uci,
    "series_ucr_six.npz": _ucr,
}

_BY_NAME: dict[str, Callable[[dict[str, Any], str], Labelled]] = {
    "cifar10": _cifar10,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "omniglot": _omniglot,
    "openmoji": _openmoji,
    "spoken-digits": _spoken_digits,
    "ecg5000": _ecg5000,
    "adult": _adult,
    "clinc150": _text("clinc150", ("text",), "intent"),
    "banking77": _text("banking77", ("text",), "intent"),
    "sst2": _text("sst2", ("text",), "label", ("negative", "positive")),
    "ag-news": _text("ag-news", ("title", "text"), "label", ("World", "Sports", "Business", "Sci/Tech")),
    "pubmedqa": _text("pubmedqa", ("question", "context"), "answer"),
    "sick": _sick,
    "sts": _sts,
    "reuters": _reuters,
}


def _names(array: NDArray) -> tuple[str, ...]:
    return tuple(str(name) for name in array)


def _codes(column: pd.Series) -> tuple[NDArray, tuple[str, ...]]:
    names, codes = np.unique(column.to_numpy(dtype=object), return_inverse=True)
    return codes, _names(names)


def _joined(
    train_x: NDArray, train_y: NDArray, test_x: NDArray, test_y: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    parts = np.repeat([TRAIN, TEST], [len(train_x), len(test_x)])
    return np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y]), parts
