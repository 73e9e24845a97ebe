"""A text collection with queries and relevance judgements, made ready for training and scoring retrieval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coloss.data.dataset import RetrievalSplits
from coloss.data.judgements import Judgements
from coloss.data.query_document_pairs import QueryDocumentPairs
from coloss.data.splitting import TEST, TRAIN, VALIDATION, split_rows
from coloss.data.text import TextFeatures, fit_text_encoder
from coloss.errors import InputError

FEWEST_QUERIES = 5
"""Fewer queries with a relevant document than this cannot be divided into train, validation and test."""


@dataclass(frozen=True)
class TextCollection:
    """Queries, documents and judgements as text and row numbers, before anything is divided or encoded.

    Args:
        name: what messages and tables call it.
        documents: text of each.
        queries: text of each.
        judged: int64 (judgements, 2): row of the query and row of the document of each judged pair, each pair once.
        grades: (judgements,): how well the document answers the query, relevant where > 0.
        titles: of the documents, which stand before their texts; or None.
        parts: `TRAIN`, `VALIDATION` or `TEST` for each query, or None.
        labels: the documents are names of labels, see `retrieval_splits`.
        note: what a reader should know of the reading.

    Examples:
        >>> judged, grades = np.array([[0, 1], [1, 0]]), np.array([1.0, 2.0])
        >>> TextCollection("toy", ["a red fox", "a hen"], ["bird", "animal"], judged, grades).queries[1]
        'animal'
    """

    name: str
    documents: Sequence[str]
    queries: Sequence[str]
    judged: NDArray
    grades: NDArray
    titles: Sequence[str] | None = None
    parts: NDArray | None = None
    labels: bool = False
    note: str = ""


def retrieval_splits(
    collection: TextCollection,
    *,
    seed: int = 0,
    limit: int | None = None,
    text_features: TextFeatures = "tfidf",
) -> RetrievalSplits:
    """Training, validation and test queries of a collection, with the features of queries and documents.

    - Queries keep the part that the collection names. A missing test part takes a fifth of the training queries, a missing validation
      part a fifth of what an official training part holds; without a training part the validation part stands in for it, and test
      queries alone are divided 60 / 20 / 20, as are queries without any part. Drawn by seed.
    - A document's title and text are joined. The text encoder is fitted on the documents and the training queries: the collection is
      known when a retriever is trained, the other queries are not.
    - Names of labels say little by themselves. A label's features are those of its name and of the training queries that it answers: the
      mean of their vectors, brought back to their mean length. The encoder is fitted on those texts.
    - Queries without a relevant document are left out. A document that is the query itself, word for word, is ignored for that query
      unless it was judged.

    Args:
        collection: the texts.
        seed: of the division, >= 0.
        limit: at most so many queries in each part; the documents stay all.
        text_features: see `fit_text_encoder`.

    Raises:
        InputError: for fewer than 5 queries with a relevant document, or a part without one.

    Examples:
        >>> words = ["fox", "hen", "cow", "dog", "cat", "owl"]
        >>> documents = [f"all about the {word}" for word in words]
        >>> same = np.repeat(np.arange(6)[:, None], 2, axis=1)
        >>> splits = retrieval_splits(TextCollection("animals", documents, words, same, np.ones(6)))
        >>> len(splits.train), splits.test_relevance.shape, splits.description
        (4, torch.Size([1, 6]), '6 documents; queries: 4 train, 1 validation, 1 test, drawn by seed 0; 4 training pairs')
    """
    relevant = collection.grades > 0
    answered = np.unique(collection.judged[relevant, 0])
    if len(answered) < FEWEST_QUERIES:
        raise InputError(
            f"{collection.name} has {len(answered)} queries with a relevant document: at least {FEWEST_QUERIES} are needed to train, "
            "validate and test"
        )
    given, origin = _usable_parts(collection, answered, seed)
    parts = [answered[rows] for rows in split_rows(None, given, len(answered), seed, limit)]
    for part, rows in zip(("train", "validation", "test"), parts, strict=True):
        if not len(rows):
            raise InputError(f"{collection.name} has too few queries to hold some out for {part}")
    titles = collection.titles or [""] * len(collection.documents)
    texts = [f"{title} {text}".strip() for title, text in zip(titles, collection.documents, strict=True)]
    query_texts = [[collection.queries[row] for row in rows] for rows in parts]
    encoder = fit_text_encoder([*texts, *query_texts[0]], text_features)
    features = [torch.from_numpy(encoder(part)) for part in query_texts]
    judged = _judgements(collection, texts)
    train, validation, test = (judged.of(torch.from_numpy(rows)) for rows in parts)
    documents = torch.from_numpy(encoder(texts))
    if collection.labels:
        documents = _described_by_queries(documents, features[0], train.pairs)
    pairs = QueryDocumentPairs(features[0], documents, train.pairs)
    counts = ", ".join(
        f"{len(rows):,} {part}" for rows, part in zip(parts, ("train", "validation", "test"), strict=True)
    )
    what = "labels" if collection.labels else "documents"
    notes = [f"{len(texts):,} {what}", f"queries: {counts}, {origin}", f"{len(pairs):,} training pairs"]
    return RetrievalSplits(
        collection.name,
        pairs,
        documents,
        train_queries=features[0],
        train_judgements=train,
        validation_queries=features[1],
        validation_judgements=validation,
        test_queries=features[2],
        test_judgements=test,
        input_shape=(documents.shape[1],),
        feature_names=encoder.feature_names,
        description="; ".join([*notes, collection.note] if collection.note else notes),
    )


def _usable_parts(collection: TextCollection, answered: NDArray, seed: int) -> tuple[NDArray | None, str]:
    """Parts of the answered queries, None where all must be drawn; and in words where they come from."""
    drawn = f"drawn by seed {seed}"
    if collection.parts is None:
        return None, drawn
    parts = collection.parts[answered]
    there = set(np.unique(parts).tolist())
    if there == {TRAIN, VALIDATION, TEST}:
        return parts, "as the data say"
    if there == {TRAIN, TEST}:
        return parts, f"test as the data say, validation {drawn}"
    if there == {TRAIN, VALIDATION}:
        return parts, f"validation as the data say, test {drawn}"
    if there == {VALIDATION, TEST}:
        parts = np.where(parts == VALIDATION, TRAIN, parts)
        return parts, f"test as the data say, the rest from the validation part {drawn}"
    only = next(
        name for name, part in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)) if part in there
    )
    return None, f"all of the data's {only} part, {drawn}"


def _judgements(collection: TextCollection, texts: Sequence[str]) -> Judgements:
    """Relevant pairs of all queries; documents that are the query itself are ignored."""
    same: dict[str, list[int]] = {}
    for row, (bare, joined) in enumerate(zip(collection.documents, texts, strict=True)):
        for text in {_plain(bare), _plain(joined)} - {""}:
            same.setdefault(text, []).append(row)
    known = set(map(tuple, collection.judged.tolist()))
    ignore = [
        (query, row)
        for query, text in enumerate(collection.queries)
        for row in same.get(_plain(text), ())
        if (query, row) not in known
    ]
    relevant = collection.grades > 0
    return Judgements(
        len(collection.queries),
        len(texts),
        torch.from_numpy(collection.judged[relevant].astype(np.int64)),
        torch.from_numpy(collection.grades[relevant].astype(np.float32)),
        torch.tensor(ignore, dtype=torch.int64).reshape(-1, 2),
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _described_by_queries(names: Any, queries: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Mean vector of each label's name and training queries, as long as these are on average."""
    rows, labels = pairs.unbind(1)
    total = names.clone().index_add_(0, labels, queries[rows])
    lengths = names.norm(dim=1).index_add_(0, labels, queries.norm(dim=1)[rows])
    counted = (names.norm(dim=1) > 0).float() + torch.bincount(labels, minlength=len(names))
    size = total.norm(dim=1)
    scale = lengths / counted.clamp(min=1) / torch.where(size > 0, size, 1.0)
    return total * scale[:, None]
