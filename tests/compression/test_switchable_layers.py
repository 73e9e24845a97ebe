"""Layers that switch: what each precision computes, which batch norm it reads, and what is left in the end."""

import copy

import pytest
import torch
from torch import nn

from coloss.compression import (
    SwitchableBatchNorm,
    SwitchableConv1d,
    SwitchableConv2d,
    SwitchableConv3d,
    SwitchableLinear,
    bits_of,
    make_switchable,
    set_bits,
    to_plain,
)
from coloss.errors import InputError
from coloss.nn import Classifier, ConvNet
from coloss.ops import double_round


def network() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(ConvNet(1, (4, 6, 6)), 3)


def images(count: int = 16) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_ends_stay_and_every_norm_gets_a_copy_for_each_precision():
    model = network()
    parameters = {id(p) for p in model.parameters()}
    assert list(make_switchable(model, (8, 4))) == ["backbone.stages.1.0", "backbone.stages.2.0"]
    assert type(model.backbone.stages[0][0]) is nn.Conv2d and type(model.head) is nn.Linear
    assert isinstance(model.backbone.stages[1][0], SwitchableConv2d)
    assert id(model.backbone.stages[1][0].weight) in parameters
    norms = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm)]
    assert [(n.before, n.after) for n in norms] == [
        (None, "backbone.stages.1.0"),
        ("backbone.stages.1.0", "backbone.stages.2.0"),
        ("backbone.stages.2.0", None),
    ]
    assert all(list(n.norms) == ["8", "4"] for n in norms)


def test_a_layer_runs_with_the_weight_of_its_precision():
    layer = SwitchableLinear(6, 5, bits=(8, 3))
    x = torch.randn(4, 6)
    for bits in (8, 3):
        layer.set_bits(bits)
        _, weight = double_round(layer.weight, layer.weight_quantizer.scale, 8, bits)
        assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))


def test_statistics_of_a_precision_are_its_own():
    model = network()
    make_switchable(model, (8, 2))
    before = copy.deepcopy(model.state_dict())
    set_bits(model, 2)
    model(images())
    moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert moved and all(".norms.2." in name for name in moved)


def test_bits_by_name_and_norms_between_layers_of_different_precision():
    model = network()
    make_switchable(model, (8, 2), transitional=True)
    set_bits(model, {"backbone.stages.1.0": 2})
    assert bits_of(model) == {"backbone.stages.1.0": 2, "backbone.stages.2.0": 8}
    keys = [m.key for m in model.modules() if isinstance(m, SwitchableBatchNorm)]
    assert keys == ["2_2", "2_8", "8_8"]


def test_bad_bits_change_nothing():
    model = network()
    make_switchable(model, (8, 4))
    for bad, message in (
        (3, "bits must be one of 8, 4, got 3"),
        ({"backbone.stages.1.0": 4, "backbone.stages.2.0": 5}, "got 5"),
        ({"backbone.stages.1": 4}, "bits must name switchable layers"),
    ):
        with pytest.raises(InputError, match=message):
            set_bits(model, bad)
        assert set(bits_of(model).values()) == {8}
    with pytest.raises(InputError, match="has no switchable layer"):
        set_bits(nn.Linear(2, 2), 4)


@pytest.mark.parametrize("bits", [(), (8, 8), (9,), (1,)])
def test_precisions_must_be_distinct_integers_in_range(bits):
    with pytest.raises(InputError, match="bits must be distinct integers"):
        make_switchable(network(), bits)


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    with pytest.raises(InputError, match="layers must have weights of their own, got 1"):
        make_switchable(model)


@pytest.mark.parametrize("activations", [False, True])
def test_the_plain_model_computes_the_same_with_ordinary_layers(activations: bool):
    model = network()
    make_switchable(model, (8, 2), activations=activations)
    for bits in (8, 2):
        set_bits(model, bits)
        model(images())
    model.eval()
    expected = model(images())
    names = {n for n, _ in network().named_modules()}
    to_plain(model)
    assert {n for n, _ in model.named_modules()} == names
    assert {type(m) for m in model.modules()} == {type(m) for m in network().modules()}
    assert model.state_dict().keys() == network().state_dict().keys()
    assert torch.equal(model(images()), expected)
    assert model.backbone.stages[1][0].weight.unique().numel() <= 4


def test_hooks_of_others_survive_both_ways():
    model = network()
    seen = []
    handle = model.backbone.stages[1][1].register_forward_hook(lambda *_: seen.append(1))
    make_switchable(model, (8, 4))
    model(images())
    to_plain(model)
    model(images())
    assert seen == [1, 1]
    handle.remove()
    model(images())
    assert seen == [1, 1]


def test_bfloat16_weights_are_quantised_in_float32():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)).bfloat16()
    make_switchable(model, (8, 4))
    layer = model[1]
    codes, _ = double_round(layer.weight.float(), layer.weight_quantizer.scale, 8, 8)
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes)
    assert layer.weight_quantizer.log_scale.dtype == torch.float32
    assert model(torch.rand(3, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "dims"), [(SwitchableConv1d, 1), (SwitchableConv2d, 2), (SwitchableConv3d, 3)]
)
def test_convolutions_of_any_dimension_run_with_the_weight_of_their_precision(kind, dims: int):
    layer = kind(2, 3, 2, padding=1, stride=2, bits=(8, 3), per_channel=True)
    layer.set_bits(3)
    x = torch.randn(2, 2, *[5] * dims)
    _, weight = double_round(layer.weight, layer.weight_quantizer.scale, 8, 3)
    plain = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    assert torch.equal(layer(x), plain(x, weight, layer.bias, 2, 1))
    assert layer.weight_quantizer.scale.shape == (3,) + (1,) * (dims + 1)


def refused(model: nn.Module, message: str, **options) -> None:
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        make_switchable(model, **options)
    assert [type(m) for m in model.modules()] == before


def test_what_cannot_be_switched_is_refused_and_left_as_it_is(as_users_call):
    refused(nn.Linear(8, 4), "model must contain its layers, got a Linear itself", layers="")
    refused(network(), "rounding must be", rounding="up")
    block = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 2))
    refused(block, "its TransformerEncoderLayer reads its weight")
    model = network()
    make_switchable(model, (8, 4), layers="backbone.stages.1.0")
    refused(model, "switchable already", layers="backbone.stages.2.0")


def test_a_norm_that_stands_twice_is_switched_at_both_places():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 2))
    make_switchable(model, (8, 2))
    assert isinstance(model[1], SwitchableBatchNorm) and model[1] is model[3]
    to_plain(model)
    assert type(model[1]) is nn.BatchNorm1d and model[1] is model[3]


def test_a_layer_that_never_ran_is_named_before_anything_is_changed():
    model = network()
    make_switchable(model, (8, 4), activations=True)
    model.backbone.stages[1][0](torch.rand(2, 4, 5, 5))
    with pytest.raises(InputError, match=r"stages\.2\.0 have no step at 8 bits"):
        to_plain(model)
    assert isinstance(model.backbone.stages[1][0], SwitchableConv2d)


def test_backward_hooks_of_others_survive_both_ways():
    model = network()
    seen = []
    handle = model.backbone.stages[1][1].register_full_backward_hook(lambda *_: seen.append(1))

    def count() -> int:
        model(images()).sum().backward()
        return len(seen)

    make_switchable(model, (8, 4))
    assert count() == 1
    to_plain(model)
    assert count() == 2
    handle.remove()
    assert count() == 2
