"""Facts about linear regression from bag averages, and about its risk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    LaplaceBagRelease,
    aggregate_linear_regression,
    aggregate_loss,
    aggregate_risk,
    choose_rho,
    optimal_bag_size,
    optimal_rho,
    random_bags,
)
from coloss.ops import segment_mean


def problem(
    samples: int, features: int, size: int, seed: int = 0, noise: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, bag averages, bags and true weights of norm 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    truth = torch.randn(features, generator=generator, dtype=torch.float64)
    truth /= truth.norm()
    labels = inputs @ truth + noise * torch.randn(samples, generator=generator, dtype=torch.float64)
    bags = random_bags(samples, size, generator)
    return inputs, segment_mean(labels, bags), bags, truth


@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("intercept", [False, True])
def test_the_closed_form_is_where_the_loss_has_no_gradient(rho: float, intercept: bool) -> None:
    inputs, averages, bags, _ = problem(50, 4, 3)
    averages, inputs = averages + 2.0, inputs + 1.0
    weight, bias = aggregate_linear_regression(inputs, averages, bags, rho, intercept)
    weight.requires_grad_(), bias.requires_grad_()
    loss = aggregate_loss(inputs @ weight + bias, averages, bags, rho)
    for_weight, for_bias = torch.autograd.grad(loss, (weight, bias))
    assert for_weight.abs().max() < 1e-12
    assert (for_bias.abs() < 1e-12) == intercept
    assert bool(bias != 0) == intercept


def test_the_ends_are_ordinary_least_squares_on_averages_and_on_samples() -> None:
    inputs, averages, bags, _ = problem(60, 4, 3)
    bag_level = aggregate_linear_regression(inputs, averages, bags, 0.0, intercept=False).weight
    on_averages = torch.linalg.lstsq(segment_mean(inputs, bags), averages[:, None]).solution[:, 0]
    torch.testing.assert_close(bag_level, on_averages)
    instance_level = aggregate_linear_regression(inputs, averages, bags, 1.0, intercept=False).weight
    on_samples = torch.linalg.lstsq(inputs, averages[bags][:, None]).solution[:, 0]
    torch.testing.assert_close(instance_level, on_samples)


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_many_samples_show_the_shrinkage(rho: float) -> None:
    inputs, averages, bags, truth = problem(200_000, 5, 4)
    found = aggregate_linear_regression(inputs, averages, bags, rho).weight
    torch.testing.assert_close(found @ truth, torch.tensor(1 / (1 + rho * 3)).double(), rtol=0.02, atol=0)


def test_a_constant_is_learned_whole_while_slopes_shrink() -> None:
    inputs, averages, bags, _ = problem(600, 3, 5)
    level = averages[bags].mean()
    for rho in (0.0, 0.5, 1.0):
        model = aggregate_linear_regression(inputs + 4.0, averages, bags, rho)
        torch.testing.assert_close(model.predict(inputs + 4.0).mean(), level)


def test_fewer_bags_than_features_leave_the_shortest_solution_and_some_knob_cures_it() -> None:
    inputs, averages, bags, truth = problem(60, 10, 10)
    shortest = aggregate_linear_regression(inputs, averages, bags, 0.0, intercept=False).weight
    expected = torch.linalg.pinv(segment_mean(inputs, bags)) @ averages
    torch.testing.assert_close(shortest, expected)
    # As many bags as features: the peak.
    inputs, averages, bags, truth = problem(100, 10, 10)
    errors = [
        (aggregate_linear_regression(inputs, averages, bags, rho, False).weight - truth).norm().item()
        for rho in (0.0, 0.1)
    ]
    assert errors[1] < 1 < errors[0]


def test_types_devices_and_several_outputs() -> None:
    inputs, averages, bags, _ = problem(40, 3, 4)
    both = torch.stack([averages, -2 * averages], 1)
    model = aggregate_linear_regression(inputs.float(), both.float(), bags, 0.1)
    assert (model.weight.shape, model.bias.shape, model.weight.dtype) == ((3, 2), (2,), torch.float32)
    torch.testing.assert_close(model.weight[:, 1], -2 * model.weight[:, 0])
    half = aggregate_linear_regression(inputs.bfloat16(), both.bfloat16(), bags, 0.1)
    assert half.predict(inputs.bfloat16()).dtype == torch.float32
    single = aggregate_linear_regression(inputs[:1], averages[:1], torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(single.predict(inputs[:1]), averages[:1])


# Risk


@pytest.mark.parametrize(
    ("size", "bag", "instance", "between"), [(2, 0.149, 0.303, 0.130), (5, 0.514, 0.663, 0.316)]
)
def test_the_risk_is_what_was_simulated(size: int, bag: float, instance: float, between: float) -> None:
    # Simulated apart from this code: 1,500 samples of 100 features, unit signal and noise.
    for rho, simulated in ((0.0, bag), (1.0, instance), (0.1, between)):
        assert aggregate_risk(size, 15, 1.0, 1.0, rho) == pytest.approx(simulated, rel=0.05)


@pytest.mark.parametrize(("size", "rho"), [(4, 0.03), (20, 0.0), (20, 0.1)])
def test_the_risk_is_the_mean_squared_distance_from_the_truth(size: int, rho: float) -> None:
    distances = []
    for seed in range(12):
        inputs, averages, bags, truth = problem(600, 50, size, seed, noise=0.5)
        found = aggregate_linear_regression(inputs, averages, bags, rho, intercept=False).weight
        distances.append((found - truth).square().sum().item())
    assert aggregate_risk(size, 12, 1.0, 0.25, rho) == pytest.approx(sum(distances) / 12, rel=0.08)


@given(st.integers(1, 40), st.floats(1.5, 50), st.floats(0, 4), st.floats(0, 4))
@settings(max_examples=25)
def test_the_ends_of_the_risk_are_the_known_formulas(k: int, psi: float, r2: float, s2: float) -> None:
    instance = r2 * ((k - 1) ** 2 / k**2 + (k - 1) / (k**2 * (psi - 1))) + s2 / (k * (psi - 1))
    assert aggregate_risk(k, psi, r2, s2, 1.0) == pytest.approx(instance, rel=1e-6, abs=1e-9)
    if psi > 1.01 * k:
        bag = s2 * k / (psi - k)
        assert aggregate_risk(k, psi, r2, s2, 0.0) == pytest.approx(bag, rel=1e-6, abs=1e-9)
        assert aggregate_risk(k, psi, r2, s2, 1e-12) == pytest.approx(bag, rel=1e-3, abs=1e-6)
    ordinary = s2 / (psi - 1)
    assert aggregate_risk(1, psi, r2, s2, 0.4) == pytest.approx(ordinary, rel=1e-6, abs=1e-9)


def test_the_bag_level_peaks_where_there_are_as_many_bags_as_features() -> None:
    assert aggregate_risk(10, 10, 1.0, 1.0, 0.0) == math.inf
    assert aggregate_risk(10, 10, 1.0, 1.0, 0.1) < 1
    # A single bag of everything teaches nothing: the risk is that of predicting 0.
    assert aggregate_risk(10_000, 10, 1.0, 1.0, 0.0) == pytest.approx(1, rel=2e-3)


@given(st.integers(2, 30), st.floats(1.5, 40), st.floats(0.01, 4), st.floats(0.01, 4))
@settings(max_examples=25)
def test_no_knob_on_a_grid_beats_the_optimal_one(k: int, psi: float, r2: float, s2: float) -> None:
    best = aggregate_risk(k, psi, r2, s2, optimal_rho(k, psi, r2, s2))
    grid = [0.0, *(10 ** (-power / 4) for power in range(20)), 1.0]
    assert best <= min(aggregate_risk(k, psi, r2, s2, rho) for rho in grid) * (1 + 1e-6)


def test_the_ends_win_where_they_should() -> None:
    assert optimal_rho(5, 100, signal=1.0, noise=0.0) == pytest.approx(0, abs=1e-5)
    assert optimal_rho(5, 3, signal=0.01, noise=10.0) == 1
    # The instance level wins below some signal-to-noise ratio, the bag level above.
    won = [
        aggregate_risk(5, 15, ratio, 1.0, 1.0) < aggregate_risk(5, 15, ratio, 1.0, 0.0)
        for ratio in (0.01, 0.1, 0.5, 1.0, 10.0)
    ]
    assert won == [True, True, True, False, False]


# Privacy


@given(st.floats(2.5, 60), st.floats(0.05, 4), st.floats(0, 2), st.floats(0.1, 10))
@settings(max_examples=25)
def test_the_optimal_bag_size_is_the_closed_form_rounded(
    psi: float, r2: float, s2: float, epsilon: float
) -> None:
    found = optimal_bag_size(psi, r2, s2, 5000, epsilon=epsilon, clip=2.0)
    v = 8 * 2.0**2 / epsilon**2
    inverse = (r2 * (2 * psi - 3) - s2) / (2 * (r2 * (psi - 2) + v))
    exact = min(max(1 / inverse, 1.0), 5000.0) if inverse > 0 else 5000.0
    assert abs(found - exact) < 1


def test_privacy_asks_for_larger_bags_at_the_instance_level_and_never_at_the_bag_level() -> None:
    sizes = [optimal_bag_size(15, 1.0, 1.0, 2000, epsilon=e, clip=3.0) for e in (10, 3, 1, 0.3, 0.1)]
    assert sizes == sorted(set(sizes))
    assert optimal_bag_size(15, 1.0, 1.0, 10, rho=0.0, epsilon=1.0, clip=3.0) == 1


def test_private_averages_measure_as_predicted() -> None:
    psi, features, epsilon, clip = 12, 40, 1.0, 4.0
    sizes, measured = (1, 4, 8, 16, 48), []
    for size in sizes:
        total = 0.0
        for seed in range(6):
            inputs, labels, _, truth = problem(psi * features, features, 1, seed)
            # Bags of one come in random order: put the labels back to their rows.
            generator = torch.Generator().manual_seed(seed)
            labels = inputs @ truth + torch.randn(len(inputs), generator=generator, dtype=torch.float64)
            averages, bags = LaplaceBagRelease(epsilon, size, clip=clip, generator=generator)(labels)
            found = aggregate_linear_regression(inputs, averages, bags, 1.0, intercept=False).weight
            total += (found - truth).square().sum().item() / 6
        measured.append(total)
        assert total == pytest.approx(aggregate_risk(size, psi, 1.0, 1.0, 1.0, epsilon, clip), rel=0.3)
    best = sizes[measured.index(min(measured))]
    predicted = optimal_bag_size(psi, 1.0, 1.0, 480, epsilon=epsilon, clip=clip)
    assert predicted / 2 <= best <= predicted * 2


# Choosing


def test_the_knob_is_chosen_on_held_out_bags() -> None:
    inputs, averages, bags, _ = problem(200, 5, 4, noise=0.0)
    assert choose_rho(inputs, averages, bags) == 0.0
    # Nothing to learn: strong regularisation predicts held-out averages best.
    inputs, averages, bags, _ = problem(100, 10, 8)
    noise = torch.randn(len(averages), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert choose_rho(inputs, noise, bags, generator=torch.Generator().manual_seed(0)) >= 0.3
    assert choose_rho(inputs, noise, bags, rhos=(0.0, 0.0)) == 0.0


def test_bad_input_is_named() -> None:
    inputs, averages, bags, _ = problem(20, 2, 5)
    with pytest.raises(ValueError, match="rho must be >= 0 and finite, got -1"):
        aggregate_linear_regression(inputs, averages, bags, -1)
    with pytest.raises(ValueError, match="at least one row, got none"):
        aggregate_linear_regression(inputs[:0], averages, bags[:0])
    with pytest.raises(ValueError, match="index must be"):
        aggregate_linear_regression(inputs, averages[:2], bags)
    with pytest.raises(ValueError, match=r"folds must be in \[2, 4 bags\], got 5"):
        choose_rho(inputs, averages, bags, folds=5)
    with pytest.raises(ValueError, match="at least one candidate"):
        choose_rho(inputs, averages, bags, rhos=())
    with pytest.raises(ValueError, match="every bag of bag_targets must have rows"):
        choose_rho(inputs, torch.cat([averages, averages]), bags)
    for options, message in (
        ({"bag_size": 0}, "bag_size must be >= 1, got 0"),
        ({"samples_per_feature": 1.0}, "samples_per_feature must be > 1 and finite, got 1.0"),
        ({"signal": -1.0}, "signal must be >= 0 and finite, got -1.0"),
        ({"rho": math.inf}, "rho must be >= 0 and finite, got inf"),
        ({"epsilon": 1.0}, "epsilon and clip must be given together, got 1.0 and None"),
        ({"epsilon": 0.0, "clip": 1.0}, "epsilon must be > 0 and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_risk(
                **({"bag_size": 2, "samples_per_feature": 5.0, "signal": 1.0, "noise": 1.0} | options)
            )
    with pytest.raises(ValueError, match="largest must be >= 1, got 0"):
        optimal_bag_size(5, 1.0, 1.0, 0)
