import copy
import pickle

import pytest
import torch
from torch import nn

from coloss.nn import MLP, Classifier, DualEncoder, ModuleEMA, Taps, find_classifier


def model_and_inputs() -> tuple[Classifier, torch.Tensor]:
    return Classifier(MLP(4, [8, 6]), 3), torch.randn(5, 4)


def hooks(model: nn.Module) -> list[object]:
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_values_are_the_tensors_themselves():
    model, x = model_and_inputs()
    taps = Taps(model, {"features": "backbone", "pre_head": "head:input", "all": "", "image": ":input"})
    logits = model(x)
    assert taps["all"] is logits
    assert taps["image"] is x
    assert taps["pre_head"] is taps["features"]
    assert torch.equal(model.head(taps["features"]), logits)


def test_losses_on_taps_reach_the_layers_before_them_only():
    model, x = model_and_inputs()
    with Taps(model, {"features": "backbone"}) as taps:
        model(x)
    taps["features"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
    assert model.head.weight.grad is None


def test_detach_cuts_the_graph_in_nested_values():
    model = DualEncoder(nn.Linear(4, 2), nn.Linear(4, 2))
    pair = (torch.rand(3, 4), torch.rand(3, 4))
    with Taps(model, {"pair": ""}, detach=True) as cut, Taps(model, {"pair": ""}) as whole:
        model(pair)
    assert isinstance(cut["pair"], tuple)
    assert [value.requires_grad for value in cut["pair"]] == [False, False]
    assert [value.requires_grad for value in whole["pair"]] == [True, True]


def test_reads_inputs_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(input=x)

    model, x = Named(), torch.rand(1, 2)
    with Taps(model, {"given": "layer:input"}) as taps:
        model(x)
    assert taps["given"] is x


def test_holds_the_last_pass_and_the_last_call():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    with Taps(model, {"layer": "0"}) as taps:
        model(torch.rand(1, 2))
        result = model(torch.ones(1, 2))
    assert taps["layer"] is result


def test_model_is_as_before_after_close():
    model, x = model_and_inputs()
    model.eval()
    before = pickle.dumps(model)
    keys = list(model.state_dict())
    with Taps(model, {"features": "backbone", "pre_head": "head:input"}):
        assert list(model.state_dict()) == keys
        assert len(list(model.parameters())) == len(keys) - 6
        model(x)
    assert pickle.dumps(model) == before
    assert not hooks(model)


def test_values_stay_after_close_until_cleared():
    model, x = model_and_inputs()
    with Taps(model, {"features": "backbone"}) as taps:
        model(x)
    assert taps["features"].shape == (5, 6)
    taps.clear()
    with pytest.raises(RuntimeError, match="tap 'features' has no value"):
        taps["features"]


def test_two_sets_of_taps_do_not_disturb_each_other():
    model, x = model_and_inputs()
    first, second = Taps(model, {"a": "backbone"}), Taps(model, {"a": "head"})
    first.close()
    model(x)
    assert second["a"].shape == (5, 3)
    with pytest.raises(RuntimeError, match="no forward pass"):
        first["a"]


def test_places_can_be_added_later():
    model, x = model_and_inputs()
    taps = Taps(model, {"features": "backbone"})
    taps.add("logits", "head")
    assert torch.equal(model(x), taps["logits"])
    assert list(taps) == ["features", "logits"]
    with pytest.raises(ValueError, match="name must be new, got 'logits'"):
        taps.add("logits", "head")
    taps.close()
    with pytest.raises(ValueError, match="taps must be open"):
        taps.add("more", "head")


def test_a_copied_model_writes_nowhere():
    model, x = model_and_inputs()
    taps = Taps(model, {"logits": "head"})
    logits = model(x)
    unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301 - written on this very line
    for clone in (copy.deepcopy(model), unpickled):
        clone(torch.randn(2, 4))
        assert taps["logits"] is logits
        assert all(hook.values is None or hook.values() is None for hook in hooks(clone))
    # A graph tensor cannot be copied, so this also shows that values are left behind.
    ModuleEMA(model)(x)
    assert taps["logits"] is logits


@pytest.mark.parametrize("model_first", [True, False])
def test_taps_copied_with_their_model_read_from_the_copy(model_first):
    model, x = model_and_inputs()
    taps = Taps(model, {"logits": "head"})
    original = model(x)
    if model_first:
        clone, clone_taps = copy.deepcopy((model, taps))
    else:
        clone_taps, clone = copy.deepcopy((taps, model))
    assert clone_taps.model is clone
    with pytest.raises(RuntimeError, match="no forward pass"):
        clone_taps["logits"]
    copied = clone(x + 1)
    assert clone_taps["logits"] is copied
    assert taps["logits"] is original
    clone_taps.close()
    assert not hooks(clone)
    assert len(hooks(model)) == 1


def test_a_model_that_holds_its_own_taps_can_be_copied():
    model, x = model_and_inputs()
    model.taps = Taps(model, {"logits": "head"})
    model(x)
    clone = copy.deepcopy(model)
    logits = clone(x)
    assert clone.taps["logits"] is logits
    assert clone.taps.model is clone


def test_unknown_paths_name_close_ones_and_leave_no_hook():
    model, _ = model_and_inputs()
    with pytest.raises(ValueError, match=r"got 'backbone\.layer'; close ones: .*backbone\.layers"):
        Taps(model, {"a": "head", "b": "backbone.layer"})
    assert not hooks(model)


def test_unknown_names_list_the_known_ones():
    model, _ = model_and_inputs()
    taps = Taps(model, {"a": "head"})
    with pytest.raises(KeyError, match=r"no tap is named 'b'; there are \['a'\]"):
        taps["b"]
    assert "a" in taps
    assert "b" not in taps


def test_input_of_a_module_called_without_one():
    class Constant(nn.Module):
        def forward(self):
            return torch.zeros(1)

    model = Constant()
    with Taps(model, {"x": ":input"}), pytest.raises(ValueError, match="called without one"):
        model()


def test_finds_the_last_linear_layer():
    model, _ = model_and_inputs()
    assert find_classifier(model) == "head"
    assert find_classifier(nn.Linear(2, 2)) == ""
    assert find_classifier(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == "1.0"
    with pytest.raises(ValueError, match="model must contain an nn.Linear, got ReLU"):
        find_classifier(nn.ReLU())
