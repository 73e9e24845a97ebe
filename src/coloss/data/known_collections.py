"""The data sets of the catalog that can be searched, each as queries, documents and judgements."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coloss.data.catalog import DATASETS, RETRIEVAL_VIEWS, dataset_info
from coloss.data.collection import TextCollection
from coloss.data.raw import load_raw
from coloss.data.sources import labelled
from coloss.data.splitting import TEST, TRAIN
from coloss.errors import InputError

NEARLY_THE_SAME = 4.0
"""Score of a pair of sentences, of at most 5, from which one answers the other."""


def known_collection(name: str) -> TextCollection:
    """Collection of a data set that is one, or can be seen as one.

    - `cranfield`: as it is.
    - `banking77`: a question asks for its intent, among 77; `reuters`: an article asks for its topics, among 90.
    - `sick`, `sts`: the first sentence of a pair asks for the second, among all second sentences. It answers with a score of 4 of 5 or
      more, and its grade is the score - 3; the scores of a pair that was judged more than once are averaged. Pairs that nobody
      judged count as irrelevant. `sts` tests on the queries that are new in 2015 and 2016.

    Args:
        name: of the data set.

    Raises:
        UnknownNameError: if no data set has this name.
        InputError: if it cannot be searched.
        DataNotFoundError: if its file is not there.

    Examples:
        >>> known_collection("iris")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: data set 'iris' has no queries and documents, these have: banking77, cranfield, reuters, sick, sts
    """
    info = dataset_info(name)
    if info.kind == "retrieval":
        return _tables(name, load_raw(name))
    if name not in RETRIEVAL_VIEWS:
        searched = [
            *RETRIEVAL_VIEWS,
            *(other for other, info in DATASETS.items() if info.kind == "retrieval"),
        ]
        raise InputError(
            f"data set {name!r} has no queries and documents, these have: {', '.join(sorted(searched))}"
        )
    return _sentence_pairs(name, load_raw(name)["table"]) if "pair" in info.shape else _labels(name)


def _tables(name: str, raw: dict[str, Any]) -> TextCollection:
    documents, queries, judgements = raw["documents"], raw["queries"], raw["judgements"]
    judged = np.stack(
        [_rows(queries["id"], judgements["query"]), _rows(documents["id"], judgements["doc"])], 1
    )
    return TextCollection(
        name,
        documents["text"].fillna("").tolist(),
        queries["text"].tolist(),
        judged,
        judgements["grade"].to_numpy(dtype=np.float32),
        documents["title"].fillna("").tolist(),
    )


def _rows(ids: pd.Series, wanted: pd.Series) -> NDArray:
    return pd.Index(ids).get_indexer(pd.Index(wanted))


def _labels(name: str) -> TextCollection:
    rows = labelled(name)
    assert rows.class_names is not None
    names = [text.replace("_", " ").replace("-", " ") for text in rows.class_names]
    if rows.kind == "multilabel":
        judged = np.stack(np.nonzero(rows.targets), 1)
    else:
        judged = np.stack([np.arange(len(rows.targets)), rows.targets], 1)
    grades = np.ones(len(judged), dtype=np.float32)
    note = "a label is described by its name and its training queries" + (
        f"; {rows.note}" if rows.note else ""
    )
    return TextCollection(
        name, names, list(rows.inputs), judged, grades, parts=rows.parts, labels=True, note=note
    )


def _sentence_pairs(name: str, table: pd.DataFrame) -> TextCollection:
    scores = table.groupby(["sentence_A", "sentence_B"], sort=False)["score"].mean().reset_index()
    queries, documents = (pd.Index(scores[column].unique()) for column in ("sentence_A", "sentence_B"))
    judged = np.stack(
        [queries.get_indexer(scores["sentence_A"]), documents.get_indexer(scores["sentence_B"])], 1
    )
    close = scores["score"].to_numpy()
    grades = np.where(close >= NEARLY_THE_SAME, close - (NEARLY_THE_SAME - 1), 0.0).astype(np.float32)
    parts = None
    if "year" in table:
        old = queries.isin(table.loc[table["year"] < 2015, "sentence_A"])
        parts = np.where(old, TRAIN, TEST)
    note = "relevant from a score of 4 of 5, graded by score - 3"
    return TextCollection(name, documents.tolist(), queries.tolist(), judged, grades, parts=parts, note=note)
