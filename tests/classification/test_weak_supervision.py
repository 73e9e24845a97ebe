import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import (
    WeakSupervision,
    confidence_loss,
    performance_gap_recovered,
    product_loss,
    train_weak_to_strong,
    window_loss,
)
from coloss.classification.parity_of_digits import digits_parts, principal_components
from coloss.classification.weak_supervision import CLAIM, SYSTEM
from coloss.data import IndexedDataset, load
from coloss.errors import DataNotFoundError
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.lab.tasks import find_task
from coloss.nn import MLP
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def new_model(classes: int = 2) -> nn.Module:
    return MLP(6, (8,), classes, norm=None)


def new_data(rows: int = 48, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randn(rows, classes).softmax(1)


def weights(module: nn.Module) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in module.state_dict().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


def train(model: nn.Module, methods: list[Method], data: Any, **options: Any) -> coloss.Fit:
    defaults: dict[str, Any] = {"budget": Budget(epochs=4), "optimizer": SGD, "batch_size": 16}
    return coloss.fit(model, data, F.cross_entropy, methods, **(defaults | options))


@pytest.mark.parametrize("classes", [2, 3])
def test_each_loss_is_the_function_of_its_name(classes: int) -> None:
    model, (inputs, weak) = new_model(classes), new_data(classes=classes)
    logits = model(inputs)
    for options, expected in (
        ({"loss": "naive"}, F.cross_entropy(logits, weak)),
        (
            {"loss": "product", "weak_power": 0.5, "strong_power": 2.0},
            product_loss(logits, weak, weak_power=0.5, strong_power=2.0),
        ),
        ({"loss": "window", "radius": 0.05}, window_loss(logits, weak, 0.05)),
        ({"alpha": 0.6}, confidence_loss(logits, weak, 0.3)),  # half of the warm-up
        (
            {"alpha": 0.6, "warmup": 0.0, "student": "soft"},
            confidence_loss(logits, weak, 0.6, student="soft"),
        ),
    ):
        step = TrainingStep(model, None, [WeakSupervision(**options)])
        step.state.progress = 0.1
        (term,) = step(inputs, weak).values()
        torch.testing.assert_close(term, expected, msg=str(options))


def test_naive_training_is_cross_entropy_on_soft_labels() -> None:
    first, data = new_model(), new_data()
    second = copy.deepcopy(first)
    train(first, [], data)
    train(second, [WeakSupervision(loss="naive")], data)
    for name, value in weights(first).items():
        torch.testing.assert_close(second.state_dict()[name], value)


def test_class_numbers_do_as_weak_labels() -> None:
    inputs, labels = torch.randn(48, 6), torch.randint(3, (48,))
    first = new_model(3)
    second = copy.deepcopy(first)
    train(first, [WeakSupervision()], (inputs, labels))
    train(second, [WeakSupervision()], (inputs, F.one_hot(labels, 3).float()))
    assert same(weights(first), weights(second))


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": state.outputs.square().mean()}


def test_it_replaces_the_objective_and_composes_with_other_terms() -> None:
    run = train(new_model(), [Smoothness(), WeakSupervision()], new_data())
    assert set(run.history[-1].terms) == {"smoothness", "weak_supervision"}


def test_mixed_precision_training_stays_finite() -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = new_model(3)
    train(model, [WeakSupervision()], new_data(classes=3), fabric=fabric)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_micro_batches_are_joined_for_the_balance() -> None:
    data, found = new_data(), []
    initial = new_model()
    for accumulate in (1, 4):
        model = copy.deepcopy(initial)
        train(model, [WeakSupervision(warmup=0.0)], data, accumulate=accumulate, batch_size=16 // accumulate)
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
    assert WeakSupervision().batch_statistic
    assert not WeakSupervision(memory=32).batch_statistic
    assert not WeakSupervision(loss="naive").batch_statistic


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    data, initial = new_data(), new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Any]:
        method, model = WeakSupervision(memory=20), copy.deepcopy(initial)
        train(model, [method, Kill(kill_at)], data, batch_size=4, budget=Budget(steps=20), **options)
        return weights(model) | {f"method.{name}": value for name, value in weights(method).items()}

    whole = run(kill_at=0)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 6}
    with pytest.raises(Killed):
        run(kill_at=15, **kept)
    assert same(whole, run(kill_at=0, resume=True, **kept))
    assert len(whole["method.confidence._extra_state"]["seen"]) == 20


def test_fit_and_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    inputs, weak = new_data()
    batches = list(zip(inputs.split(16), weak.split(16)))
    initial = new_model()
    fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))
    coloss.fit(fitted, batches, methods=[WeakSupervision()], budget=Budget(epochs=4), optimizer=SGD)

    step = TrainingStep(looped, methods=[WeakSupervision()], total_steps=12)
    optimizer = SGD(step.trainable)
    for _ in range(4):
        for batch in batches:
            optimizer.zero_grad()
            step.backward(step(*batch))
            optimizer.step()
            step.after_step()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = lit

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [coloss.MethodCallback([WeakSupervision()])],
    }
    Trainer(max_epochs=4, **options).fit(Module(), DataLoader(batches, batch_size=None))
    assert not same(weights(initial), weights(fitted))
    assert same(weights(fitted), weights(looped))
    assert same(weights(fitted), weights(lit))


@pytest.mark.parametrize(("classes", "options"), [(2, {"warmup": 0.0, "alpha": 1.0}), (4, {"alpha": 0.5})])
def test_two_processes_take_the_steps_of_one(classes: int, options: dict[str, float], tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        """Weights after four epochs in float64."""
        torch.manual_seed(0)
        model = MLP(6, (8,), classes, norm=None).double()
        coloss.fit(
            model,
            (
                torch.randn(40, 6, dtype=torch.float64),
                torch.randn(40, classes, dtype=torch.float64).softmax(1),
            ),
            methods=[WeakSupervision(**options)],
            batch_size=8,
            budget=Budget(epochs=4),
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            fabric=fabric,
        )
        return dict(model.state_dict())

    check_two_processes(train, tmp_path)


def test_bad_input_is_named(as_users_call: None) -> None:
    for arguments, message in (
        ({"loss": "hinge"}, 'loss must be "confidence", "product", "window" or "naive", got \'hinge\''),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"warmup": 2.0}, r"warmup must be in \[0, 1\], got 2.0"),
        ({"memory": -1}, "memory must be >= 0, got -1"),
        ({"student": "hard"}, 'student must be "balanced"'),
        ({"radius": -1.0}, "radius must be >= 0, got -1.0"),
        ({"strong_power": -1.0}, "strong_power must be >= 0 and finite, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            WeakSupervision(**arguments)
    with pytest.raises(
        ValueError, match="outputs and targets must be one tensor each, got Tensor and NoneType"
    ):
        train(new_model(), [WeakSupervision()], [torch.randn(8, 6)])


# The protocol


def planes(rows: int, start: int = 0) -> IndexedDataset:
    inputs = torch.randn(rows, 6)
    return IndexedDataset(inputs, (inputs[:, 0] > 0).long(), torch.arange(start, start + rows))


class Fixed(nn.Module):
    """Says what one coordinate says, whatever it is trained on."""

    def __init__(self, coordinate: int, wrong: float = 0.0) -> None:
        super().__init__()
        self.coordinate, self.wrong = coordinate, wrong

    def forward(self, inputs: Tensor) -> Tensor:
        side = inputs[:, self.coordinate] - self.wrong * inputs[:, 1]
        return torch.stack([-side, side], dim=1)


def test_the_protocol_trains_on_what_it_says() -> None:
    calls: list[tuple[nn.Module, IndexedDataset, Sequence[Method]]] = []

    def record(model: nn.Module, data: IndexedDataset, methods: Sequence[Method]) -> nn.Module:
        calls.append((model, data, methods))
        return model

    labelled, unlabelled, test = planes(60), planes(50, 60), planes(400, 110)
    models = iter([Fixed(0, 2.0), Fixed(0), Fixed(0, 1.0), Fixed(0, 0.5)])
    report = train_weak_to_strong(
        lambda: next(models),
        lambda: next(models),
        labelled,
        unlabelled,
        test,
        losses={"naive": lambda: WeakSupervision(loss="naive")},
        intermediate=[lambda: next(models)],
        train=record,
    )
    supervisor, ceiling, middle, student = calls
    assert supervisor[1] is labelled and ceiling[1] is unlabelled
    assert not supervisor[2] and not ceiling[2]
    # Weak labels, then those of the model between; never the truth.
    torch.testing.assert_close(middle[1].targets, Fixed(0, 2.0)(unlabelled.inputs).softmax(1))
    torch.testing.assert_close(student[1].targets, Fixed(0, 1.0)(unlabelled.inputs).softmax(1))
    assert torch.equal(student[1].ids, unlabelled.ids)

    def accuracy(wrong: float, data: IndexedDataset) -> float:
        return float((Fixed(0, wrong)(data.inputs).argmax(1) == data.targets).float().mean())

    result = report.students["naive"]
    assert (report.weak, report.ceiling) == (accuracy(2.0, test), 1.0)
    assert report.weak_label_accuracy == accuracy(2.0, unlabelled)
    assert (
        result.stages == (accuracy(1.0, test), accuracy(0.5, test)) and result.accuracy == result.stages[-1]
    )
    expected = performance_gap_recovered(report.weak, result.accuracy, report.ceiling)
    assert result.gap_recovered.value == pytest.approx(expected)
    low, high = result.gap_recovered.interval
    assert 0 < low < expected < high < 1
    weak_says, says = (Fixed(0, w)(test.inputs).argmax(1) for w in (2.0, 0.5))
    wrong = weak_says != test.targets
    assert result.agreement == pytest.approx(float((weak_says == says).float().mean()))
    assert result.imitated_errors == pytest.approx(float((weak_says == says)[wrong].float().mean()))


def test_a_student_that_is_its_supervisor_recovers_nothing_and_the_ceiling_everything() -> None:
    parts = planes(60), planes(50, 60), planes(300, 110)
    for student, recovered, agreement in ((Fixed(0, 2.0), 0.0, 1.0), (Fixed(0), 1.0, None)):
        models = iter([Fixed(0), student])
        report = train_weak_to_strong(
            lambda: Fixed(0, 2.0),
            lambda models=models: next(models),
            *parts,
            losses={"naive": lambda: WeakSupervision(loss="naive")},
            train=lambda model, data, methods: model,
        )
        found = report.students["naive"]
        assert found.gap_recovered.value == pytest.approx(recovered)
        if agreement is not None:
            assert found.agreement == agreement and found.imitated_errors == 1.0


def test_a_supervisor_is_never_asked_about_its_own_training_data() -> None:
    data = planes(60)
    with pytest.raises(ValueError, match="labelled and unlabelled must not share samples, got 20 in both"):
        train_weak_to_strong(
            new_model,
            new_model,
            data.subset(torch.arange(40)),
            data.subset(torch.arange(20, 60)),
            planes(9, 60),
        )
    soft = IndexedDataset(data.inputs, torch.rand(60, 2), data.ids)
    with pytest.raises(ValueError, match="must have one class number for each sample"):
        train_weak_to_strong(new_model, new_model, soft, planes(9, 60), planes(9, 70))


# In the lab


@pytest.fixture
def _mnist() -> None:
    try:
        load("mnist", limit=10)
    except DataNotFoundError as error:
        pytest.skip(str(error))


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("weak-to-strong")
    assert entry.has_claim and entry.method == "coloss.classification.WeakSupervision"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_for_noisy_labels() -> None:
    setting = Setting.of(find_task("iris"), seed=0, budget=Budget(steps=4))
    method = WeakSupervision.for_setting(setting, alpha=0.5, student="argmax")
    run = setting.fit(setting.new_model(), methods=[method])
    assert set(run.history[-1].terms) == {"weak_supervision"}


@pytest.mark.usefixtures("_mnist")
def test_the_claims_parts_are_disjoint_and_of_the_digits() -> None:
    parts = digits_parts(3)
    assert [len(part) for part in parts.values()] == [2000, 1000, 3000, 4000]
    assert len(torch.cat([part.ids for part in parts.values()]).unique()) == 10000
    splits = load("mnist", seed=0)
    first = dict(zip(splits.train.ids.tolist(), splits.train.targets.tolist()))
    for name, modulus in (("pretraining", 10), ("test", 2)):
        pairs = zip(parts[name].ids.tolist(), parts[name].targets.tolist())
        assert all(first[number] % modulus == target for number, target in pairs if number in first)
    assert not torch.equal(digits_parts(4)["test"].ids, parts["test"].ids)


def test_principal_components_are_uncorrelated_with_variance_1() -> None:
    inputs = torch.randn(200, 8) @ torch.randn(8, 8) + 3.0
    components = principal_components(inputs, 3)(inputs)
    torch.testing.assert_close(components.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(components.T @ components / 200, torch.eye(3), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("_mnist")
def test_the_claim_runs() -> None:
    found = verify("weak-to-strong", smoke=True, seeds=1)
    assert {"supervisor", "naive", "confidence", "ceiling"} <= set(found["arms"])
    assert found["arms"][CLAIM.method]["metrics"].keys() >= {"accuracy", "gap_recovered", "imitated_errors"}
