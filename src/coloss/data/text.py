"""Text as vectors: TF-IDF, hashed n-grams, or an encoder of the user's own."""

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coloss.errors import InputError, suggest_names

MAX_FEATURES = 2000
"""Vocabulary of TF-IDF, and number of buckets of hashing, by default."""

TextFeatures = str | Callable[[list[str]], Any]


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts into vectors of a fixed length.

    Args:
        encode: takes a list of texts, returns an array (texts, features).
        feature_names: of the features, or None.

    Examples:
        >>> TextEncoder(lambda texts: np.array([[len(text)] for text in texts]))(["one", "three"])
        array([[3.],
               [5.]], dtype=float32)
    """

    encode: Callable[[list[str]], Any]
    feature_names: tuple[str, ...] | None = None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts: float32 (texts, features), dense.

        Raises:
            InputError: if the encoder does not return one row of finite numbers for each text.
        """
        texts = list(texts)
        result = self.encode(texts)
        result = result.detach().cpu().numpy() if hasattr(result, "detach") else result
        try:
            encoded = np.asarray(result.toarray() if hasattr(result, "toarray") else result, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a text encoder must return an array of numbers, got {type(result).__name__}"
            ) from error
        if encoded.ndim != 2 or len(encoded) != len(texts):
            raise InputError(
                f"a text encoder must return ({len(texts)}, features) for {len(texts)} texts, got {encoded.shape}"
            )
        if not np.isfinite(encoded).all():
            raise InputError("a text encoder must return finite numbers, got NaN or infinity")
        return encoded


def fit_text_encoder(
    texts: Sequence[str], features: TextFeatures = "tfidf", *, max_features: int = MAX_FEATURES
) -> TextEncoder:
    """Encoder for texts like the given ones.

    - `"tfidf"`: words and pairs of neighbouring words, the `max_features` most frequent in `texts`; (1 + log count) times the inverse
      document frequency in `texts`, each row of unit length. A text without a known word is a row of zeros.
    - `"hashing"`: words and pairs of neighbouring words hashed into `max_features` buckets with random signs, each row of unit length.
      Learns nothing from `texts`.
    - `"module:callable"`, or a callable: takes a list of texts and returns an array or tensor (texts, features).

    Args:
        texts: the training texts; only TF-IDF reads them.
        features: which of these.
        max_features: >= 1.

    Raises:
        InputError: if `features` names nothing, cannot be imported, or no word is left in `texts`.

    Source: scikit-learn's `TfidfVectorizer` and `HashingVectorizer`.

    Examples:
        >>> encoder = fit_text_encoder(["a red fox", "a red hen"])
        >>> encoder.feature_names
        ('fox', 'hen', 'red', 'red fox', 'red hen')
        >>> encoder(["blue", "red"]).sum(axis=1)
        array([0., 1.], dtype=float32)
    """
    if max_features < 1:
        raise InputError(f"max_features must be >= 1, got {max_features}")
    if not isinstance(features, str):
        return TextEncoder(features)
    if features == "tfidf":
        # scikit-learn takes a second to import, which data without text need not spend.
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(
            max_features=max_features,
            ngram_range=(1, 2),
            sublinear_tf=True,
            dtype=np.float32,
            strip_accents="unicode",
        )
        try:
            vectorizer.fit(texts)
        except ValueError as error:
            raise InputError(
                f"texts must hold words of two letters or more, got {len(texts)} texts without any"
            ) from error
        return TextEncoder(vectorizer.transform, tuple(map(str, vectorizer.get_feature_names_out())))
    if features == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        hasher = HashingVectorizer(
            n_features=max_features, ngram_range=(1, 2), dtype=np.float32, strip_accents="unicode"
        )
        return TextEncoder(hasher.transform)
    if ":" in features:
        return TextEncoder(import_callable(features))
    hint = suggest_names(features, ["tfidf", "hashing"])
    raise InputError(
        f"text_features must be 'tfidf', 'hashing' or 'package.module:callable', got {features!r}{hint}"
    )


def import_callable(path: str) -> Callable[..., Any]:
    """What `package.module:name` points to; modules in the current folder are found too.

    Raises:
        InputError: if the path is malformed, the module or the name is not there, or it cannot be called.

    Examples:
        >>> import_callable("math:hypot")(3, 4)
        5.0
        >>> import_callable("math:hipot")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: module 'math' has no 'hipot'; did you mean 'hypot'?
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise InputError(f"an import path must be 'package.module:name', got {path!r}")
    with _current_folder_importable():
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError as error:
            raise InputError(f"cannot import {module_name!r} of {path!r}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"module {module_name!r} has no {attribute!r}{suggest_names(part, dir(found), 1)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{path!r} must be callable, got {type(found).__name__}")
    return found


@contextmanager
def _current_folder_importable():
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
