"""Prototypes are means with gradients, logits are minus distances."""

import pytest
import torch
import torch.nn.functional as F

from coloss.ops import prototypes, prototypical_logits


def test_prototypes_are_means_that_pass_their_gradient_on():
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    centres = prototypes(rows, torch.tensor([0, 2, 2, 0, 2, 0]), 4)
    torch.testing.assert_close(centres[2], rows[[1, 2, 4]].mean(0))
    assert centres[[1, 3]].eq(0).all()
    (slope,) = torch.autograd.grad(centres[0, 0], rows)
    assert slope[:, 0].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3, 0, 1 / 3])


def test_logits_are_minus_distances_whatever_the_origin():
    queries, centres = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = -(torch.cdist(queries, centres) ** 2)
    torch.testing.assert_close(prototypical_logits(queries, centres), expected)
    torch.testing.assert_close(
        prototypical_logits(queries + 1e4, centres + 1e4), expected, rtol=1e-6, atol=1e-6
    )
    cosines = F.cosine_similarity(queries[:, None], centres, dim=2)
    torch.testing.assert_close(prototypical_logits(queries, centres, "cosine", 0.1), cosines / 0.1)
    assert prototypical_logits(queries.half(), centres.half()).dtype == torch.float32


def test_an_equal_pair_has_a_finite_slope():
    rows = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(prototypical_logits(rows, rows).sum(), rows)
    assert slope.isfinite().all()


def test_bad_input_is_named(as_users_call):
    for call, message in (
        (lambda: prototypical_logits(torch.eye(2), torch.eye(3)), "prototypes must have width 2, got 3"),
        (lambda: prototypical_logits(torch.eye(2), torch.eye(2), "l1"), "metric must be"),
        (lambda: prototypical_logits(torch.eye(2), torch.eye(2), temperature=0.0), "temperature must be > 0"),
        (lambda: prototypes(torch.eye(2), torch.tensor([0, 5]), 3), "index must be >= 0 and < 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
