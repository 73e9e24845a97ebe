"""What the commands show while they work and when they are done: bars on stderr, results on stdout."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDE = 100
"""Columns from which a table shows everything."""

NARROW = 80
"""Columns below which it leaves out what a run cost."""


def output() -> Console:
    """A console for results; not narrowed where it writes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, WIDE + 20))


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr."""
    with Console(stderr=True).status(text):
        yield


@contextmanager
def progress_bar(trials: int) -> Iterator[Any]:
    """A bar on stderr over all trials, moving inside each of them too; gives the function that reports (arm, seed, share)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.0f} trials"),
        TimeElapsedColumn(),
    )
    shares: dict[tuple[str, int], float] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("preparing", total=trials)

        def report(arm: str, seed: int, share: float) -> None:
            shares[arm, seed] = share
            done = sum(shares.values())
            # A claim that measures its arms itself may have more of them than it says beforehand.
            bar.update(
                line,
                completed=done,
                total=max(trials, math.ceil(done)),
                description=f"{escape(arm)} seed {seed}",
            )

        yield report


def plain_json(value: Any) -> Any:
    """A value as strict JSON takes it: NaN and infinities become null.

    Examples:
        >>> plain_json({"mean": float("nan"), "values": {0: 1.0}})
        {'mean': None, 'values': {'0': 1.0}}
    """
    if isinstance(value, dict):
        return {str(name): plain_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ranking_json(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The ranking for a script."""
    return [plain_json(asdict(row)) for row in rows]


def print_ranking(console: Console, record: Any, rows: Sequence[Any]) -> None:
    """The arms from best to worst, each beside the baseline."""
    from coloss.report import describe_metric, headline

    quantity = describe_metric(record.metric, [value for row in rows for value in row.values.values()])
    unit = f" ({quantity.unit})" if quantity.unit else ""
    seeds = "1 seed" if len(record.seeds) == 1 else f"{len(record.seeds)} seeds"
    console.print(
        f"\n[bold]{escape(record.title)}[/]: {escape(quantity.name)}{unit} over {seeds}, {record.direction} is better"
    )
    wide, narrow = console.width >= WIDE, console.width < NARROW
    prepared = any((row.prepare_seconds or 0) >= 0.1 for row in rows)
    shown = [quantity.name, "difference", "95% interval"]
    shown += [] if narrow else ["p", "steps/s", "MB"] + ["prepare s"] * prepared
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("arm", overflow="fold", style="bold", min_width=10)
    for column in shown:
        table.add_column(escape(column), justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True)
    for row in rows:
        style = {"better": "green", "worse": "red"}.get(row.verdict, "")
        cells = _cells(row, quantity)
        verdict = [row.verdict] if wide else []
        table.add_row(escape(row.arm), *(cells[name] for name in shown), *verdict, style=style)
    console.print(table)
    console.print(escape(headline(record, rows)))


def _cells(row: Any, quantity: Any) -> dict[str, str]:
    low, high = row.interval or (None, None)
    return {
        quantity.name: quantity.number(row.mean),
        "difference": quantity.number(row.difference, signed=True) if row.difference is not None else "",
        "95% interval": f"{quantity.number(low, signed=True)} to {quantity.number(high, signed=True)}"
        if low is not None
        else "",
        "p": f"{row.p_value:.3f}" if row.p_value is not None else "",
        "steps/s": f"{row.steps_per_second:.0f}" if row.steps_per_second else "",
        "MB": f"{row.peak_memory_mb:.0f}" if row.peak_memory_mb is not None else "",
        "prepare s": f"{row.prepare_seconds or 0:.1f}",
    }


def print_evidence(console: Console, found: dict[str, Any], smoke: bool) -> None:
    """One line for a claim that was measured."""
    low, high = found["interval"]
    word = "smoke run, no verdict" if smoke else found["verdict"]
    method, baseline = found["method"], found["baseline"]
    console.print(
        f"[bold]{found['slug']}[/] {word}: {escape(found['metric'])} {escape(method['name'])} {method['mean']:.4g}, "
        f"{escape(baseline['name'])} {baseline['mean']:.4g}, difference {found['difference']:+.4g}, "
        f"95% interval {low:+.4g} to {high:+.4g}, {found['seconds']:.0f} s"
    )


def print_selection(console: Console, found: Any) -> None:
    """The arms by the criterion that chose, beside what they are worth."""
    from coloss.report import describe_metric

    quantity = describe_metric(found.metric, list(found.metric_means.values()))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm", overflow="fold", style="bold", min_width=10)
    for name in (found.criterion, quantity.name):
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    sign = -1 if found.criterion_direction == "higher" else 1
    for arm, value in sorted(found.criterion_means.items(), key=lambda entry: sign * entry[1]):
        notes = [note for note, which in (("chosen", found.chosen), ("best", found.best)) if arm == which]
        number = quantity.number(found.metric_means[arm])
        table.add_row(escape(arm), f"{value:.4g}", number, ", ".join(notes))
    console.print(table)
    console.print(
        f"each of {len(found.seeds)} seeds choosing for itself: {_regret(found.regret, quantity)} short of its best run; "
        f"an arm drawn at random {_regret(found.random_regret, quantity)}"
    )
    console.print(
        f"rank correlation of {escape(found.criterion)} with {escape(quantity.name)}: {found.rank_correlation:+.2f}"
    )


def _regret(regret: Any, quantity: Any) -> str:
    unit = f" {quantity.unit}" if quantity.unit else ""
    spread = ""
    if regret.interval is not None:
        low, high = (quantity.number(end) for end in regret.interval)
        spread = f" ({low} to {high})"
    return f"{quantity.number(regret.mean)}{unit}{spread}"
