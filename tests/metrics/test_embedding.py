import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.metrics import (
    alignment,
    embedding,
    embedding_metrics,
    feature_standard_deviation,
    tolerance,
    uniformity,
)


def gaussian(samples, dimensions, seed=0, dtype=torch.float32):
    return torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("alpha", [1, 2, 3.0])
def test_alignment_is_the_mean_power_of_distances(normalize, alpha):
    first, second = gaussian(20, 5, dtype=torch.float64), gaussian(20, 5, seed=1, dtype=torch.float64)
    a, b = (F.normalize(x, dim=1) if normalize else x for x in (first, second))
    expected = (a - b).norm(dim=1).pow(alpha).mean()
    torch.testing.assert_close(alignment(first, second, alpha, normalize=normalize), expected)


def test_alignment_of_equal_and_of_opposite_views():
    z = gaussian(10, 4)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-12)
    assert float(alignment(z, -z)) == pytest.approx(4)
    assert alignment(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 512])
@pytest.mark.parametrize("normalize", [True, False])
def test_uniformity_equals_all_pairs_at_once(chunk_size, normalize):
    z = gaussian(30, 6, dtype=torch.float64)
    points = F.normalize(z, dim=1) if normalize else z
    expected = torch.pdist(points).square().mul(-2).exp().mean().log()
    torch.testing.assert_close(uniformity(z, normalize=normalize, chunk_size=chunk_size), expected)


def test_uniformity_known_values():
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    simplex = torch.eye(4)  # all squared distances are 2
    assert float(uniformity(simplex, t=3)) == pytest.approx(-6)
    assert uniformity(torch.ones(1, 3)).isnan() and uniformity(torch.ones(0, 3)).isnan()


def test_uniformity_of_far_points_does_not_underflow():
    far = torch.tensor([[0.0], [1000.0]])
    assert uniformity(far, normalize=False) == -2e6


def test_uniformity_of_a_distant_cloud_keeps_its_distances():
    cloud = gaussian(50, 3)
    torch.testing.assert_close(
        uniformity(cloud + 1000, normalize=False), uniformity(cloud, normalize=False), atol=1e-2, rtol=0
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_uniformity_ignores_order_rotation_and_scale(seed, samples):
    z = gaussian(samples, 4, seed, torch.float64)
    rotation = torch.linalg.qr(gaussian(4, 4, seed + 1, torch.float64))[0]
    expected = uniformity(z)
    torch.testing.assert_close(uniformity(5 * z.flip(0) @ rotation), expected)
    assert -8 <= expected <= 1e-12


def test_uniformity_keeps_float32_under_autocast():
    z = gaussian(40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert uniformity(z) == uniformity(z, chunk_size=40)
        torch.testing.assert_close(
            uniformity(z), torch.pdist(F.normalize(z, dim=1)).square().mul(-2).exp().mean().log()
        )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(-1, 3), min_size=1, max_size=15), st.booleans())
def test_tolerance_equals_the_mean_over_pairs(seed, classes, normalize):
    targets = torch.tensor(classes)
    z = gaussian(len(targets), 4, seed, torch.float64)
    points = F.normalize(z, dim=1) if normalize else z
    pairs = (targets[:, None] == targets) & ~torch.eye(len(targets), dtype=torch.bool)
    found = tolerance(z, targets, normalize=normalize)
    if pairs.any():
        torch.testing.assert_close(found, (points @ points.T)[pairs].mean())
    else:
        assert found.isnan()


def test_tolerance_of_collapsed_classes_is_one_and_of_opposites_minus_one():
    targets = torch.tensor([0, 0, 1, 1])
    assert tolerance(torch.eye(2)[targets] * 7, targets) == 1
    assert tolerance(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, dtype=torch.long)) == -1


def test_standard_deviation_of_spread_and_of_collapsed_features():
    spread = gaussian(5000, 64)
    assert float(feature_standard_deviation(spread)) == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert feature_standard_deviation(spread) == pytest.approx(
        float(feature_standard_deviation(0.25 * spread))
    )
    line = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 8)
    assert float(feature_standard_deviation(line + 0.1)) == pytest.approx(0, abs=1e-6)
    assert feature_standard_deviation(torch.ones(1, 4)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z = gaussian(200, 16).to(dtype)
    targets = torch.arange(200) % 5
    for value, expected in [
        (uniformity(z), uniformity(z.float())),
        (tolerance(z, targets), tolerance(z.float(), targets)),
        (alignment(z, z.flip(0)), alignment(z.float(), z.float().flip(0))),
        (feature_standard_deviation(z), feature_standard_deviation(z.float())),
    ]:
        assert value.dtype == torch.float32 and value == expected


def test_meters_carry_no_gradient_and_take_zero_rows():
    z = torch.zeros(4, 3, requires_grad=True)
    for value in (
        uniformity(z),
        tolerance(z, torch.zeros(4, dtype=torch.long)),
        feature_standard_deviation(z),
    ):
        assert not value.requires_grad and value == 0
    assert alignment(z, z) == 0


def test_bad_options_are_refused():
    z = torch.ones(3, 2)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        alignment(z, z, 0)
    with pytest.raises(ValueError, match="t must be > 0, got -1"):
        uniformity(z, -1)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        uniformity(z, chunk_size=0)
    with pytest.raises(ValueError, match="first and second must have one shape"):
        inspect.unwrap(alignment)(z, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), got \(2,\)"):
        inspect.unwrap(tolerance)(z, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="embeddings must be .samples, dimensions., got shape"):
        inspect.unwrap(uniformity)(torch.ones(3))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.integers(2, 60),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([0.1, 2.0, 300.0]),
)
def test_uniformity_has_one_value_for_all_tiles(seed, samples, chunk_size, normalize, t):
    z = gaussian(samples, 3, seed, torch.float64)
    points = F.normalize(z, dim=1) if normalize else z
    expected = torch.pdist(points).square().mul(-t).logsumexp(0) - math.log(samples * (samples - 1) / 2)
    found = uniformity(z, t, normalize=normalize, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_over_chunks_are_sums_over_all(monkeypatch, rows, normalize):
    first, second = gaussian(50, 4, 0, torch.float64), gaussian(50, 4, 1, torch.float64)
    targets = torch.arange(50) % 7
    monkeypatch.setattr(embedding, "_ROWS", rows)
    a, b = (F.normalize(x, dim=1) if normalize else x for x in (first, second))
    pairs = (targets[:, None] == targets) & ~torch.eye(50, dtype=torch.bool)
    close = {"rtol": 1e-10, "atol": 1e-12}
    found = alignment(first, second, 3, normalize=normalize)
    torch.testing.assert_close(found, (a - b).norm(dim=1).pow(3).mean(), **close)
    found = tolerance(first, targets, normalize=normalize)
    torch.testing.assert_close(found, (a @ a.T)[pairs].mean(), **close)
    found = feature_standard_deviation(first)
    torch.testing.assert_close(found, F.normalize(first, dim=1).std(0).mean(), **close)


def test_sums_of_many_float32_values_keep_their_digits():
    z = 1 + gaussian(30_000, 2)
    points = F.normalize(z.double(), dim=1)
    found = tolerance(z, torch.zeros(30_000, dtype=torch.long))
    expected = (points.sum(0).square().sum() - 30_000) / (30_000 * 29_999)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_all_meters_at_once():
    z, other, targets = gaussian(300, 4), gaussian(300, 4, 1), torch.arange(300) % 5
    found = embedding_metrics(z, targets, other)
    assert found["uniformity"] == uniformity(z) and found["tolerance"] == tolerance(z, targets)
    assert found["alignment"] == alignment(z, other) and found["feature_std"] == feature_standard_deviation(z)
    singular = torch.linalg.svdvals(z.double())
    share = singular / singular.sum()
    assert found["effective_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    assert set(embedding_metrics(z)) == {"uniformity", "feature_std", "effective_rank"}


def test_uniformity_of_a_drawn_part_is_near_that_of_all_and_repeatable():
    z = gaussian(2000, 8)
    found = embedding_metrics(z, uniformity_samples=500)["uniformity"]
    assert found == embedding_metrics(z, uniformity_samples=500)["uniformity"]
    assert found != float(uniformity(z)) and found == pytest.approx(float(uniformity(z)), abs=0.05)
    other = embedding_metrics(z, uniformity_samples=500, generator=torch.Generator().manual_seed(1))
    assert other["uniformity"] != found


def test_values_that_are_not_finite_are_refused():
    z, targets = gaussian(5, 3), torch.zeros(5, dtype=torch.long)
    bad = z.clone()
    bad[4, 1] = math.nan
    for meter in (
        lambda: uniformity(bad),
        lambda: tolerance(bad, targets),
        lambda: feature_standard_deviation(bad / 0),
    ):
        with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinity"):
            meter()
    with pytest.raises(ValueError, match="second must be finite"):
        alignment(z, bad)
    with pytest.raises(ValueError, match="uniformity_samples must be >= 2, got 1"):
        embedding_metrics(z, uniformity_samples=1)
