"""`coloss list`, `coloss show`, `coloss data`: what there is. None of them imports torch, but for a system whose loss is drawn."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from coloss.cli.display import output, plain_json
from coloss.errors import DataNotFoundError, InputError, suggest_names
from coloss.lab.catalog import FAMILIES, Entry, catalog, find_entry, import_name

VERDICT_STYLE = {"reproduced": "green", "contradicted": "red", "inconclusive": "yellow"}

EXAMPLE_TASKS = {
    "classification": ("digits", "cross-entropy"),
    "regression": ("diabetes", "mean-squared-error"),
    "multilabel": ("reuters", "binary-cross-entropy"),
    "retrieval": ("digits-halves", "info-nce"),
    "self-supervised": ("digits-ssl", "untrained"),
    "ranking": ("amazon-video-games", "binary-cross-entropy"),
    "next-item": ("amazon-video-games-next", "next-item"),
    "token-retrieval": ("openmoji-tokens", "info-nce"),
    "next-token": ("tiny-shakespeare", "next-token"),
}
"""A task of each kind, and its plain arm."""


def list_systems(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The catalog: systems, what each acts on, and its verdict."""
    if family is not None and family not in FAMILIES:
        raise InputError(
            f"no family named {family!r}{suggest_names(family, FAMILIES)} (there are: {', '.join(FAMILIES)})"
        )
    entries = [entry for entry in catalog() if family in (None, entry.family)]
    if as_json:
        _print_json([entry.as_json() for entry in entries])
        return
    console = output()
    measured = [entry.evidence for entry in entries]
    for entry, found in zip(entries, measured):
        verdict, effect = _verdict(found)
        console.print(
            f"[bold]{entry.slug}[/]  [dim]{entry.family} · {', '.join(entry.acts_on)}[/]  {verdict} {effect}"
        )
        console.print(Padding(escape(entry.summary), (0, 0, 0, 4), expand=False))
    if not entries:
        console.print(f"no system in {family} yet" if family else "no system yet")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(plain_json(value), indent=1, allow_nan=False))


def _verdict(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "[dim]not measured[/]", ""
    low, high = found["interval"]
    return (
        f"[{VERDICT_STYLE[found['verdict']]}]{found['verdict']}[/]",
        f"{escape(found['metric'])} {found['difference']:+.3g} [dim]({low:+.3g} to {high:+.3g})[/]",
    )


def show(
    slug: Annotated[str, typer.Argument(help="Name of a system (coloss list).")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """One system: paper, equations, API, evidence, example."""
    entry = find_entry(slug)
    if as_json:
        _print_json(entry.as_json() | {"docstring": entry.docstring, "example": entry.example})
        return
    found = entry.evidence
    console = output()
    console.print(f"[bold]{entry.slug}[/]  {escape(entry.title)}")
    console.print(f"[dim]{escape(entry.paper)}[/]\n")
    _print_prose(console, entry.docstring)
    console.print("\n[bold]Acts on[/]  " + ", ".join(entry.acts_on))
    console.print("[bold]Import[/]")
    for path in entry.api:
        module, _, name = path.rpartition(".")
        console.print(f"  from {module} import {name}")
    if entry.example:
        console.print("[bold]Example[/]")
        _print_block(console, "\n".join(f"  {line}" for line in entry.example.splitlines()))
    if lines := commands(entry):
        console.print("[bold]Use[/]")
        _print_block(console, "\n".join(f"  {line}" for line in lines))
    if options := entry.options:
        console.print("[bold]Options of the run[/]  --set NAME=VALUE")
        _print_block(console, "\n".join(f"  {name}={value}" for name, value in options.items()))
    if entry.has_profile:
        _print_profile(console, entry)
    _print_evidence(console, entry, found)


def _print_prose(console: Console, text: str) -> None:
    """Paragraphs are wrapped anew to the width of the terminal; indented blocks (equations, lists) stay as they are."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith((" ", "- ", "* ", "|", ">")) for line in lines):
            _print_block(console, paragraph)
        else:
            console.print(" ".join(lines), markup=False)
        console.print()


def _print_block(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def commands(entry: Entry) -> list[str]:
    """What can be typed about a system.

    Examples:
        >>> commands(find_entry("trp"))
        ['coloss compare digits --methods cross-entropy,trp', 'coloss verify trp']
    """
    lines = []
    if entry.method is not None and entry.kinds:
        task, baseline = EXAMPLE_TASKS[entry.kinds[0]]
        lines.append(f"coloss compare {entry.compare or f'{task} --methods {baseline},{entry.slug}'}")
    if entry.recipe is not None:
        lines.append(f"coloss run {entry.slug}")
    if entry.has_claim:
        lines.append(f"coloss verify {entry.slug}")
    return lines


def _print_profile(console: Console, entry: Entry) -> None:
    """Draw the slopes of the system's losses over the margin."""
    import plotext

    chosen = import_name(f"{entry.module}.PROFILE")
    plotext.clear_figure()
    plotext.theme("pro" if console.color_system else "clear")
    plotext.plotsize(min(console.width, 84), 18)
    for profile in chosen.measure():
        plotext.plot(profile.margins.tolist(), profile.gradient.tolist(), label=profile.name)
    plotext.xlabel("margin: how far the right class is ahead")
    console.print("[bold]Slope of the loss[/]  below 0 it pulls the right class up")
    drawn = plotext.build()
    text = Text.from_ansi(drawn if console.color_system else plotext.uncolorize(drawn))
    console.print(text, no_wrap=True, crop=False)
    if chosen.caption:
        console.print(escape(chosen.caption))
    console.print()


def _print_evidence(console: Console, entry: Entry, found: dict[str, Any] | None) -> None:
    if found is None:
        how = f"none yet: coloss verify {entry.slug}" if entry.has_claim else "none yet"
        console.print(f"[bold]Evidence[/]  {how}")
        return
    verdict, _ = _verdict(found)
    low, high = found["interval"]
    console.print(f"[bold]Evidence[/]  {verdict}: {escape(found['statement'])}")
    for role in ("baseline", "method"):
        arm = found[role]
        console.print(f"  {escape(arm['name'])}: {escape(found['metric'])} {arm['mean']:.4g}")
    console.print(
        f"  difference {found['difference']:+.4g}, 95% interval {low:+.4g} to {high:+.4g}, p = {found['p_value']:.3g}, "
        f"{len(found['seeds'])} seeds, {found['seconds']:.0f} s, {found['created'][:10]}"
    )
    if found["tried"]:
        console.print(f"  tried: {escape(found['tried'])}")


def data(
    name: Annotated[str | None, typer.Argument(help="Name of one data set.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Data sets: what is embedded, where the rest was found, how to get it."""
    from coloss.data.catalog import DATASETS, data_directory, dataset_info

    if name is not None:
        row = _data_row(dataset_info(name))
        if as_json:
            _print_json(row)
            return
        console = output()
        width = max(map(len, row))
        for key, value in row.items():
            text = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
            console.print(f"[bold]{key:{width}}[/]  {escape(text)}")
        return
    rows = [_data_row(info) for info in DATASETS.values()]
    if as_json:
        _print_json(rows)
        return
    console = output()
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "samples", "shape", "classes", "found"):
        table.add_column(column, overflow="fold")
    for row in rows:
        mark = {"embedded": "[green]embedded[/]", "missing": "[yellow]missing[/]"}.get(
            row["found"], "[green]yes[/]"
        )
        cells = (
            escape(str(row[key]) if row[key] is not None else "") for key in ("samples", "shape", "classes")
        )
        table.add_row(f"[bold]{row['name']}[/]", row["kind"], *cells, mark)
    console.print(table)
    console.print(
        f"\nfiles are looked for in {escape(str(data_directory()))} (set COLOSS_DATA to change that)"
    )


def _data_row(info: Any) -> dict[str, Any]:
    from coloss.data.catalog import locate
    from coloss.lab.known_tasks import tasks_of

    row = {
        "name": info.name,
        "title": info.title,
        "kind": info.kind,
        "samples": info.samples,
        "shape": info.shape,
        "classes": info.classes,
        "tasks": tasks_of(info.name),
        "licence": info.licence,
        "source": info.source,
        "file": info.file,
    }
    if info.file is None:
        return row | {"found": "embedded"}
    try:
        return row | {"found": str(locate(info.name))}
    except DataNotFoundError as error:
        return row | {"found": "missing", "how to get it": str(error)}
