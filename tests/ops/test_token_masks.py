"""Indices, boolean masks and padded indices name the same tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coloss.ops import gather_tokens, indices_to_mask, mask_to_padded_indices


def test_gathering_is_numpys_indexing_and_sums_gradients_of_repeated_tokens() -> None:
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[4, 0, 4], [1, 1, 2]])
    found = gather_tokens(tokens, indices)
    expected = np.stack([sample[rows] for sample, rows in zip(tokens.detach().numpy(), indices.numpy())])
    assert np.array_equal(found.detach().numpy(), expected)
    found.sum().backward()
    assert tokens.grad[..., 0].tolist() == [[1, 0, 0, 0, 2], [0, 2, 1, 0, 0]]


def test_several_sets_of_one_batch_are_gathered_at_once() -> None:
    tokens = torch.randn(2, 5, 3)
    indices = torch.randint(5, (4, 2, 6))
    found = gather_tokens(tokens, indices)
    assert found.shape == (4, 2, 6, 3)
    for one, rows in zip(found, indices):
        assert torch.equal(one, gather_tokens(tokens, rows))


def test_no_index_gives_no_token() -> None:
    assert gather_tokens(torch.randn(2, 5, 3), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 3)


def test_an_index_out_of_range_is_refused() -> None:
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=rf"indices must be in \[0, 5\), got {wrong}"):
            gather_tokens(torch.randn(2, 5, 3), torch.tensor([[0], [wrong]]))
    with pytest.raises(RuntimeError, match="out of bounds"):
        indices_to_mask(torch.tensor([5]), 5)


@settings(max_examples=25)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)))
def test_a_mask_comes_back_from_its_padded_indices(array: np.ndarray) -> None:
    mask = torch.from_numpy(array)
    indices, valid = mask_to_padded_indices(mask)
    assert torch.equal(indices_to_mask(indices, mask.shape[-1], valid), mask)
    assert torch.equal(valid.sum(-1), mask.sum(-1))
    assert (indices.masked_fill(valid, 0) == 0).all()
    both = valid[..., 1:]
    assert (indices[..., 1:] > indices[..., :-1])[both].all()


@given(st.integers(0, 8))
def test_a_given_size_cuts_or_fills_every_row(size: int) -> None:
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    indices, valid = mask_to_padded_indices(mask, size)
    assert indices.shape == valid.shape == (2, size)
    assert indices[0][valid[0]].tolist() == [0, 2, 3][:size]
    assert not valid[1].any()


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be >= 0, got -1"):
        mask_to_padded_indices(torch.ones(1, 2, dtype=torch.bool), -1)
    with pytest.raises(ValueError, match="num_tokens must be >= 0, got -2"):
        indices_to_mask(torch.zeros(1, 2, dtype=torch.long), -2)
