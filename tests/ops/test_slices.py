"""Facts about sliced statistics: expectations, closed forms, invariances, memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import epps_pulley, random_directions, sliced_statistic


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(t_max: float = 3.0, knots: int = 17) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots, quadrature weights with the window, and the normal characteristic function, straight from the card."""
    t = np.linspace(0, t_max, knots)
    weights = np.full(knots, 2 * t[1])
    weights[[0, -1]] = t[1]
    normal = np.exp(-(t**2) / 2)
    return t, weights * normal, normal


def slow_epps_pulley(x: np.ndarray, t_max: float = 3.0, knots: int = 17) -> np.ndarray:
    t, weights, normal = grid(t_max, knots)
    empirical = np.exp(1j * t * x[..., None]).mean(-3)  # (samples, slices, knots) held at once
    return x.shape[-2] * (np.abs(empirical - normal) ** 2 * weights).sum(-1)


def full_line(x: np.ndarray) -> float:
    """The statistic with the integral over the whole line, worked out in closed form."""
    pairs = np.exp(-((x[:, None] - x[None, :]) ** 2) / 2).mean()
    singles = np.exp(-(x**2) / 4).mean()
    return len(x) * (
        math.sqrt(2 * math.pi) * pairs - 2 * math.sqrt(math.pi) * singles + math.sqrt(2 * math.pi / 3)
    )


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.floats(0.5, 6),
    st.integers(2, 30),
    st.floats(-3, 3),
    st.floats(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_plain_definition(samples, slices, t_max, knots, shift, scale):
    x = shift + scale * randn(2, samples, slices)
    np.testing.assert_allclose(
        epps_pulley(x, t_max, knots).numpy(), slow_epps_pulley(x.numpy(), t_max, knots), rtol=1e-9, atol=1e-11
    )


def test_mean_under_the_normal_distribution_does_not_depend_on_the_sample_size():
    t, weights, _ = grid()
    expected = (weights * (1 - np.exp(-(t**2)))).sum()
    assert expected == pytest.approx(1.0525, abs=5e-5)
    for samples in (4, 64):
        values = epps_pulley(randn(samples, 20_000))
        assert values.mean().item() == pytest.approx(
            expected, abs=4 * values.std().item() / math.sqrt(20_000)
        )


def test_collapse_costs_a_constant_for_each_sample():
    for samples in (1, 10, 1000):
        assert epps_pulley(torch.zeros(samples, 1)).item() / samples == pytest.approx(0.4020, abs=5e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_fine_grid_is_the_closed_form_and_the_default_grid_near_it_on_average(scale):
    x = scale * randn(200, 60)
    closed = np.array([full_line(column) for column in x.T.numpy()])
    np.testing.assert_allclose(epps_pulley(x, t_max=9.0, knots=200).numpy(), closed, rtol=1e-9)
    # What the default grid cuts off beyond t = 3 is little; beside the small values of a normal sample it shows.
    default = epps_pulley(x).numpy()
    assert default.mean() == pytest.approx(closed.mean(), rel=0.02)
    np.testing.assert_allclose(default, closed, rtol=0.01, atol=0.06)


def test_collapse_in_the_closed_form():
    assert full_line(np.zeros(10)) / 10 == pytest.approx(0.4089, abs=5e-5)
    fine = epps_pulley(torch.zeros(10, 1), t_max=9.0, knots=200).item()
    assert fine == pytest.approx(full_line(np.zeros(10)), rel=1e-5)


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 0.1512), (2.0, 0.2361)])
def test_wrong_scale_costs_its_known_limit_for_each_sample(scale, expected):
    quantiles = torch.special.ndtri((torch.arange(20_000).double() + 0.5) / 20_000)
    value = epps_pulley(scale * quantiles.unsqueeze(1)).item() / 20_000
    assert value == pytest.approx(expected, abs=1e-4)


def test_the_best_sample_is_normal_and_shift_and_scale_cost():
    quantiles = torch.special.ndtri((torch.arange(500).double() + 0.5) / 500).unsqueeze(1)
    best = epps_pulley(quantiles)
    assert best < 0.01
    for worse in (quantiles + 0.3, quantiles * 1.3, quantiles * 0.7, quantiles.abs()):
        assert epps_pulley(worse) > 100 * best


def test_order_of_samples_and_sign_of_a_direction_do_not_matter():
    x = randn(50, 3)
    shuffled = x[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(epps_pulley(shuffled), epps_pulley(x))
    torch.testing.assert_close(epps_pulley(-x), epps_pulley(x))


def test_gradcheck():
    assert torch.autograd.gradcheck(epps_pulley, (randn(2, 4, 2).requires_grad_(),))
    directions = random_directions(3, 5, torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z, a: sliced_statistic(z, a, chunk_size=3),
        (randn(2, 4, 3).requires_grad_(), directions.requires_grad_()),
    )


def test_gradient_of_one_sample_is_bounded_however_far_it_lies():
    for far in (1e2, 1e4, 1e6):
        x = torch.tensor([[far], [0.0], [1.0]], requires_grad=True)
        value = epps_pulley(x)
        value.sum().backward()
        assert 0 <= value.item() < 3 * 6
        assert x.grad.abs().max() < 10


def test_float32_walk_over_the_knots_stays_accurate():
    x = 3 * randn(4096, 8)
    torch.testing.assert_close(epps_pulley(x.float()).double(), epps_pulley(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype):
    z = randn(64, 8).to(dtype).requires_grad_()
    directions = random_directions(8, 32, torch.Generator().manual_seed(0))
    expected = sliced_statistic(z.float(), directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sliced_statistic(z, directions)
        float_value = sliced_statistic(z.float(), directions)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(float_value, expected)
    value.backward()
    assert z.grad.dtype == dtype


def test_empty_and_single_samples():
    x = torch.zeros(0, 3, requires_grad=True)
    value = epps_pulley(x)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0, 0.0]
    assert x.grad.shape == (0, 3)
    np.testing.assert_allclose(
        epps_pulley(torch.tensor([[0.7]])).numpy(), slow_epps_pulley(np.array([[0.7]])), rtol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 32, 100])
def test_chunks_change_nothing(chunk_size):
    z, directions = randn(3, 20, 6).requires_grad_(), random_directions(6, 32, dtype=torch.float64)
    value = sliced_statistic(z, directions, chunk_size=chunk_size)
    dense = torch.stack([epps_pulley(view @ directions) for view in z]).mean()
    torch.testing.assert_close(value, dense)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, z)[0])


def test_another_univariate_statistic_can_take_its_place():
    def moments(x: torch.Tensor) -> torch.Tensor:
        return x.mean(-2) ** 2 + (x.std(-2) - 1) ** 2

    z, directions = randn(30, 4), random_directions(4, 8, dtype=torch.float64)
    torch.testing.assert_close(sliced_statistic(z, directions, moments), moments(z @ directions).mean())


def test_rotation_does_not_matter_when_directions_turn_with_it():
    z, directions = randn(40, 5), random_directions(5, 16, dtype=torch.float64)
    rotation = torch.linalg.qr(randn(5, 5, seed=1)).Q
    torch.testing.assert_close(
        sliced_statistic(z @ rotation, rotation.T @ directions), sliced_statistic(z, directions)
    )
    # ... and in expectation over fresh directions.
    z = randn(100, 5) * torch.tensor([2.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    many = random_directions(5, 8_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = sliced_statistic(z @ rotation, many)
    torch.testing.assert_close(turned, sliced_statistic(z, many), rtol=0.04, atol=0)


@pytest.mark.parametrize("name", ["epps_pulley", "sliced_statistic"])
def test_a_second_derivative_is_an_error(name):
    x = randn(5, 2).requires_grad_()
    value = epps_pulley(x).sum() if name == "epps_pulley" else sliced_statistic(x, torch.eye(2).double())
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} can be differentiated only once"):
        gradient.sum().backward()


def test_without_gradients_no_slope_is_computed():
    visits = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        visits.append(torch.is_grad_enabled())
        return x.square().mean(-2)

    z, directions = randn(5, 2).requires_grad_(), torch.eye(2).double()
    with torch.no_grad():
        silent = sliced_statistic(z, directions, watched)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, sliced_statistic(z, directions, watched))
    assert visits == [False, True]


def test_batched_gradients_equal_gradients_one_by_one():
    x = randn(6, 3).requires_grad_()
    value = torch.cat([epps_pulley(x)[:2], sliced_statistic(x, torch.eye(3).double()).reshape(1)])
    (batched,) = torch.autograd.grad(
        value, x, torch.eye(3).double(), is_grads_batched=True, retain_graph=True
    )
    singly = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in value]
    torch.testing.assert_close(batched, torch.stack(singly))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([torch.float16, torch.float32, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_directions_have_length_one(dim, slices, dtype):
    directions = random_directions(dim, slices, torch.Generator().manual_seed(0), dtype)
    assert directions.shape == (dim, slices)
    assert directions.dtype == dtype
    torch.testing.assert_close(
        directions.double().norm(dim=0),
        torch.ones(slices).double(),
        rtol=0,
        atol=float(2 * torch.finfo(dtype).eps),
    )


def test_directions_follow_the_generator_and_cover_the_sphere_evenly():
    first, again = (random_directions(3, 8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(0)
    many = random_directions(3, 50_000, generator, torch.float64)
    torch.testing.assert_close(many @ many.T / 50_000, torch.eye(3).double() / 3, rtol=0, atol=0.01)
    torch.testing.assert_close(many.mean(1), torch.zeros(3).double(), rtol=0, atol=0.01)


def test_bad_input_is_named():
    z, directions = torch.ones(4, 3), torch.ones(3, 2)
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        random_directions(0, 3)
    with pytest.raises(ValueError, match="slices must be >= 1, got -1"):
        random_directions(3, -1)
    with pytest.raises(ValueError, match="t_max must be > 0 and finite, got 0"):
        epps_pulley(z, t_max=0.0)
    with pytest.raises(ValueError, match="knots must be >= 2, got 1"):
        epps_pulley(z, knots=1)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        sliced_statistic(z, directions, chunk_size=0)
    with pytest.raises(ValueError, match="directions must have at least one column"):
        sliced_statistic(z, directions[:, :0])


@pytest.mark.usefixtures("as_users_call")
def test_directions_of_another_dimension_are_named():
    with pytest.raises(ValueError, match="directions must have 3 rows, got 4"):
        sliced_statistic(torch.ones(4, 3), torch.ones(4, 2))
