r"""Says how many nats of prior knowledge a space of models lacks to reach a test error, with an interval and a warning.

Akhilan Boopathy, William Yue, Jaedong Hwang, Abhiram Iyer, Ila Fiete 2024, "Towards Exact Computation of Inductive Bias",
IJCAI 2024, arXiv 2406.15941.

Draw models h at random from those of a space that fit the training data, and let e(h) be their test error (a mean squared
error). The inductive bias that a task asks of the space to reach the error eps is

    I(eps) = -log P( e(h) <= eps )        nats; divide by log 2 for bits

how surprising a model this good is. P is far too small to count, so a scaled non-central chi-square is fitted to a sample of
errors and its log-CDF is read at eps (`coloss.classification.error_distribution`). Of two spaces on the same task the one
with the smaller I brings the difference as prior knowledge of its own.

What this adds to the paper: an interval from bootstrap refits; a p value of the fit that counts the fitting; a check of the
fitted left tail against the sample's own; the log-CDF exact in log space, where the authors switch to an approximation that
jumps by several nats; and for Gaussian processes the probability without any fit (`GaussianProcessErrors.logcdf`).

When it helps: to compare architectures by what they assume rather than by one run's error, or tasks by what they ask, where
eps lies within or near the sampled errors. Measured (`coloss verify inductive-bias`: 300 digits, eps = 0.015, means of 6
seeds): perceptrons with two hidden layers lack 1.8 nats, with one 23, a Gaussian process with a tuned kernel 59, and with
the untuned bandwidth of 1 that the authors use 1,900.

When not: far below the sampled errors the value is a guess. For kernel spaces, where it can be checked, it was right near
the sample and too small far below: 59 for 68 nats and 1,900 for 2,700 in that measurement, with other bandwidths down to two
fifths. No interval and no p value shows that; `extrapolation` says how far out eps lies. I is about random members of a
space, not about its best guess: the tuned process' mean function, which one would use, is about as good as those
perceptrons (error 0.0136 against 0.0133). I also depends on the number of test samples (fix it), on eps, and on what counts as
fitting the training data. Error rates take few values and void the model: take a mean squared error.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from coloss.classification.error_distribution import (
    FitMethod,
    ScaledNCX2,
    checked_errors,
    fit_error_distribution,
    fit_p_value,
    tail_gap,
)
from coloss.classification.hypotheses import (
    gaussian_process_errors,
    one_hot_error,
    sample_trained_errors,
)
from coloss.data import Splits, load
from coloss.nn import MLP
from coloss.train import Budget, Claim, Setting, System, cosine, fit

Errors: TypeAlias = ArrayLike | Callable[[], ArrayLike]


class ErrorFitWarning(UserWarning):
    """The sampled errors do not look like the distribution that was fitted to them."""


@dataclass(frozen=True)
class InductiveBias:
    """How many nats a space lacks to reach a test error, and how far the number can be trusted.

    Attributes:
        epsilon: the test error to reach.
        value: -log P(error <= epsilon), >= 0; infinite for an `epsilon` of 0.
        interval: (low, high) of the bootstrap; it knows the spread of the sample, not the error of the model's tail.
        confidence: coverage of the interval.
        extrapolation: how far `epsilon` lies below the smallest sampled error, in standard deviations of the errors; 0 or
            less is within the sample.
        p_value: of the fit, by Kolmogorov-Smirnov distances of refits to samples of the fitted distribution.
        tail_gap: fitted minus counted log-probability, in nats, at the edge of the sample's left tail; 0 is perfect.
        fit: the fitted distribution.
        warnings: reasons to distrust the value, in plain sentences; empty if there is none.
        resampled: values of the bootstrap.
    """

    epsilon: float
    value: float
    interval: tuple[float, float]
    confidence: float
    extrapolation: float
    p_value: float
    tail_gap: float
    fit: ScaledNCX2
    warnings: tuple[str, ...]
    resampled: np.ndarray = field(repr=False)

    def __str__(self) -> str:
        low, high = self.interval
        notes = "".join(f"; {warning}" for warning in self.warnings)
        return f"{self.value:.4g} nats ({low:.4g} to {high:.4g}) at error {self.epsilon:g}{notes}"


@dataclass(frozen=True)
class InductiveBiasComparison:
    """Several spaces on one task, held against one of them.

    Attributes:
        base: name of the space that the others are held against.
        biases: name -> what the space lacks.
        supplied: name -> (nats that the space supplies over the base, low, high); negative if it supplies less. NaN where
            both lack infinitely many.
    """

    base: str
    biases: Mapping[str, InductiveBias]
    supplied: Mapping[str, tuple[float, float, float]]

    def __str__(self) -> str:
        width = max(len(name) for name in self.biases)
        lines = []
        for name, bias in sorted(self.biases.items(), key=lambda item: item[1].value):
            more, low, high = self.supplied[name]
            supplies = (
                ""
                if name == self.base
                else f", supplies {more:+.4g} ({low:+.4g} to {high:+.4g}) over {self.base}"
            )
            lines.append(f"{name:{width}}  {bias}{supplies}")
        return "\n".join(lines)


def required_inductive_bias(
    errors: ArrayLike,
    epsilon: float,
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    method: FitMethod = "moments",
    generator: torch.Generator | None = None,
) -> InductiveBias:
    r"""Nats of prior knowledge that a space of models lacks to reach a test error.

    $I(\epsilon) = -\log P(e \le \epsilon)$ under the distribution fitted to `errors`. Scaling errors and `epsilon` together
    changes nothing.

    Args:
        errors: (hypotheses) mean squared test errors of random models that fit the training data, at least 8, > 0.
        epsilon: test error to reach; infinity gives 0.
        confidence: coverage of the interval, in (0, 1).
        resamples: bootstrap samples, >= 20; half as many serve the p value.
        method: of the fit, see `fit_error_distribution`.
        generator: of the bootstrap.

    Returns:
        Value, interval and what there is to judge them by.

    Raises:
        ValueError: for values out of range, or errors that cannot be fitted.

    Warns:
        ErrorFitWarning: if the fit is rejected, its left tail is off, or errors repeat, as a share of wrong answers does.

    Cost:
        1.5 `resamples` fits, and O(hypotheses) evaluations of the CDF for a third of them: about 2 seconds for 2,000 errors.

    Source:
        Boopathy et al. 2024, arXiv 2406.15941.

    Examples:
        >>> errors = ScaledNCX2(df=50.0, nc=0.0, scale=0.001).sample(500, torch.Generator().manual_seed(0))
        >>> found = required_inductive_bias(errors, 0.025, generator=torch.Generator().manual_seed(0))
        >>> round(-ScaledNCX2(50.0, 0.0, 0.001).logcdf(0.025), 1), found.interval[0] < 6.7 < found.interval[1]
        (6.7, True)
    """
    sample = checked_errors(errors)
    if math.isnan(epsilon):
        raise ValueError("epsilon must be a number, got nan")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if resamples < 20:
        raise ValueError(f"resamples must be >= 20, got {resamples}")
    found = fit_error_distribution(sample, method)
    drawn = torch.randint(len(sample), (resamples, len(sample)), generator=generator).numpy()
    resampled = np.array([_value(_refit(sample[rows], method, found), epsilon) for rows in drawn])
    extrapolation = float((sample.min() - epsilon) / sample.std(ddof=1))
    p_value = fit_p_value(sample, found, method, resamples // 2, generator)
    gap, gap_error = tail_gap(sample, found)
    poor = []
    if p_value < 0.01:
        poor.append(f"the errors do not look like the fitted distribution (p = {p_value:.2g})")
    if abs(gap) > 3 * gap_error:
        poor.append(f"the fitted left tail is off by {gap:+.2g} nats where the sample can tell")
    repeats = 1 - len(np.unique(sample)) / len(sample)
    if repeats > 0.2:
        poor.append(
            f"{repeats:.0%} of the errors repeat: take a mean squared error, not a share of wrong answers"
        )
    for message in poor:
        warnings.warn(message, ErrorFitWarning, stacklevel=2)
    if extrapolation > 1:
        poor.append(
            f"the error to reach lies {extrapolation:.1f} standard deviations below the smallest of {len(sample)}: "
            "the value is extrapolated, and may be a fraction of the true one"
        )
    return InductiveBias(
        epsilon=epsilon,
        value=_value(found, epsilon),
        interval=_interval(resampled, confidence),
        confidence=confidence,
        extrapolation=extrapolation,
        p_value=p_value,
        tail_gap=gap,
        fit=found,
        warnings=tuple(poor),
        resampled=resampled,
    )


def compare_inductive_bias(
    spaces: Mapping[str, Errors],
    epsilon: float,
    *,
    base: str | None = None,
    confidence: float = 0.95,
    resamples: int = 200,
    method: FitMethod = "moments",
    generator: torch.Generator | None = None,
) -> InductiveBiasComparison:
    """Several architectures or kernels on one task: what each lacks, and what each supplies over the first.

    All errors must be of the same task: the same training samples, test samples and error.

    Args:
        spaces: name -> test errors of the space, or a function that samples them (`sample_trained_errors`,
            `sample_gp_errors`).
        epsilon: test error to reach.
        base: name of the space to hold the others against; default: the first.
        confidence: coverage of the intervals, in (0, 1).
        resamples: bootstrap samples, >= 20.
        method: of the fits.
        generator: of the bootstraps.

    Returns:
        What each space lacks, and the differences with intervals; printed, a table.

    Raises:
        ValueError: as `required_inductive_bias`, and for an unknown base or no space.

    Warns:
        ErrorFitWarning: as `required_inductive_bias`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> wide, narrow = (ScaledNCX2(40.0, 0.0, s).sample(300, generator) for s in (2e-3, 1e-3))
        >>> found = compare_inductive_bias(
        ...     {"wide": wide, "narrow": lambda: narrow}, 0.04, generator=generator
        ... )
        >>> round(found.biases["wide"].value), round(found.supplied["narrow"][0])
        (6, 5)
    """
    if not spaces:
        raise ValueError("spaces must hold at least one space, got none")
    base = next(iter(spaces)) if base is None else base
    if base not in spaces:
        raise ValueError(f"base must be one of {', '.join(spaces)}, got {base!r}")
    biases = {
        name: required_inductive_bias(
            cast(ArrayLike, errors() if callable(errors) else errors),
            epsilon,
            confidence=confidence,
            resamples=resamples,
            method=method,
            generator=generator,
        )
        for name, errors in spaces.items()
    }
    supplied = {base: (0.0, 0.0, 0.0)}
    for name, bias in biases.items():
        if name != base:
            with np.errstate(invalid="ignore"):
                gaps = biases[base].resampled - bias.resampled
                value = float(np.subtract(biases[base].value, bias.value))
            supplied[name] = (value, *_interval(gaps, confidence))
    return InductiveBiasComparison(base, biases, supplied)


def _value(found: ScaledNCX2, epsilon: float) -> float:
    return -found.logcdf(epsilon) + 0.0


def _refit(sample: np.ndarray, method: FitMethod, otherwise: ScaledNCX2) -> ScaledNCX2:
    """The fit of a bootstrap sample; a sample of a single value repeated has none."""
    return fit_error_distribution(sample, method) if np.ptp(sample) > 1e-12 * sample.max() else otherwise


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Quantiles that are values of the sample, so that finite and infinite ones are never mixed."""
    low, high = (1 - confidence) / 2, (1 + confidence) / 2
    return float(np.quantile(values, low, method="lower")), float(np.quantile(values, high, method="higher"))


SYSTEM = System(
    slug="inductive-bias",
    title="Towards Exact Computation of Inductive Bias",
    paper="Boopathy, Yue, Hwang, Iyer, Fiete, 2024, arXiv 2406.15941",
    family="classification",
    acts_on=("evaluation",),
    api=(
        "coloss.classification.required_inductive_bias",
        "coloss.classification.compare_inductive_bias",
        "coloss.classification.sample_trained_errors",
        "coloss.classification.sample_gp_errors",
        "coloss.classification.gaussian_process_errors",
        "coloss.classification.one_hot_error",
        "coloss.classification.fit_error_distribution",
        "coloss.classification.ScaledNCX2",
        "coloss.classification.noncentral_chi2_logcdf",
        "coloss.classification.sankaran_logcdf",
    ),
)

EPSILON = 0.015


def _squared_error_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 10).to(outputs.dtype))


def _required(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """What perceptrons and Gaussian kernels lack on 300 digits, judged on the same 200 test digits."""
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    splits = load("digits", seed=setting.seed)
    assert isinstance(splits, Splits)
    rows = (60, 40) if setting.smoke else (300, 200)
    train, test = (part.subset(torch.arange(n)) for part, n in zip((splits.train, splits.test), rows))
    generator = torch.Generator().manual_seed(setting.seed)
    networks, draws, steps = (8, 100, 3) if setting.smoke else (16, 2000, 150)

    def trained(model: nn.Module, seed: int) -> nn.Module:
        return fit(
            model,
            train,
            _squared_error_loss,
            budget=Budget(steps=steps),
            batch_size=300,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
            learning_rate_schedule=cosine(),
            seed=seed,
        ).model

    def perceptrons(hidden: tuple[int, ...]) -> np.ndarray:
        return sample_trained_errors(
            lambda: MLP(64, hidden, 10, norm=None),
            trained,
            lambda model: one_hot_error(model, test),
            networks,
            setting.seed,
            fits=lambda model: setting.smoke or one_hot_error(model, train) <= 0.01,
        )

    (known, labels), (asked, truth) = (
        (cast(torch.Tensor, part.inputs).numpy(), np.eye(10)[cast(torch.Tensor, part.targets).numpy()])
        for part in (train, test)
    )
    kernels: dict[str, Any] = {
        "tuned kernel": gaussian_process_errors(
            known, labels, asked, truth, ConstantKernel(0.1) * RBF(3.0), tune=True
        ),
        "kernel of bandwidth 1": gaussian_process_errors(known, labels, asked, truth, 1.0),
    }
    errors = {name: space.sample(draws, generator) for name, space in kernels.items()}
    errors |= {"perceptrons": perceptrons((128, 128)), "perceptrons of one layer": perceptrons((128,))}
    with warnings.catch_warnings():
        # A warning is a number in the evidence.
        warnings.simplefilter("ignore", ErrorFitWarning)
        compared = compare_inductive_bias(
            errors, EPSILON, resamples=20 if setting.smoke else 100, generator=generator
        )
    found = {}
    for name, bias in compared.biases.items():
        found[name] = {
            "nats": bias.value,
            "low": bias.interval[0],
            "high": bias.interval[1],
            "extrapolation": bias.extrapolation,
            "p_value": bias.p_value,
            "tail_gap": bias.tail_gap,
            "mean_error": float(errors[name].mean()),
        }
        if name in kernels:
            space = kernels[name]
            found[name] |= {
                "nats_without_fit": -space.logcdf(EPSILON),
                "error_of_best_guess": space.mean_error,
            }
    return found


CLAIM = Claim(
    statement="To reach a squared error of 0.015 on 200 test digits, perceptrons with two hidden layers of 128 that fit 300 training "
    "digits lack fewer nats than a Gaussian process with a Gaussian kernel whose amplitude and bandwidth maximise the marginal "
    "likelihood of the same digits.",
    metric="nats",
    baseline="tuned kernel",
    method="perceptrons",
    direction="lower",
    trial=_required,
    seeds=6,
    tried="The error of 0.015 and the training of the perceptrons were settled on seeds 100 and 101. At 0.015 the perceptrons are near their own "
    "mean error, where few nats are to be expected; the mean of the tuned process is as good as they are (error_of_best_guess).",
)
