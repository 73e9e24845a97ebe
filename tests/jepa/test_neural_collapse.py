"""The report on networks and loaders, the monitor in training, and the claim."""

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import coloss
from coloss.data import IndexedDataset, load
from coloss.errors import InputError
from coloss.jepa import (
    LeJEPA,
    NeuralCollapseMonitor,
    class_means,
    collapse_metrics,
    collapse_report,
    nc1,
    nc4,
    nearest_mean,
)
from coloss.jepa.feature_decay_trial import one_hot_squared_error_loss
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.metrics import extract_features
from coloss.nn import MLP, Classifier
from coloss.ops import RunningScatter
from coloss.train import Budget, Method, Setting, State

HEAD = "head:input"


def new_model(dim: int = 6) -> nn.Module:
    torch.manual_seed(3)
    return Classifier(MLP(dim, (8, 5), dropout=0.3), 3)


def new_data(rows: int = 48, seed: int = 1) -> IndexedDataset:
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return IndexedDataset(inputs + torch.eye(6)[:3].repeat(rows // 3, 1), torch.arange(rows) % 3)


def direct(model: nn.Module, data: IndexedDataset, layer: str) -> dict[str, float]:
    """The report from features held whole."""
    features, classes = extract_features(model, data, layer)
    logits, _ = extract_features(model, data)
    scatter = RunningScatter.of(features, classes, 3)
    means = class_means(features, classes, 3)
    return collapse_metrics(scatter) | {
        "nc4": nc4(features, logits, means),
        "nearest_mean_accuracy": float((nearest_mean(features, means) == classes).double().mean()),
    }


def test_two_passes_give_what_features_held_whole_give() -> None:
    model, data, test = new_model(), new_data(), new_data(30, seed=2)
    report = collapse_report(model, data, ["backbone.layers.2", HEAD, ""], test=test, batch_size=7)
    for layer in ("backbone.layers.2", HEAD, ""):
        path = layer or None
        found = dict(report[layer])
        for name, value in direct(model, data, path).items():
            assert found.pop(name) == pytest.approx(value, rel=1e-5), name
        features, classes = extract_features(model, test, path)
        means = class_means(*extract_features(model, data, path), 3)
        assert found.pop("nc4_test") == nc4(features, extract_features(model, test).features, means)
        assert found.pop("nearest_mean_accuracy_test") == pytest.approx(
            float((nearest_mean(features, means) == classes).double().mean())
        )
        assert set(found) == ({"nc3", "self_duality"} if layer == HEAD else set())


def test_every_kind_of_data_gives_the_same() -> None:
    model, data = new_model(), new_data()
    (expected,) = collapse_report(model, data).values()
    pair = (data.inputs, data.targets)
    shuffled = DataLoader(TensorDataset(*pair), batch_size=5, shuffle=True)
    batches = list(zip(data.inputs.split(11), data.targets.split(11)))
    for form in (pair, TensorDataset(*pair), shuffled, batches):
        ((layer, found),) = collapse_report(model, form).items()
        assert layer == HEAD and found == pytest.approx(expected, rel=1e-5)


def test_it_looks_in_eval_mode_and_leaves_no_trace() -> None:
    model, data = new_model(), new_data()
    model.train()
    before, state = weights(model), torch.random.get_rng_state()
    trained = collapse_report(model, data, batch_size=5)
    assert model.training and model.backbone.training
    assert not differing(before, weights(model)) and torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    # Batch norm would make the value depend on the cut into batches, dropout on chance.
    assert collapse_report(model.eval(), data, batch_size=48)[HEAD] == pytest.approx(trained[HEAD], rel=1e-6)


def test_the_output_of_a_backbone_is_known_as_what_enters_the_head() -> None:
    report = collapse_report(new_model(), new_data(), ["backbone", "backbone.layers.0"])
    assert "nc3" in report["backbone"] and "nc3" not in report["backbone.layers.0"]


def test_a_layer_that_equals_what_enters_the_head_in_one_batch_alone_is_another() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(2, 2))
    # On the first and the last sample the ReLU changes nothing.
    data = IndexedDataset(
        torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.5, -1.0], [2.0, 1.0]]), torch.tensor([0, 1, 0, 1])
    )
    report = collapse_report(model, data, ["0", "1"], batch_size=1)
    assert "nc3" in report["1"] and "nc3" not in report["0"]


def test_a_network_without_a_linear_layer_and_maps_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = (torch.rand(20, 1, 3, 3), torch.arange(20) % 3)
    found = collapse_report(model, data, ["0"])["0"]
    features, classes = extract_features(model, IndexedDataset(*data), "0")
    assert features.shape == (20, 12) and found["nc1"] == pytest.approx(nc1(features, classes))
    assert "nc3" not in found
    with pytest.raises(InputError, match="layers must be named: Sequential has no linear classifier"):
        collapse_report(model, data)


def test_unequal_and_missing_classes_and_collapsed_features() -> None:
    model, data = new_model(), new_data()
    two = data.subset(torch.nonzero(data.targets < 2).flatten()[:-5])
    found = collapse_report(model, two)[HEAD]
    assert all(math.isfinite(value) for value in found.values())
    features, classes = extract_features(model, two, HEAD)
    assert found["nc1"] == pytest.approx(nc1(features, classes))
    one = collapse_report(model, data.subset(torch.nonzero(data.targets == 0).flatten()))[HEAD]
    assert math.isnan(one["nc1"]) and math.isnan(one["nc1_pinv"]) and math.isnan(one["nc3"])
    still = collapse_report(model, (torch.zeros(6, 6), torch.arange(6) % 3))[HEAD]
    assert math.isnan(still["nc1"]) and math.isnan(still["nc1_pinv"])


def test_half_precision_networks_are_measured_in_float64() -> None:
    model, data = new_model().eval(), new_data()
    found = collapse_report(model.bfloat16(), data)[HEAD]
    features, classes = extract_features(model, IndexedDataset(data.inputs.bfloat16(), data.targets), HEAD)
    assert features.dtype == torch.bfloat16
    assert found["nc1"] == nc1(features.double(), classes)


def test_bad_input_is_named() -> None:
    model, data = new_model(), new_data()
    batches = list(zip(data.inputs.split(11), data.targets.split(11)))
    for call, message in (
        (lambda: collapse_report(model, iter(batches)), "data must be readable twice, got the iterator"),
        (lambda: collapse_report(model, data, "head"), "layers must be a list .* got 'head'"),
        (lambda: collapse_report(model, data, []), r"layers must be a list .* got \[\]"),
        (lambda: collapse_report(model, data, ["neck"]), "layers cannot be read: .* got 'neck'"),
        (
            lambda: collapse_report(model, data, classifier="backbone"),
            "classifier must name an nn.Linear .* got 'backbone'",
        ),
        (lambda: collapse_report(model, data.inputs), "class of each sample as a whole number, got NoneType"),
        (
            lambda: collapse_report(model, (data.inputs, data.targets.float())),
            r"class of each sample as a whole number, got \(48,\)",
        ),
        (lambda: collapse_report(nn.Linear(6, 1), data), r"at least 2 classes, got \(48, 1\)"),
        (
            lambda: collapse_report(model, (data.inputs, data.targets + 1)),
            r"classes must be in \[0, 3\), got 3",
        ),
        (lambda: NeuralCollapseMonitor(data, every=0), "every must be >= 1, got 0"),
        (lambda: NeuralCollapseMonitor(data, batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: NeuralCollapseMonitor(iter(batches)), "data must be readable twice"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def train(*methods: Method, steps: int = 6, data: IndexedDataset | None = None, **options):
    return coloss.fit(
        new_model(),
        data or new_data(),
        F.cross_entropy,
        list(methods),
        budget=Budget(steps=steps),
        batch_size=16,
        optimizer=SGD,
        **({"log_every": 1} | options),
    )


def test_the_monitor_logs_what_the_report_says() -> None:
    held, test = new_data(24, seed=5), new_data(24, seed=6)
    monitor = NeuralCollapseMonitor(held, every=4, test=test)
    run = train(monitor, steps=4)
    (expected,) = collapse_report(run.model, held, test=test).values()
    assert run.history[-1].metrics == pytest.approx(expected)
    assert monitor.found == [(4, {HEAD: pytest.approx(expected)})]
    several = NeuralCollapseMonitor(held, layers=["backbone.layers.2", HEAD])
    names = train(several, steps=3).history[-1].metrics
    assert several.found[0][0] == 3  # at the end of the epoch
    assert {"nc1/backbone.layers.2", "nc1/head:input", "nc3/head:input"} <= set(names)
    assert "nc3/backbone.layers.2" not in names


def test_training_and_other_methods_do_not_notice_it() -> None:
    class Later(Method):
        """Reads the tapped features after the monitor's look."""

        def setup(self, state: State) -> None:
            state.tap("mine", "backbone")
            self.seen: list[Tensor] = []

        def on_step(self, state: State) -> None:
            self.seen.append(state.features["mine"].detach().clone())

    def run(*watching: Method):
        later = Later()
        fit = train(LeJEPA(num_slices=4), *watching, later)
        return fit, later.seen

    (plain, seen), (watched, seen_too) = run(), run(NeuralCollapseMonitor(new_data(), every=1))
    assert not differing(weights(plain.model), weights(watched.model))
    assert [point.terms for point in plain.history] == [point.terms for point in watched.history]
    assert all(torch.equal(*pair) for pair in zip(seen, seen_too, strict=True))
    assert not any(module._forward_hooks for module in watched.model.modules())


def test_every_loop_takes_the_same_steps() -> None:
    batches = list(zip(new_data().inputs.split(16), new_data().targets.split(16)))
    monitors: list[NeuralCollapseMonitor] = []

    def new_method() -> Method:
        monitors.append(NeuralCollapseMonitor(new_data(), every=3))
        return monitors[-1]

    torch.manual_seed(0)
    plain = Classifier(MLP(6, (8, 5)), 3)
    check_loops(lambda: plain, new_method, batches, F.cross_entropy)
    assert [step for step, _ in monitors[0].found] == [3, 6]
    assert monitors[0].found == monitors[1].found == monitors[2].found


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(
        new_model, lambda: NeuralCollapseMonitor(new_data(), every=2), new_data(), tmp_path, F.cross_entropy
    )


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> dict[str, Tensor]:
        data = new_data()
        data = IndexedDataset(data.inputs.double(), data.targets)
        monitor = NeuralCollapseMonitor(data, every=2)
        torch.manual_seed(3)
        model = Classifier(MLP(6, (8, 5), norm=None), 3).double()
        coloss.fit(
            model, data, F.cross_entropy, [monitor], budget=Budget(steps=4), batch_size=16, fabric=fabric
        )
        looks = [list(report[HEAD].values()) for _, report in monitor.found]
        return {"looks": torch.tensor(looks, dtype=torch.float64)}

    check_two_processes(work, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_runs_in_half_precision(precision: str) -> None:
    monitor = NeuralCollapseMonitor(new_data(), every=2)
    train(monitor, steps=2, fabric=Fabric(accelerator="cpu", devices=1, precision=precision))
    assert all(math.isfinite(value) for value in monitor.found[0][1][HEAD].values())


def test_a_wrong_layer_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="layers cannot be read: .* got 'neck'"):
        train(NeuralCollapseMonitor(new_data(), layers=["neck"]))


def test_the_lab_builds_it_on_training_samples() -> None:
    setting = Setting.of(find_task("digits", limit=60), seed=2, budget=Budget(steps=2))
    monitor = NeuralCollapseMonitor.for_setting(setting, samples=30, every=1)
    assert len(monitor.data) == 30
    assert set(monitor.data.ids.tolist()) <= set(setting.splits.train.ids.tolist())
    assert setting.fit(setting.new_model(), methods=[monitor]).history[-1].metrics["nc4"] >= 0
    with pytest.raises(InputError, match="samples must be >= 1, got 0"):
        NeuralCollapseMonitor.for_setting(setting, samples=0)


def digits(rows: int = 600) -> IndexedDataset:
    return load("digits", seed=0, limit=rows).train


def squared_error_run(model: nn.Module, data: IndexedDataset, epochs: int) -> None:
    coloss.fit(
        model,
        data,
        one_hot_squared_error_loss,
        budget=Budget(epochs=epochs),
        batch_size=100,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    )


def test_nc1_falls_with_depth_after_training() -> None:
    torch.manual_seed(0)
    model, data = Classifier(MLP(64, (64, 64, 32), norm=None), 10), digits()
    squared_error_run(model, data, 30)
    report = collapse_report(model, data, [f"backbone.layers.{place}" for place in (1, 3, 5)])
    values = [found["nc1"] for found in report.values()]
    assert values[0] > values[1] > values[2]


def test_each_layer_trained_on_frozen_ones_lowers_nc1() -> None:
    data = digits()
    rows = data.inputs.flatten(1)
    values = [nc1(rows, data.targets)]
    for _ in range(2):
        torch.manual_seed(0)
        layer = Classifier(MLP(rows.shape[1], (64,), norm=None), 10)
        squared_error_run(layer, IndexedDataset(rows, data.targets), 20)
        with torch.no_grad():
            rows = layer.backbone(rows)
        values.append(nc1(rows, data.targets))
    assert all(deeper < shallower for shallower, deeper in itertools.pairwise(values))
    assert values[1] < values[0] / 2


def test_the_claim_runs() -> None:
    found = verify("neural-collapse", smoke=True, seeds=1)
    assert {"nc1_shift", "nc1_shift_train", "nc1_train_layer_1", "nc4_test"} <= set(
        found["arms"]["no feature decay"]["metrics"]
    )
