"""Collections in files of one's own are read as they stand, and what is wrong with them is said in one line."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch

from coloss.data import RetrievalSplits, holds_collection, load, read_collection
from coloss.errors import DataNotFoundError, InputError

ANIMALS = ("fox", "hen", "cow", "dog", "cat", "owl", "bee", "ant", "elk", "eel", "emu", "yak")


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def write_beir(folder, parts=("train", "dev", "test")):
    """The layout of BEIR: twelve queries, each with its own document (grade 2) and the next one (grade 1)."""
    documents = [
        {"_id": f"d{i}", "title": f"The {name}", "text": f"all about the {name}", "metadata": {}}
        for i, name in enumerate(ANIMALS)
    ]
    queries = [
        {"_id": f"q{i}", "text": f"where is a {name}", "metadata": {}} for i, name in enumerate(ANIMALS)
    ]
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    for number, part in enumerate(parts):
        lines = ["query-id\tcorpus-id\tscore"]
        for i in range(number, 12, len(parts)):
            lines += [f"q{i}\td{i}\t2", f"q{i}\td{(i + 1) % 12}\t1", f"q{i}\td{(i + 2) % 12}\t0"]
        (folder / "qrels" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_of_beir_is_read_as_it_is(tmp_path):
    splits = load(write_beir(tmp_path))
    assert isinstance(splits, RetrievalSplits)
    assert "queries: 4 train, 4 validation, 4 test, as the data say" in splits.description
    expected = torch.zeros(4, 12)  # queries 2, 5, 8, 11 are the test part
    for row, query in enumerate((2, 5, 8, 11)):
        expected[row, query], expected[row, (query + 1) % 12] = 2, 1
    assert torch.equal(splits.test_relevance, expected)
    assert len(splits.train) == 8 and splits.documents.shape[0] == 12
    assert "the" in splits.feature_names  # of title or text


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".jsonl.gz", ".csv.gz", ".parquet"])
def test_formats_agree(tmp_path, suffix):
    tables = {
        "documents": pd.DataFrame({"id": ["007", "8"], "text": ["NA", "of, owls"], "title": ["x", ""]}),
        "queries": pd.DataFrame({"query_id": [1, 2], "query": ["null", "owl"]}),
        "judgements": pd.DataFrame({"query": [1, 2], "document": ["007", "8"], "grade": [1, 3]}),
    }
    for name, table in tables.items():
        path = tmp_path / f"{name}{suffix}"
        if "jsonl" in suffix:
            text = table.to_json(orient="records", lines=True)
            path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
        elif suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    for collection in (
        read_collection(tmp_path),
        read_collection(*(tmp_path / f"{name}{suffix}" for name in tables)),
    ):
        assert collection.documents == ["NA", "of, owls"] and collection.titles == ["x", ""]
        assert collection.queries == ["null", "owl"] and collection.parts is None
        assert collection.judged.tolist() == [[0, 0], [1, 1]] and collection.grades.tolist() == [1, 3]


def test_lines_may_hold_separators_of_unicode(tmp_path):
    write_beir(tmp_path)
    rows = [{"_id": f"d{i}", "text": f"one\u2028two\x85{name}"} for i, name in enumerate(ANIMALS)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    assert read_collection(tmp_path).documents[0] == "one\u2028two\x85fox"


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_quotes_of_a_tsv_swallow_no_document(tmp_path, suffix):
    texts = ['an "open" one', '"left open', "plain", 'closed"', '"Hello" he said', *"abcde"]
    rows = ["id\ttext", *(f"{number}\t{text}" for number, text in enumerate(texts))]
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(
        gzip.compress("\n".join(rows).encode()) if suffix.endswith("gz") else "\n".join(rows).encode()
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "plain"}])
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t2\t1\n")
    assert read_collection(tmp_path).documents == texts


@pytest.mark.parametrize(
    "texts", [["a\ttab", "none"], ["two\nlines", "none"], ['a "word"', '"all"'], ["", "x"]]
)
def test_a_tsv_with_quoted_cells_is_read_as_it_was_meant(tmp_path, texts):
    frame = pd.DataFrame({"id": [1, 2], "text": texts, "title": ["of", "it"]})
    frame.to_csv(tmp_path / "corpus.tsv", sep="\t", index=False)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "plain"}])
    (tmp_path / "qrels.tsv").write_text('"query-id"\t"corpus-id"\n"q"\t"2"\n')
    collection = read_collection(tmp_path)
    assert collection.documents == texts and collection.judged.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("parts", "sizes", "words"),
    [
        (("test",), (7, 3, 2), "all of the data's test part, drawn by seed 0"),
        (("train", "test"), (5, 1, 6), "test as the data say, validation drawn by seed 0"),
        (
            ("dev", "test"),
            (5, 1, 6),
            "test as the data say, the rest from the validation part drawn by seed 0",
        ),
        (("train", "dev"), (5, 6, 1), "validation as the data say, test drawn by seed 0"),
    ],
)
def test_missing_parts_are_drawn_by_query(tmp_path, parts, sizes, words):
    splits = load(write_beir(tmp_path, parts))
    assert tuple(len(getattr(splits, f"{part}_queries")) for part in ("train", "validation", "test")) == sizes
    assert words in splits.description
    again = load(tmp_path)
    other = load(tmp_path, seed=1)
    assert torch.equal(splits.train_queries, again.train_queries)
    assert not torch.equal(splits.train_relevance, other.train_relevance)


def test_parts_may_be_a_column(tmp_path):
    names = ["train"] * 8 + ["dev"] * 2 + ["test"] * 2
    texts = pd.DataFrame({"id": range(12), "text": [f"about the {name}" for name in ANIMALS]})
    texts.to_csv(tmp_path / "docs.csv", index=False)
    judged = pd.DataFrame({"qid": range(12), "docid": range(12)})
    texts.to_csv(tmp_path / "queries.csv", index=False)
    judged.assign(split=names).to_csv(tmp_path / "qrels.csv", index=False)
    by_judgement = load(tmp_path)
    judged.to_csv(tmp_path / "qrels.csv", index=False)
    texts.assign(split=names).to_csv(tmp_path / "queries.csv", index=False)
    by_query = load(tmp_path)
    for splits in (by_judgement, by_query):
        assert "8 train, 2 validation, 2 test, as the data say" in splits.description
        assert splits.test_relevance.argmax(1).tolist() == [10, 11]


def test_a_document_that_is_the_query_is_ignored_unless_judged(tmp_path):
    texts = pd.DataFrame({"id": range(12), "text": [f"about the {name}" for name in ANIMALS]})
    texts.to_csv(tmp_path / "corpus.csv", index=False)
    texts.assign(text=texts["text"].str.upper()).to_csv(tmp_path / "queries.csv", index=False)
    pairs = [(i, (i + 1) % 12) for i in range(12)] + [(0, 0)]
    pd.DataFrame(pairs, columns=["query", "doc"]).assign(
        split=["test"] * 6 + ["train"] * 6 + ["test"]
    ).to_csv(tmp_path / "qrels.csv", index=False)
    judged = load(tmp_path).test_judgements
    assert judged.ignore.tolist() == [[i, i] for i in range(1, 6)]
    assert judged.dense()[0, :2].tolist() == [1, 1]


def test_negative_grades_and_empty_documents_of_trec(tmp_path):
    write_beir(tmp_path)
    corpus = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "corpus.jsonl", [*corpus, {"_id": "empty", "title": "", "text": ""}])
    with (tmp_path / "qrels" / "test.tsv").open("a") as file:
        file.write("q2\tempty\t-1\n")
    splits = load(tmp_path)
    assert splits.test_relevance[0, 12] == 0 and "1 documents without text" in splits.description


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("qrels/test.tsv", "q2\td2", "q99\td2", r"test.tsv judges the query 'q99', which .*queries.jsonl does not hold"),
        ("qrels/dev.tsv", "\td1\t", "\tgone\t", r"dev.tsv judges the document 'gone', which .*corpus.jsonl does not"),
        ("qrels/test.tsv", "q2\td2\t2", "q2\td3\t2", r"judges query 'q2' and document 'd3' with 1, and before with 2"),
        ("qrels/test.tsv", "q2\td2\t2", "q2\td2\tgood", r"a grade in .*test.tsv must be a number, got 'good' in row 1"),
        ("qrels/test.tsv", "q2\td2", "q0\td9", r"query 'q0' is judged in the part 'test' and in 'train': keep it in one"),
        ("qrels/test.tsv", "corpus-id", "paper", r"test.tsv has no column for the judged document \(corpus-id, .*it has"),
        ("corpus.jsonl", '"_id": "d1"', '"_id": "d0"', r"corpus.jsonl holds the document id 'd0' more than once"),
        ("corpus.jsonl", '"_id": "d1"', '"_id": ""', r"row 2 of .*corpus.jsonl has no id"),
        ("corpus.jsonl", '"metadata": {}}\n', '"metadata": {}\n', r"cannot be read as JSON lines.*\(line 1: "),
        ("corpus.jsonl", "{", "3\n{", r"corpus.jsonl must hold an object in each line, got int in row 1"),
        ("queries.jsonl", "where is a fox", " ", r"query 'q0' in .*queries.jsonl is judged but has no text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, file, old, new, message):
    edit(write_beir(tmp_path) / file, old, new)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_relevant_document_must_have_text(tmp_path):
    write_beir(tmp_path)
    edit(
        tmp_path / "corpus.jsonl",
        '"title": "The fox", "text": "all about the fox"',
        '"title": "", "text": ""',
    )
    with pytest.raises(InputError, match="document 'd0' in .* is relevant to query 'q11' but has no text"):
        load(tmp_path)


def test_a_column_must_be_there(tmp_path):
    write_beir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d0", "body": "text"}])
    with pytest.raises(
        InputError, match=r"no column for the text of a document \(text, contents\); it has _id, body"
    ):
        load(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(InputError, match=r"corpus.jsonl holds no row"):
        load(tmp_path)


def test_a_file_must_be_there_once(tmp_path):
    write_beir(tmp_path)
    (tmp_path / "documents.csv").write_text("id,text\n1,a\n")
    with pytest.raises(
        InputError, match="must hold one file of documents, got corpus.jsonl and documents.csv"
    ):
        load(tmp_path)
    (tmp_path / "documents.csv").unlink()
    (tmp_path / "queries.jsonl").unlink()
    assert holds_collection(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"has no file of queries: queries.jsonl \(or .csv"):
        load(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    assert not holds_collection(tmp_path)
    with pytest.raises(DataNotFoundError, match="has no file of documents"):
        load(tmp_path, kind="retrieval")
    with pytest.raises(DataNotFoundError, match="there is no folder"):
        read_collection(tmp_path / "nowhere")
    with pytest.raises(InputError, match="queries and judgements must be given together"):
        read_collection(tmp_path / "corpus.jsonl", queries=tmp_path / "queries.jsonl")


def test_judgements_by_part_are_named_for_it(tmp_path):
    write_beir(tmp_path)
    (tmp_path / "qrels" / "dev.tsv").rename(tmp_path / "qrels" / "held.tsv")
    with pytest.raises(InputError, match=r"held.tsv must be named for its part \(train, .*got 'held'"):
        load(tmp_path)
    for path in (tmp_path / "qrels").iterdir():
        path.unlink()
    with pytest.raises(DataNotFoundError, match="has no file of judgements: train.tsv, dev.tsv or test.tsv"):
        load(tmp_path)


def test_options_that_do_not_fit(tmp_path):
    write_beir(tmp_path)
    with pytest.raises(InputError, match="holds queries and documents: leave kind out, got 'regression'"):
        load(tmp_path, kind="regression")
    with pytest.raises(InputError, match="has no target column: leave target out, got 'x'"):
        load(tmp_path, target="x")


def test_few_queries_are_refused(tmp_path):
    write_beir(tmp_path, ("train",))
    lines = (tmp_path / "qrels" / "train.tsv").read_text().splitlines()
    (tmp_path / "qrels" / "train.tsv").write_text("\n".join(lines[:10]))
    with pytest.raises(InputError, match="has 3 queries with a relevant document: at least 5 are needed"):
        load(tmp_path)


def test_own_text_features(tmp_path):
    def lengths(texts):
        return np.array([[len(text), text.count("a")] for text in texts])

    splits = load(write_beir(tmp_path), text_features=lengths, limit=3)
    assert splits.documents.shape == (12, 2) and splits.input_shape == (2,)
    assert splits.documents[0].tolist() == [len("The fox all about the fox"), 2]
    assert len(splits.train_queries) == len(splits.test_queries) == 3
