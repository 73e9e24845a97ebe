import pytest
import torch
from torch import nn

from coloss.nn import Transformer, TransformerBlock
from coloss.nn.transformer import SelfAttention

NAMES = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "linear1": "mlp.0",
    "linear2": "mlp.3",
    "self_attn.in_proj": "attention.query_key_value",
    "self_attn.out_proj": "attention.output",
}


def torch_twin(block: TransformerBlock, dim: int, heads: int) -> nn.TransformerEncoderLayer:
    twin = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
    ).double()
    ours = block.state_dict()
    weights = {}
    for name in twin.state_dict():
        kind = "bias" if name.endswith("bias") else "weight"
        weights[name] = ours[f"{NAMES[name[: -len(kind) - 1]]}.{kind}"]
    twin.load_state_dict(weights)
    return twin


def block_and_tokens(dim: int = 12) -> tuple[TransformerBlock, torch.Tensor]:
    block = TransformerBlock(dim, 3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 5, dim, dtype=torch.float64)


def test_block_equals_torch_encoder_layer():
    block, tokens = block_and_tokens()
    assert torch.allclose(block(tokens), torch_twin(block, 12, 3)(tokens), atol=1e-12)


def test_masks_equal_those_of_torch():
    block, tokens = block_and_tokens()
    padding = torch.tensor([[False, False, True, False, True], [False] * 5])
    twin = torch_twin(block, 12, 3)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masked = block(tokens, ~padding[:, None, None])
    # Padded queries are undefined in torch's layer.
    assert torch.allclose(masked[~padding], twin(tokens, src_key_padding_mask=padding)[~padding], atol=1e-12)
    assert torch.allclose(block(tokens, causal=True), twin(tokens, src_mask=causal), atol=1e-12)


def test_depth_zero_is_the_norm_alone():
    tokens = torch.randn(2, 3, 8)
    assert torch.equal(Transformer(8, 0, 2)(tokens), nn.functional.layer_norm(tokens, (8,)))


def test_last_layers_of_branches_begin_smaller_with_depth():
    model = Transformer(64, 8, 4)
    for block in model.blocks:
        for layer, scale in (
            (block.attention.query_key_value, 1),
            (block.mlp[0], 1),
            (block.attention.output, 4),
            (block.mlp[3], 4),
        ):
            assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5 / scale, rel=0.06)
            assert not layer.bias.any()


def test_dropout_acts_in_training_only():
    model = Transformer(8, 2, 2, dropout=0.5)
    tokens = torch.randn(2, 3, 8)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 1, 3), {}, "heads must divide dim 8, got 3"),
        ((8, -1, 2), {}, "depth must be >= 0, got -1"),
        ((8, 1, 2), {"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_refuses_impossible_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(*arguments, **options)


def test_refuses_a_mask_beside_causal():
    with pytest.raises(ValueError, match="allowed must be None when causal"):
        Transformer(8, 1, 2)(torch.rand(1, 3, 8), torch.ones(1, 1, 1, 3, dtype=torch.bool), causal=True)


def test_attend_stands_in_for_the_attention():
    block, tokens = block_and_tokens()
    seen = []

    def attend(queries, keys, values):
        seen.append((queries, keys, values))
        return nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    found = block(
        tokens, torch.zeros(1, 1, 5, 5, dtype=torch.bool), attend=attend
    )  # which the mask does not touch
    assert torch.equal(found, block(tokens, causal=True))
    projected = block.attention.project(block.attention_norm(tokens))
    assert all(torch.equal(one, other) for one, other in zip(seen[0], projected, strict=True))
    assert projected[0].shape == (2, 3, 5, 4)
    without = block(tokens, attend=lambda queries, keys, values: torch.zeros_like(queries))
    only_bias = tokens + block.attention.output.bias
    assert torch.allclose(without, only_bias + block.mlp(block.mlp_norm(only_bias)), atol=1e-12)


@pytest.mark.parametrize("replaced", [False, True], ids=["linear", "something in its place"])
def test_queries_and_keys_and_values_alone_are_those_of_the_projection(replaced):
    attention = SelfAttention(12, 6, key_value_heads=2).double()
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    expected = attention.project(tokens)
    if replaced:
        attention.query_key_value = nn.Sequential(attention.query_key_value)
        attention.output = nn.Sequential(attention.output)
    alone = (attention.queries(tokens), *attention.keys_and_values(tokens))
    for one, other in zip(alone, expected, strict=True):
        torch.testing.assert_close(one, other)
