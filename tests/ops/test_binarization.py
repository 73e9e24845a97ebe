"""Signs and the slopes that stand for their derivative."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.ops import binarization_slope, binarize, rectified_power

ESTIMATORS = ("ste", "reste", "polynomial", "tanh")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_forward_pass_is_the_sign_whatever_the_estimator(estimator):
    x = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-30, math.inf, math.nan])
    assert torch.equal(binarize(x, estimator, power=4.0)[:6], torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]))
    assert binarize(x, estimator)[6].isnan()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert binarize(x.to(dtype), estimator).dtype == dtype


def test_reste_at_power_1_is_clipped_straight_through():
    x = torch.linspace(-2, 2, 81)
    reste, ste = binarization_slope(x), binarization_slope(x, "ste", clip=1.5)
    assert torch.equal(reste, ste) and torch.equal(ste, (x.abs() <= 1.5).float())


def test_slopes_of_the_paper_worked_by_hand():
    x = torch.tensor([0.5, 0.1, 0.0, -0.05, 1.6, -0.5], dtype=torch.float64, requires_grad=True)
    binarize(x, power=3.0).sum().backward()
    outer, inner = 0.5 ** (-2 / 3) / 3, 0.1 ** (-2 / 3)
    assert outer == pytest.approx(0.52913, abs=1e-5) and inner == pytest.approx(4.64159, abs=1e-5)
    assert x.grad.tolist() == pytest.approx([outer, inner, inner, inner, 0.0, outer])


def test_the_slope_is_the_derivative_of_the_rectified_power_beyond_the_secant():
    x = torch.linspace(0.11, 1.49, 50, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(rectified_power(x, 5.0).sum(), x)
    torch.testing.assert_close(binarization_slope(x, power=5.0), exact)
    # The secant from 0 to f(m).
    assert binarization_slope(torch.zeros(1, dtype=torch.float64), power=5.0).item() == pytest.approx(
        rectified_power(torch.tensor(0.1, dtype=torch.float64), 5.0).item() / 0.1
    )


def test_other_slopes_at_single_points():
    x = torch.tensor([0.25, 1.0, 1.5])
    assert binarization_slope(x, "polynomial").tolist() == [1.5, 0.0, 0.0]
    assert binarization_slope(x, "tanh", power=2.0)[0].item() == pytest.approx(2 * (1 - math.tanh(0.5) ** 2))
    assert binarization_slope(x, "ste").tolist() == [1.0, 1.0, 0.0]


@given(
    st.sampled_from(ESTIMATORS),
    st.floats(-4, 4, width=32),
    st.floats(1, 50, width=32),
)
def test_slopes_are_even_and_never_negative(estimator, x, power):
    there, back = (binarization_slope(torch.tensor([value]), estimator, power=power) for value in (x, -x))
    assert torch.equal(there, back) and there.isfinite().all() and (there >= 0).all()


def test_the_power_nears_the_sign_and_is_exact_at_one():
    x = torch.tensor([-1.0, 1.0, 0.3])
    for power in (1.0, 3.0, 1000.0):
        assert rectified_power(x, power)[:2].tolist() == [-1.0, 1.0]
    assert rectified_power(x, 1e6)[2].item() == pytest.approx(1.0, abs=1e-5)


def test_a_power_filled_anew_before_the_backward_pass_does_not_change_it():
    x, power = torch.tensor([0.5], requires_grad=True), torch.tensor(3.0)
    y = binarize(x, power=power)
    power.fill_(1.0)
    y.sum().backward()
    assert x.grad.item() == pytest.approx(0.5 ** (-2 / 3) / 3)


def test_half_precision_slopes_are_those_of_single_precision():
    x = torch.tensor([0.3, -0.7, 1.2])
    half = x.bfloat16().requires_grad_()
    binarize(half, power=3.0).sum().backward()
    assert torch.equal(half.grad, binarization_slope(half, power=3.0).bfloat16())


def test_bad_values_are_named(as_users_call):
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="estimator must be one of ste, reste, polynomial, tanh, got 'sign'"):
        binarize(x, "sign")
    with pytest.raises(ValueError, match="power must be >= 1 and finite, got 0.5"):
        binarize(x, power=0.5)
    with pytest.raises(ValueError, match="clip must be > 0, got 0"):
        binarize(x, clip=0.0)
    with pytest.raises(ValueError, match="small must be > 0, got 0"):
        binarization_slope(x, small=0.0)
    with pytest.raises(ValueError, match="power must be >= 1, got nan"):
        rectified_power(x, math.nan)
    (gradient,) = torch.autograd.grad(binarize(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="binarize can be differentiated only once"):
        gradient.sum().backward()
