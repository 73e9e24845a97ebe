import math
from types import SimpleNamespace

import pytest
import sklearn.metrics
import torch
from torch import nn

from coloss.data import Judgements
from coloss.metrics import (
    accuracy,
    evaluate_classifier,
    evaluate_dual_encoder,
    evaluate_encoder,
    evaluate_multilabel,
    evaluate_regressor,
    knn_probe,
    linear_probe,
    macro_f1,
    negative_log_likelihood,
    retrieval_metrics,
    tolerance,
)
from coloss.nn import MLP, Classifier, DualEncoder
from coloss.ops import effective_rank


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Diverged(nn.Module):
    def forward(self, inputs):
        return inputs * math.nan


def blob_splits(spread=0.3):
    targets = torch.arange(90) % 3
    centres = gaussian(3, 4, seed=1) * 2
    parts = [[(centres[targets] + spread * gaussian(90, 4, seed=seed), targets)] for seed in range(3)]
    return SimpleNamespace(train=parts[0], validation=parts[1], test=parts[2])


def test_classifier_summary_is_that_of_its_logits():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))
    x, y = gaussian(40, 5), torch.arange(40) % 3
    found = evaluate_classifier(model, [(x, y)], batch_size=7)
    logits = model[0](x).detach()
    assert found["accuracy"] == float(accuracy(logits, y))
    assert found["nll"] == pytest.approx(float(negative_log_likelihood(logits, y)))
    assert found["macro_f1"] == float(macro_f1(logits, y))
    assert model.training and found == evaluate_classifier(model, [(x, y)])


def test_classifier_that_always_outputs_probability_like_logits_is_read_as_logits():
    x, y = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.zeros(4, dtype=torch.long)
    assert evaluate_classifier(nn.Identity(), [(x, y)])["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))


def test_regressor_summary_takes_a_trailing_one_and_refuses_other_shapes():
    model, x = nn.Linear(2, 1), gaussian(20, 2)
    y = model(x).detach()[:, 0] + 0.5
    found = evaluate_regressor(model, [(x, y)])
    assert found["mse"] == pytest.approx(0.25) and found["r2"] == pytest.approx(
        1 - 0.25 / float(y.var(correction=0)), abs=1e-5
    )
    assert evaluate_regressor(model, [(x, y[:, None].double())])["mse"] == pytest.approx(0.25)
    with pytest.raises(Exception, match="predictions"):
        evaluate_regressor(nn.Linear(2, 2), [(x, y)])


def test_multilabel_summary_equals_scikit_learn():
    logits, targets = gaussian(50, 6), (gaussian(50, 6, seed=1) > 0.7).float()
    targets[:, 2] = 0  # a label that never occurs
    found = evaluate_multilabel(nn.Identity(), [(logits, targets)])
    kept, truth, predicted = [0, 1, 3, 4, 5], targets.numpy(), (logits > 0).numpy()
    expected = sklearn.metrics.average_precision_score(truth[:, kept], logits[:, kept].numpy())
    assert found["average_precision"] == pytest.approx(expected)
    assert found["micro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, predicted, average="macro"))
    assert found["nll"] == pytest.approx(sum(
        sklearn.metrics.log_loss(truth[:, c], logits[:, c].sigmoid().double().numpy(), labels=[0, 1]) for c in range(6)
    ) / 6, rel=1e-5)  # fmt: skip


def test_multilabel_without_any_label_is_nan():
    found = evaluate_multilabel(nn.Identity(), [(-torch.ones(3, 2), torch.zeros(3, 2))])
    assert math.isnan(found["average_precision"]) and math.isnan(found["micro_f1"]) and found["nll"] > 0


@pytest.mark.parametrize("normalize", [True, False])
def test_dual_encoder_summary_is_that_of_its_scores(normalize):
    torch.manual_seed(0)
    model = DualEncoder(MLP(4, [8], 5), MLP(3, [8], 5), normalize=normalize)
    queries, documents = gaussian(20, 4), gaussian(20, 3, seed=1)
    first, second = (x.detach() for x in model.eval()((queries, documents)))
    expected = retrieval_metrics(first @ second.T, torch.eye(20))
    pairs = [((queries[:12], documents[:12]), None), ((queries[12:], documents[12:]), None)]
    assert evaluate_dual_encoder(model.train(), pairs) == pytest.approx(expected, rel=1e-5)
    assert all(module.training for module in model.modules())


def test_retrieval_splits_bring_queries_documents_and_relevance():
    torch.manual_seed(0)
    model = DualEncoder(MLP(4, [8], 5), MLP(3, [8], 5))
    relevance = torch.randint(-4, 4, (6, 15)).clamp(min=0)
    ignore = torch.rand(6, 15) < 0.2
    pairs = relevance.nonzero()
    judged = Judgements(6, 15, pairs, relevance[pairs[:, 0], pairs[:, 1]].float(), ignore.nonzero())
    splits = SimpleNamespace(
        documents=gaussian(15, 3),
        test_queries=gaussian(6, 4, seed=1),
        test_judgements=judged,
        validation_queries=gaussian(4, 4, seed=2),
        validation_judgements=judged.of(torch.arange(4)),
    )
    for split, count in (("test", 6), ("validation", 4)):
        queries = getattr(splits, f"{split}_queries")
        scores = (model.eval().encode_query(queries) @ model.encode_document(splits.documents).T).detach()
        found = evaluate_dual_encoder(model.train(), splits, split=split, batch_size=4)
        expected = retrieval_metrics(scores, relevance[:count], ignore=ignore[:count])
        assert found == pytest.approx(expected, rel=1e-5)
    given = evaluate_dual_encoder(model, splits, relevance=relevance > 2, ignore=torch.zeros_like(ignore))
    scores = (
        model.eval().encode_query(splits.test_queries) @ model.encode_document(splits.documents).T
    ).detach()
    assert given == pytest.approx(retrieval_metrics(scores, relevance > 2), rel=1e-5)
    with pytest.raises(ValueError, match=r"ignore must be \(queries, documents\) \(6, 15\), got \(15, 6\)"):
        evaluate_dual_encoder(model, splits, ignore=ignore.T)


def test_relevance_and_ignore_of_pairs_can_be_given():
    model = DualEncoder(nn.Identity(), nn.Identity())
    queries, documents = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    found = evaluate_dual_encoder(model, [((queries, documents), None)], relevance=torch.eye(3)[[1, 0, 2]])
    assert found["mrr"] == found["pooled_auc"] == 1
    ignore = torch.tensor([[False, True, True], [True, False, True], [True, True, False]])
    assert evaluate_dual_encoder(model, [((queries, documents), None)], ignore=ignore)["mrr"] == 1


def test_encoder_summary_is_that_of_its_features():
    splits = blob_splits(spread=1.5)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    found = evaluate_encoder(encoder, splits, labels=30, seed=2)
    (train, train_targets), (test, test_targets) = splits.train[0], splits.test[0]
    with torch.no_grad():
        train, test = encoder.eval()(train), encoder(test)
    assert (
        found["linear_probe"]
        == linear_probe(train, train_targets, test, test_targets, labels=30, seed=2).accuracy
    )
    assert (
        found["knn"] == knn_probe(train, train_targets, test, test_targets, k=5, labels=30, seed=2).accuracy
    )
    assert found["tolerance"] == tolerance(test, test_targets)
    spectrum = torch.linalg.svdvals(test.double())
    assert found["rankme"] == pytest.approx(effective_rank(spectrum, 1e-7).item(), rel=1e-6)
    assert evaluate_encoder(encoder, splits, labels=30, seed=2, split="validation") != found


def test_encoder_summary_shows_collapse():
    class Collapsed(nn.Module):
        def forward(self, inputs):
            return torch.ones(len(inputs), 6)

    found = evaluate_encoder(Collapsed(), blob_splits())
    assert found["feature_std"] == pytest.approx(0, abs=1e-6) and found["uniformity"] == pytest.approx(
        0, abs=1e-5
    )
    assert found["tolerance"] == pytest.approx(1, abs=1e-5) and found["rankme"] == pytest.approx(1, abs=1e-4)
    assert found["linear_probe"] == found["knn"] == pytest.approx(1 / 3)
    assert evaluate_encoder(nn.Identity(), blob_splits())["knn"] > 0.95


def test_label_budget_is_fitted_to_small_data():
    splits = blob_splits()
    assert evaluate_encoder(nn.Identity(), splits, labels=1000) == evaluate_encoder(
        nn.Identity(), splits, labels=90
    )
    assert evaluate_encoder(nn.Identity(), splits, labels=1) == evaluate_encoder(
        nn.Identity(), splits, labels=3
    )
    assert evaluate_encoder(nn.Identity(), splits, labels=None)["knn"] > 0.95


def test_encoder_features_can_come_from_inside():
    encoder = Classifier(MLP(4, [8]), 2)
    inside = evaluate_encoder(encoder, blob_splits(), module_path="backbone")
    assert inside == evaluate_encoder(encoder.backbone, blob_splits())


def test_diverged_networks_are_measured_not_raised():
    x, y = gaussian(6, 3), torch.arange(6) % 3
    found = evaluate_classifier(Diverged(), [(x, y)])
    assert found["accuracy"] == 0 and math.isnan(found["nll"]) and math.isnan(found["ece"])
    assert all(math.isnan(value) for value in evaluate_regressor(Diverged(), [(x, x)]).values())
    assert math.isnan(evaluate_multilabel(Diverged(), [(x, (x > 0).float())])["average_precision"])
    assert all(math.isnan(value) for value in evaluate_encoder(Diverged(), blob_splits()).values())
    found = evaluate_dual_encoder(DualEncoder(Diverged(), nn.Identity()), [((x, x), None)])
    assert math.isnan(found["mrr"]) and found["queries"] == 6


def test_evaluation_leaves_global_randomness_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    splits = blob_splits()
    evaluate_classifier(model, splits.test)
    evaluate_encoder(model, splits)
    assert torch.equal(state, torch.random.get_rng_state()) and model[1].training


def test_missing_targets_and_wrong_outputs_are_refused():
    x = gaussian(4, 3)
    with pytest.raises(ValueError, match="targets must be one tensor, got NoneType"):
        evaluate_classifier(nn.Identity(), x)
    with pytest.raises(ValueError, match="splits.train must have one tensor of targets, got NoneType"):
        evaluate_encoder(nn.Identity(), SimpleNamespace(train=x, test=x))
    with pytest.raises(ValueError, match="model must give a pair of embeddings, got Tensor"):
        evaluate_dual_encoder(nn.Identity(), x)
    with pytest.raises(ValueError, match=r"both be \(batch, labels\), got \(4, 3\) and \(4,\)"):
        evaluate_multilabel(nn.Identity(), [(x, torch.ones(4))])
    with pytest.raises(ValueError, match="splits must have a part 'tset', got a SimpleNamespace without it"):
        evaluate_encoder(nn.Identity(), blob_splits(), split="tset")
