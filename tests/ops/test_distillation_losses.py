"""Distillation losses in one pass are the formulas, with their gradients, first and second; what does not count does nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from coloss.ops import dist_loss, distillation_kl_loss, distillation_losses, dkd_loss, standardized_logits


def randn(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl(z, t, *, temperature=2.0, **options):
    return distillation_kl_loss(z, t, temperature, **options)


def dkd(z, t, *, temperature=2.0, **options):
    targets = torch.arange(z[..., 0].numel()).reshape(z.shape[:-1]) % z.shape[-1]
    return dkd_loss(z, t, targets, temperature, **options)


ROW_LOSSES = [kl, dkd]


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_the_pass_in_pieces_is_the_formula(loss, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(distillation_losses, "_ON_CPU", rows_at_a_time * 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    z, t = randn(10, 7).requires_grad_(), randn(10, 7, seed=1)
    weights = torch.arange(10.0, dtype=torch.float64)
    one_pass = loss(z, t, reduction="none")
    formula = loss(z, t.clone().requires_grad_(), reduction="none")
    torch.testing.assert_close(one_pass, formula)
    torch.testing.assert_close(
        torch.autograd.grad((weights * one_pass).sum(), z), torch.autograd.grad((weights * formula).sum(), z)
    )
    with torch.no_grad():
        torch.testing.assert_close(loss(z, t, reduction="none"), formula)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_gradients_of_both_sides_and_of_gradients(loss):
    z, t = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    for others in ((), (t.requires_grad_(),)):
        teacher = others[0] if others else t.detach()
        call = (lambda a, b: loss(a, b)) if others else (lambda a: loss(a, teacher))  # noqa: B023
        assert torch.autograd.gradcheck(call, (z, *others))
        assert torch.autograd.gradgradcheck(call, (z, *others))


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_under_functional_transforms(loss):
    z, t = randn(3, 4), randn(3, 4, seed=1)
    (expected,) = torch.autograd.grad(loss(z.requires_grad_(), t), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach(), t), expected)


def test_decoupled_is_the_divergence_of_coins_and_of_what_is_left():
    z, t = randn(5, 6), randn(5, 6, seed=1)
    targets, temperature = torch.tensor([0, 5, 2, 2, 1]), 3.0
    expected = []
    for row in range(5):
        q, p = (special.softmax(x[row].numpy() / temperature) for x in (z, t))
        y = int(targets[row])
        coin = stats.entropy([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        rest = stats.entropy(np.delete(p, y), np.delete(q, y))
        expected.append(temperature**2 * (0.5 * coin + 8 * rest))
    got = dkd_loss(z, t, targets, temperature, "none", target_weight=0.5, other_weight=8.0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@given(st.floats(0.5, 10), st.integers(2, 8))
@settings(max_examples=20)
def test_decoupled_with_the_teachers_doubt_as_weight_is_the_plain_divergence(temperature, classes):
    z, t = randn(4, classes), randn(4, classes, seed=1)
    targets = torch.arange(4) % classes
    doubt = 1 - torch.softmax(t / temperature, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(
        dkd_loss(z, t, targets, temperature, "none", other_weight=doubt),
        distillation_kl_loss(z, t, temperature, "none"),
    )


def test_decoupled_with_few_classes():
    targets = torch.tensor([0, 1])
    z, t = randn(2, 2).requires_grad_(), randn(2, 2, seed=1)
    both = dkd_loss(z, t, targets, 1.0, other_weight=8.0)
    torch.testing.assert_close(both, dkd_loss(z, t, targets, 1.0, other_weight=0.0))
    torch.testing.assert_close(both, distillation_kl_loss(z, t, 1.0))
    single = randn(3, 1).requires_grad_()
    value = dkd_loss(single, randn(3, 1, seed=1), torch.zeros(3, dtype=torch.long))
    value.backward()
    assert value == 0 and (single.grad == 0).all()


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_what_does_not_count_changes_nothing_even_if_it_is_no_number(loss, shape):
    z, t = randn(*shape, 5).requires_grad_(), randn(*shape, 5, seed=1)
    each = loss(z, t, reduction="none")
    assert each.shape == shape
    valid = torch.ones(shape, dtype=torch.bool)
    if shape:
        valid.view(-1)[1::2] = False
    broken = torch.where(valid[..., None], z.detach(), math.nan).requires_grad_()
    got = loss(broken, torch.where(valid[..., None], t, math.nan), reduction="none", valid=valid)
    torch.testing.assert_close(got, torch.where(valid, each, 0.0))
    value = loss(broken, t, valid=valid)
    torch.testing.assert_close(value, each[valid].mean())
    value.backward()
    assert (broken.grad[~valid] == 0).all() and broken.grad.isfinite().all()
    assert loss(z, t, valid=torch.zeros_like(valid)) == 0


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_only_the_gradient_has_the_size_of_the_logits(loss):
    """Beside the logits themselves, which are the caller's, and whatever is as small as the batch."""
    z, t = randn(50, 40).requires_grad_(), randn(50, 40, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss(z, t)
    own = [x for x in kept if x.numel() == z.numel() and x.data_ptr() not in (z.data_ptr(), t.data_ptr())]
    assert len(own) == 1


@pytest.mark.parametrize("loss", [*ROW_LOSSES, lambda z, t: dist_loss(z, t)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    z, t = randn(4, 10).to(dtype).requires_grad_(), randn(4, 10, seed=1).to(dtype)
    value = loss(z, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(z.detach().float(), t.float()))
    # A loss scale lifts the gradient of a class so rare that float16 alone would lose it.
    (value * 2.0**14).backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all()


def test_a_loss_scale_saves_small_gradients_in_float16():
    z = torch.zeros(1, 2, dtype=torch.float16)
    z[0, 1] = -18
    z.requires_grad_()
    (distillation_kl_loss(z, torch.tensor([[0.0, -30.0]], dtype=torch.float16), 1.0) * 2.0**14).backward()
    torch.testing.assert_close(z.grad[0, 1].item(), 2.0**14 * math.exp(-18), rtol=1e-2, atol=0)


@pytest.mark.parametrize("extreme", [1e4, 1e30])
def test_extreme_and_impossible_logits(extreme):
    z = torch.tensor([[extreme, -extreme, 0.0], [0.0, extreme, 1.0]], requires_grad=True)
    t = torch.tensor([[-extreme, extreme, 0.0], [0.0, extreme, 1.0]])
    targets = torch.tensor([0, 1])
    value = dkd_loss(z, t, targets)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    z = torch.tensor([[1.0, 2.0, -math.inf], [3.0, -math.inf, -math.inf]], requires_grad=True)
    t = torch.tensor([[2.0, 0.0, -math.inf], [1.0, -math.inf, -math.inf]])
    for teacher in (t, t.clone().requires_grad_()):
        value = dkd_loss(z, teacher, torch.tensor([1, 0]), reduction="none")
        torch.testing.assert_close(
            value[0], dkd_loss(z[:1, :2], t[:1, :2], torch.tensor([1]), reduction="none")[0]
        )
        assert value[1] == 0
        (slope,) = torch.autograd.grad(value.sum(), z)
        assert slope.isfinite().all()


def test_dist_is_pearsons_correlation_of_probabilities():
    z, t = randn(6, 4), randn(6, 4, seed=1)
    q, p = (special.softmax(x.numpy() / 2, 1) for x in (z, t))
    rows = np.mean([stats.pearsonr(a, b).statistic for a, b in zip(q, p)])
    columns = np.mean([stats.pearsonr(a, b).statistic for a, b in zip(q.T, p.T)])
    expected = 4 * (3.0 * (1 - rows) + 0.5 * (1 - columns))
    got = dist_loss(z, t, 2.0, class_weight=3.0, sample_weight=0.5)
    np.testing.assert_allclose(got.item(), expected, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda a: dist_loss(a, t), (z.requires_grad_(),))


def test_dist_sees_no_affine_change_of_probabilities_and_survives_what_does_not_vary():
    t = randn(5, 4, seed=1)
    p = torch.softmax(t, 1)
    flatter = (0.5 * p + 0.5 / 4).log()
    torch.testing.assert_close(dist_loss(flatter, t), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    flat = torch.zeros(5, 4, requires_grad=True)
    value = dist_loss(flat, t.float())
    value.backward()
    assert value == 2 and flat.grad.isfinite().all()
    many = randn(3, 50_000, dtype=torch.float32).requires_grad_()
    dist_loss(many, many.detach() * 0.9).backward()
    assert many.grad.isfinite().all() and dist_loss(many, many.detach()) < 1e-4
    assert dist_loss(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@pytest.mark.parametrize(("classes", "batch"), [(10, 3), (10, 7), (3, 5), (77, 64), (1000, 32)])
def test_rounding_is_no_correlation(classes, batch):
    t = randn(batch, classes, dtype=torch.float32)
    for z in (torch.zeros(batch, classes), torch.full((batch, classes), 0.3)):
        value = dist_loss(z.requires_grad_(), t)
        value.backward()
        assert value == 2 and (z.grad == 0).all()
    same = randn(1, classes, dtype=torch.float32).repeat(batch, 1).requires_grad_()
    dist_loss(same, t, class_weight=0.0).backward()
    assert (same.grad == 0).all()


@pytest.mark.parametrize("value", [0.1, 0.3])
@pytest.mark.parametrize("classes", [3, 7, 100_000])
def test_equal_logits_are_standardised_to_zeros_without_a_gradient(value, classes):
    z = torch.full((1, classes), value, requires_grad=True)
    got = standardized_logits(z)
    (got * randn(1, classes, dtype=torch.float32)).sum().backward()
    assert (got == 0).all() and (z.grad == 0).all()
    assert standardized_logits(torch.tensor([[1.0, 1.0 + 1e-5]])).abs().sub(1).abs().max() < 1e-6


@given(st.floats(0.1, 10), st.floats(-50, 50))
@settings(max_examples=20)
def test_standardised_logits_see_neither_scale_nor_shift(scale, shift):
    z = randn(4, 6)
    got = standardized_logits(scale * z + shift)
    torch.testing.assert_close(got, standardized_logits(z))
    torch.testing.assert_close(got.mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(got.var(1, correction=0), torch.ones(4, dtype=torch.float64))


def test_standardised_logits_at_the_edges():
    assert torch.autograd.gradcheck(standardized_logits, (randn(3, 4).requires_grad_(),))
    flat = torch.full((2, 3), 5.0, requires_grad=True)
    standardized_logits(flat).square().sum().backward()
    assert flat.grad.isfinite().all()
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(
            standardized_logits(scale * randn(2, 5, dtype=torch.float32)),
            standardized_logits(randn(2, 5, dtype=torch.float32)),
            rtol=1e-3,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: dkd_loss(z, z, torch.tensor([0, 3])), r"targets must be in \[0, 3\), got 3"),
        (
            lambda z: dkd_loss(z, z, torch.tensor([0, 1]), temperature=0.0),
            "temperature must be > 0 and finite, got 0.0",
        ),
        (lambda z: standardized_logits(z[:, :0]), "must have at least one class"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


@pytest.mark.parametrize("loss", [distillation_kl_loss, dist_loss])
def test_logits_of_two_precisions_are_compared_in_the_finer_one(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator)
    expected = loss(student.double(), teacher.double())
    torch.testing.assert_close(loss(student.double(), teacher), expected)
    torch.testing.assert_close(loss(student, teacher.double()), expected)
