from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification import projected_gradient_attack, robust_accuracy
from coloss.nn import MLP


def linear(weights: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weights[0]), len(weights), bias=False)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.weight += torch.tensor(weights)
    return layer


def total(outputs: Tensor) -> Tensor:
    return outputs.sum(1)


def test_against_a_linear_model_the_attack_finds_the_corner_or_the_gradient_direction() -> None:
    model, inputs = linear([[3.0, -4.0]]), torch.randn(5, 2)
    corner = projected_gradient_attack(model, inputs, total, eps=0.2)
    torch.testing.assert_close(corner - inputs, torch.tensor([[0.2, -0.2]]).expand(5, 2))
    along = projected_gradient_attack(model, inputs, total, eps=0.2, norm="l2", step=0.1, steps=60)
    torch.testing.assert_close(
        along - inputs, torch.tensor([[0.12, -0.16]]).expand(5, 2), atol=1e-3, rtol=0.02
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_stays_in_the_ball_and_in_bounds_and_climbs(norm: Any) -> None:
    model, inputs, target = MLP(6, [16], 3), torch.rand(32, 6), torch.randint(3, (32,))

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, reduction="none")

    changed = projected_gradient_attack(model, inputs, loss, eps=0.3, norm=norm, bounds=(0.0, 1.0))
    shift = changed - inputs
    length = shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)
    assert bool((length <= 0.3 + 1e-6).all()) and bool((length > 0.05).all())
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert bool(loss(model.eval()(changed)).mean() > loss(model(inputs)).mean() + 0.05)


def test_the_random_start_fills_the_ball() -> None:
    still = partial(
        projected_gradient_attack, linear([[0.0, 0.0]]), torch.zeros(4000, 2), total, eps=1.0, steps=1
    )
    box, disc = still(), still(norm="l2")
    assert float(box.abs().mean()) == pytest.approx(0.5, abs=0.02)
    # Uniform in a disc: the mean radius is 2/3.
    assert float(disc.norm(dim=1).mean()) == pytest.approx(2 / 3, abs=0.02)


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator, inputs = torch.Generator().manual_seed(3), torch.randn(6, 4)
    global_state = torch.get_rng_state()
    first = projected_gradient_attack(model, inputs, total, generator=generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), global_state)
    again = projected_gradient_attack(model, inputs, total, generator=generator.manual_seed(3))
    assert torch.equal(first, again)
    one_step = partial(projected_gradient_attack, model, inputs, total, steps=1, step=1e-3)
    assert not torch.equal(one_step(), one_step())


def test_a_radius_of_zero_and_an_empty_batch_give_the_inputs_back() -> None:
    inputs = torch.randn(3, 2)
    same = projected_gradient_attack(linear([[1.0, 1.0]]), inputs, total, eps=0.0)
    assert torch.equal(same, inputs) and same is not inputs
    assert projected_gradient_attack(linear([[1.0, 1.0]]), torch.zeros(0, 2), total).shape == (0, 2)


def test_half_precision_inputs_are_attacked_in_their_type_and_without_nan() -> None:
    inputs = torch.rand(4, 2).bfloat16()
    changed = projected_gradient_attack(linear([[1.0, -1.0]]).bfloat16(), inputs, total, eps=0.25)
    assert changed.dtype == torch.bfloat16
    torch.testing.assert_close(
        (changed - inputs).float(), torch.tensor([[0.25, -0.25]]).expand(4, 2), atol=0.01, rtol=0
    )
    nowhere = projected_gradient_attack(
        linear([[1.0, -1.0]]), torch.ones(4, 2), lambda outputs: outputs.sum(1) * torch.nan, eps=0.1
    )
    assert bool(nowhere.isfinite().all())


def test_inside_no_grad_it_attacks_all_the_same() -> None:
    with torch.no_grad():
        changed = projected_gradient_attack(linear([[1.0, 1.0]]), torch.zeros(1, 2), total, eps=0.5)
    torch.testing.assert_close(changed, torch.full((1, 2), 0.5))


def test_robust_accuracy_counts_what_no_small_change_turns() -> None:
    model = linear([[1.0], [-1.0]])  # the boundary is at 0
    inputs, target = torch.tensor([[2.0], [0.2], [-1.0], [-0.3]]), torch.tensor([0, 0, 0, 1])
    for eps, expected in ((0.0, 0.75), (0.25, 0.5), (0.5, 0.25), (3.0, 0.0)):
        attack = partial(projected_gradient_attack, eps=eps)
        assert float(robust_accuracy(model, inputs, target, attack)) == expected
    assert float(robust_accuracy(model, inputs, target)) == 0.75
    assert bool(robust_accuracy(model, inputs[:0], target[:0]).isnan())


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0 and finite, got -0.1"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"step": 0.0}, "step must be > 0 and finite, got 0.0"),
        ({"norm": "l1"}, "norm must be .* got 'l1'"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be \(low, high\)"),
        ({"bounds": (0.5, 1.0)}, r"inputs must lie within bounds \(0.5, 1.0\), got 0.0 to 0.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projected_gradient_attack(linear([[1.0, 1.0]]), torch.zeros(1, 2), total, **options)


def test_an_objective_that_is_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="objective must depend on the model's outputs"):
        projected_gradient_attack(
            linear([[1.0, 1.0]]), torch.zeros(1, 2), lambda outputs: outputs.detach().sum(1)
        )
