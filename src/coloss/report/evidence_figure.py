"""A small figure for documents: the paired differences of one claim against a zero line, as inline SVG without scripts."""

import html
import math
from collections.abc import Mapping, Sequence

from coloss.report.figure_parts import shorten

WIDTH, HEIGHT, SIDE = 420.0, 92.0, 14.0


def difference_svg(
    differences: Mapping[int, float] | Sequence[float],
    interval: tuple[float, float] | None = None,
    *,
    label: str = "difference to the baseline",
    unit: str = "",
    factor: float = 1.0,
    decimals: int | None = None,
) -> str:
    """Draw each seed's difference as a dot, their mean as a diamond, its interval as a line, and where 0 lies.

    Everything is drawn in `currentColor`, so the figure takes the text colour of the page around it, light or dark.

    Args:
        differences: method - baseline of each seed, as seed -> difference or in any order; at least one, all finite.
        interval: (low, high) of the mean difference; None draws none.
        label: what the axis shows.
        unit: follows the numbers, such as "points".
        factor: numbers are multiplied by it before they are drawn, such as 100 for shares.
        decimals: digits after the point; by default as many as the ticks of the axis need, and one more.

    Returns:
        One `<svg>` element that scales with its container and carries its content in words for screen readers.

    Raises:
        ValueError: if differences are empty or not finite, or the interval is not finite or not in order.

    Examples:
        >>> svg = difference_svg([0.004, 0.009, 0.014], (-0.003, 0.021), unit="points", factor=100)
        >>> svg.startswith("<svg"), svg.count("<circle")
        (True, 3)
    """
    seeds = differences if isinstance(differences, Mapping) else dict(enumerate(differences))
    values = {seed: factor * value for seed, value in seeds.items()}
    if not values or not all(map(math.isfinite, values.values())):
        raise ValueError(f"differences must be at least one finite number, got {list(seeds.values())}")
    bounds = None if interval is None else (factor * interval[0], factor * interval[1])
    if bounds is not None and not (all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
        raise ValueError(f"interval must be finite with low <= high, got {interval}")

    mean = sum(values.values()) / len(values)
    extremes = [0.0, *values.values(), *(bounds or ())]
    low, high = min(extremes), max(extremes)
    ticks, digits = axis_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    digits = digits + 1 if decimals is None else decimals

    def place(value: float) -> float:
        return round(SIDE + (WIDTH - 2 * SIDE) * (value - low) / (high - low), 2)

    def number(value: float) -> str:
        rounded = round(value, digits) + 0.0
        return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if rounded else f"{0:.{digits}f}"

    words = f"mean {number(mean)} {unit}".strip()
    if bounds is not None:
        words += f", 95% interval {number(bounds[0])} to {number(bounds[1])}"
    words += f", {len(values)} seed{'s' if len(values) > 1 else ''}"
    parts = [
        f'<text x="{SIDE}" y="13" font-weight="600">{html.escape(words)}</text>',
        f'<path d="M{SIDE} 64H{WIDTH - SIDE}" stroke="currentColor" stroke-opacity=".3"/>',
        f'<path d="M{place(0.0)} 24V64" stroke="currentColor" stroke-opacity=".65"/>',
    ]
    for tick in ticks:
        text = "0" if abs(tick) < 1e-12 else f"{tick:+g}".replace("-", "\N{MINUS SIGN}")
        parts.append(f'<path d="M{place(tick)} 64v4" stroke="currentColor" stroke-opacity=".3"/>')
        parts.append(f'<text x="{place(tick)}" y="78" text-anchor="middle" class="quiet">{text}</text>')
    axis = html.escape(shorten(f"{label} ({unit})" if unit else label, 64))
    parts.append(f'<text x="{WIDTH / 2}" y="91" text-anchor="middle" class="quiet">{axis}</text>')
    if bounds is not None:
        parts.append(
            f'<path d="M{place(bounds[0])} 36H{place(bounds[1])}" stroke="currentColor" stroke-width="2.5" '
            'stroke-linecap="round"/>'
        )
    for seed, value in values.items():
        parts.append(
            f'<circle cx="{place(value)}" cy="53" r="3.5" fill="currentColor" fill-opacity=".5">'
            f"<title>seed {seed}: {number(value)}</title></circle>"
        )
    x = place(mean)
    parts.append(f'<path d="M{x} 29.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z" fill="currentColor"/>')
    body = "".join(parts).replace('class="quiet"', 'fill-opacity=".7" font-size="11"')
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT + 4:g}" width="100%" style="max-width:36rem" role="img" '
        f'aria-label="{html.escape(label, quote=True)}: {html.escape(words, quote=True)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="inherit" font-size="12" '
        f'fill="currentColor">{body}</svg>'
    )


def axis_ticks(low: float, high: float, most: int = 5) -> tuple[list[float], int]:
    """Choose round numbers that cover an interval, and how many decimals they need.

    Args:
        low: lower end.
        high: upper end; an interval without width is widened around its value.
        most: about how many steps at most.

    Examples:
        >>> axis_ticks(-0.3, 2.1)
        ([-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5], 1)
    """
    if high <= low:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [round(number * step, decimals) + 0.0 for number in range(first, last + 1)], decimals
