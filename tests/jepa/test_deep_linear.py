"""A deep linear network trained by gradient descent does what the exact solution says."""

import pytest
import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.jepa import DeepLinearSSL, GainCourse, fixed_point, jepa_time, mae_time, train_deep_linear


def exact_views(variance: list[float], regression: list[float], rows: int = 40) -> tuple[Tensor, Tensor]:
    """Views whose sample moments are diagonal to the last digit."""
    dim = len(variance)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 2 * dim, generator=generator, dtype=torch.float64)
    noise = torch.linalg.qr(noise - noise.mean(0))[0] * rows**0.5
    x = noise[:, :dim] * torch.tensor(variance, dtype=torch.float64).sqrt()
    return x, x * torch.tensor(regression, dtype=torch.float64) + 0.3 * noise[:, dim:]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("objective", ["jepa", "mae"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_final_gains_are_the_fixed_points(objective: str, depth: int) -> None:
    x, y = exact_views([1.0, 1.5], [0.9, 0.5])
    model = DeepLinearSSL(2, depth, objective, start=0.1, generator=drawn()).double()
    course = train_deep_linear(
        model, x, y, learning_rate=0.4, steps=300 * depth if objective == "jepa" else 150
    )
    expected = fixed_point(objective, torch.tensor([0.9, 0.5]), depth)
    torch.testing.assert_close(course.gains[-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("objective", "solve"), [("jepa", jepa_time), ("mae", mae_time)])
def test_half_rise_times_are_the_predicted_ones(objective: str, solve) -> None:
    variance, rho = [1.0 / 0.9, 1.2 / 0.3], torch.tensor([0.9, 0.3])
    x, y = exact_views(variance, rho.tolist())
    foretold = solve(torch.tensor([1.0, 1.2]), rho, 2, 0.03)
    model = DeepLinearSSL(2, 2, objective, start=0.03, generator=drawn()).double()
    rate = float(foretold.min()) / 200
    course = train_deep_linear(
        model, x, y, learning_rate=rate, steps=int(1.2 * float(foretold.max()) / rate), looks=300
    )
    found = course.reached(fixed_point(objective, rho, 2) / 2)
    torch.testing.assert_close(found, foretold, rtol=0.02, atol=0)


@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_balance_is_conserved_by_small_steps(objective: str) -> None:
    x, y = exact_views([1.0, 1.5, 0.7], [0.9, 0.5, 0.8])
    y = y @ torch.linalg.qr(torch.randn(3, 3, generator=drawn(3), dtype=torch.float64))[0]  # nothing diagonal
    worst = []
    for rate in (0.2, 0.02):
        model = DeepLinearSSL(3, 3, objective, start=0.2, generator=drawn()).double()
        assert model.imbalance() < 1e-6
        train_deep_linear(model, x, y, learning_rate=rate, steps=int(8 / rate))
        assert not torch.allclose(model.gains(), torch.full((3,), 0.2, dtype=torch.float64), rtol=1e-2)
        worst.append(model.imbalance())
    assert worst[1] < worst[0] / 5 and worst[1] < 5e-3


@pytest.mark.parametrize("stop", [True, False])
def test_without_stop_gradient_jepa_collapses_and_with_it_does_not(stop: bool) -> None:
    x, y = exact_views([1.0, 1.5], [0.9, 0.5])
    model = DeepLinearSSL(2, 2, start=0.5, stop_gradient=stop, generator=drawn()).double()
    with torch.no_grad():
        model.layers += 0.2 * torch.randn(model.layers.shape, generator=drawn())
    course = train_deep_linear(model, x, y, learning_rate=0.5, steps=600, looks=6)
    largest = course.gains.amax(1)
    if stop:
        assert float(largest[-1]) > 0.5
    else:
        assert bool((largest.diff() < 0).all()) and float(largest[-1]) < 0.1 * float(largest[0])


def test_the_first_gradient_is_the_derived_one() -> None:
    """JEPA: R = V W S_xx - W S_yx; dV = R W^T; dW_a = (V W_L..W_a+1)^T R (W_a-1..W_1)^T; likewise for MAE."""
    x, y = torch.randn(2, 30, 3, generator=drawn(), dtype=torch.float64)
    for objective in ("jepa", "mae"):
        model = DeepLinearSSL(3, 2, objective, start=0.4, generator=drawn(1)).double()
        first, second = model.layers.detach()
        head, encoder = model.head.detach(), second @ first
        shared = y.T @ x / 30
        target = encoder @ shared if objective == "jepa" else shared
        residual = head @ encoder @ (x.T @ x / 30) - target
        model.loss(x, y).backward()
        torch.testing.assert_close(model.head.grad, residual @ encoder.T)
        expected = torch.stack([(head @ second).T @ residual, head.T @ residual @ first.T])
        torch.testing.assert_close(model.layers.grad, expected)


def test_shapes_types_and_gains_of_directions() -> None:
    model = DeepLinearSSL(4, 3, start=0.02, generator=drawn())
    assert model(torch.randn(5, 4)).shape == (5, 4)
    directions = torch.linalg.qr(torch.randn(4, 2, generator=drawn(2)))[0]
    torch.testing.assert_close(model.gains(directions), torch.full((2,), 0.02))
    decoded = DeepLinearSSL(4, 3, "mae", start=0.02, generator=drawn())
    product = decoded.head @ decoded.encoder()
    torch.testing.assert_close(product, 0.02 ** (4 / 3) * torch.eye(4), rtol=1e-4, atol=1e-6)
    loss = model.bfloat16().loss(torch.ones(2, 4).bfloat16(), torch.ones(2, 4).bfloat16())
    loss.backward()
    assert loss.isfinite() and model.layers.grad.isfinite().all()


def test_levels_are_reached_between_looks_or_never() -> None:
    course = GainCourse(
        torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.3, 0.0, 0.0], [0.4, 0.0, 0.1], [0.4, 1.0, 0.1]])
    )
    assert course.reached(torch.tensor([0.2, 0.25, 0.5])).tolist() == [0.0, 1.25, float("inf")]


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 2)
    model = DeepLinearSSL(2, 1)
    for call, message in (
        (lambda: DeepLinearSSL(0, 1), "features must be >= 1, got 0"),
        (lambda: DeepLinearSSL(2, 0), "depth must be >= 1, got 0"),
        (lambda: DeepLinearSSL(2, 1, start=-0.1), "start must be > 0 and finite, got -0.1"),
        (lambda: train_deep_linear(model, x, x, learning_rate=0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: train_deep_linear(model, x, x, learning_rate=0.0, steps=1), "learning_rate must be > 0"),
        (
            lambda: train_deep_linear(model, x, x, learning_rate=0.1, steps=1, batch_size=0),
            "batch_size must be >= 1, got 0",
        ),
        (
            lambda: train_deep_linear(model, x[:0], x[:0], learning_rate=0.1, steps=1),
            "views must be of one shape and hold a row",
        ),
        (
            lambda: train_deep_linear(model, 1e3 * x, 1e3 * x, learning_rate=10.0, steps=200),
            "learning_rate must be smaller, got 10.0: training diverged",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_objectives_are_known(as_users_call: None) -> None:
    with pytest.raises(InputError, match='objective must be "jepa" or "mae", got \'simclr\''):
        DeepLinearSSL(2, 1, "simclr")


def test_training_is_the_same_under_autocast() -> None:
    x, y = (view.float() for view in exact_views([1.0, 1.5], [0.9, 0.5]))
    courses = []
    for enabled in (False, True):
        model = DeepLinearSSL(2, 2, start=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            courses.append(train_deep_linear(model, x, y, learning_rate=0.2, steps=60))
    assert torch.equal(courses[0].gains, courses[1].gains)
    assert (courses[0].gains[-1] > courses[0].gains[0]).all()
