"""Beartype as the tests use it: an int is a float, as everywhere in Python, and a check is made when its function is first called."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Check a function's arguments and result.

    Most functions of the package are never called in one process of the tests: writing all their checks took a third of the time of an
    import of the whole package.
    """
    made: list[Callable] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(_checked(function))
        return made[0](*args, **kwargs)

    return called
