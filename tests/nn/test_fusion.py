"""A fusion classifier is its head on its encoders' features side by side."""

import pytest
import torch
from torch import nn

from coloss.nn import MLP, FusionClassifier


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_logits_are_the_head_s_on_features_side_by_side(hidden):
    model = FusionClassifier([MLP(4, [3]), MLP(6, [2])], 5, hidden=hidden).eval()
    inputs = torch.randn(7, 4), torch.randn(7, 6)
    features = [encoder(part) for encoder, part in zip(model.encoders, inputs)]
    assert torch.equal(model(inputs), model.head(torch.cat(features, 1)))
    assert model(inputs).shape == (7, 5)


def test_bad_input_is_named(as_users_call):
    with pytest.raises(ValueError, match="encoders must hold at least one module, got none"):
        FusionClassifier([], 3)
    with pytest.raises(ValueError, match="encoders must each have an integer out_features, got ReLU"):
        FusionClassifier([nn.ReLU()], 3)
    with pytest.raises(ValueError, match="num_outputs must be >= 1, got 0"):
        FusionClassifier([MLP(2, [2])], 0)
    model = FusionClassifier([MLP(2, [2]), MLP(2, [2])], 3)
    for inputs, found in ((torch.ones(2, 2), "a tensor"), ((torch.ones(2, 2),), "1")):
        with pytest.raises(ValueError, match=f"inputs must be one for each of 2 encoders, got {found}"):
            model(inputs)
