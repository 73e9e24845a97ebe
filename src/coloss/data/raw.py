"""Data sets as they are stored, without splitting, scaling or encoding."""

from typing import Any

import numpy as np
import pandas as pd

from coloss.data.catalog import DatasetInfo, dataset_info, locate
from coloss.data.formats import read_arrays, read_json_lines, read_table, read_text


def load_raw(name: str) -> dict[str, Any]:
    """Contents of a data set by field, as stored.

    - an `.npz` set: its arrays. Of a file that holds several sets, the ones of this set, without the set's name in front: `train_x`,
      `train_y`, `test_x`, `test_y`, `classes` of the UCR/UEA series; `x`, `y`, and `classes` if it has classes, of the UCI tables;
      `values`, `columns`, `start`, `splits` of the ETT series.
    - a parquet set: `{"table": DataFrame}`.
    - Cranfield: `{"documents", "queries", "judgements"}`, DataFrames; a judgement holds the ids of a query and a document and a grade.
    - a text: `{"text": str}`.
    - a set embedded in scikit-learn: `x`, `y`, `feature_names` (of a table), `class_names` (of a classification).

    Args:
        name: of the data set, as in `DATASETS`.

    Raises:
        UnknownNameError: if no data set has this name.
        DataNotFoundError: if its file is not there.
        InputError: if its file is broken.

    Examples:
        >>> {field: array.shape for field, array in load_raw("iris").items()}
        {'x': (150, 4), 'y': (150,), 'feature_names': (4,), 'class_names': (3,)}
    """
    info = dataset_info(name)
    if info.file is None:
        return _embedded(name)
    path = locate(name)
    if path.suffix == ".npz":
        return _member(info, read_arrays(path))
    if path.suffix == ".parquet":
        return {"table": read_table(path)}
    if path.name.endswith(".jsonl.gz"):
        return _collection(read_json_lines(path))
    return {"text": read_text(path)}


def _member(info: DatasetInfo, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if info.member is None:
        return arrays
    if info.member in arrays:
        shared = {field: array for field, array in arrays.items() if field in ("columns", "start", "splits")}
        return {"values": arrays[info.member], **shared}
    # "wine" must not take the fields of "wine_quality", which are wine_quality_x and wine_quality_y.
    fields = ("x", "y", "classes", "train_x", "train_y", "test_x", "test_y")
    return {field: arrays[f"{info.member}_{field}"] for field in fields if f"{info.member}_{field}" in arrays}


def _collection(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tables = {"documents": "doc", "queries": "query", "judgements": "rel"}
    return {
        field: pd.DataFrame(
            [
                {key: value for key, value in row.items() if key != "kind"}
                for row in rows
                if row["kind"] == kind
            ]
        )
        for field, kind in tables.items()
    }


def _embedded(name: str) -> dict[str, Any]:
    # scikit-learn takes a second to import, which the sets in files need not spend.
    from sklearn import datasets

    if name == "diabetes":
        bunch = datasets.load_diabetes(scaled=False)
        return {"x": bunch.data, "y": bunch.target, "feature_names": np.array(bunch.feature_names)}
    if name == "digits":
        bunch = datasets.load_digits()
        return {
            "x": bunch.images.astype(np.uint8),
            "y": bunch.target,
            "class_names": bunch.target_names.astype(str),
        }
    loaders = {
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
        "breast-cancer": datasets.load_breast_cancer,
    }
    bunch = loaders[name]()
    names = {"feature_names": np.array(bunch.feature_names), "class_names": np.array(bunch.target_names)}
    return {"x": bunch.data, "y": bunch.target, **names}
