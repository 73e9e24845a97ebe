"""Facts about the test errors of random models: Gaussian process draws, and networks trained anew."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch import nn

from coloss.classification import (
    GaussianProcessErrors,
    gaussian_process_errors,
    noncentral_chi2_logcdf,
    one_hot_error,
    sample_gp_errors,
    sample_trained_errors,
)
from coloss.data import IndexedDataset


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, outputs: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = random.uniform(-1, 1, (count, 2))
    return inputs, np.stack([np.sin((k + 1) * inputs.sum(1)) for k in range(outputs)], 1)


# Gaussian processes


def test_the_mean_and_the_covariance_are_the_conditional_ones() -> None:
    (train, known), (test, wanted) = points(12), points(7, seed=1)
    space = gaussian_process_errors(train, known, test, wanted, kernel=0.8, jitter=1e-6)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 0.8**2))

    gram = kernel(train, train) + 1e-6 * np.eye(12)
    mean = kernel(test, train) @ np.linalg.solve(gram, known)
    covariance = kernel(test, test) - kernel(test, train) @ np.linalg.solve(gram, kernel(train, test))
    assert space.mean_error == pytest.approx(((mean - wanted) ** 2).mean(), rel=1e-4)
    expected = ((mean - wanted) ** 2).mean() + covariance.trace() / 7
    assert space.mean == pytest.approx(expected, rel=1e-4)
    assert space.eigenvalues.sum() == pytest.approx(covariance.trace(), rel=1e-4)
    # A slow twin: draw functions at the test points, and take their errors.
    random = np.random.default_rng(0)
    root = np.linalg.cholesky(covariance + 1e-9 * np.eye(7))
    draws = mean + root @ random.standard_normal((4000, 7, 2))
    slow = ((draws - wanted) ** 2).mean((1, 2))
    quick = space.sample(4000, seeded())
    assert quick.mean() == pytest.approx(slow.mean(), rel=0.05)
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(quick, share) == pytest.approx(np.quantile(slow, share), rel=0.1)


def test_draws_fit_the_training_targets_and_their_mean_is_better_than_they_are() -> None:
    (train, known), (test, wanted) = points(20), points(9, seed=1)
    # Jitter is the variance that is left at a training point.
    assert sample_gp_errors(train, known, train, known, 0.5, draws=50, jitter=1e-10).max() < 1e-8
    space = gaussian_process_errors(train, known, test, wanted, 0.5)
    assert space.mean_error <= space.mean


def test_draws_are_those_of_the_generator() -> None:
    (train, known), (test, wanted) = points(8, 1), points(5, 1, seed=1)
    first, again, other = (
        sample_gp_errors(train, known[:, 0], test, wanted[:, 0], draws=300, generator=seeded(seed))
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_and_kernels_of_the_library_are_taken() -> None:
    images, labels = torch.rand(30, 1, 4, 4), torch.eye(3)[torch.arange(30) % 3]
    parts = (images[:20], labels[:20], images[20:], labels[20:])
    plain = gaussian_process_errors(*parts, kernel=2.0)
    assert gaussian_process_errors(*parts, kernel=RBF(2.0)).mean == pytest.approx(plain.mean)
    tuned = gaussian_process_errors(*parts, kernel=ConstantKernel(1.0) * RBF(0.1), tune=True)
    untuned = gaussian_process_errors(*parts, kernel=ConstantKernel(1.0) * RBF(0.1))
    assert tuned.mean < untuned.mean


def equal_space(variance: float, residual: float, points: int, outputs: int) -> GaussianProcessErrors:
    return GaussianProcessErrors(
        np.full(points, variance), np.full(points, residual), outputs, residual / outputs
    )


@given(st.integers(5, 60), st.integers(1, 10), st.floats(0.1, 4.0), st.floats(0.3, 1.5))
@settings(max_examples=25)
def test_with_equal_variances_the_probability_is_a_non_central_chi_square(
    count: int, outputs: int, residual: float, share: float
) -> None:
    space = equal_space(0.5, residual, count, outputs)
    error = share * space.mean
    exact = noncentral_chi2_logcdf(error * count * outputs / 0.5, count * outputs, count * residual / 0.5)
    # The saddlepoint's relative error of the probability is a fraction of the inverse degrees of freedom.
    assert space.logcdf(error) == pytest.approx(exact, abs=0.5 / (count * outputs) + 1e-3)


def test_unequal_variances_agree_with_draws_and_with_tilted_draws() -> None:
    random = np.random.default_rng(0)
    weights, residuals = 0.7 ** np.arange(40), random.gamma(0.5, 0.2, 40)
    space = GaussianProcessErrors(weights, residuals, 1, residuals.mean())
    draws = space.sample(20_000, seeded())
    for share in (0.02, 0.3, 0.7):
        assert math.exp(space.logcdf(float(np.quantile(draws, share)))) == pytest.approx(share, rel=0.08)
    assert space.logcdf(space.mean) == pytest.approx(math.log((draws <= space.mean).mean()), abs=0.02)
    # Far out: draw from the distribution tilted by exp(t Q), under which the error is typical, and weigh back.
    t = -300.0
    shrink = 1 / (1 - 2 * weights * t)
    normal = random.standard_normal((100_000, 40))
    tilted = ((np.sqrt(residuals) * shrink + np.sqrt(weights * shrink) * normal) ** 2).sum(1)
    cumulant = (0.5 * np.log(shrink) + t * residuals * shrink).sum()
    target = float(np.quantile(tilted, 0.5))
    log_probability = (
        math.log(np.mean(np.exp(-t * (tilted - target)) * (tilted <= target))) + cumulant - t * target
    )
    assert log_probability < -40
    assert space.logcdf(target / 40) == pytest.approx(log_probability, abs=0.1)


def test_the_ends_of_the_probability() -> None:
    space = GaussianProcessErrors(np.array([1.0, 0.5, 0.0]), np.array([0.2, 0.1, 0.6]), 1, 0.3)
    # What is certain to be wrong stays wrong: no draw has an error below 0.6 / 3.
    assert space.logcdf(0.2) == space.logcdf(0.0) == space.logcdf(-1.0) == -math.inf
    assert -math.inf < space.logcdf(0.2001) < space.logcdf(0.21)
    assert space.logcdf(math.inf) == 0
    assert space.logcdf(100.0) == pytest.approx(0, abs=1e-9)
    errors = np.linspace(0.25, 5.0, 200)
    values = np.array([space.logcdf(error) for error in errors])
    assert (np.diff(values) > 0).all()
    assert np.abs(np.diff(values, 2)).max() < 0.5


def test_a_bad_space_is_named() -> None:
    (train, known), (test, wanted) = points(6), points(4, seed=1)
    for wrong, message in (
        ({"train_targets": known[:5]}, "targets must match inputs, got 5 for 6 training and 4 for 4 test"),
        ({"test_targets": wanted[:, :1]}, "with 2 and 1 outputs"),
        ({"jitter": 0.0}, "jitter must be > 0, got 0.0"),
        ({"kernel": -1.0}, "kernel must be a kernel or a bandwidth > 0, got -1.0"),
        ({"test_inputs": test[:0]}, "at least one sample"),
        (
            {"train_inputs": np.zeros((6, 2)), "jitter": 1e-300},
            "jitter must be larger for this kernel, got 1e-300",
        ),
    ):
        given_values = {
            "train_inputs": train,
            "train_targets": known,
            "test_inputs": test,
            "test_targets": wanted,
        }
        with pytest.raises(ValueError, match=message):
            gaussian_process_errors(**(given_values | wrong))
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        sample_gp_errors(train, known, test, wanted, draws=0)


# Networks


def test_networks_differ_by_seed_and_nothing_outside_changes() -> None:
    seen = []

    def train(model: nn.Module, seed: int) -> None:
        seen.append(seed)
        nn.init.constant_(model.bias, float(torch.rand(())))

    def evaluate(model: nn.Module) -> float:
        return float((model.weight.square().sum() + model.bias**2).detach())

    before = torch.get_rng_state()
    first, again, other = (
        sample_trained_errors(lambda: nn.Linear(3, 1), train, evaluate, 4, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first, again)
    assert len({*first, *other}) == 8
    assert len(set(seen)) == 8


def test_networks_that_do_not_fit_are_left_out_and_a_trained_copy_counts() -> None:
    counter = iter(range(100))

    def train(model: nn.Module, seed: int) -> nn.Module:
        return nn.Threshold(float(next(counter)), 0.0)

    def errors(fits: object) -> list[float]:
        return sample_trained_errors(nn.Identity, train, lambda m: m.threshold, 6, fits=fits).tolist()  # type: ignore[arg-type]

    assert errors(lambda model: model.threshold % 2 == 0) == [0.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="fits must accept some network, got none of 6"):
        errors(lambda model: False)
    with pytest.raises(ValueError, match="got nan in trial 0"):
        sample_trained_errors(nn.Identity, lambda m, s: None, lambda m: math.nan)
    with pytest.raises(ValueError, match="trials must be >= 1, got 0"):
        sample_trained_errors(nn.Identity, lambda m, s: None, lambda m: 1.0, 0)


def test_the_error_is_a_mean_over_samples_and_classes_whatever_the_batches() -> None:
    outputs, targets = torch.randn(10, 4), torch.randint(4, (10,))
    expected = (outputs - torch.eye(4)[targets]).square().mean().item()
    for size in (1, 3, 10):
        found = one_hot_error(nn.Identity(), IndexedDataset(outputs, targets), batch_size=size)
        assert found == pytest.approx(expected, rel=1e-6)
    shares = IndexedDataset(torch.full((8, 4), 0.25), torch.arange(8) % 4)
    assert one_hot_error(nn.Identity(), shares) == pytest.approx(3 / 16)
