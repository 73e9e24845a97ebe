r"""The distribution of test errors over random models, fitted so that its far left tail can be read off in log space.

A mean squared error is a sum of squares of nearly Gaussian residuals, so it is modelled as

    e ~ scale * chi2'(df, nc)        mean m = scale (df + nc), variance v = 2 scale^2 (df + 2 nc)

a non-central chi-square times a number. With s = nc / (df + nc) its third cumulant is K3 = q v^2 / m where
q = 2 (1 + 2s) / (1 + s)^2 runs from 2 (s = 0, the central distribution) down to 3/2 (s = 1), so m, v and q give the fit by
moments in closed form: s = [2 - q + sqrt(2 (2 - q))] / q, scale = v / (2 m (1 + s)), df + nc = m / scale.

The log-CDF is exact in log space: the mixture log sum_j Poisson(j; nc/2) P(df/2 + j, x/2), with the series of the regularised
gamma function P where that underflows, which is the normal case here (below exp(-745) an ordinary CDF is 0).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special, stats

FitMethod = Literal["moments", "mle"]

_UNDERFLOW = 1e-280


@dataclass(frozen=True)
class ScaledNCX2:
    """A non-central chi-square distribution times a number: a model of mean squared errors.

    Args:
        df: degrees of freedom, > 0.
        nc: non-centrality, >= 0.
        scale: > 0.

    Raises:
        ValueError: for values out of range.

    Examples:
        >>> errors = ScaledNCX2(df=10.0, nc=0.0, scale=0.01)
        >>> errors.mean, round(errors.logcdf(0.001), 1)  # ten residuals, and all of them nearly 0
        (0.1, -19.8)
    """

    df: float
    nc: float
    scale: float

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("df", self.df, self.df > 0),
            ("nc", self.nc, self.nc >= 0),
            ("scale", self.scale, self.scale > 0),
        ):
            if not (allowed and math.isfinite(value)):
                raise ValueError(
                    f"{name} must be {'>= 0' if name == 'nc' else '> 0'} and finite, got {value}"
                )

    @property
    def mean(self) -> float:
        """Expected error."""
        return self.scale * (self.df + self.nc)

    @property
    def variance(self) -> float:
        """Variance of the error."""
        return 2 * self.scale**2 * (self.df + 2 * self.nc)

    def logcdf(self, error: float) -> float:
        """Log-probability, in nats, of an error of at most `error`; exact however small it is.

        Examples:
            >>> round(ScaledNCX2(df=2000.0, nc=500.0, scale=1.0).logcdf(200.0), 1)
            -1632.2
        """
        return noncentral_chi2_logcdf(error / self.scale, self.df, self.nc)

    def cdf(self, errors: ArrayLike) -> np.ndarray:
        """Probability of an error of at most each of `errors`; 0 where it underflows."""
        x = np.asarray(errors, dtype=np.float64) / self.scale
        return stats.chi2.cdf(x, self.df) if self.nc == 0 else stats.ncx2.cdf(x, self.df, self.nc)

    def logpdf(self, errors: ArrayLike) -> np.ndarray:
        """Log-density at each of `errors`."""
        x = np.asarray(errors, dtype=np.float64) / self.scale
        if self.nc == 0:
            return stats.chi2.logpdf(x, self.df) - math.log(self.scale)
        order = self.df / 2 - 1
        with np.errstate(divide="ignore"):
            shape = order / 2 * (np.log(x) - math.log(self.nc))
            bessel = _log_scaled_bessel(order, np.sqrt(self.nc * x))
        gap = np.sqrt(x) - math.sqrt(self.nc)
        return shape + bessel - gap**2 / 2 - math.log(2 * self.scale)

    def sample(self, count: int, generator: torch.Generator | None = None) -> np.ndarray:
        """Independent errors."""
        random = numpy_generator(generator)
        if self.nc == 0:
            return self.scale * random.chisquare(self.df, count)
        return self.scale * random.noncentral_chisquare(self.df, self.nc, count)

    def ks_pvalue(self, errors: ArrayLike) -> float:
        """Kolmogorov-Smirnov p value of `errors` being drawn from this distribution, as it is.

        Of the errors that it was fitted to the value is too high; `required_inductive_bias` reports one that is not.
        """
        return float(stats.kstest(np.asarray(errors, dtype=np.float64), self.cdf).pvalue)


def fit_error_distribution(errors: ArrayLike, method: FitMethod = "moments") -> ScaledNCX2:
    """A scaled non-central chi-square for a sample of test errors.

    Args:
        errors: (hypotheses) mean squared errors, > 0, at least 8 and not all equal.
        method: "moments" matches mean, variance and skewness, the last as far as the family reaches; where it does not reach,
            the end with the higher likelihood is taken. "mle" goes on from there to a higher likelihood.

    Returns:
        The distribution.

    Raises:
        ValueError: for errors that no such distribution can have given, or an unknown method.

    Cost:
        O(hypotheses); "mle" some hundred evaluations of the density.

    Source:
        Boopathy et al. 2024, arXiv 2406.15941, for the family; the closed form is derived here.

    Examples:
        >>> truth = ScaledNCX2(df=20.0, nc=10.0, scale=0.002)
        >>> fit = fit_error_distribution(truth.sample(20_000, torch.Generator().manual_seed(0)))
        >>> round(fit.mean, 3), abs(fit.logcdf(0.02) / truth.logcdf(0.02) - 1) < 0.1
        (0.06, True)
    """
    sample = checked_errors(errors)
    if method not in ("moments", "mle"):
        raise ValueError(f'method must be "moments" or "mle", got {method!r}')
    mean, variance = float(sample.mean()), float(sample.var(ddof=1))
    q = float(stats.kstat(sample, 3)) * mean / variance**2
    inside = min(max(q, 1.5), 2.0)
    share = (2 - inside + math.sqrt(2 * (2 - inside))) / inside
    found = _from_moments(mean, variance, share)
    if not 1.5 < q < 2:
        other = _from_moments(mean, variance, 0.0)
        found = max((found, other), key=lambda fit: float(fit.logpdf(sample).sum()))
    return _polished(found, sample) if method == "mle" else found


def fit_p_value(
    sample: np.ndarray,
    fit: ScaledNCX2,
    method: FitMethod = "moments",
    resamples: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """P value of errors against the distribution fitted to them, which counts that it was fitted.

    The share of samples drawn from the fit whose Kolmogorov-Smirnov distance from a fit of their own is as large.

    Args:
        sample: the errors.
        fit: what `fit_error_distribution` gave for them.
        method: of that fit.
        resamples: >= 1.
        generator: of the samples.

    Returns:
        (1 + hits) / (1 + resamples).

    Cost:
        `resamples` fits and evaluations of the CDF at all errors.

    Examples:
        >>> uniform = np.linspace(0.1, 0.2, 500)
        >>> fit_p_value(uniform, fit_error_distribution(uniform), resamples=19)
        0.05
    """
    reached = stats.kstest(sample, fit.cdf).statistic
    hits = 0
    for _ in range(resamples):
        drawn = fit.sample(len(sample), generator)
        hits += int(stats.kstest(drawn, fit_error_distribution(drawn, method).cdf).statistic >= reached)
    return (1 + hits) / (1 + resamples)


def tail_gap(sample: np.ndarray, fit: ScaledNCX2) -> tuple[float, float]:
    """Fitted minus counted log-probability at the edge of a sample, where a bad fit of the left tail shows first.

    The edge is the 1 % quantile, or the fifth smallest error of fewer than 500.

    Args:
        sample: the errors.
        fit: the distribution fitted to them.

    Returns:
        The gap in nats, and the standard error of the counted log-probability.

    Examples:
        >>> truth = ScaledNCX2(df=50.0, nc=0.0, scale=0.001)
        >>> gap, error = tail_gap(truth.sample(2000, torch.Generator().manual_seed(0)), truth)
        >>> abs(gap) < 3 * error, round(error, 2)
        (True, 0.22)
    """
    count = min(max(round(0.01 * len(sample)), 5), len(sample))
    share = count / (len(sample) + 1)
    fitted = fit.logcdf(float(np.sort(sample)[count - 1]))
    return fitted - math.log(share), math.sqrt((1 - share) / count)


def noncentral_chi2_logcdf(x: float, df: float, nc: float) -> float:
    """Logarithm of the CDF of the non-central chi-square distribution, without underflow.

    Args:
        x: any number; the probability of 0 or less is 0.
        df: > 0.
        nc: >= 0.

    Returns:
        A number <= 0, to about ten digits.

    Cost:
        O(sqrt(nc)) evaluations of the incomplete gamma function, times the length of its series in the far tail.

    Examples:
        >>> (
        ...     round(noncentral_chi2_logcdf(20.0, 10.0, 5.0), 6),
        ...     round(float(stats.ncx2.logcdf(20.0, 10.0, 5.0)), 6),
        ... )
        (-0.221018, -0.221018)
        >>> (
        ...     float(stats.ncx2.logcdf(100.0, 2000.0, 500.0)),
        ...     round(noncentral_chi2_logcdf(100.0, 2000.0, 500.0), 2),
        ... )
        (-inf, -2287.64)
    """
    if x <= 0:
        return -math.inf
    if x == math.inf:
        return 0.0
    half, rate, upper = df / 2, nc / 2, x / 2
    if rate == 0:
        return float(_log_gammainc(np.array([half]), upper)[0])

    def terms(j: np.ndarray) -> np.ndarray:
        poisson = j * math.log(rate) - rate - special.gammaln(j + 1)
        return poisson + _log_gammainc(half + j, upper)

    # The terms are log-concave in j. Far in the tail the largest solves j (half + j) = rate * upper, elsewhere it is the rate.
    low = max(int((math.sqrt(half**2 + 4 * rate * upper) - half) / 2) - 2, 0)
    high = max(int(rate), low) + 2
    low = min(low, int(rate))
    while high - low > 2:
        middle = (low + high) // 2
        first, second = terms(np.array([float(middle), float(middle + 1)]))
        low, high = (middle, high) if second > first else (low, middle + 1)
    width = int(12 * math.sqrt(high + 1)) + 40
    window = np.arange(max(low - width, 0), high + width, dtype=np.float64)
    return min(float(special.logsumexp(terms(window))), 0.0)


def sankaran_logcdf(x: float, df: float, nc: float) -> float:
    """Approximation of `noncentral_chi2_logcdf` by a power of x that is nearly Gaussian.

    The authors fall back on half the square of its Gaussian coordinate z where the CDF underflows; this is log Phi(z), which
    keeps the term log(|z| sqrt(2 pi)) that theirs drops, 2 to 8 nats, and so joins the exact values without a jump.

    Args:
        x: >= 0.
        df: > 0.
        nc: >= 0.

    Returns:
        A number <= 0, within about 1 % of the exact one for df of a few hundred and more.

    Source:
        Sankaran 1963, Approximations to the non-central chi-square distribution, Biometrika 50.

    Examples:
        >>> exact = noncentral_chi2_logcdf(1200.0, 1500.0, 300.0)
        >>> abs(sankaran_logcdf(1200.0, 1500.0, 300.0) / exact - 1) < 0.01
        True
    """
    return float(special.log_ndtr(_sankaran_z(x, df, nc)))


def _sankaran_z(x: float, df: float, nc: float) -> float:
    power = 1 - 2 / 3 * (df + nc) * (df + 3 * nc) / (df + 2 * nc) ** 2
    p = (df + 2 * nc) / (df + nc) ** 2
    m = (power - 1) * (1 - 3 * power)
    centre = 1 + power * p * (power - 1 - 0.5 * (2 - power) * m * p)
    return ((x / (df + nc)) ** power - centre) / (power * math.sqrt(2 * p) * (1 + 0.5 * m * p))


def numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """A NumPy generator that starts where a torch generator (default: the global one) stands."""
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def checked_errors(errors: ArrayLike) -> np.ndarray:
    """Errors as float64, or a ValueError that says what is wrong with them."""
    sample = np.asarray(errors, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 8:
        raise ValueError(f"errors must be one-dimensional and at least 8, got shape {sample.shape}")
    if not np.isfinite(sample).all() or sample.min() <= 0:
        raise ValueError(f"errors must be finite and > 0, got values in [{sample.min()}, {sample.max()}]")
    if np.ptp(sample) <= 1e-12 * sample.max():
        raise ValueError(f"errors must differ, got {len(sample)} times {sample[0]}")
    return sample


def _from_moments(mean: float, variance: float, share: float) -> ScaledNCX2:
    """The distribution of a mean and variance of which a share of the mean, nc / (df + nc), is non-central."""
    share = min(share, 1 - 1e-6)
    scale = variance / (2 * mean * (1 + share))
    total = mean / scale
    return ScaledNCX2(df=total * (1 - share), nc=total * share, scale=scale)


def _polished(start: ScaledNCX2, sample: np.ndarray) -> ScaledNCX2:
    """The most likely distribution that a simplex finds from a start, never a less likely one."""
    from scipy.optimize import minimize

    def candidate(point: np.ndarray) -> ScaledNCX2:
        mean, variance, share = math.exp(point[0]), math.exp(point[1]), special.expit(point[2])
        return _from_moments(mean, variance, float(share))

    def loss(point: np.ndarray) -> float:
        value = -float(candidate(point).logpdf(sample).mean())
        return value if math.isfinite(value) else 1e10

    share = min(max(start.nc / (start.df + start.nc), 1e-3), 1 - 1e-3)
    point = np.array([math.log(start.mean), math.log(start.variance), special.logit(share)])
    found = minimize(loss, point, method="Nelder-Mead", options={"maxiter": 300, "fatol": 1e-7})
    return max((start, candidate(found.x)), key=lambda fit: float(fit.logpdf(sample).sum()))


def _log_gammainc(a: np.ndarray, x: float) -> np.ndarray:
    """Logarithm of the regularised lower incomplete gamma function P(a, x)."""
    value = special.gammainc(a, x)
    with np.errstate(divide="ignore"):
        found = np.log(value)
    tiny = value < _UNDERFLOW
    if tiny.any():
        # x^a e^-x / Gamma(a + 1) * (1 + x / (a + 1) + x^2 / ((a + 1) (a + 2)) + ...), in which x < a + 1 here.
        small = a[tiny]
        term = total = np.ones_like(small)
        count = 0
        while (term > 1e-17 * total).any():
            count += 1
            term = term * x / (small + count)
            total = total + term
        found[tiny] = small * math.log(x) - x - special.gammaln(small + 1) + np.log(total)
    return found


def _log_scaled_bessel(order: float, x: np.ndarray) -> np.ndarray:
    """log(I_order(x) e^-x), also where that underflows because the order is large."""
    value = special.ive(order, x)
    with np.errstate(divide="ignore"):
        found = np.log(value)
    tiny = (value < _UNDERFLOW) & (x > 0)
    if order > 20 and tiny.any():
        # The uniform expansion for large orders, to third order in 1 / order.
        z = x[tiny] / order
        root = np.hypot(1.0, z)
        p = 1 / root
        first = (3 * p - 5 * p**3) / 24
        second = (81 * p**2 - 462 * p**4 + 385 * p**6) / 1152
        exponent = order * (root + np.log(z / (1 + root))) - x[tiny]
        series = np.log1p(first / order + second / order**2)
        found[tiny] = exponent - 0.5 * np.log(2 * math.pi * order * root) + series
    return found
