"""Sampling without replacement: its probabilities by enumeration, and what is never drawn."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import sample_without_replacement


def probability(sequence: tuple[int, ...], weights: list[float]) -> float:
    """Of drawing the items in this order, one after the other."""
    left, chance = sum(weights), 1.0
    for item in sequence:
        chance *= weights[item] / left
        left -= weights[item]
    return chance


def test_ordered_draws_have_the_probabilities_of_drawing_one_by_one():
    weights = [0.5, 0.3, 0.15, 0.05]
    draws = 40_000
    logits = torch.tensor(weights).log().expand(draws, 4)
    found = sample_without_replacement(logits, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(4, 4)
    counts.index_put_((found[:, 0], found[:, 1]), torch.ones(draws), accumulate=True)
    for sequence in itertools.permutations(range(4), 2):
        expected = probability(sequence, weights)
        error = 4 * math.sqrt(expected * (1 - expected) / draws)
        assert counts[sequence].item() / draws == pytest.approx(expected, abs=error), sequence
    assert counts.diagonal().sum() == 0


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(0, 1000))
def test_items_are_different_and_those_at_minus_infinity_never_come(n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(3, 5, 9, generator=generator)
    logits[..., ::3] = -math.inf
    found = sample_without_replacement(logits, n, generator=generator)
    assert found.shape == (3, 5, n) and found.dtype == torch.int64
    assert not (found % 3 == 0).any()
    assert all(len(set(row)) == n for row in found.flatten(0, 1).tolist())


def test_a_constant_changes_nothing_and_large_gaps_decide():
    logits = torch.randn(50, 7)
    first, second = (
        sample_without_replacement(z, 3, generator=torch.Generator().manual_seed(4))
        for z in (logits, logits + 8)
    )
    assert (first == second).float().mean() > 0.99
    steep = torch.tensor([[0.0, 3000.0, 1000.0, 2000.0]])
    assert sample_without_replacement(steep, 4).tolist() == [[1, 3, 2, 0]]


def test_the_generator_decides_and_the_global_one_is_left_alone():
    logits = torch.zeros(20, 10)
    state = torch.get_rng_state()
    first, second = (
        sample_without_replacement(logits, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    other = sample_without_replacement(logits, 4, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first, other)


def test_no_gradient_half_precision_and_nothing_to_draw_from():
    logits = torch.randn(4, 6, dtype=torch.float16, requires_grad=True)
    assert not sample_without_replacement(logits, 6).is_floating_point()
    assert sample_without_replacement(logits, 6).sort().values.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert sample_without_replacement(torch.zeros(0, 6), 2).shape == (0, 2)
    assert sample_without_replacement(torch.zeros(3, 0), 0).shape == (3, 0)
    assert sample_without_replacement(torch.full((2, 3), -math.inf), 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("logits", "n", "message"),
    [
        (torch.zeros(2, 3), 4, r"n must be in \[0, 3\], the fewest items that a row can draw, got 4"),
        (torch.zeros(2, 3), -1, r"n must be in \[0, 3\]"),
        (torch.tensor([[0.0, 0.0], [0.0, -math.inf]]), 2, r"n must be in \[0, 1\]"),
        (torch.tensor([math.nan, 0.0]), 1, "logits must be finite or -infinity, got NaN or"),
        (torch.tensor([math.inf, 0.0]), 1, "logits must be finite or -infinity, got NaN or"),
    ],
)
def test_bad_input_is_refused(logits: torch.Tensor, n: int, message: str):
    with pytest.raises(ValueError, match=message):
        sample_without_replacement(logits, n)
