r"""Test errors of random models that fit the training data: draws of a Gaussian process, or networks trained anew.

A Gaussian process conditioned on the training targets has at the test points the mean M (K_ts = kernel of test against
training points) and the covariance C, and a draw has the mean squared error

    M = K_ts K^{-1} Y      C = K_ss - K_ts K^{-1} K_st      e = 1/(s o) sum_i sum_j (r_ij + sqrt(l_i) z_ij)^2

over s test points and o outputs, with l_i the eigenvalues of C, r = U'(M - Y_test) the residuals of the mean in its eigenbasis
and z standard normal: no matrix product is needed for a draw, and the log-probability of an error has a saddlepoint formula,
which needs no draws at all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize, special
from torch import nn

from coloss.classification.error_distribution import numpy_generator
from coloss.metrics.inference import predict


@dataclass(frozen=True)
class GaussianProcessErrors:
    """Distribution of the test error of a Gaussian process that interpolates its training targets.

    Attributes:
        eigenvalues: (test points) of the posterior covariance, >= 0.
        squared_residuals: (test points) of the posterior mean in its eigenbasis, squared and summed over outputs.
        outputs: number of outputs, each an independent draw.
        mean_error: test error of the posterior mean, a single model and the best guess of the space.

    Examples:
        >>> x = np.linspace(0, 1, 9)[:, None]
        >>> space = gaussian_process_errors(
        ...     x[::2], np.sin(4 * x[::2]), x[1::2], np.sin(4 * x[1::2]), kernel=0.3
        ... )
        >>> draws = space.sample(2000, torch.Generator().manual_seed(0))
        >>> bool(abs(draws.mean() / space.mean - 1) < 0.1), space.mean_error < space.mean
        (True, True)
    """

    eigenvalues: np.ndarray
    squared_residuals: np.ndarray
    outputs: int
    mean_error: float

    @property
    def mean(self) -> float:
        """Expected error of a draw: that of the posterior mean plus the posterior variance."""
        return float((self.outputs * self.eigenvalues + self.squared_residuals).sum()) / self._count

    @property
    def _count(self) -> int:
        return len(self.eigenvalues) * self.outputs

    def sample(self, draws: int, generator: torch.Generator | None = None) -> np.ndarray:
        """Errors of independent draws."""
        random = numpy_generator(generator)
        # Turned within the outputs, the residuals of an eigenvector fall on one output.
        shift, spread = np.sqrt(self.squared_residuals), np.sqrt(self.eigenvalues)
        errors = np.empty(draws)
        for start in range(0, draws, 256):
            normal = random.standard_normal((min(256, draws - start), len(shift)))
            rest = random.chisquare(self.outputs - 1, normal.shape) if self.outputs > 1 else 0.0
            squares = (shift + spread * normal) ** 2 + spread**2 * rest
            errors[start : start + len(squares)] = squares.sum(1) / self._count
        return errors

    def logcdf(self, error: float) -> float:
        """Log-probability, in nats, of a draw with at most this error, by the saddlepoint formula.

        Nothing is fitted and nothing extrapolated: this is what the fit to a sample of errors tries to estimate. Minus infinity
        at and below the part of the error that no draw can lose.

        Source:
            Lugannani, Rice 1980, Saddle point approximation for the distribution of the sum of independent random variables.
        """
        if error <= 0:
            return -math.inf
        if error == math.inf:
            return 0.0
        # Scaled so that the mean is 1: the saddlepoint is then of the order of the degrees of freedom.
        unit = self.mean * self._count
        weights, residuals = self.eigenvalues / unit, self.squared_residuals / unit
        target = error / self.mean
        if target <= residuals[weights == 0].sum() * (1 + 1e-12):
            return -math.inf

        def slope(t: float) -> float:
            part = 1 / (1 - 2 * weights * t)
            return float((self.outputs * weights * part + residuals * part**2).sum()) - target

        largest = weights.max()
        if target < 1:
            low = -1.0
            while slope(low) > 0:
                low *= 2
                if low < -1e300:
                    return -math.inf
            high = 0.0
        else:
            low, high = 0.0, 0.5 / largest * (1 - 1e-12)
        t = float(optimize.brentq(slope, low, high, xtol=1e-300, rtol=1e-14, maxiter=500))
        part = 1 / (1 - 2 * weights * t)
        cumulant = float((0.5 * self.outputs * np.log(part) + t * residuals * part).sum())
        curvature = float(
            (2 * self.outputs * (weights * part) ** 2 + 4 * residuals * weights * part**3).sum()
        )
        w = math.copysign(math.sqrt(max(2 * (t * target - cumulant), 0.0)), t)
        u = t * math.sqrt(curvature)
        if abs(w) < 1e-4:
            third = float(
                (8 * self.outputs * (weights * part) ** 3 + 24 * residuals * weights**2 * part**4).sum()
            )
            return math.log(0.5 + third / (6 * math.sqrt(2 * math.pi) * curvature**1.5))
        if w > 0:
            density = math.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
            return min(math.log(special.ndtr(w) + density * (1 / w - 1 / u)), 0.0)
        # Phi(w) / phi(w) by the scaled complementary error function, so that only the exponent is large.
        ratio = math.sqrt(math.pi / 2) * special.erfcx(-w / math.sqrt(2)) + 1 / w - 1 / u
        return -(w**2) / 2 - 0.5 * math.log(2 * math.pi) + math.log(ratio)


def gaussian_process_errors(
    train_inputs: ArrayLike,
    train_targets: ArrayLike,
    test_inputs: ArrayLike,
    test_targets: ArrayLike,
    kernel: Any = 1.0,
    jitter: float = 1e-8,
    tune: bool = False,
) -> GaussianProcessErrors:
    """Distribution of the test error over the functions of a kernel space that fit the training data.

    Args:
        train_inputs: (training samples, ...), flattened to vectors.
        train_targets: (training samples) numbers, or (training samples, outputs), such as one-hot classes.
        test_inputs: (test samples, ...).
        test_targets: in the form of `train_targets`.
        kernel: of `sklearn.gaussian_process.kernels`, or the bandwidth of a Gaussian kernel, > 0.
        jitter: > 0, added to the kernel matrix; larger is numerically safer, and fits the training data less closely.
        tune: first move the kernel's parameters to a maximum of the marginal likelihood of the training targets.

    Returns:
        The distribution.

    Raises:
        ValueError: for shapes that do not fit, a value out of range, or a kernel matrix that needs more jitter.

    Cost:
        O(training^3 + test^3).

    Examples:
        >>> x = np.linspace(0, 1, 9)[:, None]
        >>> space = gaussian_process_errors(
        ...     x[::2], np.sin(4 * x[::2]), x[1::2], np.sin(4 * x[1::2]), kernel=0.3
        ... )
        >>> 0 < space.mean_error < space.mean < 0.1
        True
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    train, test = (_rows(inputs) for inputs in (train_inputs, test_inputs))
    known, wanted = (_rows(targets) for targets in (train_targets, test_targets))
    if len(train) != len(known) or len(test) != len(wanted) or known.shape[1] != wanted.shape[1]:
        raise ValueError(
            f"targets must match inputs, got {len(known)} for {len(train)} training and {len(wanted)} for {len(test)} test "
            f"samples, with {known.shape[1]} and {wanted.shape[1]} outputs"
        )
    if not jitter > 0:
        raise ValueError(f"jitter must be > 0, got {jitter}")
    if isinstance(kernel, int | float):
        if not 0 < kernel < math.inf:
            raise ValueError(f"kernel must be a kernel or a bandwidth > 0, got {kernel}")
        kernel = RBF(float(kernel))
    process = GaussianProcessRegressor(kernel, alpha=jitter, optimizer="fmin_l_bfgs_b" if tune else None)
    try:
        process.fit(train, known)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"jitter must be larger for this kernel, got {jitter}") from error
    mean, covariance = process.predict(test, return_cov=True)
    covariance = covariance if covariance.ndim == 2 else covariance[..., 0]
    eigenvalues, basis = np.linalg.eigh(covariance)
    residuals = mean.reshape(wanted.shape) - wanted
    return GaussianProcessErrors(
        eigenvalues=eigenvalues.clip(min=0),
        squared_residuals=((basis.T @ residuals) ** 2).sum(1),
        outputs=wanted.shape[1],
        mean_error=float((residuals**2).mean()),
    )


def sample_gp_errors(
    train_inputs: ArrayLike,
    train_targets: ArrayLike,
    test_inputs: ArrayLike,
    test_targets: ArrayLike,
    kernel: Any = 1.0,
    draws: int = 2000,
    jitter: float = 1e-8,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Test errors of random functions of a kernel space that fit the training data.

    Args:
        train_inputs: as for `gaussian_process_errors`, and so the next four.
        train_targets: training targets.
        test_inputs: test inputs.
        test_targets: test targets.
        kernel: a kernel, or the bandwidth of a Gaussian one.
        draws: >= 1.
        jitter: > 0.
        generator: of the draws.

    Returns:
        (draws) mean squared errors.

    Raises:
        ValueError: as `gaussian_process_errors`, or if `draws` < 1.

    Cost:
        O(training^3 + test^3 + draws * test).

    Examples:
        >>> x = np.linspace(0, 1, 9)[:, None]
        >>> sample_gp_errors(x[::2], np.sin(4 * x[::2]), x[1::2], np.sin(4 * x[1::2]), 0.3, draws=5).shape
        (5,)
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    space = gaussian_process_errors(train_inputs, train_targets, test_inputs, test_targets, kernel, jitter)
    return space.sample(draws, generator)


def sample_trained_errors(
    make_model: Callable[[], nn.Module],
    train: Callable[[nn.Module, int], Any],
    evaluate: Callable[[nn.Module], float],
    trials: int = 30,
    seed: int = 0,
    fits: Callable[[nn.Module], bool] | None = None,
) -> np.ndarray:
    """Test errors of networks that differ in their initial weights and in all randomness of training.

    Args:
        make_model: gives an untrained network; called under the trial's seed.
        train: `(model, trial seed) -> trained model`, or None if it trained the model in place.
        evaluate: test error of a trained network: a mean squared error, since a share of wrong answers takes few values.
        trials: >= 1.
        seed: of the whole sample; the global random state is left as it was.
        fits: whether a trained network fits the training data; those that do not are left out.

    Returns:
        (trials that fit) errors.

    Raises:
        ValueError: if `trials` < 1, an error is not finite, or no network fits.

    Cost:
        `trials` trainings.

    Examples:
        >>> errors = sample_trained_errors(
        ...     make_model=lambda: nn.Linear(1, 1),
        ...     train=lambda model, seed: None,
        ...     evaluate=lambda model: model.weight.square().mean().item(),
        ...     trials=4,
        ... )
        >>> len(set(errors))
        4
    """
    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}")
    errors = []
    for trial in range(trials):
        trial_seed = seed * 100_003 + trial
        with torch.random.fork_rng():
            torch.manual_seed(trial_seed)
            model = make_model()
            trained = train(model, trial_seed)
            model = model if trained is None else trained
        if fits is not None and not fits(model):
            continue
        error = float(evaluate(model))
        if not math.isfinite(error):
            raise ValueError(f"evaluate must give finite errors, got {error} in trial {trial}")
        errors.append(error)
    if not errors:
        raise ValueError(
            f"fits must accept some network, got none of {trials}: train longer, or larger networks"
        )
    return np.array(errors)


def one_hot_error(model: nn.Module, data: Any, batch_size: int = 1024) -> float:
    """Mean squared distance of a network's outputs from one-hot targets, over samples and classes.

    Args:
        model: gives one number for each class, as trained with squared error: no softmax is applied.
        data: inputs with class indices; any kind that `coloss.metrics.predict` takes.
        batch_size: samples in one forward pass; the result does not depend on it.

    Returns:
        A number >= 0; always predicting the shares of C equal classes gives (C - 1) / C^2.

    Examples:
        >>> one_hot_error(nn.Identity(), [(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))])
        0.25
    """
    outputs, targets = predict(model, data, batch_size)
    one_hot = torch.nn.functional.one_hot(targets, outputs.shape[1])
    return float((outputs.double() - one_hot).square().mean())


def _rows(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(f"inputs and targets must hold at least one sample, got shape {array.shape}")
    return array.reshape(len(array), -1)
