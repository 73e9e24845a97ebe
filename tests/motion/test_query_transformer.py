import pytest
import torch
from torch import Tensor

from coloss.motion import MemoryAttention, QueryTransformer, query_text_mask
from coloss.motion.query_transformer import Mode


def new_network(**sizes: int) -> QueryTransformer:
    """Small, with weights large enough that every path shows."""
    options = {"dim": 12, "layers": 3, "heads": 2, "num_queries": 4, "max_words": 6} | sizes
    network = QueryTransformer(20, 5, **options).double().eval()
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return network


WORDS = torch.tensor([[3, 7, 4, 9], [5, 2, 0, 0]])


def changes(before: Tensor, after: Tensor) -> list[bool]:
    """Which tokens of the first sample differ."""
    return [not torch.equal(a, b) for a, b in zip(before[0], after[0])]


# Masks


def test_the_three_masks_are_those_of_the_table() -> None:
    valid = torch.ones(1, 2, dtype=torch.bool)
    tables = {
        "unimodal": ["1100", "1100", "0011", "0011"],
        "multimodal": ["1111"] * 4,
        "prefix-causal": ["1100", "1100", "1110", "1111"],
    }
    for mode, rows in tables.items():
        mask = query_text_mask(valid, 2, mode)  # type: ignore[arg-type]
        assert ["".join(str(int(x)) for x in row) for row in mask[0, 0]] == rows


def test_nothing_but_itself_attends_to_padding() -> None:
    valid = torch.tensor([[True, False]])
    for mode in ("unimodal", "multimodal", "prefix-causal"):
        mask = query_text_mask(valid, 1, mode)[0, 0]  # type: ignore[arg-type]
        assert mask[:, 2].tolist() == [False, False, True]


@pytest.mark.parametrize("mode", ["unimodal", "multimodal", "prefix-causal"])
def test_a_changed_word_reaches_whom_the_mode_says(mode: Mode) -> None:
    network, memory = new_network(), torch.randn(2, 7, 5).double()
    before = network(WORDS, memory, mode=mode)
    other = WORDS.clone()
    other[0, 2] = 11
    after = network(other, memory, mode=mode)
    queries, text = changes(before.queries, after.queries), changes(before.text, after.text)
    # Token 3 of the text (the special one in front) is word 2.
    assert queries == [mode == "multimodal"] * 4
    assert text == ([False, False, False, True, True] if mode == "prefix-causal" else [True] * 5)
    assert torch.equal(before.text[1], after.text[1])


@pytest.mark.parametrize("mode", ["unimodal", "multimodal", "prefix-causal"])
def test_a_changed_memory_reaches_the_queries_and_whom_they_reach(mode: Mode) -> None:
    network, memory = new_network(), torch.randn(2, 7, 5).double()
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 5:] = False
    before = network(WORDS, memory, valid, mode)
    padding, seen = memory.clone(), memory.clone()
    padding[0, 6], seen[0, 4] = torch.randn(5), torch.randn(5)
    after_padding, after = network(WORDS, padding, valid, mode), network(WORDS, seen, valid, mode)
    assert torch.equal(before.queries, after_padding.queries)
    assert torch.equal(before.text, after_padding.text)
    assert changes(before.queries, after.queries) == [True] * 4
    assert changes(before.text, after.text) == [mode != "unimodal"] * 5


@pytest.mark.parametrize("mode", ["unimodal", "multimodal", "prefix-causal"])
def test_padding_words_reach_nothing_else(mode: Mode) -> None:
    network, memory = new_network(), torch.randn(2, 7, 5).double()
    whole = network(WORDS, memory, mode=mode)
    short = network(WORDS[1:, :2], memory[1:], mode=mode)
    torch.testing.assert_close(whole.queries[1:], short.queries)
    torch.testing.assert_close(whole.text[1:, :3], short.text)


def test_the_short_ways_give_the_parts_of_the_joint_pass() -> None:
    network, memory = new_network(), torch.randn(2, 7, 5).double()
    valid = torch.rand(2, 7) > 0.4
    reading = network.read_memory(memory, valid)
    unimodal = network(WORDS, memory, valid, "unimodal")
    torch.testing.assert_close(reading.queries, unimodal.queries)
    torch.testing.assert_close(network.read_text(WORDS), unimodal.text)
    causal = network(WORDS, memory, valid, "prefix-causal")
    torch.testing.assert_close(reading.queries, causal.queries)
    torch.testing.assert_close(network.continue_text(WORDS, reading.key_values), causal.text)


def test_words_and_queries_have_feed_forward_networks_of_their_own() -> None:
    network, memory = new_network(), torch.randn(2, 7, 5).double()
    network.read_text(WORDS).sum().backward()
    for layer in network.layers:
        assert all(p.grad is None for p in layer.query_network.parameters())  # type: ignore[union-attr]
        assert all(p.grad is not None for p in layer.text_network.parameters())  # type: ignore[union-attr]
        assert layer.attention.output.weight.grad is not None  # type: ignore[union-attr]
    network.zero_grad()
    network.read_memory(memory).queries.sum().backward()
    assert all(p.grad is None for layer in network.layers for p in layer.text_network.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(("cross_every", "crossing"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_queries_look_at_the_memory_in_every_so_manieth_layer(cross_every: int, crossing: list[int]) -> None:
    network = new_network(cross_every=cross_every)
    assert [number for number, layer in enumerate(network.layers) if layer.cross is not None] == crossing


def test_a_memory_without_a_valid_token_gives_finite_queries() -> None:
    attention, queries = MemoryAttention(8, 5, 2), torch.randn(2, 3, 8)
    found = attention(queries, torch.full((2, 4, 5), 3.0), torch.tensor([[True] * 4, [False] * 4]))
    torch.testing.assert_close(found[1], queries[1] + attention.output.bias)


def test_padding_of_a_memory_may_hold_anything() -> None:
    attention, queries, memory = MemoryAttention(8, 5, 2), torch.randn(2, 3, 8), torch.randn(2, 4, 5)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = attention(queries, memory, valid)
    memory[1, 2:] = torch.nan
    found = attention(queries, memory, valid)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


def test_half_precision_is_finite() -> None:
    network = new_network().bfloat16()
    found = network(WORDS, torch.randn(2, 7, 5).bfloat16())
    assert found.queries.dtype is torch.bfloat16
    assert found.queries.isfinite().all()
    assert found.text.isfinite().all()


def test_bad_input_is_named(as_users_call: None) -> None:
    for sizes, message in (
        ({"num_queries": 0}, "num_queries must be >= 1, got 0"),
        ({"heads": 5}, "heads must divide dim 12, got 5"),
        ({"cross_every": 0}, "cross_every must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            new_network(**sizes)
    with pytest.raises(ValueError, match="padding_id must be in 0 .. 19 or None, got 20"):
        QueryTransformer(20, 5, padding_id=20)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        QueryTransformer(20, 5, dropout=1.0)
    network = new_network()
    with pytest.raises(ValueError, match="words must be at most 6 to a text, got 7"):
        network.read_text(torch.ones(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="words must be ids in 0 .. 19, got 20"):
        network.read_text(torch.tensor([[20]]))
    with pytest.raises(ValueError, match="memory must have tokens of width 5, got 4"):
        network.read_memory(torch.randn(1, 3, 4).double())
    with pytest.raises(
        ValueError, match="mode must be one of unimodal, multimodal, prefix-causal, got 'both'"
    ):
        network(WORDS, torch.randn(2, 3, 5).double(), mode="both")
    with pytest.raises(ValueError, match="num_queries must be >= 0, got -1"):
        query_text_mask(torch.ones(1, 2, dtype=torch.bool), -1, "unimodal")
