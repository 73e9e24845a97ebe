"""How numbers are written: metrics as percent or plain, differences in points, times, counts and memory."""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"

SHARES = frozenset(
    ("accuracy", "acc", "top1", "top5", "f1", "precision", "recall", "auc", "auroc", "auprc", "ap", "map")
    + ("ndcg", "mrr", "iou", "miou", "dice", "hit", "hits", "coverage")
)
"""Words in a metric's name that say its values are shares of one, read as percent."""


@dataclass(frozen=True)
class Quantity:
    """How the values of one metric are written.

    Attributes:
        name: the metric in words.
        factor: what a stored value is multiplied by before it is shown; 100 for shares.
        unit: follows a value directly, "%" or "".
        difference_unit: follows a difference, "points" or "".
        decimals: digits after the point.
    """

    name: str
    factor: float = 1.0
    unit: str = ""
    difference_unit: str = ""
    decimals: int = 3

    def number(self, value: float | None, signed: bool = False) -> str:
        """Write the scaled number alone; an en dash where there is none.

        Examples:
            >>> Quantity("accuracy", factor=100, decimals=1).number(0.009, signed=True)
            '+0.9'
        """
        if value is None or not math.isfinite(value):
            return MISSING
        rounded = round(value * self.factor, self.decimals) + 0.0
        digits = f"{abs(rounded):.{self.decimals}f}"
        if abs(rounded) >= 1e6 or (rounded == 0 != value and self.decimals >= 6):
            digits = f"{abs(value * self.factor):.3g}"
        sign = (
            MINUS
            if rounded < 0 or (digits.strip("0.") and value < 0)
            else "+"
            if signed and rounded > 0
            else ""
        )
        return sign + digits

    def value(self, value: float | None) -> str:
        """Write a value of the metric with its unit.

        Examples:
            >>> Quantity("accuracy", factor=100, unit="%", decimals=1).value(0.921)
            '92.1%'
        """
        text = self.number(value)
        return text if text == MISSING else text + self.unit

    def amount(self, value: float | None) -> str:
        """Write the size of a difference, without its sign.

        Examples:
            >>> Quantity("accuracy", factor=100, unit="%", difference_unit="points", decimals=1).amount(
            ...     -0.009
            ... )
            '0.9 points'
        """
        text = self.number(None if value is None else abs(value))
        return text if text == MISSING else f"{text} {self.difference_unit}".strip()

    @property
    def axis(self) -> str:
        """The title of an axis that shows values of the metric."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def describe_metric(name: str, values: Iterable[float] = ()) -> Quantity:
    """Decide how a metric is written: a share within [0, 1] as percent, anything else plainly.

    Plain numbers get four significant digits, or more where the spread of the values needs them, up to six decimals.

    Args:
        name: the metric's name, such as "accuracy" or "recall@5".
        values: what will be shown; numbers that are not finite are left out.

    Examples:
        >>> describe_metric("accuracy", [0.91, 0.93]).value(0.921)
        '92.1%'
        >>> describe_metric("nll", [2.31, 2.44, 2.52]).value(2.4)
        '2.400'
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    words = re.split(r"[^a-z0-9]+", name.lower())
    share = any(word in SHARES for word in words) and all(0 <= value <= 1 for value in finite)
    factor = 100.0 if share else 1.0
    spread = factor * (max(finite) - min(finite)) if finite else 0.0
    size = factor * statistics.median(abs(value) for value in finite) if finite else 0.0
    visible = -math.floor(math.log10(spread)) if 0 < spread < math.inf else 0
    label = name.replace("_", " ").strip() or "metric"
    if share:
        return Quantity(label, factor, "%", "points", min(max(visible + 1, 1), 2))
    significant = 3 - math.floor(math.log10(size)) if 0 < size < math.inf else 3
    return Quantity(label, factor, decimals=min(max(significant, visible, 0), 6))


def duration(seconds: float | None) -> str:
    """Write a time span in the largest unit that keeps it readable.

    Examples:
        >>> duration(0.42), duration(12.34), duration(95), duration(7325)
        ('0.42 s', '12.3 s', '1 min 35 s', '2 h 2 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def cosine(value: float | None) -> str:
    """Write a cosine.

    Examples:
        >>> cosine(0.25), cosine(-0.004)
        ('+0.25', '0.00')
    """
    return Quantity("cosine", decimals=2).number(value, signed=True)


def count(number: float | None) -> str:
    """Write a count with thousands apart, and millions short.

    Examples:
        >>> count(1234), count(12_345_678), count(49.83)
        ('1,234', '12.3 M', '49.8')
    """
    if number is None or not math.isfinite(number):
        return MISSING
    if abs(number) >= 1e7:
        return f"{number / 1e6:.1f} M"
    if abs(number) < 100 and number != round(number):
        return f"{number:.1f}"
    return f"{number:,.0f}"


def memory(megabytes: float | None) -> str:
    """Write an amount of memory.

    Examples:
        >>> memory(12.34), memory(2048)
        ('12.3 MB', '2.0 GB')
    """
    if megabytes is None or not math.isfinite(megabytes):
        return MISSING
    return f"{megabytes:.1f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


def kilobytes(number: float | None) -> str:
    """Write the size of a file.

    Examples:
        >>> kilobytes(61_234), kilobytes(2_500_000)
        ('61.2 kB', '2,500 kB')
    """
    if number is None or not math.isfinite(number):
        return MISSING
    return f"{number / 1000:,.0f} kB" if number >= 1e6 else f"{number / 1000:.1f} kB"
