"""Rounding to a grid: values worked by hand, the scale's gradient, and two roundings against one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import code_values, double_round, fake_quantize, integer_range, round_ste, shift_codes


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_half_to_even_and_lets_gradients_pass():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.4], requires_grad=True)
    round_ste(x).backward(torch.arange(5.0))
    assert round_ste(x).tolist() == [0.0, 2.0, 2.0, 0.0, -1.0]
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("signed", "bits"), [(True, 2), (True, 4), (False, 1), (False, 3)])
def test_quantised_values_and_gradients_are_those_of_the_formulas(signed: bool, bits: int):
    x = (4 * draws(200)).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    weights = draws(200, seed=1)
    (fake_quantize(x, scale, bits, signed=signed) * weights).sum().backward()
    low, high = integer_range(bits, signed)
    v = x.detach().numpy() / np.float32(0.37)
    codes = np.clip(np.round(v), low, high)
    np.testing.assert_array_equal(
        fake_quantize(x, scale, bits, signed=signed).detach(), codes * np.float32(0.37)
    )
    inside = (v > low) & (v < high)
    np.testing.assert_array_equal(x.grad, weights.numpy() * inside)
    slope = np.where(inside, np.round(v) - v, np.where(v <= low, low, high))
    assert scale.grad.item() == pytest.approx((weights.numpy() * slope).sum(), rel=1e-4)


def test_double_rounding_at_the_highest_precision_is_plain_quantisation():
    first, second = ((2 * draws(300)).requires_grad_() for _ in range(2))
    scales = [torch.tensor(0.05, requires_grad=True) for _ in range(2)]
    one = fake_quantize(first, scales[0], 8)
    codes, two = double_round(second, scales[1], 8, 8)
    assert torch.equal(one, two) and torch.equal(codes * scales[1], two)
    one.square().sum().backward()
    two.square().sum().backward()
    assert torch.equal(first.grad, second.grad) and torch.equal(scales[0].grad, scales[1].grad)


@pytest.mark.parametrize("rounding", ["nearest", "floor", "middle"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
def test_integer_shifts_equal_the_forward_pass_for_every_code(bits: int, rounding: str):
    every = torch.arange(-128, 128)
    scale = torch.tensor(0.013)
    codes, values = double_round(every * scale, scale, 8, bits, rounding)
    shifted = shift_codes(every, 8, bits, rounding)
    assert torch.equal(codes, shifted)
    assert torch.equal(code_values(shifted, scale, 8, bits, rounding), values)
    if rounding == "nearest":
        half_up = torch.floor(every / 2 ** (8 - bits) + 0.5).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(shifted.float(), half_up)


def test_ties_go_up_and_not_to_even():
    assert shift_codes(torch.tensor([8, 24, 40, -8, -24]), 8, 4).tolist() == [1, 2, 3, 0, -1]


def test_two_bits_have_four_levels_and_the_upper_end_is_clipped():
    codes, values = double_round(torch.tensor([-9.0, -1.0, 0.0, 0.7, 9.0]), torch.tensor(1 / 64), 8, 2)
    assert codes.tolist() == [-2, -1, 0, 1, 1]
    assert values.tolist() == [-2.0, -1.0, 0.0, 1.0, 1.0]


def test_scale_gradient_goes_through_both_roundings():
    # v = 30, 100, -200 at 8 bits; 2 bits are worth 64: 30 -> 0, 100 -> 64 (clipped, as 64 <= v), -200 -> -128.
    weight = torch.tensor([30.0, 100.0, -200.0, 50.0], requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    _, values = double_round(weight, scale, 8, 2)
    values.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert weight.grad.tolist() == [1.0, 0.0, 0.0, 1000.0]
    assert scale.grad.item() == (0 - 30) + 10 * 64 + 100 * -128 + 1000 * (64 - 50)


def test_a_scale_for_each_row_gets_the_gradient_of_its_row():
    weight, scale = draws(12).view(3, 4), torch.tensor([[0.1], [0.2], [0.3]], requires_grad=True)
    double_round(weight, scale, 8, 4)[1].sum().backward()
    for row in range(3):
        one = scale.detach()[row, 0].clone().requires_grad_()
        double_round(weight[row], one, 8, 4)[1].sum().backward()
        assert scale.grad[row].item() == pytest.approx(one.grad.item(), rel=1e-5)


@pytest.mark.parametrize(("bits", "share"), [(6, 0.125), (4, 0.031), (2, 0.0075)])
def test_two_roundings_differ_from_one_only_at_half_steps(bits: int, share: float):
    weight, scale = draws(200_000), torch.tensor(3 / 127)
    twice, _ = double_round(weight, scale, 8, bits)
    shift = 2 ** (8 - bits)
    once = torch.round(weight / (scale * shift)).clamp(*integer_range(bits)).to(torch.int8)
    differs = twice != once
    high, _ = double_round(weight, scale, 8, 8)
    # Clipping at 8 bits ends half a step of them below that at fewer; it changes no code.
    assert bool((high[differs].int().abs() % shift == shift // 2).all())
    assert int((twice.int() - once.int()).abs().max()) <= 1
    assert float(differs.float().mean()) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize(
    ("bits", "direct", "double", "floor"), [(4, 0.0127, 0.0129, 0.0439), (2, 0.2029, 0.2030, 0.7451)]
)
def test_errors_on_normal_weights_are_those_measured(bits: int, direct: float, double: float, floor: float):
    weight, scale = draws(400_000, seed=3), torch.tensor(3 / 127)

    def error(values: torch.Tensor) -> float:
        return float((values - weight).square().mean())

    assert error(double_round(weight, scale, 8, bits)[1]) == pytest.approx(double, rel=0.05)
    assert error(fake_quantize(weight, scale * 2 ** (8 - bits), bits)) == pytest.approx(direct, rel=0.05)
    assert error(double_round(weight, scale, 8, bits, "floor")[1]) == pytest.approx(floor, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=20),
    st.sampled_from([2, 4, 8]),
    st.floats(2**-30, 2**30, width=32),
)
def test_values_are_multiples_of_the_step_in_range(values: list[float], bits: int, size: float):
    scale = torch.tensor(size)
    codes, quantised = double_round(torch.tensor(values), scale, 8, bits)
    low, high = integer_range(bits)
    assert bool(((codes >= low) & (codes <= high)).all())
    assert torch.equal(codes * 2.0 ** (8 - bits) * scale, quantised)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype):
    weight = draws(500).to(dtype)
    codes, values = double_round(weight, torch.tensor(0.011), 8, 6)
    wide, _ = double_round(weight.float(), torch.tensor(0.011), 8, 6)
    assert torch.equal(codes, wide) and values.dtype == dtype


def test_infinities_saturate_and_nan_stays():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], requires_grad=True)
    values = fake_quantize(x, torch.tensor(0.5), 4)
    values.sum().backward()
    assert values[:2].tolist() == [3.5, -4.0] and bool(values[2].isnan())
    assert x.grad[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: fake_quantize(x, s, 9), r"bits must be in 2\.\.8, got 9"),
        (lambda x, s: double_round(x, s, 4, 6), "bits must be <= high_bits 4, got 6"),
        (lambda x, s: double_round(x, torch.ones(3), 8, 4), r"scale must spread to the shape \(2,\)"),
        (lambda x, s: shift_codes(x.int(), 4, 8), "bits must be <= high_bits 4, got 8"),
        (lambda x, s: code_values(x.int(), s, 4, 8), "bits must be <= high_bits 4, got 8"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2), torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_stand_for_the_same_with_a_half_precision_scale(dtype: torch.dtype):
    scale = torch.tensor(0.0113, dtype=dtype)
    codes, values = double_round(draws(200), scale, 8, 6)
    assert torch.equal(code_values(codes, scale, 8, 6), values)


@pytest.mark.parametrize("call", [double_round, code_values])
def test_an_unknown_rounding_is_named(as_users_call, call):
    with pytest.raises(ValueError, match='rounding must be "nearest", "floor" or "middle", got \'up\''):
        call(torch.ones(2), torch.ones(()), 8, 4, "up")
