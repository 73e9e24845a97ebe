"""`coloss compress` and `coloss decompress`: checkpoints in less space, and back byte for byte."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from coloss.cli.display import output, plain_json, status
from coloss.errors import InputError

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_OTHER_FORMATS = (".pt", ".pth", ".bin", ".ckpt", ".gguf", ".npz", ".h5", ".onnx")
_LITTLE = 0.8
"""Types that keep more than this share of their bytes are named."""


def compress(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A safetensors file, a folder with such files, or a model that coloss saved."),
    ],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write. Default: CHECKPOINT.coloss.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint smaller without changing a bit of it: bfloat16 weights take a third less."""
    _check(checkpoint)
    with status("starting"):
        from coloss.compression.compressed_checkpoint import compress_checkpoint
    _work(compress_checkpoint, "compressing", checkpoint, out, force, as_json)


def decompress(
    compressed: Annotated[Path, typer.Argument(help="What coloss compress wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write. Default: the name without .coloss."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Restore a compressed checkpoint byte for byte, and check that it is what it was."""
    _check(compressed)
    with status("starting"):
        from coloss.compression.compressed_checkpoint import decompress_checkpoint
    _work(decompress_checkpoint, "restoring", compressed, out, force, as_json)


def _check(path: Path) -> None:
    """What can be said without torch."""
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.suffix in _OTHER_FORMATS and not path.is_dir():
        raise InputError(
            f"{path} must be a safetensors file or a folder of such: save the weights as one first"
        )


def _work(
    act: Callable[..., Any], verb: str, source: Path, target: Path | None, force: bool, as_json: bool
) -> None:
    started = time.perf_counter()
    try:
        with _share_bar(verb) as progress:
            report = act(source, target, force=force, progress=progress)
    except InputError as error:
        # The library's words for the argument, in the command's.
        raise InputError(
            str(error)
            .replace(
                "say force to replace it, or name another target",
                "replace it with --force, or name another --output",
            )
            .replace("say where to write it with target", "say where to write it with --output")
        ) from error
    seconds = time.perf_counter() - started
    rows = _by_type(report)
    found = {
        "path": str(report.path),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "ratio": report.ratio,
        "bound_ratio": _bound_ratio(report.tensors),
        "megabytes_per_second": report.bytes_before / 1e6 / max(seconds, 1e-9),
        "types": rows,
    }
    if as_json:
        typer.echo(json.dumps(plain_json(found), indent=1, allow_nan=False))
        return
    console = output()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("type", style="bold")
    for column in ("tensors", "bytes", "compressed", "ratio", "entropy bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        bound = "" if row["bound_ratio"] is None else f"{row['bound_ratio']:.2%}"
        table.add_row(
            row["type"],
            str(row["tensors"]),
            f"{row['bytes_before']:,}",
            f"{row['bytes_after']:,}",
            _share(row["bytes_after"], row["bytes_before"]),
            bound,
        )
    table.add_row(
        "files", "", f"{report.bytes_before:,}", f"{report.bytes_after:,}", f"{report.ratio:.2%}", ""
    )
    console.print(table)
    for line in _notes(rows):
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"{report.path}: {report.bytes_before / 1e6 / max(seconds, 1e-9):.0f} MB/s, {seconds:.1f} s",
        soft_wrap=True,
        markup=False,
    )


def _by_type(report: Any) -> list[dict[str, Any]]:
    """Tensors of one type together, the largest first."""
    parts = defaultdict(list)
    for tensor in report.tensors:
        parts[tensor.dtype].append(tensor)
    rows = [
        {
            "type": dtype,
            "tensors": len(found),
            "same": sum(t.kind == "same" for t in found),
            "bytes_before": sum(t.bytes_before for t in found),
            "bytes_after": sum(t.bytes_after for t in found),
            "bound_ratio": _bound_ratio(found),
        }
        for dtype, found in parts.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes_before"])


def _bound_ratio(tensors: Any) -> float | None:
    """The least that coding of single exponents could leave of the tensors it was used on, and of the others what they take."""
    if not any(t.bound is not None for t in tensors):
        return None
    before = sum(t.bytes_before for t in tensors)
    return sum(t.bytes_after if t.bound is None else t.bound for t in tensors) / before


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    total = sum(row["bytes_before"] for row in rows) or 1
    others = [
        row["type"]
        for row in rows
        if row["type"] != "BF16" and row["bytes_after"] > _LITTLE * row["bytes_before"]
    ]
    if others:
        found = "no bfloat16 in it" if all(row["type"] != "BF16" for row in rows) else "not all is bfloat16"
        yield f"{found}, and these types save little without loss: {', '.join(others)}"
    for row in rows:
        if (
            row["type"] == "F32"
            and row["bytes_before"] > total / 2
            and row["bytes_after"] < 0.6 * row["bytes_before"]
        ):
            yield "much of its float32 needs fewer bits: bfloat16 numbers, zeros, few values or equal tensors"
    if same := sum(row["same"] for row in rows):
        yield f"{same} tensor{'s equal' if same > 1 else ' equals'} another one and {'are' if same > 1 else 'is'} stored once"


def _share(after: int, before: int) -> str:
    return f"{after / before:.2%}" if before else ""


@contextmanager
def _share_bar(verb: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; gives the function that reports the share done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(verb, total=1.0)
        yield lambda share: bar.update(line, completed=share)
