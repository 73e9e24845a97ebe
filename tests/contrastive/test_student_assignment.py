"""Soft assignments, their target and k-means are those of their formulas, far from every centre and with empty clusters too."""

import numpy as np
import pytest
import torch

from coloss.contrastive import StudentTAssignment, k_means, log_assignments, sharpened_target


@pytest.mark.parametrize("degrees", [1.0, 3.5])
def test_assignment_target_and_loss_equal_the_formulas(degrees):
    z = torch.randn(8, 3, dtype=torch.float64)
    module = StudentTAssignment(4, 3, degrees).double()
    centres = module.centres.detach().numpy()
    kernel = (1 + ((z.numpy()[:, None] - centres) ** 2).sum(2) / degrees) ** (-(degrees + 1) / 2)
    q = kernel / kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(module(z).detach(), q)
    p = q**2 / q.sum(0)
    p = p / p.sum(1, keepdims=True)
    np.testing.assert_allclose(sharpened_target(torch.from_numpy(q)), p)
    assert module.loss(z).item() == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert module.loss(z, module(z)).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda rows, points: log_assignments(rows, points, degrees),
        (z.requires_grad_(), module.centres.detach().requires_grad_()),
    )


def test_the_target_is_no_part_of_the_graph():
    q = torch.rand(5, 3).softmax(1).requires_grad_()
    assert not sharpened_target(q).requires_grad
    assert sharpened_target(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_extremes_stay_finite():
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    far = torch.tensor([[1e15, 0.0], [0.0, 0.0], [-1e15, 1e15]], requires_grad=True)
    logs = log_assignments(far, centres)
    assert logs.isfinite().all()
    torch.testing.assert_close(logs[0].exp(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(logs[1].exp(), torch.tensor([2 / 3, 1 / 3]))
    assert torch.autograd.grad(logs.sum(), far)[0].isfinite().all()
    half = log_assignments(far[1:2].to(torch.bfloat16), centres.to(torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logs[1:2])


def test_k_means_finds_clouds_and_takes_fewer_points_than_clusters():
    points = torch.cat([torch.randn(10, 2) + 10 * shift for shift in range(3)])
    found, centres = k_means(points, 3)
    assert all(len(part.unique()) == 1 for part in found.split(10)) and len(found.unique()) == 3
    for cluster in range(3):
        torch.testing.assert_close(centres[cluster], points[found == cluster].mean(0))
    assert k_means(points[:2], 5)[1].shape == (2, 2)
    same, centres = k_means(torch.ones(6, 2), 3)
    assert centres.shape == (3, 2) and set(same.tolist()) <= {0, 1, 2}
    module = StudentTAssignment(3, 2).initialize(points)
    assert torch.equal(module(points).argmax(1), k_means(points, 3, restarts=20)[0])


def test_bad_input_is_named(as_users_call):
    for call, message in (
        (lambda: StudentTAssignment(0, 2), "clusters must be >= 1, got 0"),
        (lambda: StudentTAssignment(2, 0), "dim must be >= 1, got 0"),
        (lambda: StudentTAssignment(2, 2, 0.0), "degrees must be > 0 and finite, got 0.0"),
        (
            lambda: StudentTAssignment(3, 2).initialize(torch.zeros(2, 2)),
            "at least as many as the 3 clusters, got 2",
        ),
        (lambda: k_means(torch.zeros(0, 2), 2), "embeddings must be >= 1, got 0"),
        (lambda: k_means(torch.zeros(3, 2), 2, restarts=0), "restarts must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
