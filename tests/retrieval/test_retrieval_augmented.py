"""A classifier that reads retrieved examples: its mixture, its prior, and what a search leaves as it was."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss, normalize

from coloss.data import IndexedDataset
from coloss.retrieval import (
    Demonstrated,
    DemonstrationReader,
    LabelVote,
    RetrievalAugmented,
    marginal_nll,
)


def _data(seed=0, classes=6, each=10, dimensions=4):
    """Classes that are easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(classes).repeat_interleave(each)
    centres = torch.randn(classes, dimensions, generator=generator)
    inputs = centres[targets] + 0.2 * torch.randn(len(targets), dimensions, generator=generator)
    return IndexedDataset(inputs, targets)


def _model(k=3, *, train_retriever=False, hidden=(8,), bank=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    encoder = nn.Linear(4, 4, bias=False)
    reader = DemonstrationReader(4, 3, hidden)
    model = RetrievalAugmented(reader, None, encoder, k, train_retriever=train_retriever, **options).to(dtype)
    if bank is not None:
        model.bank = model.new_bank(bank.inputs.to(dtype), bank.targets % 3, ids=bank.ids)
    return model


def test_output_is_the_mixture_of_readers_worked_out_one_by_one():
    data = _data()
    model = _model(bank=data, temperature=0.5)
    queries = _data(1).inputs[:5]
    similarity = normalize(model.example_encoder(queries), dim=1) @ normalize(model.bank.embeddings, dim=1).T
    for row, query in enumerate(queries):
        scores, places = similarity[row].topk(3)
        prior = (scores / 0.5).softmax(0)
        mixture = sum(
            p * model.reader(query[None], data.inputs[[i]], data.targets[[i]] % 3).softmax(1)[0]
            for p, i in zip(prior, places.tolist(), strict=True)
        )
        torch.testing.assert_close(model(queries)[row].exp(), mixture)


def test_outputs_are_normalised_so_both_usual_losses_are_the_marginal_one():
    data = _data()
    model = _model(bank=data)
    outputs, targets = model(data.inputs), data.targets % 3
    torch.testing.assert_close(outputs.exp().sum(1), torch.ones(60))
    torch.testing.assert_close(nll_loss(outputs, targets), cross_entropy(outputs, targets))
    shown = model.demonstrate(data.inputs)
    logits = torch.stack(
        [model.reader(shown.inputs, shown.examples[:, j], shown.labels[:, j]) for j in range(3)], 1
    )
    right = logits.log_softmax(2)[torch.arange(60), :, targets].unsqueeze(2)
    torch.testing.assert_close(
        nll_loss(outputs, targets), marginal_nll(model.scores(shown), right, temperature=model.temperature)
    )


def test_one_example_is_a_plain_classifier_at_any_temperature():
    data = _data()
    model = _model(k=1, bank=data, temperature=1e-3)
    shown = model.demonstrate(data.inputs)
    plain = model.reader(shown.inputs, shown.examples[:, 0], shown.labels[:, 0]).log_softmax(1)
    torch.testing.assert_close(model(data.inputs), plain)


def test_without_examples_the_query_is_read_once_alone():
    data = _data()
    model = _model(bank=data)
    none = torch.full((60,), -1)
    alone = model.reader(data.inputs, torch.zeros_like(data.inputs), none).log_softmax(1)
    torch.testing.assert_close(model(model.demonstrate(data.inputs, choice="none")), alone)
    few = model.new_bank(data.inputs[:2], data.targets[:2])
    torch.testing.assert_close(
        model(model.demonstrate(data.inputs, few)),
        _model(k=2, bank=data)(model.demonstrate(data.inputs, few)),
    )


def test_prior_is_nearly_one_example_unless_the_temperature_fits_the_scores():
    data = _data()
    large = nn.Linear(4, 4, bias=False)
    nn.init.eye_(large.weight).data.mul_(10)
    shares = []
    for temperature in (1.0, 500.0, math.inf):
        model = RetrievalAugmented(LabelVote(3), None, large, k=3, metric="inner", temperature=temperature)
        shown = model.demonstrate(data.inputs, model.new_bank(data.inputs, data.targets % 3))
        shares.append(model.log_prior(shown).exp().amax(1).mean().item())
    assert shares[0] > 0.9 and shares[1] < 0.6 and shares[2] == pytest.approx(1 / 3)


def test_vote_is_the_nearest_neighbour_classifier():
    data = _data()
    model = RetrievalAugmented(LabelVote(6), None, nn.Identity(), k=5, temperature=math.inf)
    model.bank = model.new_bank(data.inputs, data.targets)
    queries = _data(0).inputs + 0.3
    similarity = normalize(queries, dim=1) @ normalize(data.inputs, dim=1).T
    votes = nn.functional.one_hot(data.targets[similarity.topk(5).indices], 6).sum(1) / 5
    torch.testing.assert_close(model(queries).exp(), votes.float())


def test_gradient_of_the_scores_is_prior_minus_posterior():
    data = _data()
    model = _model(train_retriever=True, bank=data, temperature=0.3, dtype=torch.float64, metric="inner")
    shown, targets = model.demonstrate(data.inputs.double()), data.targets % 3
    scores = model.scores(shown).detach().requires_grad_()
    model.scores = lambda shown: scores
    nll_loss(model(shown), targets, reduction="sum").backward()
    logits = [model.reader(shown.inputs, shown.examples[:, j], shown.labels[:, j]) for j in range(3)]
    right = torch.stack(logits, 1).log_softmax(2)[torch.arange(60), :, targets]
    prior = (scores / 0.3).log_softmax(1)
    posterior = (prior + right).softmax(1)
    torch.testing.assert_close(scores.grad, (prior.exp() - posterior) / 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_probabilities(dtype):
    data = _data()
    model = _model(bank=data, dtype=dtype)
    outputs = model(data.inputs.to(dtype))
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.exp().sum(1), torch.ones(60))
    outputs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.reader.parameters())


def test_a_large_bank_is_embedded_in_parts(monkeypatch):
    data, model, sizes = _data(), _model(), []
    whole = model.new_bank(data.inputs, data.targets % 3)
    model.example_encoder.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))
    monkeypatch.setattr("coloss.retrieval.retrieval_augmented.ENCODED_AT_ONCE", 25)
    torch.testing.assert_close(model.new_bank(data.inputs, data.targets % 3).embeddings, whole.embeddings)
    assert sizes == [25, 25, 10]


def test_searching_leaves_no_trace_in_the_encoder_and_no_graph():
    data = _data()
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = RetrievalAugmented(DemonstrationReader(4, 3), None, encoder, train_retriever=True)
    model.bank = model.new_bank(data.inputs, data.targets % 3)
    state = torch.get_rng_state()
    shown = model.demonstrate(data.inputs)
    assert isinstance(shown, Demonstrated) and not shown.embeddings.requires_grad
    assert encoder[1].num_batches_tracked == 0 and encoder.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"metric": "euclidean"}, 'metric must be "cosine" or "inner", got \'euclidean\''),
        ({"bank": "inner"}, "metric must be that of the bank, 'inner', got 'cosine'"),
    ],
)
def test_bad_models(options, message):
    if "bank" in options:
        options = {"bank": _model(bank=_data(), metric="inner").bank}
    given_options = {"reader": LabelVote(2), "bank": None, "encoder": nn.Identity()} | options
    model = RetrievalAugmented.__new__(RetrievalAugmented)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(RetrievalAugmented.__init__)(model, **given_options)
