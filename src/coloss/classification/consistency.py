r"""From excess loss to excess error: how much the error of a classifier can exceed the best one, given how far its loss is from the best.

Mao, Mohri, Zhong, 2023, ICML, arXiv 2304.07288 (H-consistency bounds). For the comp-sum loss with parameter tau on n classes, and
hypothesis sets that are symmetric and complete (unbounded linear models, networks), every classifier h has

    error(h) - best error <= Gamma(R(h) - R* + M),      Gamma = inverse of T on [0, 1]

    0 <= tau < 1    T(b) = 2^(1-tau) / (1-tau) * (1 - A(b))
    tau = 1         T(b) = (1+b)/2 log(1+b) + (1-b)/2 log(1-b)
    1 < tau < 2     T(b) = (A(b) - 1) / ((tau-1) n^(tau-1))          A(b) = (((1+b)^(1/s) + (1-b)^(1/s)) / 2)^s,   s = 2 - tau
    tau >= 2        T(b) = b / ((tau-1) n^(tau-1))

with R* the best risk of the hypothesis set and M its minimizability gap: R* minus the mean over x of the best risk at x, which is 0 when
the set holds every function. Simple bounds: Gamma(x) <= sqrt(2^tau (2-tau) x), sqrt(2 n^(tau-1) x), (tau-1) n^(tau-1) x for the three
ranges tau < 1, 1 <= tau < 2, tau >= 2. For n = 2 and tau <= 2, T is tight. The factor n^(tau-1) is the price of a large tau.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_NEAR_ONE = 1e-7
"""Distance of tau from 1 below which the logarithmic form is closer than the rounding of the general one."""

_HALVINGS = 64
"""Of [0, 1], until the solution is known to 1e-19."""


def consistency_transform(
    excess_error: Float[Tensor, "*shape"] | float, tau: float, num_classes: int
) -> Float[Tensor, "*shape"]:
    """The least excess loss that a given excess error implies: T of this module.

    Args:
        excess_error: b in [0, 1].
        tau: >= 0, of the comp-sum loss.
        num_classes: n >= 2.

    Returns:
        T(b) in float64, 0 at b = 0 and increasing.

    Raises:
        ValueError: for a value out of range.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288, theorem 3.1.

    Examples:
        >>> consistency_transform(1.0, tau=1.0, num_classes=10)  # log 2
        tensor(0.6931, dtype=torch.float64)
    """
    _check(tau, num_classes)
    error = torch.as_tensor(excess_error).double()
    if not bool(((error >= 0) & (error <= 1)).all()):
        raise ValueError(f"excess_error must be in [0, 1], got {error.tolist()}")
    return _transform(error, tau, num_classes)


def consistency_bound(
    excess: Float[Tensor, "*shape"] | float,
    tau: float,
    num_classes: int,
    *,
    gap: float = 0.0,
    tight: bool = True,
) -> Float[Tensor, "*shape"]:
    """The largest excess error that a given excess loss allows: Gamma of this module.

    Args:
        excess: R(h) - R*, the loss of a classifier minus the best of its hypothesis set, >= 0, in the unit of `comp_sum_loss` with
            rho = 1, on the distribution (not on the training set).
        tau: >= 0, of the comp-sum loss.
        num_classes: n >= 2.
        gap: M >= 0, the minimizability gap, see `minimizability_gap`.
        tight: False for the simple closed-form bound, which is never smaller.

    Returns:
        A bound on error(h) - best error in [0, 1], in float64.

    Raises:
        ValueError: for a value out of range.

    Cost: 64 evaluations of T; one for tau >= 2 or `tight=False`.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288, theorem 3.1.

    Examples:
        >>> consistency_bound(0.02, tau=1.0, num_classes=10)
        tensor(0.1993, dtype=torch.float64)
        >>> consistency_bound(0.02, tau=1.0, num_classes=10, tight=False)
        tensor(0.2000, dtype=torch.float64)
    """
    _check(tau, num_classes)
    total = torch.as_tensor(excess).double() + gap
    if not gap >= 0 or not bool((total >= gap).all()):
        raise ValueError(f"excess and gap must be >= 0, got {(total - gap).tolist()} and {gap}")
    if tau >= 2:
        return ((tau - 1) * num_classes ** (tau - 1) * total).clamp(max=1)
    if not tight:
        factor = 2**tau * (2 - tau) if tau < 1 else 2 * num_classes ** (tau - 1)
        return (factor * total).sqrt().clamp(max=1)
    low, high = torch.zeros_like(total), torch.ones_like(total)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _transform(middle, tau, num_classes) < total
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def best_conditional_risk(
    probabilities: Float[Tensor, "*batch classes"], tau: float
) -> Float[Tensor, "*batch"]:
    """The least comp-sum loss that any scores can have where the classes have given probabilities.

        ((sum_k p_k^(1/s))^s - 1) / (1 - tau),  s = 2 - tau      the entropy of p at tau = 1, (1 - max p) / (tau - 1) from tau = 2 on

    Args:
        probabilities: p, non-negative, rows sum to 1.
        tau: >= 0.

    Returns:
        One value for each row, in float64.

    Raises:
        ValueError: if tau < 0, or a row is no distribution.

    Examples:
        >>> best_conditional_risk(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), tau=1.0)  # log 2, 0
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    _check(tau, 2)
    p = probabilities.double()
    if not bool((p >= 0).all()) or not bool(((p.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("probabilities must be >= 0 and sum to 1 in each row")
    p = p / p.sum(-1, keepdim=True)
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    if abs(tau - 1) < _NEAR_ONE:
        return torch.special.entr(p).sum(-1)
    s = 2 - tau
    return torch.expm1(s * torch.logsumexp(p.log() / s, dim=-1)) / (1 - tau)


def minimizability_gap(
    best_risk: float, probabilities: Float[Tensor, "batch classes"], tau: float
) -> Float[Tensor, ""]:
    """Best risk of a hypothesis set minus the mean best risk at each point, where the class probabilities are known.

    Args:
        best_risk: R*, the least comp-sum loss in the hypothesis set.
        probabilities: of the classes at each of a sample of points.
        tau: >= 0.

    Returns:
        M >= 0 in float64 (a negative estimate, from a small sample, is given as 0).

    Raises:
        ValueError: if tau < 0, or a row is no distribution.

    Examples:
        >>> minimizability_gap(0.8, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), tau=1.0)  # 0.8 - log 2
        tensor(0.1069, dtype=torch.float64)
    """
    return (best_risk - best_conditional_risk(probabilities, tau).mean()).clamp(min=0)


def minimizability_gap_bound(
    sum_exponential_risk: float, tau: float, num_classes: int, score_bound: float = math.inf
) -> Float[Tensor, ""]:
    """A bound on the minimizability gap for any tau from one number, where every point has a certain class.

        M <= Phi(R0) - Phi((n - 1) exp(-2 Lambda)),    Phi(u) = ((1 + u)^(1-tau) - 1) / (1 - tau),   log(1 + u) at tau = 1

    Phi is concave, hence the bound (Jensen), and falls with tau: a larger tau has a smaller gap.

    Args:
        sum_exponential_risk: R0, the least risk of the hypothesis set under tau = 0, mean of sum_k exp(z_k - z_y), >= (n - 1) exp(-2
            Lambda).
        tau: >= 0.
        num_classes: n >= 2.
        score_bound: Lambda > 0, where the scores of the hypothesis set lie within [-Lambda, Lambda].

    Returns:
        The bound, in float64.

    Raises:
        ValueError: for a value out of range.

    Source: Mao, Mohri, Zhong, 2023, arXiv 2304.07288, section 4.

    Examples:
        >>> [round(float(minimizability_gap_bound(0.5, tau, num_classes=10)), 3) for tau in (0, 1, 2)]
        [0.5, 0.405, 0.333]
    """
    _check(tau, num_classes)
    if not score_bound > 0:
        raise ValueError(f"score_bound must be > 0, got {score_bound}")
    least = (num_classes - 1) * math.exp(-2 * score_bound)
    if not least <= sum_exponential_risk < math.inf:
        raise ValueError(
            f"sum_exponential_risk must be >= {least:g}, the least that the bounded scores allow, got {sum_exponential_risk}"
        )
    logs = torch.log1p(torch.tensor([sum_exponential_risk, least], dtype=torch.float64))
    values = logs if tau == 1 else torch.expm1((1 - tau) * logs) / (1 - tau)
    return values[0] - values[1]


def _transform(error: Tensor, tau: float, num_classes: int) -> Tensor:
    if tau >= 2:
        return error / ((tau - 1) * num_classes ** (tau - 1))
    # A(b) = (1 - b^2)^(1/2) * cosh(artanh(b) / s)^s, whose logarithm keeps its digits for small b.
    inside = error.clamp(max=math.nextafter(1, 0))
    angle = torch.atanh(inside)
    if abs(tau - 1) < _NEAR_ONE:
        found = inside * angle + 0.5 * torch.log1p(-(inside**2))
        return torch.where(error == 1, math.log(2), found)
    s = 2 - tau
    logarithm = 0.5 * torch.log1p(-(inside**2)) + s * _log_cosh(angle / s)
    logarithm = torch.where(error == 1, (1 - s) * math.log(2), logarithm)
    factor = 2 ** (1 - tau) if tau < 1 else num_classes ** (1 - tau)
    return factor * torch.expm1(logarithm) / (tau - 1)


def _log_cosh(x: Tensor) -> Tensor:
    near = torch.log1p(2 * torch.sinh(x.clamp(max=1.0) / 2) ** 2)
    far = x + torch.log1p(torch.exp(-2 * x)) - math.log(2)
    return torch.where(x < 1, near, far)


def _check(tau: float, num_classes: int) -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be >= 0 and finite, got {tau}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
