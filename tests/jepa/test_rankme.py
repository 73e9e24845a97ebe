"""Facts about effective ranks: limits, invariances, a NumPy twin, and what each estimator sees."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from sklearn.datasets import load_digits

from coloss.jepa import (
    alpha_req,
    entropy_rank,
    lidar,
    participation_ratio,
    rankme,
    rankme_interval,
    stable_rank,
)
from coloss.lab.claims import verify

METERS = [rankme, entropy_rank, participation_ratio, stable_rank]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def numpy_rankme(z, eps=1e-7):
    values = np.linalg.svd(z, compute_uv=False)
    share = values / values.sum() + eps
    return math.exp(-(share * np.log(share)).sum())


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (50, 50), (1, 5), (5, 1)])
def test_it_is_the_entropy_of_the_singular_values(shape):
    z = normal(*shape) * torch.linspace(0.1, 3, shape[1], dtype=torch.float64)
    assert rankme(z).item() == pytest.approx(numpy_rankme(z.numpy()), rel=1e-6)
    assert rankme(z, eps=1e-5).item() == pytest.approx(numpy_rankme(z.numpy(), 1e-5), rel=1e-6)
    if shape[0] > 1:
        centred = z - z.mean(0)
        assert rankme(z, center=True).item() == pytest.approx(numpy_rankme(centred.numpy()), rel=1e-4)


def test_orthonormal_columns_have_full_rank_and_a_little_more():
    assert rankme(orthonormal(500, 64)).item() == pytest.approx(64.001, abs=5e-4)
    assert rankme(orthonormal(500, 64), eps=0.0).item() == pytest.approx(64, abs=1e-9)


def test_rank_one_and_what_eps_adds():
    z = normal(500, 1) @ normal(1, 500, seed=1)
    assert rankme(z[:, :64]).item() == pytest.approx(1.0001, abs=5e-5)
    assert rankme(z, eps=1e-5).item() == pytest.approx(1.06, abs=5e-3)
    assert rankme(z, eps=0.0).item() == pytest.approx(1.0, abs=1e-4)


def test_scale_and_rotation_do_not_matter_but_the_mean_does():
    z = normal(200, 16) * torch.linspace(1, 3, 16, dtype=torch.float64)
    value = rankme(z).item()
    assert rankme(1e6 * z).item() == pytest.approx(value, rel=1e-9)
    assert rankme(1e-12 * z.float()).item() == pytest.approx(value, rel=1e-5)
    assert rankme(orthonormal(200, 200) @ z @ orthonormal(16, 16, seed=1)).item() == pytest.approx(
        value, rel=1e-9
    )
    assert rankme(z + 10).item() < 0.7 * value
    assert rankme(z + 10, center=True).item() == pytest.approx(rankme(z, center=True).item(), rel=1e-6)


def test_digits_pixels():
    pixels = torch.from_numpy(load_digits().data)
    assert rankme(pixels).item() == pytest.approx(29.63, abs=5e-3)
    assert rankme(pixels, center=True).item() == pytest.approx(39.71, abs=5e-3)


def test_a_normal_cloud_comes_near_its_dimension_with_many_samples():
    few, many = rankme(normal(128, 64)).item(), rankme(normal(10_000, 64)).item()
    assert many == pytest.approx(63.95, abs=0.02)
    assert few < 61


def test_few_samples_bound_the_value():
    assert rankme(normal(10, 200)).item() <= 10 + 1e-3


@pytest.mark.parametrize("meter", METERS)
def test_equal_directions_and_one_direction(meter):
    z = orthonormal(101, 7)
    # Both signs of each row: the mean is 0, so centring changes nothing.
    both = torch.cat([z, -z])
    assert meter(both).item() == pytest.approx(7, abs=1e-4)
    line = torch.outer(torch.linspace(-1, 1, 20), torch.ones(5))
    assert meter(line).item() == pytest.approx(1, abs=1e-4)


def test_values_worked_by_hand():
    # Singular values 3, 4: shares 3/7 and 4/7, squared 9/25 and 16/25.
    z = torch.diag(torch.tensor([3.0, 4.0]))
    expected = (3 / 7) ** -(3 / 7) * (4 / 7) ** -(4 / 7)
    assert rankme(z, eps=0.0).item() == pytest.approx(expected)
    expected = (9 / 25) ** -(9 / 25) * (16 / 25) ** -(16 / 25)
    assert entropy_rank(z, center=False).item() == pytest.approx(expected)
    assert participation_ratio(z, center=False).item() == pytest.approx(625 / (81 + 256))
    assert stable_rank(z).item() == pytest.approx(25 / 16)
    # Centred, the two rows lie on one line.
    assert participation_ratio(z).item() == pytest.approx(1)


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("z", [torch.zeros(10, 4), torch.zeros(0, 4), torch.zeros(4, 0)])
def test_nothing_has_rank_0(meter, z):
    assert meter(z).item() == 0


@pytest.mark.parametrize("meter", [entropy_rank, participation_ratio])
def test_equal_embeddings_have_no_variance(meter):
    assert meter(torch.full((10, 3), 0.1)).item() == 0


@pytest.mark.parametrize("meter", [*METERS, alpha_req])
def test_half_precision_input_and_bad_values(meter):
    z = normal(100, 8)
    assert meter(z.bfloat16()).item() == pytest.approx(meter(z.bfloat16().double()).item(), rel=1e-9)
    z[3, 2] = torch.nan
    with pytest.raises(ValueError, match="embeddings must be finite"):
        meter(z)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_the_spectrum(power):
    deviations = torch.arange(1, 31, dtype=torch.float64) ** (-power / 2)
    z = orthonormal(200, 30) * deviations
    assert alpha_req(z, center=False).item() == pytest.approx(power, abs=1e-9)


def test_alpha_needs_two_variances():
    assert math.isnan(alpha_req(torch.ones(5, 1)).item())
    assert math.isnan(alpha_req(torch.zeros(0, 3)).item())
    assert math.isnan(alpha_req(torch.outer(torch.linspace(-1, 1, 9), torch.ones(3))).item())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 10_000), st.floats(0.01, 100), st.booleans())
def test_the_meters_are_ordered(rows, columns, seed, stretch, center):
    z = normal(rows, columns, seed=seed) * torch.logspace(
        0, math.log10(stretch), columns, dtype=torch.float64
    )
    values = [
        1,
        stable_rank(z, center).item(),
        participation_ratio(z, center).item(),
        entropy_rank(z, center).item(),
        rankme(z, eps=0.0, center=center).item(),
        min(rows, columns),
    ]
    for smaller, larger in zip(values, values[1:]):
        assert smaller <= larger * (1 + 1e-6)


def numpy_lidar(z, delta, eps):
    samples, views, dim = z.shape
    means = z.mean(1)
    within = sum(np.outer(r, r) for r in (z - means[:, None]).reshape(-1, dim)) / (samples * (views - 1))
    between = np.cov(means.T)
    root = linalg.fractional_matrix_power(within + delta * np.eye(dim), -0.5)
    values = np.linalg.eigvalsh(root @ between @ root).clip(0)
    share = values / values.sum() + eps
    return math.exp(-(share * np.log(share)).sum())


def test_lidar_is_the_rank_of_the_discriminant_matrix():
    z = normal(40, 1, 6) * torch.linspace(0.5, 2, 6) + 0.3 * normal(40, 5, 6, seed=1)
    assert lidar(z).item() == pytest.approx(numpy_lidar(z.numpy(), 1e-4, 1e-8), rel=1e-6)
    assert lidar(z, delta=0.1, eps=1e-3).item() == pytest.approx(numpy_lidar(z.numpy(), 0.1, 1e-3), rel=1e-6)


def test_lidar_leaves_out_what_views_do_not_share():
    # Three directions tell samples apart; five hold noise of the same size, new in every view.
    samples, noise = 3 * normal(400, 1, 8), 3 * normal(400, 10, 8, seed=1)
    samples[..., 3:] = 0
    noise[..., :3] *= 0.01
    z = samples + noise
    assert rankme(z.flatten(0, 1)).item() > 7.9
    assert lidar(z).item() == pytest.approx(3, abs=0.05)


def test_lidar_is_fooled_by_mixed_up_views_and_by_a_collapse_below_delta():
    z = 3 * normal(300, 1, 8) * torch.tensor([1.0] * 2 + [0.0] * 6) + 0.1 * normal(300, 10, 8, seed=1)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    mixed = z.flatten(0, 1)[order].unflatten(0, (300, 10))
    assert lidar(z).item() < 2.5 < 7 < lidar(mixed).item()
    # A shrunk cloud whose views agree: delta is all there is within classes, and every direction counts.
    point = 1e-4 * normal(300, 1, 8) + 1e-6 * normal(300, 10, 8, seed=1)
    assert lidar(point).item() > 7.5


def test_lidar_does_not_exceed_its_bounds():
    assert lidar(normal(5, 3, 20)).item() <= 4 + 1e-3
    assert lidar(torch.ones(5, 3, 4)).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankme(torch.zeros(2, 2), eps=-1.0), "eps must be >= 0, got -1"),
        (lambda: lidar(torch.zeros(1, 2, 2)), "at least 2 samples with 2 views each, got 1 with 2"),
        (lambda: lidar(torch.zeros(2, 1, 2)), "got 2 with 1"),
        (lambda: lidar(torch.zeros(2, 2, 2), delta=0.0), "delta must be > 0, got 0"),
        (lambda: lidar(torch.full((2, 2, 2), torch.inf)), "embeddings must be finite"),
        (lambda: rankme_interval(torch.zeros(1, 2)), "at least 2 samples, got 1"),
        (lambda: rankme_interval(torch.zeros(3, 2), resamples=1), "resamples must be >= 2, got 1"),
        (lambda: rankme_interval(torch.zeros(3, 2), level=1.0), r"level must be in \(0, 1\), got 1"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_interval_is_as_wide_as_the_value_scatters_over_samples():
    spread = torch.linspace(0.2, 2, 10, dtype=torch.float64)
    draws = torch.stack([rankme(normal(300, 10, seed=seed) * spread) for seed in range(100)])
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    widths = []
    for seed in range(5):
        found = rankme_interval(normal(300, 10, seed=seed) * spread, torch.Generator().manual_seed(seed))
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert sum(widths) / 5 == pytest.approx(high - low, rel=0.25)


def test_the_interval_is_decided_by_its_generator():
    z = normal(50, 4)
    first, second, third = (
        rankme_interval(z, torch.Generator().manual_seed(seed), resamples=20, level=0.9) for seed in (0, 0, 1)
    )
    assert first == second != third
    assert first.value == third.value == rankme(z).item()
    wider = rankme_interval(z, torch.Generator().manual_seed(0), resamples=20, level=0.99)
    assert wider.low <= first.low
    assert first.high <= wider.high


def test_claim_runs():
    found = verify("rankme", smoke=True, seeds=1)
    metrics = set(found["arms"]["chosen by RankMe"]["metrics"])
    assert {
        "linear",
        "regret_by_rankme_projector",
        "regret_by_rankme_backbone",
        "spearman_rankme_projector",
    } <= metrics
    assert {"linear", "regret", "linear_at_0.02"} <= set(found["arms"]["random choice"]["metrics"])
