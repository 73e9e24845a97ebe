"""Mixed samples are convex combinations, and their weights are drawn from the Beta distribution that was asked for."""

import pytest
import torch

from coloss.ops import beta_weights, mix_pairs


def test_beta_draws_have_the_moments_of_the_distribution():
    for alpha in (0.15, 2.0):
        draws = beta_weights(20_000, alpha, torch.Generator().manual_seed(0))
        assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
        assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    assert beta_weights(1000, 1e-3).isfinite().all()
    lopsided = beta_weights(20_000, 3.0, torch.Generator().manual_seed(0), beta=1.0)
    assert lopsided.mean().item() == pytest.approx(0.75, abs=0.01)
    same = [beta_weights(3, 0.5, torch.Generator().manual_seed(7)).tolist() for _ in range(2)]
    assert same[0] == same[1]


def test_mixing_by_one_weight_or_by_each_sample_s_own():
    first, second = torch.ones(2, 3, 1), torch.zeros(2, 3, 1)
    assert torch.equal(mix_pairs(first, second, 0.25), torch.full((2, 3, 1), 0.25))
    mixed = mix_pairs(first.half(), second.half(), torch.tensor([0.5, 1.0]))
    assert mixed.dtype == torch.float16
    assert mixed[:, 0, 0].tolist() == [0.5, 1.0]


def test_bad_input_is_named(as_users_call):
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(2,\), got \(3,\)"):
        mix_pairs(rows, rows, torch.ones(3))
    with pytest.raises(ValueError, match=r"second must have the shape of first, \(2, 3\), got \(2, 2\)"):
        mix_pairs(rows, rows[:, :2], 0.5)
    with pytest.raises(ValueError, match="alpha and beta must be > 0 and finite, got 0.0 and 1.0"):
        beta_weights(3, 0.0, beta=1.0)
