"""Reading retrieved examples: what is shown, what is learnt, and that a query never sees itself."""

import inspect

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from torch import nn
from torch.nn.functional import nll_loss

import coloss
from coloss import Budget, Method
from coloss.data import Batch, EpisodeSampler, IndexedDataset, Loader, load
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.retrieval import (
    DemonstrationBank,
    DemonstrationReader,
    DemonstrationTraining,
    LabelVote,
    RetrievalAugmented,
    content_keys,
    evaluate_demonstrations,
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


def _with_unknown_labels():
    model = _model()
    model.bank = DemonstrationBank(torch.eye(4), (torch.eye(4), torch.arange(4)))
    return model


def _episodes(data, episodes=4, seed=0):
    sampler = EpisodeSampler(data.targets, ways=3, shots=4, queries=4, episodes=episodes)
    return Loader(data, None, sampler=sampler, seed=seed)


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
    """One step of plain gradient descent, against the mean of both episodes' gradients."""
    by_hand, model = (_model(train_retriever=True, dtype=torch.float64) for _ in range(2))
    episodes = [(b.inputs.double(), b.targets, b.ids) for b in _episodes(_data(), episodes=2)]
    generator, gradients = torch.Generator().manual_seed(7), []
    learnt = [p for p in by_hand.parameters() if p.requires_grad]
    for inputs, targets, ids in episodes:
        episode = shuffled_episode(by_hand, inputs, targets, 4, 3, ids=ids, generator=generator)
        asked = episode.is_query
        shown = by_hand.demonstrate(inputs[asked], episode.bank, exclude_ids=ids[asked])
        loss = nll_loss(by_hand(shown), episode.labels[asked])
        gradients.append(torch.autograd.grad(loss, learnt))
    run = coloss.fit(
        model,
        episodes,
        methods=[DemonstrationTraining(shots=4)],
        budget=Budget(steps=1),
        accumulate=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        seed=7,
    )
    assert run.steps == 1
    after = [p for p in model.parameters() if p.requires_grad]
    for one, other, start, end in zip(*gradients, learnt, after, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(end, start - 0.5 * (one + other) / 2)


def test_bad_use():
    data, model = _data(), _model()
    with pytest.raises(ValueError, match="bank must be given"):
        model(data.inputs)
    with pytest.raises(ValueError, match='choice must be "nearest", "random" or "none", got \'worst\''):
        inspect.unwrap(RetrievalAugmented.demonstrate)(
            model, data.inputs, model.new_bank(data.inputs, data.targets % 3), choice="worst"
        )
    for labels, got in ((torch.arange(60), 59), (torch.full((60,), -2), -2)):
        with pytest.raises(InputError, match=rf"labels of examples must be in \[0, 3\), .* got {got}"):
            model.new_bank(data.inputs, labels)
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
        (_with_unknown_labels, None, None, r"labels of examples must be in \[0, 3\), .* got 3"),
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
    found = verify("demo-retrieval", smoke=True, seeds=1)
    assert found["metric"] == "accuracy"
    assert {"retrieved, uniform prior", "weighted nearest-neighbour vote"} <= set(
        map(str, str(found).split("'"))
    )
