"""Examples in the README and on the documentation pages are tests: Python blocks run, coloss commands are parsed."""

import shlex

import click
import typer
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser


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
