import pytest
import torch

from coloss.motion import MaskedTokenTransformer, attention_ranks, attention_weights
from coloss.ops import effective_rank


def new_model(causal: bool, depth: int = 3) -> MaskedTokenTransformer:
    torch.manual_seed(0)
    return MaskedTokenTransformer(7, 4, dim=16, depth=depth, heads=2, causal=causal, max_tokens=9)


def triangle(places: int) -> torch.Tensor:
    return torch.ones(places, places, dtype=torch.bool).tril()


def test_causal_weights_are_triangular_with_a_positive_determinant() -> None:
    queries, keys = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    weights = attention_weights(queries, keys, triangle(6))
    assert torch.equal(weights, weights.tril())
    diagonal = weights.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all()
    torch.testing.assert_close(torch.linalg.det(weights), diagonal.prod(1))
    assert (torch.linalg.matrix_rank(weights) == 6).all()


def test_equal_queries_have_rank_one_without_a_mask_and_full_rank_with_it() -> None:
    queries, keys = (
        torch.randn(1, 4, dtype=torch.float64).expand(6, 4),
        torch.randn(6, 4, dtype=torch.float64),
    )
    assert torch.linalg.matrix_rank(attention_weights(queries, keys)) == 1
    assert torch.linalg.matrix_rank(attention_weights(queries, keys, triangle(6))) == 6


def test_a_query_without_keys_has_no_weights() -> None:
    allowed = torch.tensor([[True, False], [False, False]])
    weights = attention_weights(torch.randn(2, 3), torch.randn(2, 3), allowed)
    assert weights.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_weights_are_those_of_fused_attention() -> None:
    queries, keys, values = torch.randn(3, 2, 5, 4).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(attention_weights(queries, keys, triangle(5)) @ values, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_the_layers_are_those_of_the_model(causal: bool) -> None:
    model, tokens, condition = new_model(causal), torch.randint(7, (3, 9)), torch.randn(3, 4)
    model.train()
    ranks = attention_ranks(model, tokens, condition)
    assert model.training
    kept: list[torch.Tensor] = []
    model.eval().transformer.norm.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    model(tokens, condition)
    expected = effective_rank(torch.linalg.svdvals(kept[0].double())).mean().item()
    assert ranks.stream_effective[-1].item() == pytest.approx(expected, rel=1e-5)
    assert ranks.places == 10
    for found in ranks[:5]:
        assert found.shape == (3,)
        assert (found >= 1).all() and (found <= 10).all()


def test_attention_to_all_collapses_where_queries_are_zero_and_causal_attention_does_not() -> None:
    found = {}
    for causal in (True, False):
        model = new_model(causal)
        for block in model.transformer.blocks:
            layer = block.attention.query_key_value
            torch.nn.init.zeros_(layer.weight[:32])
        found[causal] = attention_ranks(model, torch.randint(7, (3, 9)), torch.randn(3, 4))
    torch.testing.assert_close(found[False].weights_effective, torch.ones(3).double())
    assert (found[False].outputs_numerical == 1).all()
    assert (found[True].weights_numerical == 10).all()
    assert (found[True].outputs_effective > 3).all()


def test_padding_counts_nowhere() -> None:
    model, tokens, condition = new_model(causal=False), torch.randint(7, (2, 6)), torch.randn(2, 4)
    padded = torch.cat([tokens, torch.full((2, 3), -1)], 1)
    alone, together = (attention_ranks(model, x, condition) for x in (tokens, padded))
    assert alone.places == together.places == 7
    for first, second in zip(alone[:5], together[:5]):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_ranks_need_no_float64_but_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = new_model(True), torch.randint(7, (2, 9))
    expected = attention_ranks(model, tokens)
    monkeypatch.setattr("coloss.motion.attention_rank.accumulation_dtype", lambda device: torch.float32)
    for found, wide in zip(attention_ranks(model, tokens)[:5], expected[:5]):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wide, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named() -> None:
    model = new_model(True)
    with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\), got 0"):
        attention_ranks(model, torch.randint(7, (1, 9)), tolerance=0)
    with pytest.raises(ValueError, match="tokens must hold at least one sequence, got none"):
        attention_ranks(model, torch.zeros(0, 9, dtype=torch.int64))
