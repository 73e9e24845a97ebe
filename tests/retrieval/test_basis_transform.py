"""The trainings in a run: on cached and live targets, on frozen features, several upgrades in a row, in every loop; and the claim."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from torch import nn

import coloss
from coloss.data import Batch, IndexedDataset, load
from coloss.errors import InputError
from coloss.lab import verify
from coloss.metrics import predict
from coloss.nn import MLP
from coloss.retrieval import (
    BackwardCompatibleTraining,
    BasisTransformTraining,
    EmbeddingTargets,
    UpgradedEncoder,
    compatibility_report,
    embedding_table,
)
from coloss.train import Budget, Method, Setting, TrainingStep
from coloss.train.encoder_task import encoder_task


def new_trunk():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return MLP(6, (8,), norm=None)


def encoders():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MLP(6, (), 3), MLP(6, (12,), 5, norm=None)


def data(count=40):
    generator = torch.Generator().manual_seed(0)
    return IndexedDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def bt2(**options):
    return BasisTransformTraining.from_encoders(*encoders(), data(), **({"extra_dims": 2} | options))


def live(**options):
    """Targets from the networks themselves, for batches without ids."""
    return BasisTransformTraining(*encoders(), extra_dims=2, **options)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]
    model = check_loops(new_trunk, lambda: live(prototypes=torch.eye(3)), batches, optimizer=_sgd)
    assert isinstance(model, UpgradedEncoder) and model(batches[0][0]).shape == (8, 7)


def test_the_baseline_takes_the_same_steps_too():
    batches = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]
    check_loops(new_trunk, lambda: BackwardCompatibleTraining(torch.eye(3)), batches, optimizer=_sgd)


@pytest.mark.parametrize("new_method", [bt2, lambda: BackwardCompatibleTraining(torch.eye(3, 4))])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, new_method):
    check_resume(new_trunk, new_method, data(), tmp_path, steps=6, kill_at=4, checkpoint_every=2)


def _two_process_run(fabric):
    method = bt2()
    trunk = new_trunk().double()
    run = coloss.fit(
        trunk,
        IndexedDataset(data().inputs.double(), data().targets),
        methods=[method],
        budget=Budget(epochs=1),
        batch_size=8,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        fabric=fabric,
    )
    return {name: value.double() for name, value in run.model.state_dict().items()}


def test_two_processes_take_the_steps_of_one(tmp_path):
    check_two_processes(_two_process_run, tmp_path, atol=1e-7)


def test_learns_what_it_is_for_and_ships_without_its_classifier():
    method = bt2()
    run = coloss.fit(
        new_trunk(),
        data(),
        methods=[method],
        budget=Budget(steps=100),
        optimizer=partial(torch.optim.Adam, lr=2e-2),
    )
    first, last = run.history[0].terms, run.history[-1].terms
    assert set(last) == {"classification", "match_new", "match_old", "match_prototypes"}
    assert last["match_old"] < 0.3 * first["match_old"] and last["match_new"] < 0.5 * first["match_new"]
    names = list(run.model.state_dict())
    assert not any("classifier" in name or "parametrizations" in name for name in names)
    old = F.normalize(predict(encoders()[0], data()).outputs, dim=1)
    assert (run.model.compatible(data().inputs) * old).sum(1).mean() > 0.9


def test_shipping_changes_no_embedding():
    method, trunk = live(), new_trunk()
    step = TrainingStep(trunk, None, [method])
    inputs = torch.randn(5, 6)
    step.model.eval()
    before = step.model(inputs)
    assert torch.equal(step.finish()(inputs), before)


def test_cached_targets_are_those_of_the_clean_inputs():
    """A table holds the embeddings of the data as they are; a network sees what the step made of them."""

    class Noise(Method):
        def on_batch(self, state):
            state.batch.inputs = state.batch.inputs + 1.0

    old, new = encoders()
    clean = [F.normalize(predict(net, data()).outputs, dim=1) for net in (old, new)]
    noisy = [F.normalize(predict(net, data().inputs + 1.0).outputs, dim=1) for net in (old, new)]
    for method, targets in ((bt2(use_labels=False), clean), (live(), noisy)):
        step = TrainingStep(new_trunk(), None, [method, Noise()])
        found = step(data().all())
        output = step.state.features["compatible"]
        for name, ours, target in (
            ("match_old", output.compatible, targets[0]),
            ("match_new", output.feature, targets[1]),
        ):
            expected = (1 - (F.normalize(ours, dim=1) * target).sum(1)).mean()
            torch.testing.assert_close(found[name], expected)


def test_prototypes_are_class_means_of_unit_old_embeddings():
    unit = F.normalize(predict(encoders()[0], data()).outputs, dim=1)
    expected = torch.stack([unit[data().targets == c].mean(0) for c in range(3)])
    torch.testing.assert_close(bt2().prototypes, expected)


def test_precomputed_features_train_a_head_alone():
    features = IndexedDataset(predict(encoders()[1], data()).outputs, data().targets)
    method = bt2(in_features=5)
    run = coloss.fit(
        nn.Identity(),
        features,
        methods=[method],
        budget=Budget(steps=100),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    assert run.history[-1].terms["match_new"] < 0.6 * run.history[0].terms["match_new"]
    assert run.model.compatible(features.inputs).shape == (40, 3)


def test_composes_with_another_method_and_without_labels():
    class Size(Method):
        def terms(self, state):
            return {"size": state.outputs.square().mean()}

    unlabelled = IndexedDataset(data().inputs)
    run = coloss.fit(new_trunk(), unlabelled, methods=[bt2(use_labels=False), Size()], budget=Budget(steps=2))
    assert set(run.history[-1].terms) == {"match_new", "match_old", "size"}


def test_three_generations_search_the_first_index():
    """Each upgrade is the next one's old encoder; the first coordinates go on meaning what they meant."""
    splits = load("digits", seed=0)
    train, test = splits.train, splits.test
    known = train.subset((train.targets < 5).nonzero().flatten())

    def trained(dataset, method, seed):
        torch.manual_seed(seed)
        return coloss.fit(
            MLP(64, (48,)), dataset, methods=[method], budget=Budget(steps=100), batch_size=128, seed=seed,
            optimizer=partial(torch.optim.Adam, lr=5e-3),
        ).model  # fmt: skip

    def plain(dataset, dim, seed):
        return trained(dataset, BackwardCompatibleTraining(torch.zeros(10, dim), weight=0.0), seed)

    first = plain(known, 8, 1)
    new = plain(train, 8, 2)
    second = trained(train, BasisTransformTraining.from_encoders(first, new, train, extra_dims=4), 3)
    third = trained(
        train, BasisTransformTraining.from_encoders(second, plain(train, 12, 4), train, extra_dims=4), 5
    )
    found = {
        name: predict(net, test).outputs
        for name, net in {"1": first, "new": new, "2": second, "3": third}.items()
    }
    assert [found[name].shape[1] for name in ("1", "2", "3")] == [8, 12, 16]

    def in_first_index(name):
        return compatibility_report(found["1"], found[name], found["1"], found[name], test.targets)

    reports = {name: in_first_index(name) for name in ("new", "2", "3")}
    assert reports["new"].new_old["map"] < 0.4
    for name in ("2", "3"):
        assert reports[name].new_old["map"] > reports[name].old_old["map"] - 0.05
        assert reports[name].new_new["map"] > reports[name].old_old["map"] + 0.1
    between = compatibility_report(found["2"], found["3"], found["2"], found["3"], test.targets)
    assert between.new_old["map"] > between.old_old["map"] - 0.05


def test_the_lab_builds_it_with_an_old_encoder_of_half_the_classes():
    task = encoder_task(
        "small", lambda seed: load("digits", seed=seed, limit=60), lambda _: MLP(64, [16]), Budget(steps=3)
    )
    setting = Setting.of(task, 0, smoke=True)
    method = BasisTransformTraining.for_setting(setting, extra_dims=3)
    run = setting.fit(setting.new_model(), None, [method])
    assert run.model.out_features == 3 + 16 and method.prototypes.shape == (10, 16)
    assert task.test(run.model, setting.splits)["knn"] > 0


def test_mixed_precision_keeps_the_loss_in_float32():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    runs = [
        coloss.fit(new_trunk(), data(), methods=[bt2()], budget=Budget(steps=2), log_every=1, **options)
        for options in ({"fabric": fabric}, {})
    ]
    found, expected = (run.history[0].terms["match_old"] for run in runs)
    assert found == pytest.approx(expected, rel=0.05)


def test_gradient_accumulation_takes_the_step_of_the_whole_batch():
    def trained(parts):
        return coloss.fit(
            new_trunk(), data(), methods=[bt2()], budget=Budget(steps=1), optimizer=_sgd, batch_size=40 // parts,
            accumulate=parts,
        ).model  # fmt: skip

    whole, parts = trained(1), trained(4)
    for first, second in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def test_what_cannot_work_is_refused():
    old, new = encoders()
    with pytest.raises(InputError, match="Identity does not declare out_features: give in_features"):
        TrainingStep(nn.Identity(), None, [bt2()])
    with pytest.raises(InputError, match="the weight of match_old must be >= 0 and finite, got -1.0"):
        bt2(match_old=-1.0)
    with pytest.raises(InputError, match="logit_scale must be > 0, got 0.0"):
        bt2(logit_scale=0.0)
    with pytest.raises(InputError, match=r"extra_dims must be in \[0, dim_old = 3\], got 4"):
        TrainingStep(new_trunk(), None, [bt2(extra_dims=4)])
    with pytest.raises(InputError, match="old must be a float"):
        BasisTransformTraining(torch.zeros(3), new)
    with pytest.raises(InputError, match="prototypes must be a finite"):
        BackwardCompatibleTraining(torch.full((3, 2), torch.nan))
    with pytest.raises(InputError, match="prototypes need one class index for each sample as targets"):
        TrainingStep(new_trunk(), None, [live(prototypes=torch.eye(3))])(torch.randn(4, 6))
    with pytest.raises(
        InputError, match="the data set must have class indices as targets, or use_labels=False"
    ):
        BasisTransformTraining.from_encoders(old, new, IndexedDataset(torch.randn(4, 6)))
    with pytest.raises(InputError, match="every class must have a sample to take its mean, got none of 1"):
        BasisTransformTraining.from_encoders(
            old, new, IndexedDataset(torch.randn(4, 6), torch.tensor([0, 2, 2, 0]))
        )


def test_a_method_that_taps_features_must_come_after():
    class Taps(Method):
        def setup(self, state):
            state.tap("hidden", "layers.0")

    with pytest.raises(
        InputError, match="BasisTransformTraining must stand before methods that tap features"
    ):
        TrainingStep(new_trunk(), None, [Taps(), bt2()])


def test_targets_say_what_is_missing():
    table = embedding_table(nn.Identity(), IndexedDataset(torch.randn(2, 3), ids=[0, 2]))
    targets = EmbeddingTargets(table, "old")
    assert targets.dim == 3
    for batch, message in (
        (Batch(torch.zeros(1, 3)), "old are looked up by sample id, and the batch has none"),
        (
            Batch(torch.zeros(1, 3), ids=torch.tensor([1])),
            "old must have an embedding of every sample, got none for id 1",
        ),
        (Batch(torch.zeros(1, 3), ids=torch.tensor([7])), "got 3 rows and ids from 7 to 7"),
        (Batch(torch.zeros(1, 3), ids=torch.tensor([-1])), "got 3 rows and ids from -1 to -1"),
    ):
        with pytest.raises(InputError, match=message):
            targets(batch)
    with pytest.raises(InputError, match="targets must have an integer out_features"):
        _ = EmbeddingTargets(nn.Identity()).dim
    with pytest.raises(InputError, match=r"an encoder must give embeddings \(batch, dim\)"):
        embedding_table(nn.Flatten(0), IndexedDataset(torch.zeros(2, 2)))


def test_the_claim_runs():
    found = verify("bt2", smoke=True, seeds=1)
    assert found["metric"] == "map_in_old_index"
    assert set(found["arms"]) == {"old encoder", "bt2", "independent", "bct", "bt2, head only", "procrustes"}
    for arm in found["arms"].values():
        assert {"map_in_old_index", "top1_in_old_index", "map_in_new_index"} <= set(arm["metrics"])
