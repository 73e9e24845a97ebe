"""The method in a training run: alone, beside others, on several processes, stopped and gone on with; and its claim."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from contract import run_processes
from lightning_fabric import Fabric
from torch.nn import functional as F

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab import verify
from coloss.metrics import evaluate_dual_encoder
from coloss.nn import MLP, DualEncoder
from coloss.ops import info_nce_loss, world_size
from coloss.retrieval import MannWhitneyRetrieval, mann_whitney_loss, temperature_trial
from coloss.retrieval.temperature_trial import TEMPERATURES, digit_halves_task, measure_tuned
from coloss.train import Budget, Method, Setting, TrainingStep


def new_model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DualEncoder(*(MLP(6, (16,), 8, norm=None) for _ in range(2)))


def pairs(count=80, **extras):
    """Two noisy views of the same thing."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, 6, generator=generator)
    noise = torch.randn(2, count, 6, generator=generator)
    return IndexedDataset((shared + 0.3 * noise[0], shared.flip(1) + 0.3 * noise[1]), extras=extras)


def info_nce(outputs, targets):
    return info_nce_loss(outputs[0], outputs[1], 0.2)


def train(*methods, objective=None, data=None, **options):
    options = {"budget": Budget(steps=9), "batch_size": 20, "log_every": 1} | options
    return coloss.fit(new_model(), data or pairs(), objective, methods, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Norms(Method):
    """A second term, and an edit of gradients."""

    def terms(self, state):
        return {"size": state.outputs[0].mean().square()}

    def on_gradients(self, state):
        for parameter in state.trainable:
            parameter.grad *= 0.5


def test_learns_and_leaves_the_model_as_it_was_built():
    model, data = new_model(), pairs()
    before, keys = evaluate_dual_encoder(model, data)["pooled_auc"], list(model.state_dict())
    run = coloss.fit(
        model, data, info_nce, [MannWhitneyRetrieval()], budget=Budget(steps=150), optimizer=partial(torch.optim.Adam, lr=1e-2)
    )  # fmt: skip
    assert run.model is model and list(model.state_dict()) == keys
    assert {name for point in run.history for name in point.terms} == {"mann_whitney"}
    assert evaluate_dual_encoder(model, data)["pooled_auc"] > max(before + 0.3, 0.95)


def test_beside_an_objective_and_another_method_every_term_counts():
    run = train(Norms(), MannWhitneyRetrieval(replace_objective=False, weight=0.5), objective=info_nce)
    assert set(run.history[0].terms) == {"info_nce", "size", "mann_whitney"}
    lighter = train(Norms(), MannWhitneyRetrieval(replace_objective=False, weight=0.0), objective=info_nce)
    without = train(Norms(), objective=info_nce)
    assert torch.equal(weights(lighter.model), weights(without.model))
    assert not torch.equal(weights(run.model), weights(without.model))


@pytest.mark.parametrize("options", [{}, {"scope": "query", "num_negatives": 3}])
def test_the_plain_loop_takes_the_same_steps(options):
    run = train(MannWhitneyRetrieval(**options), budget=Budget(epochs=2))
    model = new_model()
    step = TrainingStep(model, None, [MannWhitneyRetrieval(**options)])
    step.state.generator.manual_seed(0)
    optimizer = torch.optim.AdamW(step.trainable, lr=1e-3)
    loader = coloss.data.Loader(pairs(), batch_size=20)
    for epoch in range(2):
        for batch in loader.batches(epoch):
            optimizer.zero_grad()
            step.backward(step(batch))
            optimizer.step()
            step.after_step()
    assert torch.equal(weights(step.finish()), weights(run.model))


def test_in_lightning_it_adds_to_the_modules_own_loss():
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def training_step(self, batch, index):
            return info_nce(self.model(batch), None)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, data = Module(), pairs().inputs
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=40)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[coloss.MethodCallback([MannWhitneyRetrieval(replace_objective=False)])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    trainer.fit(module, loader)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader:
        optimizer.zero_grad()
        queries, documents = model(batch)
        loss = info_nce((queries, documents), None)
        (loss + mann_whitney_loss(queries @ documents.T, torch.eye(40), temperature=0.05)).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module.model), weights(model))


class Stop(Exception):
    pass


class StopAt(Method):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stop


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    def go(stop, **options):
        return train(MannWhitneyRetrieval(num_negatives=5), StopAt(stop), **options)

    whole = go(-1)
    with pytest.raises(Stop):
        go(6, checkpoint_dir=tmp_path, checkpoint_every=2)
    on = go(-1, checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert torch.equal(weights(on.model), weights(whole.model))
    assert [point.terms for point in on.history] == [point.terms for point in whole.history]


def test_false_negatives_that_ids_give_away_are_not_pushed_apart():
    twice = torch.arange(10).repeat(2)
    found = F.one_hot(twice).double()  # a perfect retriever: a pair and its copy score 1, all others 0
    step = TrainingStep(torch.nn.Identity(), None, [MannWhitneyRetrieval(temperature=0.01)])
    with torch.no_grad():
        told = step({"inputs": (found, found), "document": twice})["mann_whitney"]
        not_told = step({"inputs": (found, found)})["mann_whitney"]
    assert told.item() == pytest.approx(0, abs=1e-9)
    assert not_told.item() == pytest.approx(math.log(2) / 19)  # one of 19 negatives of a query is a copy


def test_mixed_precision_trains_with_a_loss_in_float32():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = train(MannWhitneyRetrieval(), fabric=fabric, budget=Budget(steps=3))
    full = train(MannWhitneyRetrieval(), budget=Budget(steps=3))
    found, expected = (r.history[0].terms["mann_whitney"] for r in (run, full))
    assert found == pytest.approx(expected, rel=0.02) and found != expected
    assert weights(run.model).dtype == torch.float32


def test_a_batch_of_one_pair_teaches_nothing():
    model = new_model()
    step = TrainingStep(model, None, [MannWhitneyRetrieval()])
    terms = step((torch.randn(1, 6), torch.randn(1, 6)), None)
    step.backward(terms)
    assert terms["mann_whitney"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "option, message",
    [
        ({"temperature": -1.0}, "temperature must be > 0 and finite, got -1.0"),
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
        ({"weight": -0.5}, "weight must be >= 0 and finite, or a schedule, got -0.5"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        MannWhitneyRetrieval(**option)


def test_a_model_without_a_pair_of_embeddings_is_refused():
    step = TrainingStep(torch.nn.Linear(6, 3), None, [MannWhitneyRetrieval()])
    with pytest.raises(
        InputError, match=r"must return \(query embeddings, document embeddings\), got Tensor"
    ):
        step(torch.randn(4, 6))


class Masks(Method):
    """Threes of samples are relevant to each other, or unknown, where they meet on one process."""

    def on_batch(self, state):
        place = torch.arange(len(state.batch))
        met = (place[:, None] - place) % 2 == 0 if world_size() == 1 else torch.tensor(True)
        group = state.batch.ids // 3
        alike = (group[:, None] == group) & met & ~torch.eye(len(group), dtype=torch.bool)
        even = group[:, None] % 2 == 0
        state.batch.extras["relevance"] = torch.eye(len(group)) + (alike & even)
        state.batch.extras["ignore"] = alike & ~even


def first_value(outputs, targets):
    return outputs[0][:, 0].mean()


CASES = {
    "pairs": lambda: [MannWhitneyRetrieval(temperature=0.2)],
    "ids": lambda: [MannWhitneyRetrieval(temperature=0.2)],
    "queries": lambda: [MannWhitneyRetrieval(temperature=0.2, scope="query")],
    "beside": lambda: [MannWhitneyRetrieval(temperature=0.2, replace_objective=False, weight=0.5)],
    "masks": lambda: [Masks(), MannWhitneyRetrieval(temperature=0.2)],
    "drawn": lambda: [MannWhitneyRetrieval(temperature=0.2, num_negatives=7)],
}


def train_case(case, fabric):
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 50, 5, generator=generator, dtype=torch.float64)
    number = torch.arange(50)
    extras = {"document": number % 12, "query": number % 30} if case in ("ids", "queries") else {}
    torch.manual_seed(1)
    model = DualEncoder(*(MLP(5, (8,), 4, norm=None) for _ in range(2))).double()
    run = coloss.fit(
        model,
        IndexedDataset((queries, documents), extras=extras),
        first_value if case == "beside" else None,
        CASES[case](),
        budget=Budget(epochs=1),
        batch_size=16,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        log_every=1,
        fabric=fabric,
    )
    losses = torch.tensor([point.terms["mann_whitney"] for point in run.history], dtype=torch.float64)
    return {**run.model.state_dict(), "losses": losses}


def train_all(fabric):
    return {f"{case}/{name}": value for case in CASES for name, value in train_case(case, fabric).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights and losses of every case, on one process and on each of two."""
    folder = tmp_path_factory.mktemp("processes")
    return [found for count in (1, 2) for found in run_processes(train_all, folder, count)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_reach_the_weights_of_one_with_the_joined_batch(trained, case):
    alone, first, second = (
        {name: value for name, value in found.items() if name.startswith(case)} for found in trained
    )
    assert len(first) > 4
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
        if case != "drawn":  # the draws of one process are others: its pairs come in another order
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-9)


def test_the_cases_on_several_processes_differ_from_each_other(trained):
    found = {tuple(trained[0][f"{case}/losses"].tolist()) for case in CASES}
    assert len(found) == len(CASES)


def test_the_claim_runs():
    found = verify("mw-loss", smoke=True, seeds=1)
    assert found["metric"] == "pooled_auc" and len(found["arms"]) == 5
    for name, arm in found["arms"].items():
        assert {"pooled_auc", "mrr", "recall@10", "recall_at_1pct_fpr"} <= set(arm["metrics"])
        assert all(0 <= value <= 1 for value in arm["metrics"]["pooled_auc"]["values"])
        assert ("temperature" in arm["metrics"]) == (name in ("info-nce", "mann-whitney"))


def test_the_baseline_of_the_claim_goes_both_ways():
    """A document that suits every query costs the baseline as much as a query that suits every document."""
    queries, documents = torch.randn(2, 5, 3)
    one = temperature_trial.info_nce((queries, documents), temperature=0.3)
    torch.testing.assert_close(one, temperature_trial.info_nce((documents, queries), temperature=0.3))
    scores, own = queries @ documents.T / 0.3, torch.arange(5)
    torch.testing.assert_close(one, (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2)


def test_the_claim_chooses_temperatures_by_validation_pairs_alone():
    setting = Setting.of(digit_halves_task(), 0, Budget(steps=2), smoke=True)
    judged = []

    def validate(model, splits):
        judged.append(model)
        return {"pooled_auc": float(len(judged) in (3, len(TEMPERATURES) + 4))}

    setting.task = replace(setting.task, validate=validate)
    found = measure_tuned(setting)
    assert len(judged) == 2 * len(TEMPERATURES)
    assert found["info-nce"]["temperature"] == TEMPERATURES[2]
    assert found["mann-whitney"]["temperature"] == TEMPERATURES[3]
    assert found["info-nce"]["pooled_auc"] == setting.task.test(judged[2], setting.splits)["pooled_auc"]


def test_equals_a_hand_written_loss():
    queries, documents = F.normalize(torch.randn(2, 5, 3), dim=-1)
    step = TrainingStep(torch.nn.Identity(), None, [MannWhitneyRetrieval(temperature=0.3)])
    gap = (
        (queries @ documents.T).diagonal()[:, None] - (queries @ documents.T)[~torch.eye(5, dtype=torch.bool)]
    ) / 0.3
    with torch.no_grad():
        found = step((queries, documents), None)["mann_whitney"]
    torch.testing.assert_close(found, torch.log1p(torch.exp(-gap)).mean())
