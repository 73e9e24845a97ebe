"""MetricMix adds what it says at each level, leaves no trace, and keeps the promises of every method."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import PAIR_LOSSES, MetricMix, contrastive, metric_mix_loss
from coloss.data import IndexedDataset, locate
from coloss.errors import DataNotFoundError, InputError
from coloss.nn import MLP, Classifier
from coloss.train import Budget, TrainingStep

SGD = partial(torch.optim.SGD, lr=0.1)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def new_data(dtype: torch.dtype = torch.float32, rows: int = 32) -> IndexedDataset:
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return IndexedDataset(inputs, torch.arange(rows) % 4)


def weights_after(methods, objective=None, seed: int = 0, steps: int = 3) -> dict[str, Tensor]:
    budget = Budget(steps=steps)
    run = coloss.fit(
        new_model(), new_data(), objective, methods, budget=budget, batch_size=16, seed=seed, optimizer=SGD
    )
    return dict(run.model.state_dict())


LEVELS = {
    "embedding": {"level": "embedding"},
    "feature": {"level": "feature", "feature": "1"},
    "input": {"level": "input"},
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_every_loss_is_mixed_at_every_level(level, loss):
    method = MetricMix(loss, num_classes=4, **LEVELS[level])
    run = coloss.fit(
        new_model(), new_data(), methods=[method], budget=Budget(steps=3), batch_size=16, log_every=1
    )
    assert sorted(run.history[-1].terms) == sorted([method.loss.name, "metric_mix"])
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())
    assert (method.proxies is not None) == (method.loss.proxies is not None)


def test_weight_zero_is_the_loss_alone():
    plain = weights_after([], lambda outputs, targets: contrastive().clean(outputs, targets))
    for method in (MetricMix(weight=0.0), MetricMix(weight=lambda progress: 0.0, level="input")):
        mixed = weights_after([method])
        assert all(torch.equal(plain[name], mixed[name]) for name in plain)


def test_beside_the_same_objective_it_adds_the_mixed_term_alone():
    def objective(outputs: Tensor, targets: Tensor) -> Tensor:
        return contrastive().clean(outputs, targets)

    own, beside = weights_after([MetricMix()]), weights_after([MetricMix(clean=False)], objective)
    assert all(torch.equal(own[name], beside[name]) for name in own)


@pytest.mark.parametrize("level", ["feature", "input"])
def test_mixes_of_inputs_through_a_linear_network_are_mixes_of_its_embeddings(level):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), new_data()
    found = {}
    for name, options in (
        ("embedding", {}),
        (level, LEVELS[level] | ({"feature": "0"} if level == "feature" else {})),
    ):
        method = MetricMix(pairs="anchor-neg", k_hard=1, **options)
        step = TrainingStep(model, None, [method])
        step.state.generator.manual_seed(5)
        terms = step(data.inputs, data.targets)
        found[name] = terms["metric_mix"]
        step.finish()
    embeddings, unit = model(data.inputs), F.normalize(model(data.inputs), dim=1)
    # Embeddings are mixed after they were brought to length 1, feature maps and inputs before.
    share = float(coloss.ops.beta_weights(1, 2.0, torch.Generator().manual_seed(5)))
    for name, rows in (("embedding", unit), (level, embeddings)):
        expected = metric_mix_loss(
            embeddings,
            data.targets,
            contrastive(),
            share,
            "anchor-neg",
            k_hard=1,
            mix=lambda first, second, rows=rows: share * rows[first] + (1 - share) * rows[second],
        )
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("level", ["feature", "input"])
def test_the_second_pass_leaves_no_trace(level):
    seen = []

    class Watch(coloss.Method):
        def setup(self, state):
            state.tap("hidden", "2")

        def terms(self, state):
            seen.append((state.outputs.detach().clone(), state.features["hidden"].detach().clone()))
            return {"size": 0 * state.outputs.sum()}

    models = []
    for method in (MetricMix(weight=0.0), MetricMix(weight=1e-30, **LEVELS[level])):
        run = coloss.fit(
            new_model(),
            new_data(),
            methods=[method, Watch()],
            budget=Budget(steps=1),
            batch_size=32,
            optimizer=SGD,
        )
        models.append(run.model)
        assert not any(module._forward_hooks for module in run.model.modules())
    for one, other in zip(*seen):
        assert torch.equal(one, other)
    assert torch.equal(models[0][1].running_mean, models[1][1].running_mean)
    assert int(models[1][1].num_batches_tracked) == 1


def test_proxies_are_trained_and_do_not_ship():
    method = MetricMix("proxy-anchor", num_classes=4)
    step = TrainingStep(new_model(), None, [method])
    assert any(parameter is method.proxies for parameter in step.trainable)
    before = method.proxies.detach().clone()
    run = coloss.fit(new_model(), new_data(), methods=[method], budget=Budget(steps=3), batch_size=16)
    assert not torch.equal(before, method.proxies)
    assert not any("proxies" in name for name in run.model.state_dict())


def test_beside_a_classifier_embeddings_are_what_goes_into_it():
    data, model = new_data(), Classifier(MLP(6, (8,), norm=None), 4)
    step = TrainingStep(model, F.cross_entropy, [MetricMix()])
    terms = step(data.inputs, data.targets)
    expected = contrastive().clean(model.backbone(data.inputs), data.targets)
    torch.testing.assert_close(terms["contrastive"], expected)


def test_it_learns_to_retrieve():
    torch.manual_seed(0)
    targets = torch.arange(128) % 2
    inputs = torch.randn(128, 6)
    inputs[:, 0] = 0.5 * (2.0 * targets - 1)
    run = coloss.fit(
        MLP(6, (16,), 8), (inputs, targets), methods=[MetricMix()], budget=Budget(steps=60), batch_size=32
    )
    rows = F.normalize(run.model.eval()(inputs), dim=1)
    same = targets[:, None] == targets
    assert (rows @ rows.T)[same].mean() > (rows @ rows.T)[~same].mean() + 0.5


def method(**options) -> MetricMix:
    return MetricMix(**({"loss": "multi-similarity", "level": "input"} | options))


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = list(zip(new_data().inputs.split(8), new_data().targets.split(8)))
    check_loops(lambda: Classifier(MLP(6, (8,), 5, norm=None), 4), method, batches, F.cross_entropy)


@pytest.mark.parametrize("options", [{}, {"loss": "proxy-anchor", "level": "embedding", "num_classes": 4}])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, options):
    check_resume(new_model, partial(method, **options), new_data(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "contrastive", "level": "embedding"},
        {"loss": "multi-similarity", "level": "input"},
        {"loss": "lifted-structure", "level": "feature", "feature": "0"},
        {"loss": "proxy-anchor", "level": "embedding", "num_classes": 4},
        {"loss": "nca", "level": "input", "num_classes": 4, "k_hard": 2},
    ],
    ids=lambda options: options["loss"],
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, options):
    # Two samples of a class: which positive is drawn is no matter of chance. For proxies the lot is drawn in another order: one of each.
    classes = 8 if options["loss"] == "proxy-anchor" else 4

    def train(fabric: Fabric) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
        data = IndexedDataset(new_data(torch.float64, rows=8).inputs, torch.arange(8) % classes)
        built = method(**(options | ({"num_classes": classes} if "num_classes" in options else {})))
        run = coloss.fit(
            model, data, methods=[built], budget=Budget(steps=4), batch_size=8, fabric=fabric, optimizer=SGD
        )
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)


def test_it_composes_with_another_method_and_with_bfloat16():
    from coloss.distillation import LogitDistillation

    model = Classifier(MLP(6, (8,), norm=None), 4)
    run = coloss.fit(
        model,
        new_data(),
        F.cross_entropy,
        [MetricMix(), LogitDistillation(nn.Linear(6, 4))],
        budget=Budget(steps=2),
        batch_size=16,
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
        log_every=1,
    )
    assert {"contrastive", "metric_mix", "cross_entropy"} <= set(run.history[-1].terms)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"loss": "triplets"}, "loss must be a PairLoss or one of contrastive"),
        ({"level": "output"}, 'level must be "embedding", "feature" or "input", got \'output\''),
        ({"pairs": "all"}, 'pairs must be "pos-neg", "anchor-neg" or "both", got \'all\''),
        ({"alpha": 0.0}, "alpha must be > 0 and finite, got 0.0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"k_hard": 0}, "k_hard must be >= 1, got 0"),
        ({"level": "feature"}, "feature names the map to mix"),
        ({"loss": "nca"}, "num_classes must be >= 2 for the proxies of nca, got None"),
    ):
        with pytest.raises(InputError, match=message):
            MetricMix(**options)
    budget = Budget(steps=1)
    with pytest.raises(InputError, match="metric learning needs one class index for each sample as targets"):
        coloss.fit(new_model(), (new_data().inputs,), methods=[MetricMix()], budget=budget)
    with pytest.raises(InputError, match="feature cannot be mixed"):
        broken = MetricMix(level="feature", feature="layer9")
        coloss.fit(new_model(), new_data(), methods=[broken], budget=budget)
    words = nn.Sequential(nn.Embedding(5, 4), nn.Flatten())
    with pytest.raises(InputError, match="needs one tensor of floats as inputs, got torch.int64"):
        ids = (torch.zeros(8, 3, dtype=torch.int64), torch.arange(8) % 2)
        coloss.fit(words, ids, methods=[MetricMix(level="input")], budget=budget)


def test_the_claim_runs():
    from coloss.lab.claims import verify

    try:
        locate("omniglot")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    found = verify("metrix", smoke=True, seeds=1)
    assert set(found["arms"]) >= {"contrastive", "contrastive + metrix", "multi-similarity"}
    assert {"recall@1", "map@r", "utilization"} <= set(found["arms"]["contrastive"]["metrics"])
