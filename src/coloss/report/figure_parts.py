"""What all charts share: fonts, axes and hover boxes, labels and rules, safe text."""

import html
import math
from collections.abc import Sequence
from typing import Any, Literal

from coloss.report.palette import INTERFACE

Figure = dict[str, Any]
"""A Plotly figure as a plain dict of `data` and `layout`, ready for JSON."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
INK, MUTED, LINE, GRID, PAGE = (INTERFACE[role][0] for role in ("ink", "muted", "line", "grid", "page"))
LONGEST_LABEL = 40


def base_layout(height: int, x: str = "") -> Figure:
    """A quiet plot of a height in pixels: no background, a hairline grid, a title (already safe) for the x axis."""
    axis = {
        "gridcolor": GRID,
        "linecolor": LINE,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": MUTED, "size": 12},
        "automargin": True,
    }
    font = {"color": MUTED, "size": 12}
    return {
        "height": height,
        "autosize": True,
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 46, "r": 12, "t": 10, "b": 40},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": PAGE,
            "bordercolor": LINE,
            "font": {"family": FONT, "size": 13, "color": INK},
            "align": "left",
        },
        "xaxis": axis | {"title": {"text": x, "font": font, "standoff": 10}, "showline": True},
        "yaxis": axis | {"title": {"text": "", "font": font, "standoff": 8}, "nticks": 7},
    }


def log_axis(low: float, high: float) -> Figure:
    """Settings of a logarithmic axis from low to high, both positive, with a handful of round ticks.

    Examples:
        >>> log_axis(0.1, 10)["ticktext"]
        ['0.1', '0.2', '0.5', '1', '2', '5', '10']
    """
    decades = math.log10(high / low)
    room = 0.06 * decades or 0.1
    first, last = math.log10(low) - room, math.log10(high) + room
    axis: Figure = {"type": "log", "range": [first, last]}
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 0.7 else (1, 2, 5) if decades < 2.2 else (1,)
    powers = range(math.floor(first), math.ceil(last) + 1, max(1, round(decades / 5)))
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if first <= math.log10(tick) <= last]
    if len(ticks) < 2:
        return axis | {"nticks": 5}
    return axis | {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def label_above(y: float, words: str, size: int = 13) -> Figure:
    """An annotation at the left edge of the plot, above what lies at y; long words are shortened."""
    return {
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": y,
        "yanchor": "bottom" if size < 13 else "middle",
        "text": text(shorten(words)),
        "hovertext": text(words),
        "borderpad": 0,
        "yshift": 3 if size < 13 else 0,
        "showarrow": False,
        "font": {"size": size, "color": INK if size >= 13 else MUTED},
    }


def rule(axis: Literal["x", "y"], at: float, color: str, width: float = 1, dash: str = "solid") -> Figure:
    """A straight line across the whole plot at one value of an axis, behind the data."""
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": at,
        f"{axis}1": at,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": color, "width": width, "dash": dash},
        "layer": "below",
    }


def text(words: str) -> str:
    """Make words safe inside a chart, where Plotly reads `<`, `&` and `%{` as markup.

    Examples:
        >>> text("<b> 50%")
        '&lt;b&gt; 50&#37;'
    """
    return html.escape(words, quote=False).replace("%", "&#37;").replace("$", "&#36;")


def shorten(words: str, longest: int = LONGEST_LABEL) -> str:
    """Take the middle out of words that are too long for a label: names often differ at their ends.

    Examples:
        >>> shorten("a-very-long-name-of-an-arm", 12)
        'a-very…n-arm'
    """
    if len(words) <= longest:
        return words
    tail = (longest - 1) * 5 // 11
    return f"{words[: longest - 1 - tail]}…{words[len(words) - tail :]}"


def rounded(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON: six digits, None where a number is not finite.

    Examples:
        >>> rounded([1 / 3, float("nan")])
        [0.333333, None]
    """
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
