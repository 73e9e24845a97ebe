"""Facts about sums, means and log-sum-exps over groups of rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.ops import segment_logsumexp, segment_mean, segment_sizes, segment_sum


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    segments = draw(st.integers(1, 5))
    index = draw(st.lists(st.integers(0, segments - 1), max_size=12))
    seed = draw(st.integers(0, 99))
    values = torch.randn(len(index), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values, torch.tensor(index, dtype=torch.int64), segments


@settings(max_examples=25)
@given(grouped())
def test_each_segment_is_what_a_loop_over_it_gives(case: tuple[Tensor, Tensor, int]) -> None:
    values, index, segments = case
    for segment in range(segments):
        rows = values[index == segment].numpy()
        total, mean = (f(values, index, segments)[segment].numpy() for f in (segment_sum, segment_mean))
        logarithm = segment_logsumexp(values, index, segments)[segment].numpy()
        assert int(segment_sizes(index, segments)[segment]) == len(rows)
        np.testing.assert_allclose(total, rows.sum(0), atol=1e-12)
        np.testing.assert_allclose(mean, rows.mean(0) if len(rows) else 0.0, atol=1e-12)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(logarithm, np.log(np.exp(rows).sum(0)), atol=1e-12)


@pytest.mark.parametrize("function", [segment_sum, segment_mean, segment_logsumexp])
def test_gradients_are_right_with_an_empty_segment(function) -> None:
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0, 3, 1, 0])
    kept = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda v: function(v, index, 4)[kept], (values,))


def test_infinities_neither_overflow_nor_poison_gradients() -> None:
    inf = math.inf
    values = torch.tensor([1e4, 1e4, -inf, -inf, inf, 0.0, -inf, 2.0], requires_grad=True)
    index = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = segment_logsumexp(values, index)
    torch.testing.assert_close(found, torch.tensor([1e4 + math.log(2), -inf, inf, 2.0]))
    (gradient,) = torch.autograd.grad(found[[0, 1, 3]].sum(), values)
    assert gradient.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_half_precision_is_summed_in_float32() -> None:
    values = torch.ones(4096, dtype=torch.bfloat16)
    index = torch.zeros(4096, dtype=torch.int64)
    for function, expected in ((segment_sum, 4096.0), (segment_mean, 1.0)):
        found = function(values, index)
        assert (found.dtype, found.item()) == (torch.float32, expected)
    assert segment_logsumexp(values, index).item() == pytest.approx(1 + math.log(4096))


def test_no_rows_at_all_leave_empty_segments() -> None:
    values, index = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert segment_sum(values, index).shape == (0, 3)
    assert segment_mean(values, index, 2).tolist() == [[0.0] * 3] * 2
    assert segment_logsumexp(values, index, 1).tolist() == [[-math.inf] * 3]


def test_bad_indices_are_named() -> None:
    values = torch.ones(2)
    with pytest.raises(ValueError, match=r"index must be >= 0 and < 2 segments, got values in \[0, 2\]"):
        segment_sum(values, torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=r"index must be >= 0, got values in \[-1, 0\]"):
        segment_mean(values, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="segments must be >= 0, got -1"):
        segment_logsumexp(values, torch.tensor([0, 1]), -1)
