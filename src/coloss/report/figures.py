"""The charts of a report as Plotly figures in plain dicts, drawn in the light palette; a page maps colours for dark.

No figure has a legend: all charts of a page share one, which finds the traces of an arm by their `legendgroup`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from coloss.lab.records import ComparisonRecord, TrialRecord
from coloss.metrics.statistics import mean_interval
from coloss.report.curves import Axis, Curve
from coloss.report.figure_parts import (
    INK,
    LINE,
    MUTED,
    PAGE,
    Figure,
    base_layout,
    label_above,
    log_axis,
    rounded,
    rule,
    shorten,
    text,
)
from coloss.report.palette import Style
from coloss.report.quantities import Quantity, count, duration, kilobytes
from coloss.report.ranking import Row

Costs = Literal["training", "preparation", "parameters", "stored"]

SEED_OPACITY = 0.6
AXIS_TITLES = {"seconds": "training seconds", "steps": "steps"}


def ranking_figure(
    rows: Sequence[Row],
    styles: Mapping[str, Style],
    quantity: Quantity,
    *,
    direction: Literal["higher", "lower"] = "higher",
    differences: bool = True,
) -> Figure:
    """Each arm on a line of its own: a dot for each seed, the mean and its 95% interval.

    Args:
        rows: what `rank_arms` gave.
        styles: how arms are drawn.
        quantity: how the metric is written.
        direction: which way is better; said on the axis.
        differences: paired differences, with the baseline as the zero line; else the metric's own values.

    Examples:
        >>> ranking_figure([], {}, Quantity("accuracy", 100, "%", "points"))["layout"]["xaxis"]["title"][
        ...     "text"
        ... ]
        'difference in accuracy (points) · better →<br>0 is '
    """
    shown = [
        row for row in rows if (row.difference is not None if differences else _finite(row.values.values()))
    ]
    data, labels = [], []
    for place, row in enumerate(shown):
        values = row.differences if differences else {s: v for s, v in row.values.items() if math.isfinite(v)}
        if differences:
            mean, interval = row.difference, row.interval
        else:
            mean, interval, _ = (None, None, 0) if row.failed else mean_interval(list(values.values()))
        data += _ranking_traces(
            place, row.arm, styles[row.arm], values, mean, interval, quantity, differences
        )
        labels.append(label_above(place - 0.26, row.arm))
    baseline = next((row.arm for row in rows if row.verdict == "baseline"), "")
    unit = quantity.difference_unit if differences else quantity.unit
    title = shorten(f"difference in {quantity.name}" if differences else quantity.name)
    better = "better →" if direction == "higher" else "← better"
    layout = base_layout(
        58 * max(len(shown), 1) + 62, x=f"{text(title)}{f' ({unit})' if unit else ''} · {better}"
    )
    layout["yaxis"] |= {"visible": False, "range": [len(shown) - 0.5, -0.5], "fixedrange": True}
    layout["xaxis"]["range"] = _padded(data, 0.0 if differences else None)
    layout["margin"] |= {"l": 4, "r": 4, "t": 4}
    layout["annotations"] = labels
    layout["shapes"] = [rule("y", place - 0.5, LINE) for place in range(1, len(shown))]
    if differences:
        layout["shapes"].append(rule("x", 0.0, INK, width=1.5))
        layout["xaxis"]["title"]["text"] += f"<br>0 is {text(shorten(baseline))}"
        layout["height"] += 18
    return {"data": data, "layout": layout}


def curve_figure(
    curves: Sequence[Curve],
    styles: Mapping[str, Style],
    quantity: Quantity,
    axis: Axis,
    *,
    height: int = 380,
    target: float | None = None,
) -> Figure:
    """One quantity over training: a line for the mean of each arm, a band from its lowest to highest seed.

    The axis is logarithmic where all values are positive and span more than a factor of 50.

    Args:
        curves: one for each arm that logged the quantity.
        styles: how arms are drawn.
        quantity: how the quantity is written.
        axis: what lies along x.
        height: in pixels.
        target: drawn as a dashed line.

    Examples:
        >>> from coloss.report.palette import arm_styles
        >>> curve = Curve("plain", x=[0, 10], mean=[0.1, 0.9], low=[0.1, 0.8], high=[0.1, 0.95], seeds=3)
        >>> styles = arm_styles(["plain"], "plain")
        >>> band, line = curve_figure([curve], styles, Quantity("accuracy", 100, "%"), "steps")["data"]
        >>> line["y"], band["y"]
        ([10.0, 90.0], [10.0, 95.0, 80.0, 10.0])
    """
    bands, lines = [], []
    for curve in curves:
        style = styles[curve.arm]
        keep = [i for i, value in enumerate(curve.mean) if math.isfinite(value)]
        low, high = ([quantity.factor * side[i] for i in keep] for side in (curve.low, curve.high))
        x = [curve.x[i] for i in keep]
        shared = {"name": text(curve.arm), "legendgroup": style.key, "showlegend": False}
        if curve.seeds > 1 and len(keep) > 1:
            bands.append(
                shared
                | {
                    "type": "scatter",
                    "mode": "lines",
                    "x": rounded(x + x[::-1]),
                    "y": rounded(high + low[::-1]),
                    "fill": "toself",
                    "fillcolor": style.color,
                    "opacity": 0.13 if len(curves) <= 6 else 0.07,
                    "line": {"width": 0, "color": style.color},
                    "hoverinfo": "skip",
                }
            )
        unit = "%{x:.3~s} s" if axis == "seconds" else "step %{x:,.0f}"
        lines.append(
            shared
            | {
                "type": "scatter",
                "mode": "lines+markers" if len(curve.x) < 12 else "lines",
                "x": rounded(curve.x),
                "y": rounded([quantity.factor * value for value in curve.mean]),
                "line": {"color": style.color, "width": 2, "dash": style.dash},
                "marker": {"color": style.color, "symbol": style.symbol, "size": 6},
                "hovertemplate": f"<b>%{{y:.{quantity.decimals}f}}{quantity.unit}</b> at {unit}<br>"
                f"{text(shorten(curve.arm, 60))}<extra></extra>",
            }
        )
    layout = base_layout(height, x=AXIS_TITLES[axis])
    layout["xaxis"]["rangemode"] = "tozero"
    values = [value for curve in curves for value in (*curve.low, *curve.high) if math.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) > 50:
        layout["yaxis"] |= log_axis(quantity.factor * min(values), quantity.factor * max(values))
        layout["yaxis"]["title"]["text"] = "log scale"
    if target is not None:
        layout["shapes"] = [rule("y", quantity.factor * target, MUTED, dash="dash")]
        layout["annotations"] = [
            {
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": quantity.factor * target,
                "yanchor": "bottom",
                "text": f"target {quantity.value(target)}",
                "showarrow": False,
                "font": {"size": 12, "color": MUTED},
            }
        ]
    return {"data": bands + lines, "layout": layout}


def cost_figure(
    record: ComparisonRecord,
    trials: Sequence[TrialRecord],
    styles: Mapping[str, Style],
    quantity: Quantity,
    cost: Costs = "training",
) -> Figure:
    """The metric against what it cost: a small mark for each seed, a larger one for the mean of each arm.

    An arm with a run that gave no number has no mean.

    Args:
        record: the plan.
        trials: the finished trials.
        styles: how arms are drawn.
        quantity: how the metric is written.
        cost: "training" seconds, training with "preparation", "parameters", or bytes "stored" (a trial that has no such number is left out);
            log scale over a factor of 20, for bytes over one of 4.
    """
    small: list[Figure] = []
    large: list[Figure] = []
    spent: list[float] = []
    for arm in record.arms:
        points = [
            (trial_cost(trial, cost), trial.metrics.get(record.metric, math.nan), f"seed {trial.seed}")
            for trial in trials
            if trial.arm == arm.name
        ]
        found = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
        if not found:
            continue
        spent += [point[0] for point in found]
        small.append(_cost_trace(arm.name, styles[arm.name], found, quantity, cost, size=7))
        if len(found) == len(points):
            middle = (
                sum(point[0] for point in found) / len(found),
                sum(point[1] for point in found) / len(found),
            )
            means = [(*middle, "mean")]
            large.append(_cost_trace(arm.name, styles[arm.name], means, quantity, cost, size=15))
    titles = {
        "training": "training seconds",
        "preparation": "seconds of preparation and training",
        "parameters": "parameters of the model as it ships",
        "stored": "kilobytes of the compressed file of the model as it ships",
    }
    layout = base_layout(400, x=titles[cost])
    if spent and min(spent) > 0 and max(spent) / min(spent) > (4 if cost == "stored" else 20):
        layout["xaxis"]["type"] = "log"
        layout["xaxis"]["title"]["text"] += ", log scale"
    return {"data": small + large, "layout": layout}


def trial_cost(trial: TrialRecord, cost: Costs) -> float:
    """Read from a trial what `cost_figure` draws along x."""
    if cost == "parameters":
        return float(trial.cost.parameters)
    if cost == "stored":
        return math.nan if trial.cost.stored_bytes is None else trial.cost.stored_bytes / 1000
    return trial.cost.seconds + (trial.cost.prepare_seconds if cost == "preparation" else 0.0)


def _ranking_traces(
    place: int,
    arm: str,
    style: Style,
    values: Mapping[int, float],
    mean: float | None,
    interval: tuple[float, float] | None,
    quantity: Quantity,
    signed: bool,
) -> list[Figure]:
    unit = quantity.difference_unit if signed else quantity.unit
    spaced = f" {unit}" if unit and unit != "%" else unit
    shared = {
        "type": "scatter",
        "name": text(arm),
        "legendgroup": style.key,
        "showlegend": False,
        "hoverinfo": "text",
    }
    seeds = shared | {
        "mode": "markers",
        "x": rounded([quantity.factor * value for value in values.values()]),
        "y": [place + 0.32] * len(values),
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "size": style.size(7),
            "opacity": SEED_OPACITY,
        },
        "hovertext": [
            f"<b>{quantity.number(value, signed=signed)}{spaced}</b><br>{text(shorten(arm, 60))}, seed {seed}"
            for seed, value in values.items()
        ],
    }
    if mean is None:
        return [seeds]
    note = f"<b>{quantity.number(mean, signed=signed)}{spaced}</b><br>{text(shorten(arm, 60))}, mean"
    traces = [seeds]
    if interval is not None:
        low, high = (quantity.number(bound, signed=signed) for bound in interval)
        note += f"<br>95% interval {low} to {high}"
        traces.append(
            shared
            | {
                "mode": "lines",
                "x": rounded([quantity.factor * bound for bound in interval]),
                "y": [place + 0.07] * 2,
                "line": {"color": style.color, "width": 3},
                "hoverinfo": "skip",
            }
        )
    middle = {
        "mode": "markers",
        "x": rounded([quantity.factor * mean]),
        "y": [place + 0.07],
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "size": style.size(13),
            "line": {"color": PAGE, "width": 2},
        },
        "hovertext": [note],
    }
    return [*traces, shared | middle]


def _cost_trace(
    arm: str,
    style: Style,
    points: Sequence[tuple[float, float, str]],
    quantity: Quantity,
    cost: Costs,
    size: float,
) -> Figure:
    large = size > 10
    name = text(shorten(arm, 60))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text(arm),
        "legendgroup": style.key,
        "showlegend": False,
        "x": rounded([x for x, _, _ in points]),
        "y": rounded([quantity.factor * y for _, y, _ in points]),
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "size": style.size(size),
            "opacity": 1 if large else SEED_OPACITY,
            "line": {"width": 2 if large else 0, "color": PAGE},
        },
        "hovertext": [
            f"<b>{quantity.value(y)}</b> for {_spent(x, cost)}<br>{name}, {note}" for x, y, note in points
        ],
        "hoverinfo": "text",
    }


def _padded(data: Sequence[Figure], *extra: float | None) -> list[float]:
    values = [value for trace in data for value in trace["x"] if value is not None]
    values += [value for value in extra if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - room, high + room]


def _spent(amount: float, cost: Costs) -> str:
    if cost == "stored":
        return kilobytes(1000 * amount)
    return f"{count(amount)} parameters" if cost == "parameters" else duration(amount)


def _finite(values: Iterable[float]) -> bool:
    return any(math.isfinite(value) for value in values)
