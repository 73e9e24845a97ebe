"""What coloss raises when the input is at fault: one line that says what, where and how to mend it."""

from collections.abc import Iterable


class ColossError(ValueError):
    """The root of every error that coloss defines; also a `ValueError`, so plain callers need not know it.

    Examples:
        >>> issubclass(ColossError, ValueError)
        True
    """


class InputError(ColossError):
    """Something the user gave is wrong: a name, a file, an option. A command ends with exit code 2 on it.

    Examples:
        >>> raise InputError("limit must be >= 1, got 0")
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: limit must be >= 1, got 0
    """


class UnknownNameError(InputError):
    """A name that nothing answers to; the message proposes the names that come close.

    Examples:
        >>> raise UnknownNameError(
        ...     "no data set is called 'digit'" + suggest_names("digit", ["digits", "wine"])
        ... )
        Traceback (most recent call last):
        ...
        coloss.errors.UnknownNameError: no data set is called 'digit'; did you mean 'digits'?
    """


class DataNotFoundError(InputError, FileNotFoundError):
    """A data file that is not on this machine; the message names the file, the folder and where to get it.

    Examples:
        >>> issubclass(DataNotFoundError, FileNotFoundError)
        True
    """


def suggest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Ending for an error message that proposes the known names closest to a misspelt one.

    Args:
        name: what was asked for; upper and lower case, `_` and `-` count as equal.
        known: the names that exist.
        count: how many to propose at most.

    Returns:
        `"; did you mean 'digits'?"`, or an empty text if nothing comes close.

    Examples:
        >>> suggest_names("mnst", ["mnist", "fashion-mnist", "adult"])
        "; did you mean 'mnist'?"
        >>> suggest_names("zebra", ["mnist"])
        ''
    """
    import difflib

    plain: dict[str, str] = {}
    for candidate in known:
        plain.setdefault(candidate.lower().replace("_", "-"), candidate)
    close = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=count, cutoff=0.6)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(plain[match]) for match in close)}?"
