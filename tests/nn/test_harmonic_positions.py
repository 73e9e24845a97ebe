"""A penalty on distance beside rotary positions: its limits, its two forms, and its place in the language model."""

import pytest
import torch
import torch.nn.functional as F

from coloss.nn import (
    CausalLanguageModel,
    KeyValueCache,
    alibi_slopes,
    harmonic_numbers,
    harmonic_slopes,
    rotary_alibi_bias,
    rotary_alibi_score_mod,
    rotary_angles,
    rotate,
)

PLACES = torch.arange(6)
QUERIES, KEYS, VALUES = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()


def attention(bias):
    angles = rotary_angles(PLACES, 4)
    return F.scaled_dot_product_attention(
        rotate(QUERIES, angles), rotate(KEYS, angles), VALUES, attn_mask=bias
    )


def test_no_slope_is_rotary_alone():
    angles = rotary_angles(PLACES, 4)
    plain = F.scaled_dot_product_attention(
        rotate(QUERIES, angles), rotate(KEYS, angles), VALUES, is_causal=True
    )
    torch.testing.assert_close(attention(rotary_alibi_bias(PLACES, PLACES, torch.zeros(2))), plain)


def test_no_turn_is_alibi():
    """With alibi's slopes, written out entry by entry; no base stops the turns, as that of the first pair is always 1."""
    slopes = alibi_slopes(2)
    logits = torch.full((1, 2, 6, 6), -torch.inf)
    for head in range(2):
        for m in range(6):
            for n in range(m + 1):
                logits[0, head, m, n] = QUERIES[0, head, m] @ KEYS[0, head, n] / 8**0.5 - 2.0 ** (
                    -8 * (head + 1) / 2
                ) * (m - n)
    bias = rotary_alibi_bias(PLACES, PLACES, slopes)
    unturned = F.scaled_dot_product_attention(QUERIES, KEYS, VALUES, attn_mask=bias)
    torch.testing.assert_close(unturned, logits.softmax(-1) @ VALUES)


def test_slopes_and_numbers():
    assert harmonic_slopes(3).tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    found = harmonic_numbers(torch.arange(200))
    assert found.tolist() == pytest.approx(
        [sum(1 / i for i in range(1, j + 1)) for j in range(200)], abs=1e-5
    )
    linear, log = (
        rotary_alibi_bias(torch.tensor([100]), torch.tensor([0]), torch.ones(1), distance=distance).item()
        for distance in ("linear", "harmonic")
    )
    assert linear == -100 and log == pytest.approx(-5.18738, abs=1e-4)


@pytest.mark.parametrize("distance", ["linear", "harmonic"])
def test_the_score_mod_is_the_bias(distance):
    slopes = harmonic_slopes(2)
    change = rotary_alibi_score_mod(slopes, 6, distance=distance)
    head = torch.arange(2)[:, None, None]
    scores = change(torch.zeros(2, 6, 6), torch.tensor(0), head, PLACES[:, None], PLACES)
    torch.testing.assert_close(scores, rotary_alibi_bias(PLACES, PLACES, slopes, distance=distance))


def test_a_longer_distance_counts_as_the_greatest():
    change = rotary_alibi_score_mod(torch.ones(1), length=8)
    query = torch.tensor([7, 8, 9, 20])
    found = change(torch.ones(4), torch.tensor(0), torch.tensor(0), query, torch.tensor(0))
    assert found.tolist() == [-6, -7, -7, -7]


def network(positions):
    torch.manual_seed(0)
    return CausalLanguageModel(11, 16, 2, 2, positions=positions, context=16).double().eval()


IDS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["rotary-harmonic", "rotary-harmonic-log"])
def test_the_language_model_reads_alike_in_pieces_and_with_padding(positions):
    model, cache = network(positions), KeyValueCache()
    whole = model(IDS)
    parts = [model(part, cache=cache) for part in IDS.split([4, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    valid = torch.arange(12).expand(2, 12) >= 3
    torch.testing.assert_close(model(padded, valid)[:, 3:], whole)
    layers, _ = model.key_values(IDS)
    torch.testing.assert_close(model(IDS, given=layers), whole)
    torch.testing.assert_close(model(IDS, last_only=True), whole[:, -1:])
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :5], whole[:, :5])


def test_the_language_model_without_slopes_is_the_rotary_one():
    model, plain = network("rotary-harmonic"), network("rotary")
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    assert not torch.allclose(model(IDS), plain(IDS))
    model.distance_slopes.zero_()
    torch.testing.assert_close(model(IDS), plain(IDS))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="slopes must be >= 0"):
        rotary_alibi_bias(PLACES, PLACES, torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="heads must be >= 1"):
        harmonic_slopes(0)
    with pytest.raises(ValueError, match="length must be >= 1"):
        rotary_alibi_score_mod(torch.ones(1), 0)
    with pytest.raises(ValueError, match="causal_attention must be None"):
        CausalLanguageModel(5, 8, 1, 2, positions="rotary-harmonic", causal_attention=torch.nn.Identity())
    model = network("rotary-harmonic")
    model.causal_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="causal_attention must be None with harmonic positions"):
        model(IDS)
