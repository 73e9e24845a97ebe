"""One call from a name, a file or a hub address to data that a model can take."""

from pathlib import Path

from coloss.data.catalog import DATASETS, SUPERVISED_KINDS, dataset_info
from coloss.data.collection import TextCollection, retrieval_splits
from coloss.data.collection_files import holds_collection, read_collection
from coloss.data.dataset import RetrievalSplits, Splits
from coloss.data.files import labelled_file
from coloss.data.huggingface import labelled_from_hub
from coloss.data.known_collections import known_collection
from coloss.data.prepare import prepare
from coloss.data.sources import labelled
from coloss.data.text import TextFeatures
from coloss.errors import InputError


def load(
    name_or_path: str | Path,
    *,
    target: str | None = None,
    kind: str | None = None,
    seed: int = 0,
    text_features: TextFeatures = "tfidf",
    limit: int | None = None,
    standardize: bool = True,
) -> Splits | RetrievalSplits:
    """Train, validation and test data as tensors, ready for a model.

    - Images: float32 (rows, channels, height, width) in [0, 1].
    - Tables: numeric columns standardised, categories one-hot (the categories of the training part; a missing one is a category of its
      own), missing numbers of catalog sets replaced by the mean.
    - Text: TF-IDF of words and word pairs, 2,000 features; sentence pairs as |a - b| and a * b of 1,000 features each.
    - Series: float32 (rows, channels, steps), each channel standardised, shorter ones filled up with their mean. Recordings: log-mel
      spectrograms (rows, 1, bands, frames).
    - Regression targets: standardised; `splits.standardize.restore_targets` brings predictions back to their unit.
    - Queries, documents and judgements: text vectors of queries and documents, see `retrieval_splits`.

    Whatever is measured (means, categories, vocabularies) is measured on the training part alone. Parts that the data name are kept; a
    missing test part takes a fifth of the rows, a missing validation part a fifth of the rest of an official training part, drawn by
    seed and evenly over the classes (60 / 20 / 20 where nothing is given). Retrieval is divided by queries.

    Args:
        name_or_path: a name of the catalog (`DATASETS`), a path (`.csv`, `.tsv`, `.parquet`, `.npz`, a folder of images by class, a
            folder with queries, documents and judgements as `read_collection` says), or `hf:NAME[:CONFIG]`. A name of the catalog wins
            over a file of that name; `./digits` is the file.
        target: column to predict of a table; in the catalog, `openmoji` (group, subgroup), `omniglot` (character, alphabet),
            `spoken-digits` (digit, speaker) and `sick` (score, entailment) have a choice.
        kind: `classification` or `regression` for a user's target whose values suggest the wrong one; `retrieval` to get queries and
            documents of `banking77`, `reuters`, `sick` or `sts`.
        seed: of the division, >= 0.
        text_features: `"tfidf"`, `"hashing"`, `"package.module:callable"` or a callable, see `fit_text_encoder`.
        limit: at most so many rows in each part (queries, for retrieval), drawn by seed in proportion to the classes.
        standardize: False leaves numeric columns, series and regression targets in their own unit.

    Returns:
        `Splits`, or `RetrievalSplits` for a retrieval collection.

    Raises:
        UnknownNameError: if it is neither a name nor a path; close names are proposed.
        DataNotFoundError: if the file is not there.
        InputError: if the data cannot be read or learnt from, or are not supervised (`load_raw` gives those as they are).

    Examples:
        >>> splits = load("digits", limit=100)
        >>> splits.train.inputs.shape, splits.num_classes
        (torch.Size([100, 1, 8, 8]), 10)
    """
    text = str(name_or_path)
    own = isinstance(name_or_path, Path) or (text not in DATASETS and _looks_like_path(text))
    if text.startswith("hf:"):
        rows = labelled_from_hub(text, target, kind)
    elif (collection := _collection(text, own, kind)) is not None:
        if target is not None:
            raise InputError(f"{text} is searched and has no target column: leave target out, got {target!r}")
        return retrieval_splits(collection, seed=seed, limit=limit, text_features=text_features)
    elif own:
        rows = labelled_file(Path(name_or_path), target, kind)
    else:
        info = dataset_info(text)
        if info.kind not in SUPERVISED_KINDS:
            raise InputError(
                f"data set {text!r} ({info.kind}) is not a supervised one: coloss.data.load_raw({text!r}) gives it as stored"
            )
        if kind is not None:
            raise InputError(
                f"kind is for your own data, data set {text!r} is a {info.kind} set: leave kind out, got {kind!r}"
            )
        rows = labelled(text, target)
    return prepare(rows, seed=seed, limit=limit, text_features=text_features, standardize=standardize)


def _collection(text: str, own: bool, kind: str | None) -> TextCollection | None:
    """Texts to search, or None where a target is to be predicted."""
    if not own:
        searched = kind == "retrieval" or (kind is None and dataset_info(text).kind == "retrieval")
        return known_collection(text) if searched else None
    if kind != "retrieval" and not holds_collection(text):
        return None
    if kind not in (None, "retrieval"):
        raise InputError(f"{text} holds queries and documents: leave kind out, got {kind!r}")
    return read_collection(text)


def _looks_like_path(text: str) -> bool:
    path = Path(text).expanduser()
    return "/" in text or "\\" in text or bool(path.suffix) or path.exists()
