import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    AdversarialCompSumLoss,
    CompSumLoss,
    comp_sum_loss,
    margin_shift,
    projected_gradient_attack,
    target_margins,
)
from coloss.nn import MLP

TAUS = (0.0, 0.5, 0.999, 1.0, 1.001, 1.5, 1.7, 2.0, 3.0)


def batch(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(rows, classes, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (rows,))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_it_is_the_sum_over_rivals_put_through_its_transform(tau: float, rho: float) -> None:
    logits, target = batch()
    z, y = logits.detach().numpy() / rho, target.numpy()
    for row, value in enumerate(comp_sum_loss(logits, target, tau=tau, rho=rho, reduction="none").tolist()):
        u = sum(math.exp(z[row, k] - z[row, y[row]]) for k in range(5) if k != y[row])
        expected = math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
        assert value == pytest.approx(expected, rel=1e-9)


def test_known_members_of_the_family() -> None:
    logits, target = batch()
    p = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    for tau, expected in ((0.0, 1 / p - 1), (1.7, (1 - p**0.7) / 0.7), (2.0, 1 - p)):
        torch.testing.assert_close(comp_sum_loss(logits, target, tau=tau, reduction="none"), expected)
    mae = (logits.softmax(1) - F.one_hot(target, 5)).abs().sum(1)
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=2.0, reduction="none"), mae / 2)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["plain", "weighted", "ignored", "soft", "image"])
def test_at_tau_one_it_is_torchs_cross_entropy(kind: str, smoothing: float, reduction: Any) -> None:
    logits, target = batch()
    options: dict[str, Any] = {}
    if kind == "image":
        logits = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
        target, options = torch.randint(5, (2, 3, 4)), {"ignore_index": 2}
    if kind in ("weighted", "ignored", "soft"):
        options["weight"] = torch.rand(5, dtype=torch.float64)
    if kind == "ignored":
        target[1:3] = -100
    if kind == "soft":
        target = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    theirs = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction, **options)
    ours = comp_sum_loss(logits, target, label_smoothing=smoothing, reduction=reduction, **options)
    torch.testing.assert_close(ours, theirs)
    (first,) = torch.autograd.grad(theirs.sum(), logits)
    (second,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("tau", TAUS)
def test_its_gradient_is_that_of_cross_entropy_times_a_power_of_the_probability(tau: float) -> None:
    logits, target = batch()
    p = logits.detach().softmax(1)
    weight = p.gather(1, target[:, None]) ** (tau - 1)
    (gradient,) = torch.autograd.grad(comp_sum_loss(logits, target, tau=tau, reduction="sum"), logits)
    torch.testing.assert_close(gradient, weight * (p - F.one_hot(target, 5)))
    assert torch.autograd.gradcheck(lambda z: comp_sum_loss(z, target, tau=tau), (logits,))
    assert torch.autograd.gradgradcheck(lambda z: comp_sum_loss(z, target, tau=tau), (logits,))


def test_the_gradient_keeps_its_digits_where_the_right_class_is_hopeless() -> None:
    logits = torch.tensor([[0.0, 40.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(comp_sum_loss(logits, torch.tensor([0]), tau=1.7), logits)
    assert gradient[0, 1].item() == pytest.approx(math.exp(-28), rel=1e-5)


@settings(max_examples=30)
@given(st.floats(-20, 20), st.sampled_from([-1e-4, -1e-9, 1e-15, 1e-9, 1e-4]))
def test_it_is_continuous_at_cross_entropy(margin: float, distance: float) -> None:
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        logits, target = torch.tensor([[margin, 0.0]], dtype=dtype), torch.tensor([0])
        plain = comp_sum_loss(logits, target).item()
        near = comp_sum_loss(logits, target, tau=1 + distance).item()
        assert abs(near - plain) <= abs(distance) * plain**2 + rounding * (1 + plain)


@settings(max_examples=30)
@given(st.sampled_from(TAUS), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(tau: float, shift: float) -> None:
    logits, target = batch()
    torch.testing.assert_close(
        comp_sum_loss(logits + shift, target, tau=tau), comp_sum_loss(logits, target, tau=tau)
    )


@settings(max_examples=30)
@given(st.floats(-30, 30), st.integers(2, 10))
def test_it_falls_with_tau_and_bounds_the_error(margin: float, classes: int) -> None:
    logits = torch.zeros(1, classes, dtype=torch.float64)
    logits[0, 0] = margin
    values = [comp_sum_loss(logits, torch.tensor([0]), tau=tau).item() for tau in TAUS]
    assert all(first >= second - 1e-12 for first, second in zip(values, values[1:]))
    if margin < 0:  # wrong: u >= 1, so each loss is at least its value at u = 1
        at_one = [1.0 if tau == 0 else math.log(2) if tau == 1 else (2 ** (1 - tau) - 1) / (1 - tau) for tau in TAUS]  # fmt: skip
        assert all(value >= bound - 1e-12 for value, bound in zip(values, at_one))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_values_and_gradients(tau: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4, 0.0], [0.0, 0.0, 0.0], [-300.0, 0.0, 90.0]], dtype=dtype)
    logits.requires_grad_()
    losses = comp_sum_loss(logits, torch.tensor([0, 1, 0]), tau=tau, reduction="none")
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert bool(losses.isfinite().all()) and logits.grad is not None
    if tau >= 1 or dtype == torch.float32:  # the gradient of a half-precision logit may not fit
        assert bool(logits.grad.isfinite().all())


def test_below_one_a_hopeless_sample_still_pulls() -> None:
    logits = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    comp_sum_loss(logits, torch.tensor([0]), tau=0.0).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[0, 0] < -1e30


def test_an_impossible_class() -> None:
    logits, target = torch.tensor([[-math.inf, 0.0, 1.0]]), torch.tensor([0])
    assert comp_sum_loss(logits, target).item() == math.inf
    assert comp_sum_loss(logits, target, tau=1.5).item() == 2.0
    soft = torch.tensor([[0.0, 0.5, 0.5]])
    assert comp_sum_loss(logits, soft).item() == pytest.approx(F.cross_entropy(logits[:, 1:], soft[:, 1:]))


def test_nothing_costs_nothing() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    ignored = comp_sum_loss(logits, torch.full((3,), -100), tau=1.5)
    ignored.backward()
    assert ignored.item() == 0 and logits.grad is not None and not logits.grad.any()
    assert comp_sum_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), tau=1.5).item() == 0
    assert comp_sum_loss(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0


def test_soft_targets_mix_the_losses_of_the_classes() -> None:
    logits, _ = batch()
    shares = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    apart = [
        comp_sum_loss(logits, torch.full((6,), k), tau=1.6, reduction="none") * shares[:, k] for k in range(5)
    ]
    mixed = comp_sum_loss(logits, shares, tau=1.6, reduction="none")
    torch.testing.assert_close(mixed, torch.stack(apart).sum(0))


def test_the_module_is_the_function_and_keeps_its_weights_in_its_state() -> None:
    logits, target = batch()
    weight = torch.rand(5, dtype=torch.float64)
    module = CompSumLoss(weight, tau=1.4, rho=2.0, label_smoothing=0.1, reduction="sum")
    expected = comp_sum_loss(logits, target, weight, tau=1.4, rho=2.0, label_smoothing=0.1, reduction="sum")
    assert torch.equal(module(logits, target), expected)
    assert list(module.state_dict()) == ["weight"] and "tau=1.4" in repr(module)


# Margins and the adversarial loss


def test_margins_and_their_shift_by_hand() -> None:
    logits, target = torch.tensor([[1.0, 4.0, 2.0], [0.0, 5.0, 5.0]]), torch.tensor([0, 2])
    assert target_margins(logits, target).tolist() == [[-3.0, -1.0], [5.0, 0.0]]
    changed = logits + torch.tensor([[1.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    assert margin_shift(changed, logits, target).tolist() == pytest.approx([math.sqrt(2), 0.0])
    assert target_margins(logits[:, :1], torch.zeros(2, dtype=torch.int64)).shape == (2, 0)


def test_a_shift_of_zero_has_a_zero_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    margin_shift(logits, logits.detach(), torch.tensor([0, 1, 2])).sum().backward()
    assert logits.grad is not None and not logits.grad.any()


def new_model() -> MLP:
    return MLP(4, [8], 3, norm=None)


def attack(**options: Any) -> Any:
    return partial(projected_gradient_attack, **({"eps": 0.3, "steps": 5} | options))


@pytest.mark.parametrize("options", [{"nu": 0.0}, {"nu": 3.0, "attack": attack(eps=0.0)}])
def test_without_weight_or_radius_the_clean_loss_is_left(options: dict[str, Any]) -> None:
    model, inputs, target = new_model(), torch.randn(8, 4), torch.randint(3, (8,))
    total, parts = AdversarialCompSumLoss(tau=1.3, rho=2.0, **options)(model, inputs, target)
    expected = comp_sum_loss(model(inputs), target, tau=1.3, rho=2.0)
    assert torch.equal(total, expected) and torch.equal(parts["clean"], expected)
    if "attack" in options:
        assert parts["smooth"] == 0


def test_the_gradient_flows_through_clean_and_attacked_logits() -> None:
    model, inputs, target = new_model(), torch.randn(8, 4), torch.randint(3, (8,))
    found: list[Tensor] = []

    def keep(model: Any, inputs: Tensor, objective: Any) -> Tensor:
        found.append(attack()(model, inputs, objective))
        return found[-1]

    total, parts = AdversarialCompSumLoss(tau=1.5, nu=2.0, attack=keep)(model, inputs, target)
    clean, changed = model(inputs), model(found[0])
    by_hand = (1 - clean.softmax(1)[torch.arange(8), target] ** 0.5).mean() / 0.5
    rows = torch.arange(8)
    margins = [z[rows, target][:, None] - z for z in (changed, clean)]
    by_hand = by_hand + 2 * (margins[0] - margins[1]).norm(dim=1).mean()
    torch.testing.assert_close(total, by_hand)
    parameters = list(model.parameters())
    for first, second in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(by_hand, parameters)
    ):
        torch.testing.assert_close(first, second)
    assert parts["smooth"] > 0


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_a_large_nu_bounds_the_rho_margin_loss_at_the_worst_input(tau: float) -> None:
    """Theorem of the paper: from nu = sqrt(n - 1) / rho on; checked against every input that random search finds."""
    rho, eps, classes = 0.7, 0.3, 3
    model, inputs, target = new_model().double(), torch.randn(16, 4).double(), torch.randint(3, (16,))
    logits = model(inputs)
    clean = comp_sum_loss(logits, target, tau=tau, rho=rho, reduction="none")

    def rho_margin(outputs: Tensor) -> Tensor:
        u = (1 - target_margins(outputs, target) / rho).clamp(0, 1).sum(1)
        return torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)

    shifts, worst = torch.zeros(16), torch.zeros(16)
    tried = [inputs + eps * (2 * torch.rand_like(inputs) - 1) for _ in range(200)]
    tried.append(
        attack(eps=eps)(model, inputs, lambda outputs: margin_shift(outputs, logits.detach(), target))
    )
    for changed in tried:
        outputs = model(changed)
        shifts = torch.maximum(shifts, margin_shift(outputs, logits, target))
        worst = torch.maximum(worst, rho_margin(outputs))
        wrong = (outputs.argmax(1) != target).double()
        # A wrong decision has u >= 1, so it costs at least the transform of 1.
        one = math.log(2) if tau == 1 else (2 ** (1 - tau) - 1) / (1 - tau)
        assert bool((one * wrong <= rho_margin(outputs) + 1e-9).all())
    bound = clean + math.sqrt(classes - 1) / rho * shifts
    assert bool((worst <= bound + 1e-9).all())


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: comp_sum_loss(z, y, tau=-0.1), "tau must be >= 0 and finite, got -0.1"),
        (lambda z, y: comp_sum_loss(z, y, tau=math.nan), "tau must be >= 0 and finite, got nan"),
        (lambda z, y: comp_sum_loss(z, y, rho=0.0), "rho must be > 0 and finite, got 0.0"),
        (lambda z, y: comp_sum_loss(z, y, reduction="batchmean"), "reduction must be .* got 'batchmean'"),
        (lambda z, y: comp_sum_loss(z, y, label_smoothing=2.0), r"label_smoothing must be in \[0, 1\], got 2.0"),
        (lambda z, y: comp_sum_loss(z, y[:2]), r"class numbers of shape \(3,\), got \(2,\)"),
        (lambda z, y: comp_sum_loss(z, z[:2]), r"probabilities of shape \(3, 4\), got \(2, 4\)"),
        (lambda z, y: comp_sum_loss(z, y + 4), r"class numbers in \[0, 4\), got 4"),
        (lambda z, y: comp_sum_loss(z[0], y), r"a batch and a class dimension, got shape \(4,\)"),
        (lambda z, y: comp_sum_loss(z, y, torch.ones(3)), r"one entry for each of 4 classes, got \(3,\)"),
        (lambda z, y: CompSumLoss(tau=-1.0), "tau must be >= 0 and finite, got -1.0"),
        (lambda z, y: AdversarialCompSumLoss(nu=-1.0), "nu must be >= 0 and finite, got -1.0"),
        (lambda z, y: margin_shift(z[:, :2], z, y), "changed_logits must have the shape"),
        (lambda z, y: target_margins(z, y[:2]), "target must have 3 class numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))


def test_a_numpy_twin_of_the_weighted_mean() -> None:
    logits, target = batch(9, 4)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    z = logits.detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    py, w = p[np.arange(9), target], weight.numpy()[target]
    expected = (w * (py**0.5 - 1) / -0.5).sum() / w.sum()
    assert comp_sum_loss(logits, target, weight, tau=1.5).item() == pytest.approx(expected)
