"""What methods report with `state.log` goes where metrics go."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from coloss.errors import InputError
from coloss.train import Method, State, TrainingStep, fit
from coloss.train.budget import Budget


class Report(Method):
    """Logs the number of the step at every hook, under the hook's name."""

    def setup(self, state):
        state.log({"setup": -1})

    def on_batch(self, state):
        state.log({"batch": state.step, "each": 0.0})

    def terms(self, state):
        state.log({"terms": torch.tensor(state.step)})
        return {}

    def on_gradients(self, state):
        state.log({"each": torch.ones(1, 1)})

    def on_step(self, state):
        state.log({"step": state.step})

    def on_epoch(self, state):
        state.log({"epoch": state.epoch})

    def finish(self, state):
        state.log({"finish": 7})


class Memory:
    def __init__(self):
        self.points = []

    def log_metrics(self, metrics, step):
        self.points.append((step, dict(metrics)))


def go(new_model, data, *extra, **options):
    options = {"log_every": 2, "batch_size": 50, "budget": Budget(steps=5)} | options
    return fit(new_model(), data, F.cross_entropy, [Report(), *extra], **options)


def test_diagnostics_are_means_between_points(new_model, data):
    memory = Memory()
    run = go(new_model, data, loggers=[memory], evaluate=lambda model: {"one": 1.0}, evaluate_every=4)
    assert [(p.step, p.metrics) for p in run.history] == [
        (2, {"setup": -1.0, "batch": 0.5, "each": 0.5, "terms": 0.5, "step": 1.5}),
        (4, {"batch": 2.5, "each": 0.5, "terms": 2.5, "step": 3.5, "epoch": 1.0, "one": 1.0}),
        (5, {"batch": 4.0, "each": 0.5, "terms": 4.0, "step": 5.0, "finish": 7.0, "one": 1.0}),
    ]
    for point in run.history:
        found = {k: v for step, metrics in memory.points if step == point.step for k, v in metrics.items()}
        assert found == point.terms | point.metrics
    assert run.metrics == {"one": 1.0}


def test_without_evaluation_the_last_point_is_kept(new_model, data):
    run = go(new_model, data, budget=Budget(steps=4))
    assert [point.step for point in run.history] == [2, 4]
    assert run.history[-1].metrics["finish"] == 7.0
    assert run.history[-1].metrics["step"] == 3.5
    assert run.metrics == {}


def test_micro_batches_are_averaged(new_model, data):
    class Number(Method):
        def on_batch(self, state):
            state.log({"number": state.micro_batch})

    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        [Number()],
        budget=Budget(steps=1),
        batch_size=20,
        accumulate=4,
        log_every=1,
    )
    assert run.history[0].metrics == {"number": 1.5}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7])
def test_stop_and_go_on(new_model, data, tmp_path, stop, every):
    class Stop(Exception):
        pass

    class StopNow(Method):
        def on_step(self, state):
            if state.step == stop:
                raise Stop

    options = {"log_every": 4, "budget": Budget(steps=10), "evaluate": lambda model: {"one": 1.0}}
    whole = go(new_model, data, **options)
    with pytest.raises(Stop):
        go(new_model, data, StopNow(), checkpoint_dir=tmp_path, checkpoint_every=every, **options)
    on = go(new_model, data, checkpoint_dir=tmp_path, checkpoint_every=every, resume=True, **options)
    assert [(p.step, p.epoch, p.terms, p.metrics) for p in whole.history] == [
        (p.step, p.epoch, p.terms, p.metrics) for p in on.history
    ]


def test_names_of_others_are_refused(new_model, data):
    class Clash(Method):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_step(self, state):
            state.log({self.name: 1.0})

    with pytest.raises(
        InputError, match="'cross_entropy' given to state.log is the name of a loss term already"
    ):
        go(new_model, data, Clash("cross_entropy"))
    for every in (2, 3):
        with pytest.raises(
            InputError, match="'one' given to state.log is the name of an evaluation metric already"
        ):
            go(new_model, data, Clash("one"), evaluate=lambda model: {"one": 1.0}, evaluate_every=every)


def test_what_is_no_number_is_refused_and_nan_is_kept():
    state = State(nn.Identity())
    with pytest.raises(InputError, match=r"logged value 'rank' must be one number, got \(2,\)"):
        state.log({"rank": torch.zeros(2)})
    state.log({"rank": math.nan, "infinite": math.inf})
    assert math.isnan(state.logged["rank"][0])
    assert state.take_logged()["infinite"] == math.inf


def test_a_logged_tensor_is_read_at_once():
    state, tensor = State(nn.Identity()), torch.ones(())
    state.log({"moving": tensor})
    tensor += 5
    assert state.take_logged() == {"moving": 1.0}


def test_a_plain_loop_takes_them(new_model, data):
    step = TrainingStep(new_model(), F.cross_entropy, [Report()])
    for _ in range(2):
        step.backward(step(*data))
        step.after_step()
    assert step.state.take_logged() == {"setup": -1.0, "batch": 0.5, "each": 0.5, "terms": 0.5, "step": 1.5}


def test_a_lightning_trainer_logs_them(new_model, data, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from coloss.train import MethodCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[MethodCallback([Report()])], logger=CSVLogger(tmp_path), enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(*data), batch_size=33))
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    found = {name: [row[name] for row in rows if row[name]] for name in rows[0]}
    assert [float(value) for value in found["step"] if value] and set(found) >= {
        "batch",
        "terms",
        "epoch",
        "finish",
        "setup",
    }
    assert [float(value) for value in found["batch"]] == [0.0, 1.0]
    assert [float(value) for value in found["finish"]] == [7.0]


class Taker(Method):
    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


class Statistic(Method):
    batch_statistic = True


@pytest.mark.parametrize("kind", [Taker, Statistic])
def test_a_lightning_trainer_that_accumulates_what_cannot_be_averaged_is_refused(new_model, data, kind):
    lightning = pytest.importorskip("lightning.pytorch")
    from coloss.train import MethodCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=1, callbacks=[MethodCallback([kind()])], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=1, accumulate_grad_batches=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{kind.__name__} (takes over|must see)"):
        trainer.fit(Module(), DataLoader(TensorDataset(*data), batch_size=33))
