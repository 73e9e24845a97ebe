import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    SphericalStatistics,
    ZLoss,
    one_hot_squared_error_loss,
    spherical_loss,
    spherical_softmax_loss,
    spherical_statistics,
    squared_error_from_statistics,
    taylor_softmax_loss,
    z_from_statistics,
    z_loss,
)

KINDS = ("z", "taylor-softmax", "spherical-softmax", "squared-error")


def draw(rows: int = 5, classes: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, classes, dtype=torch.float64), torch.randint(classes, (rows,))


def dense(kind: str, logits: Tensor, target: Tensor, **options: object) -> Tensor:
    found = {
        "z": z_loss,
        "taylor-softmax": taylor_softmax_loss,
        "spherical-softmax": spherical_softmax_loss,
        "squared-error": one_hot_squared_error_loss,
    }[kind]
    return found(logits, target, **options)


@given(
    st.integers(0, 1000),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_scale_and_offset_of_the_logits_do_not_matter(
    seed: int, scale: float, shift: float, sharpness: float, location: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    target = torch.randint(6, (3,), generator=generator)
    expected = z_loss(logits, target, sharpness, location, reduction="none")
    found = z_loss(scale * logits + shift, target, sharpness, location, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_negative_scale_flips_the_score() -> None:
    logits, target = draw()
    # softplus(-z) - softplus(z) = -z
    gap = z_loss(logits, target, reduction="none") - z_loss(-logits, target, reduction="none")
    score = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(gap, -score.gather(1, target[:, None])[:, 0], rtol=1e-6, atol=1e-6)


def test_a_numpy_twin_agrees() -> None:
    logits, target = draw(20, 9)
    array = logits.numpy()
    for sharpness, location in ((1.0, 0.0), (3.0, 2.0), (0.2, -1.0)):
        scores = (array - array.mean(1, keepdims=True)) / array.std(1, keepdims=True)
        chosen = scores[np.arange(20), target.numpy()]
        expected = np.logaddexp(0, sharpness * (location - chosen)) / sharpness
        found = z_loss(logits, target, sharpness, location, reduction="none")
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_the_gradient_is_the_formula_and_orthogonal_to_ones_and_to_the_logits() -> None:
    logits, target = draw()
    logits.requires_grad_()
    z_loss(logits, target, 2.0, 1.0, reduction="sum").backward()
    found = logits.grad
    assert found is not None
    with torch.no_grad():
        sigma = logits.std(1, keepdim=True, correction=0)
        scores = (logits - logits.mean(1, keepdim=True)) / sigma
        chosen = scores.gather(1, target[:, None])
        by_score = -torch.sigmoid(2.0 * (1.0 - chosen))
        expected = by_score * (F.one_hot(target, 7) - 1 / 7 - chosen * scores / 7) / sigma
        length = by_score.abs() * (1 - 1 / 7 - chosen.square() / 7).sqrt() / sigma
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.norm(dim=1, keepdim=True), length, rtol=1e-6, atol=1e-8)
    assert found.sum(1).abs().max() < 1e-12
    assert (found * logits).sum(1).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right(kind: str) -> None:
    logits, target = draw(3, 4)
    assert torch.autograd.gradcheck(lambda o: dense(kind, o, target), logits.requires_grad_())


def test_one_hot_logits_have_the_largest_score() -> None:
    for classes in (2, 5, 100):
        loss = z_loss(torch.eye(classes, dtype=torch.float64), torch.arange(classes), eps=1e-12)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-math.sqrt(classes - 1))), rel=1e-9)


def test_a_sharp_loss_is_a_hinge_and_a_blunt_one_is_linear() -> None:
    logits, target = draw()
    scores = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    chosen = scores.gather(1, target[:, None])[:, 0]
    hinge = z_loss(logits, target, 1e6, 0.5, reduction="none")
    torch.testing.assert_close(hinge, (0.5 - chosen).clamp(min=0), rtol=1e-5, atol=1e-5)
    blunt = z_loss(logits, target, 1e-4, 0.5, reduction="none")
    torch.testing.assert_close(blunt - math.log(2) / 1e-4, (0.5 - chosen) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_sums_give_the_dense_loss(kind: str) -> None:
    logits, target = draw()
    found = spherical_loss(kind)(spherical_statistics(logits, target))
    torch.testing.assert_close(found, dense(kind, logits, target, reduction="none"), rtol=1e-6, atol=1e-7)


def test_values_by_hand() -> None:
    logits, target = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([2])
    assert taylor_softmax_loss(logits, target).item() == pytest.approx(-math.log(5 / (2.5 + 0.5 + 5)))
    assert spherical_softmax_loss(logits, target, eps=1.0).item() == pytest.approx(-math.log(5 / 9))
    assert one_hot_squared_error_loss(logits, target).item() == pytest.approx(1 + 1 + 1)
    assert squared_error_from_statistics(spherical_statistics(logits, target)).item() == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_ignored_samples_and_reductions_are_those_of_cross_entropy(kind: str) -> None:
    logits, target = draw(6, 3)
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    target[1] = -100
    by_row = dense(kind, logits, target, weight=weight, reduction="none")
    assert by_row.shape == (6,) and by_row[1] == 0
    share = torch.where(target >= 0, weight[target.clamp(min=0)], 0)
    torch.testing.assert_close(dense(kind, logits, target, weight=weight), by_row.sum() / share.sum())
    torch.testing.assert_close(dense(kind, logits, target, weight=weight, reduction="sum"), by_row.sum())
    unweighted = dense(kind, logits, target, reduction="none")
    torch.testing.assert_close(by_row, unweighted * share)
    torch.testing.assert_close(dense(kind, logits, target), unweighted.sum() / (target >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_that_counts_gives_zero_with_a_graph(kind: str) -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = dense(kind, logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0 and logits.grad is not None and logits.grad.abs().max() == 0
    assert dense(kind, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0


def test_equal_logits_have_a_finite_gradient() -> None:
    # The trap of a head of zeros: the gradient is as large as 1 / eps, and stays finite.
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    z_loss(logits, torch.tensor([0, 4]), eps=1e-3, reduction="sum").backward()
    assert logits.grad is not None
    expected = -0.5 * (F.one_hot(torch.tensor([0, 4]), 5) - 0.2) / 1e-3
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e18, 1e30])
def test_no_size_of_logits_overflows(scale: float) -> None:
    logits = (scale * torch.randn(4, 6)).requires_grad_()
    loss = z_loss(logits, torch.tensor([0, 1, 2, 3]), eps=1e-35)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    expected = z_loss(logits.detach().double() / scale, torch.tensor([0, 1, 2, 3]), eps=1e-12)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_large_offsets_do_not_cancel() -> None:
    logits = torch.tensor([[4096.0, 4097.0, 4098.0]])
    found = z_loss(logits, torch.tensor([2])).item()
    assert found == pytest.approx(z_loss(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2])).item(), rel=1e-6)
    # So do the sums, which are taken in float64.
    assert z_from_statistics(spherical_statistics(logits, torch.tensor([2]))).item() == pytest.approx(
        found, rel=1e-6
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_squares_of_large_logits_do_not_overflow(kind: str) -> None:
    logits = torch.tensor([[1e25, -1e25, 0.0]], requires_grad=True)
    loss = dense(kind, logits, torch.tensor([0]))
    if kind == "squared-error":
        assert loss.isinf()  # its value does not fit into float32
    else:
        loss.backward()
        assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_minus_infinity_takes_a_class_out() -> None:
    few = torch.randn(3, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 3])
    padded = torch.cat([few, torch.full((3, 2), -torch.inf, dtype=torch.float64)], 1).requires_grad_()
    loss = z_loss(padded, target)
    torch.testing.assert_close(loss, z_loss(few, target))
    loss.backward()
    assert padded.grad is not None and padded.grad.isfinite().all() and padded.grad[:, 4:].abs().max() == 0
    assert z_loss(padded, torch.tensor([0, 1, 4])) == torch.inf


def test_a_single_class_is_never_wrong_or_right() -> None:
    assert z_loss(torch.randn(2, 1), torch.tensor([0, 0])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 6).to(dtype).requires_grad_()
    target = torch.tensor([0, 1, 2, 5])
    loss = dense(kind, logits, target)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad is not None and logits.grad.dtype == dtype
    torch.testing.assert_close(loss, dense(kind, logits.detach().float(), target))


def test_the_module_is_the_function() -> None:
    logits, target = draw()
    weight = torch.rand(7, dtype=torch.float64)
    module = ZLoss(2.0, 1.0, weight=weight, ignore_index=3, eps=1e-4, reduction="sum")
    expected = z_loss(logits, target, 2.0, 1.0, weight=weight, ignore_index=3, eps=1e-4, reduction="sum")
    assert module(logits, target) == expected
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpness": 0.0}, "sharpness must be > 0 and finite, got 0.0"),
        ({"location": math.nan}, "location must be finite, got nan"),
        ({"eps": -1.0}, "eps must be > 0 and finite, got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    logits, target = draw()
    for call in (
        lambda: z_loss(logits, target, **options),
        lambda: ZLoss(**options),
        lambda: spherical_loss(**options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_refused() -> None:
    logits, target = draw()
    with pytest.raises(
        ValueError, match='reduction must be "mean", "sum" or "none", got "avg"'.replace('"avg"', "'avg'")
    ):
        z_loss(logits, target, reduction="avg")
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, classes\)"):
        z_loss(logits[0], target)
    with pytest.raises(ValueError, match=r"target must have shape \(5,\)"):
        z_loss(logits, target[:4])
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\), got 7"):
        taylor_softmax_loss(logits, torch.full((5,), 7))
    with pytest.raises(ValueError, match="the kind of loss must be"):
        spherical_loss("softmax")
    with pytest.raises(ValueError, match="eps must be > 0 and finite, got 0"):
        spherical_softmax_loss(logits, target, eps=0.0)


def test_statistics_need_no_logits() -> None:
    # Another user's sums: two classes with logits 3 and 1, target the first.
    sums = SphericalStatistics(torch.tensor(3.0), torch.tensor(4.0), torch.tensor(10.0), 2)
    assert z_from_statistics(sums).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-5)
