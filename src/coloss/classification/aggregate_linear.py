r"""Linear regression from bag averages in closed form: the estimator, its risk, and the best knob and bag size.

With $P$ the projection that puts the average of its bag in place of each row, the interpolated estimator is

    theta(rho) = [X' (P + rho (I - P)) X]^{-1} X' P y          X' P y needs the bag averages of y only

rho = 0 regresses averages on averages, rho = 1 regresses each sample on its bag's average. For standard normal
features, n samples in d dimensions with n/d -> psi, bags of k, ||theta_0||^2 = r2 and noise variance s2, write
a = psi/k and b = psi - a, and let t > 0 solve a t/(1+t) + b rho t/(1 + rho t) = 1. Then, with u = t/(1+t),
w = rho t/(1 + rho t) and c = a u, the squared distance from theta_0 tends to

    risk(rho) = (1 - c)^2 r2 + [a u^2 (s2 + (1 - c)^2 r2) + b w^2 c^2 r2] / [1 - a u^2 - b w^2]

derived here (leave-one-out), equal to s2 k/(psi - k) at rho = 0 and to
r2 [(k-1)^2/k^2 + (k-1)/(k^2 (psi-1))] + s2/(k (psi-1)) at rho = 1. As psi grows theta(rho) -> theta_0/(1 + rho (k-1)).
Laplace noise of a private release adds v/k to s2, v = 8 C^2/epsilon^2.

Source: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu 2024, arXiv 2401.11081, for the estimators.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import full_precision, segment_mean, segment_sizes

RHOS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class AggregateLinearModel(NamedTuple):
    """A linear predictor of single samples: `inputs @ weight + bias`.

    Attributes:
        weight: (features) or (features, outputs).
        bias: () or (outputs); 0 without an intercept.
    """

    weight: Float[Tensor, "features *outputs"]
    bias: Float[Tensor, "*outputs"]

    def predict(self, inputs: Float[Tensor, "rows features"]) -> Float[Tensor, "rows *outputs"]:
        """Prediction for each row."""
        return inputs.to(self.weight.dtype) @ self.weight + self.bias


def aggregate_linear_regression(
    inputs: Float[Tensor, "rows features"],
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " rows"],
    rho: float = 0.03,
    intercept: bool = True,
) -> AggregateLinearModel:
    r"""Predictor of single samples from the average target of each bag, in closed form.

    Minimises $\frac1n \sum_i [(\bar y_{a(i)} - f(\bar x_{a(i)}))^2 + \rho (f(x_i) - f(\bar x_{a(i)}))^2]$ over linear $f$,
    which is `aggregate_loss` with squared error. The intercept is free of $\rho$.

    Args:
        inputs: one row for each sample; bring features to one scale first.
        bag_targets: average target of each bag.
        bag_index: bag of each row.
        rho: >= 0. 0 is the bag-level estimator: unbiased, but ill-posed where there are about as many bags as features
            (of many solutions it takes the shortest); 1 is the instance-level one, whose slopes shrink to 1/k.
        intercept: fit a constant.

    Returns:
        The model, in at least float32 on the device of `inputs`; computed in float64 on the CPU.

    Raises:
        ValueError: if `rho` < 0, there is no row, or an index names no bag.

    Cost:
        O(rows * features^2).

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs = torch.randn(300, 3, generator=generator)
        >>> bags = torch.arange(300) // 3
        >>> averages = (inputs @ torch.tensor([1.0, -2.0, 0.5])).view(100, 3).mean(1)
        >>> aggregate_linear_regression(inputs, averages, bags, rho=0.0).weight
        tensor([ 1.0000, -2.0000,  0.5000])
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be >= 0 and finite, got {rho}")
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one row, got none")
    kind, device = full_precision(inputs[:0]).dtype, inputs.device
    rows, bags = inputs.detach().double().cpu(), bag_index.cpu()
    targets = (
        bag_targets.detach().double().cpu().flatten(1)
        if bag_targets.ndim > 1
        else bag_targets.detach().double().cpu()[:, None]
    )
    sizes = segment_sizes(bags, len(targets)).double()
    shift = rows.mean(0) if intercept else torch.zeros_like(rows[0])
    level = (sizes @ targets) / len(rows) if intercept else torch.zeros_like(targets[0])
    centres = segment_mean(rows - shift, bags, len(targets))
    scale = sizes.sqrt()[:, None]
    design = torch.cat([scale * centres, math.sqrt(rho) * (rows - shift - centres[bags])])
    response = torch.cat([scale * (targets - level), targets.new_zeros(len(rows), targets.shape[1])])
    # Orthogonal factorisation rather than normal equations: near as many bags as features they lose all digits.
    weight = torch.linalg.lstsq(design, response, driver="gelsd").solution
    bias = level - shift @ weight
    outputs = bag_targets.shape[1:]
    return AggregateLinearModel(
        weight.reshape(-1, *outputs).to(device, kind), bias.reshape(outputs).to(device, kind)
    )


def choose_rho(
    inputs: Float[Tensor, "rows features"],
    bag_targets: Float[Tensor, "bags *outputs"],
    bag_index: Int[Tensor, " rows"],
    rhos: Sequence[float] = RHOS,
    folds: int = 5,
    generator: torch.Generator | None = None,
    intercept: bool = True,
) -> float:
    """The knob of `aggregate_linear_regression` that predicts the averages of held-out bags best.

    Whole bags are held out, since nothing else has a known target.

    Args:
        inputs: one row for each sample.
        bag_targets: average target of each bag; every bag has rows.
        bag_index: bag of each row.
        rhos: candidates, >= 0.
        folds: >= 2 and at most the number of bags.
        generator: of the division into folds.
        intercept: as there.

    Returns:
        The candidate with the smallest squared error over all folds, bags weighing by size; the first of equals.

    Raises:
        ValueError: for no candidate, a bag without rows, or `folds` out of range.

    Cost:
        `folds * len(rhos)` regressions.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs = torch.randn(120, 10, generator=generator)
        >>> bags, noise = torch.arange(120) // 8, torch.randn(120, generator=generator)
        >>> averages = (inputs[:, 0] + noise).view(15, 8).mean(1)
        >>> 0 < choose_rho(inputs, averages, bags, generator=generator) <= 1
        True
    """
    if not rhos:
        raise ValueError("rhos must hold at least one candidate, got none")
    bags = len(bag_targets)
    if not 2 <= folds <= bags:
        raise ValueError(f"folds must be in [2, {bags} bags], got {folds}")
    sizes = segment_sizes(bag_index, bags)
    if not bool((sizes > 0).all()):
        raise ValueError("every bag of bag_targets must have rows, got one without")
    centres = segment_mean(inputs, bag_index, bags)
    fold = torch.randperm(bags, generator=generator).to(bag_index.device) % folds
    errors = torch.zeros(len(rhos), dtype=torch.float64)
    for number in range(folds):
        held = fold == number
        # Numbers of the bags that stay, counted anew.
        renumbered = (~held).cumsum(0) - 1
        rows = ~held[bag_index]
        for place, rho in enumerate(rhos):
            model = aggregate_linear_regression(
                inputs[rows], bag_targets[~held], renumbered[bag_index[rows]], rho, intercept
            )
            gap = (model.predict(centres[held]) - bag_targets[held]).double().cpu().square()
            errors[place] += (gap.flatten(1) if gap.ndim > 1 else gap[:, None]).sum(1) @ sizes[
                held
            ].double().cpu()
    return rhos[int(errors.argmin())]


def aggregate_risk(
    bag_size: int,
    samples_per_feature: float,
    signal: float,
    noise: float,
    rho: float = 1.0,
    epsilon: float | None = None,
    clip: float | None = None,
) -> float:
    """Expected squared distance of the linear estimator from the truth, many standard normal features assumed.

    Args:
        bag_size: k >= 1.
        samples_per_feature: psi, samples divided by features, > 1.
        signal: r2, squared norm of the true weights, >= 0.
        noise: s2, variance of a label given its features, >= 0.
        rho: >= 0; 0 is the bag-level estimator (shortest solution, where there are fewer bags than features), 1 the
            instance-level one.
        epsilon: privacy of a Laplace release of the averages, > 0; None for exact averages.
        clip: bound of that release, > 0.

    Returns:
        The risk; infinite for `rho=0` at exactly as many bags as features.

    Raises:
        ValueError: for a value out of range, or only one of `epsilon` and `clip`.

    Examples:
        >>> round(aggregate_risk(5, 15, signal=1.0, noise=1.0, rho=0.0), 3)
        0.5
        >>> round(aggregate_risk(5, 15, signal=1.0, noise=1.0, rho=0.1), 3)
        0.311
        >>> round(aggregate_risk(5, 15, signal=1.0, noise=1.0, rho=1.0), 3)
        0.666
    """
    if bag_size < 1:
        raise ValueError(f"bag_size must be >= 1, got {bag_size}")
    variance = _release_variance(epsilon, clip)
    _check_problem(samples_per_feature, signal, noise, rho)
    return float(_risk(np.array([float(bag_size)]), samples_per_feature, signal, noise, rho, variance)[0])


def optimal_rho(
    bag_size: int,
    samples_per_feature: float,
    signal: float,
    noise: float,
    epsilon: float | None = None,
    clip: float | None = None,
) -> float:
    """The knob in [0, 1] with the smallest `aggregate_risk`.

    Args:
        bag_size: k >= 1; with 1 every knob is the same, and 1 is returned.
        samples_per_feature: psi > 1.
        signal: r2 >= 0.
        noise: s2 >= 0.
        epsilon: privacy of the averages, > 0, or None.
        clip: bound of that release, > 0, or None.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: as `aggregate_risk`.

    Examples:
        >>> round(optimal_rho(5, 15, signal=1.0, noise=1.0), 2)
        0.08
    """
    from scipy.optimize import minimize_scalar

    def risk(rho: float) -> float:
        return aggregate_risk(bag_size, samples_per_feature, signal, noise, rho, epsilon, clip)

    inner = math.exp(
        minimize_scalar(lambda power: risk(math.exp(power)), bounds=(-14.0, 0.0), method="bounded").x
    )
    return min((1.0, inner, 0.0), key=risk)


def optimal_bag_size(
    samples_per_feature: float,
    signal: float,
    noise: float,
    largest: int,
    rho: float = 1.0,
    epsilon: float | None = None,
    clip: float | None = None,
) -> int:
    r"""The bag size with the smallest `aggregate_risk`: stronger privacy asks for larger bags.

    For `rho=1` it is $1/u$ rounded up or down, $u = [r_2 (2\psi - 3) - s_2] / (2 [r_2 (\psi - 2) + v])$ clipped to
    $[1/n, 1]$. For `rho=0` smaller bags are always better as long as there are more bags than features.

    Args:
        samples_per_feature: psi > 1.
        signal: r2 >= 0.
        noise: s2 >= 0.
        largest: n >= 1, the largest size to consider.
        rho: >= 0.
        epsilon: privacy of the averages, > 0, or None.
        clip: bound of that release, > 0, or None.

    Returns:
        A whole number in [1, `largest`], the smallest of equals.

    Raises:
        ValueError: as `aggregate_risk`, or if `largest` < 1.

    Cost:
        O(largest).

    Examples:
        >>> [optimal_bag_size(15, 1.0, 1.0, 1000, epsilon=epsilon, clip=3.0) for epsilon in (10, 1, 0.5)]
        [1, 7, 23]
    """
    if largest < 1:
        raise ValueError(f"largest must be >= 1, got {largest}")
    variance = _release_variance(epsilon, clip)
    _check_problem(samples_per_feature, signal, noise, rho)
    sizes = np.arange(1.0, largest + 1)
    return 1 + int(_risk(sizes, samples_per_feature, signal, noise, rho, variance).argmin())


def _release_variance(epsilon: float | None, clip: float | None) -> float:
    """Variance v of the label noise that a private release amounts to, times the bag size."""
    if (epsilon is None) != (clip is None):
        raise ValueError(f"epsilon and clip must be given together, got {epsilon} and {clip}")
    if epsilon is None or clip is None:
        return 0.0
    for name, value in (("epsilon", epsilon), ("clip", clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return 8 * clip**2 / epsilon**2


def _check_problem(samples_per_feature: float, signal: float, noise: float, rho: float) -> None:
    if not 1 < samples_per_feature < math.inf:
        raise ValueError(f"samples_per_feature must be > 1 and finite, got {samples_per_feature}")
    for name, value in (("signal", signal), ("noise", noise), ("rho", rho)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def _risk(
    sizes: np.ndarray, psi: float, signal: float, noise: float, rho: float, release_variance: float
) -> np.ndarray:
    noise_in_bag = noise + release_variance / sizes
    a = psi / sizes
    if rho == 0:
        with np.errstate(divide="ignore"):
            well_posed = noise_in_bag / (a - 1)
            shortest = signal * (1 - a) + noise_in_bag * a / (1 - a)
        return np.where(a > 1, well_posed, np.where(a < 1, shortest, np.inf))
    b = psi - a
    # The positive root of rho (psi - 1) t^2 + linear t - 1, without cancellation.
    linear = a + b * rho - 1 - rho
    root = np.sqrt(linear**2 + 4 * rho * (psi - 1))
    t = np.where(linear > 0, 2 / (linear + root), (root - linear) / (2 * rho * (psi - 1)))
    u, w = t / (1 + t), rho * t / (1 + rho * t)
    kept = a * u
    variance = a * u**2 * (noise_in_bag + (1 - kept) ** 2 * signal) + b * w**2 * kept**2 * signal
    return (1 - kept) ** 2 * signal + variance / (1 - a * u**2 - b * w**2)
