"""Features come batch by batch as `extract_features` gives them whole, and the network is left as it was."""

import pytest
import torch
from torch import nn

from coloss.data import IndexedDataset
from coloss.metrics import extract_features, feature_stream
from coloss.nn import MLP, Classifier


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(MLP(6, (5, 4), dropout=0.5), 3)


def test_batches_together_are_the_features_of_every_place() -> None:
    model, inputs = new_model(), torch.randn(11, 6)
    data = IndexedDataset(inputs, torch.arange(11) % 3)
    model(inputs)
    with feature_stream(model, data, {"first": "backbone.layers.1", "last": "head:input"}, 4) as batches:
        found = list(batches)
    assert [len(batch.outputs) for batch in found] == [4, 4, 3]
    for name, path in (("first", "backbone.layers.1"), ("last", "head:input")):
        whole, targets = extract_features(model, data, path)
        torch.testing.assert_close(torch.cat([batch.features[name] for batch in found]), whole)
    assert torch.equal(torch.cat([batch.targets for batch in found]), targets)
    torch.testing.assert_close(torch.cat([batch.outputs for batch in found]), model.eval()(inputs))


def test_the_network_is_left_as_it_was_also_after_an_error() -> None:
    model = new_model().train()
    before = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), feature_stream(model, torch.zeros(4, 6), {}, 2) as batches:
        for _ in batches:
            assert not model.training
            _ = 1 / 0
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.random.get_rng_state()) and torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_take_the_type_of_the_parameters_and_images_become_rows() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3)).bfloat16()
    with feature_stream(model, torch.zeros(5, 1, 4, 4), {"maps": "0"}) as batches:
        (batch,) = batches
    assert batch.features["maps"].shape == (5, 8) and batch.targets is None
    words = nn.Embedding(3, 2)
    with feature_stream(words, torch.tensor([0, 2]), {}) as batches:
        assert next(batches).outputs.shape == (2, 2)


def test_bad_input_is_refused() -> None:
    model = new_model()
    with (
        pytest.raises(ValueError, match="got 'neck'"),
        feature_stream(model, torch.zeros(1, 6), {"x": "neck"}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="at least one sample, got none"),
        feature_stream(model, torch.zeros(0, 6), {}) as batches,
    ):
        list(batches)

    class Two(nn.Module):
        def forward(self, inputs):
            return inputs, inputs

    with (
        pytest.raises(ValueError, match="one tensor a batch, got tuple at 'both'"),
        feature_stream(nn.Sequential(Two()), torch.zeros(1, 6), {"both": "0"}) as batches,
    ):
        list(batches)
