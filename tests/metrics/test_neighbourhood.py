"""The ICNN score: by hand, by a plain loop, invariances, limits, and slopes."""

import numpy as np
import pytest
import torch

from coloss.metrics import icnn_factors, icnn_score


def clusters(per_class: int = 6, classes: int = 3, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = 10 * torch.eye(classes, 4, dtype=torch.float64)
    return centres[labels] + spread * torch.randn(len(labels), 4, dtype=torch.float64), labels


def by_loop(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    scores = []
    for i in range(len(rows)):
        distances = ((rows - rows[i]) ** 2).sum(1)
        near = [q for q in np.argsort(distances, kind="stable") if q != i][:k]
        low, high = min(distances[near]), max(distances[near])
        relative = {q: (distances[q] - low) / (high - low) if high > low else 0.0 for q in near}
        same = [relative[q] for q in near if labels[q] == labels[i]]
        other = [relative[q] for q in near if labels[q] != labels[i]]
        purity = len(same) / k
        separation = (sum(1 - v for v in same) + sum(other)) / k
        spread = sum(np.var(values) for values in (same, other) if values)
        scores.append((purity * separation / (1 + spread)) ** 0.5)
    return np.array(scores)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("leaf", [False, True])
def test_equals_a_plain_loop(k, leaf):
    rows, labels = torch.randn(15, 3, dtype=torch.float64, requires_grad=leaf), torch.arange(15) % 3
    found = icnn_score(rows, labels, k, reduction="none")
    torch.testing.assert_close(found, torch.from_numpy(by_loop(rows.detach().numpy(), labels.numpy(), k)))
    assert found.requires_grad == leaf


@pytest.mark.parametrize("soft", [False, True])
def test_far_clusters_are_pure_and_random_labels_have_the_purity_of_the_prior(soft):
    rows, labels = clusters()
    assert icnn_factors(rows, labels, k=5, soft=soft).purity.tolist() == pytest.approx([1.0] * 18, abs=1e-6)
    rows, labels = torch.randn(400, 3), torch.arange(400) % 4
    assert icnn_factors(rows, labels, k=20, soft=soft).purity.mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("soft", [False, True])
def test_shift_rotation_and_scale_change_nothing(soft):
    rows, labels = clusters(spread=4.0)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    moved = 1e-3 * (rows @ rotation) + 7
    torch.testing.assert_close(icnn_score(moved, labels, soft=soft), icnn_score(rows, labels, soft=soft))


def test_one_neighbour_is_right_or_wrong():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.5]])
    factors = icnn_factors(rows, torch.tensor([0, 0, 0, 1]), k=1)
    assert factors.separation.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert factors.compactness.tolist() == [1.0] * 4


def test_separated_classes_score_higher():
    scores = [icnn_score(*clusters(spread=spread)).item() for spread in (0.1, 3.0, 30.0)]
    assert 1 >= scores[0] > scores[1] > scores[2] >= 0


@pytest.mark.parametrize("soft", [False, True])
def test_training_by_the_score_raises_it(soft):
    rows, labels = clusters(spread=6.0)
    rows = rows.requires_grad_()
    before = icnn_score(rows, labels).item()
    optimizer = torch.optim.Adam([rows], lr=0.6)
    for _ in range(25):
        optimizer.zero_grad()
        (1 - icnn_score(rows, labels, soft=soft)).backward()
        assert rows.grad.isfinite().all()
        optimizer.step()
    assert icnn_score(rows, labels).item() > before + 0.02


def test_the_scale_of_distances_has_no_gradient_and_purity_only_in_the_soft_form():
    rows, labels = clusters(spread=5.0)
    rows = rows.requires_grad_()
    assert not icnn_factors(rows, labels).purity.requires_grad
    (slope,) = torch.autograd.grad(icnn_factors(rows, labels, soft=True).purity.sum(), rows)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("soft", [False, True])
def test_duplicates_single_classes_and_half_precision_are_defined(soft):
    same = torch.zeros(6, 3, requires_grad=True)
    score = icnn_score(same, torch.arange(6) % 2, soft=soft)
    (slope,) = torch.autograd.grad(score, same)
    assert 0 <= score <= 1 and slope.isfinite().all()
    half = torch.randn(6, 3, dtype=torch.bfloat16)
    assert icnn_score(half, torch.zeros(6, dtype=torch.int64), soft=soft).dtype == torch.float32
    strangers = icnn_score(torch.randn(5, 2), torch.arange(5), soft=soft)
    assert strangers == 0


def test_bad_input_is_named(as_users_call):
    rows, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    for call, message in (
        (lambda: icnn_score(rows[:1], labels[:1]), "embeddings must have at least 2 rows, got 1"),
        (lambda: icnn_score(rows, labels[:3]), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: icnn_score(rows, labels, 4), r"k must be in \[1, 4\), got 4"),
        (lambda: icnn_score(rows, labels, exponents=(1.0, 0.0, 1.0)), "exponents must be three numbers > 0"),
        (lambda: icnn_score(rows, labels, reduction="sum"), "reduction must be"),
        (lambda: icnn_score(rows / 0, labels), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
