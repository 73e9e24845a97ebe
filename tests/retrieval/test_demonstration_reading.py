"""Reading retrieved examples: what is shown, what is learnt, and that a query never sees itself."""

import inspect
import math

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss, normalize

import coloss
from coloss import Budget, Method
from coloss.data import Batch, EpisodeSampler, IndexedDataset, Loader, load
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.retrieval import (
    Demonstrated,
    DemonstrationReader,
    DemonstrationTraining,
    LabelVote,
    RetrievalAugmented,
    content_keys,
    evaluate_demonstrations,
    marginal_nll,
    shuffled_episode,
)
from coloss.train import State, load_model, save_model


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


def _episodes(data, episodes=4, seed=0):
    sampler = EpisodeSampler(data.targets, ways=3, shots=4, queries=4, episodes=episodes)
    return Loader(data, None, sampler=sampler, seed=seed)


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


def test_training_never_shows_a_sample_itself_nor_its_copy():
    data = _data(each=4)
    doubled = IndexedDataset(
        torch.cat([data.inputs, data.inputs]), torch.cat([data.targets, data.targets]) % 3
    )
    model = _model(k=5, bank=doubled)
    method = DemonstrationTraining()
    state = State(model)
    method.setup(state)
    state.batch = doubled.take(torch.arange(48))
    method.on_batch(state)
    shown = state.batch.inputs
    same = (shown.examples == shown.inputs.unsqueeze(1)).all(2)
    assert not same.any() and not shown.missing.any()
    # Were nothing left out, the first two examples of each would be the sample and its copy.
    leaking = model.demonstrate(doubled.inputs)
    assert (leaking.examples[:, :2] == doubled.inputs.unsqueeze(1)).all()


def test_the_answer_of_a_copied_text_is_not_within_reach():
    """Labels are noise, so only a leak could be learnt: a vote of one neighbour is right by chance at best."""
    generator = torch.Generator().manual_seed(0)
    texts = [f"question {number}" for number in range(40)]
    inputs, labels = torch.randn(40, 4, generator=generator), torch.randint(2, (40,), generator=generator)
    both = [*texts, *(text.upper() + " " for text in texts)]
    inputs, labels = torch.cat([inputs, inputs]), torch.cat([labels, labels])
    model = RetrievalAugmented(LabelVote(2), None, nn.Identity(), k=1)
    model.bank = model.new_bank(inputs, labels, content=content_keys(both))
    ids = torch.arange(80)
    assert (model(model.demonstrate(inputs, exclude_ids=ids)).argmax(1) == labels).all()
    kept = model.demonstrate(inputs, exclude_ids=ids, exclude_content=content_keys(both))
    assert (model(kept).argmax(1) == labels).double().mean() < 0.75


def test_contents_of_a_batch_go_before_its_inputs():
    data = _data(each=4)
    content = torch.arange(24) // 2
    model = _model(k=2)
    model.bank = model.new_bank(data.inputs, data.targets % 3, ids=data.ids, content=content)
    method = DemonstrationTraining()
    state = State(model, batch=Batch(data.inputs, data.targets % 3, data.ids, {"content": content}))
    method.on_batch(state)
    twins = data.inputs.view(12, 2, 4).flip(1).flatten(0, 1)
    assert not (state.batch.inputs.examples == twins.unsqueeze(1)).all(2).any()


def test_episode_shows_the_first_of_each_class_under_one_shuffled_label():
    data = _data()
    model = _model()
    positions = next(iter(_episodes(data).sampler.batches(torch.Generator().manual_seed(3))))
    batch, seen = data.take(positions), set()
    for seed in range(20):
        episode = shuffled_episode(
            model,
            batch.inputs,
            batch.targets,
            4,
            3,
            ids=batch.ids,
            generator=torch.Generator().manual_seed(seed),
        )
        assert len(episode.bank) == 12 and episode.is_query.sum() == 12
        assert torch.equal(episode.bank.payload[0], batch.inputs[~episode.is_query])
        assert torch.equal(episode.bank.ids, batch.ids[~episode.is_query])
        classes = batch.targets.unique()
        mapping = tuple(episode.labels[batch.targets == c].unique().item() for c in classes)
        assert sorted(mapping) == [0, 1, 2]
        seen.add(mapping)
    assert len(seen) == 6


def test_rows_of_an_episode_may_come_in_any_order_and_number():
    model = _model()
    targets = torch.tensor([5, 9, 5, 5, 9])
    inputs = torch.arange(20.0).view(5, 4)
    episode = shuffled_episode(model, inputs, targets, shots=2, ids=torch.tensor([0, 1, 0, 2, 3]))
    assert episode.is_query.tolist() == [False, False, False, True, False]
    # The sample that was drawn twice is shown once.
    assert episode.bank.ids.tolist() == [0, 1, 3]
    assert torch.equal(episode.bank.payload[0], inputs[[0, 1, 4]])


@pytest.mark.parametrize("train_retriever", [False, True])
def test_retriever_learns_only_where_asked_and_examples_never_move(train_retriever):
    data = _data()
    model = _model(train_retriever=train_retriever)
    before = model.example_encoder.module.weight.clone()
    coloss.fit(model, _episodes(data), methods=[DemonstrationTraining(shots=4)], budget=Budget(epochs=2))
    assert torch.equal(model.example_encoder.module.weight, before)
    assert not any("example_encoder" in name for name, p in model.named_parameters() if p.requires_grad)
    if train_retriever:
        assert not torch.equal(model.query_encoder.weight, before)
    else:
        assert model.query_encoder is None


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


def test_meta_trained_reader_follows_new_labels_of_digits():
    splits = load("digits", seed=0)
    flat = {part: getattr(splits, part).inputs.flatten(1) for part in ("train", "test")}
    train = IndexedDataset(flat["train"], splits.train.targets)
    test = IndexedDataset(flat["test"], splits.test.targets)
    accuracy = {}
    for choice in ("nearest", "random"):
        torch.manual_seed(0)
        model = RetrievalAugmented(DemonstrationReader(64, 5), None, nn.Identity(), temperature=0.05)
        sampler = EpisodeSampler(train.targets, ways=5, shots=10, queries=7, episodes=40)
        coloss.fit(
            model,
            Loader(train, None, sampler=sampler),
            methods=[DemonstrationTraining(shots=10, choice=choice)],
            budget=Budget(epochs=1),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        )
        accuracy[choice] = evaluate_demonstrations(model, test, 5, 10, 7, episodes=8, choice=choice).mean
    assert accuracy["nearest"] > 0.85
    assert accuracy["nearest"] - accuracy["random"] > 0.3


def test_copies_are_left_out_of_evaluation_too():
    data = IndexedDataset(
        torch.randn(20, 3, generator=torch.Generator().manual_seed(0)),
        torch.arange(20) % 2,
        extras={"content": torch.zeros(20, dtype=torch.int64)},
    )
    model = RetrievalAugmented(LabelVote(2), None, nn.Identity(), k=1)
    shown = evaluate_demonstrations(model, data, 2, 5, 5, episodes=5)
    # All are copies of each other, so nothing is shown, and all get the same label.
    assert shown.mean == 0.5


class _Small(Method):
    def terms(self, state):
        return {"small": state.model.reader.layers.layers[0].weight.square().mean()}


def test_composes_with_another_method_and_leaves_a_model_that_is_saved_and_loaded(tmp_path):
    data = _data()
    run = coloss.fit(
        _model(),
        _episodes(data),
        methods=[DemonstrationTraining(shots=4), _Small()],
        budget=Budget(epochs=2),
        log_every=1,
    )
    assert set(run.history[-1].terms) == {"marginal_nll", "small"}
    assert 0 <= run.history[-1].metrics["query_accuracy"] <= 1
    run.model.bank = run.model.new_bank(data.inputs, data.targets % 3)
    save_model(run.model, tmp_path / "model.safetensors")
    loaded = load_model(_model(bank=_data(7)), tmp_path / "model.safetensors")
    assert torch.equal(loaded(data.inputs), run.model(data.inputs))


@pytest.mark.parametrize("episodes", [False, True])
def test_same_steps_in_every_loop(episodes):
    data = _data()
    if episodes:
        batches = [(batch.inputs, batch.targets, batch.ids) for batch in _episodes(data)]
        check_loops(lambda: _model(train_retriever=True), lambda: DemonstrationTraining(shots=4), batches)
    else:
        batches = [(batch.inputs, batch.targets % 3, batch.ids) for batch in Loader(data, 20)]
        check_loops(lambda: _model(bank=data), DemonstrationTraining, batches)


@pytest.mark.parametrize("choice", ["nearest", "random"])
def test_a_resumed_run_is_the_same(tmp_path, choice):
    data = _data()
    check_resume(
        lambda: _model(train_retriever=True),
        lambda: DemonstrationTraining(shots=4, choice=choice),
        _episodes(data),
        tmp_path,
    )


@pytest.mark.parametrize("choice", ["nearest", "random"])
def test_two_processes_share_an_episode(tmp_path, choice):
    data = _data()
    data = IndexedDataset(data.inputs.double(), data.targets)

    def train(fabric):
        model = _model(train_retriever=True, dtype=torch.float64)
        sampler = EpisodeSampler(data.targets, ways=3, shots=3, queries=3, episodes=3)
        coloss.fit(
            model,
            Loader(data, None, sampler=sampler),
            methods=[DemonstrationTraining(shots=3, choice=choice)],
            budget=Budget(epochs=1),
            fabric=fabric,
        )
        return dict(model.state_dict())

    check_two_processes(train, tmp_path)


def test_gradients_of_several_episodes_are_averaged():
    data = _data()
    run = coloss.fit(
        _model(),
        _episodes(data),
        methods=[DemonstrationTraining(shots=4)],
        budget=Budget(epochs=1),
        accumulate=2,
    )
    assert run.steps == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_probabilities(dtype):
    data = _data()
    model = _model(bank=data, dtype=dtype)
    outputs = model(data.inputs.to(dtype))
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.exp().sum(1), torch.ones(60))
    outputs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.reader.parameters())


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


def test_bad_use():
    data, model = _data(), _model()
    with pytest.raises(ValueError, match="bank must be given"):
        model(data.inputs)
    with pytest.raises(ValueError, match='choice must be "nearest", "random" or "none", got \'worst\''):
        inspect.unwrap(RetrievalAugmented.demonstrate)(
            model, data.inputs, model.new_bank(data.inputs, data.targets), choice="worst"
        )
    with pytest.raises(ValueError, match="at most 3 classes, the labels that the reader knows, got 6"):
        shuffled_episode(model, data.inputs, data.targets, 4, 3)
    with pytest.raises(ValueError, match="more than shots = 10 rows"):
        shuffled_episode(model, data.inputs, data.targets, 10)
    with pytest.raises(ValueError, match="episodes must be >= 2, got 1"):
        evaluate_demonstrations(model, data, 3, 1, 1, episodes=1)
    with pytest.raises(InputError, match="shots must be >= 1 or None, got 0"):
        DemonstrationTraining(shots=0)
    with pytest.raises(InputError, match='choice must be "nearest", "random" or "none"'):
        inspect.unwrap(DemonstrationTraining.__init__)(
            DemonstrationTraining.__new__(DemonstrationTraining), choice=""
        )


@pytest.mark.parametrize(
    ("model", "shots", "data", "message"),
    [
        (lambda: nn.Linear(4, 3), 4, None, "the model must be a RetrievalAugmented, got Linear"),
        (_model, None, None, "the model must have a bank, or batches must be episodes"),
        (_model, 4, (torch.zeros(8, 4), torch.zeros(8)), "a class index for each sample as targets"),
        (_model, 4, (torch.zeros(8, 4), torch.arange(8)), "at most 3 classes"),
        (_model, 9, (torch.zeros(8, 4), torch.arange(8) % 2), "more than shots = 9 rows"),
    ],
)
def test_bad_runs(model, shots, data, message):
    data = (torch.zeros(8, 4), torch.arange(8) % 2) if data is None else data
    with pytest.raises(InputError, match=message):
        coloss.fit(model(), data, methods=[DemonstrationTraining(shots=shots)], budget=Budget(steps=1))


def test_claim_runs():
    found = verify("demo-retrieval", smoke=True)
    assert found["metric"] == "accuracy"
    assert {"retrieved, uniform prior", "weighted nearest-neighbour vote"} <= set(
        map(str, str(found).split("'"))
    )
