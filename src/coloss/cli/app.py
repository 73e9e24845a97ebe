"""The `coloss` command. Commands that need no torch import none, so they answer at once."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from coloss.cli import catalog_commands, compress_commands, exercise_commands, lab_commands, motion_commands
from coloss.cli.typed import Stopped, remembered
from coloss.errors import ColossError

app = typer.Typer(
    name="coloss",
    help="Train networks on more than one loss, and know whether it helped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"coloss {version('coloss')}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train networks on more than one loss, and know whether it helped."""


app.command("list")(catalog_commands.list_systems)
app.command("show")(catalog_commands.show)
app.command("data")(catalog_commands.data)
app.command("compare")(lab_commands.compare)
app.command("verify")(lab_commands.verify)
app.command("run")(lab_commands.run)
app.command("report")(lab_commands.report)
app.command("select")(lab_commands.select)
app.command("bench")(lab_commands.bench)
app.command("compress")(compress_commands.compress)
app.command("decompress")(compress_commands.decompress)
app.command("exercise")(exercise_commands.exercise)
app.command("generate")(motion_commands.generate)
app.command("retrieve")(motion_commands.retrieve)
app.command("caption")(motion_commands.caption)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave Python with its exit code.

    0: done. 1: a training diverged, or a worker was lost. 2: bad input. 130: stopped by Ctrl-C. Whatever is not 0 comes with one line on
    stderr; the environment variable COLOSS_TRACEBACK=1 shows the traceback instead.

    Args:
        arguments: what was typed after `coloss`; default: of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with remembered(given):
            code = app(args=given, prog_name="coloss", standalone_mode=False)
    except Stopped as stopped:
        _line(str(stopped))
        code = 130
    except Exception as error:
        if os.environ.get("COLOSS_TRACEBACK"):
            raise
        code = _explain(error)
        if code is None:
            raise
    else:
        if code == 130:  # Ctrl-C where there was nothing to keep
            _line("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int | None:
    """Print one line for what a person can mend, and give the exit code; None for anything else, which is a bug."""
    if hasattr(error, "format_message"):  # the command line could not be read
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
        else:
            command = getattr(getattr(error, "ctx", None), "command_path", "coloss")
            _line(f"{error.format_message()} (see {command} --help)")
        return 2
    if isinstance(error, typer.Abort):
        _line("stopped")
        return 130
    if isinstance(error, ColossError | ValueError):
        _line(str(error))
        return 2
    if type(error).__name__ in (
        "NonFiniteLossError",
        "WorkerLostError",
    ):  # by name: their modules import torch
        _line(str(error))
        return 1
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        _line(f"{place}{error.strerror or error}")
        return 2
    return None


def _line(message: str) -> None:
    typer.echo(f"coloss: {' '.join(message.split())}", err=True)
