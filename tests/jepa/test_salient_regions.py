"""Facts about saliency, Otsu's threshold, regions and the order in which they are predicted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.jepa import (
    connected_components_2d,
    otsu_threshold,
    ranked_regions,
    saliency_map,
    sequential_masks,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_saliency_is_the_scaled_inner_product() -> None:
    tokens, query = draws(3, 5, 4), draws(3, 1, 4, seed=1)
    expected = torch.stack([t @ q[0] / 2 for t, q in zip(tokens, query)])
    torch.testing.assert_close(saliency_map(tokens, query), expected)
    assert saliency_map(tokens.bfloat16(), query.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("low", "high"), [(1, 9), (5, 5), (9, 1)])
def test_otsu_parts_two_heaps_in_the_middle(low: int, high: int) -> None:
    values = torch.tensor([0.1] * low + [0.9] * high)
    assert otsu_threshold(values).item() == pytest.approx(0.5, abs=0.01)


def slow_otsu(values: np.ndarray, bins: int) -> float:
    """Variance between the classes, border by border, on the histogram of the scaled values."""
    scaled = (values - values.min()) / (values.max() - values.min())
    index = np.minimum((scaled * bins).astype(int), bins - 1)
    found = []
    for border in range(1, bins):
        below = index < border
        if below.all() or not below.any():
            found.append(0.0)
            continue
        gap = scaled[below].mean() - scaled[~below].mean()
        found.append(below.mean() * (~below).mean() * gap**2)
    return max(found)


@given(st.integers(0, 10_000), st.sampled_from([2, 8, 256]))
@settings(max_examples=30, deadline=None)
def test_no_border_parts_better_than_otsu_says(seed: int, bins: int) -> None:
    values = draws(40, seed=seed).double()
    threshold = otsu_threshold(values, bins).item()
    scaled = ((values - values.min()) / (values.max() - values.min())).numpy()
    above = values.numpy() > threshold
    gap = scaled[above].mean() - scaled[~above].mean()
    assert above.mean() * (~above).mean() * gap**2 == pytest.approx(slow_otsu(values.numpy(), bins), rel=1e-9)


def test_otsu_takes_rows_one_by_one_at_any_scale_and_place() -> None:
    rows = draws(2, 3, 50)
    together = otsu_threshold(rows)
    assert together.shape == (2, 3)
    for first in range(2):
        for second in range(3):
            torch.testing.assert_close(otsu_threshold(rows[first, second]), together[first, second])
    torch.testing.assert_close(otsu_threshold(1000 * rows - 300), 1000 * together - 300, rtol=1e-3, atol=1e-3)
    constant = torch.full((4,), 0.3)
    assert otsu_threshold(constant) == constant[0]
    assert not (constant > otsu_threshold(constant)).any()
    assert otsu_threshold(rows.bfloat16()).dtype == torch.float32


def test_diagonal_neighbours_are_connected() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    assert connected_components_2d(mask).tolist() == [[1, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 2]]
    assert not connected_components_2d(torch.zeros(2, 2, dtype=torch.bool)).any()


@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([0.0, 0.05, 0.15]))
@settings(max_examples=25, deadline=None)
def test_regions_part_the_image_are_large_and_ranked(seed: int, count: int, area: float) -> None:
    coarse = draws(3, 1, 3, 3, seed=seed)
    saliency = torch.nn.functional.interpolate(coarse, (9, 9), mode="bilinear")[:, 0]
    regions = ranked_regions(saliency, count, area)
    assert regions.shape == (3, count, 81)
    assert (regions.sum(1) == 1).all()
    for image in range(3):
        kept = regions[image, :-1].any(-1)
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)
        parts = regions[image, :-1][kept]
        assert (parts.sum(-1) >= area * 81).all()
        scores = [saliency[image].flatten()[part].mean().item() for part in parts]
        assert scores == sorted(scores, reverse=True)
        for part in parts:
            assert connected_components_2d(part.view(9, 9)).max() == 1


def test_only_the_best_regions_are_kept_and_scale_does_not_matter() -> None:
    saliency = torch.zeros(1, 6, 6)
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        saliency[0, row : row + 2, column : column + 2] = 10.0 + number
    regions = ranked_regions(saliency, 3, 0.1)[0].view(3, 6, 6)
    assert regions[0, 4:, 4:].all()
    assert regions[1, 4:, :2].all()
    assert regions[:2].sum() == 8
    assert regions[2].sum() == 28
    assert torch.equal(ranked_regions(7 * saliency - 3, 3, 0.1), ranked_regions(saliency, 3, 0.1))
    assert not ranked_regions(saliency, 3, 0.15)[0, :2].any()


def test_constant_saliency_is_all_background_with_nothing_to_predict() -> None:
    regions = ranked_regions(torch.full((2, 3, 3), 0.7))
    assert regions[:, -1].all()
    assert not regions[:, :-1].any()
    assert not sequential_masks(regions).valid.any()
    assert not sequential_masks(regions).target.any()
    assert ranked_regions(torch.zeros(0, 3, 3)).shape == (0, 5, 9)


def test_contexts_hold_all_earlier_regions_the_latest_included() -> None:
    """The released code's contexts are R1, R1, R1 u R2, R1 u R2 u R3 for R2, R3, R4, R5."""
    names = torch.arange(10) % 5
    regions = torch.stack([names == region for region in range(5)])[None]
    context, target, valid = sequential_masks(regions)
    for step in range(4):
        assert set(names[context[0, step]].tolist()) == set(range(step + 1))
        assert set(names[target[0, step]].tolist()) == {step + 1}
    assert valid.all()
    assert not (context & target).any()
    assert (context[:, -1] | regions[:, -1]).all()


def test_missing_regions_are_passed_over() -> None:
    regions = torch.zeros(2, 4, 6, dtype=torch.bool)
    regions[0, 0, :2] = regions[0, 3, 2:] = True
    regions[1, 3] = True
    context, target, valid = sequential_masks(regions)
    assert valid.tolist() == [[False, False, True], [False, False, False]]
    assert context[0, 2].tolist() == [True, True, False, False, False, False]
    assert torch.equal(target[0, 2], regions[0, 3])
    assert not target[1].any()


def test_two_regions_are_foreground_then_background() -> None:
    saliency = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    context, target, valid = sequential_masks(ranked_regions(saliency, 2, 0.0))
    assert context.tolist() == [[[True, True, False, False]]]
    assert target.tolist() == [[[False, False, True, True]]]
    assert valid.tolist() == [[True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: otsu_threshold(torch.ones(3), bins=1), "bins must be >= 2, got 1"),
        (lambda: otsu_threshold(torch.tensor([1.0, torch.nan])), "saliency must hold finite values"),
        (lambda: otsu_threshold(torch.ones(2, 0)), "at least one in a row"),
        (lambda: ranked_regions(torch.ones(1, 2, 2), 1), "n_regions must be >= 2, got 1"),
        (lambda: ranked_regions(torch.ones(1, 2, 2), 2, 1.5), r"min_area must be in \[0, 1\], got 1.5"),
        (lambda: ranked_regions(torch.full((1, 2, 2), torch.inf)), "saliency must hold finite values"),
        (lambda: sequential_masks(torch.ones(1, 1, 2).bool()), "regions must be at least two, got 1"),
        (lambda: sequential_masks(torch.ones(1, 2, 2).bool()), "regions must be disjoint"),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
