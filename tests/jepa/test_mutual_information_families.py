"""Closed forms against hand-worked values and Monte Carlo, invariance under maps, and the stream of simulated sets."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from coloss.errors import InputError, UnknownNameError
from coloss.jepa import (
    KSG,
    GaussianMI,
    MIMetaDataset,
    additive_uniform_information,
    bivariate_gaussian_information,
    clayton_information,
    draw_pair,
    gaussian_information,
    rank_gaussianise,
    student_excess_information,
)
from coloss.jepa.mutual_information_data import TRAINING_FAMILIES, TRAINING_MAPS, QuantileBatches
from coloss.jepa.mutual_information_families import FAMILIES, PairedSamples
from coloss.jepa.mutual_information_maps import MAPS, half_cube, mirror, rotate, spiral, wiggly


def test_values_worked_by_hand():
    assert bivariate_gaussian_information(0.6) == pytest.approx(0.2231, abs=5e-5)
    assert additive_uniform_information(0.25) == pytest.approx(0.9431, abs=5e-5)
    assert additive_uniform_information(1.0) == 0.25
    # Both branches meet at one half.
    assert (
        additive_uniform_information(0.5) == pytest.approx(additive_uniform_information(0.5 + 1e-12)) == 0.5
    )
    assert bivariate_gaussian_information(-1.0) == math.inf
    assert bivariate_gaussian_information(0.0) == 0


def test_a_covariance_of_blocks_adds_up():
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[0, 2] = covariance[2, 0] = 0.6
    covariance[1, 3] = covariance[3, 1] = 0.6
    expected = 2 * bivariate_gaussian_information(0.6)
    assert gaussian_information(covariance, 2) == pytest.approx(expected)
    scale = torch.tensor([3.0, 1e-3, 10.0, 0.1], dtype=torch.float64)
    assert gaussian_information(covariance * scale * scale[:, None], 2) == pytest.approx(expected)


@pytest.mark.parametrize(("freedom", "dim_x", "dim_y"), [(1.0, 1, 1), (3.5, 2, 1)])
def test_student_information_is_the_mean_log_density_ratio(freedom, dim_x, dim_y):
    dims = dim_x + dim_y
    shape = 0.4 + 0.6 * np.eye(dims)
    joint = stats.multivariate_t(shape=shape, df=freedom, seed=0)
    points = joint.rvs(40_000)
    first = stats.multivariate_t(shape=shape[:dim_x, :dim_x], df=freedom)
    second = stats.multivariate_t(shape=shape[dim_x:, dim_x:], df=freedom)
    ratio = joint.logpdf(points) - first.logpdf(points[:, :dim_x]) - second.logpdf(points[:, dim_x:])
    exact = gaussian_information(torch.tensor(shape), dim_x) + student_excess_information(
        freedom, dim_x, dim_y
    )
    assert ratio.mean() == pytest.approx(exact, abs=4 * ratio.std() / 200)


def test_student_with_many_degrees_of_freedom_is_normal():
    assert 0 <= student_excess_information(1e7, 3, 2) < 1e-6


@pytest.mark.parametrize("strength", [0.5, 8.0])
def test_clayton_information_is_the_mean_log_density(strength):
    rng = np.random.default_rng(0)
    u, w = rng.random((2, 100_000))
    v = (u**-strength * (w ** (-strength / (1 + strength)) - 1) + 1) ** (-1 / strength)
    inner = u**-strength + v**-strength - 1
    density = np.log1p(strength) - (1 + strength) * np.log(u * v) - (2 + 1 / strength) * np.log(inner)
    assert density.mean() == pytest.approx(clayton_information(strength), abs=4 * density.std() / 316)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_share_what_their_family_says(family, generator):
    # Neighbour distances on many samples of one pair of columns are an independent witness.
    draw = draw_pair(family, "base", 3000, 1, 1, generator)
    seen = KSG(gaussianise=True).estimate(draw.x, draw.y).item()
    assert seen == pytest.approx(draw.information, abs=0.07)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 3), (4, 2)])
def test_any_numbers_of_columns(family, dim_x, dim_y, generator):
    draw = draw_pair(family, "base", 40, dim_x, dim_y, generator)
    assert draw.x.shape == (40, dim_x)
    assert draw.y.shape == (40, dim_y)
    assert draw.x.isfinite().all()
    assert draw.y.isfinite().all()
    assert 0 <= draw.information < 8


def test_correlations_of_normal_families_carry_the_information(generator):
    for family in (name for name in FAMILIES if name.startswith("normal")):
        draw = draw_pair(family, "base", 20_000, 3, 2, generator)
        assert GaussianMI().estimate(draw.x, draw.y).item() == pytest.approx(draw.information, abs=0.03)


@pytest.mark.parametrize("name", ["asinh", "half-cube", "wiggly"])
def test_maps_of_single_coordinates_keep_the_order_and_so_what_ranks_see(name, generator):
    draw = draw_pair("normal-latent", "base", 60, 2, 3, generator)
    seen = MAPS[name](draw, generator)
    assert seen.information == draw.information
    assert not torch.equal(seen.x, draw.x)
    torch.testing.assert_close(rank_gaussianise(seen.x), rank_gaussianise(draw.x))
    torch.testing.assert_close(rank_gaussianise(seen.y), rank_gaussianise(draw.y))


def test_maps_can_be_undone(generator):
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    turned = spiral(points, speed=0.7)
    torch.testing.assert_close(turned.norm(dim=1), points.norm(dim=1))
    torch.testing.assert_close(spiral(turned, speed=-0.7), points)
    assert not torch.allclose(turned[:, :2], points[:, :2], atol=0.1)
    cubed = half_cube(points)
    torch.testing.assert_close(cubed.sign() * cubed.abs() ** (2 / 3), points)
    rigid = rotate(points, generator)
    torch.testing.assert_close(torch.cdist(rigid, rigid), torch.cdist(points, points))
    line = torch.linspace(-30, 30, 20_000, dtype=torch.float64)[:, None]
    assert (wiggly(line).diff(dim=0) > 0).all()


def test_a_mirror_hides_the_trend_but_not_the_information(generator):
    x = torch.randn(3000, 1, generator=generator)
    y = 0.9 * x + math.sqrt(0.19) * torch.randn(3000, 1, generator=generator)
    truth = bivariate_gaussian_information(0.9)
    seen = mirror(x, generator)
    assert GaussianMI(gaussianise=True).estimate(seen, y) < 0.01
    assert KSG(gaussianise=True).estimate(seen, y).item() == pytest.approx(truth, abs=0.07)


def test_batches_depend_on_seed_and_number_alone_and_never_repeat():
    data = MIMetaDataset(batch_size=2, batches=4, seed=3)
    first = [batch.information.tolist() for batch in data]
    assert first == [data.batch(number).information.tolist() for number in range(4)]
    other = MIMetaDataset(batch_size=2, batches=4, seed=4)
    drawn = [x for some in (data, other) for batch in some for x in batch.x[:, 0, 0].tolist()]
    assert len(set(drawn)) == len(drawn)
    # Far beyond any small range of seeds for single tasks.
    assert data.batch(10**12).information.shape == (2,)


def test_batches_keep_to_their_ranges_and_sometimes_share_nothing():
    data = MIMetaDataset(samples=(20, 40), dims=(2, 3), batch_size=8, batches=25, independent=0.5)
    batches = list(data)
    assert {20 <= batch.x.shape[1] <= 40 for batch in batches} == {True}
    assert {batch.x.shape[2] for batch in batches} == {batch.y.shape[2] for batch in batches} == {2, 3}
    information = torch.cat([batch.information for batch in batches])
    assert 0.35 < (information == 0).float().mean() < 0.65
    assert {family for batch in batches for family in batch.families} == set(TRAINING_FAMILIES)
    assert "additive-uniform" not in TRAINING_FAMILIES
    assert "spiral" not in TRAINING_MAPS


def test_training_batches_pair_sets_with_levels():
    data = MIMetaDataset(batch_size=3, batches=2)
    first, again = list(QuantileBatches(data)), list(QuantileBatches(data))
    for batch, twin, sets in zip(first, again, data):
        assert torch.equal(batch.inputs[2], twin.inputs[2])
        assert torch.equal(batch.targets, sets.information)
        assert ((batch.inputs[2] >= 0) & (batch.inputs[2] <= 1)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: additive_uniform_information(0.0), "noise must be > 0, got 0.0"),
        (lambda: bivariate_gaussian_information(1.5), r"correlation must be in \[-1, 1\], got 1.5"),
        (lambda: gaussian_information(torch.eye(2), 2), r"dim_x must be in \[1, 1\], got 2"),
        (lambda: gaussian_information(torch.ones(2, 2), 1), "covariance must be positive definite"),
        (lambda: student_excess_information(0.0, 1, 1), "freedom must be > 0"),
        (lambda: student_excess_information(1.0, 0, 1), "dim_x and dim_y must be >= 1"),
        (lambda: clayton_information(-1.0), "strength must be > 0"),
    ],
)
def test_impossible_parameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["normal-dens"]}, "did you mean 'normal-dense'"),
        ({"maps": []}, "at least one map is needed"),
        ({"samples": (9, 3)}, r"samples must be two numbers with 1 <= low <= high, got \(9, 3\)"),
        ({"dims": (0, 3)}, "dims must be two numbers"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"independent": 1.5}, "independent must be in"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_impossible_data(options, message):
    with pytest.raises(InputError, match=message):
        MIMetaDataset(**options)


def test_impossible_draws():
    with pytest.raises(UnknownNameError, match="no map named 'spirl'; did you mean 'spiral'"):
        draw_pair("clayton", "spirl", 5, 1, 1)
    with pytest.raises(InputError, match="samples must be >= 1, got 0"):
        draw_pair("clayton", "base", 0, 1, 1)
    assert isinstance(draw_pair("clayton", "base", 1, 1, 1), PairedSamples)
