"""One optimizer step from several micro-batches is the step of one large batch, or it is refused."""

from functools import partial

import pytest
import torch
from contract import run_processes
from example_methods import ExtraHead, Shrink
from lightning_fabric.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torchjd.aggregation import Mean, UPGrad

from coloss.data import Batch
from coloss.errors import InputError
from coloss.ops import gather_with_gradient
from coloss.train import (
    Budget,
    ConflictMonitor,
    JacobianDescent,
    Method,
    TrainingStep,
    UncertaintyWeighting,
    fit,
)
from coloss.train.checkpoint import checkpoints

SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)


class Spread(nn.Module):
    """Covariance of two outputs over the batch: no mean over samples."""

    batch_statistic = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs, targets):
        centred = self.scale * outputs - outputs.mean(0)
        return {
            "covariance": (centred.T @ centred / len(outputs)).square().sum().log1p(),
            "cross_entropy": F.cross_entropy(outputs, targets),
        }


class HiddenSpread(Method):
    """A batch statistic of a tapped feature, with a head of its own, that counts what its hooks see."""

    batch_statistic = True

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3).double()
        self.rows = []

    def setup(self, state):
        state.tap("hidden", "3:input")

    def terms(self, state):
        projected = self.head(state.features["hidden"])
        return {"hidden": (projected - projected.mean(0)).square().mean(0).log1p().sum()}

    def on_gradients(self, state):
        self.rows.append((len(state.batch), len(state.outputs), len(state.features["hidden"])))


@pytest.fixture
def exact(data, new_model):
    """120 samples in float64 and a model without dropout."""

    def build():
        model = new_model().double()
        model[2] = nn.Identity()
        return model

    return (data[0][:120].double(), data[1][:120]), build


def weights(run):
    return [*run.model.parameters(), *(p for method in run.methods for p in method.parameters())]


def agree(first, second, tolerance=1e-12):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.allclose(a, b, rtol=0, atol=tolerance)


def both(exact, objective, methods=tuple, **options):
    """The same run with batches of 40, and with four micro-batches of 10."""
    data, build = exact
    return [
        fit(build(), data, objective(), methods(), budget=Budget(epochs=4), optimizer=SGD, batch_size=40 // k, accumulate=k,
            log_every=1, **{name: value() for name, value in options.items()})
        for k in (1, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "options"),
    [
        (tuple, {}),
        (tuple, {"clip_norm": lambda: 0.05}),
        (lambda: [Shrink()], {}),
        (tuple, {"combine": lambda: UncertaintyWeighting(["first", "second"]).double()}),
        (tuple, {"combine": lambda: JacobianDescent(Mean(), weights={"first": 0.3})}),
        (tuple, {"combine": lambda: JacobianDescent(UPGrad())}),
    ],
)
def test_means_over_samples_are_averaged(exact, methods, options):
    def objective():
        return lambda outputs, targets: {
            "first": F.cross_entropy(outputs, targets),
            "second": (outputs[:, 0] + 1.0).square().mean(),
        }

    whole, parts = both(exact, objective, methods, **options)
    agree(weights(whole), weights(parts))
    assert (whole.steps, whole.epochs) == (parts.steps, parts.epochs) == (12, 4)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert a.terms == pytest.approx(b.terms, abs=1e-12)


@pytest.mark.parametrize("methods", [tuple, lambda: [HiddenSpread()], lambda: [HiddenSpread(), Shrink()]])
@pytest.mark.parametrize("objective", [Spread, lambda: partial(Spread()), lambda: F.cross_entropy])
def test_batch_statistics_are_those_of_the_large_batch(exact, methods, objective):
    if objective() is F.cross_entropy and not methods():
        pytest.skip("no batch statistic")
    torch.manual_seed(3)
    made = [(objective(), methods()) for _ in range(2)]
    for a, b in zip(made[0][1], made[1][1]):
        b.load_state_dict(a.state_dict())
    given = iter(made)
    now = []

    def next_objective():
        now[:] = next(given)
        return now[0]

    whole, parts = both(exact, next_objective, lambda: now[1], clip_norm=lambda: 0.5)
    agree(weights(whole), weights(parts))
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a.terms == pytest.approx(b.terms, abs=1e-12)
    first, second = made[0][0], made[1][0]
    if isinstance(first, Spread):
        agree([first.scale], [second.scale])
        assert first.scale != 1.0
    if made[0][1]:
        assert made[0][1][0].rows == made[1][1][0].rows == [(40, 40, 40)] * 12


def test_averaging_a_batch_statistic_would_have_been_wrong(exact):
    """The reason for joining: the plain mean over micro-batches ends elsewhere."""

    class Undeclared(Spread):
        batch_statistic = False

    whole, parts = both(exact, Undeclared)
    assert not torch.allclose(whole.model[0].weight, parts.model[0].weight, atol=1e-4)


def test_both_passes_draw_the_same_dropout(exact):
    """The gradient is that of the outputs which the loss saw: a finite difference of the loss under frozen randomness."""
    data, build = exact
    seen = []

    class Noisy(nn.Module):
        def forward(self, x):
            mask = torch.rand_like(x) < 0.5
            seen.append(mask)
            return x * mask

    model = build()
    model[2] = Noisy()
    fit(model, data, Spread(), budget=Budget(steps=2), batch_size=10, accumulate=3, optimizer=SGD)
    for step in (seen[:6], seen[6:]):
        assert all(torch.equal(first, second) for first, second in zip(step[:3], step[3:], strict=True))
        assert not torch.equal(step[0], step[1])
    assert not torch.equal(seen[0], seen[6])


def test_running_statistics_move_once(exact):
    data, build = exact

    def with_norm():
        model = build()
        model[2] = nn.BatchNorm1d(8).double()
        return model

    class Frozen(Method):
        """No update, so that only the forward passes act."""

        def on_gradients(self, state):
            for parameter in state.trainable:
                parameter.grad = None

    joined, averaged = (
        fit(with_norm(), data, objective, [Frozen()], budget=Budget(epochs=1), batch_size=10, accumulate=4, optimizer=SGD)
        for objective in (Spread(), F.cross_entropy)
    )  # fmt: skip
    assert joined.model[2].num_batches_tracked == averaged.model[2].num_batches_tracked == 12
    assert torch.equal(joined.model[2].running_mean, averaged.model[2].running_mean)
    assert torch.equal(joined.model[2].running_var, averaged.model[2].running_var)


def test_the_rest_of_an_epoch_is_a_step_with_its_own_mean(exact):
    """Batches of 50 and a rest of 20; micro-batches of 10 in groups of five and a rest of two."""
    data, build = exact
    for objective in (F.cross_entropy, Spread()):
        whole, parts = (
            fit(build(), data, objective if objective is F.cross_entropy else Spread(), budget=Budget(epochs=2),
                batch_size=50 // k, accumulate=k, optimizer=SGD)
            for k in (1, 5)
        )  # fmt: skip
        assert whole.steps == parts.steps == 6
        agree(weights(whole), weights(parts))


def test_hooks_and_counters_of_a_step(data, new_model):
    calls = []

    class Spy(Method):
        def on_batch(self, state):
            calls.append(("batch", state.step, state.micro_batch, state.micro_batches))

        def terms(self, state):
            calls.append(("terms", state.micro_batch))
            return {}

        def on_gradients(self, state):
            calls.append(("gradients", state.step))

        def on_step(self, state):
            calls.append(("step", state.step, round(state.progress, 3)))

    fit(new_model(), data, F.cross_entropy, [Spy()], budget=Budget(epochs=1), batch_size=50, accumulate=2)
    assert calls == [
        ("batch", 0, 0, 2), ("terms", 0), ("batch", 0, 1, 2), ("terms", 1), ("gradients", 0), ("step", 1, 0.667),
        ("batch", 1, 0, 1), ("terms", 0), ("gradients", 1), ("step", 2, 1.0),
    ]  # fmt: skip


def test_budget_monitor_and_intervals_count_optimizer_steps(data, new_model, tmp_path):
    evaluated = []
    run = fit(new_model(), data, F.cross_entropy, [ExtraHead()], budget=Budget(steps=5), batch_size=20, accumulate=3,
              monitor=ConflictMonitor(every=2), evaluate=lambda model: evaluated.append(1) or {"one": 1.0}, evaluate_every=2,
              checkpoint_dir=tmp_path, checkpoint_every=2, log_every=1)  # fmt: skip
    assert run.steps == 5
    assert [conflict.step for conflict in run.conflicts] == [0, 2, 4]
    assert [point.step for point in run.history] == [1, 2, 3, 4, 5]
    assert len(evaluated) == 3
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


class Stop(Exception):
    pass


class StopAt(Method):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stop


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("joined", [False, True])
def test_stop_and_go_on_at_any_step(data, new_model, tmp_path, stop, joined):
    class Statistic(nn.Module):
        batch_statistic = True

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets) + outputs.std(0).sum()

    def go(*methods, **options):
        return fit(new_model(), data, Statistic() if joined else F.cross_entropy, [ExtraHead(), *methods], budget=Budget(steps=6),
                   batch_size=30, accumulate=2, log_every=2, **options)  # fmt: skip

    whole = go()
    with pytest.raises(Stop):
        go(StopAt(stop), checkpoint_dir=tmp_path, checkpoint_every=1)
    on = go(checkpoint_dir=tmp_path, checkpoint_every=1, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(on), strict=True))
    assert [(p.step, p.terms) for p in whole.history] == [(p.step, p.terms) for p in on.history]


class Takes(Method):
    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


def test_what_would_be_wrong_is_refused(data, new_model):
    def run(objective, *methods, **options):
        fit(
            new_model(),
            data,
            objective,
            methods,
            budget=Budget(steps=1),
            accumulate=2,
            batch_size=20,
            **options,
        )

    with pytest.raises(InputError, match="Takes takes over the backward pass.*use accumulate=1"):
        run(F.cross_entropy, Takes())
    with pytest.raises(InputError, match="objective Spread must see .* JacobianDescent takes over"):
        run(Spread(), combine=JacobianDescent(UPGrad()))
    with pytest.raises(
        InputError, match="objective Spread must see .* ConflictMonitor needs the whole graph"
    ):
        run(Spread(), monitor=ConflictMonitor())
    with pytest.raises(InputError, match="accumulate must be >= 1, got 0"):
        fit(new_model(), data, F.cross_entropy, budget=Budget(steps=1), accumulate=0)

    class Looks(Method):
        def terms(self, state):
            return {"norm": state.gradients(state.outputs.sum(), [state.model[0].weight])[0].norm()}

    with pytest.raises(InputError, match="takes gradients on the model's parameters"):
        run(lambda outputs, targets: Spread()(outputs.double(), targets), HiddenSpread().float(), Looks())


def test_outputs_that_are_not_samples_first_are_refused(data, new_model):
    class Turned(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs).T

    class Statistic(nn.Module):
        batch_statistic = True

        def forward(self, outputs, targets):
            return outputs.std()

    with pytest.raises(
        InputError, match=r"samples in the first dimension .* got shape \(2, 20\) for 20 samples"
    ):
        fit(Turned(*new_model()), data, Statistic(), budget=Budget(steps=1), accumulate=2, batch_size=20)


def test_frozen_model_under_a_joined_loss_is_refused(data):
    class Statistic(nn.Module):
        batch_statistic = True

        def forward(self, outputs, targets):
            return outputs.std()

    class Idle(Method):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

    with pytest.raises(InputError, match="no loss term depends on a trainable parameter"):
        fit(nn.Linear(6, 2).requires_grad_(False), data, Statistic(), [Idle()], budget=Budget(steps=1), accumulate=2,
            batch_size=20)  # fmt: skip


def test_nested_inputs_extras_and_ids_are_joined(new_model):
    seen = []

    class Look(Method):
        batch_statistic = True

        def terms(self, state):
            seen.append(state.batch)
            return {"spread": state.outputs["both"].std()}

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            return {"both": self.layer(inputs["a"]) + inputs["b"], "constant": "text"}

    batches = [
        Batch({"a": torch.randn(5, 3), "b": torch.randn(5, 2)}, None, torch.arange(5) + 5 * k, {"mask": torch.ones(5), "kind": "x"})
        for k in range(4)
    ]  # fmt: skip
    fit(Two(), batches, None, [Look()], budget=Budget(steps=1), accumulate=4)
    (batch,) = seen
    assert torch.equal(batch.inputs["a"], torch.cat([b.inputs["a"] for b in batches]))
    assert torch.equal(batch.ids, torch.arange(20))
    assert batch.extras["mask"].shape == (20,)
    assert (batch.extras["kind"], batch.targets) == ("x", None)
    batches[2].extras["kind"] = "y"
    with pytest.raises(InputError, match="cannot join the str values in the batch"):
        fit(Two(), batches, None, [Look()], budget=Budget(steps=1), accumulate=4)


def test_bfloat16_joins_close_to_float32(data, new_model):
    from lightning_fabric import Fabric

    class Statistic(nn.Module):
        batch_statistic = True

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs.float(), targets) + 0.1 * outputs.float().std(0).sum()

    plain, mixed = (
        fit(new_model(), data, Statistic(), budget=Budget(steps=4), batch_size=20, accumulate=3, optimizer=SGD,
            fabric=Fabric(accelerator="cpu", devices=1, precision=precision))
        for precision in ("32-true", "bf16-mixed")
    )  # fmt: skip
    assert mixed.model[0].weight.dtype == torch.float32
    assert not torch.equal(mixed.model[0].weight, new_model()[0].weight)
    agree(weights(plain), weights(mixed), tolerance=0.03)


def test_by_hand_in_a_plain_loop(exact):
    data, build = exact
    whole, parts = TrainingStep(build(), F.cross_entropy), TrainingStep(build(), F.cross_entropy)
    whole.backward(whole(*data))
    for number, part in enumerate(zip(*(tensor.split(30) for tensor in data))):
        parts.state.micro_batch, parts.state.micro_batches = number, 4
        parts.backward(parts(*part))
    agree([p.grad for p in whole.trainable], [p.grad for p in parts.trainable])
    statistic = TrainingStep(build(), Spread())
    statistic.state.micro_batches = 4
    with pytest.raises(InputError, match=r"objective Spread must see the whole batch.*fit\(accumulate="):
        statistic.backward(statistic(*data))


class JoinedSpread(nn.Module):
    """A statistic of the batch of all processes."""

    batch_statistic = True

    def forward(self, outputs, targets):
        outputs = gather_with_gradient(outputs)
        return (outputs - outputs.mean(0)).square().mean().log()


def two_terms(outputs, targets):
    return {"first": F.cross_entropy(outputs, targets), "second": (outputs[:, 0] + 1).square().mean()}


class CountingDDP(DDPStrategy):
    """Counts how often the reducer runs."""

    def setup_module(self, module):
        self.found = []
        wrapper = super().setup_module(module)
        wrapper.register_comm_hook(self.found, count_syncs)
        return wrapper


def count_syncs(found, bucket):
    found.append(1)
    return allreduce_hook(None, bucket)


@pytest.mark.parametrize(
    ("objective", "combine", "syncs"),
    [
        # One round of the reducer for each step, not for each micro-batch.
        pytest.param(two_terms, None, 4, id="averaged"),
        pytest.param(JoinedSpread(), None, 0, id="joined"),
        pytest.param(two_terms, JacobianDescent(UPGrad()), 0, id="descent"),
    ],
)
def test_two_processes_reach_the_weights_of_one(objective, combine, syncs, tmp_path):
    """DDP meets once in each optimizer step, averaged or joined, and with a taker of the backward pass."""

    def train(fabric):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        data = torch.randn(48, 6, dtype=torch.float64), torch.randint(3, (48,))
        fit(
            model,
            data,
            objective,
            combine=combine,
            batch_size=8,
            accumulate=3,
            budget=Budget(epochs=2),
            optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9),
            fabric=fabric,
        )
        return dict(model.state_dict()) | {"syncs": torch.tensor(len(getattr(fabric.strategy, "found", [])))}

    one = run_processes(train, tmp_path, 1)[0]
    for two in run_processes(train, tmp_path, strategy=CountingDDP()):
        assert (int(one.pop("syncs", 0)), int(two.pop("syncs"))) == (0, syncs)
        for name, value in one.items():
            assert torch.allclose(value, two[name], rtol=0, atol=1e-12), name
