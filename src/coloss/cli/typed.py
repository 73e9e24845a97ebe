"""What was typed, so that results can say how they were made and a stopped run how it goes on."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


class Stopped(Exception):
    """Ctrl-C, with what to tell the person who pressed it."""


_arguments: ContextVar[Sequence[str]] = ContextVar("arguments", default=())


@contextmanager
def remembered(arguments: Sequence[str]) -> Iterator[None]:
    """Keep the arguments of the running command."""
    token = _arguments.set(tuple(arguments))
    try:
        yield
    finally:
        _arguments.reset(token)


def typed_command() -> str:
    """The running command, as a person would type it again.

    Examples:
        >>> with remembered(["compare", "my data.csv"]):
        ...     typed_command()
        "coloss compare 'my data.csv'"
    """
    return shlex.join(["coloss", *_arguments.get()])


@contextmanager
def stoppable(out: Path | None = None) -> Iterator[None]:
    """Say on Ctrl-C that nothing finished is lost, and how to go on.

    Args:
        out: the result folder, if it was not typed.

    Raises:
        Stopped: in place of `KeyboardInterrupt`.
    """
    try:
        yield
    except KeyboardInterrupt:
        again = typed_command() + (f" --out {shlex.quote(str(out))}" if out is not None else "")
        raise Stopped(f"stopped; finished trials are kept, go on with: {again}") from None
