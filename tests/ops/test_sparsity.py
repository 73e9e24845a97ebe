import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.testing import assert_close

from coloss.ops import magnitude_masks, nm_mask, top_mask


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_mask_keeps_what_a_stable_sort_keeps(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    assert top_mask(scores, count).nonzero().flatten().tolist() == sorted(order[:count])


def test_top_mask_takes_infinite_scores() -> None:
    scores = torch.tensor([-torch.inf, 1.0, torch.inf, -torch.inf])
    assert top_mask(scores, 3).tolist() == [True, True, True, False]


def test_global_magnitude_takes_from_small_tensors_and_layer_from_each() -> None:
    weights = {"small": torch.full((4,), 0.1), "large": torch.full((4,), 5.0, dtype=torch.bfloat16)}
    together = magnitude_masks(weights, 0.5)
    apart = magnitude_masks(weights, 0.5, scope="layer")
    assert (together["small"].sum(), together["large"].sum()) == (0, 4)
    assert (apart["small"].sum(), apart["large"].sum()) == (2, 2)


@pytest.mark.parametrize("density", [0.0, 0.123, 0.5, 1.0])
def test_density_is_exact_where_weights_are_equal(density: float) -> None:
    weights = {"a": torch.zeros(30, 7), "b": torch.zeros(11)}
    assert sum(int(m.sum()) for m in magnitude_masks(weights, density).values()) == round(density * 221)


def test_no_weights_have_no_masks() -> None:
    assert magnitude_masks({}, 0.5) == {}


def test_every_group_keeps_exactly_n_on_ties_and_zeros() -> None:
    weight = torch.tensor([[0.0, 0, 0, 0, 1, -1, 1, 1], [2, -3, 1, 0, 0, 0, 0, 5]])
    expected = [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1]]
    assert nm_mask(weight).int().tolist() == expected


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 20))
def test_groups_hold_n_of_m_and_the_rest_stays(n: int, m: int, size: int) -> None:
    n = min(n, m)
    mask = nm_mask(torch.randn(2, size, generator=torch.Generator().manual_seed(size)), n, m)
    whole = size // m * m
    assert mask[:, whole:].all()
    assert (mask[:, :whole].unflatten(1, (-1, m)).sum(2) == n).all() if whole else True


def test_neighbours_may_be_counted_along_another_dimension() -> None:
    weight = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    assert_close(nm_mask(weight, 1, 4, dim=1), nm_mask(weight.movedim(1, -1), 1, 4).movedim(-1, 1))


def test_n_equal_to_m_keeps_all() -> None:
    assert nm_mask(torch.zeros(5, 12), 4, 4).all()


def test_bad_input_is_named() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    with pytest.raises(ValueError, match=r"count must be in \[0, 2\], got 3"):
        top_mask(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        top_mask(nan, 1)
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5"):
        magnitude_masks({"a": torch.zeros(2)}, 1.5)
    with pytest.raises((ValueError, TypeCheckError), match="scope"):
        magnitude_masks({"a": torch.zeros(2)}, 0.5, scope="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n must be in \[1, m\], got n=5, m=4"):
        nm_mask(torch.zeros(4), 5, 4)
    with pytest.raises(ValueError, match="weight must not be NaN"):
        nm_mask(nan, 1, 2)
    with pytest.raises(ValueError, match="weight must have at least one dimension, got a scalar"):
        nm_mask(torch.tensor(1.0))
