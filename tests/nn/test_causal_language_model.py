"""The causal language model: caches, keys and values from outside, and padding never change what it says."""

import math

import pytest
import torch

from coloss.nn import CausalLanguageModel, KeyValueCache, KeyValues, next_token_loss

SHAPES = [
    {},
    {"key_value_heads": 2},
    {"positions": "learned", "tied": False},
    {"normalize_keys": True, "key_value_heads": 1},
]


@pytest.fixture(params=SHAPES, ids=["plain", "grouped", "learned", "normalised"])
def model(request):
    torch.manual_seed(0)
    return CausalLanguageModel(11, dim=16, depth=3, heads=4, context=16, **request.param).double().eval()


IDS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))


def test_no_token_sees_a_later_one(model):
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(IDS), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("pieces", [[9], [4, 5], [3, 1, 1, 4], [1] * 9])
def test_reading_in_pieces_with_a_cache_is_reading_at_once(model, pieces):
    cache = KeyValueCache()
    parts = [model(part, cache=cache) for part in IDS.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS))
    assert len(cache) == 9


def test_its_own_keys_and_values_given_back_change_nothing(model):
    layers, features = model.key_values(IDS, with_features=True)
    torch.testing.assert_close(model(IDS, given=layers), model(IDS))
    torch.testing.assert_close(model.logits(features), model(IDS))
    alone, nothing = model.key_values(IDS)
    assert nothing is None
    for own, other in zip(layers, alone, strict=True):
        torch.testing.assert_close(own.keys, other.keys)
        torch.testing.assert_close(own.values, other.values)


def test_a_filled_cache_is_a_read_prompt(model):
    cache = KeyValueCache()
    model.fill(cache, model.key_values(IDS[:, :6])[0])
    torch.testing.assert_close(model(IDS[:, 6:], cache=cache), model(IDS)[:, 6:])


def test_other_keys_and_values_do_change_something(model):
    layers, _ = model.key_values(IDS)
    other = [KeyValues(keys, values + 1) for keys, values in layers]
    assert not torch.allclose(model(IDS, given=other), model(IDS))


def test_padding_in_front_changes_nothing_for_the_others(model):
    short = IDS[:1, 3:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    valid = torch.arange(9)[None] >= 3
    torch.testing.assert_close(model(padded, valid)[:, 3:], model(short))
    assert model(padded, valid).isfinite().all()
    cache, whole = KeyValueCache(), KeyValueCache()
    model(padded[:, :6], valid[:, :6], cache=cache)
    model(short[:, :3], cache=whole)
    torch.testing.assert_close(model(padded[:, 6:], cache=cache), model(short[:, 3:], cache=whole))
    filled = KeyValueCache()
    model.fill(filled, model.key_values(padded[:, :6], valid[:, :6])[0], valid[:, :6])
    torch.testing.assert_close(model(padded[:, 6:], cache=filled), model(short)[:, 3:])


def test_greedy_text_is_the_text_of_repeated_reading(model):
    ids = IDS[:, :4]
    written = model.generate(ids, 5)
    for _ in range(5):
        ids = torch.cat([ids, model(ids, last_only=True)[:, -1].argmax(1, keepdim=True)], 1)
    assert torch.equal(written, ids[:, 4:])
    torch.testing.assert_close(model(IDS, last_only=True), model(IDS)[:, -1:])


@pytest.mark.parametrize("pieces", [[9], [4, 5], [8, 1], [1] * 9])
def test_the_last_token_alone_is_the_last_of_all(model, pieces):
    cache = KeyValueCache()
    for part in IDS.split(pieces, 1):
        found = model(part, cache=cache, last_only=True)
    torch.testing.assert_close(found, model(IDS)[:, -1:])
    valid = torch.arange(9)[None].expand(2, 9) >= torch.tensor([[3], [0]])
    torch.testing.assert_close(model(IDS, valid, last_only=True), model(IDS, valid)[:, -1:])


class OwnBlock(torch.nn.Module):
    """Attention of tokens to those before them in their own block of three."""

    def forward(self, queries, keys, values):
        places = torch.arange(queries.shape[2])
        mask = (places[:, None] >= places) & (places[:, None] // 3 == places // 3)
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=keys.shape[1] != queries.shape[1]
        )


@pytest.mark.parametrize("depth", [1, 2])
def test_what_stands_in_for_causal_attention_does_so_for_the_last_token_alone(depth):
    torch.manual_seed(0)
    model = CausalLanguageModel(11, 16, depth, 4, causal_attention=OwnBlock()).double().eval()
    plain = CausalLanguageModel(11, 16, depth, 4).double().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IDS, last_only=True), model(IDS)[:, -1:])
    assert not torch.allclose(model(IDS), plain(IDS))
    # As long as the text is read anew, its first written token is the likeliest after the whole text.
    assert torch.equal(model.generate(IDS, 1)[:, 0], model(IDS)[:, -1].argmax(-1))
    valid = torch.ones_like(IDS, dtype=torch.bool)
    torch.testing.assert_close(model(IDS, valid, last_only=True), plain(IDS, valid)[:, -1:])


def test_what_stands_in_for_causal_attention_reads_an_empty_cache_and_no_other():
    torch.manual_seed(0)
    model = CausalLanguageModel(11, 16, 2, 4, causal_attention=OwnBlock()).double().eval()
    plain = CausalLanguageModel(11, 16, 2, 4).double().eval()
    plain.load_state_dict(model.state_dict())
    cache = KeyValueCache()
    torch.testing.assert_close(model(IDS, cache=cache), model(IDS))
    torch.testing.assert_close(model(IDS, torch.ones_like(IDS, dtype=torch.bool)), plain(IDS))
    caches = [KeyValueCache(), KeyValueCache()]
    for own in caches:
        plain(IDS[:, :4], cache=own)
    for part in IDS[:, 4:].split([4, 1], 1):
        torch.testing.assert_close(model(part, cache=caches[0]), plain(part, cache=caches[1]))


def test_dropout_does_not_reach_what_stands_in_for_causal_attention():
    torch.manual_seed(0)
    for attention, same in ((OwnBlock(), True), (None, False)):
        model = CausalLanguageModel(11, 16, 2, 4, dropout=0.5, causal_attention=attention).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # that of the weights of attention remains
        assert torch.equal(model(IDS), model(IDS)) == same


def test_the_last_token_alone_costs_less():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = CausalLanguageModel(11, 16, 1, 4), torch.zeros(1, 64, dtype=torch.long)
    counts = []
    for last_only in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, last_only=last_only)
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.5 * counts[0]


def test_drawn_text_follows_its_generator_and_the_temperature(model):
    draws = [
        model.generate(IDS, 6, temperature=5.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    cold = model.generate(IDS, 3, temperature=1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, model.generate(IDS, 3))


def test_the_loss_starts_near_that_of_guessing_and_ignores_what_it_shall():
    torch.manual_seed(0)
    model = CausalLanguageModel(50, dim=32, depth=2, heads=4)
    ids, targets = torch.randint(50, (2, 4, 20))
    assert abs(next_token_loss(model(ids), targets).item() - math.log(50)) < 0.8
    targets[:, 10:] = -100
    torch.testing.assert_close(
        next_token_loss(model(ids), targets), next_token_loss(model(ids)[:, :10], targets[:, :10])
    )


def test_a_tied_output_is_the_embedding():
    tied, free = (CausalLanguageModel(7, 8, 1, 2, tied=tied) for tied in (True, False))
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 7 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"vocabulary_size": 0}, "vocabulary_size must be >= 1, got 0"),
        ({"context": 0}, "context must be >= 1, got 0"),
        ({"key_value_heads": 3}, "key_value_heads must divide heads 4, got 3"),
        ({"dim": 12}, "must be even for rotary positions, got 12 / 4"),
        ({"heads": 5}, "heads must divide dim"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CausalLanguageModel(**{"vocabulary_size": 7, "dim": 16, "heads": 4, **options})


def test_bad_calls_are_refused(model):
    layers, _ = model.key_values(IDS)
    with pytest.raises(
        ValueError, match="given must hold keys and values for 3 layers and no cache, got 2 of them"
    ):
        model(IDS, given=layers[:2])
    with pytest.raises(ValueError, match="got a cache beside them"):
        model(IDS, given=layers, cache=KeyValueCache())
    cache = KeyValueCache()
    model.fill(cache, layers)
    with pytest.raises(
        ValueError, match="an empty cache takes keys and values of 3 layers, got 9 tokens in the cache"
    ):
        model.fill(cache, layers)
    with pytest.raises(ValueError, match=r"ids must have at least one token, got shape \(2, 0\)"):
        model.generate(IDS[:, :0], 1)
    with pytest.raises(ValueError, match="max_tokens must be >= 1, got 0"):
        model.generate(IDS, 0)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        model.generate(IDS, 1, temperature=-1.0)
    if model.positions is not None:
        with pytest.raises(ValueError, match="ids must fit the context of 16 tokens, got position 16"):
            model(torch.zeros(1, 17, dtype=torch.long))


def test_a_refused_call_leaves_the_cache_as_it_was():
    model, cache = CausalLanguageModel(11, 8, 2, 2, context=8, positions="learned").eval(), KeyValueCache()
    ids = torch.arange(8)[None]
    model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="ids must fit the context of 8 tokens, got position 8"):
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    assert len(cache) == cache.layers[0][0].shape[2] == 5
    torch.testing.assert_close(model(ids[:, 5:], cache=cache), model(ids)[:, 5:])
