"""The command run in this process, as a person would type it: importing torch for each command would take seconds."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from coloss.cli.app import main


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def coloss(capfd: pytest.CaptureFixture[str], monkeypatch, tmp_path) -> Callable[..., Outcome]:
    """Run `coloss ARGUMENTS...` in an empty folder and give exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capfd.readouterr())

    return run
