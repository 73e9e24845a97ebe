"""Collections become queries, documents and judgements that say what the texts and grades said."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coloss import Budget, fit
from coloss.data import (
    RETRIEVAL_VIEWS,
    Judgements,
    QueryDocumentPairs,
    TextCollection,
    known_collection,
    load,
    load_raw,
    retrieval_splits,
)
from coloss.errors import InputError, UnknownNameError
from coloss.metrics import retrieval_metrics, retrieval_metrics_from_embeddings
from coloss.nn import MLP, DualEncoder


def test_judgements_survive_choosing_queries():
    grades = torch.randint(-3, 4, (6, 5)).clamp(min=0)
    ignore = torch.rand(6, 5) < 0.3
    pairs = grades.nonzero()
    judged = Judgements(6, 5, pairs, grades[pairs[:, 0], pairs[:, 1]].float(), ignore.nonzero())
    rows = torch.tensor([4, 0, 5])
    some = judged.of(rows)
    assert torch.equal(some.dense(), grades[rows].float()) and torch.equal(some.ignored(), ignore[rows])
    assert some.queries == 3 and judged.of(rows[:0]).dense().shape == (0, 5)


def test_pairs_share_their_tables():
    queries, documents = torch.randn(4, 3), torch.randn(6, 2)
    rows = torch.tensor([[0, 5], [3, 5], [3, 1], [2, 0], [0, 0]])
    pairs = QueryDocumentPairs(queries, documents, rows)
    batch = pairs.take(torch.tensor([2, 0]))
    assert torch.equal(batch.inputs[0], queries[[3, 0]]) and torch.equal(batch.inputs[1], documents[[1, 5]])
    assert batch.extras["query"].tolist() == batch.targets[0].tolist() == [3, 0]
    assert batch.extras["document"].tolist() == batch.targets[1].tolist() == [1, 5]
    every = pairs.all()
    assert torch.equal(pairs.inputs[1], documents[rows[:, 1]]) and torch.equal(
        every.inputs[0], pairs.inputs[0]
    )
    part = pairs.subset(torch.tensor([4, 1])).to("cpu")
    assert part.ids.tolist() == [4, 1] and len(part) == 2 and len(pairs) == 5
    (query, document), target, number = part[1]
    assert torch.equal(query, queries[3]) and torch.equal(document, documents[5])
    assert (int(target[1]), int(number)) == (5, 1)
    assert part.documents is documents  # nothing was copied


def test_pairs_train_as_any_data_set():
    torch.manual_seed(0)
    tables, rows = (torch.randn(9, 4), torch.randn(9, 4)), torch.arange(9)[:, None].expand(-1, 2)
    lazy, held = QueryDocumentPairs(*tables, rows), [(tables, None)]
    weights = []
    for data in (lazy, held):
        torch.manual_seed(0)
        model = DualEncoder(MLP(4, [8], 4), MLP(4, [8], 4))
        fit(
            model,
            data,
            lambda outputs, targets: F.mse_loss(*outputs),
            budget=Budget(steps=1),
            batch_size=9,
            seed=0,
        )
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights)


def small(**changes):
    words = ("fox", "hen", "cow", "dog", "cat", "owl", "bee", "ant")
    same = np.repeat(np.arange(8)[:, None], 2, axis=1)
    options = {
        "name": "animals",
        "documents": [f"about the {word}" for word in words],
        "queries": list(words),
        "judged": same,
        "grades": np.ones(8),
    }
    return TextCollection(**(options | changes))


def test_queries_without_an_answer_are_left_out():
    grades = np.array([1, 1, 0, 1, 1, 1, 0, 1.0])
    splits = retrieval_splits(small(grades=grades))
    assert sum(len(getattr(splits, f"{part}_queries")) for part in ("train", "validation", "test")) == 6
    assert len(splits.documents) == 8
    with pytest.raises(InputError, match="animals has 3 queries with a relevant document: at least 5"):
        retrieval_splits(small(grades=np.arange(8) < 3))
    with pytest.raises(InputError, match="seed must be >= 0, got -1"):
        retrieval_splits(small(), seed=-1)


def test_labels_are_described_by_training_queries():
    queries = [f"{a} {b}" for a in ("red", "blue") for b in ("one", "two", "three", "four", "five", "six")]
    judged = np.stack([np.arange(12), np.repeat([0, 1], 6)], 1)
    splits = retrieval_splits(
        TextCollection("toy", ["zz", "blue"], queries, judged, np.ones(12), labels=True), seed=1
    )
    vectors, rows = splits.train_queries, splits.train_relevance
    for label in (0, 1):
        members = vectors[rows[:, label] > 0]
        name = splits.documents.new_zeros(vectors.shape[1])
        for word in ("zz", "blue")[label].split():
            name[splits.feature_names.index(word)] = 1
        mean = F.normalize(members.sum(0) + name, dim=0)
        torch.testing.assert_close(splits.documents[label], mean)


def test_banking77_finds_intents(needs):
    splits = load(needs("banking77"), kind="retrieval", limit=300)
    assert splits.documents.shape[0] == 77 and len(splits.test_queries) == 300
    assert (splits.test_relevance.sum(1) == 1).all() and len(splits.train) == 300
    assert "test as the data say" in splits.description


def test_reuters_keeps_all_topics_of_an_article(needs):
    collection = known_collection(needs("reuters"))
    multilabel = load("reuters", limit=50)
    splits = load("reuters", kind="retrieval", limit=50)
    assert len(collection.documents) == 90 == multilabel.num_classes and "money fx" in collection.documents
    counts = np.bincount(collection.judged[:, 0])
    assert counts.min() == 1 and counts.max() > 5
    assert splits.test_relevance.sum(1).max() > 1 and len(splits.train) == splits.train_relevance.sum()


@pytest.mark.parametrize("name", ["sick", "sts"])
def test_sentence_pairs_are_graded(needs, name):
    table = load_raw(needs(name))["table"]
    collection = known_collection(name)
    grades = dict(zip(map(tuple, collection.judged.tolist()), collection.grades.tolist(), strict=True))
    documents = {text: row for row, text in enumerate(collection.documents)}
    queries = {text: row for row, text in enumerate(collection.queries)}
    once = table[~table.duplicated(["sentence_A", "sentence_B"], keep=False)].head(300)
    for first, second, score in once[["sentence_A", "sentence_B", "score"]].itertuples(index=False):
        expected = score - 3 if score >= 4 else 0
        assert grades[queries[first], documents[second]] == pytest.approx(expected, abs=1e-5)
    assert len(grades) == len(table.drop_duplicates(["sentence_A", "sentence_B"]))
    if name == "sts":
        old = set(table[table["year"] < 2015]["sentence_A"])
        assert all((collection.parts[row] == 0) == (text in old) for text, row in queries.items())


def test_the_streamed_metrics_are_those_of_the_scores(needs):
    splits = load(needs("sick"), kind="retrieval", limit=60, text_features="hashing")
    judged = splits.test_judgements
    assert len(judged.ignore) and len(judged.grades.unique()) > 3
    projection = torch.randn(splits.documents.shape[1], 16)
    queries, documents = splits.test_queries @ projection, splits.documents @ projection
    expected = retrieval_metrics(
        queries.double() @ documents.double().T, splits.test_relevance, ignore=judged.ignored()
    )
    found = retrieval_metrics_from_embeddings(
        queries,
        documents,
        judged.pairs,
        grades=judged.grades,
        ignore=judged.ignore,
        metric="inner",
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_only_some_sets_can_be_searched():
    assert set(RETRIEVAL_VIEWS) == {"banking77", "reuters", "sick", "sts"}
    with pytest.raises(
        InputError,
        match="'digits' has no queries and documents, these have: banking77, cranfield, reuters, sick, sts",
    ):
        load("digits", kind="retrieval")
    with pytest.raises(
        UnknownNameError, match="no data set is called 'crandfield'; did you mean 'cranfield'"
    ):
        load("crandfield", kind="retrieval")
