import pytest
import torch

from coloss.nn import linear_layer


def test_it_holds_copies_and_draws_nothing():
    weight, bias = torch.randn(3, 2), torch.randn(3)
    state = torch.get_rng_state()
    layer = linear_layer(weight, bias)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, 2)
    assert torch.allclose(layer(x), x @ weight.T + bias)
    weight.zero_()
    assert layer.weight.abs().min() > 0 and layer.weight.requires_grad
    assert (layer.in_features, layer.out_features) == (2, 3)


def test_without_bias_in_another_type_or_without_units():
    layer = linear_layer(torch.randn(3, 2, dtype=torch.float64), dtype=torch.float32)
    assert layer.bias is None and layer.weight.dtype == torch.float32
    assert (
        linear_layer(torch.zeros(2, 0), torch.tensor([1.0, 2.0]))(torch.zeros(3, 0)).tolist()
        == [[1.0, 2.0]] * 3
    )
    assert linear_layer(torch.zeros(0, 2), torch.zeros(0))(torch.zeros(3, 2)).shape == (3, 0)


@pytest.mark.usefixtures("as_users_call")
def test_a_bias_of_another_length_is_refused():
    with pytest.raises(ValueError, match="bias must have 3 entries, one for each row, got 2"):
        linear_layer(torch.zeros(3, 2), torch.zeros(2))
