"""Facts about divergences between predictions: closed forms, limits, gradients and extremes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import special, stats

from coloss.ops import (
    binary_kl_loss,
    distillation_kl_loss,
    entropy,
    js_divergence_loss,
    logit_gap_loss,
    soft_cross_entropy_loss,
    target_log_probability,
)

PAIR_LOSSES = [distillation_kl_loss, binary_kl_loss, logit_gap_loss, js_divergence_loss]


def logits(
    *shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


logit_arrays = npst.arrays(np.float64, (3, 5), elements=st.floats(-30, 30))
temperatures = st.floats(0.2, 20)


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)


@given(logit_arrays, logit_arrays, temperatures)
@settings(max_examples=30, deadline=None)
def test_distillation_equals_scipys_relative_entropy(z, t, temperature):
    expected = temperature**2 * stats.entropy(
        special.softmax(t / temperature, 1), special.softmax(z / temperature, 1), axis=1
    )
    got = distillation_kl_loss(torch.from_numpy(z), torch.from_numpy(t), temperature, "none")
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-9 * temperature**2)


def test_distillation_gradient_is_the_scaled_difference_of_probabilities():
    z, t = logits(4, 10).requires_grad_(), logits(4, 10, seed=1)
    distillation_kl_loss(z, t, 4.0).backward()
    torch.testing.assert_close(z.grad, 4.0 / 4 * (torch.softmax(z / 4, 1) - torch.softmax(t / 4, 1)))


def test_distillation_at_high_temperature_is_the_distance_of_centred_logits():
    z, t = logits(4, 10), logits(4, 10, seed=1)
    centred = (z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    expected = centred.square().sum(1).mean() / (2 * 10)
    torch.testing.assert_close(distillation_kl_loss(z, t, 1e4), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [distillation_kl_loss, js_divergence_loss])
def test_softmax_losses_ignore_a_constant_added_to_all_logits(loss):
    z, t = logits(4, 10), logits(4, 10, seed=1)
    torch.testing.assert_close(loss(z + 7, t), loss(z, t))


@pytest.mark.parametrize("loss", [binary_kl_loss, logit_gap_loss])
def test_logit_losses_see_a_constant_added_to_all_logits(loss):
    z = logits(4, 10)
    assert loss(z, z) == 0
    assert loss(z + 1, z) > 0.1


@given(logit_arrays, logit_arrays, temperatures)
@settings(max_examples=30, deadline=None)
def test_binary_kl_equals_the_divergence_of_coins(z, t, temperature):
    p, q = special.expit(t / temperature), special.expit(z / temperature)
    got = binary_kl_loss(torch.from_numpy(z), torch.from_numpy(t), temperature, "sum")
    # 1 - p loses digits where a coin is nearly certain; the twin is only that good.
    if np.abs(np.stack([z, t])).max() / temperature < 15:
        np.testing.assert_allclose(
            got.item(), temperature**2 * bernoulli_kl(p, q).sum(), rtol=1e-5, atol=1e-9
        )
    assert got >= -1e-9


def test_logit_gap_is_the_divergence_from_a_fair_coin():
    z, t = logits(4, 10), logits(4, 10, seed=1)
    temperature = 2.0
    q = special.expit((z - t).numpy() / temperature)
    expected = temperature**2 / 4 * bernoulli_kl(np.full_like(q, 0.5), q).sum()
    np.testing.assert_allclose(logit_gap_loss(z, t, temperature).item(), expected, rtol=1e-12)


def test_gradients_have_their_closed_forms():
    t, temperature, batch = logits(4, 10, seed=1), 3.0, 4
    z = logits(4, 10).requires_grad_()
    (gap,) = torch.autograd.grad(logit_gap_loss(z, t, temperature), z)
    torch.testing.assert_close(
        gap, temperature / (2 * batch) * torch.tanh((z - t) / (2 * temperature)).detach()
    )
    (coins,) = torch.autograd.grad(binary_kl_loss(z, t, temperature), z)
    expected = temperature / batch * (torch.sigmoid(z / temperature) - torch.sigmoid(t / temperature))
    torch.testing.assert_close(coins, expected.detach())


@pytest.mark.parametrize("loss", [binary_kl_loss, logit_gap_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_give_exactly_no_loss_and_no_gradient(loss, dtype):
    z = logits(8, 50, scale=20.0, dtype=dtype).requires_grad_()
    value = loss(z, z.detach().clone())
    value.backward()
    assert value == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("loss", [binary_kl_loss, logit_gap_loss])
def test_one_unequal_logit_gives_loss_and_gradient(loss):
    t = logits(2, 3)
    z = t.clone()
    z[1, 2] += 0.01
    z.requires_grad_()
    value = loss(z, t)
    value.backward()
    assert value > 0
    assert z.grad.nonzero().tolist() == [[1, 2]]


def test_logit_gap_is_quadratic_for_small_and_linear_for_large_gaps():
    zero = torch.zeros(1, 1)
    for gap in (1e-6, 1e-4, 1e-2):
        value = logit_gap_loss(torch.full((1, 1), gap), zero, 2.0).item()
        assert value == pytest.approx(gap**2 / 8, rel=1e-5)
    for gap in (1e4, 1e6, 1e30):
        z = torch.full((1, 1), -gap, requires_grad=True)
        value = logit_gap_loss(z, zero, 2.0)
        value.backward()
        assert value.item() == pytest.approx(2.0 / 2 * gap - 4 * math.log(2), rel=1e-6)
        assert z.grad.item() == -1.0


@given(st.floats(-1e6, 1e6), temperatures)
@settings(max_examples=25, deadline=None)
def test_logit_gap_gradient_is_bounded_by_half_the_temperature(gap, temperature):
    z = torch.tensor([[gap]], dtype=torch.float32, requires_grad=True)
    logit_gap_loss(z, torch.zeros(1, 1), temperature).backward()
    assert z.grad.abs().item() <= temperature / 2 * (1 + 1e-6)


@given(logit_arrays, logit_arrays)
@settings(max_examples=30, deadline=None)
def test_js_divergence_equals_its_definition_and_is_symmetric_and_bounded(a, b):
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    got = js_divergence_loss(first, second, reduction="none")
    p, q = special.softmax(a, 1), special.softmax(b, 1)
    expected = (special.rel_entr(p, (p + q) / 2) + special.rel_entr(q, (p + q) / 2)).sum(1) / 2
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, js_divergence_loss(second, first, reduction="none"))
    assert (got <= math.log(2) + 1e-12).all()


def test_soft_cross_entropy_equals_torch_for_hard_and_soft_targets():
    z = logits(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    hard = F.one_hot(labels, 4).double()
    torch.testing.assert_close(soft_cross_entropy_loss(z, hard), F.cross_entropy(z, labels))
    soft = torch.softmax(logits(6, 4, seed=1), 1)
    torch.testing.assert_close(soft_cross_entropy_loss(z, soft), F.cross_entropy(z, soft))


def test_cross_entropy_is_entropy_plus_divergence():
    z, t = logits(5, 7), logits(5, 7, seed=1)
    cross = soft_cross_entropy_loss(z, torch.softmax(t, 1), reduction="none")
    torch.testing.assert_close(cross, entropy(t) + distillation_kl_loss(z, t, 1.0, "none"))


def test_entropy_of_known_predictions():
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([1e4, 0.0, -1e4])).item() == 0
    np.testing.assert_allclose(
        entropy(logits(5, 7)).numpy(), stats.entropy(special.softmax(logits(5, 7).numpy(), 1), axis=1)
    )


def test_impossible_classes_count_nothing_and_harm_no_gradient():
    z = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    t = torch.tensor([[2.0, 0.0, -math.inf]], requires_grad=True)
    for loss in PAIR_LOSSES:
        with_impossible = loss(z, t)
        torch.testing.assert_close(with_impossible, loss(z[:, :2], t[:, :2]))
        gradients = torch.autograd.grad(with_impossible, (z, t))
        assert all(g.isfinite().all() for g in gradients)
    h = entropy(z)
    torch.testing.assert_close(h, entropy(z[:, :2]))
    assert torch.autograd.grad(h.sum(), z)[0].isfinite().all()
    ce = soft_cross_entropy_loss(z, torch.tensor([[0.5, 0.5, 0.0]]))
    assert ce.isfinite()
    assert torch.autograd.grad(ce, z)[0].isfinite().all()


def test_a_class_possible_for_the_teacher_alone_costs_infinity_but_bounded_in_js():
    z, t = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert distillation_kl_loss(z, t) == math.inf
    assert binary_kl_loss(z, t) == math.inf
    assert logit_gap_loss(z, t) == math.inf
    assert js_divergence_loss(z, t) < math.log(2)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("extreme", [1e4, 1e30])
def test_extreme_logits_stay_finite(loss, extreme):
    z = torch.tensor([[extreme, -extreme], [0.0, extreme]], requires_grad=True)
    t = torch.tensor([[-extreme, extreme], [0.0, extreme]], requires_grad=True)
    value = loss(z, t)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()
    assert t.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    z, t = logits(4, 10).to(dtype).requires_grad_(), logits(4, 10, seed=1).to(dtype)
    value = loss(z, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(z.float(), t.float()))
    value.backward()
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_reductions_and_batch_dimensions_agree(loss):
    z, t = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    each = loss(z, t, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(loss(z, t, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(z, t), each.mean())
    torch.testing.assert_close(loss(z, t), loss(z.flatten(0, 1), t.flatten(0, 1)))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_an_empty_batch_costs_nothing_and_has_a_gradient(loss):
    z = torch.zeros(0, 5, requires_grad=True)
    value = loss(z, torch.zeros(0, 5))
    value.backward()
    assert value == 0
    assert z.grad.shape == (0, 5)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_gradcheck_on_both_sides_and_twice(loss):
    z, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, temperature=1.5), (z, t))
    assert torch.autograd.gradgradcheck(lambda a, b: loss(a, b, temperature=1.5), (z, t))


@pytest.mark.parametrize("loss", [binary_kl_loss, logit_gap_loss])
def test_batched_gradients_equal_gradients_one_by_one(loss):
    z, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    each = loss(z, t, reduction="none")
    (batched,) = torch.autograd.grad(each, z, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in each]
    torch.testing.assert_close(batched, torch.stack(singly))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named(loss):
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        loss(z, z, 0.0)
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3\) of .*, got \(2, 4\)"):
        loss(z, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="reduction must be .*, got 'mean'"):
        loss(z, z, reduction="mean")
    with pytest.raises(ValueError, match=r"at least one class in the last dimension, got \(2, 0\)"):
        loss(z[:, :0], z[:, :0])


@pytest.mark.usefixtures("as_users_call")
def test_entropy_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one class"):
        entropy(torch.zeros(2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
def test_the_target_log_probability_is_minus_the_cross_entropy(shape, dtype):
    logits, target = torch.randn(*shape, 5).mul(20).to(dtype), torch.randint(5, shape, dtype=torch.uint8)
    found = target_log_probability(logits, target)
    wide = logits.float() if dtype == torch.float16 else logits
    expected = -F.cross_entropy(wide.reshape(-1, 5), target.long().reshape(-1), reduction="none")
    torch.testing.assert_close(found, expected.reshape(shape))


def test_the_target_log_probability_of_the_impossible_the_certain_and_nothing():
    logits = torch.tensor([[-math.inf, 0.0], [200.0, 0.0]], requires_grad=True)
    found = target_log_probability(logits, torch.tensor([0, 0]))
    assert found.tolist() == [-math.inf, 0.0]
    found[1].backward()
    assert logits.grad.isfinite().all()
    assert target_log_probability(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.usefixtures("as_users_call")
def test_a_target_that_is_no_class_is_named():
    with pytest.raises(ValueError, match=r"class numbers in \[0, 3\), got 3"):
        target_log_probability(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"class numbers in \[0, 3\), got -100"):
        target_log_probability(torch.zeros(2, 3), torch.tensor([0, -100]))
    with pytest.raises(ValueError, match="logits must have the shape"):
        target_log_probability(torch.zeros(2, 3), torch.tensor([0]))
