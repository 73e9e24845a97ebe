"""One self-contained HTML page for a comparison: it opens without a network, on a phone and on a wide screen."""

import json
import math
import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from coloss.lab.records import ComparisonRecord, TrialRecord, read_comparison, write_atomically
from coloss.report import quantities, wording
from coloss.report.page import build_page
from coloss.report.palette import INTERFACE, dark_of_light


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Turn a folder of results into one HTML file that holds everything it needs, charts included.

    An unfinished comparison gives a report too, which says how many trials it stands on.

    Args:
        folder: where a comparison was stored.
        out: the file to write, or an existing folder to write `report.html` into; default: `folder`.

    Returns:
        The file that was written, whole or not at all.

    Raises:
        InputError: if the folder holds no comparison, a file of it is damaged, or `out` cannot be written.

    Cost: about 5 MB on disk, nearly all of it the chart library.

    Examples:
        >>> write_report("no-such-folder")
        Traceback (most recent call last):
        coloss.errors.InputError: no file no-such-folder/comparison.json: is this the folder of a comparison?
    """
    folder = Path(folder)
    path = folder / "report.html" if out is None else Path(out)
    if path.is_dir():
        path = path / "report.html"
    record, trials = read_comparison(folder)
    write_atomically(path, render_report(record, trials))
    return path


def render_report(record: ComparisonRecord, trials: Sequence[TrialRecord]) -> str:
    """Write the page of a comparison as a string of HTML.

    Args:
        record: the plan.
        trials: its finished trials.

    Returns:
        A whole HTML document without references to anything outside it.

    Examples:
        >>> from coloss.lab.records import ArmRecord
        >>> plan = ComparisonRecord(
        ...     title="t",
        ...     task="digits",
        ...     arms=[ArmRecord(name="plain")],
        ...     baseline="plain",
        ...     seeds=[0],
        ...     budget={"epochs": 1},
        ...     metric="accuracy",
        ... )
        >>> page = render_report(plan, [])
        >>> page[:15], "0 of 1 trials finished" in page
        ('<!doctype html>', True)
    """
    from plotly.offline import get_plotlyjs

    page = build_page(record, trials)
    files = resources.files("coloss.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        duration=quantities.duration,
        cosine=quantities.cosine,
        count=quantities.count,
        memory=quantities.memory,
        kilobytes=quantities.kilobytes,
        budget_text=wording.budget_text,
        seeds=wording.seeds,
        isfinite=math.isfinite,
        missing=quantities.MISSING,
    )
    environment.filters.update(
        plain=_plain, method=_method, mean_sd=_mean_sd, unbroken=_unbroken, opening=_opening
    )
    charts = {chart.key: {"group": chart.group, "views": chart.views} for chart in page.charts}
    return environment.from_string(files.joinpath("template.html.j2").read_text("utf-8")).render(
        page=page,
        record=record,
        headline=wording.headline(record, page.rows),
        tally=wording.tally(page.rows),
        interface=INTERFACE,
        style=files.joinpath("style.css").read_text("utf-8"),
        script=files.joinpath("charts.js").read_text("utf-8"),
        plotly=get_plotlyjs(),
        payload=_json({"charts": charts, "dark": dark_of_light()}),
    )


def _json(payload: Any) -> str:
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _method(method: dict[str, Any]) -> str:
    parameters = method.get("parameters", {})
    name = str(method.get("slug", ""))
    if not parameters:
        return name
    return f"{name}({', '.join(f'{key}={_plain(value)}' for key, value in parameters.items())})"


def _mean_sd(values: Sequence[float], quantity: quantities.Quantity) -> str:
    if not values or not all(map(math.isfinite, values)):
        return quantities.MISSING
    mean = quantity.number(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {quantity.number(statistics.stdev(values))}"


def _unbroken(text: str) -> markupsafe.Markup:
    words = [
        markupsafe.Markup('<span class="whole">{}</span>').format(word)
        if "-" in word and len(word) <= 22
        else word
        for word in text.replace("95% interval", "95%\N{NO-BREAK SPACE}interval").split(" ")
    ]
    return markupsafe.Markup(" ").join(words)


def _opening(text: str) -> str:
    return text[:1].upper() + text[1:]
