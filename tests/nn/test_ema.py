import copy

import pytest
import torch
from torch import nn

from coloss.nn import MLP, ModuleEMA


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_closed_form_for_constant_weights():
    model = nn.Linear(3, 2).double()
    fill(model, 1.0)
    average = ModuleEMA(model, 0.9)
    fill(model, 5.0)
    for _ in range(10):
        average.update()
    expected = 5 + 0.9**10 * (1 - 5)
    assert torch.allclose(
        average.module.weight, torch.full((2, 3), expected, dtype=torch.float64), atol=1e-14
    )


def test_decay_one_changes_no_bit_and_zero_copies_all_bits():
    model = MLP(4, [8], 3)
    still, follower = ModuleEMA(model, 1.0), ModuleEMA(model, 0.0)
    start = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    still.update()
    follower.update()
    for kept, first in zip(still.module.parameters(), start.parameters(), strict=True):
        assert torch.equal(kept, first)
    for copied, new in zip(follower.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(copied, new)


def test_equals_the_recursion_along_a_run():
    model = nn.Linear(3, 1)
    average = ModuleEMA(model, 0.7)
    expected = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        average.update()
        expected = 0.7 * expected + 0.3 * model.weight.detach()
    assert torch.allclose(average.module.weight, expected, atol=1e-7)


def test_decay_function_counts_updates_from_zero():
    seen = []
    model = nn.Linear(1, 1)
    average = ModuleEMA(model, lambda update: seen.append(update) or 0.5)
    for _ in range(3):
        average.update()
    assert seen == [0, 1, 2]
    resumed = ModuleEMA(nn.Linear(1, 1), lambda update: seen.append(update) or 0.5)
    resumed.load_state_dict(average.state_dict())
    resumed.update()
    assert seen[-1] == 3
    assert int(resumed.updates) == 4


@pytest.mark.parametrize(("mode", "expected"), [("copy", 4.0), ("ema", 1.0)])
def test_buffers_are_copied_or_averaged_and_integers_always_copied(mode, expected):
    model = nn.BatchNorm1d(2)
    average = ModuleEMA(model, 0.75, buffers=mode)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(9)
    average.update()
    assert average.module.running_mean.tolist() == [expected, expected]
    assert int(average.module.num_batches_tracked) == 9


def test_followed_module_is_left_alone_and_not_part_of_the_state():
    model = MLP(4, [8], 3)
    average = ModuleEMA(model, 0.5)
    assert not list(filter(lambda parameter: parameter.requires_grad, average.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert len(average.state_dict()) == len(model.state_dict()) + 1
    assert set(map(id, average.parameters())).isdisjoint(map(id, model.parameters()))


def test_copy_stays_in_evaluation_mode_without_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    holder = nn.ModuleDict({"teacher": ModuleEMA(model)}).train()
    teacher = holder["teacher"]
    x = torch.randn(3, 4, requires_grad=True)
    statistics = teacher.module[2].running_mean.clone()
    assert torch.equal(teacher(x), teacher(x))
    assert not teacher(x).requires_grad
    assert torch.equal(teacher.module[2].running_mean, statistics)
    assert not any(module.training for module in teacher.module.modules())


def test_infinite_weights_leave_a_decay_of_one_alone():
    model = nn.Linear(1, 1)
    fill(model, 2.0)
    average = ModuleEMA(model, 1.0)
    fill(model, float("inf"))
    average.update()
    assert average.module.weight.item() == 2


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    fill(model, 1.0)
    average = ModuleEMA(model, 0.5)
    fill(model, 3.0)
    average.update()
    assert average.module[0].weight is average.module[1].weight
    assert average.module[0].weight.unique().tolist() == [2.0]


def test_refuses_bad_decays_and_changed_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        ModuleEMA(model, 1.5)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -0.5"):
        ModuleEMA(model, lambda update: -0.5).update()
    average = ModuleEMA(model)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got changes: \['1.bias', '1.weight'\]"):
        average.update()
    assert int(average.updates) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_what_it_follows(dtype):
    """A step of 0.005 of the difference is less than half of what these types resolve."""
    model = nn.Linear(1, 1).to(dtype)
    fill(model, 1.0)
    average = ModuleEMA(model, 0.995)
    fill(model, 1.5)
    for _ in range(1000):
        average.update()
    resumed = ModuleEMA(nn.Linear(1, 1).to(dtype), 0.995)
    resumed.load_state_dict(average.state_dict())
    resumed._followed = (model,)
    for _ in range(1000):
        resumed.update()
    assert resumed.module.weight.dtype == dtype
    assert resumed.module.weight.item() == pytest.approx(1.5, abs=1e-2)
    # What someone writes to the copy is where it goes on from.
    fill(resumed.module, 4.0)
    resumed.update()
    assert resumed.module.weight.item() == pytest.approx(4.0, abs=0.02)
