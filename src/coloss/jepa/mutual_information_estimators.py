"""Mutual information from samples: what every estimator offers, and the two that need no training."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from coloss.errors import InputError
from coloss.jepa.rank_gaussian import log_determinant_bias, rank_gaussianise

# A canonical correlation above this counts as this: a copy shares infinitely much, and no sample can show that.
_LARGEST_SQUARE = 1 - 1e-12


class InformationInterval(NamedTuple):
    """Where the mutual information lies with a stated chance.

    Attributes:
        low: nats.
        high: nats.

    Examples:
        >>> InformationInterval(0.1, 0.4).high
        0.4
    """

    low: float
    high: float


class MIEstimator(ABC):
    """What every estimator of mutual information offers: a number, and an interval.

    A new one implements `_estimate(x, y, generator)` on checked, finite samples in at least float32.

    Args:
        gaussianise: put `rank_gaussianise` in front: information stays the same, and estimates no longer depend on units, outliers
            and monotone distortions of columns.

    Examples:
        >>> class Zero(MIEstimator):
        ...     def _estimate(self, x, y, generator):
        ...         return x.new_zeros(())
        >>> Zero().estimate(torch.rand(10, 2), torch.rand(10, 1))
        tensor(0.)
    """

    def __init__(self, *, gaussianise: bool = False) -> None:
        super().__init__()
        self.gaussianise = gaussianise

    def estimate(
        self,
        x: Real[Tensor, "samples dim_x"],
        y: Real[Tensor, "samples dim_y"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """I(X; Y) in nats from paired samples; it may come out below 0 where the truth is 0.

        Args:
            x, y: finite; row i of both belongs together.
            generator: of whatever the estimator draws; None for a fixed seed.

        Returns:
            A scalar, at least float32.

        Raises:
            InputError: for values that are not finite, no columns, or too few samples.
        """
        x, y = checked_samples(x, y)
        if self.gaussianise:
            x, y = rank_gaussianise(x), rank_gaussianise(y)
        return self._estimate(x, y, generator)

    def interval(
        self,
        x: Real[Tensor, "samples dim_x"],
        y: Real[Tensor, "samples dim_y"],
        low: float = 0.05,
        high: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> InformationInterval:
        """Quantiles of what the estimate would be for other samples; here by 50 random halves of the samples.

        The spread of estimates on halves, drawn without replacement, is about the standard error on all samples (a bootstrap would
        repeat samples, which neighbours and copies mistake for dependence). It is laid about the estimate: what the estimator is wrong by
        on average, it does not show.

        Args:
            x, y: as for `estimate`.
            low, high: the levels, 0 < low < high < 1.
            generator: of the halves; None for a fixed seed.

        Raises:
            InputError: as `estimate` for half of the samples, or for levels out of order.
        """
        check_levels(low, high)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        x, y = checked_samples(x, y)
        value = float(self.estimate(x.detach(), y.detach(), generator))
        found = []
        for _ in range(50):
            rows = torch.randperm(len(x), generator=generator)[: (len(x) + 1) // 2].to(x.device)
            found.append(float(self.estimate(x.detach()[rows], y.detach()[rows], generator)))
        ends = np.quantile(found, [low, high]) - np.mean(found) + value
        return InformationInterval(float(ends[0]), float(ends[1]))

    @abstractmethod
    def _estimate(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor: ...


class GaussianMI(MIEstimator):
    """The information in the correlations: exact for normal vectors, a lower bound after rank-Gaussianising any others.

        I = -1/2 sum_i log(1 - rho_i^2),    rho_i the canonical correlations

    Args:
        correct: take off what the estimate exceeds the truth by on average for this many normal samples.
        gaussianise: as for `MIEstimator`; with it and `correct` this is the Gaussian-copula estimate.

    Raises:
        InputError: from `estimate`, unless there are more samples than dim_x + dim_y + 1: correlations would be 1 by chance. Columns that
            are constant, or follow from others of their side, do not count.

    Cost:
        O(samples * dim^2).

    Source:
        Kay 1992; Ince et al. 2017, Human Brain Mapping 38.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(5000, 1, generator=generator)
        >>> y = 0.6 * x + 0.8 * torch.randn(5000, 1, generator=generator)
        >>> bool((GaussianMI().estimate(x, y) - 0.223).abs() < 0.03)
        True
    """

    def __init__(self, *, correct: bool = False, gaussianise: bool = False) -> None:
        super().__init__(gaussianise=gaussianise)
        self.correct = correct

    def _estimate(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        first, second = _orthonormal(x), _orthonormal(y)
        samples, dims = len(x), first.shape[1] + second.shape[1]
        if samples <= dims + 1:
            raise InputError(
                f"x and y must have more than {dims + 1} samples for {dims} independent columns, got {samples}"
            )
        squares = torch.linalg.svdvals(first.T @ second).square().clamp(max=_LARGEST_SQUARE)
        found = -torch.log1p(-squares).sum() / 2
        if self.correct:
            count = torch.tensor(float(samples), dtype=torch.float64, device=x.device)
            found = found - log_determinant_bias(count, first.shape[1], second.shape[1]) / 2
        return found.to(x.dtype)


class KSG(MIEstimator):
    """Estimates from distances to nearest neighbours, without a model of the dependence.

        I = psi(k) + psi(n) - mean_i [ psi(n_x(i) + 1) + psi(n_y(i) + 1) ]

    e_i is the distance to the k-th neighbour of sample i in (x, y), by the largest coordinate difference; n_x(i) counts the other
    samples strictly nearer than e_i in x. Strong dependence in many dimensions is underestimated unless samples are very many.

    Args:
        k: neighbours, >= 1. More give less noise and more bias.
        gaussianise: as for `MIEstimator`; columns of unequal units need it, or another standardisation.

    Raises:
        InputError: if k < 1; from `estimate`, unless there are more than k samples.

    Cost:
        O(n log n) for few columns, by k-d trees; about O(n^2) for many. No gradient.

    Source:
        Kraskov, Stoegbauer, Grassberger 2004, arXiv cond-mat/0305641, algorithm 1.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(5000, 1, generator=generator)
        >>> y = 0.6 * x + 0.8 * torch.randn(5000, 1, generator=generator)
        >>> bool((KSG().estimate(x, y) - 0.223).abs() < 0.05)
        True
    """

    def __init__(self, k: int = 5, *, gaussianise: bool = False) -> None:
        super().__init__(gaussianise=gaussianise)
        if k < 1:
            raise InputError(f"k must be >= 1, got {k}")
        self.k = k

    def _estimate(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        from scipy.spatial import cKDTree
        from scipy.special import digamma

        samples = len(x)
        if samples <= self.k:
            raise InputError(f"x and y must have more than k = {self.k} samples, got {samples}")
        first, second = (side.detach().cpu().double().numpy() for side in (x, y))
        joined = np.concatenate([first, second], 1)
        distance = cKDTree(joined).query(joined, k=[self.k + 1], p=np.inf)[0][:, 0]
        # Strictly nearer; copies of a sample at distance 0 are not.
        within = np.nextafter(distance, -1)
        nearer = digamma(_others_within(first, within) + 1) + digamma(_others_within(second, within) + 1)
        value = digamma(self.k) + digamma(samples) - nearer.mean()
        return torch.tensor(value, dtype=x.dtype, device=x.device)


def _others_within(points: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How many other points lie within each point's radius, by the largest coordinate difference; 0 below radius 0."""
    from scipy.spatial import cKDTree

    # Not by sorting, where there is one column: differences, not sums, must be compared with the radius to the last bit.
    found = cKDTree(points).query_ball_point(points, radius.clip(0), p=np.inf, return_length=True)
    return np.where(radius < 0, 0, found - 1).clip(0)


def _orthonormal(values: Tensor) -> Tensor:
    """An orthonormal basis of the centred columns in float64, without directions that are rounding error of their type."""
    rounding = max(1e-10, 16 * torch.finfo(values.dtype).eps)
    values = values.double()
    # The mean of equal numbers may be off by rounding, which would pass for a spread.
    centred = torch.where(values.amax(0) > values.amin(0), values - values.mean(0), 0.0)
    scale = centred.square().mean(0).sqrt()
    left, singular, _ = torch.linalg.svd(centred / torch.where(scale > 0, scale, 1.0), full_matrices=False)
    return left[:, singular > rounding * singular.amax().clamp(min=1e-300)]


def checked_samples(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables of paired samples in at least float32.

    Raises:
        InputError: if they have unequal numbers of rows, no columns, or values that are not finite.
    """
    for name, side in (("x", x), ("y", y)):
        if side.ndim != 2 or side.shape[1] == 0:
            raise InputError(
                f"{name} must have samples in rows and at least one column, got shape {tuple(side.shape)}"
            )
        if not side.isfinite().all():
            raise InputError(f"{name} must be finite, got an infinity or NaN")
    if len(x) != len(y):
        raise InputError(f"x and y must have equal numbers of samples, got {len(x)} and {len(y)}")
    if len(x) < 2:
        raise InputError(f"x and y must have at least 2 samples, got {len(x)}")
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return x.to(wide), y.to(wide)


def check_levels(low: float, high: float) -> None:
    """Refuse quantile levels that are out of order.

    Raises:
        InputError: unless 0 < low < high < 1.
    """
    if not 0 < low < high < 1:
        raise InputError(f"low and high must be levels with 0 < low < high < 1, got {low} and {high}")
