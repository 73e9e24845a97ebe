"""The data sets known by name, and where their files are looked for. Imports nothing heavy, so that listing them is instant."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from coloss.errors import DataNotFoundError, InputError, UnknownNameError, suggest_names

SUPERVISED_KINDS = ("classification", "regression", "multilabel", "retrieval")
"""The kinds that `load` makes ready for a model; sets of other kinds come from `load_raw`."""

RETRIEVAL_VIEWS: Mapping[str, str] = MappingProxyType(
    {
        "banking77": "find the intent that a question asks for",
        "reuters": "find the topics of an article",
        "sick": "find the sentence that says the same",
        "sts": "find the sentence that says the same",
    }
)
"""Sets of other kinds that `load(name, kind="retrieval")` gives as queries and documents, and what there is to find."""


@dataclass(frozen=True)
class DatasetInfo:
    """What a listing tells of one data set, without reading it.

    Args:
        name: the plain name that `load` and `load_raw` take.
        title: the name in words.
        kind: one of `SUPERVISED_KINDS`, or what else the set is for (motion, music, forecasting, detection ...).
        file: name of the file that holds it, or None if it is embedded in scikit-learn.
        shape: one sample in words.
        classes: number of classes, or the meaning of the target, or None.
        samples: how many, by part where the set comes split.
        licence: terms of the original data.
        source: where the data come from.
        sha256: of the file; None if embedded.
        size: of the file in bytes; None if embedded.
        member: which part of a file that holds several sets.

    Examples:
        >>> DATASETS["cifar10"].samples
        '6,000 train + 2,000 test'
    """

    name: str
    title: str
    kind: str
    file: str | None
    shape: str
    classes: str | int | None
    samples: str
    licence: str
    source: str
    sha256: str | None
    size: int | None = None
    member: str | None = None


def _read_catalog() -> Mapping[str, DatasetInfo]:
    content = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))
    infos = {}
    for name, entry in content["datasets"].items():
        file = content["files"][entry["file"]]
        infos[name] = DatasetInfo(
            name=name,
            title=entry["title"],
            kind=entry["kind"],
            file=entry["file"] if "sha256" in file else None,
            shape=entry["shape"],
            classes=entry.get("classes"),
            samples=entry["samples"],
            licence=file["licence"],
            source=file["source"],
            sha256=file.get("sha256"),
            size=file.get("size"),
            member=entry.get("member"),
        )
    return MappingProxyType(infos)


DATASETS: Mapping[str, DatasetInfo] = _read_catalog()
"""Every data set known by name."""


def dataset_info(name: str) -> DatasetInfo:
    """Catalog entry of a data set.

    Raises:
        UnknownNameError: if no data set has this name; close names are proposed.

    Examples:
        >>> dataset_info("iris").shape
        '4 columns'
        >>> dataset_info("iriss")
        Traceback (most recent call last):
        ...
        coloss.errors.UnknownNameError: no data set is called 'iriss'; did you mean 'iris'?
    """
    if name not in DATASETS:
        hint = suggest_names(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise UnknownNameError(f"no data set is called {name!r}{hint}")
    return DATASETS[name]


def data_directory() -> Path:
    """Folder in which the files of data sets are looked for; it need not exist.

    It is `$COLOSS_DATA` if that is set; else `shared/data` beside the project's checkout when coloss runs from one that has such
    a neighbour; else `~/.cache/coloss`.

    Examples:
        >>> isinstance(data_directory(), Path)
        True
    """
    chosen = os.environ.get("COLOSS_DATA")
    if chosen:
        return Path(chosen).expanduser()
    checkout = Path(__file__).resolve().parents[3]
    beside = checkout.parent / "shared" / "data"
    if (checkout / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    return Path("~/.cache/coloss").expanduser()


def locate(name: str) -> Path:
    """Path of the file that holds a data set.

    Args:
        name: of the data set, as in `DATASETS`.

    Raises:
        UnknownNameError: if no data set has this name.
        InputError: if the set is embedded in scikit-learn and has no file.
        DataNotFoundError: if the file is not there; the message says where it was looked for and how to get it.

    Examples:
        >>> locate("iris")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: 'iris' has no file: it is embedded in scikit-learn
    """
    info = dataset_info(name)
    if info.file is None:
        raise InputError(f"{name!r} has no file: it is embedded in scikit-learn")
    folder = data_directory()
    path = folder / info.file
    if not path.is_file():
        raise DataNotFoundError(
            f"data set {name!r} needs the file {info.file}, which is not in {folder}; it is made from {info.source}: "
            f"put it there, or set COLOSS_DATA to the folder that holds it"
        )
    return path
