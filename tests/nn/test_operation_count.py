"""What torch's own attention layers cost is seen in every mode."""

import pytest
import torch
from torch import nn

from coloss.nn.operation_count import count_operations, operation_counter


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_counts_the_same_in_every_mode(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0).train(training)
    inputs = torch.randn(1, 5, 16)
    with torch.no_grad():
        counted = count_operations(lambda: layer(inputs))
    assert counted == 2 * (5 * 4 * 16 * 16 + 2 * 5 * 5 * 16 + 5 * 2 * 16 * 32)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_alone_is_counted_in_eval_mode(need_weights: bool) -> None:
    attention, inputs = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(1, 5, 16)
    with torch.no_grad():
        counted = count_operations(lambda: attention(inputs, inputs, inputs, need_weights=need_weights))
    assert counted == 2 * (5 * 4 * 16 * 16 + 2 * 5 * 5 * 16)


def test_the_fused_layers_are_as_they_were_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), operation_counter():
        assert not torch.backends.mha.get_fastpath_enabled()
        _ = 1 / 0
    assert torch.backends.mha.get_fastpath_enabled()
