"""A precision that was not trained: its own norms and steps, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

from coloss.compression import bits_of, calibrate_precision, make_switchable, set_bits
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import Classifier, ConvNet


def network() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(ConvNet(1, (4, 6, 6)), 3)


def images(count: int = 16) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_precision_that_was_not_trained_is_calibrated():
    model = network()
    make_switchable(model, (8, 2), activations=True)
    for bits in (8, 2):
        set_bits(model, bits)
        model(images())
    before = copy.deepcopy(model.state_dict())
    calibrate_precision(model, 4, images(64))
    assert bits_of(model)["backbone.stages.1.0"] == 4
    assert all(
        torch.equal(model.state_dict()[n], v) for n, v in before.items() if isinstance(v, torch.Tensor)
    )
    norm = model.backbone.stages[2][1]
    inside = []
    norm.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
    model.eval()(images(64))
    # The pass that takes statistics normalises by those of its batch, whose variance is the biased one.
    torch.testing.assert_close(norm.norm.running_mean, inside[0].mean((0, 2, 3)), rtol=0.05, atol=2e-3)
    with pytest.raises(InputError, match="bits must be a precision that the model lacks, got 4"):
        calibrate_precision(model, 4, images())


def test_any_kind_of_data_gives_the_same():
    found = []
    for data in (images(64), IndexedDataset(images(64)), iter([images(64)])):
        model = network()
        make_switchable(model, (8, 2), activations=True)
        model(images())
        calibrate_precision(model, 4, data)
        found.append(model.eval()(images()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_pairs_of_precisions_and_empty_data_are_refused():
    model = network()
    make_switchable(model, (8, 2), transitional=True)
    with pytest.raises(InputError, match="transitional batch norms are trained"):
        calibrate_precision(model, 4, images())
    model = network()
    make_switchable(model, (8, 2), activations=True)
    with pytest.raises(InputError, match="data must give at least one batch"):
        calibrate_precision(model, 4, [])
