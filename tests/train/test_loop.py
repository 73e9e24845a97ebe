import math
from functools import partial

import pytest
import torch
from example_methods import ExtraHead, Shrink
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchjd.aggregation import Mean

from coloss.data import IndexedDataset, Loader
from coloss.errors import InputError
from coloss.train import (
    Budget,
    ConflictMonitor,
    JacobianDescent,
    Method,
    NonFiniteLossError,
    Target,
    cosine,
    fit,
)

FAST = partial(torch.optim.Adam, lr=0.02)


def accuracy(data):
    return lambda model: {"accuracy": (model(data[0]).argmax(1) == data[1]).float().mean()}


def test_it_learns(data, new_model):
    before = accuracy(data)(new_model().eval())["accuracy"]
    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(epochs=40),
        evaluate=accuracy(data),
        batch_size=32,
        optimizer=FAST,
    )
    assert run.metrics["accuracy"] > max(before, 0.85)
    assert run.history[-1].terms["cross_entropy"] < run.history[0].terms["cross_entropy"]


def test_two_methods_compose(data, new_model):
    run = fit(
        new_model(), data, F.cross_entropy, [ExtraHead(), Shrink()], budget=Budget(epochs=2), batch_size=50
    )
    assert sorted(run.history[-1].terms) == ["cross_entropy", "extra"]
    assert run.methods[0].seen == 2 * 130
    assert run.methods[0].epochs == [3, 6]


def test_same_seed_same_weights_other_seed_others(data, new_model):
    first, again, other = (
        fit(new_model(), data, F.cross_entropy, budget=Budget(steps=5), seed=seed).model[0].weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_randomness_is_left_alone(data, new_model):
    method = ExtraHead()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(new_model(), data, F.cross_entropy, [method], budget=Budget(steps=3), evaluate=accuracy(data))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_does_not_disturb_training(data, new_model):
    def nosy(model):
        assert not model.training
        torch.rand(7)
        return accuracy(data)(model)

    watched = fit(new_model(), data, F.cross_entropy, budget=Budget(steps=9), evaluate=nosy, evaluate_every=2)
    alone = fit(new_model(), data, F.cross_entropy, budget=Budget(steps=9))
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), alone.model.parameters()))
    assert [point.step for point in watched.history if point.metrics] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    "budget", [Budget(steps=8), Budget(epochs=4), Budget(epochs=2.5), Budget(seconds=0.02)]
)
@pytest.mark.parametrize("every", [1, 2, None])
@pytest.mark.parametrize("known", [True, False])
def test_the_last_step_is_evaluated_once_as_it_ships(data, new_model, budget, every, known):
    """Also where the target is met by the shipped model alone, and where the data do not tell their length."""

    class Sign(Method):
        shipped = False

        def finish(self, state):
            self.shipped = True

    class Batches:
        def __iter__(self):
            return iter([(data[0][:65], data[1][:65]), (data[0][65:], data[1][65:])])

    sign, calls = Sign(), []
    run = fit(
        new_model(),
        data if known else Batches(),
        F.cross_entropy,
        [sign],
        budget=budget,
        batch_size=65,
        evaluate=lambda model: calls.append(1) or {"shipped": float(sign.shipped)},
        evaluate_every=every,
        target=Target("shipped", 1.0),
        log_every=1,
    )
    points = [point for point in run.history if point.metrics]
    assert len(points) == len({point.step for point in points})
    # Time may run out between an evaluation and the next step: the shipped model's then takes the place of that one.
    assert len(points) == len(calls) or (budget.seconds is not None and len(points) == len(calls) - 1)
    assert [point.metrics["shipped"] for point in points] == [0.0] * (len(points) - 1) + [1.0]
    assert points[-1].step == run.steps
    assert run.history[-1].terms
    assert run.metrics == {"shipped": 1.0}
    assert run.time_to_target == run.seconds


def test_every_part_keeps_its_own_mode(data, new_model):
    """What a method froze in eval mode stays so through the start of training and every evaluation."""
    modes = []

    class Freeze(Method):
        def setup(self, state):
            state.model[0].eval()

        def on_batch(self, state):
            modes.append((state.model.training, state.model[0].training, state.model[2].training))

    def evaluate(model):
        assert not any(part.training for part in model.modules())
        return accuracy(data)(model)

    model = new_model().eval()
    run = fit(
        model, data, F.cross_entropy, [Freeze()], budget=Budget(steps=4), evaluate=evaluate, evaluate_every=1
    )
    assert modes == [(True, False, True)] * 4
    assert not any(part.training for part in run.model.modules())


@pytest.mark.parametrize(
    ("budget", "steps"), [(Budget(steps=7), 7), (Budget(epochs=2), 6), (Budget(epochs=0.5), 2)]
)
def test_budgets_in_steps_and_epochs(data, new_model, budget, steps):
    run = fit(new_model(), data, F.cross_entropy, budget=budget, batch_size=50)
    assert run.steps == steps


def test_budget_in_seconds_excludes_evaluation(data, new_model):
    def slow(model):
        import time

        time.sleep(0.4)
        return accuracy(data)(model)

    run = fit(
        new_model(), data, F.cross_entropy, budget=Budget(seconds=0.3), evaluate=slow, evaluate_every=100000
    )
    assert 0.3 <= run.seconds < 0.4
    assert run.steps_per_second == pytest.approx(run.steps / run.seconds)


def test_target_time_is_of_the_first_crossing(data, new_model):
    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(epochs=30),
        evaluate=accuracy(data),
        target=Target("accuracy", 0.8),
        optimizer=FAST,
    )
    first = next(point for point in run.history if point.metrics.get("accuracy", 0) >= 0.8)
    assert run.time_to_target == pytest.approx(first.seconds, abs=1e-3)
    never = fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(epochs=1),
        evaluate=accuracy(data),
        target=Target("accuracy", 1.1),
    )
    assert never.time_to_target is None


def test_shipped_model_is_what_is_evaluated(data, new_model):
    class Zero(Method):
        def terms(self, state):
            return {}

        def finish(self, state):
            with torch.no_grad():
                state.model[3].bias.copy_(torch.tensor([-100.0, 100.0]))

    run = fit(new_model(), data, F.cross_entropy, [Zero()], budget=Budget(epochs=1), evaluate=accuracy(data))
    assert run.metrics["accuracy"] == pytest.approx(data[1].float().mean().item())


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader", "torch dataset", "torch loader", "list"])
def test_every_kind_of_data_feeds_the_same_samples(data, new_model, kind):
    seen = []

    class Keep(Method):
        def on_batch(self, state):
            seen.append(state.batch.inputs)

    source = {
        "tensors": lambda: data,
        "dataset": lambda: IndexedDataset(*data),
        "loader": lambda: Loader(IndexedDataset(*data), 32),
        "torch dataset": lambda: TensorDataset(*data),
        "torch loader": lambda: DataLoader(TensorDataset(*data), batch_size=32, shuffle=True),
        "list": lambda: list(DataLoader(TensorDataset(*data), batch_size=32)),
    }[kind]()
    fit(new_model(), source, F.cross_entropy, [Keep()], budget=Budget(epochs=1), batch_size=32)
    rows = torch.cat(seen)
    assert torch.equal(rows[rows[:, 0].argsort()], data[0][data[0][:, 0].argsort()])


def test_methods_see_stable_ids(data, new_model):
    pairs = {}

    class Keep(Method):
        def on_batch(self, state):
            for index, row in zip(state.batch.ids.tolist(), state.batch.inputs):
                assert torch.equal(pairs.setdefault(index, row), row)

    fit(new_model(), data, F.cross_entropy, [Keep()], budget=Budget(epochs=3))
    assert len(pairs) == 130


def test_learning_rate_schedule_and_clipping(data, new_model):
    rates = []

    class Keep(Method):
        def on_gradients(self, state):
            rates.append(state.optimizer.param_groups[0]["lr"])

    fit(new_model(), data, F.cross_entropy, [Keep()], budget=Budget(steps=4), learning_rate_schedule=cosine(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2))  # fmt: skip
    assert rates == pytest.approx([0.2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    still = fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(steps=4),
        clip_norm=1e-9,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
    )
    assert all(
        torch.allclose(a, b, atol=1e-8) for a, b in zip(still.model.parameters(), new_model().parameters())
    )


def test_groups_know_the_rate_that_the_schedule_starts_from(data, new_model):
    """Under the name that torch's schedulers give it; the optimizer's default is that of no group here."""
    rates = []

    class Keep(Method):
        def on_gradients(self, state):
            rates.append([(group["initial_lr"], group["lr"]) for group in state.optimizer.param_groups])

    fit(new_model(), data, F.cross_entropy, [Keep()], budget=Budget(steps=2), learning_rate_schedule=lambda p: 1 - p,
        optimizer=lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.2}, {"params": p[1:], "lr": 0.1}]))  # fmt: skip
    assert rates == [[(0.2, 0.2), (0.1, 0.1)], [(0.2, 0.1), (0.1, 0.05)]]


def test_progress_is_reported(data, new_model):
    shares = []
    fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(seconds=0.4),
        progress=lambda share, terms: shares.append((share, *terms)),
    )
    assert shares == sorted(shares)
    assert shares[-1][1] == "cross_entropy"


def test_loggers_get_terms_and_metrics(data, new_model):
    class Memory:
        def __init__(self):
            self.points = []

        def log_metrics(self, metrics, step):
            self.points.append((step, sorted(metrics)))

    memory = Memory()
    fit(
        new_model(),
        data,
        F.cross_entropy,
        budget=Budget(steps=4),
        log_every=2,
        loggers=[memory],
        evaluate=accuracy(data),
    )
    assert memory.points[0] == (2, ["cross_entropy"])
    assert memory.points[-1] == (4, ["accuracy"])


def test_bfloat16_runs_close_to_float32(data, new_model):
    plain = fit(new_model(), data, F.cross_entropy, [ExtraHead()], budget=Budget(steps=6))
    mixed = fit(new_model(), data, F.cross_entropy, [ExtraHead()], budget=Budget(steps=6),
                fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))  # fmt: skip
    assert mixed.model[0].weight.dtype == torch.float32
    assert torch.allclose(plain.model[0].weight, mixed.model[0].weight, atol=0.02)


def test_nan_stops_with_term_step_and_checkpoint(data, new_model, tmp_path):
    def breaks(outputs, targets):
        broken = torch.zeros((), requires_grad=True) / (0.0 if breaks.calls == 5 else 1.0)
        breaks.calls += 1
        return {"fine": F.cross_entropy(outputs, targets), "broken": broken}

    breaks.calls = 0
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss term 'broken' is nan at step 5; last good checkpoint: .*step-00000004",
    ):
        fit(new_model(), data, breaks, budget=Budget(steps=9), checkpoint_dir=tmp_path, checkpoint_every=2)
    breaks.calls = 5
    with pytest.raises(NonFiniteLossError, match="at step 0; no checkpoint was kept"):
        fit(new_model(), data, breaks, budget=Budget(steps=9))


def test_weights_that_broke_are_not_checkpointed(data, new_model, tmp_path):
    class Break(Method):
        def on_step(self, state):
            if state.step == 3:
                with torch.no_grad():
                    state.model[0].weight[0, 0] = math.inf

    with pytest.raises(NonFiniteLossError, match="weight model.0.weight is not finite at step 3"):
        fit(
            new_model(),
            data,
            F.cross_entropy,
            [Break()],
            budget=Budget(steps=3),
            checkpoint_dir=tmp_path,
            checkpoint_every=3,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"log_every": 0}, "log_every must be >= 1"),
        ({"evaluate_every": 0}, "evaluate_every must be >= 1"),
        ({"resume": True}, "resume=True needs checkpoint_dir"),
        ({"data": 3}, "data must be .* got int"),
        ({"data": []}, "at least one batch, got none"),
    ],
)
def test_bad_input(data, new_model, options, message):
    with pytest.raises(InputError, match=message):
        fit(new_model(), options.pop("data", data), F.cross_entropy, budget=Budget(steps=1), **options)


def test_frozen_model_without_method_parameters(data):
    model = nn.Linear(6, 2).requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        fit(model, data, F.cross_entropy, budget=Budget(steps=1))


def test_mixed_precision_with_monitor_and_aggregator(data, new_model):
    """Fabric guards the outputs of its wrapper; looking at gradients must work all the same."""
    monitor = ConflictMonitor(every=1)
    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        [ExtraHead()],
        combine=JacobianDescent(Mean()),
        monitor=monitor,
        budget=Budget(steps=3),
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
    )
    assert [conflict.step for conflict in run.conflicts] == [0, 1, 2]
    assert not torch.equal(run.model[0].weight, new_model()[0].weight)


def test_the_last_graph_is_gone_before_the_next_grows(data, new_model):
    held = []

    class Look(Method):
        def on_batch(self, state):
            held.append((state.outputs, dict(state.terms)))

    fit(new_model(), data, F.cross_entropy, [Look(), ExtraHead()], budget=Budget(steps=3))
    assert held == [(None, {})] * 3


def test_sharded_strategies_are_refused_where_they_would_be_wrong(data, new_model, tmp_path):
    class Takes(Method):
        def backward(self, state, terms):
            state.set_gradients(state.gradients(sum(terms.values())))

    def sharded():
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric._strategy = ModelParallelStrategy(lambda module, mesh: module)
        fabric._strategy._parallel_devices = [torch.device("cpu")]
        return fabric

    with pytest.raises(
        InputError, match="checkpoint_dir works on one device and with ddp, not with ModelParallelStrategy"
    ):
        fit(
            new_model(),
            data,
            F.cross_entropy,
            budget=Budget(steps=1),
            fabric=sharded(),
            checkpoint_dir=tmp_path,
        )
    with pytest.raises(InputError, match="Takes needs whole gradients, which ModelParallelStrategy shards"):
        fit(new_model(), data, F.cross_entropy, [Takes()], budget=Budget(steps=1), fabric=sharded())
