"""A text collection with queries and relevance judgements, made ready for training and scoring retrieval."""

from typing import Any

import torch

from coloss.data.dataset import IndexedDataset, RetrievalSplits
from coloss.data.raw import load_raw
from coloss.data.splitting import split_rows
from coloss.data.text import TextFeatures, fit_text_encoder


def retrieval_splits(
    name: str, *, seed: int = 0, limit: int | None = None, text_features: TextFeatures = "tfidf"
) -> RetrievalSplits:
    """Queries of a collection divided 60 / 20 / 20 by seed, with the features of queries and documents.

    A document's title and text are joined. The text encoder is fitted on the documents and the training queries: the collection is known
    when a retriever is trained, the other queries are not. Queries without a relevant document are left out.

    Args:
        name: of the data set.
        seed: of the division.
        limit: at most so many queries in each part; the documents stay all.
        text_features: see `fit_text_encoder`.
    """
    raw = load_raw(name)
    documents, queries, judgements = raw["documents"], raw["queries"], raw["judgements"]
    relevant = judgements[judgements["grade"] > 0]
    document_rows = {number: row for row, number in enumerate(documents["id"])}
    answered = queries[queries["id"].isin(relevant["query"])].reset_index(drop=True)
    query_rows = {number: row for row, number in enumerate(answered["id"])}
    relevance = torch.zeros(len(answered), len(documents), dtype=torch.bool)
    for query, document in zip(relevant["query"], relevant["doc"], strict=True):
        relevance[query_rows[query], document_rows[document]] = True
    parts = split_rows(None, None, len(answered), seed, limit)
    document_texts = (documents["title"].fillna("") + " " + documents["text"].fillna("")).tolist()
    query_texts = answered["text"].to_numpy(dtype=object)
    encoder = fit_text_encoder([*document_texts, *query_texts[parts[0]]], text_features)
    document_features = torch.from_numpy(encoder(document_texts))
    features: list[Any] = [torch.from_numpy(encoder(list(query_texts[rows]))) for rows in parts]
    related = [relevance[torch.from_numpy(rows)] for rows in parts]
    query_row, document_row = related[0].nonzero(as_tuple=True)
    pairs = IndexedDataset(
        (features[0][query_row], document_features[document_row]),
        extras={"query": query_row, "document": document_row},
    )
    counts = ", ".join(
        f"{len(rows)} {part}" for rows, part in zip(parts, ("train", "validation", "test"), strict=True)
    )
    return RetrievalSplits(
        name,
        pairs,
        document_features,
        train_queries=features[0],
        train_relevance=related[0],
        validation_queries=features[1],
        validation_relevance=related[1],
        test_queries=features[2],
        test_relevance=related[2],
        input_shape=(document_features.shape[1],),
        feature_names=encoder.feature_names,
        description=f"{len(documents)} documents; queries: {counts}, drawn by seed {seed}; {len(pairs)} training pairs",
    )
