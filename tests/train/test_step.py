import pytest
import torch
from example_methods import ExtraHead, Shrink
from torch import nn
from torch.nn import functional as F
from torchjd.aggregation import UPGrad

from coloss.data import Batch
from coloss.errors import InputError
from coloss.train import Budget, JacobianDescent, Method, TrainingStep, fit


def test_plain_loop_is_the_hand_written_loop(data, new_model):
    inputs, targets = data
    plain, model = new_model().eval(), new_model().eval()  # eval: dropout off, so that the two see the same
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    step = TrainingStep(model, F.cross_entropy)
    other = torch.optim.SGD(step.trainable, lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
        other.zero_grad()
        step.backward(step(inputs, targets))
        other.step()
        step.after_step()
    for a, b in zip(plain.parameters(), model.parameters()):
        assert torch.equal(a, b)


def test_terms_are_named_and_weighed(data, new_model):
    step = TrainingStep(new_model().eval(), F.cross_entropy, [ExtraHead(weight=0.25)])
    terms = step(*data)
    assert list(terms) == ["cross_entropy", "extra"]
    assert torch.allclose(step.combine(step.state, terms), terms["cross_entropy"] + 0.25 * terms["extra"])


def test_method_heads_are_trained_and_stripped(data, new_model):
    model, method = new_model(), ExtraHead()
    step = TrainingStep(model, F.cross_entropy, [method])
    assert any(parameter is method.head.weight for parameter in step.trainable)
    assert step.finish() is model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(dict(model.named_parameters())) == set(dict(new_model().named_parameters()))


def test_hooks_run_in_order_of_the_line(data, new_model):
    calls = []

    class Spy(Method):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def setup(self, state):
            calls.append(("setup", self.name, state.optimizer is None))

        def on_batch(self, state):
            calls.append(("on_batch", self.name))

        def terms(self, state):
            calls.append(("terms", self.name))
            return {self.name: state.outputs.mean()}

        def on_gradients(self, state):
            calls.append(("on_gradients", self.name))

        def on_step(self, state):
            calls.append(("on_step", self.name, state.step))

        def on_epoch(self, state):
            calls.append(("on_epoch", self.name, state.epoch))

        def finish(self, state):
            calls.append(("finish", self.name))

    fit(new_model(), data, F.cross_entropy, [Spy("a"), Spy("b")], budget=Budget(epochs=1), batch_size=130)
    assert calls == [
        ("setup", "a", True), ("setup", "b", True),
        ("on_batch", "a"), ("on_batch", "b"), ("terms", "a"), ("terms", "b"), ("on_gradients", "a"), ("on_gradients", "b"),
        ("on_step", "a", 1), ("on_step", "b", 1), ("on_epoch", "a", 1), ("on_epoch", "b", 1), ("finish", "a"), ("finish", "b"),
    ]  # fmt: skip


def test_on_batch_edits_what_the_model_sees(data, new_model):
    class Zero(Method):
        def on_batch(self, state):
            state.batch = Batch(torch.zeros_like(state.batch.inputs), state.batch.targets)

    model = new_model().eval()
    step = TrainingStep(model, F.cross_entropy, [Zero()])
    step(*data)
    assert torch.equal(step.state.outputs, model(torch.zeros(130, 6)))


class Takes(Method):
    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


class TakesToo(Takes):
    pass


def test_two_takers_are_refused_by_name(new_model):
    with pytest.raises(InputError, match="Takes and TakesToo each take over the backward pass"):
        TrainingStep(new_model(), F.cross_entropy, [Takes(), TakesToo()])
    with pytest.raises(InputError, match="Takes and JacobianDescent each take over"):
        TrainingStep(new_model(), F.cross_entropy, [Takes()], combine=JacobianDescent(UPGrad()))


def test_a_taker_that_sums_is_the_plain_backward(data, new_model):
    runs = [
        fit(
            new_model().double(),
            (data[0].double(), data[1]),
            F.cross_entropy,
            methods,
            budget=Budget(steps=8),
        )
        for methods in ([ExtraHead().double()], [ExtraHead().double(), Takes()])
    ]
    for a, b in zip(*(run.model.parameters() for run in runs)):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_objective_is_replaced_by_a_method_that_says_so(data, new_model):
    class Instead(Method):
        replaces_objective = True

        def terms(self, state):
            return {"instead": F.cross_entropy(state.outputs, state.batch.targets)}

    assert list(TrainingStep(new_model(), F.mse_loss, [Instead()])(*data)) == ["instead"]


def test_same_name_twice_is_refused(data, new_model):
    step = TrainingStep(new_model(), F.cross_entropy, [ExtraHead(), ExtraHead()])
    with pytest.raises(InputError, match="loss term 'extra' of ExtraHead exists already"):
        step(*data)


def test_same_object_twice_is_refused(new_model):
    method = Shrink()
    with pytest.raises(InputError, match="distinct objects"):
        TrainingStep(new_model(), F.cross_entropy, [method, method])


def test_class_in_place_of_object_is_refused(new_model, as_users_call):
    with pytest.raises(InputError, match="must be coloss.Method objects, got type"):
        TrainingStep(new_model(), F.cross_entropy, [Shrink])


def test_no_loss_is_refused(data, new_model):
    with pytest.raises(InputError, match="there is no loss"):
        TrainingStep(new_model())
    with pytest.raises(InputError, match="there is no loss"):
        TrainingStep(new_model(), None, [Shrink()])(*data)


def test_terms_must_be_scalars_that_can_be_trained(data, new_model):
    with pytest.raises(InputError, match=r"'vector' must be a scalar tensor, got \(130,\)"):
        TrainingStep(new_model(), lambda o, t: {"vector": o.mean(1)})(*data)
    with pytest.raises(InputError, match="no loss term depends on a trainable parameter"):
        TrainingStep(new_model(), lambda o, t: torch.tensor(1.0))(*data)


def test_objective_with_parameters_is_trained(data, new_model):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return F.cross_entropy(self.scale * outputs, targets)

    objective = Scaled()
    fit(new_model(), data, objective, budget=Budget(steps=2))
    assert objective.scale.item() != 1.0


class Alone(Method):
    """Makes its loss from the weights, without the batch's forward pass."""

    reads_outputs = False

    def terms(self, state):
        assert state.outputs is None or self.expected
        return {"size": state.model.weight.square().sum()}

    expected = False


class Counted(nn.Linear):
    passes = 0

    def forward(self, inputs):
        self.passes += 1
        return super().forward(inputs)


def test_a_forward_pass_that_nothing_reads_is_left_out():
    model = Counted(4, 3)
    TrainingStep(model, None, [Alone()])(torch.randn(2, 4))
    assert model.passes == 0


@pytest.mark.parametrize("need", ["objective", "method", "tap"])
def test_a_forward_pass_that_anything_reads_is_made(need):
    model, method = Counted(4, 3), Alone()
    method.expected = True
    others = [Method()] if need == "method" else []
    objective = (lambda outputs, targets: outputs.sum()) if need == "objective" else None
    step = TrainingStep(model, objective, [method, *others])
    if need == "tap":
        step.state.tap("out", "")
    step(torch.randn(2, 4))
    assert model.passes == 1
