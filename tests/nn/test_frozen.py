import torch
from torch import nn

from coloss.nn import Frozen


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_stays_as_it_is_inside_a_training_model():
    model = nn.ModuleList([Frozen(network()), nn.Linear(4, 1)]).train()
    frozen = model[0]
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    x = torch.randn(6, 4)
    assert torch.equal(frozen(x), frozen(x))
    assert not any(module.training for module in frozen.modules())
    assert model[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_gives_no_gradient_to_anything():
    frozen = Frozen(nn.Linear(4, 2))
    output = frozen(torch.randn(3, 4, requires_grad=True))
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_freezes_the_module_itself_unless_told_to_copy():
    given = network()
    copied = Frozen(given, copy=True)
    assert given.training
    assert given[0].weight.requires_grad
    assert copied.module is not given
    assert torch.equal(copied.module[0].weight, given[0].weight)
    assert Frozen(given).module is given
    assert not given.training
    assert not given[0].weight.requires_grad
