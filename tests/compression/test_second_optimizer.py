"""Facts about AdamS beside another optimizer: when it steps, what it hides, and how to be rid of it."""

import pytest
import torch
from torch import nn

from coloss.compression import AdamS, SecondOptimizer
from coloss.errors import InputError


def pair(
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5), learning_rate=None
):
    weight, bias = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(1))
    adam = AdamS(
        [{"params": [weight], "sparse": True}], nm=(4, 4), total_steps=10, correct_second_moment=True
    )
    optimizer = optimizer([weight, bias])
    second = SecondOptimizer(adam, {"weight": weight}, learning_rate)
    second.attach(optimizer)
    return weight, bias, optimizer, second


def test_with_a_closure_it_steps_after_the_gradients_are_made_and_gives_the_loss():
    weight, bias, optimizer, _ = pair()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = weight.sum() + bias.sum()
        loss.backward()
        calls.append(loss.detach())
        return loss

    for step in (1, 2):
        given = optimizer.step(closure) if step == 1 else optimizer.step(closure=closure)
        assert given.item() == calls[-1].item()
        # One rate of AdamS, and no weight decay of the other.
        torch.testing.assert_close(weight.detach(), torch.full((1, 4), 1 - 0.1 * step))
    assert len(calls) == 2


def test_attached_twice_it_steps_once_and_detached_not_at_all():
    weight, bias, optimizer, second = pair()
    second.attach(optimizer)
    weight.grad, bias.grad = torch.ones(1, 4), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((1, 4), 0.9))
    assert weight.grad is None and bias.item() == pytest.approx(1 - 0.1 * 0.5)
    second.detach()
    weight.grad = torch.ones(1, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((1, 4), 0.9 - 0.1 * (1 + 0.5 * 0.9)))


def test_state_goes_out_and_in_and_what_does_not_fit_is_told():
    weight, bias, optimizer, second = pair()
    weight.grad = torch.ones(1, 4)
    optimizer.step()
    stored = {name: value.clone() for name, value in second.tensors()}
    assert sorted(stored) == ["weight.mask", "weight.mu", "weight.step", "weight.v"]
    other, _, _, fresh = pair()
    assert fresh.load(stored) == []
    assert fresh.adam.state[other]["step"] == 1
    assert torch.equal(fresh.adam.state[other]["mu"], stored["weight.mu"])
    complaints = fresh.load({"weight.mu": torch.ones(3), "bias.mu": torch.ones(1)})
    assert complaints == ["weight.mu has shape (3,), the weight (1, 4)", "bias.mu is of no chosen layer"]


def test_a_stored_state_takes_the_place_of_the_present_one():
    """Trap: a state from before the first step is empty, and would leave averages and step count as they are."""
    weight, _, optimizer, second = pair()
    before = dict(second.tensors())
    weight.grad = torch.ones(1, 4)
    optimizer.step()
    assert before == {} and second.load(before) == []
    assert dict(second.tensors()) == {}


@pytest.mark.parametrize("initial", [{"initial_lr": 0.05}, {}])
def test_a_rate_of_its_own_falls_with_the_group_of_the_weights(initial):
    """Trap: the optimizer's default is not the base rate of a group that was given one."""

    def optimizer(parameters):
        return torch.optim.AdamW([{"params": parameters, "lr": 0.05} | initial])

    if not initial:
        with pytest.raises(InputError, match=r'must have group\["initial_lr"\].* got lr 0.05 only'):
            pair(optimizer, learning_rate=0.01)
        return
    weight, _, optimizer, second = pair(optimizer, learning_rate=0.01)
    for factor in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        weight.grad = torch.ones(1, 4)
        optimizer.step()
        assert second.adam.param_groups[0]["lr"] == pytest.approx(0.01 * factor)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_fused_optimizer_under_a_scaler_is_refused(unscaled):
    """Trap: it gets scaled gradients, or infinite ones, and knows itself what to do with them."""
    weight, bias, optimizer, _ = pair(lambda parameters: torch.optim.AdamW(parameters, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.sum() + bias.sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(InputError, match="must not be fused under a GradScaler.* fused=False"):
        scaler.step(optimizer)
    assert torch.equal(weight.detach(), torch.ones(1, 4))


def test_an_optimizer_that_calls_its_closure_again_is_refused():
    """Trap: each call would be a step of AdamS."""
    weight, bias, optimizer, second = pair(torch.optim.LBFGS)

    def closure():
        optimizer.zero_grad()
        loss = (weight.sum() + bias.sum()).square()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="must call its closure once a step, got a second call from LBFGS"):
        optimizer.step(closure)
    assert second.adam.state[weight]["step"] == 1
