import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import GaussianNBHead, GenerativeHead, GenerativeLinearClassifier, fit_linear_head
from coloss.classification.generative_linear import CLAIM, RIVALS, SYSTEM
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.lab import find_entry, find_task, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def draw(samples: int = 90) -> tuple[Tensor, Tensor]:
    target = torch.arange(samples) % 3
    return torch.randn(samples, 6) + 2 * torch.eye(6)[target], target


def new_model() -> Classifier:
    return Classifier(MLP(6, [8]), 3)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.usefixtures("as_users_call")
@parametrize_with_checks([GenerativeLinearClassifier()])
def test_it_is_a_scikit_learn_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


def test_streaming_is_fitting() -> None:
    features, target = draw()
    labels = np.array(["ant", "bee", "cow"])[target]
    whole = GenerativeLinearClassifier(smoothing=0.2).fit(features.numpy(), labels)
    streamed = clone(whole)
    for rows in (slice(0, 7), slice(7, 50), slice(50, None)):
        streamed.partial_fit(features[rows].numpy(), labels[rows], classes=labels)
    loaded = clone(whole).fit_loader(DataLoader(list(zip(features, target)), 13), ["ant", "bee", "cow"])
    for other in (streamed, loaded):
        np.testing.assert_allclose(other.coef_, whole.coef_, atol=1e-6)
        np.testing.assert_allclose(
            other.predict_proba(features.numpy()), whole.predict_proba(features.numpy()), atol=1e-6
        )
        assert other.predict(features.numpy()).tolist() == whole.predict(features.numpy()).tolist()
    assert loaded.n_features_in_ == 6


def test_two_classes_are_the_difference() -> None:
    features, target = draw()
    estimator = GenerativeLinearClassifier().fit(features.numpy(), (target > 0).numpy())
    assert estimator.coef_.shape == (1, 6)
    logits = estimator.to_linear()(features)
    np.testing.assert_allclose(
        estimator.decision_function(features.numpy()), (logits[:, 1] - logits[:, 0]).detach(), atol=1e-4
    )
    np.testing.assert_allclose(
        estimator.predict_proba(features.numpy()), logits.softmax(1).detach(), atol=1e-5
    )


def test_bad_streams_are_refused() -> None:
    rows, labels = draw()[0].numpy(), draw()[1].numpy()
    with pytest.raises(ValueError, match="classes must be given at the first call"):
        GenerativeLinearClassifier().partial_fit(rows, labels)
    begun = GenerativeLinearClassifier().partial_fit(rows, labels, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must stay"):
        begun.partial_fit(rows, labels, classes=[0, 1])
    with pytest.raises(ValueError, match="labels must be among .*, got 7"):
        begun.partial_fit(rows, labels * 0 + 7)
    with pytest.raises(ValueError, match="classes must be sorted and distinct"):
        GenerativeLinearClassifier().fit_loader([(torch.ones(1, 2), torch.tensor([0]))], [2, 1])
    with pytest.raises(ValueError, match="smoothing must be >= 0"):
        GenerativeLinearClassifier(smoothing=-1.0).fit(rows, labels)


@pytest.mark.parametrize("rule", ["naive_bayes", "lda", "logistic", "ridge", "prototype"])
def test_the_head_starts_from_the_features_of_the_network(rule: Any) -> None:
    data, model = draw(), new_model()
    with torch.no_grad():
        features = model.eval().backbone(data[0])
    expected = fit_linear_head(features, data[1], rule, scale="none" if rule == "naive_bayes" else "minmax")
    method = GenerativeHead(data, rule=rule)
    TrainingStep(model.train(), F.cross_entropy, [method])
    ours, theirs = model.head(features), expected(features)
    torch.testing.assert_close(ours.softmax(1), theirs.softmax(1), rtol=0, atol=1e-3)
    assert model.training and model.head.weight.requires_grad


def test_at_the_end_the_trained_head_is_replaced() -> None:
    data, model = draw(), new_model()
    run = coloss.fit(
        model,
        data,
        F.cross_entropy,
        [GenerativeHead(data, when="finish")],
        budget=Budget(epochs=3),
        optimizer=SGD,
    )
    assert run.model is model and not any(module._forward_hooks for module in model.modules())
    head = GaussianNBHead(8, 3, prior_smoothing=1e-3)
    with torch.no_grad():
        head.update(model.eval().backbone(data[0]), data[1])
    torch.testing.assert_close(model.head.weight, head.to_linear().weight, rtol=1e-4, atol=1e-4)


def test_a_class_without_samples_can_be_trained_back() -> None:
    inputs, target = draw()
    for rule in ("naive_bayes", "ridge"):
        model = Classifier(MLP(6, [8]), 4)
        TrainingStep(model, F.cross_entropy, [GenerativeHead((inputs, target), rule=rule)])
        assert all(value.isfinite().all() for value in model.state_dict().values())
        logits = model.eval()(inputs)
        assert (logits[:, 3] < logits.amax(1)).all()


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


@pytest.mark.parametrize("when", ["start", "finish"])
def test_it_composes_and_a_killed_run_resumes_bit_identically(tmp_path: Path, when: Any) -> None:
    data, start = draw(), new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        trained = copy.deepcopy(start)
        found = coloss.fit(
            trained,
            data,
            F.cross_entropy,
            [GenerativeHead(data, when=when), Kill(kill_at)],
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
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer

    data, start = draw(), new_model()
    batches = [(part, labels) for part, labels in zip(data[0].split(30), data[1].split(30))]
    fitted, looped, lit = (copy.deepcopy(start) for _ in range(3))
    methods = [GenerativeHead(data) for _ in range(3)]
    coloss.fit(fitted, batches, F.cross_entropy, [methods[0]], budget=Budget(steps=3), optimizer=SGD)
    step = TrainingStep(looped, F.cross_entropy, [methods[1]], total_steps=3)
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
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[coloss.MethodCallback([methods[2]])], **off)
    trainer.fit(Module(), DataLoader(batches, batch_size=None))
    for other in (looped, lit):
        assert all(torch.equal(value, weights(other)[name]) for name, value in weights(fitted).items())


@pytest.mark.usefixtures("as_users_call")
def test_bad_options_are_refused() -> None:
    data = draw()
    for options, message in (
        ({"when": "middle"}, 'when must be "start" or "finish", got \'middle\''),
        ({"rule": "svm"}, "rule must be .*, got 'svm'"),
        ({"smoothing": -1.0}, "smoothing must be >= 0 and finite, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            GenerativeHead(data, **options)
    with pytest.raises(InputError, match="classifier must name an nn.Linear with biases, got 'backbone'"):
        TrainingStep(new_model(), F.cross_entropy, [GenerativeHead(data, classifier="backbone")])


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("generative-linear-eval")
    assert entry.has_claim and entry.method == "coloss.classification.GenerativeHead"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_on_the_training_part() -> None:
    setting = Setting.of(find_task("iris"), seed=0, smoke=True)
    method = GenerativeHead.for_setting(setting, when="finish", rule="lda")
    assert isinstance(method.data, IndexedDataset) and method.data is setting.splits.train
    assert (method.when, method.rule) == ("finish", "lda")


def test_the_claim_runs() -> None:
    found = verify("generative-linear-eval", smoke=True, seeds=1)
    assert set(found["arms"]) == set(RIVALS)
    assert found["arms"][CLAIM.method]["metrics"].keys() >= {"error_50", "error_all"}
