"""Charts of how the gradients of loss terms meet: cosines over time as colour, norms over time as lines."""

import math

from coloss.report.curves import ConflictMap
from coloss.report.figure_parts import Figure, base_layout, label_above, log_axis, rounded, text
from coloss.report.palette import DASHES, INTERFACE, Style
from coloss.report.quantities import cosine, count

NORM_MARGIN = 48
CONFLICT_SCALE = [
    [0.0, INTERFACE["opposed"][0]],
    [0.5, INTERFACE["unrelated"][0]],
    [1.0, INTERFACE["aligned"][0]],
]


def conflict_figure(conflicts: ConflictMap) -> Figure:
    """When the gradients of two loss terms agreed: a strip for each pair, steps along x, mean cosine as colour.

    The scale runs from -1 (opposed) over 0 (unrelated) to 1 (aligned), whatever the data.

    Examples:
        >>> found = ConflictMap(
        ...     "a", steps=[0, 50], pairs=[("u", "v")], cosine=[[-0.5, 0.5]], norms={}, seeds=1
        ... )
        >>> conflict_figure(found)["data"][0]["z"]  # a gap for the label, then the strip
        [[None, None], [-0.5, 0.5]]
    """
    pairs = conflicts.pairs
    edges, cells, hover, labels = [0.0], [], [], []
    blank = [None] * len(conflicts.steps)
    for row, (pair, cosines) in enumerate(zip(pairs, conflicts.cosine)):
        name = f"{text(pair[0])} × {text(pair[1])}"
        edges += [row + 0.46, row + 1.0]
        cells += [blank, rounded(cosines)]
        hover += [
            [""] * len(cosines),
            [f"<b>{cosine(v)}</b> at step {count(s)}<br>{name}" for s, v in zip(conflicts.steps, cosines)],
        ]
        labels.append(label_above(row + 0.46, f"{pair[0]} × {pair[1]}", size=12))
    heat = {
        "type": "heatmap",
        "x": conflicts.steps,
        "y": edges,
        "z": cells,
        "zmin": -1,
        "zmid": 0,
        "zmax": 1,
        "colorscale": CONFLICT_SCALE,
        "showscale": False,
        "text": hover,
        "hoverinfo": "text",
        "hoverongaps": False,
    }
    layout = base_layout(46 * len(pairs) + 8)
    layout["yaxis"] |= {"visible": False, "range": [len(pairs) + 0.02, 0], "fixedrange": True}
    layout["xaxis"] |= {"visible": False, "range": _step_range(conflicts)}
    layout["margin"] |= {"l": NORM_MARGIN, "r": 8, "t": 2, "b": 4}
    layout["annotations"] = labels
    return {"data": [heat], "layout": layout}


def norm_figure(conflicts: ConflictMap, style: Style) -> Figure:
    """Gradient norms of the loss terms of one arm over steps: log scale, the arm's colour, a dash for each term.

    Examples:
        >>> from coloss.report.palette import arm_styles
        >>> found = ConflictMap("a", steps=[0, 50], pairs=[], cosine=[], norms={"u": [1.0, 0.0]}, seeds=1)
        >>> norm_figure(found, arm_styles(["a"], "a")["a"])["data"][0]["y"]  # a norm of 0 has no logarithm
        [1.0, None]
    """
    data = []
    for (term, norms), dash in zip(conflicts.norms.items(), _cycled_dashes(len(conflicts.norms))):
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(norms) < 3 else "lines",
                "name": text(term),
                "x": conflicts.steps,
                "y": rounded([norm if norm > 0 else math.nan for norm in norms]),
                "line": {"color": style.color, "width": 1.75, "dash": dash},
                "marker": {"color": style.color, "size": 6},
                "hovertemplate": f"<b>%{{y:.3g}}</b> at step %{{x:,.0f}}<br>{text(term)}<extra></extra>",
                "showlegend": False,
            }
        )
    layout = base_layout(190, x="steps")
    norms = [norm for found in conflicts.norms.values() for norm in found if norm > 0]
    layout["yaxis"] |= log_axis(min(norms), max(norms)) if norms else {}
    layout["yaxis"]["automargin"] = False
    layout["xaxis"]["range"] = _step_range(conflicts)
    layout["margin"] |= {"l": NORM_MARGIN, "r": 8}
    return {"data": data, "layout": layout}


def term_dashes(conflicts: ConflictMap) -> dict[str, str]:
    """Tell which dash `norm_figure` gives to each term, as an SVG `stroke-dasharray`."""
    return {term: DASHES[dash] for term, dash in zip(conflicts.norms, _cycled_dashes(len(conflicts.norms)))}


def _step_range(conflicts: ConflictMap) -> list[float]:
    steps = conflicts.steps
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if len(steps) > 1 else (1.0, 1.0)
    return [steps[0] - first / 2, steps[-1] + last / 2]


def _cycled_dashes(number: int) -> list[str]:
    return [list(DASHES)[place % len(DASHES)] for place in range(number)]
