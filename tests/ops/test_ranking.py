"""Lists from scores: ties by number, ignored items nowhere."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.ops import top_items


def test_ties_are_broken_by_number_and_infinities_rank():
    scores = torch.tensor([[1.0, 2.0, 2.0, -math.inf], [math.inf, 0.0, math.inf, 0.0]])
    assert top_items(scores, 4).tolist() == [[1, 2, 0, 3], [0, 2, 1, 3]]


def test_an_ignored_item_ranks_nowhere_even_behind_minus_infinity():
    scores = torch.tensor([[9.0, -math.inf, 1.0], [math.nan, 0.0, 1.0]])
    ignore = torch.tensor([[True, False, False]])
    assert top_items(scores, 2, ignore).tolist() == [[2, 1], [2, 1]]


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_equals_a_sort_by_hand(seed, k):
    rng = np.random.default_rng(seed)
    scores, ignore = rng.integers(0, 4, (3, 9)).astype(np.float32), rng.random((3, 9)) < 0.3
    expected = [
        sorted((i for i in range(9) if not hidden[i]), key=lambda i: (-row[i], i))[:k]
        for row, hidden in zip(scores, ignore, strict=True)
    ]
    if min(map(len, expected)) < k:
        with pytest.raises(ValueError, match="k must be in"):
            top_items(torch.from_numpy(scores), k, torch.from_numpy(ignore))
    else:
        assert top_items(torch.from_numpy(scores), k, torch.from_numpy(ignore)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    assert top_items(torch.tensor([[0.5, 2.0, 1.0]], dtype=dtype), 2).tolist() == [[1, 2]]


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"k must be in \[1, 2\], the fewest items that a row can list, got 3"
    ):
        top_items(torch.zeros(1, 3), 3, torch.tensor([[True, False, False]]))
    with pytest.raises(ValueError, match="scores must not be NaN"):
        top_items(torch.tensor([[math.nan, 1.0]]), 1)
    assert top_items(torch.zeros(0, 3), 2).shape == (0, 2)
