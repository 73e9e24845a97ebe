"""Groups on grids of their own: errors within half a scale, constant groups guarded, sizes to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.compression import quantize_groups


@pytest.mark.parametrize("grid", ["ends", "bins"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_number_is_further_than_half_a_scale_away(bits, axis, grid):
    x = 3 * torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(bits)) + 1
    stored = quantize_groups(x, bits, 8, axis=axis, grid=grid)
    error = (stored.dequantize() - x).abs().unflatten(axis, (-1, 8)).amax(axis)
    assert bool((error <= stored.scale.float() / 2 + 1e-5).all())
    assert stored.nbytes * 8 == x.numel() * (bits + 32 / 8)


def test_groups_lie_along_the_named_axis():
    """Keys whose channels differ in size lose little in groups of tokens, and much in groups of channels."""
    keys = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 100.0] * 4
    )
    per_channel = (quantize_groups(keys, 2, 8, axis=-2).dequantize() - keys)[..., ::2].abs().mean()
    per_token = (quantize_groups(keys, 2, 8, axis=-1).dequantize() - keys)[..., ::2].abs().mean()
    assert per_token > 10 * per_channel


@pytest.mark.parametrize("grid", ["ends", "bins"])
def test_a_constant_group_comes_back(grid):
    """The published code divides by a scale of 0 here."""
    x = torch.tensor([[0.0] * 4, [5.0] * 4, [0.1] * 4, [-1e-9] * 4])
    back = quantize_groups(x, 2, 4, grid=grid).dequantize()
    assert torch.equal(back[:2], x[:2])
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0.0)
    x = torch.full((4,), 1000.3)
    torch.testing.assert_close(quantize_groups(x, 1, 4, grid=grid).dequantize(), x, rtol=2**-11, atol=0.0)


def test_levels_worked_by_hand():
    stored = quantize_groups(torch.tensor([0.0, 1.0, 2.0, 3.0]), 1, 4)
    assert stored.dequantize().tolist() == [0.0, 0.0, 3.0, 3.0]
    stored = quantize_groups(torch.tensor([0.0, 1.0, 2.0, 4.0]), 2, 4, grid="bins")
    assert stored.dequantize().tolist() == [0.5, 1.5, 2.5, 3.5]


def test_nested_bins_lose_nothing_on_the_way_and_ends_do():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    way = quantize_groups(x, 8, 16, grid="bins").requantize(4).requantize(2)
    once = quantize_groups(x, 2, 16, grid="bins")
    assert torch.equal(way.codes, once.codes) and torch.equal(way.dequantize(), once.dequantize())
    way, once = quantize_groups(x, 8, 16).requantize(4).requantize(3), quantize_groups(x, 3, 16)
    assert (way.dequantize() - x).square().mean() > (once.dequantize() - x).square().mean()


def test_requantising_adds_at_most_half_a_scale_each_time():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    eight = quantize_groups(x, 8, 16)
    four = eight.requantize(4)
    error = (four.dequantize() - eight.dequantize()).abs().unflatten(-1, (-1, 16)).amax(-1)
    assert bool((error <= four.scale.float() / 2 + 1e-6).all())


def test_padding_has_no_say():
    x = torch.randn(1, 1, 16, 4, generator=torch.Generator().manual_seed(5))
    spoiled = x.clone()
    spoiled[:, :, :3] = 1e4
    valid = torch.arange(16)[None, None, :, None] >= 3
    plain, other = (quantize_groups(part, 4, 8, axis=-2, valid=valid).dequantize() for part in (x, spoiled))
    assert torch.equal(plain[:, :, 3:], other[:, :, 3:])
    nothing = quantize_groups(x, 4, 8, axis=-2, valid=torch.zeros_like(valid)).dequantize()
    assert bool((nothing == 0).all())


@given(st.lists(st.floats(-3e4, 3e4, width=32), min_size=4, max_size=4), st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_any_group_stays_within_half_a_scale(values, bits):
    x = torch.tensor(values, dtype=torch.float32)
    for grid in ("ends", "bins"):
        stored = quantize_groups(x, bits, 4, grid=grid)
        slack = 1e-6 * x.abs().max() + 1e-7
        assert bool(((stored.dequantize() - x).abs() <= stored.scale.float() / 2 + slack).all())


@pytest.mark.parametrize("largest", [40000.0, 65504.0])
def test_one_bit_spans_no_more_than_a_float16_scale_can(largest):
    x = torch.tensor([-largest, largest])
    message = rf"x must span at most 65,504 \* \(2\^bits - 1\) in a group, got {2 * largest:.6g} for 1 bits"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        quantize_groups(x, 1, 2)
    two = quantize_groups(x, 2, 2)
    torch.testing.assert_close(two.dequantize(), x, atol=0.0, rtol=2e-3)
    assert quantize_groups(x, 3, 2).requantize(2).bits == 2  # what comes back may be just beyond the range
    with pytest.raises(ValueError, match="span at most 65,504"):
        two.requantize(1)
    # The middles of two bins are closer to one another, and their scale is half as wide.
    assert quantize_groups(x, 8, 2, grid="bins").requantize(1).dequantize().tolist() == pytest.approx(
        [-largest / 2, largest / 2], rel=2e-3
    )


def test_padding_is_not_asked_for_its_range():
    x = torch.tensor([[1e6, 0.0, 1.0, 3.0]])
    stored = quantize_groups(x, 2, 4, valid=torch.tensor([[False, True, True, True]]))
    assert stored.dequantize().tolist()[0][1:] == [0.0, 1.0, 3.0]


def test_a_nan_stays_one_and_harms_no_other_group():
    back = quantize_groups(torch.tensor([torch.nan, 1.0, 2.0, 3.0]), 4, 2).dequantize()
    assert back[:2].isnan().all()
    torch.testing.assert_close(back[2:], torch.tensor([2.0, 3.0]), atol=2e-3, rtol=0.0)


def test_half_precision_comes_back_in_its_own_type():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    back = quantize_groups(x, 2, 4).dequantize()
    assert back.dtype == torch.bfloat16 and torch.equal(back, x)


def test_bad_input_is_refused():
    x = torch.zeros(2, 6)
    for arguments, message in (
        ({"bits": 9, "group": 3}, "bits must be in 1..8, got 9"),
        ({"bits": 2, "group": 4}, "group must divide the 6 numbers"),
        ({"bits": 2, "group": 3, "grid": "none"}, "grid must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message if "grid" not in arguments else None):
            quantize_groups(x, **arguments)
    for grid in ("ends", "bins"):
        for low in (0.0, 1e6):  # a constant group of such numbers would come back as others
            with pytest.raises(ValueError, match=r"within \+-65,504, float16's range, got 1e\+06"):
                quantize_groups(torch.tensor([low, 1e6]), 4, 2, grid=grid)
    with pytest.raises(ValueError, match=r"bits must be in 1..2, got 4"):
        quantize_groups(x, 2, 3).requantize(4)
