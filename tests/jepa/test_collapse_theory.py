"""The solvable model behind neural collapse: its minimiser, its flow, its response to deviations."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from coloss.data import load
from coloss.jepa import (
    best_weight,
    central_path,
    class_means,
    equiangularity,
    equinorm,
    free_features_loss,
    nc1,
    nc2,
    nc3,
    nc4,
    nc_response,
    predicted_response,
    solve_near,
    ufm_solution,
    within_between,
)

K, N, D = 4, 10, 10
LABELS = torch.arange(K).repeat_interleave(N)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes(weight: Tensor, features: Tensor, *rest) -> tuple[Tensor, Tensor]:
    weight, features = weight.clone().requires_grad_(), features.clone().requires_grad_()
    return torch.autograd.grad(free_features_loss(weight, features, *rest), (weight, features))


@pytest.mark.parametrize("decays", [(0.3, 0.2), (2**0.5, 0.1), (0.01, 0.5)])
def test_the_solution_is_stationary_and_fully_collapsed(decays: tuple[float, float]) -> None:
    frame = torch.linalg.qr(normal(D, D))[0][:, :K]
    for given in (None, frame):
        weight, features = ufm_solution(K, N, D, *decays, given)
        assert max(float(s.abs().max()) for s in slopes(weight, features, LABELS, *decays)) < 1e-12
        means = class_means(features, LABELS)
        assert nc1(features, LABELS) < 1e-25
        assert nc2(means) == pytest.approx(0, abs=1e-12)
        assert equinorm(means) == pytest.approx(0, abs=1e-12)
        assert equiangularity(means) == pytest.approx((0, 0), abs=1e-12)
        assert nc3(weight, means)[0] == pytest.approx(0, abs=1e-12)
        assert nc3(weight - weight.mean(0), means)[1] == pytest.approx(0, abs=1e-7)
        assert nc4(features, features @ weight.T, means) == 1


def test_nothing_else_is_lower() -> None:
    weight, features = ufm_solution(K, N, D, 0.3, 0.2)
    lowest = free_features_loss(weight, features, LABELS, 0.3, 0.2)
    for seed in range(20):
        away = (weight + 0.3 * normal(K, D, seed=seed), features + 0.3 * normal(K * N, D, seed=seed + 50))
        assert free_features_loss(*away, LABELS, 0.3, 0.2) > lowest


def test_too_much_decay_leaves_nothing() -> None:
    for decays in ((1.0, 1.0), (4.0, 1.0)):
        weight, features = ufm_solution(3, 2, 3, *decays)
        assert weight.abs().max() == features.abs().max() == 0


def test_the_published_spectrum() -> None:
    response = nc_response(K, N, D, 2**0.5, 0.1, 100.0).reshape(K, N * D, K, N * D)
    own, cross = torch.linalg.svdvals(response[0, :, 0]), torch.linalg.svdvals(response[0, :, 1])
    assert own[0] == pytest.approx(1, abs=1e-12)
    assert own[-1] == pytest.approx(0.997348, abs=5e-7)
    assert cross[0] == pytest.approx(0.001245, abs=5e-7)
    assert cross[1] < 1e-17
    predicted = predicted_response(2**0.5, 0.1, 100.0)
    assert predicted.own_smallest == pytest.approx(0.997341, abs=5e-7)
    assert predicted.cross == pytest.approx(0.001248, abs=5e-7)
    assert response[2, :, 0].norm() == pytest.approx(float(cross[0]))  # rank one, and the same for every pair


def test_the_prediction_is_right_to_first_order_and_last_layer_decay_hardly_matters() -> None:
    errors = []
    for closeness in (100.0, 1000.0):
        response = nc_response(3, 3, 5, 0.5, 0.2, closeness).reshape(3, 15, 3, 15)
        predicted = predicted_response(0.5, 0.2, closeness)
        errors.append(abs(float(torch.linalg.svdvals(response[0, :, 0])[-1]) - predicted.own_smallest))
    assert errors[1] < errors[0] / 50  # second order in 1 / closeness

    def attenuation(weight_decay: float, feature_decay: float) -> float:
        response = nc_response(3, 3, 5, weight_decay, feature_decay, 100.0)
        return 1 - float(torch.linalg.svdvals(response)[-1])

    base = attenuation(0.5, 0.2)
    assert attenuation(0.5, 0.4) > base > attenuation(1.0, 0.2)


def test_the_response_is_what_the_minimiser_does() -> None:
    weight, features = ufm_solution(3, 2, 5, 0.5, 0.2)
    labels = torch.arange(3).repeat_interleave(2)
    deviation = 1e-6 * normal(6, 5)
    moved = solve_near(features + deviation, labels, 0.5, 0.2, 5.0, tolerance=1e-14).features - features
    expected = nc_response(3, 2, 5, 0.5, 0.2, 5.0) @ deviation.flatten()
    torch.testing.assert_close(moved.flatten(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("closeness", [0.5, 10.0])
@pytest.mark.parametrize("labels", [LABELS, torch.tensor([0] * 25 + [1] * 12 + [3] * 3)])
def test_solve_near_finds_a_minimum(closeness: float, labels: Tensor) -> None:
    anchors = normal(K * N, D)
    weight, features = solve_near(anchors, labels, 0.3, 0.2, closeness, num_classes=K, tolerance=1e-13)
    rest = (labels, 0.3, 0.2, anchors, closeness)
    assert max(float(s.abs().max()) for s in slopes(weight, features, *rest)) < 1e-10
    start = best_weight(anchors, one_hot(labels, K).double(), 0.3)
    assert free_features_loss(weight, features, *rest) < free_features_loss(start, anchors, *rest)


def test_collapsed_features_stay_what_they_are() -> None:
    weight, features = ufm_solution(K, N, D, 0.3, 0.2)
    found = solve_near(features.float(), LABELS, 0.3, 0.2, 2.0)
    torch.testing.assert_close(found.features, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-6)


def test_the_path_runs_towards_collapse() -> None:
    decays, times = (0.05, 0.1), [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    path = central_path(normal(K * N, D), LABELS, *decays, times=times, tolerance=1e-6)
    values, within, between = [], [], []
    for time, features in zip(path.times, path.features):
        growth = math.exp(2 * decays[1] * float(time))
        covariances = within_between(features, LABELS)
        values.append(nc1(features, LABELS))
        within.append(growth * float(covariances.within.trace()))
        between.append(growth * float(covariances.between.trace()))
    assert path.features.shape == (7, K * N, D)
    assert all(later < earlier for earlier, later in zip(values, values[1:]))
    assert all(later < earlier for earlier, later in zip(within, within[1:]))
    assert all(later > earlier for earlier, later in zip(between, between[1:]))
    assert values[0] > 5 and values[-1] < values[0] / 20


def test_a_short_path_is_the_minimiser_near_its_start() -> None:
    anchors, closeness = normal(K * N, D), 1e4
    moved = central_path(anchors, LABELS, 0.3, 0.2, [1 / closeness]).features[0] - anchors
    near = solve_near(anchors, LABELS, 0.3, 0.2, closeness, tolerance=1e-13).features - anchors
    torch.testing.assert_close(near, moved, rtol=0, atol=2e-3 * float(moved.abs().max()))


def test_features_of_0_stay_0_and_one_that_is_0_moves() -> None:
    rows, labels = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
    assert not central_path(rows, labels, 0.1, 0.1, [0.0, 1.0]).features.any()
    rows[0] = torch.tensor([1e-320, 0.0]).double()
    assert central_path(rows.double(), labels, 0.1, 0.1, [1.0]).features.isfinite().all()
    assert not solve_near(torch.zeros(4, 2), labels, 0.1, 0.1, 1.0).features.any()


def test_on_digits_the_features_nearby_are_more_collapsed_by_their_own_decay() -> None:
    data = load("digits", seed=0, limit=400).train.all()
    labels = data.targets
    rows = torch.cat([torch.nonzero(labels == digit).flatten()[:5] for digit in range(10)])
    # A random hidden layer stands for the shallower features; its scale is that of unit targets.
    generator = torch.Generator().manual_seed(0)
    hidden = (
        data.inputs.flatten(1)[rows].double() @ torch.randn(64, 20, generator=generator).double()
    ).relu()
    anchors, labels = hidden / hidden.norm(dim=1).mean(), labels[rows]
    before, near = nc1(anchors, labels), {}
    for closeness in (1.0, 10.0, 100.0):
        near[closeness] = nc1(solve_near(anchors, labels, 0.05, 0.05, closeness, tolerance=1e-6)[1], labels)
    assert near[1.0] < near[10.0] < near[100.0] < before
    assert near[100.0] / before > 0.9


def test_equal_relative_changes_of_feature_decay_lower_nc1_more() -> None:
    """Near collapse, where the theory speaks."""
    weight, features = ufm_solution(K, N, D, 0.3, 0.2)
    anchors = features + 0.05 * normal(K * N, D)

    def after(weight_decay: float, feature_decay: float) -> float:
        return nc1(solve_near(anchors, LABELS, weight_decay, feature_decay, 10.0).features, LABELS)

    base = after(0.3, 0.2)
    assert after(0.3, 0.4) < base
    assert after(0.3, 0.4) < after(0.6, 0.2)


def test_bad_input_is_named(as_users_call: None) -> None:
    rows, labels = normal(4, 2), torch.tensor([0, 0, 1, 1])
    for call, message in (
        (lambda: ufm_solution(1, 1, 3, 0.1, 0.1), "num_classes must be >= 2, got 1"),
        (lambda: ufm_solution(2, 0, 3, 0.1, 0.1), "per_class must be >= 1, got 0"),
        (lambda: ufm_solution(4, 1, 3, 0.1, 0.1), r"num_features must be >= num_classes \(4\), got 3"),
        (lambda: ufm_solution(2, 1, 3, 0.0, 0.1), "weight_decay must be > 0 and finite, got 0.0"),
        (lambda: ufm_solution(2, 1, 3, 0.1, 0.1, torch.ones(3, 2)), "frame must have orthonormal columns"),
        (lambda: ufm_solution(2, 1, 3, 0.1, 0.1, torch.ones(2, 2)), r"frame must be .* got \(2, 2\)"),
        (lambda: nc_response(2, 1, 3, 2.0, 1.0, 1.0), "weight_decay \\* feature_decay must be < 1"),
        (lambda: nc_response(2, 1, 3, 0.1, 0.1, 0.0), "closeness must be > 0 and finite, got 0.0"),
        (lambda: predicted_response(0.1, math.inf, 1.0), "feature_decay must be > 0 and finite, got inf"),
        (lambda: predicted_response(0.1, 0.1, -1.0), "closeness must be > 0 and finite, got -1.0"),
        (lambda: solve_near(rows, labels, 0.1, 0.1, 0.0), "closeness must be > 0 and finite, got 0.0"),
        (lambda: solve_near(rows, labels[:3], 0.1, 0.1, 1.0), r"got \(4, 2\) and \(3,\)"),
        (lambda: solve_near(rows, labels, 0.1, 0.1, 1.0, tolerance=0.0), "tolerance must be > 0, got 0.0"),
        (lambda: central_path(rows, labels, 0.1, 0.1, [1.0, 1.0]), "times must be increasing"),
        (lambda: central_path(rows, labels, 0.1, 0.1, []), "times must be increasing"),
        (lambda: central_path(rows, labels, 0.1, 0.1, [0.0, math.inf]), "and finite, got .*inf"),
        (lambda: central_path(rows, labels, 0.1, 0.1, [math.nan]), "and finite, got .*nan"),
        (lambda: central_path(1e200 * rows, labels, 0.1, 0.1, [1.0]), "must start with a finite velocity"),
        (lambda: central_path(rows / 0, labels, 0.1, 0.1, [1.0]), "features must be finite"),
        (lambda: solve_near(rows * math.nan, labels, 0.1, 0.1, 1.0), "features must be finite"),
        (lambda: solve_near(rows, labels - 1, 0.1, 0.1, 1.0), r"classes must be in \[0, 1\), got -1"),
        (
            lambda: solve_near(rows, labels, 0.1, 0.1, 1.0, num_classes=1),
            r"classes must be in \[0, 1\), got 1",
        ),
        (lambda: solve_near(rows, labels, 0.1, 0.1, 1.0, num_classes=0), "num_classes must be >= 1, got 0"),
        (
            lambda: free_features_loss(normal(1, 2), rows, labels, 0.1, 0.1),
            r"classes must be in \[0, 1\), got 1",
        ),
        (lambda: free_features_loss(normal(2, 2), rows, labels[:3], 0.1, 0.1), r"got \(4, 2\) and \(3,\)"),
        (lambda: central_path(rows, labels, 0.1, 0.1, [1.0], tolerance=0.0), "tolerance must be > 0"),
        (
            lambda: free_features_loss(normal(2, 2), rows, labels, -1.0, 0.1),
            "weight_decay must be >= 0 and finite, got -1.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
