import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import (
    BoostedHead,
    BoostedMLP,
    GradientBoostedMLPClassifier,
    GradientBoostedMLPRegressor,
    truncate_units,
)
from coloss.classification.boosted_networks import CLAIM, SYSTEM
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab import find_entry, find_task, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
QUICK: dict[str, Any] = {"stages": 4, "units_per_stage": 2, "max_iter": 20}


def draw(samples: int = 90) -> tuple[Tensor, Tensor]:
    target = torch.arange(samples) % 3
    return torch.randn(samples, 6) + 2 * torch.eye(6)[target], target


def new_model() -> Classifier:
    return Classifier(MLP(6, [8]), 3)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# Estimators


@pytest.mark.usefixtures("as_users_call")
@parametrize_with_checks(
    [
        GradientBoostedMLPClassifier(stages=4, units_per_stage=3, max_iter=20, learning_rate=0.5),
        GradientBoostedMLPRegressor(stages=4, units_per_stage=3, max_iter=20, learning_rate=0.5),
    ]
)
def test_they_are_scikit_learn_estimators(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_probabilities_are_those_of_the_network(load: Any) -> None:
    rows, labels = load(return_X_y=True)
    names = np.array(["low", "mid", "top"])[labels]
    model = GradientBoostedMLPClassifier(
        stages=6, units_per_stage=3, max_iter=30, learning_rate=0.5, random_state=0
    )
    model.fit(rows[::2], names[::2], rows[1::2], names[1::2])
    scores = model.to_module()(torch.tensor(rows[1::2], dtype=torch.float32)).detach().double()
    if len(model.classes_) == 2:
        expected = torch.cat([(-scores).sigmoid(), scores.sigmoid()], 1)
    else:
        expected = scores.softmax(1)
    found = model.predict_proba(rows[1::2])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert model.predict(rows[1::2]).tolist() == model.classes_[found.argmax(1)].tolist()
    assert model.score(rows[1::2], names[1::2]) > 0.9
    likelihood = -np.log(found[np.arange(len(found)), np.searchsorted(model.classes_, names[1::2])]).mean()
    assert model.validation_losses_[-1] == pytest.approx(likelihood, rel=1e-6)
    staged = list(model.staged_decision_function(rows[1::2]))
    assert len(staged) == 7 and np.array_equal(staged[-1], model.decision_function(rows[1::2]))
    folded, shares = model.network_.to_sequential(), model.network_.bias_shares
    half = truncate_units(folded, 9, shares)(torch.tensor(rows[1::2])).detach().numpy()
    np.testing.assert_allclose(half.squeeze(), staged[3], atol=1e-6)
    shorter = model.truncate(3)
    np.testing.assert_allclose(shorter.decision_function(rows[1::2]), staged[3])


def test_a_regression_of_one_and_of_several_targets() -> None:
    x = np.linspace(-3, 3, 80)[:, None]
    both = np.stack([np.sin(x[:, 0]), 100 * x[:, 0]], 1)
    options = {"stages": 8, "units_per_stage": 3, "learning_rate": 0.5, "random_state": 0}
    several = GradientBoostedMLPRegressor(**options).fit(x, both, x, both)
    assert several.predict(x).shape == (80, 2) and several.score(x, both) > 0.98
    one = GradientBoostedMLPRegressor(**options).fit(x, both[:, 0])
    staged = list(one.staged_predict(x))
    assert one.predict(x).shape == (80,) and np.array_equal(staged[-1], one.predict(x))
    np.testing.assert_allclose(staged[0], both[:, 0].mean(), atol=1e-12)
    assert several.validation_losses_.shape == several.train_losses_.shape == (9,)
    np.testing.assert_allclose(several.validation_losses_, several.train_losses_)


def test_bad_data_are_refused() -> None:
    rows, labels = draw()[0].numpy(), draw()[1].numpy()
    with pytest.raises(ValueError, match="y must hold at least two classes, got one class 0"):
        GradientBoostedMLPClassifier(**QUICK).fit(rows, 0 * labels)
    with pytest.raises(ValueError, match="validation labels must be among .*, got 9"):
        GradientBoostedMLPClassifier(**QUICK).fit(rows, labels, rows, 0 * labels + 9)
    with pytest.raises(ValueError, match="learning_rate must be > 0 and finite, got 0"):
        GradientBoostedMLPClassifier(learning_rate=0).fit(rows, labels)


# The method


def test_the_shipped_model_has_a_boosted_head_on_the_trained_features() -> None:
    data, model = draw(), new_model()
    before = weights(model.backbone)
    method = BoostedHead(data, **QUICK, learning_rate=0.5)
    run = coloss.fit(model, data, F.cross_entropy, [method], budget=Budget(epochs=3), optimizer=SGD)
    assert run.model is model and isinstance(model.head, BoostedMLP)
    assert model.head.hidden.weight.dtype == torch.float32
    assert not torch.equal(before["layers.0.weight"], weights(model.backbone)["layers.0.weight"])
    assert not any(module._forward_hooks for module in model.modules())
    logits = model.eval()(data[0])
    assert F.cross_entropy(logits, data[1]) < 0.5
    model.head = model.head.truncate(0)
    assert torch.allclose(model(data[0]).softmax(1), torch.full((90, 3), 1 / 3))


def test_numbers_make_it_a_regression_and_a_bare_layer_is_replaced_whole() -> None:
    inputs = torch.randn(80, 4)
    wanted = 10 * inputs[:, 0] ** 2
    objective = lambda outputs, targets: F.mse_loss(outputs[:, 0], targets)
    run = coloss.fit(
        nn.Linear(4, 1), (inputs, wanted), objective, [BoostedHead((inputs, wanted))], budget=Budget(epochs=1)
    )
    assert isinstance(run.model, BoostedMLP)
    assert objective(run.model(inputs), wanted) < 0.2 * wanted.var()


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"size": 1e-3 * state.outputs.square().mean()}

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


def test_it_composes_and_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    data, start = draw(), new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        trained = copy.deepcopy(start)
        found = coloss.fit(
            trained,
            data,
            F.cross_entropy,
            [BoostedHead(data, **QUICK), Kill(kill_at)],
            batch_size=30,
            budget=Budget(steps=9),
            optimizer=SGD,
            **options,
        )
        assert set(found.history[-1].terms) == {"cross_entropy", "size"}
        return weights(trained)

    whole, kept = run(kill_at=0), {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        run(kill_at=7, **kept)
    resumed = run(kill_at=0, resume=True, **kept)
    assert "head.hidden.weight" in whole
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_plain_loop_and_lightning_leave_the_head_too() -> None:
    from lightning.pytorch import LightningModule, Trainer

    data, start = draw(), new_model()
    batches = list(zip(data[0].split(30), data[1].split(30)))
    looped, lit = copy.deepcopy(start), copy.deepcopy(start)
    step = TrainingStep(looped, F.cross_entropy, [BoostedHead(data, **QUICK)], total_steps=3)
    step.state.generator.manual_seed(0)
    optimizer = SGD(step.trainable)
    for batch in batches:
        optimizer.zero_grad()
        step.backward(step(*batch))
        optimizer.step()
        step.after_step()
    step.finish()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = lit

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callback = coloss.MethodCallback([BoostedHead(data, **QUICK)])
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **off).fit(
        Module(), DataLoader(batches, batch_size=None)
    )
    assert isinstance(lit.head, BoostedMLP)
    assert all(torch.equal(value, weights(lit)[name]) for name, value in weights(looped).items())


@pytest.mark.usefixtures("as_users_call")
def test_bad_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"subsample must be in \(0, 1\], got 0.0"):
        BoostedHead(draw(), subsample=0.0)
    with pytest.raises(InputError, match="classifier must name an nn.Linear of the model, got 'backbone'"):
        TrainingStep(new_model(), F.cross_entropy, [BoostedHead(draw(), classifier="backbone")])


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("gradient-boosted-nn")
    assert entry.has_claim and entry.method == "coloss.classification.BoostedHead"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_on_the_training_part() -> None:
    setting = Setting.of(find_task("iris"), seed=0, smoke=True)
    method = BoostedHead.for_setting(setting, stages=3)
    assert isinstance(method.data, IndexedDataset) and method.data is setting.splits.train
    assert method.options.stages == 3


def test_the_claim_runs() -> None:
    found = verify("gradient-boosted-nn", smoke=True, seeds=1)
    assert set(found["arms"]) == {"Adam", "boosted"}
    assert found["arms"][CLAIM.method]["metrics"].keys() >= {"accuracy_over_sizes", "accuracy_8_eighths"}
