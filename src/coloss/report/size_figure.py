"""A figure for documents: what models are worth against the bytes they take, as inline SVG without scripts."""

import html
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from coloss.lab.records import ComparisonRecord, TrialRecord
from coloss.report.evidence_figure import axis_ticks
from coloss.report.figure_parts import shorten
from coloss.report.quantities import describe_metric, kilobytes

WIDTH, HEIGHT = 680.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 20.0, 14.0, 44.0
LINE_HEIGHT, LETTER = 12.5, 5.9


def sizes_of(record: ComparisonRecord, trials: Sequence[TrialRecord]) -> dict[str, dict[str, list[float]]]:
    """From a comparison, what `size_svg` draws: for each arm the stored bytes and the metric of its seeds.

    Arms without a stored size, or with a run that gave no finite metric, are left out.

    Examples:
        >>> sizes_of(
        ...     ComparisonRecord(
        ...         title="", task="", arms=[], baseline="", seeds=[0], budget={}, metric="accuracy"
        ...     ),
        ...     [],
        ... )
        {}
    """
    found = {}
    for arm in record.arms:
        own = [trial for trial in trials if trial.arm == arm.name]
        sizes = [trial.cost.stored_bytes for trial in own]
        values = [trial.metrics.get(record.metric, math.nan) for trial in own]
        if own and None not in sizes and all(map(math.isfinite, values)):
            found[arm.name] = {"stored_bytes": [float(size or 0) for size in sizes], record.metric: values}
    return found


def size_svg(arms: Mapping[str, Mapping[str, Sequence[float]]], metric: str) -> str:
    """Draw each arm as a dot at its mean bytes (log scale) and mean metric, a bar from its lowest to its highest seed, and its name.

    Everything is drawn in `currentColor`, so the figure takes the text colour of the page around it, light or dark.

    Args:
        arms: name -> {"stored_bytes": one for each seed, metric: one for each seed}; at least one arm, all numbers finite, bytes > 0.
        metric: which of them is drawn.

    Returns:
        One `<svg>` element that scales with its container and carries its content in words for screen readers.

    Raises:
        ValueError: if there is no arm, or one without finite numbers.

    Examples:
        >>> arms = {
        ...     "plain": {"stored_bytes": [4e5], "accuracy": [0.9]},
        ...     "half": {"stored_bytes": [2e5], "accuracy": [0.8]},
        ... }
        >>> svg = size_svg(arms, "accuracy")
        >>> svg.startswith("<svg"), svg.count("<circle")
        (True, 2)
    """
    for name, numbers in arms.items():
        values = [*numbers.get("stored_bytes", ()), *numbers.get(metric, ())]
        complete = numbers.get("stored_bytes") and numbers.get(metric)
        if not complete or not all(map(math.isfinite, values)) or min(numbers["stored_bytes"]) <= 0:
            raise ValueError(
                f"arms must have finite stored_bytes > 0 and {metric}, got {name} with {dict(numbers)}"
            )
    if not arms:
        raise ValueError("arms must be at least one, got none")
    quantity = describe_metric(metric, [value for numbers in arms.values() for value in numbers[metric]])
    sizes = {name: fmean(numbers["stored_bytes"]) for name, numbers in arms.items()}
    values_of = {
        name: [quantity.factor * value for value in numbers[metric]] for name, numbers in arms.items()
    }
    everything = [value for values in values_of.values() for value in values]
    ticks, decimals = axis_ticks(min(everything), max(everything))
    low, high = min(ticks[0], *everything), max(ticks[-1], *everything)
    first, last = math.log10(min(sizes.values()) / 1.15), math.log10(max(sizes.values()) * 1.15)

    def across(size: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(size) - first) / (last - first), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    floor = HEIGHT - BOTTOM
    parts = [
        f'<path d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}" fill="none" stroke="currentColor" stroke-opacity=".4"/>'
    ]
    for tick in ticks:
        parts.append(
            f'<path d="M{LEFT} {up(tick)}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".12"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end" class="quiet">{tick:.{decimals}f}</text>'
        )
    for size in _round_sizes(10**first, 10**last):
        parts.append(f'<path d="M{across(size)} {floor}v4" stroke="currentColor" stroke-opacity=".4"/>')
        parts.append(
            f'<text x="{across(size)}" y="{floor + 16}" text-anchor="middle" class="quiet">{size / 1000:g}</text>'
        )
    axis = f"kilobytes of the compressed file (log scale); upwards: {quantity.axis}"
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" class="quiet">{html.escape(axis)}</text>'
    )
    places = {name: (across(sizes[name]), up(fmean(values_of[name]))) for name in arms}
    for name, (x, y, anchor) in _label_places(places).items():
        parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(shorten(name, 40))}</text>'
        )
    for name, (x, y) in places.items():
        ends = up(max(values_of[name])), up(min(values_of[name]))
        parts.append(
            f'<path d="M{x} {ends[0]}V{ends[1]}" stroke="currentColor" stroke-opacity=".45" stroke-width="1.5"/>'
        )
        note = f"{name}: {quantity.value(fmean(arms[name][metric]))}, {kilobytes(sizes[name])}"
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="4" fill="currentColor"><title>{html.escape(note)}</title></circle>'
        )
    words = "; ".join(
        f"{name} {quantity.value(fmean(arms[name][metric]))} in {kilobytes(sizes[name])}" for name in arms
    )
    body = "".join(parts).replace('class="quiet"', 'fill-opacity=".7"')
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="100%" style="max-width:52rem" role="img" '
        f'aria-label="{html.escape(f"{quantity.name} against stored size: {words}", quote=True)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="inherit" font-size="11" '
        f'fill="currentColor">{body}</svg>'
    )


def _round_sizes(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        factor * 10.0**power
        for power in powers
        for factor in (1, 2, 5)
        if low <= factor * 10.0**power <= high
    ]


def _label_places(places: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float, str]]:
    """Beside each dot, on the side where there is room, moved down past labels that are in the way."""
    taken: list[tuple[float, float, float]] = []
    found = {}
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        width = LETTER * len(shorten(name, 40))
        left = x + 8 + width > WIDTH - 4
        start = x - 8 - width if left else x + 8
        base = y + 4
        while any(
            abs(base - other) < LINE_HEIGHT and start < end and begin < start + width
            for begin, end, other in taken
        ):
            base += 2
        taken.append((start, start + width, base))
        found[name] = (x - 8 if left else x + 8, base, "end" if left else "start")
    return found
