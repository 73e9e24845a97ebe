"""Facts about the scales of rows and blocks: what they leave as it is, what folding keeps, what is refused."""

import copy

import pytest
import torch
from torch import nn

from coloss.compression import RowGroupScale
from coloss.errors import InputError
from coloss.ops import nm_mask

LAYERS = {
    "linear": lambda: nn.Linear(16, 6),
    "conv1d": lambda: nn.Conv1d(8, 6, 3),
    "conv2d": lambda: nn.Conv2d(8, 6, 3),
}
INPUTS = {"linear": (5, 16), "conv1d": (5, 8, 7), "conv2d": (5, 8, 7, 7)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", LAYERS)
def test_scales_start_at_one_and_fold_without_changing_outputs_or_zeros(kind):
    layer, inputs = LAYERS[kind](), torch.randn(INPUTS[kind])
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight, 2, 4, dim=1))
    plain, names = layer(inputs), set(layer.state_dict())
    zeros, scale = layer.weight == 0, RowGroupScale(layer)
    assert torch.equal(layer(inputs), plain)
    with torch.no_grad():
        scale.scale.normal_()
    expected = layer(inputs)
    folded = RowGroupScale.fold_(layer)
    assert folded is layer and type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    assert set(layer.state_dict()) == names and isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-6)
    assert torch.equal(layer.weight == 0, zeros)


def test_the_blocks_are_those_of_the_formula_and_the_order_within_them_stays():
    layer = nn.Linear(10, 3, bias=False)
    before = layer.weight.detach().clone()
    scale = RowGroupScale(layer, groups=3)
    with torch.no_grad():
        scale.scale.copy_(torch.rand(3, 3) + 0.5)
    for row in range(3):
        for column in range(10):
            expected = scale.scale[row, column * 3 // 10] * before[row, column]
            assert layer.weight[row, column] == expected
    order = before[:, :4].abs().argsort(1)
    assert torch.equal(layer.weight[:, :4].abs().argsort(1), order)


def test_multiples_keep_groups_of_neighbours_in_one_block():
    layer = nn.Linear(22, 2)
    scale = RowGroupScale(layer, groups=2, multiple=4)
    assert scale.block.tolist() == [0] * 12 + [1] * 10
    mask = nm_mask(layer.weight, 2, 4)
    with torch.no_grad():
        scale.scale[:, 1] = 100.0
    assert torch.equal(nm_mask(layer.weight, 2, 4), mask)


def test_the_gradient_of_a_scale_is_the_sum_over_its_block():
    layer = nn.Linear(8, 2, bias=False)
    scale = RowGroupScale(layer)
    original = layer.parametrizations.weight.original
    upstream = torch.randn(2, 8)
    (layer.weight * upstream).sum().backward()
    expected = (original.detach() * upstream).reshape(2, 2, 4).sum(-1)
    torch.testing.assert_close(scale.scale.grad, expected)
    torch.testing.assert_close(original.grad, upstream)


def test_half_precision_weights_keep_float32_scales_that_small_steps_can_move():
    layer = nn.Linear(8, 2)
    scale = RowGroupScale(layer)
    layer.bfloat16()
    assert scale.scale.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        scale.scale.add_(1e-5)
    assert (scale.scale > 1).all()


def test_a_copy_of_the_layer_folds_by_itself_and_stored_scales_are_loaded():
    layer = nn.Linear(8, 2)
    scale = RowGroupScale(layer)
    with torch.no_grad():
        scale.scale.fill_(3.0)
    other = nn.Linear(8, 2)
    RowGroupScale(other)
    other.load_state_dict(layer.state_dict())
    twin = RowGroupScale.fold_(copy.deepcopy(layer))
    assert torch.equal(twin.weight, RowGroupScale.fold_(other).weight)
    assert hasattr(layer, "parametrizations")


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="must be a linear layer or a convolution, got Embedding"):
        RowGroupScale(nn.Embedding(4, 4))
    with pytest.raises(InputError, match=r"groups must be in \[1, 4\] for 4 inputs .* got 5"):
        RowGroupScale(nn.Linear(4, 4), 5)
    with pytest.raises(
        InputError, match=r"groups must be in \[1, 1\] for 6 inputs in blocks of multiples of 4, got 2"
    ):
        RowGroupScale(nn.Linear(6, 4), 2, multiple=4)
    layer = nn.Linear(4, 4)
    with pytest.raises(InputError, match="must have scales to fold, got a plain Linear"):
        RowGroupScale.fold_(layer)
    RowGroupScale(layer)
    with pytest.raises(InputError, match="scales already"):
        RowGroupScale(layer)
