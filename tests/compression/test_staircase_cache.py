"""The staircase cache: exact at 16 bits, steps by age, packed to the byte, and in the place of a plain cache."""

import math
from functools import partial

import pytest
import torch

from coloss.compression import StaircaseCache, StaircaseKVCache, cached_loss
from coloss.compression.staircase_trial import CACHES, STEP, mean_bits
from coloss.lab.claims import verify
from coloss.nn import CausalLanguageModel, KeyValueCache

KEYS, VALUES = torch.randn(2, 2, 3, 120, 16, generator=torch.Generator().manual_seed(0)).unbind()


def model(**sizes):
    torch.manual_seed(0)
    return CausalLanguageModel(11, dim=32, depth=2, heads=2, context=64, **sizes).eval()


IDS = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(1))


def test_all_sixteen_is_exact():
    cache = StaircaseKVCache((16, 16, 16), step=16, group=8)
    for start in range(0, 120, 7):
        keys, values = cache.update(KEYS[:, :, start : start + 7], VALUES[:, :, start : start + 7])
    assert torch.equal(keys, KEYS) and torch.equal(values, VALUES)
    assert cache.bits_per_age() == [(120, 16)] and cache.nbytes() == KEYS.nbytes + VALUES.nbytes


def test_chunks_go_down_the_stairs():
    cache = StaircaseKVCache((16, 8, 4, 2), step=8, group=8)
    found = []
    for push in range(6):
        cache.update(KEYS[:, :, 8 * push : 8 * push + 8], VALUES[:, :, 8 * push : 8 * push + 8])
        found.append(cache.bits_per_age())
    assert found == [
        [(8, 8)],
        [(8, 8), (8, 4)],
        [(8, 8), (8, 4), (8, 2)],
        [(8, 8), (8, 4), (16, 2)],
        [(8, 8), (8, 4), (24, 2)],
        [(8, 8), (8, 4), (32, 2)],
    ]
    numbers = 2 * 2 * 3 * 16  # of keys and values, each token
    assert cache.nbytes() * 8 == numbers * (8 * 8 + 8 * 4 + 32 * 2 + 48 * 32 // 8)


@pytest.mark.parametrize("grid", ["ends", "bins"])
def test_what_is_stored_does_not_depend_on_the_pieces(grid):
    at_once, by_token = (StaircaseKVCache((16, 8, 4, 2), 16, 8, grid=grid) for _ in range(2))
    at_once.update(KEYS, VALUES)
    for token in range(120):
        by_token.update(KEYS[:, :, token : token + 1], VALUES[:, :, token : token + 1])
    assert all(torch.equal(a, b) for a, b in zip(at_once.stored(), by_token.stored(), strict=True))
    assert at_once.nbytes() == by_token.nbytes() and len(by_token) == 120


def test_new_tokens_come_back_exactly_and_old_ones_coarser():
    cache = StaircaseKVCache((16, 8, 2), step=16, group=8)
    cache.update(KEYS[:, :, :100], VALUES[:, :, :100])
    keys, _ = cache.update(KEYS[:, :, 100:], VALUES[:, :, 100:])
    error = (keys - KEYS).abs().amax((0, 1, 3))
    assert bool((error[96:] == 0).all())  # of 100 the last 4 were not quantised yet
    assert 0 < error[80:96].max() < error[:80].max() / 10


def test_a_type_for_the_newest():
    cache = StaircaseKVCache((16, 4), step=16, group=8, kept=torch.float16)
    cache.update(KEYS[:, :, :5], VALUES[:, :, :5])
    assert cache.nbytes() == 2 * 2 * 3 * 5 * 16 * 2
    assert cache.stored()[0].dtype == torch.float16


@pytest.mark.parametrize("pieces", [[23, 17], [30] + [1] * 10])
@pytest.mark.parametrize("sizes", [{}, {"key_value_heads": 1, "normalize_keys": True}])
def test_in_the_place_of_a_plain_cache(pieces, sizes):
    network, cache = model(**sizes), StaircaseCache((16, 16, 16), step=8, group=8)
    plain = KeyValueCache()
    for part in IDS.split(pieces, 1):
        assert torch.equal(network(part, cache=cache), network(part, cache=plain))
    assert len(cache) == 40
    for own, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(own[0], other[0]) and torch.equal(own[1], other[1])


def test_a_model_with_a_staircase_is_near_the_model():
    network = model()
    exact = network(IDS)
    gaps = []
    for bits in ((16, 8), (16, 4), (16, 2)):
        cache = StaircaseCache(bits, step=8, group=8)
        logits = torch.cat([network(part, cache=cache) for part in IDS.split(8, 1)], 1)
        assert torch.allclose(logits[:, :8], exact[:, :8], atol=1e-5)  # nothing is quantised yet
        gaps.append((logits - exact).abs().mean().item())
    assert gaps[0] < gaps[1] < gaps[2] and gaps[0] < 0.01


def test_padding_is_not_seen():
    """Other tokens in the places of padding change nothing, though keys are quantised with their neighbours."""
    network = model()
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[0, :5] = False
    other = IDS.clone()
    other[0, :5] = (IDS[0, :5] + 3) % 11
    found = []
    for ids in (IDS, other):
        cache = StaircaseCache((16, 4, 2), step=8, group=8)
        network(ids[:, :30], valid[:, :30], cache=cache)
        found.append(network(ids[:, 30:], valid[:, 30:], cache=cache))
    assert torch.equal(*found)


def test_generation_and_filling():
    network = model()
    plain = network.generate(IDS[:, :5], 12, cache=StaircaseCache((16, 16), 8, 8))
    assert torch.equal(plain, network.generate(IDS[:, :5], 12))
    cache, read = StaircaseCache((16, 4), 8, 8), StaircaseCache((16, 4), 8, 8)
    network.fill(cache, network.key_values(IDS[:, :20])[0])
    network(IDS[:, :20], cache=read)
    torch.testing.assert_close(cache.layers[1], read.layers[1], atol=1e-4, rtol=1e-4)


def test_levels_for_each_layer():
    network, cache = model(), StaircaseCache([(16, 8), (16, 2)], step=8, group=8)
    network(IDS, cache=cache)
    assert [cache.bits_per_age(layer) for layer in (0, 1)] == [[(40, 8)], [(40, 2)]]
    assert cache.bits_per_value() == (8 + 2) / 2 + 32 / 8
    with pytest.raises(ValueError, match="levels for every layer"):
        network(IDS, cache=StaircaseCache([(16, 8)], step=8, group=8))
    many = StaircaseCache([(16, 8)] * 3, step=8, group=8)
    network(IDS[:, :9], cache=many)
    with pytest.raises(ValueError, match="for the 2 layers of the model, got 3 lists"):
        many.bits_per_value()
    with pytest.raises(ValueError, match="for the 2 layers of the model, got 3 lists"):
        network(IDS[:, 9:], cache=many)


def test_loss_through_a_cache():
    network, ids = model().train(), IDS[:, :25]
    whole = cached_loss(network, ids, KeyValueCache, piece=64)
    by_token = cached_loss(network, ids, KeyValueCache)
    assert network.training and whole["loss"] == pytest.approx(by_token["loss"], abs=1e-5)
    assert whole["cache_bytes"] == 2 * 2 * 2 * 24 * 32 * 4 and whole["cache_bits"] == 32
    late = cached_loss(network, ids, KeyValueCache, skip=23)
    logits = network.eval()(ids[:, :-1])[:, -1]
    assert late["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, ids[:, -1]).item(), abs=1e-5
    )
    # A piece that divides the step leaves the cache as it is token by token.
    make = partial(StaircaseCache, (16, 4, 2), 8, 8)
    pieces = [cached_loss(network, ids, make, piece=piece) for piece in (1, 8)]
    for found in pieces[1:]:
        assert found == pytest.approx(pieces[0], abs=1e-4)


def test_gradients_reach_the_new_tokens():
    """As through a plain cache whose first tokens were read without gradients."""
    network, found = model(), []
    for cache in (KeyValueCache(), StaircaseCache((16, 16), 8, 8)):
        with torch.no_grad():
            network(IDS[:, :16], cache=cache)
        loss = network(IDS[:, 16:], cache=cache).square().mean()
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(*found)


def test_what_is_stored_keeps_no_graph():
    keys = KEYS[:, :, :20].clone().requires_grad_()
    cache = StaircaseKVCache((16, 4), step=8, group=8)
    first, _ = cache.update(keys, VALUES[:, :, :20])
    assert first is keys and not any(part.requires_grad for part in cache.stored())
    both, _ = cache.update(keys[:, :, :3], VALUES[:, :, :3])
    assert torch.autograd.grad(both.sum(), keys)[0].sum() == 2 * 3 * 3 * 16


def test_a_piece_without_tokens_changes_nothing():
    network = model()
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[0, :5] = False
    found = []
    for pieces in ([20, 20], [20, 0, 20]):
        cache = StaircaseCache((16, 4, 2), step=16, group=8)
        parts = zip(IDS.split(pieces, 1), valid.split(pieces, 1), strict=True)
        found.append(torch.cat([network(ids, own, cache=cache) for ids, own in parts], 1))
    assert torch.equal(*found)


def test_a_refused_update_changes_nothing():
    cache = StaircaseKVCache((16, 8, 4), step=8, group=8)
    with pytest.raises(ValueError, match="float16's range"):
        cache.update(1e6 * KEYS[:, :, :8], VALUES[:, :, :8])
    assert len(cache) == 0 and cache.stored() is None
    other = StaircaseKVCache((16, 8, 4), step=8, group=8)
    padding = torch.arange(12).expand(2, 12) >= 3
    for own in (cache, other):
        own.update(KEYS[:, :, :12], VALUES[:, :, :12], padding)
    with pytest.raises(ValueError, match="float16's range"):
        cache.update(KEYS[:, :, 12:20], 1e6 * VALUES[:, :, 12:20])
    assert cache.bits_per_age() == [(4, 16), (8, 8)]
    for own in (cache, other):
        own.update(KEYS[:, :, 12:60], VALUES[:, :, 12:60])
    assert all(torch.equal(a, b) for a, b in zip(cache.stored(), other.stored(), strict=True))


@pytest.mark.parametrize("tokens", [2 * STEP, 2 * STEP + 7])
def test_bits_over_a_text_are_those_of_every_token(tokens):
    make = partial(StaircaseCache, step=STEP, kept=torch.float16, **CACHES["staircase"])
    cache, bits = make(), 0
    for _ in range(tokens):
        cache.update(0, *torch.zeros(2, 1, 1, 1, 16).unbind())
        bits += 8 * cache.nbytes()
    assert mean_bits(make, tokens, dim=16) == bits / (16 * tokens * (tokens + 1))


def test_half_precision():
    cache = StaircaseKVCache((16, 8, 2), step=16, group=8)
    keys, _ = cache.update(KEYS.bfloat16(), VALUES.bfloat16())
    assert keys.dtype == torch.bfloat16 and cache.stored()[0].dtype == torch.bfloat16
    assert (cache.stored()[0].float() - KEYS)[:, :, 96:112].abs().max() < 0.05


def test_bad_input_is_refused():
    for arguments, message in (
        ({"bits": (8, 4)}, "begin with 16"),
        ({"bits": (16, 2, 4)}, "never rise"),
        ({"bits": (16, 12)}, "in 1..8"),
        ({"step": 40}, "step must be a multiple of group"),
        ({"kept": torch.int8}, "kept must be a floating type"),
    ):
        for kind in (StaircaseKVCache, StaircaseCache):
            with pytest.raises(ValueError, match=message):
                kind(**arguments)
    cache = StaircaseKVCache((16, 4), step=24, group=12)
    with pytest.raises(ValueError, match="group must divide the 16 channels"):
        cache.update(KEYS, VALUES)
    cache = StaircaseKVCache((16, 4), step=8, group=8)
    cache.update(KEYS, VALUES)
    with pytest.raises(ValueError, match="as those before"):
        cache.update(KEYS[:1], VALUES[:1])
    with pytest.raises(ValueError, match="skip"):
        cached_loss(model(), IDS, KeyValueCache, skip=39)
    with pytest.raises(ValueError, match="piece must be >= 1"):
        cached_loss(model(), IDS, KeyValueCache, piece=0)


def test_the_claim_runs_small_and_counts_bits():
    arms = verify("genai-optimization", smoke=True, seeds=1)["arms"]
    names = ("uniform", "uniform 3 bits, nested grid", "staircase")
    assert [arms[name]["metrics"]["cache_bits"]["mean"] for name in names] == [4.0, 4.0, 3.5]
    mean = [arms[name]["metrics"]["mean_bits"]["mean"] for name in names]
    assert mean[0] == mean[1]
    assert all(math.isfinite(arm["metrics"]["loss"]["mean"]) for arm in arms.values())
