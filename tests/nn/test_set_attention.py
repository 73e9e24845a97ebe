"""Set attention: what is not there is not seen, order does not matter, and empty sets give numbers."""

import math

import pytest
import torch
from torch import nn

from coloss.nn import (
    InducedSetAttentionBlock,
    MultiheadAttentionBlock,
    MultiheadAttentionPooling,
    SetAttentionBlock,
)

BLOCKS = {
    "full": lambda: SetAttentionBlock(8, 2),
    "induced": lambda: InducedSetAttentionBlock(8, 2, inducing=3),
    "pooling": lambda: MultiheadAttentionPooling(8, 2, seeds=2),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]().double()


def padded(block, elements, rubbish):
    valid = torch.zeros(*elements.shape[:1], elements.shape[1] + 4, dtype=torch.bool)
    valid[:, : elements.shape[1]] = True
    filled = torch.cat([elements, torch.full((len(elements), 4, 8), rubbish, dtype=torch.float64)], 1)
    return block(filled, valid)


@pytest.mark.parametrize("rubbish", [0.0, 1e6])
def test_padding_changes_nothing(block, rubbish):
    elements = torch.randn(3, 5, 8, dtype=torch.float64)
    plain = block(elements)
    torch.testing.assert_close(padded(block, elements, rubbish)[:, : plain.shape[1]], plain)


def test_a_genuine_row_of_zeros_counts(block):
    # Masks are explicit: a row is not taken for padding because it sums to 0.
    elements = torch.randn(1, 5, 8, dtype=torch.float64)
    elements[0, 2] = 0.0
    without = block(elements[:, [0, 1, 3, 4]])[:, 0]
    assert not torch.allclose(block(elements)[:, 0], without, atol=1e-4)


def test_the_order_of_elements_moves_the_results_with_them(block):
    elements, order = torch.randn(2, 6, 8, dtype=torch.float64), torch.randperm(6)
    moved, plain = block(elements[:, order]), block(elements)
    if isinstance(block, MultiheadAttentionPooling):
        torch.testing.assert_close(moved, plain)
    else:
        torch.testing.assert_close(moved, plain[:, order])


def test_a_set_of_padding_alone_gives_finite_values_and_gradients(block):
    elements = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True] * 4, [False] * 4])
    result = block(elements, valid)
    result.sum().backward()
    assert result.isfinite().all()
    assert elements.grad.isfinite().all()
    pooled = InducedSetAttentionBlock(8, 2, 3).double().pool
    torch.testing.assert_close(pooled(elements, valid)[1], pooled(elements[:1, :0])[0])


def test_an_empty_batch_and_an_empty_set(block):
    assert block(torch.zeros(0, 3, 8, dtype=torch.float64)).shape[0] == 0
    assert block(torch.zeros(2, 0, 8, dtype=torch.float64)).isfinite().all()


def test_attention_equals_torchs_own_with_the_same_weights():
    block, twin = MultiheadAttentionBlock(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True)
    twin = twin.double()
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        twin.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
        twin.out_proj.load_state_dict(block.output.state_dict())
    queries, keys = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    hidden = block.attention_norm(queries + twin(queries, keys, keys)[0])
    torch.testing.assert_close(block(queries, keys), block.mlp_norm(hidden + block.mlp(hidden)))


def test_a_query_that_may_look_nowhere_gets_nothing_and_disturbs_no_other():
    block = MultiheadAttentionBlock(8, 2).double()
    queries, keys = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[0, 0, 1] = False
    result, plain = block(queries, keys, allowed), block(queries, keys)
    torch.testing.assert_close(result[:, [0, 2]], plain[:, [0, 2]])
    torch.testing.assert_close(result[:, 1:2], block(queries[:, 1:2], keys[:, :0]))


def test_gradients():
    block = InducedSetAttentionBlock(4, 2, 2).double()
    valid = torch.tensor([[True, True, False]])
    elements = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, valid)[:, :2], elements)


def test_half_precision_is_finite():
    elements = 100 * torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SetAttentionBlock(8, 2)(elements).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiheadAttentionBlock(8, 3), "heads must divide dim 8, got 3"),
        (lambda: MultiheadAttentionBlock(8, 2, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: MultiheadAttentionBlock(8, 2, mlp_ratio=0.0), "mlp_ratio must give"),
        (lambda: MultiheadAttentionPooling(8, 2, seeds=0), "seeds or inducing points must be >= 1, got 0"),
    ],
)
def test_impossible_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_dropout_acts_in_training_alone():
    block, elements = SetAttentionBlock(8, 2, dropout=0.5), torch.randn(1, 4, 8)
    assert not torch.equal(block(elements), block(elements))
    block.eval()
    assert torch.equal(block(elements), block(elements))
    assert math.isfinite(block(elements).sum().item())
