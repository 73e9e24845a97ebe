"""A user's own collection: queries, documents and judgements in files of their own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coloss.data.collection import TextCollection
from coloss.data.formats import read_json_lines, read_table
from coloss.data.splitting import PART_NAMES
from coloss.errors import DataNotFoundError, InputError

COLLECTION_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
"""Endings of files read as queries, documents or judgements."""

_DOCUMENTS, _QUERIES = ("corpus", "documents", "docs"), ("queries",)
_JUDGEMENTS = ("qrels", "judgements", "judgments")
_IDS = ("_id", "id")
_DOCUMENT_IDS = ("document_id", "doc_id", "docid")
_QUERY_IDS = ("query_id", "qid")
_TEXTS = ("text", "contents")
_JUDGED_QUERIES = ("query-id", "query_id", "qid", "query")
_JUDGED_DOCUMENTS = ("corpus-id", "corpus_id", "document_id", "doc_id", "docid", "document", "doc")
_GRADES = ("score", "grade", "relevance", "rel")
_PARTS = ("split", "part")


def holds_collection(source: str | Path) -> bool:
    """Whether `read_collection` would look here: a folder with at least two of queries, documents and judgements.

    Examples:
        >>> holds_collection("/nowhere")
        False
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return False
    kinds = (_find(folder, stems) for stems in (_DOCUMENTS, _QUERIES, _JUDGEMENTS))
    return sum(bool(found) for found in kinds) >= 2


def read_collection(
    source: str | Path, queries: str | Path | None = None, judgements: str | Path | None = None
) -> TextCollection:
    """Collection of a folder, or of three files.

    Files end in `.jsonl`, `.csv`, `.tsv` (these also with `.gz`) or `.parquet`. Columns (fields) by name, of which the first that is there
    counts; others are passed over:

    - documents, `corpus.*`, `documents.*` or `docs.*`: id (`_id`, `id`, `document_id`, `doc_id`, `docid`), `text` (or `contents`), and
      `title` if there is one, which is put before the text.
    - queries, `queries.*`: id (`_id`, `id`, `query_id`, `qid`), `text` (or `contents`, `query`), and `split` if there is one.
    - judgements, `qrels.*`, `judgements.*` or `judgments.*`: query (`query-id`, `query_id`, `qid`, `query`), document (`corpus-id`,
      `corpus_id`, `document_id`, `doc_id`, `docid`, `document`, `doc`), grade (`score`, `grade`, `relevance`, `rel`; all 1 without such a
      column), and `split` if there is one. Or a folder of that name with a file for each part: `qrels/train.tsv`, `qrels/dev.tsv`,
      `qrels/test.tsv`.

    So a folder in the layout of BEIR is read as it is. Pairs that nobody judged, and grades of 0 or less, are irrelevant.

    Args:
        source: the folder; or the file of documents, if the other two are given.
        queries: their file.
        judgements: their file, or folder of files by part.

    Raises:
        DataNotFoundError: if a file is not there.
        InputError: for a missing column, an id given twice, a judgement that names an unknown id or contradicts another, a query in two
            parts, or a judged text that is empty. One line that names file and id.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "Fox", "text": "It is red."}')
        >>> _ = (folder / "queries.csv").write_text("id,text\\n7,what is red")
        >>> _ = (folder / "qrels.tsv").write_text("query-id\\tcorpus-id\\tscore\\n7\\td1\\t2")
        >>> collection = read_collection(folder)
        >>> collection.titles, collection.queries, collection.judged.tolist(), collection.grades.tolist()
        (['Fox'], ['what is red'], [[0, 0]], [2.0])
    """
    source = Path(source).expanduser()
    if queries is None and judgements is None:
        documents_file, queries_file, judged_files = _files_of(source)
    elif queries is None or judgements is None:
        raise InputError("queries and judgements must be given together, beside the file of documents")
    else:
        documents_file, queries_file = source, Path(queries).expanduser()
        judged_files = _files_by_part(Path(judgements).expanduser())
    documents = _read_texts(documents_file, "document", (*_IDS, *_DOCUMENT_IDS), _TEXTS)
    asked = _read_texts(queries_file, "query", (*_IDS, *_QUERY_IDS), (*_TEXTS, "query"))
    judged = _read_judgements(judged_files, asked, documents)
    _refuse_empty(judged, asked, documents)
    parts = _parts_of_queries(judged, asked)
    empty = sum(
        not f"{title}{text}".strip() for title, text in zip(documents.titles, documents.texts, strict=True)
    )
    return TextCollection(
        str(source),
        documents.texts,
        asked.texts,
        judged.pairs,
        judged.grades,
        documents.titles,
        parts,
        note=f"{empty:,} documents without text" if empty else "",
    )


@dataclass
class _Texts:
    """Rows of a file of documents or queries."""

    path: Path
    ids: list[str]
    texts: list[str]
    titles: list[str]
    parts: list[str] | None


@dataclass
class _Judged:
    """Judged pairs by row numbers, each once, and the part of each query."""

    pairs: NDArray
    grades: NDArray
    parts: list[str] | None


def _files_of(folder: Path) -> tuple[Path, Path, list[tuple[Path, str | None]]]:
    if not folder.is_dir():
        raise DataNotFoundError(f"there is no folder {folder}")
    found = {
        what: _find(folder, stems)
        for what, stems in (("documents", _DOCUMENTS), ("queries", _QUERIES), ("judgements", _JUDGEMENTS))
    }
    wanted = {
        "documents": "corpus.jsonl",
        "queries": "queries.jsonl",
        "judgements": "qrels/test.tsv or qrels.csv",
    }
    for what, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"{folder} must hold one file of {what}, got {names}")
        if not paths:
            raise DataNotFoundError(
                f"{folder} has no file of {what}: {wanted[what]} (or .csv, .tsv, .parquet)"
            )
    return found["documents"][0], found["queries"][0], _files_by_part(found["judgements"][0])


def _find(folder: Path, stems: Sequence[str]) -> list[Path]:
    """Files, and for judgements folders, of one of these names."""
    found = [folder / f"{stem}{suffix}" for stem in stems for suffix in COLLECTION_SUFFIXES]
    folders = [folder / stem for stem in stems if stem in _JUDGEMENTS]
    return [path for path in found if path.is_file()] + [path for path in folders if path.is_dir()]


def _files_by_part(path: Path) -> list[tuple[Path, str | None]]:
    if not path.is_dir():
        return [(path, None)]
    files = [
        (file, file.name.partition(".")[0])
        for file in sorted(path.iterdir())
        if file.name.endswith(COLLECTION_SUFFIXES) and not file.name.startswith(".")
    ]
    if not files:
        raise DataNotFoundError(f"{path} has no file of judgements: train.tsv, dev.tsv or test.tsv")
    for file, part in files:
        if part.lower() not in PART_NAMES:
            raise InputError(f"{file} must be named for its part ({', '.join(PART_NAMES)}), got {part!r}")
    return list(files)


def _table(path: Path) -> pd.DataFrame:
    """Rows of a file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = read_json_lines(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise InputError(
                    f"{path} must hold an object in each line, got {type(row).__name__} in row {number}"
                )
        table = pd.DataFrame(rows, dtype=object)
    elif path.name.endswith(COLLECTION_SUFFIXES):
        table = read_table(path, as_text=True)
    else:
        raise InputError(f"{path} must end in {', '.join(COLLECTION_SUFFIXES)}")
    if table.empty:
        raise InputError(f"{path} holds no row")
    return table


def _column(table: pd.DataFrame, path: Path, names: Sequence[str], what: str) -> list[str]:
    cells = _optional(table, names)
    if cells is None:
        columns = ", ".join(map(str, table.columns))
        raise InputError(f"{path} has no column for the {what} ({', '.join(names)}); it has {columns}")
    return cells


def _optional(table: pd.DataFrame, names: Sequence[str]) -> list[str] | None:
    """Cells of the first of some columns as text, missing ones empty."""
    for name in names:
        if name in table:
            return ["" if value is None or value != value else str(value) for value in table[name]]
    return None


def _read_texts(path: Path, what: str, id_names: Sequence[str], text_names: Sequence[str]) -> _Texts:
    table = _table(path)
    ids = _column(table, path, id_names, f"{what} id")
    texts = _column(table, path, text_names, f"text of a {what}")
    titles = _optional(table, ("title",)) if what == "document" else None
    if "" in ids:
        raise InputError(f"row {ids.index('') + 1} of {path} has no id")
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} holds the {what} id {Counter(ids).most_common(1)[0][0]!r} more than once")
    return _Texts(path, ids, texts, titles or [""] * len(ids), _optional(table, _PARTS))


def _read_judgements(files: Sequence[tuple[Path, str | None]], queries: _Texts, documents: _Texts) -> _Judged:
    query_rows = {number: row for row, number in enumerate(queries.ids)}
    document_rows = {number: row for row, number in enumerate(documents.ids)}
    found: dict[tuple[int, int], float] = {}
    parts: dict[int, str] = {}
    for path, part in files:
        table = _table(path)
        asked = _column(table, path, _JUDGED_QUERIES, "judged query")
        answers = _column(table, path, _JUDGED_DOCUMENTS, "judged document")
        _refuse_unknown(path, asked, query_rows, queries, "query")
        _refuse_unknown(path, answers, document_rows, documents, "document")
        grades = _grades(path, _optional(table, _GRADES), len(table))
        named = [part] * len(table) if part is not None else _optional(table, _PARTS)
        for row, (query, document, grade) in enumerate(zip(asked, answers, grades, strict=True)):
            pair = query_rows[query], document_rows[document]
            if found.setdefault(pair, grade) != grade:
                raise InputError(
                    f"{path} judges query {query!r} and document {document!r} with {grade:g}, and before with {found[pair]:g}"
                )
            if named is not None:
                where = named[row]
                if (where or "").lower() not in PART_NAMES:
                    raise InputError(f"the parts in {path} must be {', '.join(PART_NAMES)}, got {where!r}")
                before = parts.setdefault(pair[0], str(where))
                if PART_NAMES[before.lower()] != PART_NAMES[str(where).lower()]:
                    raise InputError(
                        f"query {query!r} is judged in the part {before!r} and in {where!r}: keep it in one"
                    )
    pairs = np.array(list(found), dtype=np.int64).reshape(-1, 2)
    return _Judged(
        pairs,
        np.array(list(found.values()), dtype=np.float32),
        [parts.get(row, "") for row in range(len(queries.ids))] if parts else None,
    )


def _refuse_unknown(path: Path, ids: Iterable[str], known: dict[str, int], texts: _Texts, what: str) -> None:
    unknown = list(dict.fromkeys(number for number in ids if number not in known))
    if unknown:
        more = f" (and {len(unknown) - 1:,} more)" if len(unknown) > 1 else ""
        raise InputError(f"{path} judges the {what} {unknown[0]!r}{more}, which {texts.path} does not hold")


def _grades(path: Path, written: list[str] | None, count: int) -> NDArray:
    if written is None:
        return np.ones(count)
    values = pd.to_numeric(pd.Series(written), errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise InputError(
            f"a grade in {path} must be a number, got {written[wrong[0]]!r} in row {wrong[0] + 1}"
        )
    return np.maximum(values, 0.0)  # TREC marks junk by negative grades


def _refuse_empty(judged: _Judged, queries: _Texts, documents: _Texts) -> None:
    for (query, document), grade in zip(judged.pairs.tolist(), judged.grades, strict=True):
        if not queries.texts[query].strip():
            raise InputError(f"query {queries.ids[query]!r} in {queries.path} is judged but has no text")
        if grade > 0 and not f"{documents.titles[document]}{documents.texts[document]}".strip():
            raise InputError(
                f"document {documents.ids[document]!r} in {documents.path} is relevant to query {queries.ids[query]!r} but has no text"
            )


def _parts_of_queries(judged: _Judged, queries: _Texts) -> NDArray | None:
    names = judged.parts if judged.parts is not None else queries.parts
    if names is None:
        return None
    numbers = np.full(len(names), -1, dtype=np.int64)
    for row in np.unique(judged.pairs[:, 0]).tolist():
        if names[row].lower() not in PART_NAMES:
            raise InputError(
                f"the part of query {queries.ids[row]!r} in {queries.path} must be {', '.join(PART_NAMES)}, got {names[row]!r}"
            )
        numbers[row] = PART_NAMES[names[row].lower()]
    return numbers
