"""Predicted keys and values: sizes, layer maps, pruned copies, and what the consistency loss measures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coloss.distillation import (
    KVCachePredictor,
    causal_language_model_layout,
    kept_layers,
    kv_cache_loss,
    prune_layers,
    pruned_copy,
    uniform_layer_map,
)
from coloss.nn import CausalLanguageModel, KeyValues


def key_values(layers=2, batch=3, heads=2, tokens=5, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        KeyValues(*torch.randn(2, batch, heads, tokens, dim, dtype=torch.float64, generator=generator))
        for _ in range(layers)
    ]


def test_the_published_layer_maps():
    assert uniform_layer_map(28, 20) == [layer // 2 for layer in range(16)] + list(range(8, 20))
    assert uniform_layer_map(28, 14) == [layer // 2 for layer in range(28)]
    assert kept_layers(16, 0.25) == [0, 4, 8, 12]
    assert kept_layers(16, 0.5) == list(range(0, 16, 2))
    assert kept_layers(16, 0.75) == [layer for layer in range(16) if layer % 4 != 3]


@given(st.integers(1, 40), st.data(), st.sampled_from(["early", "even"]))
def test_a_layer_map_is_in_order_and_fair(base, data, share):
    small = data.draw(st.integers(1, base))
    found = uniform_layer_map(base, small, share)
    counts = np.bincount(found, minlength=small)
    assert found == sorted(found)
    assert len(found) == base
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 1


@given(st.integers(1, 40), st.floats(0.01, 1.0))
def test_kept_layers_rise_from_the_first(depth, share):
    found = kept_layers(depth, share)
    assert len(found) == max(round(depth * share), 1)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[-1] < depth


def test_a_map_acts_on_all_heads_together():
    predictor = KVCachePredictor([8], [6], [3], [0]).double()
    (layer,) = key_values(1)
    (found,) = predictor([layer])
    weight, bias = predictor.keys[0].weight.detach().numpy(), predictor.keys[0].bias.detach().numpy()
    for item in range(3):
        for token in range(5):
            merged = layer.keys[item, :, token].reshape(-1).numpy()
            expected = (weight @ merged + bias).reshape(3, 2)
            np.testing.assert_allclose(found.keys[item, :, token].detach().numpy(), expected)
    assert predictor.sizes == [(8, 6, 3)]


def test_sizes_come_from_grouped_queries():
    small = CausalLanguageModel(7, 12, 2, 3, key_value_heads=1)
    base = CausalLanguageModel(7, 16, 4, 4, key_value_heads=2)
    predictor = KVCachePredictor.between(small, base, [0, 0, 0, 1])
    assert predictor.sizes == [(4, 8, 2)] * 4
    found = predictor(small.key_values(torch.zeros(2, 5, dtype=torch.long))[0])
    assert [layer.keys.shape for layer in found] == [(2, 2, 5, 4)] * 4
    torch.testing.assert_close(
        found[0].values, predictor([*small.key_values(torch.zeros(2, 5, dtype=torch.long))[0]])[0].values
    )


def test_identity_maps_give_back_what_they_get():
    given_layers = key_values()
    found = KVCachePredictor([8, 8], [8, 8], [2, 2], [0, 1]).start_as_identity().double()(given_layers)
    for one, other in zip(found, given_layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    with pytest.raises(ValueError, match="equal sizes to begin as identity, got 4 to 8"):
        KVCachePredictor([4], [8], [2], [0]).start_as_identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4, 4], [4], [2], [2]), "layer_map must name layers 0 to 1 of the auxiliary model, got 2"),
        (([4, 4], [4], [2], [-1]), "layer_map must name layers 0 to 1 of the auxiliary model, got -1"),
        (([4, 4], [4, 4], [2, 2], [1, 0]), r"layer_map must never fall, got \[1, 0\]"),
        (([4], [4, 4], [2, 2], [0]), "one number for each layer of the base, got 2, 2 and 1"),
        (([4], [4], [3], [0]), "base_heads must divide base_dims 4, got 3"),
    ],
)
def test_bad_predictors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVCachePredictor(*arguments)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="auxiliary_layers must be from 1 to base_layers 3, got 4"):
        uniform_layer_map(3, 4)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            kept_layers(4, share)
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        kept_layers(0, 0.5)
    with pytest.raises(ValueError, match="key_values must be of 2 layers of the auxiliary model, got 1"):
        KVCachePredictor([8, 8], [8], [2], [1])(key_values(1))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_pruned_copy_has_the_kept_layers_and_shares_nothing(normalize):
    model = CausalLanguageModel(7, 8, 4, 2, normalize_keys=normalize)
    for position, parameter in enumerate(model.parameters()):
        parameter.data += position  # so that layers differ in their norms, too
    copy = pruned_copy(model.requires_grad_(False), [1, 3])
    expected = prune_layers(model.state_dict(), causal_language_model_layout(), [1, 3])
    assert copy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in copy.state_dict().items())
    assert all(parameter.requires_grad for parameter in copy.parameters())
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in model.parameters()}
    ids = torch.randint(7, (2, 6))
    torch.testing.assert_close(pruned_copy(model, [0, 1, 2, 3])(ids), model(ids))


@pytest.mark.parametrize("keep", [[], [1, 0], [1, 1], [0, 2], [-1, 0]])
def test_bad_pruning_is_refused(keep):
    with pytest.raises(ValueError, match="keep must be rising numbers of layers, from 0 to 1, got"):
        pruned_copy(CausalLanguageModel(7, 8, 2, 2), keep)


def test_the_loss_is_that_of_plain_loops_and_sums_over_layers():
    predicted, target = key_values(seed=0), key_values(seed=1)
    valid = torch.tensor([[False, True, True, True, True]] * 2 + [[True] * 5])
    expected = []
    for mine, true in zip(predicted, target, strict=True):
        parts = [
            np.mean(
                [
                    abs(float(a[i, h, t, d] - b[i, h, t, d]))
                    for i in range(3)
                    for h in range(2)
                    for t in range(5)
                    for d in range(4)
                    if valid[i, t]
                ]
            )
            for a, b in zip(mine, true, strict=True)
        ]
        expected.append(sum(parts))
    total, layers = kv_cache_loss(predicted, target, valid)
    np.testing.assert_allclose([value.item() for value in layers.values()], expected)
    np.testing.assert_allclose(total.item(), sum(expected))
    mean, _ = kv_cache_loss(predicted, target, valid, "mean_layers")
    np.testing.assert_allclose(mean.item(), sum(expected) / 2)


def test_padding_cannot_reach_the_loss_nor_its_gradient():
    predicted, target = key_values(1, seed=0), key_values(1, seed=1)
    valid = torch.arange(5)[None].expand(3, 5) >= 2
    predicted[0].keys[:, :, :2] = float("inf")
    keys = predicted[0].keys.requires_grad_()
    total, _ = kv_cache_loss([KeyValues(keys, predicted[0].values)], target, valid)
    total.backward()
    assert total.isfinite()
    assert not keys.grad[:, :, :2].any()
    assert keys.grad[:, :, 2:].all()


def test_half_precision_is_measured_in_full_and_nan_stays_nan():
    predicted, target = key_values(seed=0), key_values(seed=1)
    half = [[KeyValues(*(x.bfloat16() for x in layer)) for layer in some] for some in (predicted, target)]
    assert kv_cache_loss(*half)[0].dtype == torch.float32
    torch.testing.assert_close(
        kv_cache_loss(*half)[0].double(), kv_cache_loss(predicted, target)[0], rtol=1e-2, atol=0
    )
    predicted[1].values[0, 0, 0, 0] = float("nan")
    assert kv_cache_loss(predicted, target)[0].isnan()


def test_bad_caches_are_refused():
    with pytest.raises(ValueError, match="must be of as many layers, at least one, got 2 and 1"):
        kv_cache_loss(key_values(2), key_values(1))
    with pytest.raises(
        ValueError, match=r"keys of layer 0 must have shape \(3, 1, 5, 4\), got \(3, 2, 5, 4\)"
    ):
        kv_cache_loss(key_values(1), key_values(1, heads=1))
