"""Examples in the README and on the documentation pages are tests: Python blocks run, coloss commands are parsed."""

import functools
import gc
import re
import shlex
from importlib.machinery import SourceFileLoader
from pathlib import Path
from unittest.mock import patch

import click
import jaxtyping
import pytest
import typer
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser


def find_code(loader, name):
    """Compiled code of one module of the package, kept under jaxtyping's own name.

    jaxtyping's loader changes the name of cached bytecode while a module is executed, thus also for the libraries that it imports: each
    process would compile half of PyTorch and SciPy anew. Here the name holds only while the module's own code is looked up.
    """
    name_of = functools.partial(_HOOK._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", name_of):
        return SourceFileLoader.get_code(loader, name)


_HOOK = getattr(jaxtyping, "_import_hook", None)
if hasattr(_HOOK, "_optimized_cache_from_source") and hasattr(_HOOK, "_JaxtypingLoader"):
    _HOOK._JaxtypingLoader.get_code = find_code
    _HOOK._JaxtypingLoader.exec_module = SourceFileLoader.exec_module


# Millions of objects are made while tests are collected, and hardly one is thrown away before the end: the garbage collector need not
# walk over them meanwhile. Frozen and thawed, they are old ones, without a walk.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.unfreeze()
    gc.enable()


def pytest_sessionfinish():
    gc.freeze()  # pytest ends with several walks over all objects, seconds each


_LACKING = re.compile(r"data set '[\w-]+' needs the file (\S+), which is not in")
_pages: set[Path] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What needs a data set that this machine does not have is skipped, as the README says; so is what builds on it further down a page."""
    report = yield
    if not report.failed:
        return report
    lacking = _LACKING.search(report.longreprtext)
    if lacking is not None:
        from coloss.data.catalog import data_directory

        lacking = not (data_directory() / lacking[1]).exists()
    if lacking or (item.path in _pages and "NameError" in report.longreprtext):
        if item.path.suffix == ".md":
            _pages.add(item.path)
        report.outcome, report.longrepr = (
            "skipped",
            (str(item.path), 0, "Skipped: needs data that are not here"),
        )
    return report


def parse_commands(example):
    """Check that every `$ coloss ...` line names commands and options that exist, without running it."""
    from coloss.cli.app import app

    command = typer.main.get_command(app)
    for line in example.parsed.splitlines():
        if line.startswith("$ coloss "):
            arguments = shlex.split(line.removeprefix("$ coloss "), comments=True)
            parent = command
            with command.make_context("coloss", []) if not arguments else click.Context(command) as context:
                name, *rest = arguments
                found = parent.get_command(context, name)
                assert found is not None, f"no command coloss {name}"
                found.make_context(name, rest, parent=context)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("console", parse_commands)],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/families/*.md"],
).pytest()
