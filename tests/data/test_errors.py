import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.errors import ColossError, DataNotFoundError, InputError, UnknownNameError, suggest_names


def test_every_error_is_a_value_error_and_an_input_error() -> None:
    for error in (InputError, UnknownNameError, DataNotFoundError):
        assert issubclass(error, ColossError) and issubclass(error, ValueError)
    assert issubclass(UnknownNameError, InputError)
    assert issubclass(DataNotFoundError, InputError) and issubclass(DataNotFoundError, FileNotFoundError)


def test_message_of_a_missing_file_is_the_plain_text() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        raise DataNotFoundError("there is no file x")
    assert str(caught.value) == "there is no file x"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("digit", ["digits", "wine"], "; did you mean 'digits'?"),
        ("Fashion_MNIST", ["fashion-mnist"], "; did you mean 'fashion-mnist'?"),
        ("mnist", ["mnist-a", "mnist-b"], "; did you mean 'mnist-b' or 'mnist-a'?"),
        ("zzz", ["digits"], ""),
        ("x", [], ""),
        ("", ["digits"], ""),
    ],
)
def test_suggestions(name: str, known: list[str], expected: str) -> None:
    assert suggest_names(name, known) == expected


@settings(deadline=None)
@given(st.text(max_size=10), st.lists(st.text(max_size=10), max_size=5))
def test_suggestions_name_known_names_only(name: str, known: list[str]) -> None:
    hint = suggest_names(name, known)
    assert hint == "" or any(repr(candidate) in hint for candidate in known)
