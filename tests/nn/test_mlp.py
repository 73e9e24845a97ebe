import pytest
import torch
from torch import nn

from coloss.nn import MLP


def test_is_the_layers_one_would_write_by_hand():
    model = MLP(6, [5, 4], 3)
    reference = nn.Sequential(
        nn.Linear(6, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 4, bias=False),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 3),
    )
    reference.load_state_dict(model.layers.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(model(x), reference(x))
    assert torch.equal(model.eval()(x), reference.eval()(x))


def test_without_hidden_layers_it_is_a_linear_map():
    model = MLP(4, [], 2)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), nn.functional.linear(x, model.layers[0].weight, model.layers[0].bias))


def test_ends_at_the_last_hidden_activation_without_out_features():
    model = MLP(4, [8, 6], norm="layer", activation=nn.Tanh)
    result = model(torch.randn(20, 4))
    assert model.out_features == 6
    assert result.shape == (20, 6)
    assert result.abs().max() <= 1
    assert isinstance(model.layers[-1], nn.Tanh)


def test_flattens_images_row_by_row():
    model = MLP(12, [5], 2).eval()
    images = torch.randn(4, 3, 2, 2)
    assert torch.equal(model(images), model(images.reshape(4, 12)))


def test_dropout_acts_in_training_only_and_last():
    model = MLP(4, [1000], norm=None, dropout=0.25)
    x = torch.rand(1, 4)
    kept = model(x) != 0
    positive = model.eval()(x) > 0
    assert 0.6 < kept.sum() / positive.sum() < 0.9
    assert not isinstance(MLP(4, [8], 2, dropout=0.5).layers[-1], nn.Dropout)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, []), {}, "hidden must not be empty"),
        ((4, [0], 2), {}, "must be >= 1, got 0"),
        ((4, [3], 0), {}, "must be >= 1, got 0"),
        ((4, [3], 2), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_impossible_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MLP(*arguments, **options)


def test_refuses_inputs_of_another_size():
    with pytest.raises(ValueError, match=r"must hold 4 values per sample, got shape \(2, 5\)"):
        MLP(4, [3])(torch.rand(2, 5))
