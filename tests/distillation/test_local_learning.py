import copy
import gc
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.distillation import (
    AugmentedLocalLearning,
    LocalLearning,
    LogitDistillation,
    MomentumLocalLearning,
    block_ends,
)
from coloss.distillation.cut_positions import balanced_ends
from coloss.errors import InputError
from coloss.nn import MLP, Classifier, ResNet, Transformer
from coloss.train import SavedActivations, State, UncertaintyWeighting


def new_mlp(norm=None) -> nn.Module:
    return MLP(6, [8] * 4, 4, norm=norm)


def batch(rows: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(4, (rows,))


def step_of(model: nn.Module, method: LocalLearning, *more: Method, **options) -> TrainingStep:
    return TrainingStep(model, F.cross_entropy, [method, *more], **options)


def test_block_ends():
    assert block_ends(16, 16) == list(range(15))
    assert block_ends(16, 16, joined=2) == list(range(13))
    assert block_ends(10, 3) == [2, 5] and block_ends(10, 1) == []
    for blocks in range(1, 8):
        ends = block_ends(7, blocks)
        sizes = [b - a for a, b in zip([-1, *ends], [*ends, 6], strict=True)]
        assert len(sizes) == blocks and max(sizes) - min(sizes) <= 1
    for bad in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match=r"num_layers must be >= 2|blocks must be between"):
            block_ends(*bad)
    with pytest.raises(ValueError, match="joined must be >= 0"):
        block_ends(4, 2, -1)


def test_balanced_ends():
    assert balanced_ends([4, 4, 2, 1, 1, 1], [[0] * 6]) == [1]
    assert balanced_ends([8] * 4 + [1] * 8, [[0] * 12] * 3) == [0, 1, 2]
    assert balanced_ends([1] * 6, [[0, 0, 9, 0, 0, 0]]) == [1]  # a large head there moves the cut
    assert balanced_ends([1] * 5, [[0] * 5] * 4, joined=2) == [0, 1] and balanced_ends([1] * 3, []) == []
    for layers in (3, 7, 12):
        sizes = torch.rand(layers).tolist()
        for cuts in range(1, layers):
            heads = torch.rand(cuts, layers).tolist()
            ends = balanced_ends(sizes, heads)
            assert _largest(sizes, heads, ends) == pytest.approx(
                min(_largest(sizes, heads, other) for other in combinations(range(layers - 1), cuts))
            )


def _largest(sizes, heads, ends):
    edges = [-1, *ends, len(sizes) - 1]
    own = [*(heads[number][end] for number, end in enumerate(ends)), 0.0]
    return max(sum(sizes[a + 1 : b + 1]) + head for a, b, head in zip(edges, edges[1:], own, strict=False))


def test_gradients_are_those_of_the_summed_losses_with_cuts():
    model, (inputs, targets) = new_mlp("batch").double(), batch()
    inputs = inputs.double()
    method = LocalLearning(inputs[:2])
    step = step_of(model, method)
    other, heads = copy.deepcopy(model), copy.deepcopy(method.heads)
    terms = step(inputs, targets)
    step.backward(terms)

    x, losses = inputs, []
    layers = list(other.layers)
    for number, start in enumerate(range(0, 12, 3)):
        for layer in layers[start : start + 3]:
            x = layer(x)
        if number < 3:
            losses.append(F.cross_entropy(heads[number](x), targets))
            x = x.detach()
    losses.append(F.cross_entropy(layers[-1](x), targets))
    torch.stack(losses).sum().backward()

    mine = [*model.parameters(), *method.heads.parameters()]
    theirs = [*other.parameters(), *heads.parameters()]
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["local_loss"].double(), torch.stack(losses[:-1]).sum().detach())
    assert model.layers[1].num_batches_tracked == 1


def test_one_block_is_backpropagation():
    data, one = batch(32), new_mlp()
    two = copy.deepcopy(one)
    for model, methods in ((one, []), (two, [LocalLearning(data[0][:2], blocks=1)])):
        coloss.fit(model, data, F.cross_entropy, methods, budget=Budget(steps=4), batch_size=8, optimizer=SGD)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_memory_is_saved_within_fit_and_the_model_ships_as_it_was_built():
    """A step of fit holds less for its backward pass the more blocks there are, and nothing outlives its step."""
    data = (torch.randn(64, 1, 6, 6), torch.randint(4, (64,)))
    peaks = {}
    for blocks in (1, 2, 4, 8, 16):
        model = Classifier(ResNet(1, (4,), (15,)), 4)
        names = list(model.state_dict())
        methods = [LocalLearning(data[0][:2], blocks=blocks)] if blocks > 1 else []
        with SavedActivations(model) as meter:
            run = coloss.fit(
                model, data, F.cross_entropy, methods, budget=Budget(steps=1), batch_size=64, optimizer=SGD
            )
            peaks[blocks] = meter.peak
            methods.clear()
        assert run.model is model and list(model.state_dict()) == names
        assert not any(module._forward_hooks for module in model.modules())
        if blocks > 1:
            assert len(run.methods[0].heads) == blocks - 1
            assert all(
                module.num_batches_tracked == 1
                for module in model.modules()
                if hasattr(module, "running_mean")
            )
    ordered = list(peaks.values())
    assert ordered == sorted(ordered, reverse=True)
    assert peaks[4] < 0.5 * peaks[1] and peaks[16] < 0.2 * peaks[1]


def test_fit_a_plain_loop_and_lightning_agree():
    batches = [batch() for _ in range(3)]
    check_loops(
        lambda: new_mlp("batch"),
        lambda: LocalLearning(batches[0][0][:2], blocks=3, loss=F.cross_entropy),
        batches,
        F.cross_entropy,
    )


def test_a_killed_run_resumes_bit_identically(tmp_path):
    data = batch(40)
    check_resume(
        lambda: new_mlp("batch"),
        lambda: LocalLearning(data[0][:2], clip_norm=1.0),
        data,
        tmp_path,
        F.cross_entropy,
        steps=8,
        kill_at=5,
    )


def test_two_processes_take_the_steps_of_one(tmp_path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, (inputs, targets) = new_mlp().double(), batch(32)
        method = LocalLearning(inputs[:2].double(), blocks=3)
        coloss.fit(
            model,
            (inputs.double(), targets),
            F.cross_entropy,
            [method],
            batch_size=16,
            budget=Budget(epochs=2),
            optimizer=SGD,
            fabric=fabric,
        )
        return {**model.state_dict(), **{f"head.{k}": v for k, v in method.heads.state_dict().items()}}

    check_two_processes(train, tmp_path)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches():
    one, two = new_mlp().double(), None
    two = copy.deepcopy(one)
    inputs, targets = batch(16)
    inputs = inputs.double()
    whole, parts = (step_of(model, LocalLearning(inputs[:2])) for model in (one, two))
    parts.state.methods[0].heads.load_state_dict(whole.state.methods[0].heads.state_dict())
    whole.backward(whole(inputs, targets))
    for number, rows in enumerate((slice(0, 8), slice(8, 16))):
        parts.state.micro_batch, parts.state.micro_batches = number, 2
        parts.backward(parts(inputs[rows], targets[rows]))
    for a, b in zip(whole.trainable, parts.trainable, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_each_block_is_clipped_by_itself():
    """One norm over all blocks would let a block with large gradients stop the others."""
    model, data = new_mlp(), batch()
    method = LocalLearning(data[0][:2], blocks=2, clip_norm=1e-3)
    step = step_of(model, method)
    step.backward(step(*data))
    first = [*model.layers[:4].parameters(), *method.heads[0].parameters()]
    for block in (first, list(model.layers[4:].parameters())):
        norm = torch.stack([parameter.grad.square().sum() for parameter in block]).sum().sqrt()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


class Decay(Method):
    def terms(self, state: State) -> dict[str, Tensor]:
        return {"size": torch.stack([p.square().sum() for p in state.model.parameters()]).sum()}


def test_other_methods_add_to_it():
    """Terms on weights reach all blocks, terms on outputs the last, and features tapped inside a block lead to that block."""
    model, data = new_mlp(), batch()

    class Tapped(Method):
        def setup(self, state: State) -> None:
            state.tap("early", "layers.1")

        def terms(self, state: State) -> dict[str, Tensor]:
            return {"early": state.features["early"].square().mean()}

    for other, reached in ((Decay(), [True] * 5), (Tapped(), [True, False, False, False, False])):
        method = LocalLearning(data[0][:2])
        step = step_of(model, method, other, combine={"local_loss": 0.0, "cross_entropy": 0.0})
        step.backward(step(*data))
        found = [bool(layer.weight.grad.any()) for layer in model.layers if isinstance(layer, nn.Linear)]
        assert found == reached
        step.finish()
    teacher = new_mlp()
    run = coloss.fit(
        model,
        data,
        F.cross_entropy,
        [LogitDistillation(teacher), LocalLearning(data[0][:2])],
        budget=Budget(steps=3),
        combine=UncertaintyWeighting(["cross_entropy", "logit_distillation", "local_loss"]),
    )
    assert set(run.history[-1].terms) == {"cross_entropy", "logit_distillation", "local_loss"}


def test_evaluation_and_further_passes_are_left_alone():
    model, data = new_mlp(), batch()
    method = LocalLearning(data[0][:2])
    step = step_of(model, method)
    step(*data)
    losses = list(method.block_losses)
    model(data[0])  # another training pass: cut, but no loss
    assert method.block_losses == losses
    x = data[0].clone().requires_grad_()
    assert model.eval()(x).sum().backward() is None and x.grad is not None
    clone = copy.deepcopy(model).train()
    clone(x).sum().backward()
    assert clone.layers[0].weight.grad is not None


def test_heads_weigh_the_terms_of_the_objective_as_the_run_does():
    data = (torch.randn(16, 6), torch.randn(16, 4))

    def objective(outputs, targets):
        return {"near": F.mse_loss(outputs, targets), "far": 100 + F.l1_loss(outputs, targets)}

    method = LocalLearning(data[0][:2], blocks=2)
    step = TrainingStep(new_mlp(), objective, [method], combine={"near": 2.0, "far": 0.0, "local_loss": 0.5})
    terms = step(*data)
    features = step.model.layers[:4](data[0])
    wanted = 2 * F.mse_loss(method.heads[0](features), data[1])
    torch.testing.assert_close(terms["local_loss"], wanted.detach())


def test_without_gradients_the_losses_are_there_all_the_same():
    data = batch()
    step = step_of(new_mlp(), LocalLearning(data[0][:2]))
    with torch.no_grad():
        without = step(*data)["local_loss"]
    assert without > 0 and torch.equal(without, step(*data)["local_loss"])


class Adversarial(Method):
    """Moves the batch along the loss's gradient."""

    def on_batch(self, state: State) -> None:
        x = state.batch.inputs.detach().clone().requires_grad_()
        (self.slope,) = torch.autograd.grad(F.cross_entropy(state.model(x), state.batch.targets), x)
        state.batch.inputs = (x + 0.01 * self.slope.sign()).detach()


@pytest.mark.parametrize("order", [1, -1])
def test_methods_may_ask_how_the_loss_depends_on_the_inputs(order):
    data, model, moves = batch(), new_mlp(), Adversarial()
    method = LocalLearning(data[0][:2])
    step = TrainingStep(model, F.cross_entropy, [method, moves][::order])
    for _ in range(2):
        step.backward(step(*data))
    assert len(method.block_losses) == 3
    x = data[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x), data[1]), x)
    torch.testing.assert_close(moves.slope, wanted)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(4)
        )
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(is_causal=False, src=x)
        return self.out(x)


def test_layers_may_be_called_by_keyword():
    tokens = torch.randn(4, 5, 8)
    for method in (AugmentedLocalLearning(tokens[:1], depth=1), MomentumLocalLearning(tokens[:1])):
        step = TrainingStep(Keywords(), F.mse_loss, [method])
        step.backward(step(tokens, tokens))
        assert all(parameter.grad is not None for parameter in step.trainable)


class Escapes(nn.Module):
    """A tensor from inside the first layer goes round the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.layers[0][0](x)
        return self.layers[2](self.layers[1](self.layers[0][1](inside) + inside.sin()))


def test_hooks_of_a_run_that_was_broken_off_do_not_cut_the_next():
    model, data = new_mlp(), batch()
    broken = step_of(model, LocalLearning(data[0][:2]))
    broken(*data)
    again = step_of(model, LocalLearning(data[0][:2], blocks=2))
    again.backward(again(*data))
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    again.finish()
    del broken, again
    gc.collect()
    F.cross_entropy(model.train()(data[0]), data[1]).backward()


def test_stages_that_hang_in_a_plain_module_and_tokens_with_arguments():
    inputs, targets = torch.randn(8, 1, 6, 6), torch.randint(3, (8,))
    method = LocalLearning(inputs[:2], layers=["layer1", "layer2"])
    step = step_of(TwoStages(), method)
    step.backward(step(inputs, targets))
    assert method.cuts == [("layer1",)]
    assert all(parameter.grad is not None for parameter in step.trainable)
    tokens, labels = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    step = TrainingStep(Transformer(8, 3, 2), F.mse_loss, [LocalLearning(tokens[:1])])
    step.backward(step(tokens, labels))
    assert step.state.methods[0].heads[0](tokens).shape == labels.shape


def test_bfloat16_mixed_precision_trains():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    data, model = batch(64), new_mlp("batch")
    run = coloss.fit(
        model,
        data,
        F.cross_entropy,
        [LocalLearning(data[0][:2])],
        budget=Budget(steps=30),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        fabric=fabric,
        log_every=1,
    )
    losses = [point.terms["local_loss"] for point in run.history if point.terms]
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


class TwoStages(nn.Module):
    """Stages that hang side by side in a module, as in torchvision's residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv(x).relu())).mean((2, 3)))


class Skips(nn.Module):
    """A path leads from the first layer round the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.layers[0](x)
        return self.layers[2](self.layers[1](stem.relu()) + self.early(x))

    def early(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layers[0].weight)


def test_bad_input():
    data = batch()
    example = data[0][:2]
    with pytest.raises(InputError, match="blocks must be >= 1, got 0"):
        LocalLearning(example, blocks=0)
    with pytest.raises(InputError, match="clip_norm must be > 0, got 0"):
        LocalLearning(example, clip_norm=0)
    with pytest.raises(InputError, match="between 1 and the number of layers, 4, got 9"):
        step_of(new_mlp(), LocalLearning(example, blocks=9))
    with pytest.raises(InputError, match="there is no loss for the heads"):
        TrainingStep(new_mlp(), None, [LocalLearning(example)])
    step = step_of(Skips(), LocalLearning(example))
    with pytest.raises(InputError, match=r"'layers.0.weight' learns from two of them"):
        step(data[0], torch.randint(6, (16,)))
    step = step_of(Escapes(), LocalLearning(example))
    with pytest.raises(InputError, match="reaches the inside of an earlier one: a path leads round a cut"):
        step(data[0], torch.randint(6, (16,)))
    maps = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)))
    with pytest.raises(InputError, match="must be .batch, outputs. for heads of this kind"):
        step_of(maps, LocalLearning(torch.zeros(1, 1, 4, 4)))


def test_without_an_objective_the_loss_serves_all_blocks():
    data = batch()
    step = TrainingStep(new_mlp(), None, [LocalLearning(data[0][:2], loss=F.cross_entropy)])
    terms = step(*data)
    step.backward(terms)
    assert set(terms) == {"local_loss", "final_loss"}
    assert all(parameter.grad is not None for parameter in step.trainable)
