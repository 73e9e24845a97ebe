import pytest
import torch
from example_methods import ExtraHead, Shrink
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from coloss.errors import InputError
from coloss.train import Method, TrainingStep

lightning = pytest.importorskip("lightning.pytorch")
from coloss.train import MethodCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module, data, callback, steps=4):
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=40))
    return module


class Deterministic(ExtraHead):
    def terms(self, state):
        return {"extra": F.cross_entropy(self.head(state.features["hidden"]), state.batch.targets)}


class Taker(Method):
    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


@pytest.mark.parametrize("more", [(), (Taker,)])
def test_trainer_reaches_the_weights_of_the_plain_loop(data, new_model, more):
    model, twin = new_model(), new_model()
    model[2] = twin[2] = nn.Identity()
    module = train(
        Module(model), data, MethodCallback([Deterministic(0.5), Shrink(), *(kind() for kind in more)])
    )
    step = TrainingStep(
        twin, F.cross_entropy, [Deterministic(0.5 if not more else 1.0), Shrink()], state=_state(twin)
    )
    optimizer = torch.optim.SGD(step.trainable, lr=0.1)
    for inputs, targets in DataLoader(TensorDataset(*data), batch_size=40):
        optimizer.zero_grad()
        step.backward(step(inputs, targets))
        optimizer.step()
        step.after_step()
    for a, b in zip(module.model.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-7)


def _state(model):
    from coloss.train import State

    state = State(model)
    state.generator.manual_seed(0)
    return state


def test_nothing_is_left_behind(data, new_model):
    module = Module(new_model())
    names = set(module.state_dict())
    train(module, data, MethodCallback([ExtraHead()]))
    assert set(module.state_dict()) == names
    assert "training_step" not in vars(module) or module.training_step.__func__ is Module.training_step
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_batches_are_edited(data, new_model):
    seen = []

    class Zero(Method):
        def on_batch(self, state):
            state.batch.inputs = torch.zeros_like(state.batch.inputs)

    class Spy(Module):
        def training_step(self, batch, index):
            seen.append(batch[0].abs().sum().item())
            return super().training_step(batch, index)

    train(Spy(new_model()), data, MethodCallback([Zero()]))
    assert seen == [0.0] * 4


def test_a_resumed_trainer_goes_on_counting(data, new_model, tmp_path):
    steps = []

    class Count(Method):
        def on_step(self, state):
            steps.append((state.step, round(state.progress, 3)))

    def go(until, resume=None):
        trainer = lightning.Trainer(
            max_steps=until, callbacks=[MethodCallback([Count()])], logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, accelerator="cpu", devices=1,
        )  # fmt: skip
        trainer.fit(Module(new_model()), DataLoader(TensorDataset(*data), batch_size=40), ckpt_path=resume)
        return trainer

    go(4).save_checkpoint(tmp_path / "four.ckpt")
    steps.clear()
    go(6, tmp_path / "four.ckpt")
    assert [step for step, _ in steps] == [5, 6]
    assert steps[-1][1] == 1.0


def test_a_wrong_attribute_is_refused(data, new_model):
    with pytest.raises(InputError, match="has no module 'network'"):
        train(Module(new_model()), data, MethodCallback([Shrink()], model="network"))


def test_a_method_may_replace_the_loss_of_training_step(data, new_model):
    class Instead(Method):
        replaces_objective = True

        def terms(self, state):
            return {"instead": F.multi_margin_loss(state.outputs, state.batch.targets)}

    model, twin = new_model(), new_model()
    model[2] = twin[2] = nn.Identity()  # in place of dropout
    train(Module(model), data, MethodCallback([Instead()]))
    step = TrainingStep(twin, F.multi_margin_loss, state=_state(twin))
    optimizer = torch.optim.SGD(step.trainable, lr=0.1)
    for inputs, targets in list(DataLoader(TensorDataset(*data), batch_size=40))[:4]:
        optimizer.zero_grad()
        step.backward(step(inputs, targets))
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
