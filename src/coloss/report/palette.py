"""Colours, marker symbols and line dashes: one style for each arm, the same in every chart.

The six hues were chosen so that any two of them, and the baseline's ink, stay apart for normal, protan, deutan and
tritan sight on both backgrounds. Symbols and dashes say the same a second time: no chart relies on colour alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

INTERFACE: dict[str, tuple[str, str]] = {
    "page": ("#fdfdfc", "#131518"),
    "surface": ("#f5f5f3", "#1b1e22"),
    "ink": ("#1b1d21", "#f1f2f4"),
    "muted": ("#5b6068", "#a3a9b2"),
    "line": ("#dfe0de", "#31353b"),
    "grid": ("#ebebe9", "#262a2f"),
    "shade": ("#d4d4d2", "#000000"),
    "better": ("#12654f", "#6fd2b1"),
    "worse": ("#a1480b", "#f59d4c"),
    "opposed": ("#bd4b0c", "#f7964a"),
    "unrelated": ("#efefed", "#25282d"),
    "aligned": ("#1f5cc0", "#6d9bff"),
}
"""Role -> (light, dark)."""

HUES: tuple[tuple[str, str], ...] = (
    ("#2063c4", "#5688f0"),
    ("#a8521a", "#f08f30"),
    ("#1c9378", "#6fd2b1"),
    ("#df59ab", "#c9718b"),
    ("#4d2784", "#bc9ffd"),
    ("#b98b00", "#f5d346"),
)
"""Colours of the arms other than the baseline, (light, dark)."""

SYMBOLS: dict[str, str] = {
    "circle": "M8 4a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "square": "M4.4 4.4h7.2v7.2h-7.2z",
    "diamond": "M8 2.8L13.2 8L8 13.2L2.8 8z",
    "triangle-up": "M8 3.2L12.8 11.6H3.2z",
    "cross": "M6.4 3.2h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z",
    "triangle-down": "M8 12.8L3.2 4.4h9.6z",
    "pentagon": "M8 3L13 6.7L11.1 12.5H4.9L3 6.7z",
}
"""Plotly's name of a marker -> the same shape as a path in a 16 x 16 box."""

DASHES: dict[str, str] = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "6 2.5 1.5 2.5"}
"""Plotly's name of a dash -> the same as an SVG `stroke-dasharray`."""


@dataclass(frozen=True)
class Style:
    """How one arm is drawn everywhere.

    Attributes:
        key: short identifier, safe in HTML, that ties charts, legend and tables together.
        color: on a light background.
        dark: on a dark background.
        symbol: Plotly's name of the marker.
        dash: Plotly's name of the line dash.
    """

    key: str
    color: str
    dark: str
    symbol: str
    dash: str

    @property
    def path(self) -> str:
        """SVG path of the marker in a 16 x 16 box."""
        return SYMBOLS[self.symbol]

    def size(self, pixels: float) -> float:
        """The size to ask Plotly for, so that all symbols look as large as a circle of that many pixels."""
        return round(
            pixels
            * {"diamond": 1.15, "triangle-up": 1.25, "triangle-down": 1.25, "pentagon": 1.15}.get(
                self.symbol, 1.0
            ),
            1,
        )

    @property
    def dasharray(self) -> str:
        """SVG `stroke-dasharray` of the line; empty where it is solid."""
        return DASHES[self.dash]


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, Style]:
    """Give every arm its style, by its place in the plan: results never change a colour.

    Args:
        arms: names of the arms in the order of the plan.
        baseline: the arm drawn in ink; the others take the hues in turn, with another dash on every round.

    Returns:
        One style for each arm.

    Examples:
        >>> styles = arm_styles(["plain", "dhkd"], "plain")
        >>> styles["plain"].color, styles["dhkd"].color
        ('#1b1d21', '#2063c4')
    """
    symbols, dashes = list(SYMBOLS), list(DASHES)
    styles: dict[str, Style] = {}
    taken = 0
    for number, arm in enumerate(arms):
        if arm == baseline:
            styles[arm] = Style(f"arm{number}", *INTERFACE["ink"], symbols[0], dashes[0])
            continue
        lap, place = divmod(taken, len(HUES))
        symbol = symbols[1 + (place + lap) % (len(symbols) - 1)]
        styles[arm] = Style(f"arm{number}", *HUES[place], symbol, dashes[lap % len(dashes)])
        taken += 1
    return styles


def dark_of_light() -> dict[str, str]:
    """List the dark colour of every light one; a chart changes its theme by looking its colours up here.

    Examples:
        >>> dark_of_light()["#2063c4"]
        '#5688f0'
    """
    return {light: dark for light, dark in (*INTERFACE.values(), *HUES)}
