import pytest
import torch
from torch import nn

from coloss.distillation import find_layers, read_layers
from coloss.errors import InputError
from coloss.nn import MLP, Classifier, ConvNet, ResNet, Transformer


class TwoStages(nn.Module):
    """Stages that hang side by side in a module, as in torchvision's residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.conv(x).relu())).mean((2, 3)))


def test_layers_are_found_in_usual_networks():
    residual = find_layers(Classifier(ResNet(1, (4, 8), (2, 1)), 3))
    assert residual == [
        ("backbone.stem.0", "backbone.stem.1", "backbone.stem.2"),
        ("backbone.stages.0.0",),
        ("backbone.stages.0.1",),
        ("backbone.stages.1.0",),
    ]
    assert find_layers(Classifier(ConvNet(1, (4, 8)), 3))[1] == tuple(
        f"backbone.stages.1.{part}" for part in range(3)
    )
    assert find_layers(Transformer(8, 3, 2)) == [(f"blocks.{number}",) for number in range(3)]
    assert find_layers(MLP(4, [8, 8], 3)) == [
        tuple(f"layers.{n}" for n in range(3)),
        tuple(f"layers.{n}" for n in range(3, 6)),
    ]
    assert find_layers(TwoStages()) == [("layer1.0", "layer1.1"), ("layer2.0", "layer2.1")]


def test_shapes_and_kinds_are_read_without_a_trace():
    model = Classifier(ConvNet(1, (4, 8)), 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = read_layers(model, torch.randn(2, 1, 8, 8))
    assert [(layer.kind, layer.width, layer.output_shape) for layer in layers] == [
        ("maps", 4, (2, 3)),
        ("maps", 8, (2, 3)),
    ]
    assert model.training and all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert not any(module._forward_hooks for module in model.modules())
    assert [layer.kind for layer in read_layers(Transformer(8, 2, 2), torch.randn(2, 5, 8))] == ["tokens"] * 2
    series = read_layers(Classifier(ConvNet(2, (4, 8), dims=1), 3), torch.randn(2, 2, 9))
    assert [layer.kind for layer in series] == ["maps"] * 2


def test_bad_input():
    example = torch.zeros(2, 1, 6, 6)
    with pytest.raises(InputError, match="found 0 in the sequences of Linear"):
        find_layers(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no layer 'layer3'"):
        read_layers(TwoStages(), example, ["layer1", "layer3"])
    with pytest.raises(InputError, match="at least two layers"):
        read_layers(TwoStages(), example, ["layer1"])
    with pytest.raises(
        InputError, match=r"order given \(layer2, layer1\), the forward pass runs: layer1, layer2"
    ):
        read_layers(TwoStages(), example, ["layer2", "layer1"])
    twice = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    twice.forward = lambda x: twice[1](twice[0](twice[0](x)))
    with pytest.raises(InputError, match="once each"):
        read_layers(twice, torch.zeros(1, 2), ["0", "1"])
    pairs = nn.Sequential(nn.LSTM(2, 2), nn.LSTM(2, 2))
    pairs.forward = lambda x: pairs[1](pairs[0](x)[0])
    with pytest.raises(InputError, match="layer '0' must give one tensor"):
        read_layers(pairs, torch.zeros(1, 3, 2), ["0", "1"])
