"""NC1 to NC4 by hand, against plain NumPy, their invariances, and where they are not defined."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.jepa import (
    class_means,
    collapse_metrics,
    equiangularity,
    equinorm,
    nc1,
    nc2,
    nc3,
    nc4,
    nearest_mean,
    within_between,
)
from coloss.ops import RunningMoments, RunningScatter

KINDS = ("trace", "pinv", "cdnv")


def draw(seed: int = 0, samples: int = 60, dim: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    labels[:classes] = torch.arange(classes)
    centres = 2 * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(samples, dim, generator=generator, dtype=torch.float64), labels


def rotation(dim: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def simplex(classes: int, dim: int) -> Tensor:
    return (torch.eye(classes, dtype=torch.float64) - 1 / classes) @ rotation(dim)[:classes]


def test_everything_is_what_numpy_makes_of_the_definitions() -> None:
    features, classes = draw()
    rows, labels, count = features.numpy(), classes.numpy(), 4
    means = np.stack([rows[labels == k].mean(0) for k in range(count)])
    centred = means - means.mean(0)
    within = sum(np.outer(row - means[k], row - means[k]) for row, k in zip(rows, labels)) / len(rows)
    between = sum(np.outer(m, m) for m in centred) / count
    spread = [((rows[labels == k] - means[k]) ** 2).sum(1).mean() for k in range(count)]
    pairs = [(k, j) for k in range(count) for j in range(count) if k != j]
    expected = {
        "trace": np.trace(within) / np.trace(between),
        "pinv": np.trace(within @ np.linalg.pinv(between, rcond=1e-5)) / count,
        "cdnv": np.mean(
            [(spread[k] + spread[j]) / (2 * ((means[k] - means[j]) ** 2).sum()) for k, j in pairs]
        ),
    }
    for kind, value in expected.items():
        assert nc1(features, classes, kind) == pytest.approx(value, rel=1e-10)
    found = within_between(features, classes)
    np.testing.assert_allclose(found.within, within, atol=1e-12)
    np.testing.assert_allclose(found.between, between, atol=1e-12)
    gram = centred @ centred.T
    target = (np.eye(count) - 1 / count) / np.sqrt(count - 1)
    weight = np.random.default_rng(0).normal(size=(count, 6))
    product = weight @ centred.T
    lengths = np.linalg.norm(centred, axis=1)
    cosines = np.array([gram[k, j] / lengths[k] / lengths[j] for k, j in pairs])
    streamed = collapse_metrics(RunningScatter.of(features, classes, count), torch.from_numpy(weight))
    assert streamed == pytest.approx(
        {
            "nc1": expected["trace"],
            "nc1_pinv": expected["pinv"],
            "cdnv": expected["cdnv"],
            "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - target),
            "equinorm": lengths.std() / lengths.mean(),
            "equiangular": cosines.std(),
            "angle_gap": np.abs(cosines + 1 / (count - 1)).mean(),
            "nc3": np.linalg.norm(product / np.linalg.norm(product) - target),
            "self_duality": np.linalg.norm(
                weight / np.linalg.norm(weight) - centred / np.linalg.norm(centred)
            ),
        },
        rel=1e-9,
    )


def test_by_hand_on_a_line() -> None:
    features, classes = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    # S_W = 1, S_B = 4, distance of the means 4, each class has variance 1.
    assert nc1(features, classes) == pytest.approx(1 / 4)
    assert nc1(features, classes, "pinv") == pytest.approx(1 / 8)
    assert nc1(features, classes, "cdnv") == pytest.approx((1 + 1) / (2 * 16))
    means = class_means(features, classes)
    assert means.flatten().tolist() == [-2.0, 2.0]
    assert nc2(means) == pytest.approx(0, abs=1e-12)  # two centred means are always a simplex
    assert equiangularity(means) == pytest.approx((0, 0))


def test_a_simplex_with_aligned_weights_is_fully_collapsed() -> None:
    for classes, dim in ((2, 2), (3, 5), (10, 12)):
        means = simplex(classes, dim)
        labels = torch.arange(classes).repeat(3)
        features = means[labels] + 7  # a common shift changes nothing
        for kind in KINDS:
            assert nc1(features, labels, kind) == pytest.approx(0, abs=1e-12)
        assert nc2(means + 7) == pytest.approx(0, abs=1e-10)
        assert equinorm(means) == pytest.approx(0, abs=1e-10)
        assert equiangularity(means) == pytest.approx((0, 0), abs=1e-10)
        assert nc3(3 * means, means + 7) == pytest.approx((0, 0), abs=1e-7)
        assert nc4(features, (features - 7) @ means.T, class_means(features, labels)) == 1


def test_an_orthogonal_frame_is_a_simplex_only_once_centred() -> None:
    """ReLU features: all in one orthant."""
    frame = torch.eye(5, dtype=torch.float64)
    assert nc2(frame) == pytest.approx(0, abs=1e-12)
    raw = frame / frame.norm() - (torch.eye(5) - 1 / 5) / 2
    assert float(raw.norm()) > 0.3


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_rotation_order_and_scale_change_nothing(seed: int, scale: float) -> None:
    features, classes = draw(seed)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    turned = scale * (features @ rotation(6, seed))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = collapse_metrics(RunningScatter.of(features, classes, 4), weight)
    moved = collapse_metrics(RunningScatter.of(turned[order], classes[order], 4), weight @ rotation(6, seed))
    assert moved == pytest.approx(plain, rel=1e-6, abs=1e-9)


def test_pinv_is_the_same_after_any_invertible_map_of_the_span_of_the_means() -> None:
    features, classes = draw(dim=3)
    stretched = features @ torch.tensor([[2.0, 0.3, 0], [0, 0.5, 1.0], [0, 0, 3.0]], dtype=torch.float64)
    assert nc1(stretched, classes, "pinv") == pytest.approx(nc1(features, classes, "pinv"), rel=1e-9)
    assert abs(nc1(stretched, classes) / nc1(features, classes) - 1) > 0.05


def test_rounding_in_the_means_does_not_make_pinv_explode() -> None:
    features, classes = draw(dim=8, samples=400)
    # Means on a line, up to rounding: the other directions of S_B are noise.
    line = torch.arange(4.0, dtype=torch.float64)[:, None] * torch.eye(8, dtype=torch.float64)[:1]
    noise = features - class_means(features, classes)[classes]
    nearly = line[classes] + noise + 1e-7 * simplex(4, 8)[classes]
    exact = 400 / (400 * 4 * 1.25) * float((noise[:, 0] ** 2).mean())
    assert nc1(nearly, classes, "pinv") == pytest.approx(exact, rel=1e-4)
    assert nc1(nearly, classes, "pinv", rcond=0.0) > 1e6
    # With K - 1 or fewer directions kept there is nothing beyond the rank to invert, whatever rcond.
    assert nc1(features, classes, "pinv", rcond=0.0) == pytest.approx(nc1(features, classes, "pinv"))


def test_classes_count_alike_between_and_samples_within() -> None:
    features = torch.tensor([[0.0], [2.0], [10.0], [10.0], [10.0], [10.0]])
    classes = torch.tensor([0, 0, 1, 1, 1, 1])
    within, between = within_between(features, classes)
    assert within.item() == pytest.approx(2 / 6)  # of 6 samples
    assert between.item() == pytest.approx(4.5**2)  # around (1 + 10) / 2, not the mean of samples
    assert nc1(features, classes, "cdnv") == pytest.approx((1 + 0) / (2 * 81))


def test_a_class_without_samples_is_left_out() -> None:
    features, classes = draw()
    spaced = torch.tensor([0, 2, 3, 6])[classes]
    weight = torch.randn(8, 6, dtype=torch.float64)
    with_gaps = collapse_metrics(RunningScatter.of(features, spaced, 8), weight)
    without = collapse_metrics(RunningScatter.of(features, classes, 4), weight[[0, 2, 3, 6]])
    assert with_gaps == pytest.approx(without)
    for kind in KINDS:
        assert nc1(features, spaced, kind) == pytest.approx(nc1(features, classes, kind))
    means = class_means(features, spaced, 8)
    assert means[1].isnan().all() and not means[2].isnan().any()
    assert set(nearest_mean(features, means).tolist()) <= {0, 2, 3, 6}


def test_half_precision_is_measured_in_float64() -> None:
    features, classes = draw()
    for dtype in (torch.float16, torch.bfloat16):
        halved = features.to(dtype)
        for kind in KINDS:
            assert nc1(halved, classes, kind) == nc1(halved.double(), classes, kind)
        assert within_between(halved, classes).within.dtype == torch.float64
        means = class_means(halved, classes)
        assert nearest_mean(halved, means).tolist() == nearest_mean(halved.double(), means).tolist()
    # 1 + 2^-8 squares to a difference that half precision cannot hold.
    close = torch.tensor([[1.0], [1.0078125], [3.0], [3.0]], dtype=torch.bfloat16)
    assert nc1(close, torch.tensor([0, 0, 1, 1])) > 0


def test_one_sample_one_class_no_sample() -> None:
    single = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nc1(single, torch.arange(3)) == nc1(single, torch.arange(3), "pinv") == 0
    for features, classes in ((single, torch.zeros(3).long()), (single[:0], torch.zeros(0).long())):
        assert all(math.isnan(nc1(features, classes, kind)) for kind in KINDS)
        found = collapse_metrics(RunningMoments.of(features, classes, 3), torch.ones(3, 2))
        assert all(math.isnan(value) for value in found.values()) and "nc1_pinv" not in found
    assert math.isnan(nc4(single[:0], torch.zeros(0, 3), single))
    assert math.isnan(nc4(single, torch.zeros(3, 2), torch.full((2, 2), math.nan)))


def test_means_that_coincide() -> None:
    spread = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]])
    classes = torch.tensor([0, 0, 1, 1])
    assert all(nc1(spread, classes, kind) == math.inf for kind in KINDS)
    assert all(math.isnan(nc1(torch.zeros(4, 1), classes, kind)) for kind in KINDS)
    assert math.isnan(nc2(torch.zeros(3, 2))) and math.isnan(equinorm(torch.zeros(3, 2)))


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e8])
def test_means_that_coincide_up_to_rounding(offset: float) -> None:
    rows = offset + torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The same samples in three orders: their sums differ in the last digits.
    features = torch.cat([rows, rows.flip(0), rows.roll(123, 0)])
    classes = torch.arange(3).repeat_interleave(500)
    means = class_means(features, classes)
    assert (means != means[0]).any()
    assert all(nc1(features, classes, kind) == math.inf for kind in KINDS)
    # A difference beyond rounding is kept.
    features[:500] += 1e-12 * (offset + 1)
    assert all(1e6 < nc1(features, classes, kind) < math.inf for kind in ("trace", "pinv"))


def test_nearest_mean_agreement_and_its_ties() -> None:
    means = torch.tensor([[0.0], [4.0]])
    features = torch.tensor([[1.0], [2.0], [3.9]])
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest_mean(features, means).tolist() == [0, 0, 1]  # at 2 the first decides
    assert nc4(features, logits, means) == pytest.approx(2 / 3)


def test_moments_in_pieces_give_the_measures_of_the_whole() -> None:
    features, classes = draw()
    parts = [RunningMoments.of(*part, 4) for part in zip(features.split(17), classes.split(17))]
    merged = parts[3].merge(parts[1]).merge(parts[0]).merge(parts[2])
    whole = collapse_metrics(RunningMoments.of(features, classes, 4))
    assert collapse_metrics(merged) == pytest.approx(whole, rel=1e-12)
    assert whole["nc1"] == nc1(features, classes) and whole["cdnv"] == nc1(features, classes, "cdnv")


def test_bad_input_is_named(as_users_call: None) -> None:
    features, classes = draw()
    with pytest.raises(ValueError, match='kind must be "trace", "pinv" or "cdnv", got \'svd\''):
        nc1(features, classes, "svd")
    with pytest.raises(ValueError, match=r"rcond must be in \[0, 1\), got 1.0"):
        nc1(features, classes, "pinv", rcond=1.0)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\), got -1"):
        nc1(features, classes.where(classes > 0, -1))
    with pytest.raises(ValueError, match=r"weight must be .* \(4, 6\), got \(3, 6\)"):
        nc3(torch.zeros(3, 6), class_means(features, classes))
    with pytest.raises(ValueError, match=r"logits must be .* \(60, 4\), got \(60, 3\)"):
        nc4(features, torch.zeros(60, 3), class_means(features, classes))
