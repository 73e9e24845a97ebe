import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coloss.nn import MLP, ConvNet, Frozen, SharedTeacher


def test_a_shared_teacher_runs_once_for_one_batch() -> None:
    teacher = SharedTeacher(ConvNet(1, (4, 8)))
    teacher.watch(["stages.0", "stages.1:input"])
    first, second = torch.rand(2, 3, 1, 8, 8)
    output = teacher(first)
    assert teacher(first) is output and teacher.passes == 1
    features = teacher.features(first)
    assert teacher.passes == 1 and features["stages.0"] is features["stages.1:input"]
    torch.testing.assert_close(output, teacher.module(first))
    assert not output.requires_grad and not features["stages.0"].requires_grad
    teacher(second)
    teacher(first)
    assert teacher.passes == 3


def changed_in_place(inputs: Tensor) -> Tensor:
    return inputs.add_(1)


@pytest.mark.parametrize("change", [changed_in_place, torch.clone, lambda inputs: inputs[:]])
def test_what_is_not_the_same_object_unchanged_is_run_again(change: Callable[[Tensor], Tensor]) -> None:
    teacher, inputs = SharedTeacher(nn.Linear(4, 3)), torch.randn(5, 4)
    teacher(inputs)
    changed = change(inputs)
    torch.testing.assert_close(teacher(changed), teacher.module(changed))
    assert teacher.passes == 2


def test_inputs_that_are_gone_are_not_mistaken_for_new_ones() -> None:
    teacher = SharedTeacher(nn.Linear(4, 3))
    for number in range(20):
        inputs = torch.full((5, 4), float(number))
        torch.testing.assert_close(teacher(inputs), teacher.module(inputs))
        del inputs
    assert teacher.passes == 20


class Sum(nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["a"] + inputs["b"]


def test_nested_inputs_are_told_apart_leaf_by_leaf() -> None:
    teacher, a, b = SharedTeacher(Sum()), torch.ones(2), torch.ones(2)
    teacher({"a": a, "b": b})
    teacher({"a": a, "b": b})
    assert teacher.passes == 1
    torch.testing.assert_close(teacher({"a": a, "b": b + 1}), torch.full((2,), 3.0))
    assert teacher.passes == 2


def test_precision_belongs_to_what_is_remembered() -> None:
    teacher, inputs = SharedTeacher(nn.Linear(4, 3)), torch.randn(5, 4)
    teacher(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(inputs).dtype == torch.bfloat16
    assert teacher(inputs).dtype == torch.float32


def test_a_place_watched_later_is_read_anew_and_moving_forgets() -> None:
    teacher, inputs = SharedTeacher(MLP(4, [8], 3)), torch.randn(5, 4)
    teacher(inputs)
    path = next(name for name, module in teacher.module.named_modules() if isinstance(module, nn.Linear))
    teacher.watch([path])
    assert teacher.features(inputs)[path].shape == (5, 8)
    teacher.double()
    assert teacher(inputs.double()).dtype == torch.float64
    copied = copy.deepcopy(teacher)
    assert copied.features(inputs.double())[path].shape == (5, 8)
    teacher.unwatch()
    assert not any(module._forward_hooks for module in teacher.modules())
    with pytest.raises(ValueError, match="must name a module of the model, got 'nowhere'"):
        teacher.watch(["nowhere"])


def test_a_frozen_network_is_not_wrapped_twice() -> None:
    network = nn.Linear(4, 3)
    assert SharedTeacher(Frozen(network)).module is network
    assert SharedTeacher(SharedTeacher(network)).module is network
    assert not network.training and not network.weight.requires_grad


class Either(nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["a"] if "a" in inputs else -inputs["b"]


def test_the_nesting_of_inputs_belongs_to_what_is_remembered() -> None:
    teacher, inputs = SharedTeacher(Either()), torch.ones(2)
    assert torch.equal(teacher({"a": inputs}), inputs) and torch.equal(teacher({"b": inputs}), -inputs)


@pytest.mark.parametrize("around", [lambda teacher: teacher, lambda teacher: nn.ModuleList([teacher])])
def test_loaded_weights_make_it_forget(around: Callable[[SharedTeacher], nn.Module]) -> None:
    teacher, inputs = SharedTeacher(nn.Linear(4, 3)), torch.randn(5, 4)
    teacher(inputs)
    whole = around(teacher)
    whole.load_state_dict({name: 0 * value for name, value in whole.state_dict().items()})
    assert torch.equal(teacher(inputs), torch.zeros(5, 3))
