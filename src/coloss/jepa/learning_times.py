r"""When a deep linear network learns a feature: exact times and final gains of latent prediction (JEPA) and of reconstruction (MAE).

Littwin et al. 2024, "How JEPA Avoids Noisy Features: The Implicit Bias of Deep Linear Self Distillation Networks", NeurIPS 2024, arXiv
2407.03475. The equations below were derived again from the two losses and checked by simulation; the paper's constants may differ by
the scale of time and start.

Views x, y, centred, with S_xx = E[x x^T] and S_yx = E[y x^T] diagonal in one basis. Feature i has the `covariance` lambda = (S_yx)_ii
and the `regression` coefficient rho = lambda / (S_xx)_ii of y on x. The encoder is a product W of `depth` L square matrices, the head V
one more:

    JEPA  1/2 E |V W x - stop_gradient(W y)|^2          MAE  1/2 E |V W x - y|^2

From balanced small weights (each start^(1/L) times an orthogonal matrix) nothing mixes. The gain w of a feature, its stretch by the
encoder, starts at `start`; with u = w^(1/L):

    JEPA  du/dt = lambda u^(2L) (1 - u / rho)           w -> rho^L
    MAE   du/dt = lambda u^L (1 - u^(L+1) / rho)        w -> rho^(L/(L+1))

Among features of one covariance JEPA learns those of a high regression coefficient first, the more so the deeper and the smaller the
start: their times differ by about start^(-(2L-2)/L); those of MAE by a constant. With L = 1 there is no such preference. A feature with
lambda <= 0 is never learned.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.jepa.time_courses import check_times, solve_course

Objective = Literal["jepa", "mae"]
Values = Tensor | float


def jepa_time(
    covariance: Values, regression: Values, depth: int, start: float, share: float = 0.5
) -> Float[Tensor, "*features"]:
    """Training time at which latent prediction has brought features to a share of their final gain, in closed form.

    With u0 = start^(1/L), u = (share rho^L)^(1/L):

        t = 1/lambda ( sum_{n=2}^{2L} rho^(n-2L) (u0^(1-n) - u^(1-n)) / (n-1)
                       + rho^(1-2L) (log(u / u0) - log((1 - u/rho) / (1 - u0/rho))) )

    Args:
        covariance: lambda of each feature.
        regression: rho of each feature.
        depth: L >= 1, matrices of the encoder.
        start: gain at the beginning, > 0.
        share: of the final gain rho^L, in (0, 1).

    Returns:
        Float64; number of gradient steps times the learning rate. Infinite where lambda <= 0: never learned; NaN where `start` is not below
        the share of the final gain, so that there is no rise to time.

    Raises:
        ValueError: for a value out of range.

    Source:
        After Littwin et al. 2024, arXiv 2407.03475; derived again.

    Examples:
        >>> jepa_time(torch.tensor([1.0, 1.2]), torch.tensor([0.9, 0.3]), depth=2, start=0.004).round()
        tensor([1476., 1556.], dtype=torch.float64)
    """
    lam, rho, level = _checked(covariance, regression, depth, start, share, "jepa")
    power = 2 * depth
    first, last = start ** (1 / depth), level ** (1 / depth)
    total = rho ** (1 - power) * (torch.log(last / first) - torch.log((1 - last / rho) / (1 - first / rho)))
    for n in range(2, power + 1):
        total = total + rho ** (n - power) / (n - 1) * (first ** (1 - n) - last ** (1 - n))
    return _times(total / lam, lam, level, start)


def mae_time(
    covariance: Values, regression: Values, depth: int, start: float, share: float = 0.5
) -> Float[Tensor, "*features"]:
    """Training time at which reconstruction has brought features to a share of their final gain.

    With u0 = start^(1/L), u = (share rho^(L/(L+1)))^(1/L):

        t = 1/lambda  integral from u0 to u of ds / (s^L (1 - s^(L+1) / rho))

    Args:
        covariance: lambda of each feature.
        regression: rho of each feature.
        depth: L >= 1, matrices of the encoder.
        start: gain at the beginning, > 0.
        share: of the final gain rho^(L/(L+1)), in (0, 1).

    Returns:
        As `jepa_time`.

    Raises:
        ValueError: for a value out of range.

    Source:
        After Littwin et al. 2024, arXiv 2407.03475; derived again.

    Examples:
        >>> mae_time(torch.tensor([1.0, 1.2]), torch.tensor([0.9, 0.3]), depth=2, start=0.004).round(
        ...     decimals=2
        ... )
        tensor([14.6500, 11.7800], dtype=torch.float64)
    """
    from scipy.special import hyp2f1

    lam, rho, level = _checked(covariance, regression, depth, start, share, "mae")
    first, last = torch.full_like(level, start ** (1 / depth)), level ** (1 / depth)

    def primitive(u: Tensor) -> Tensor:
        if depth == 1:
            return torch.log(u) - torch.log1p(-u.square() / rho) / 2
        z = (u ** (depth + 1) / rho).numpy()
        # Of s^-L / (1 - s^(L+1) / rho), term by term of its geometric series.
        series = hyp2f1(1.0, (1 - depth) / (1 + depth), 2 / (1 + depth), z)
        return u ** (1 - depth) / (1 - depth) * torch.from_numpy(np.asarray(series))

    return _times((primitive(last) - primitive(first)) / lam, lam, level, start)


def fixed_point(objective: Objective, regression: Values, depth: int) -> Float[Tensor, "*features"]:
    """The gain that features end with: rho^L for "jepa", rho^(L/(L+1)) for "mae"; 0 where rho <= 0.

    Args:
        objective: "jepa" or "mae".
        regression: rho of each feature.
        depth: L >= 1.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> fixed_point("jepa", 0.5, depth=2).item(), round(fixed_point("mae", 0.5, depth=2).item(), 4)
        (0.25, 0.63)
    """
    check_objective(objective, depth)
    power = depth if objective == "jepa" else depth / (depth + 1)
    return torch.as_tensor(regression, dtype=torch.float64).clamp(min=0) ** power


def integrate(
    objective: Objective,
    covariance: Float[Tensor, " features"],
    regression: Float[Tensor, " features"],
    depth: int,
    start: float,
    times: Sequence[float],
) -> Float[Tensor, "times features"]:
    """The whole course of the gains, by integrating log u with steps that adapt.

    Args:
        objective: "jepa" or "mae".
        covariance: lambda of each feature.
        regression: rho of each feature, of the same sign; not 0.
        depth: L >= 1.
        start: gain at time 0, > 0.
        times: when to look, finite and increasing, the first >= 0.

    Returns:
        Gain of each feature at each time, float64.

    Raises:
        ValueError: for a value out of range, or a course that cannot be integrated.

    Cost:
        Some hundred evaluations, whatever the times: plain gradient steps of a fixed size would need `start^(-(2L-1)/L)`.

    Examples:
        >>> course = integrate("jepa", torch.tensor([1.0]), torch.tensor([0.5]), 2, 0.01, [0.0, 1e6])
        >>> [round(float(gain), 4) for gain in course]
        [0.01, 0.25]
    """
    check_objective(objective, depth)
    check_start(start)
    lam, rho = (value.detach().double().numpy() for value in (covariance, regression))
    known = lam.shape == rho.shape and np.isfinite([lam, rho]).all()
    if not known or not bool(np.all(lam * rho > 0)):
        raise InputError(
            "covariance and regression must be finite, of one sign in each feature, and not 0, "
            f"got {lam.tolist()} and {rho.tolist()}"
        )
    grid = check_times(times)
    energy = lam / rho
    rise, fall = (2 * depth - 1, 2 * depth) if objective == "jepa" else (depth - 1, 2 * depth)

    def velocity(_: float, log: Any, pull: float, drag: float) -> Any:
        return pull * np.exp(rise * log) - drag * np.exp(fall * log)

    courses = [
        # One feature at a time: each has its own scale of time.
        solve_course(
            partial(velocity, pull=pull, drag=drag),
            np.array([math.log(start) / depth]),
            grid,
            method="LSODA",
            rtol=1e-9,
            atol=1e-11,
        )[0]
        for pull, drag in zip(lam, energy)
    ]
    return torch.from_numpy(np.exp(depth * np.stack(courses, 1))) if courses else torch.zeros(len(grid), 0)


def check_objective(objective: str, depth: int) -> None:
    """Refuse an objective or a depth that there is not.

    Raises:
        InputError: naming the argument, the rule and the value.

    Examples:
        >>> check_objective("jepa", 0)
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: depth must be >= 1, got 0
    """
    if objective not in ("jepa", "mae"):
        raise InputError(f'objective must be "jepa" or "mae", got {objective!r}')
    if depth < 1:
        raise InputError(f"depth must be >= 1, got {depth}")


def check_start(start: float) -> None:
    """Refuse a first gain that is not positive.

    Raises:
        InputError: naming the argument, the rule and the value.

    Examples:
        >>> check_start(0.0)
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: start must be > 0 and finite, got 0.0
    """
    if not 0 < start < math.inf:
        raise InputError(f"start must be > 0 and finite, got {start}")


def _checked(
    covariance: Values, regression: Values, depth: int, start: float, share: float, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Lambda, rho and the gain to be reached, in float64; stand-ins where there is no time to give."""
    check_objective(objective, depth)
    check_start(start)
    if not 0 < share < 1:
        raise InputError(f"share must be in (0, 1), got {share}")
    lam, rho = torch.broadcast_tensors(
        *(torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (covariance, regression))
    )
    return lam, rho, share * fixed_point(objective, rho, depth)


def _times(found: Tensor, lam: Tensor, level: Tensor, start: float) -> Tensor:
    found = torch.where(level > start, found, math.nan)
    return torch.where(lam > 0, found, torch.where(lam.isnan(), math.nan, math.inf))
