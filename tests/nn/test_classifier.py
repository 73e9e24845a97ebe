import copy

import pytest
import torch
from torch import nn

from coloss.nn import MLP, Classifier, DualEncoder, TokenEncoder, Words


def test_classifier_is_the_head_on_the_backbone():
    model = Classifier(MLP(4, [6]), 3).eval()
    x = torch.randn(5, 4)
    assert torch.equal(model(x), model.head(model.backbone(x)))
    assert model.head.in_features == 6


def test_classifier_of_tokens_gives_logits_per_token():
    encoder = TokenEncoder(Words(20, 8, max_length=6), 8, 1, 2, pool="none")
    assert Classifier(encoder, 20)(torch.ones(2, 6, dtype=torch.long)).shape == (2, 6, 20)


def test_classifier_refuses_a_backbone_of_unknown_size():
    with pytest.raises(ValueError, match="backbone must have an integer out_features, got ReLU"):
        Classifier(nn.ReLU(), 3)
    with pytest.raises(ValueError, match="num_outputs must be >= 1, got 0"):
        Classifier(MLP(4, [6]), 0)


def test_each_tower_sees_its_own_half():
    model = DualEncoder(nn.Linear(3, 2), nn.Linear(5, 2), normalize=False)
    queries, documents = torch.randn(4, 3), torch.randn(4, 5)
    embedded = model((queries, documents))
    assert torch.equal(embedded[0], model.query_encoder(queries))
    assert torch.equal(embedded[1], model.document_encoder(documents))
    # A data loader makes lists of tuples.
    assert torch.equal(model([queries, documents])[0], embedded[0])


def test_embeddings_have_unit_norm_and_zero_stays_zero():
    model = DualEncoder(nn.Identity(), nn.Identity())
    queries, documents = model((torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, -2.0]])))
    assert torch.allclose(queries, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert torch.allclose(documents, torch.tensor([[0.0, -1.0]]))


def test_norms_are_taken_in_single_precision():
    half = torch.full((1, 100), 200.0, dtype=torch.float16)
    queries, _ = DualEncoder(nn.Identity(), nn.Identity())((half, half))
    assert queries.dtype == torch.float32
    assert torch.allclose(queries, torch.full((1, 100), 0.1))


def test_a_shared_tower_is_registered_once():
    tower = nn.Linear(3, 2)
    model = DualEncoder(tower, tower)
    assert model.document_encoder is tower
    assert len(list(model.parameters())) == 2
    assert sorted(model.state_dict()) == ["query_encoder.bias", "query_encoder.weight"]
    clone = copy.deepcopy(model)
    assert clone.document_encoder is clone.query_encoder
    assert clone.query_encoder is not tower


def test_dual_encoder_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="same out_features, got 2 and 4"):
        DualEncoder(nn.Linear(3, 2), nn.Linear(3, 4))
    model = DualEncoder(nn.Linear(3, 2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"pair must be \(queries, documents\), got 3 items"):
        model((torch.rand(1, 3),) * 3)
    with pytest.raises(AttributeError, match="missing"):
        _ = model.missing
