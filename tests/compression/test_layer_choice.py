"""Which layers are compressed where none are named."""

import pytest
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from coloss.compression import choose_layers
from coloss.nn import MLP, Classifier, ConvNet
from coloss.nn.causal_language_model import CausalLanguageModel


def test_the_ends_are_spared_unless_asked_for():
    model = Classifier(ConvNet(1, (4, 4, 4)), 3)
    assert list(choose_layers(model)) == ["backbone.stages.1.0", "backbone.stages.2.0"]
    assert list(choose_layers(model, spare_ends=False)) == [
        "backbone.stages.0.0",
        "backbone.stages.1.0",
        "backbone.stages.2.0",
        "head",
    ]


def test_after_an_embedding_the_first_linear_layer_is_inside():
    model = CausalLanguageModel(5, dim=8, depth=2, heads=2, tied=False)
    chosen = choose_layers(model)
    assert "output" not in chosen and all(name.startswith("transformer.blocks.") for name in chosen)
    assert {name.split(".")[2] for name in chosen} == {"0", "1"}


def test_a_block_stands_for_its_layers_in_the_order_of_the_model():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 1)
    )
    assert list(choose_layers(model, ["2", "1"])) == ["1.0", "1.2", "2"]
    assert list(choose_layers(model, "")) == ["0", "1.0", "1.2", "2"]
    assert list(choose_layers(model, "1", kinds=(nn.Linear,))) == ["1.0", "1.2"]


def test_frozen_and_parametrized_layers_are_left_out_of_the_rule():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    model[1].requires_grad_(False)
    weight_norm(model[2])
    assert list(choose_layers(model)) == ["3"]


@pytest.mark.parametrize("end", [0, 3])
def test_a_parametrized_end_is_an_end(end):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    weight_norm(model[end])
    assert list(choose_layers(model)) == ["1", "2"]


def test_layers_with_a_pruning_mask_are_left_out_of_the_rule_but_may_be_named():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    prune.l1_unstructured(model[1], "weight", 0.5)
    assert list(choose_layers(model)) == ["2"]
    assert list(choose_layers(model, ["1"])) == ["1"]


def test_bad_paths_are_named():
    model = Classifier(MLP(4, (8, 8)), 3)
    with pytest.raises(
        ValueError, match="layers must be paths of the model, got 'backbone.layer.3'; did you mean"
    ):
        choose_layers(model, "backbone.layer.3")
    with pytest.raises(ValueError, match="layers must hold Conv1d, got 'head', a Linear"):
        choose_layers(model, "head", kinds=(nn.Conv1d,))
    with pytest.raises(ValueError, match="at least one layer"):
        choose_layers(model, [])
    with pytest.raises(ValueError, match="has no layer to compress"):
        choose_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
