import copy

import pytest
import torch
from torch import nn

from coloss.nn import MLP, Classifier, TrainOnlyHeads


def build() -> tuple[TrainOnlyHeads, Classifier, torch.Tensor]:
    network = Classifier(MLP(4, [8, 6]), 3)
    model = TrainOnlyHeads(
        network,
        {"early": "backbone.layers.2", "late": "head:input"},
        {"early": nn.Linear(8, 3), "late": nn.Linear(6, 3)},
    )
    return model, network, torch.randn(5, 4)


def test_heads_see_inner_features_in_training():
    model, network, x = build()
    network.backbone.eval()
    outputs = model(x)
    hidden = network.backbone.layers[:3](x)
    assert torch.equal(outputs.main, network(x))
    assert torch.allclose(outputs.auxiliary["early"], model.heads["early"](hidden))
    assert torch.allclose(outputs.auxiliary["late"], model.heads["late"](network.backbone(x)))


def test_auxiliary_losses_train_the_backbone():
    model, network, x = build()
    model(x).auxiliary["early"].sum().backward()
    assert network.backbone.layers[0].weight.grad.any()
    assert network.backbone.layers[3].weight.grad is None


def test_is_the_backbone_alone_in_evaluation():
    model, network, x = build()
    model.eval()
    assert torch.equal(model(x), network(x))


def test_keeps_no_tensors_between_passes():
    model, _, x = build()
    model(x)
    assert not model._taps._values
    model.eval()(x)
    assert not model._taps._values


def test_export_is_the_plain_backbone():
    model, network, x = build()
    before = model.eval()(x)
    exported = model.export()
    assert exported is network
    assert torch.equal(exported(x), before)
    assert not any(module._forward_hooks for module in exported.modules())
    with pytest.raises(RuntimeError, match="no forward pass has reached"):
        model.train()(x)


def test_copies_work_on_their_own():
    model, _, x = build()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.heads["late"].weight.zero_()
        clone.heads["late"].bias.fill_(7)
    assert torch.equal(clone(x).auxiliary["late"], torch.full((5, 3), 7.0))
    assert not (model(x).auxiliary["late"] == 7).any()


def test_refuses_names_that_do_not_match():
    network = MLP(4, [8], 3)
    with pytest.raises(ValueError, match=r"names of taps \['a'\], got \['b'\]"):
        TrainOnlyHeads(network, {"a": "layers.0"}, {"b": nn.Identity()})
    with pytest.raises(ValueError, match=r"without dots, got 'a\.b'"):
        TrainOnlyHeads(network, {"a.b": "layers.0"}, {"a.b": nn.Identity()})
    with pytest.raises(ValueError, match="close ones: layers"):
        TrainOnlyHeads(network, {"a": "layer"}, {"a": nn.Identity()})
