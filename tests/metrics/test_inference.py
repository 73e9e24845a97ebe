from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from coloss.metrics import evaluation_mode, extract_features, predict


@dataclass
class Bundle:
    inputs: object
    targets: object = None


class Taken:
    """The least a data set must have: a length and `take`."""

    def __init__(self, inputs, targets=None):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def take(self, indices):
        return Bundle(self.inputs[indices], None if self.targets is None else self.targets[indices])


class Noisy(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn_like(inputs)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2))


X, Y = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)), torch.arange(11)


@pytest.mark.parametrize(
    "data",
    [
        Taken(X, Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [(X[:5], Y[:5]), [X[5:], Y[5:]]],
        [Bundle(X, Y)],
        [{"inputs": X, "targets": Y}],
        [(X, Y, Y)],
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_all_kinds_of_data_give_outputs_in_order(data, batch_size):
    model = network().eval()
    outputs, targets = predict(model, data, batch_size)
    torch.testing.assert_close(outputs, model(X).detach())
    assert torch.equal(targets, Y) and not outputs.requires_grad


def test_plain_tensors_have_no_targets():
    outputs, targets = predict(nn.Identity(), X, batch_size=3)
    assert torch.equal(outputs, X) and targets is None


def test_nested_inputs_and_outputs_keep_their_nesting():
    class Twins(nn.Module):
        def forward(self, pair):
            return {"sum": pair[0] + pair[1], "pair": (pair[0], 2 * pair[1])}

    outputs, targets = predict(Twins(), [((X[:4], X[:4]), (Y[:4], None)), ((X[4:], X[4:]), (Y[4:], None))])
    assert torch.equal(outputs["sum"], 2 * X) and torch.equal(outputs["pair"][1], 2 * X)
    assert torch.equal(targets[0], Y) and targets[1] is None


def test_call_replaces_forward():
    outputs, _ = predict(nn.Linear(7, 7), X, call=lambda x: 2 * x)
    assert torch.equal(outputs, 2 * X)


def test_each_submodule_gets_its_own_mode_back():
    model = network().train()
    model[1].eval()  # a frozen normalisation in a training network
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        model(X)
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert torch.is_grad_enabled()
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())


def test_mode_gradients_and_randomness_come_back_after_an_error():
    class Failing(nn.Module):
        def forward(self, inputs):
            torch.randn(1)
            raise RuntimeError("broken")

    model = Failing()
    state = torch.random.get_rng_state()
    for run in (predict, extract_features):
        with pytest.raises(RuntimeError, match="broken"):
            run(model, X)
        with pytest.raises(ValueError, match="a batch must be a tensor"):
            run(model, [3])
    with pytest.raises(ValueError, match="features must be one tensor a batch, got tuple") as caught:
        extract_features(TupleOut().train(), X)
    assert caught.traceback and model.training and torch.is_grad_enabled()
    assert torch.equal(state, torch.random.get_rng_state())


class TupleOut(nn.Module):
    def forward(self, inputs):
        return inputs, inputs


def test_networks_with_noise_repeat_and_leave_global_randomness():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = predict(Noisy(), DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    second = predict(Noisy(), DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
    assert torch.equal(first.outputs, second.outputs) and torch.equal(first.targets, second.targets)
    assert not torch.equal(first.outputs, X)


def test_features_of_a_submodule_are_flattened_and_leave_no_hook():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    features, targets = extract_features(model, Taken(X[:, None], Y), "1", batch_size=4)
    torch.testing.assert_close(features, model[1](model[0](X[:, None])).detach().flatten(1))
    assert features.shape == (11, 4) and torch.equal(targets, Y)
    assert not any(module._forward_hooks for module in model.modules())
    taken, _ = extract_features(model, X[:, None], "3:input")
    torch.testing.assert_close(taken, features)


def test_scalar_outputs_become_one_feature():
    features, _ = extract_features(nn.Flatten(0), X[:, :1])
    assert features.shape == (11, 1)


def test_bad_input_is_refused():
    model = network()
    with pytest.raises(ValueError, match="must name a module of the model, got 'nowhere'"):
        extract_features(model, X, "nowhere")
    with pytest.raises(ValueError, match="data must hold at least one sample, got none"):
        predict(model, Taken(X[:0]))
    with pytest.raises(ValueError, match="data must hold at least one sample, got none"):
        predict(model, X[:0])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        predict(model, X, 0)
    with pytest.raises(
        ValueError, match="data must be a tensor, a data set or an iterable of batches, got int"
    ):
        predict(model, 3)
    assert model.training
