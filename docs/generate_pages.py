"""Makes the pages that follow from the code, at every build: one for each system, and the reference of each floor."""

import json
import re
from pathlib import Path
from typing import Any

import coloss
from coloss.cli.catalog_commands import commands
from coloss.lab.catalog import FAMILIES, Entry, catalog
from coloss.report.evidence_figure import difference_svg
from coloss.report.size_figure import size_svg

DOCS = Path(__file__).parent
HEADINGS = {
    "classification": "Classification",
    "jepa": "Joint-embedding prediction",
    "openworld": "Open world",
}


FLOORS = {
    "train": (
        "Training",
        "The engine, `coloss.train`; the most used names are importable from `coloss` too.",
    ),
    "ops": ("Tensor functions", "Floor 0, `coloss.ops`: pure functions on tensors, for any loop."),
    "nn": ("Layers", "Floor 1, `coloss.nn`: layers and small networks that several systems share."),
    "data": ("Data", "Floor 2, `coloss.data`: data sets, samplers, views."),
    "metrics": ("Metrics", "Floor 2, `coloss.metrics`: probes, retrieval, calibration, statistics."),
    "lab": ("Lab", "Floor 5, `coloss.lab`: the catalog, tasks, comparisons, claims."),
}


def on_pre_build(config: Any) -> None:
    """Called by MkDocs before it looks for pages."""
    systems = {f"{entry.slug}.md": page(entry) for entry in catalog()}
    write_pages(DOCS / "systems", systems | {"index.md": index()})
    write_pages(DOCS / "reference", {f"{floor}.md": reference(floor) for floor in FLOORS})


def on_page_markdown(markdown: str, **options: Any) -> str:
    """Called by MkDocs for every page: `<!-- sizes: NAME -->` becomes the figure of the measurement in `measured/NAME.json`."""
    return re.sub(r"<!-- sizes: ([a-z-]+) -->", lambda found: size_figure(found[1]), markdown)


def size_figure(name: str) -> str:
    """Models against the bytes they take, as a stored comparison found them."""
    measured = json.loads((DOCS / "measured" / f"{name}.json").read_text())
    return size_svg(measured["arms"], measured["metric"])


def write_pages(folder: Path, pages: dict[str, str]) -> None:
    """Write pages, remove those of systems that are gone, leave untouched what would not change."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def reference(floor: str) -> str:
    """Every public name of a floor, from the list that its package exports."""
    title, line = FLOORS[floor]
    stub = (Path(coloss.__file__).parent / floor / "__init__.pyi").read_text()
    found = re.findall(r"from \.(\w+) import \w+ as (\w+)", stub)
    return "\n".join(
        [f"# {title}", "", line, "", *(f"::: coloss.{floor}.{module}.{name}\n" for module, name in found)]
    )


def index() -> str:
    """The list of all systems with what was measured."""
    lines = [
        "# Systems",
        "",
        "Every verdict is made by `coloss verify`; none is edited. See [how evidence is made](../evidence.md).",
        "",
    ]
    for family in FAMILIES:
        entries = [entry for entry in catalog() if entry.family == family]
        if not entries:
            continue
        lines += [
            f"## {HEADINGS.get(family, family.capitalize())}",
            "",
            "| system | what it gives you | verdict | measured effect |",
            "|---|---|---|---|",
        ]
        lines += [f"| [{e.slug}]({e.slug}.md) | {e.summary} | {verdict(e)} | {effect(e)} |" for e in entries]
        lines.append("")
    return "\n".join(lines)


def verdict(entry: Entry) -> str:
    found = entry.evidence
    return found["verdict"] if found else "not measured yet"


def effect(entry: Entry) -> str:
    found = entry.evidence
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['metric']} {found['difference']:+.4g} ({low:+.4g} to {high:+.4g})"


def page(entry: Entry) -> str:
    """One system: what its room says, what was measured, its API."""
    first, _, rest = entry.docstring.strip().partition("\n")
    lines = [
        f"# {entry.slug}",
        "",
        f"**{first}**",
        "",
        f"{entry.title}. {entry.paper}",
        "",
        f"Acts on: {', '.join(entry.acts_on)}.",
        "",
        without_tags(rest.strip()),
        "",
        *measured(entry),
        "## Use",
        "",
        "```console",
        *(f"$ {line}" for line in (f"coloss show {entry.slug}", *commands(entry))),
        "```",
        "",
        "## API",
        "",
    ]
    lines += [f"::: {path}\n" for path in entry.api]
    return "\n".join(lines)


def without_tags(text: str) -> str:
    """Keep `<a, b>` in prose from being taken for HTML; code stays as it is."""
    lines = []
    for line in text.splitlines():
        parts = line.split("`")
        if not line.startswith("    "):
            parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
        lines.append("`".join(parts))
    return "\n".join(lines)


def _mean(metric: dict[str, Any] | None) -> str:
    """A mean for a table; nothing where an arm has none, or a seed had no such number (a target that was not reached)."""
    return "" if metric is None or metric["mean"] is None else f"{metric['mean']:.4g}"


def measured(entry: Entry) -> list[str]:
    """The evidence: claim, verdict, figure, every arm."""
    found = entry.evidence
    if not found:
        return ["## Measured", "", f"Not measured yet: `coloss verify {entry.slug}`.", ""]
    method, baseline = found["method"]["values"], found["baseline"]["values"]
    differences = [a - b for a, b in zip(method, baseline, strict=True)]
    low, high = found["interval"]
    lines = [
        "## Measured",
        "",
        f"> {found['statement']}",
        "",
        f"**{found['verdict'].capitalize()}**: {found['metric']} of {found['method']['name']} is {found['method']['mean']:.4g}, of "
        f"{found['baseline']['name']} {found['baseline']['mean']:.4g}; difference {found['difference']:+.4g}, 95% interval {low:+.4g} to "
        f"{high:+.4g}, p = {found['p_value']:.3g} (sign flips), {len(found['seeds'])} paired runs.",
        "",
        '<div class="evidence">',
        difference_svg(differences, (low, high)),
        "</div>",
        "",
        "| arm | " + " | ".join(metric_names(found)) + " | training seconds |",
        "|---|" + "---|" * (len(metric_names(found)) + 1),
    ]
    for name, arm in found["arms"].items():
        cells = [_mean(arm["metrics"].get(m)) for m in metric_names(found)]
        lines.append(f"| {name} | {' | '.join(cells)} | {arm['seconds']:.1f} |")
    lines.append("")
    if found.get("tried"):
        lines += [f"What was tried: {found['tried']}", ""]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        *lines,
        f"Made on {found['created'][:10]} by `{found['command']}` in {found['seconds']:.0f} s with {versions}.",
        "",
    ]


def metric_names(found: dict[str, Any]) -> list[str]:
    """Metrics of any arm, the deciding one first."""
    names = dict.fromkeys([found["metric"]])
    for arm in found["arms"].values():
        names |= dict.fromkeys(arm["metrics"])
    return list(names)
