"""Solutions of ordinary differential equations at chosen times; what no solver would come to an end with is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coloss.errors import InputError


def check_times(times: Sequence[float]) -> np.ndarray:
    """Times to look at a course that starts at 0, in float64.

    Raises:
        InputError: unless they are finite, increasing and the first >= 0, at least one.

    Examples:
        >>> check_times([0.0, 2.0])
        array([0., 2.])
    """
    grid = np.asarray(list(times), dtype=np.float64)
    rising = len(grid) > 0 and grid[0] >= 0 and bool((np.diff(grid) > 0).all())
    if not (rising and np.isfinite(grid[-1])):
        raise InputError(f"times must be increasing from 0 or later on, and finite, got {list(times)}")
    return grid


def solve_course(
    velocity: Callable[[float, Any], Any], start: np.ndarray, grid: np.ndarray, **options: Any
) -> np.ndarray:
    """Values at each time, one column for each, by `scipy.integrate.solve_ivp`.

    Args:
        velocity: of (time, values).
        start: values at time 0.
        grid: from `check_times`.
        options: further ones of `solve_ivp`.

    Raises:
        InputError: if the velocity at the start is not finite, or a time cannot be reached.

    Examples:
        >>> found = solve_course(lambda time, values: -values, np.ones(1), check_times([0.0, 1.0]), rtol=1e-6)
        >>> found.round(3)
        array([[1.   , 0.368]])
    """
    from scipy.integrate import solve_ivp

    with np.errstate(over="ignore", invalid="ignore"):
        # From a first step that is no number the solver never returns.
        if not np.isfinite(velocity(0.0, start)).all():
            raise InputError(
                "the course must start with a finite velocity: its values or rates are too large"
            )
        span = 0.0, max(float(grid[-1]), 1e-12)
        found = solve_ivp(velocity, span, start, t_eval=grid, **options)
    if not found.success:
        raise InputError(f"times must be reachable, up to {span[1]:g} they are not: {found.message}")
    return found.y
