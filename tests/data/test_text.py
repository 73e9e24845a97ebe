from pathlib import Path

import numpy as np
import pytest
import torch

from coloss.data import TextEncoder, fit_text_encoder, import_callable, load
from coloss.errors import InputError

TEXTS = ["the cat sat on the mat", "the dog sat", "a Café in Paris"]


def test_tfidf_weighs_a_rare_word_above_a_common_one() -> None:
    encoder = fit_text_encoder(TEXTS)
    assert encoder.feature_names is not None
    names = list(encoder.feature_names)
    row = encoder(["cat sat"])[0]
    assert row[names.index("cat")] > row[names.index("sat")] > 0
    assert "cafe" in names and "the cat" in names
    assert np.allclose(np.linalg.norm(encoder(TEXTS), axis=1), 1)


def test_max_features_caps_the_vocabulary() -> None:
    assert fit_text_encoder(TEXTS, max_features=3)(TEXTS).shape == (3, 3)
    assert fit_text_encoder(TEXTS, "hashing", max_features=16)(TEXTS).shape == (3, 16)


def test_hashing_learns_nothing_from_the_texts() -> None:
    one, two = fit_text_encoder(TEXTS, "hashing"), fit_text_encoder([], "hashing")
    assert np.array_equal(one(TEXTS), two(TEXTS)) and one(TEXTS).shape == (3, 2000)


def test_text_without_a_known_word_is_zero() -> None:
    assert not fit_text_encoder(TEXTS)(["", "zebra"]).any()


def test_an_encoder_of_the_users_own_may_return_a_tensor() -> None:
    encoder = fit_text_encoder(
        TEXTS, lambda texts: torch.tensor([[len(text), 1.0] for text in texts], requires_grad=True)
    )
    assert encoder(["ab"]).tolist() == [[2.0, 1.0]] and encoder.feature_names is None


def test_an_encoder_module_beside_the_user_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs
) -> None:
    import sys

    (tmp_path / "letter_counts.py").write_text(
        "import numpy as np\n\ndef encode(texts):\n    return np.array([[t.count('e'), len(t)] for t in texts])\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        splits = load(needs("pubmedqa"), text_features="letter_counts:encode", limit=20)
    finally:
        sys.modules.pop("letter_counts", None)
    assert splits.input_shape == (2,) and splits.feature_names is None
    assert sys.path == before


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros(2), r"must return \(2, features\) for 2 texts, got \(2,\)"),
        (np.zeros((3, 4)), r"got \(3, 4\)"),
        (np.array([[np.nan], [1.0]]), "finite"),
        ([["a"], ["b"]], "array of numbers, got list"),
    ],
)
def test_refuses_what_an_encoder_should_not_return(result: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextEncoder(lambda texts: result)(["one", "two"])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("tfdif", "must be 'tfidf', 'hashing' or .*did you mean 'tfidf'"),
        ("no_such_module_here:encode", "cannot import 'no_such_module_here'"),
        ("math:hipot", "has no 'hipot'; did you mean 'hypot'"),
        ("math:pi", "must be callable, got float"),
        ("a b:c", "must be 'package.module:name'"),
        ("math:", "must be 'package.module:name'"),
    ],
)
def test_refuses_unknown_features(features: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_text_encoder(TEXTS, features)


def test_refuses_texts_without_words_and_no_features() -> None:
    with pytest.raises(InputError, match="words of two letters or more, got 2 texts"):
        fit_text_encoder(["!", "?"])
    with pytest.raises(InputError, match="max_features must be >= 1, got 0"):
        fit_text_encoder(TEXTS, max_features=0)


def test_nested_names_are_found() -> None:
    assert import_callable("collections:OrderedDict.fromkeys")("ab") == {"a": None, "b": None}
