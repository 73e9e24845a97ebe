"""The benchmarks by name, and their tables."""

import os
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coloss.errors import InputError, suggest_names
from coloss.lab.benchmarks.row import Row
from coloss.lab.catalog import import_name
from coloss.lab.records import machine, versions

# Each is a function `measure(report, ...) -> list[Row]` with sizes as further arguments; its docstring's first line is the title.
BENCHMARKS = {
    "loop": "coloss.lab.benchmarks.loop.measure",
    "import": "coloss.lab.benchmarks.startup.measure",
    "rankme": "coloss.lab.benchmarks.rankme.measure",
    "embedding": "coloss.lab.benchmarks.embedding.measure",
    "similarity": "coloss.lab.benchmarks.similarity.measure",
    "slices": "coloss.lab.benchmarks.slices.measure",
    "output-layer": "coloss.lab.benchmarks.output_layer.measure",
    "meta-nodes": "coloss.lab.benchmarks.meta_nodes.measure",
    "block-attention": "coloss.lab.benchmarks.block_attention.measure",
    "distillation": "coloss.lab.benchmarks.distillation.measure",
    "generative": "coloss.lab.benchmarks.generative.measure",
    "kv-prediction": "coloss.lab.benchmarks.kv_prediction.measure",
    "local-learning": "coloss.lab.benchmarks.local_learning.measure",
    "mutual-information": "coloss.lab.benchmarks.mutual_information.measure",
    "codec": "coloss.lab.benchmarks.codec.measure",
    "token-exit": "coloss.lab.benchmarks.token_exit.measure",
    "exercise": "coloss.lab.benchmarks.exercise.measure",
}


def run_benchmarks(name: str | None, console: Console) -> list[dict[str, Any]]:
    """Measure one benchmark or all of them, and print a table for each.

    Args:
        name: a key of `BENCHMARKS`; None for all.
        console: where the tables and the progress go.

    Returns:
        One dict for each row, as `Row.as_dict`, with `benchmark` and `machine` besides.

    Raises:
        InputError: if there is no benchmark of that name.

    Examples:
        >>> run_benchmarks("lop", Console())
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: no benchmark named 'lop'; did you mean 'loop'? (there are: loop, import, ...)
    """
    if name is not None and name not in BENCHMARKS:
        raise InputError(
            f"no benchmark named {name!r}{suggest_names(name, BENCHMARKS)} (there are: {', '.join(BENCHMARKS)})"
        )
    here = describe_machine()
    console.print(escape(here), highlight=False, soft_wrap=True)
    results = []
    for key in BENCHMARKS if name is None else [name]:
        measure = import_name(BENCHMARKS[key])
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            line = bar.add_task(f"measuring {key}", total=1.0)
            rows = measure(lambda share, bar=bar, line=line: bar.update(line, completed=share))
        title = (measure.__doc__ or "").partition("\n")[0]
        console.print(f"\n[bold]{key}[/]: {escape(title)}", highlight=False)
        console.print(as_table(rows))
        results += [{"benchmark": key, **row.as_dict(), "machine": here} for row in rows]
    return results


def describe_machine() -> str:
    """Processor, cores, system, versions, and how busy the machine is now, in one line."""
    found, software = machine(), versions()
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{found['processor']}, {found['cores']} cores{busy}, {found['system']}, "
        f"Python {software['python']}, torch {software['torch']}"
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=22)
    for column in ("median", "middle half", "by CPU", "ratio", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        limit = f"{'≥' if row.at_least else '≤'} {_short(row.limit)}" if row.limit is not None else ""
        table.add_row(
            escape(row.case) + (f" [dim]({escape(row.note)})[/]" if row.note else ""),
            f"{_short(row.value)} {escape(row.unit)}" if row.value is not None else "",
            f"{_short(row.low, 2)} to {_short(row.high, 2)}" if row.low != row.high else "",
            _short(row.cpu),
            f"{_short(row.ratio)} x" if row.ratio is not None else "",
            " ".join(part for part in (limit, _MET[row.met]) if part),
        )
    return table


_MET = {None: "", True: "[green]✓[/]", False: "[red]✗[/]"}


def _short(value: float | None, digits: int = 3) -> str:
    """The digits that matter, without an exponent where people do not expect one."""
    if value is None:
        return ""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.{digits}g}"
