"""One line of a benchmark's table."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """A figure with its spread over the repeats, and the limit it should keep if there is one.

    Attributes:
        case: what was measured.
        unit: of `value`, `low`, `high`, `cpu` and `limit`.
        value: median over the repeats, by the wall clock; None if the case could not run (the note says why).
        low: first quartile of the repeats.
        high: third quartile of the repeats.
        cpu: the same median by the processor time of the process, which other programs on the machine disturb less.
        ratio: median over the repeats of this case over the reference case of the same repeat; None if the reference is zero in one.
        limit: the largest (or least, with `at_least`) value that meets the requirement.
        at_least: whether `limit` is a lower limit.
        note: what a reader must know beside the number.

    Examples:
        >>> row = Row.of("half", [[1.0, 1.0], [3.0, 2.0]], "s", over=[[2.0, 2.0], [6.0, 4.0]], limit=1.5)
        >>> row.value, row.cpu, row.ratio, row.met
        (2.0, 1.5, 0.5, False)
    """

    case: str
    unit: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    cpu: float | None = None
    ratio: float | None = None
    limit: float | None = None
    at_least: bool = False
    note: str = ""

    @classmethod
    def of(cls, case: str, repeats: Any, unit: str, *, over: Any = None, **given: Any) -> "Row":
        """Summarise repeats.

        Args:
            case: what was measured.
            repeats: one number for each repeat, or one pair (by wall clock, by processor time).
            unit: of the numbers.
            over: the repeats of a reference case, for `ratio`.
            given: the other fields.

        Raises:
            ValueError: if there are no repeats.
        """
        figures = np.asarray(repeats, dtype=np.float64)
        if figures.size == 0:
            raise ValueError(f"repeats must hold at least one number, got none for {case!r}")
        wall = figures if figures.ndim == 1 else figures[:, 0]
        reference = None if over is None else np.asarray(over, dtype=np.float64).reshape(len(wall), -1)[:, 0]
        low, value, high = (float(part) for part in np.quantile(wall, [0.25, 0.5, 0.75]))
        return cls(
            case,
            unit,
            value,
            low,
            high,
            cpu=None if figures.ndim == 1 else float(np.median(figures[:, 1])),
            ratio=None if reference is None else _median_ratio(wall, reference),
            **given,
        )

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None without a limit or a value."""
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Every field and `met`, as JSON values."""
        return asdict(self) | {"met": self.met}


def _median_ratio(figures: np.ndarray, reference: np.ndarray) -> float | None:
    """A small case may take no memory at all beyond what its process holds: nothing can be said over zero."""
    return float(np.median(figures / reference)) if (reference > 0).all() else None
