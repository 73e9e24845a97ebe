"""Facts about cutting weights to n of m: which layers, what is left, how it is checked, and the way to sparse kernels."""

import pytest
import torch
from torch import nn

from coloss.compression import (
    RowGroupScale,
    choose_nm_layers,
    compress_model,
    decay_budget,
    finalize_nm_,
    load_compressed,
    masked_to_kept_ratio,
    nm_parameter_groups,
    nm_violations,
    semi_structured_,
)
from coloss.errors import InputError
from coloss.ops import nm_mask
from coloss.train import cosine


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def test_the_rule_spares_the_ends_and_a_path_stands_for_what_fits():
    model = network()
    assert list(choose_nm_layers(model)) == ["2", "5"]
    assert list(choose_nm_layers(model, 1, 16)) == ["5"]
    assert list(choose_nm_layers(model, layers=["2", "7"])) == ["2", "7"]


def test_layers_that_cannot_be_cut_are_refused():
    model = network()
    with pytest.raises(InputError, match="at least m=4 inputs, got 0 with fewer"):
        choose_nm_layers(model, layers="0")
    with pytest.raises(InputError, match="no layer with at least m=64 inputs"):
        choose_nm_layers(model, 1, 64)
    with pytest.raises(InputError, match=r"n must be in \[1, m\], got n=5, m=4"):
        choose_nm_layers(model, 5, 4)
    model[7].weight = model[5].weight
    with pytest.raises(InputError, match="weight of 5 is shared"):
        choose_nm_layers(model, layers="5")
    model = network()
    model[5].weight = nn.Parameter(model[5].weight.detach().flatten())
    with pytest.raises(InputError, match="weight of 5 is sharded"):
        choose_nm_layers(model, layers=["2", "5"], m=1, n=1)


def test_parameter_groups_hold_every_trainable_parameter_once():
    model = network()
    model[0].weight.requires_grad_(False)
    groups = nm_parameter_groups(model, 1, 8)
    assert [(group["sparse"], len(group["params"])) for group in groups] == [(True, 2), (False, 5)]
    everyone = [id(p) for group in groups for p in group["params"]]
    assert sorted(everyone) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("nm", [(2, 4), (1, 8)])
def test_the_cut_leaves_exact_zeros_and_the_greatest_weights(nm):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sum(nm_violations(model, *nm).values()) > 0
    masks = finalize_nm_(model, *nm)
    for path, mask in masks.items():
        weight, old = model.get_submodule(path).weight, before[f"{path}.weight"]
        # As hardware groups them: outputs x places x channels.
        hardware = old.movedim(1, -1)
        assert torch.equal(mask, nm_mask(hardware, *nm).movedim(-1, 1))
        assert torch.equal(weight.detach(), torch.where(mask, old, 0.0))
    assert set(nm_violations(model, *nm).values()) == {0}
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(
        model[7].weight, before["7.weight"]
    )
    again = finalize_nm_(model, *nm)
    assert torch.equal(again["5"], masks["5"])


def test_a_remainder_stays_dense():
    model = nn.Sequential(nn.Linear(10, 3))
    finalize_nm_(model, layers="0")
    assert (model[0].weight[:, 8:] != 0).all() and nm_violations(model, layers="0") == {"0": 0}


def test_a_cut_by_given_masks():
    model = network()
    masks = {path: torch.rand_like(layer.weight) > 0.5 for path, layer in choose_nm_layers(model).items()}
    finalize_nm_(model, masks=masks)
    assert torch.equal(model[5].weight != 0, masks["5"])
    with pytest.raises(InputError, match=r"masks must have one of shape \(32, 16\) for 5"):
        finalize_nm_(model, masks={"2": masks["2"], "5": masks["5"][:1]})


def test_a_cut_that_fails_changes_nothing():
    """Trap: a mask that does not fit, or NaN, in the last layer is found when the first layers are cut already."""
    model = network()
    masks = {path: torch.rand_like(layer.weight) > 0.5 for path, layer in choose_nm_layers(model).items()}
    with pytest.raises(InputError, match="masks must be of the chosen layers, 2, 5, got 9"):
        finalize_nm_(model, masks=masks | {"9": masks["5"]})
    with pytest.raises(InputError, match="masks must have one of shape"):
        finalize_nm_(model, masks={"2": masks["2"], "5": masks["5"][:1]})
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        finalize_nm_(model)
    assert (model[2].weight != 0).all()


def test_scales_go_beside_groups_that_were_made_before_them():
    """Their layers have computed weights, which no rule takes; what is pruned is the weight without its scale."""
    model = network()
    groups = nm_parameter_groups(model, layers="5")
    scale = RowGroupScale(model[5])
    groups[1]["params"].append(scale.scale)
    original = model[5].parametrizations.weight.original
    assert groups[0]["params"][0] is original
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    with torch.no_grad():
        scale.scale.fill_(3.0)
    plain = network()
    assert masked_to_kept_ratio([original]) == masked_to_kept_ratio(plain, layers="5")


def test_the_check_reads_the_weights_and_not_a_mask(tmp_path):
    """Trap: the share of masked elements is (m-n)/m whatever the mask was made of."""
    model = network()
    finalize_nm_(model)
    restored = load_compressed(compress_model(model).save(tmp_path / "m.coloss")).load_into(network())
    assert set(nm_violations(restored).values()) == {0}
    with torch.no_grad():
        restored[5].weight[0, :4] = 1.0
    assert nm_violations(restored) == {"2": 0, "5": 1}


def test_ratio_by_hand_of_networks_and_at_the_edges():
    weight = torch.tensor([[4.0, -2.0, 1.0, 0.5], [0.0, 0.0, 6.0, 3.0]])
    ratio = masked_to_kept_ratio([weight])
    assert (ratio.masked, ratio.kept) == (1.5 / 4, 15 / 4)
    assert ratio.mean == pytest.approx(0.1) and ratio.max == pytest.approx(4 / 15)
    assert masked_to_kept_ratio([weight], 4, 4) == (0.0, 0.0, 0.0, pytest.approx(16.5 / 8))
    assert masked_to_kept_ratio([torch.zeros(2, 4)])[:2] == (0.0, 0.0)
    reverse = [torch.tensor([[True, True, False, False]])]
    assert masked_to_kept_ratio([torch.tensor([[0.0, 0.0, 1.0, 1.0]])], masks=reverse).mean == float("inf")
    model = network()
    pooled = masked_to_kept_ratio([model[2].weight, model[5].weight])
    assert masked_to_kept_ratio(model) == pooled and 0.2 < pooled.mean < 0.5
    finalize_nm_(model)
    assert masked_to_kept_ratio(model)[:3] == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        masked_to_kept_ratio([torch.full((1, 4), float("nan"))])


def test_the_budget_is_what_a_loser_travels():
    assert decay_budget(0.1, 4) == pytest.approx(0.1 * (0 + 0.25 + 0.5 + 0.75))
    assert decay_budget(1.0, 1000, cosine()) == pytest.approx(1000 * (0.25 - 1 / torch.pi**2), rel=1e-2)
    with pytest.raises(InputError, match="learning_rate must be >= 0, got -1"):
        decay_budget(-1.0, 4)
    with pytest.raises(InputError, match="total_steps must be >= 1, got 0"):
        decay_budget(1.0, 0)


def test_sparse_kernels_are_refused_honestly_on_a_cpu():
    model = network()
    finalize_nm_(model)
    with pytest.raises(InputError, match="must be on a CUDA device to run on sparse kernels, got cpu"):
        semi_structured_(model)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8),
    reason="needs sparse tensor cores",
)
def test_sparse_kernels_compute_what_the_pruned_layer_computes():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 6)).cuda().half()
    finalize_nm_(model, layers="0")
    with pytest.raises(InputError, match="must be 2:4, got 1 with"):
        semi_structured_(model, layers=["0", "1"])
    assert type(model[0].weight) is nn.Parameter and model[0].weight.layout == torch.strided
    finalize_nm_(model, layers=["0", "1"])
    inputs = torch.randn(128, 128, device="cuda", dtype=torch.half)
    expected = model(inputs)
    done = semi_structured_(model, layers=["0", "1"])
    assert done.converted == ("0", "1") and not done.left
    torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)
