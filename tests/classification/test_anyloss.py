"""The metric as a loss: beside scikit-learn, in place of torch's losses, in every kind of training run; and its claim."""

import inspect
import math
from functools import partial

import pytest
import torch
from contract import check_two_processes
from lightning_fabric import Fabric
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn
from torch.nn import functional as F

import coloss
from coloss.classification import (
    MetricLoss,
    MetricObjective,
    amplification_schedule,
    confusion_metrics,
    metric_loss,
    soft_confusion,
)
from coloss.classification.rare_positives import LinearClassifier, cross_entropy, rare_positives
from coloss.errors import InputError
from coloss.lab import verify
from coloss.nn import MLP, Classifier
from coloss.train import Budget, Method, TrainingStep


def rare(count=120):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 5, generator=generator)
    noise = torch.randn(count, generator=generator)
    return inputs, (inputs[:, 0] + 0.5 * noise > 1.3).long()


def new_model(outputs=2):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(5, outputs)


def train(*methods, objective=None, data=None, **options):
    options = {"budget": Budget(steps=9), "batch_size": 40, "log_every": 1} | options
    return coloss.fit(new_model(), data or rare(), objective, methods, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def balanced(model, data):
    return balanced_accuracy_score(data[1], model(data[0]).argmax(1))


def test_every_form_of_a_binary_problem_costs_the_same():
    logits, y = torch.randn(30, dtype=torch.float64), (torch.rand(30) < 0.3).long()
    expected = metric_loss(logits, y, "f2", amplification=7.0)
    two_columns = torch.stack([torch.zeros(30), logits], 1) + torch.randn(30, 1)
    for found in (
        metric_loss(logits.unsqueeze(1), y, "f2", amplification=7.0),
        metric_loss(logits.unsqueeze(1), y.unsqueeze(1), "f2", amplification=7.0),
        metric_loss(logits, y.double(), "f2", amplification=7.0),
        metric_loss(two_columns, y, "f2", amplification=7.0),
        metric_loss(two_columns.flip(1), 1 - y, "f2", amplification=7.0, positive=0),
        metric_loss(torch.sigmoid(logits), y, "f2", amplification=7.0, from_logits=False),
        1 - confusion_metrics.f_beta(soft_confusion(logits, y, amplification=7.0, from_logits=True), 2.0),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("classes", [2, 5])
def test_saturated_decisions_among_classes_cost_what_scikit_learn_says(classes):
    y = torch.randint(classes, (80,))
    predicted = torch.where(torch.rand(80) < 0.3, torch.randint(classes, (80,)), y)
    logits = 30.0 * F.one_hot(predicted, classes)
    macro = metric_loss(logits, y, "f1", average="macro")
    assert 1 - macro.item() == pytest.approx(f1_score(y, predicted, average="macro"), abs=1e-6)
    micro = metric_loss(logits, y, "f1", average="micro")
    assert 1 - micro.item() == pytest.approx(f1_score(y, predicted, average="micro"), abs=1e-6)
    recall = metric_loss(logits, y, "recall", average="macro")
    assert 1 - recall.item() == pytest.approx(balanced_accuracy_score(y, predicted), abs=1e-6)
    labels = torch.rand(80, classes) < 0.4
    marked = torch.rand(80, classes) < 0.5
    several = metric_loss(80.0 * marked - 40, labels, "f1")
    assert 1 - several.item() == pytest.approx(f1_score(labels, marked, average="macro"), abs=1e-6)


def test_classes_that_do_not_occur_are_left_out_of_the_average():
    logits, y = torch.randn(10, 6), torch.arange(10) % 3
    scores = 1 - confusion_metrics.jaccard(soft_confusion(logits, y, amplification=9.0, from_logits=True))
    found = metric_loss(logits, y, "jaccard", amplification=9.0)
    torch.testing.assert_close(found, scores[:3].mean())
    weight = torch.tensor([3.0, 1.0, 0.0, 5.0, 1.0, 1.0])
    found = metric_loss(logits, y, "jaccard", amplification=9.0, weight=weight)
    torch.testing.assert_close(found, (3 * scores[0] + scores[1]) / 4)


def test_the_size_of_the_batch_is_the_batchs_own():
    # The authors' Keras code puts the size of the training set here.
    logits, y = torch.randn(16, dtype=torch.float64), torch.tensor([1] * 4 + [0] * 12)
    twice = metric_loss(logits.repeat(2), y.repeat(2), "accuracy")
    torch.testing.assert_close(metric_loss(logits, y, "accuracy"), twice)


@pytest.mark.parametrize("shape", [(12,), (12, 4), (3, 4, 5, 2)])
def test_ignored_samples_take_no_part(shape):
    logits = torch.randn(shape)
    y = torch.randint(2 if len(shape) == 1 else 4, (shape[0], *shape[2:]))
    ignored = torch.rand(y.shape) < 0.3
    rows = logits if logits.ndim == 1 else logits.movedim(1, -1)
    expected = metric_loss(rows[~ignored], y[~ignored], "f1", amplification=5.0)
    spoilt = rows.masked_fill(ignored if logits.ndim == 1 else ignored.unsqueeze(-1), math.nan)
    spoilt = (spoilt if logits.ndim == 1 else spoilt.movedim(-1, 1)).requires_grad_()
    found = metric_loss(spoilt, y.masked_fill(ignored, -100), "f1", amplification=5.0)
    found.backward()
    torch.testing.assert_close(found, expected)
    assert spoilt.grad.isfinite().all()
    torch.testing.assert_close(
        metric_loss(spoilt.detach(), y.masked_fill(ignored, 7), "f1", amplification=5.0, ignore_index=7),
        expected,
    )


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.ones(2, 3), torch.tensor([-100, -100])),
    ],
)
@pytest.mark.parametrize("average", [None, "micro"])
def test_nothing_to_judge_costs_nothing(logits, target, average):
    logits = logits.requires_grad_()
    loss = metric_loss(logits, target, average=average)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_a_batch_without_positives():
    logits = torch.randn(8, requires_grad=True)
    y = torch.zeros(8, dtype=torch.int64)
    loss = metric_loss(logits, y, "f1")
    loss.backward()
    assert loss == 1 and not logits.grad.any()
    logits.grad = None
    metric_loss(logits, y, "balanced_accuracy", amplification=5.0).backward()
    alone = torch.autograd.grad(
        -confusion_metrics.specificity(soft_confusion(logits, y, amplification=5.0, from_logits=True)) / 2,
        logits,
    )
    torch.testing.assert_close(logits.grad, alone[0])


def test_sums_are_means_times_samples():
    logits, y = torch.randn(12, 3), torch.randint(3, (12,))
    for average in ("macro", "micro", "binary"):
        mean, total = (metric_loss(logits, y, reduction=r, average=average) for r in ("mean", "sum"))
        torch.testing.assert_close(total, 12 * mean)


def test_any_formula_of_counts_is_a_loss():
    logits, y = torch.randn(20, 3, dtype=torch.float64, requires_grad=True), torch.randint(3, (20,))

    def profit(counts):
        tp, fp, fn, _ = counts
        return (3 * tp - fp) / (3 * tp + 3 * fn)

    counts = soft_confusion(logits, y, amplification=10.0, from_logits=True)
    by_hand = 1 - ((3 * counts.true_positive - counts.false_positive) / (3 * counts.positives)).mean()
    torch.testing.assert_close(metric_loss(logits, y, profit, amplification=10.0), by_hand)
    assert torch.autograd.gradcheck(lambda x: metric_loss(x, y, profit, amplification=10.0), logits)


def test_the_module_is_the_function_and_belongs_to_a_batch():
    logits, y = torch.randn(12, 3), torch.randint(3, (12,))
    module = MetricLoss("jaccard", weight=torch.tensor([1.0, 2.0, 3.0]), average="macro", reduction="sum")
    module.amplification = 12.0
    expected = metric_loss(
        logits, y, "jaccard", weight=module.weight, amplification=12.0, average="macro", reduction="sum"
    )
    torch.testing.assert_close(module(logits, y), expected)
    assert module.batch_statistic and metric_loss.batch_statistic and MetricObjective.batch_statistic
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(MetricLoss("f0.5")) == "MetricLoss(f0_5, amplification=73.0)"


def test_an_objective_of_fit():
    run = train(objective=MetricLoss("balanced_accuracy", amplification=10.0))
    assert set(run.history[0].terms) == {"metric"}
    by_hand = train(MetricObjective(metric="balanced_accuracy", amplification=10.0, start_amplification=None))
    assert torch.equal(weights(run.model), weights(by_hand.model))


def test_accumulated_gradients_are_those_of_the_joined_batch():
    options = {"budget": Budget(steps=6), "optimizer": partial(torch.optim.SGD, lr=0.5)}
    whole = train(MetricObjective(amplification=10.0), batch_size=40, **options)
    parts = train(MetricObjective(amplification=10.0), batch_size=10, accumulate=4, **options)
    torch.testing.assert_close(weights(parts.model), weights(whole.model))


def test_training_on_balanced_accuracy_finds_the_rare_class():
    options = {"budget": Budget(steps=100), "batch_size": 120, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    plain = train(objective=F.cross_entropy, **options)
    run = train(MetricObjective(metric="balanced_accuracy"), **options)
    assert balanced(run.model, rare()) > balanced(plain.model, rare()) + 0.05
    assert run.history[-1].terms["balanced_accuracy_loss"] == pytest.approx(
        1 - balanced(run.model, rare()), abs=0.03
    )


def test_diagnostics_reach_the_history():
    run = train(MetricObjective(), budget=Budget(steps=4), batch_size=30)
    seen = [point.metrics for point in run.history]
    assert [point["amplification"] for point in seen] == pytest.approx(
        [5 * (73 / 5) ** share for share in (0, 0.25, 0.5, 0.75)]
    )
    assert all(0 < point["predicted_positive"] < 1 for point in seen)


class Norms(Method):
    """A second term, and an edit of gradients."""

    def terms(self, state):
        return {"size": state.outputs.mean().square()}

    def on_gradients(self, state):
        for parameter in state.trainable:
            parameter.grad *= 0.5


def test_beside_an_objective_and_another_method_every_term_counts():
    run = train(Norms(), MetricObjective(replace_objective=False, weight=0.5), objective=F.cross_entropy)
    assert set(run.history[0].terms) == {"cross_entropy", "size", "f1_loss"}
    lighter = train(Norms(), MetricObjective(replace_objective=False, weight=0.0), objective=F.cross_entropy)
    without = train(Norms(), objective=F.cross_entropy)
    assert torch.equal(weights(lighter.model), weights(without.model))
    assert not torch.equal(weights(run.model), weights(without.model))


def test_the_plain_loop_takes_the_same_steps():
    run = train(MetricObjective(metric="f2"), budget=Budget(epochs=2))
    model = new_model()
    step = TrainingStep(model, None, [MetricObjective(metric="f2")], total_steps=6)
    optimizer = torch.optim.AdamW(step.trainable, lr=1e-3)
    loader = coloss.data.Loader(coloss.data.IndexedDataset(*rare()), batch_size=40)
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
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, method = Module(), MetricObjective(start_amplification=None, replace_objective=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rare()), batch_size=40)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[coloss.MethodCallback([method])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    trainer.fit(module, loader)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in loader:
        optimizer.zero_grad()
        logits = model(inputs)
        (F.cross_entropy(logits, targets) + metric_loss(logits, targets)).backward()
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
        return train(MetricObjective(metric="g_mean"), StopAt(stop), **options)

    whole = go(-1)
    with pytest.raises(Stop):
        go(6, checkpoint_dir=tmp_path, checkpoint_every=2)
    on = go(-1, checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    assert torch.equal(weights(on.model), weights(whole.model))
    assert [point.terms for point in on.history] == [point.terms for point in whole.history]


def test_mixed_precision_trains_with_a_loss_in_float32():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    found, expected = (
        train(MetricObjective(), budget=Budget(steps=3), **options).history[0].terms["f1_loss"]
        for options in ({"fabric": fabric}, {})
    )
    assert found == pytest.approx(expected, rel=0.02) and found != expected


@pytest.mark.parametrize(("metric", "classes"), [("g_mean", 2), ("f1", 4)])
def test_two_processes_reach_the_weights_of_one_with_the_joined_batch(metric, classes, tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    targets = (torch.randint(12, (60,), generator=generator) == 0).long()
    targets = targets + 2 * (classes > 2) * (inputs[:, 0] > 1)

    def train(fabric):
        torch.manual_seed(1)
        run = coloss.fit(
            Classifier(MLP(5, (8,), norm=None), classes).double(),
            (inputs, targets),
            None,
            [MetricObjective(metric=metric, amplification=10.0)],
            budget=Budget(epochs=2),
            batch_size=12,
            optimizer=partial(torch.optim.SGD, lr=0.5),
            log_every=1,
            fabric=fabric,
        )
        losses = torch.tensor([point.terms[f"{metric}_loss"] for point in run.history])
        assert losses.unique().numel() > 5
        # Logged losses have single precision.
        return {**run.model.state_dict(), "losses": (losses.double() * 1e5).round() / 1e5}

    check_two_processes(train, tmp_path)


def test_the_schedule():
    schedule = amplification_schedule(2.0, 32.0, share=0.5)
    assert [schedule(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([2, 8, 32, 32])
    assert amplification_schedule(9.0, 9.0)(0.3) == 9
    for options, message in (
        ({"start": 0.0}, "start must be > 0 and finite, got 0.0"),
        ({"end": math.inf}, "end must be > 0 and finite, got inf"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            amplification_schedule(**options)


def test_a_schedule_of_ones_own_is_taken_as_it_is():
    run = train(MetricObjective(amplification=lambda progress: 3.0 + progress), budget=Budget(steps=2))
    assert [point.metrics["amplification"] for point in run.history] == [3.0, 3.5]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(4), torch.ones(4)), {"reduction": "none"}, "a metric belongs to the batch, not to one sample"),
        ((torch.zeros(4), torch.ones(4)), {"reduction": "max"}, 'reduction must be "mean" or "sum"'),
        ((torch.zeros(4), torch.ones(4)), {"average": "weighted"}, 'average must be "binary", "macro" or "micro"'),
        ((torch.zeros(4), torch.ones(4)), {"amplification": -1.0}, "amplification must be > 0 and finite, got -1.0"),
        ((torch.zeros(4), torch.ones(4)), {"metric": "f3x"}, "no metric named 'f3x'"),
        ((torch.zeros(4), torch.ones(4)), {"weight": torch.ones(1)}, "weight is of the classes in a macro average"),
        ((torch.zeros(4, 2), torch.zeros(4).long()), {"positive": 2}, r"positive must be a class in \[0, 1\], got 2"),
        ((torch.zeros(4, 3), torch.zeros(4).long()), {"weight": torch.ones(2)}, "one entry for each of 3 classes"),
        ((torch.zeros(4, 3), torch.zeros(4, 3)), {"average": "binary"}, "got several labels"),
        ((torch.zeros(4, 3), torch.zeros(4).long()), {"metric": lambda counts: counts.positives.sum()}, "one score for each class"),
        ((torch.zeros(4, 3), torch.full((4,), 3)), {}, r"target must be in \[0, 2\], got values from 3 to 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(metric_loss)(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f1x"}, "no metric named 'f1x'"),
        ({"metric": "math:nothing"}, "module 'math' has no 'nothing'"),
        ({"amplification": 0.0}, "amplification must be > 0 and finite, got 0.0"),
        ({"start_amplification": -2.0}, "start_amplification must be > 0 and finite, got -2.0"),
        ({"average": "weighted"}, "average must be binary, macro or micro, got 'weighted'"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(MetricObjective.__init__)(MetricObjective.__new__(MetricObjective), **options)


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="needs logits and targets as tensors, got Tensor and NoneType"):
        TrainingStep(new_model(), None, [MetricObjective()])(torch.randn(4, 5))
    with pytest.raises(InputError, match=r"target must be in \[0, 1\], got values from 5 to 5"):
        TrainingStep(new_model(), None, [MetricObjective()])(torch.randn(4, 5), torch.full((4,), 5))


def test_terms_are_named_by_their_metric():
    def profit(counts):
        return counts.true_positive

    assert MetricObjective(metric="f0.5").term == "f0_5_loss"
    assert MetricObjective(metric=profit).term == "profit_loss"
    assert MetricObjective(metric=lambda counts: counts.true_positive).term == "metric_loss"
    assert MetricObjective(metric="coloss.classification.confusion_metrics:jaccard").term == "jaccard_loss"


@pytest.mark.parametrize(("task", "term"), [("digits", "f1_loss"), ("breast-cancer", "f1_loss")])
def test_an_arm_of_a_comparison(task, term, tmp_path):
    result = coloss.Comparison(
        task, ["anyloss:start_amplification=none:amplification=10"], seeds=1, budget=Budget(steps=2)
    ).run(tmp_path)
    (trial,) = result.trials
    assert term in trial.history[-1].terms and 0 <= trial.metrics["macro_f1"] <= 1


def test_the_linear_classifier_of_the_claim_is_logistic_regression():
    inputs, targets, test, test_targets = rare_positives("breast-cancer", seed=0)
    assert targets.mean() < 0.06 < 0.3 < test_targets.mean()
    classifier = LinearClassifier(cross_entropy, steps=2).fit(inputs, targets)
    weight, bias = torch.zeros(inputs.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets).float()
    for _ in range(2):
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
        with torch.no_grad():
            for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias))):
                parameter -= 0.2 * gradient
    torch.testing.assert_close(classifier.model_[0].weight[0], weight, rtol=1e-4, atol=1e-6)
    assert (
        classifier.predict(test).tolist() == (classifier.predict_proba(test)[:, 1] > 0.5).astype(int).tolist()
    )


def test_the_claim_runs():
    found = verify("anyloss", smoke=True, seeds=1)
    assert found["metric"] == "balanced_accuracy" and len(found["arms"]) == 6
    for arm in found["arms"].values():
        assert {"balanced_accuracy", "f1", "balanced_accuracy_digits"} <= set(arm["metrics"])
        assert all(0 <= value <= 1 for value in arm["metrics"]["balanced_accuracy"]["values"])
