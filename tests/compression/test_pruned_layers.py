"""What pruning leaves of layers, and one cut by magnitude."""

import math

import pytest
import torch
from torch import nn

from coloss.compression import prune_by_magnitude, sparsity_report
from coloss.errors import InputError
from coloss.nn import MLP


def test_report_of_dead_rows_and_columns():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[:, 2] = 0
        model[2].weight.zero_()
    convolution, linear = sparsity_report(model)
    assert (convolution.path, convolution.weights) == ("0", 48)
    assert (convolution.dead_rows, convolution.dead_columns) == (1, 1)
    assert convolution.density == 3 * 2 / 12
    assert (linear.dead_rows, linear.dead_columns, linear.density, linear.delta_rank) == (2, 4, 0, 0)
    assert [row.path for row in sparsity_report(model, "2")] == ["2"]
    with pytest.raises(InputError, match="ReLU has no linear layer or convolution"):
        sparsity_report(nn.ReLU())


def test_one_cut_after_training():
    model = MLP(8, (16, 16), 3, norm=None)
    weight = model.layers[2].weight
    kept = weight.detach().abs().flatten().topk(math.floor(0.1 * 256 + 0.5)).values.min()
    assert prune_by_magnitude(model, 0.9) is model
    assert int(weight.count_nonzero()) == 26
    assert weight[weight != 0].abs().min() == kept
    assert model.layers[0].weight.all()
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 1"):
        prune_by_magnitude(model, 1.0)


def test_dead_inputs_of_a_grouped_convolution_are_those_its_own_group_does_not_read():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 6, 1, groups=2))
    with torch.no_grad():
        model[0].weight[1] = 0
        # The second input of the second group: nothing reads the fourth channel.
        model[1].weight[3:, 1] = 0
        model[1].weight[0, 0] = 0
    depthwise, grouped = sparsity_report(model)
    assert (depthwise.dead_rows, depthwise.dead_columns) == (1, 1)
    assert (grouped.dead_rows, grouped.dead_columns) == (0, 1)


def test_a_weight_that_layers_share_is_counted_and_pruned_once():
    def tied():
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
        model[1].weight = model[0].weight
        return model

    model = tied()
    with torch.no_grad():
        model[0].weight.mul_(3)
    prune_by_magnitude(model, 0.5, layers="")
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == 400
    assert [row.path for row in sparsity_report(model)] == ["0", "2"]
    assert [row.path for row in sparsity_report(model, ["1", "2"])] == ["1", "2"]
    # With ties: half stay, where two places of nine once wiped each other out.
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    prune_by_magnitude(model, 0.5, layers="")
    assert int(model[0].weight.count_nonzero()) == 4


def test_a_cut_that_leaves_nothing_and_an_unknown_scope_are_named(as_users_call):
    with pytest.raises(InputError, match=r"sparsity must leave a density of at least 1e-12, got 0.9"):
        prune_by_magnitude(nn.Linear(2, 2), 1 - 1e-13, layers="")
    with pytest.raises(InputError, match=r'scope must be "global" or "layer", got \'foo\''):
        prune_by_magnitude(nn.Linear(2, 2), 0.5, layers="", scope="foo")
