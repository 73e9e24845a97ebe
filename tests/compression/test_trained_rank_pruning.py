"""Facts about training at low rank: the projection, the pull of the nuclear norm, and the method in every loop."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from contract import check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import coloss
from coloss.compression import (
    TrainedRankPruning,
    low_rank_matrix,
    low_rank_weight,
    matricize,
    multiply_adds,
    nuclear_norm,
    nuclear_norm_loss,
    nuclear_subgradient,
    select_layers,
    tangent_component,
    truncated_svd,
)
from coloss.errors import InputError
from coloss.lab import Comparison
from coloss.lab.claims import verify
from coloss.nn import MLP, Classifier, ConvNet
from coloss.train import Budget, Method, NonFiniteLossError, TrainingStep, fit

SCHEMES = ("channel", "spatial", "decoupled")
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new_model():
    """Two layers are kept low-rank: "2" and "4"."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        )


@pytest.fixture(scope="module")
def data():
    return randn(64, 1, 6, 6, dtype=torch.float32), torch.arange(64) % 3


def no_loss(outputs, targets):
    """A loss whose gradient is 0 everywhere, so that weights move by the method alone."""
    return 0.0 * outputs.sum()


class Watch(Method):
    """Keeps what the forward pass sees of a layer, and the gradient that the optimizer sees."""

    def __init__(self, path="2"):
        super().__init__()
        self.path, self.weights, self.gradients, self.momenta = path, [], [], []

    def on_batch(self, state):
        weight = state.model.get_submodule(self.path).weight
        self.weights.append(weight.detach().clone())
        if state.optimizer is not None and state.optimizer.state.get(weight):
            self.momenta.append(state.optimizer.state[weight]["momentum_buffer"].clone())

    def on_gradients(self, state):
        self.gradients.append(state.model.get_submodule(self.path).weight.grad.clone())


def ranks_of(weights, scheme="channel"):
    return [
        torch.linalg.matrix_rank(matricize(weight, scheme)[0], rtol=1e-5).max().item() for weight in weights
    ]


# The pure functions


@given(st.sampled_from(SCHEMES), st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_projection_is_the_best_of_its_rank_and_idempotent(scheme, seed, rank):
    weight = randn(5, 4, 3, 3, seed=seed)
    projected = low_rank_weight(weight, scheme, rank=rank)
    dropped = np.linalg.svd(matricize(weight, scheme)[0].numpy(), compute_uv=False)[..., rank:]
    assert (weight - projected).square().sum().item() == pytest.approx((dropped**2).sum())
    torch.testing.assert_close(low_rank_weight(projected, scheme, rank=rank), projected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_energy_is_the_identity(scheme):
    weight = randn(5, 4, 3, 3)
    torch.testing.assert_close(low_rank_weight(weight, scheme, energy=1.0), weight)


def test_a_projection_at_an_energy_cuts_again_where_one_at_a_rank_does_not():
    weight = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.3], dtype=torch.float64))
    once = low_rank_weight(weight, energy=0.85)  # 9 + 1 of 11.09 is 0.90, 9 alone is 0.81
    twice = low_rank_weight(once, energy=0.85)  # 9 of 10 is 0.90
    assert ranks_of([once, twice]) == [2, 1]


def test_sub_gradient_is_the_gradient_of_the_nuclear_norm_at_full_rank():
    matrix = randn(4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
    svd = truncated_svd(matrix.detach(), energy=1.0)
    torch.testing.assert_close(nuclear_subgradient(svd), gradient)
    torch.testing.assert_close(
        torch.linalg.svdvals(matrix.detach() - 0.1 * nuclear_subgradient(svd)), svd.S - 0.1
    )


def test_sub_gradient_of_a_truncation_has_its_rank_and_that_of_zero_is_zero():
    values = torch.linalg.svdvals(nuclear_subgradient(truncated_svd(randn(4, 6), rank=2)))
    torch.testing.assert_close(values, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(nuclear_subgradient(truncated_svd(torch.zeros(3, 2), energy=0.9)), torch.zeros(3, 2))
    batch = torch.stack([torch.diag(torch.tensor([2.0, 0.1])), torch.eye(2)])
    torch.testing.assert_close(
        nuclear_subgradient(truncated_svd(batch, energy=0.9)),
        torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)]),
    )


def test_tangent_component_is_an_orthogonal_projection_that_keeps_the_matrix_itself():
    svd = truncated_svd(randn(6, 5), rank=2)
    momentum = randn(6, 5, seed=1)
    tangent = tangent_component(momentum, svd)
    torch.testing.assert_close(tangent_component(tangent, svd), tangent)
    torch.testing.assert_close(tangent_component(low_rank_matrix(svd), svd), low_rank_matrix(svd))
    assert (tangent * (momentum - tangent)).sum().item() == pytest.approx(0, abs=1e-12)
    # Nothing of what was left out touches the kept columns or rows.
    rest = momentum - tangent
    torch.testing.assert_close(svd.U.mT @ rest, torch.zeros(2, 5).double())
    torch.testing.assert_close(rest @ svd.Vh.mT, torch.zeros(6, 2).double())
    # To first order the rank stays: the third singular value moves with the square of the step.
    third = [torch.linalg.svdvals(low_rank_matrix(svd) + step * tangent)[2].item() for step in (1e-3, 1e-4)]
    assert third[0] / third[1] == pytest.approx(100, rel=0.1)


def test_nuclear_norm_loss_sums_layers_filters_and_is_differentiable():
    model = new_model().double()
    for scheme in SCHEMES:
        expected = sum(
            np.linalg.svd(matricize(model[index].weight.detach(), scheme)[0].numpy(), compute_uv=False).sum()
            for index in (2, 4)
        )
        assert nuclear_norm_loss(model, scheme).item() == pytest.approx(expected)
    nuclear_norm_loss(model, layers="2").backward()
    svd = truncated_svd(model[2].weight.detach().flatten(1), energy=1.0)
    torch.testing.assert_close(model[2].weight.grad.flatten(1), nuclear_subgradient(svd))
    assert model[4].weight.grad is None


# The method in `fit`


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_projected_before_the_forward_of_every_mth_step_of_the_run(data, scheme):
    """Epochs of four steps and a period of three: a counter that restarts with the epoch would project at 4."""
    method, watch = TrainedRankPruning(scheme=scheme, every=3, energy=0.7, decompose=False), Watch()
    fit(
        new_model(),
        data,
        F.cross_entropy,
        [method, watch],
        budget=Budget(steps=9),
        batch_size=16,
        optimizer=SGD,
    )
    ranks = ranks_of(watch.weights, scheme)
    full = ranks[1]
    assert [rank < full for rank in ranks] == [step % 3 == 0 for step in range(9)]
    logged = dict(method.rank_history)
    assert [logged[step]["2"] for step in (0, 3, 6)] == [ranks[0], ranks[3], ranks[6]]
    assert method.ranks() == logged[6]


@pytest.mark.parametrize(("scale", "factor"), [(False, 1), (True, 4)])
def test_the_pull_is_added_on_projection_steps_alone(data, scale, factor):
    """Without any other gradient each kept singular value falls by lr * lambda once per period."""
    method = TrainedRankPruning(
        every=4, energy=1.0, nuclear_weight=0.02, scale_nuclear_by_every=scale, decompose=False
    )
    watch, model = Watch(), new_model()
    before = torch.linalg.svdvals(model[2].weight.detach().flatten(1))
    run = fit(
        model,
        data,
        no_loss,
        [method, watch],
        budget=Budget(steps=8),
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    assert [bool(gradient.any()) for gradient in watch.gradients] == [step % 4 == 0 for step in range(8)]
    after = torch.linalg.svdvals(run.model[2].weight.detach().flatten(1))
    torch.testing.assert_close(after, before - 2 * 0.5 * 0.02 * factor, rtol=0, atol=1e-5)


def test_the_task_gradient_is_taken_at_the_projected_weight(data):
    model, watch = new_model(), Watch()
    model[6] = nn.Identity()
    twin = copy.deepcopy(model)
    method = TrainedRankPruning(every=1, energy=0.6, nuclear_weight=0.0, decompose=False)
    fit(model, data, F.cross_entropy, [method, watch], budget=Budget(steps=1), optimizer=SGD, batch_size=64)
    for index in (2, 4):
        twin[index].weight.data = low_rank_weight(twin[index].weight, energy=0.6)
    F.cross_entropy(twin(data[0]), data[1]).backward()
    torch.testing.assert_close(watch.gradients[0], twin[2].weight.grad, rtol=1e-4, atol=1e-6)


def test_only_the_chosen_layers_change(data):
    model = new_model()
    before = copy.deepcopy(model)
    options = {"budget": Budget(steps=1), "optimizer": partial(torch.optim.SGD, lr=0.0)}
    fit(
        model, data, F.cross_entropy, [TrainedRankPruning(energy=0.5, layers="4", decompose=False)], **options
    )
    changed = [
        name
        for (name, now), then in zip(model.named_parameters(), before.parameters())
        if not now.equal(then)
    ]
    assert changed == ["4.weight"]


def test_without_projection_the_nuclear_norm_alone_is_left(data):
    method, watch = (
        TrainedRankPruning(project=False, nuclear_weight=0.5, energy=0.9, decompose=False),
        Watch(),
    )
    model = new_model()
    before = model[2].weight.detach().clone()
    fit(model, data, no_loss, [method, watch], budget=Budget(steps=2), optimizer=SGD)
    assert torch.equal(watch.weights[0], before)
    svd = truncated_svd(before.flatten(1), energy=0.9)
    torch.testing.assert_close(watch.gradients[0].flatten(1), 0.5 * nuclear_subgradient(svd))
    assert method.ranks()["2"] == svd.rank


def test_momentum_is_projected_on_request(data):
    seen = {}
    for wanted in (False, True):
        method = TrainedRankPruning(every=2, energy=0.6, project_momentum=wanted, decompose=False)
        watch = Watch()
        fit(new_model(), data, F.cross_entropy, [method, watch], budget=Budget(steps=4), optimizer=SGD)
        svd = truncated_svd(watch.weights[2].flatten(1), rank=dict(method.rank_history)[2]["2"])
        momentum = watch.momenta[1].flatten(1)
        seen[wanted] = (momentum - tangent_component(momentum, svd)).norm() / momentum.norm()
    assert seen[True] < 1e-5
    assert seen[False] > 1e-2


def test_momentum_of_a_plain_loop_needs_the_optimizer_and_adam_has_one_too(data):
    model = new_model()
    method = TrainedRankPruning(every=1, energy=0.6, project_momentum=True, decompose=False)
    step = TrainingStep(model, F.cross_entropy, [method])
    optimizer = torch.optim.Adam(step.trainable)
    with pytest.raises(InputError, match="project_momentum needs the optimizer: set state.optimizer"):
        step(*data)
    step.state.optimizer = optimizer
    step.state.step = 1
    step.backward(step(*data))
    optimizer.step()
    optimizer.state[model[2].weight]["exp_avg"].copy_(randn(8, 8, 3, 3))
    step.state.step = 2
    step(*data)
    svd = truncated_svd(model[2].weight.detach().flatten(1), rank=method.ranks()["2"])
    momentum = optimizer.state[model[2].weight]["exp_avg"].flatten(1)
    torch.testing.assert_close(tangent_component(momentum, svd), momentum, rtol=0, atol=1e-5)


def test_an_accumulated_batch_does_not_project_twice(data):
    method = TrainedRankPruning(energy=0.7, nuclear_weight=0.1, decompose=False)
    model = new_model()
    step = TrainingStep(model, no_loss, [method])
    step.backward(step(data[0][:32], data[1][:32]))
    first, gradient = model[2].weight.detach().clone(), model[2].weight.grad.clone()
    step.backward(step(data[0][32:], data[1][32:]))
    assert torch.equal(model[2].weight, first)
    assert torch.equal(model[2].weight.grad, gradient)
    assert torch.linalg.svdvals(gradient.flatten(1))[0].item() == pytest.approx(0.1, rel=1e-4)


def test_a_weight_outside_the_graph_gets_the_pull_alone(data):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.stem, self.spare = new_model(), nn.Conv2d(1, 2, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    step = TrainingStep(model, F.cross_entropy, [TrainedRankPruning(layers="spare", nuclear_weight=0.1)])
    step.backward(step(*data))
    assert torch.linalg.svdvals(model.spare.weight.grad.flatten(1))[0].item() == pytest.approx(0.1, rel=1e-4)


# How it ships


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_shipped_network_is_factorised_and_computes_the_same(data, scheme):
    whole, thin = (
        fit(
            new_model(),
            data,
            F.cross_entropy,
            [method := TrainedRankPruning(scheme=scheme, every=2, energy=0.5, decompose=decompose)],
            budget=Budget(steps=12),
            optimizer=SGD,
        ).model.eval()
        for decompose in (False, True)
    )
    assert ranks_of([whole[2].weight, whole[4].weight], scheme) == list(method.ranks().values())
    assert isinstance(thin[2], nn.Sequential)
    assert thin[2][0].out_channels in (method.ranks()["2"], 8 * method.ranks()["2"])
    torch.testing.assert_close(thin(data[0]), whole(data[0]), rtol=1e-4, atol=1e-5)
    assert multiply_adds(thin, data[0]) < multiply_adds(whole, data[0])
    assert not any(isinstance(part, Method) for part in thin.modules())


def test_layers_that_would_not_get_cheaper_ship_whole(data):
    run = fit(new_model(), data, F.cross_entropy, [TrainedRankPruning(energy=1.0)], budget=Budget(steps=2))
    assert isinstance(run.model[2], nn.Conv2d)


def test_the_last_cut_is_back_to_the_last_rank(data):
    """A cut at an energy after the last step would take more, and nothing would make it good."""
    method = TrainedRankPruning(every=5, energy=0.6, decompose=False)
    run = fit(new_model(), data, F.cross_entropy, [method], budget=Budget(steps=8), optimizer=SGD)
    assert ranks_of([run.model[2].weight, run.model[4].weight]) == list(dict(method.rank_history)[5].values())
    left = TrainedRankPruning(every=5, energy=0.6, decompose=False, final_projection=False)
    run = fit(new_model(), data, F.cross_entropy, [left], budget=Budget(steps=8), optimizer=SGD)
    assert ranks_of([run.model[2].weight]) == [8]


@pytest.mark.parametrize(
    "build", [lambda: MLP(36, (16, 16, 16), 3), lambda: Classifier(ConvNet(1, (8, 8), dims=1), 3)]
)
def test_perceptrons_and_series_networks(data, build):
    inputs = data[0].flatten(1) if isinstance(build(), MLP) else data[0].flatten(2)
    model = build()
    paths = list(select_layers(model))
    run = fit(
        model, (inputs, data[1]), F.cross_entropy, [TrainedRankPruning(energy=0.3)], budget=Budget(steps=3)
    )
    assert all(isinstance(run.model.get_submodule(path), nn.Sequential) for path in paths)


# Precision


def test_projection_under_autocast_is_exact(data):
    """A product in bfloat16 would leave a weight of full rank."""
    method, watch = TrainedRankPruning(energy=0.7, decompose=False), Watch()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fit(new_model(), data, F.cross_entropy, [method, watch], budget=Budget(steps=1), fabric=fabric)
    assert watch.weights[0].dtype == torch.float32
    assert ranks_of(watch.weights)[0] == method.ranks()["2"] < 8
    expected = low_rank_weight(new_model()[2].weight, energy=0.7)
    torch.testing.assert_close(watch.weights[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_decomposed_in_float32(data, dtype):
    model = new_model().to(dtype)
    expected = low_rank_weight(model[2].weight.float(), energy=0.7).to(dtype)
    method = TrainedRankPruning(energy=0.7, nuclear_weight=0.1)
    step = TrainingStep(model, no_loss, [method])
    step.backward(step(data[0].to(dtype), data[1]))
    torch.testing.assert_close(model[2].weight.detach(), expected)
    assert model[2].weight.grad.dtype == dtype
    thin = step.finish()
    assert thin[2][0].weight.dtype == dtype
    assert thin[2][0].out_channels == method.ranks()["2"]


# Composition, resumption, other loops


class OwnGradients(Method):
    """Takes over the backward pass, as gradient surgery does."""

    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


class Noise(Method):
    """Adds a term, and noise from the run's generator."""

    def terms(self, state):
        noise = torch.randn((), generator=state.local_generator)
        return {"noise": (state.outputs * noise).square().mean()}


def test_it_composes_with_methods_that_add_terms_and_take_the_backward_pass(data):
    models = []
    for more in ([Noise()], [Noise(), OwnGradients()]):
        method = TrainedRankPruning(every=2, energy=0.7, nuclear_weight=0.1, decompose=False)
        run = fit(new_model(), data, F.cross_entropy, [method, *more], budget=Budget(steps=5), optimizer=SGD)
        assert sorted(run.history[-1].terms) == ["cross_entropy", "noise"]
        models.append(run.model)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_composes_with_distillation(data):
    """The student's forward pass sees projected weights, whatever else the loss asks of it."""
    from coloss.distillation import LogitDistillation

    method, watch = TrainedRankPruning(every=2, energy=0.6), Watch()
    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        [LogitDistillation(new_model()), method, watch],
        budget=Budget(steps=4),
        optimizer=SGD,
    )
    assert len(run.history[-1].terms) == 2
    assert ranks_of(watch.weights)[2] == dict(method.rank_history)[2]["2"] < 8
    assert isinstance(run.model[2], nn.Sequential)


class Killed(RuntimeError):
    pass


class Kill(Method):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_step(self, state):
        if state.step == self.at:
            raise Killed


def train_with_checkpoints(data, *more, **options):
    method = TrainedRankPruning(every=3, energy=0.7, nuclear_weight=0.1, project_momentum=True)
    methods = [method, Noise(), *more]
    run = fit(
        new_model(),
        data,
        F.cross_entropy,
        methods,
        budget=Budget(steps=8),
        optimizer=SGD,
        batch_size=24,
        **options,
    )
    return run.model.state_dict(), method.rank_history


@pytest.fixture(scope="module")
def uninterrupted(data):
    return train_with_checkpoints(data)


@pytest.mark.parametrize("at", [4, 5, 6])
def test_killed_at_any_phase_and_resumed_ends_bit_identically(data, tmp_path, uninterrupted, at):
    """Killed in step `at`, it goes on before that step: on a projection step, one after it, two after it."""
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        train_with_checkpoints(data, Kill(at), **options)
    again, history_again = train_with_checkpoints(data, Kill(99), resume=True, **options)
    weights, history = uninterrupted
    assert history_again == history
    assert len(history) >= 2
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_plain_loop_and_lightning_reach_the_weights_of_fit(data):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters())

    def method():
        return TrainedRankPruning(every=2, energy=0.6, nuclear_weight=0.1)

    def model():
        built = new_model()
        built[6] = nn.Identity()
        return built

    loader = DataLoader(TensorDataset(*data), batch_size=16)
    fitted = fit(model(), loader, F.cross_entropy, [method()], budget=Budget(epochs=1), optimizer=SGD).model

    step = TrainingStep(model(), F.cross_entropy, [method()])
    optimizer = SGD(step.trainable)
    for inputs, targets in loader:
        optimizer.zero_grad()
        step.backward(step(inputs, targets))
        optimizer.step()
        step.after_step()
    plain = step.finish()

    module = Module(model())
    lightning.Trainer(
        max_epochs=1, callbacks=[coloss.MethodCallback([method()])], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    ).fit(module, loader)  # fmt: skip
    assert isinstance(fitted[2], nn.Sequential)
    for other in (plain, module.model):
        assert other.state_dict().keys() == fitted.state_dict().keys()
        for one, two in zip(fitted.parameters(), other.parameters()):
            torch.testing.assert_close(one, two)


def test_two_processes_stay_equal_and_do_what_one_does(tmp_path):
    def train(fabric):
        """Weights and ranks after ten steps; no batch statistics, so splitting changes nothing."""
        torch.manual_seed(0)
        images, targets = torch.randn(64, 1, 6, 6, dtype=torch.float64), torch.randint(3, (64,))
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 3),
        ).double()
        method = TrainedRankPruning(
            every=3, energy=0.8, nuclear_weight=0.1, project_momentum=True, decompose=False
        )
        run = coloss.fit(
            model,
            (images, targets),
            F.cross_entropy,
            [method],
            budget=coloss.Budget(steps=10),
            batch_size=16,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            fabric=fabric,
        )
        ranks = torch.tensor([[step, *ranks.values()] for step, ranks in method.rank_history])
        assert len(ranks) >= 3
        return {**run.model.state_dict(), "ranks": ranks}

    check_two_processes(train, tmp_path)


# The lab


def test_the_lab_builds_it_from_what_a_person_types(tmp_path):
    arms = ["cross-entropy", "trp", "trp:energy=0.5:every=2:scheme=channel:nuclear_weight=0"]
    for task in ("iris", "digits"):
        result = Comparison(task, arms, seeds=1, budget=Budget(steps=4)).run(tmp_path / task)
        plain, _, thin = (trial.cost.parameters for trial in result.trials)
        assert thin < plain


def test_the_claim_runs():
    found = verify("trp", smoke=True, seeds=1)
    assert set(found["arms"]) == {"plain", "trp", "nuclear norm only"}
    for arm in found["arms"].values():
        shares = (
            "accuracy",
            "accuracy_at_rank_8",
            "accuracy_at_rank_8_norms_refreshed",
            "multiply_adds_share_at_rank_8",
        )
        assert all(0 <= value <= 1 for name in shares for value in arm["metrics"][name]["values"])
    # By hand: 64 positions of the first layer; 16 and 4 of the two that are cut from 32 * 288 to 8 * (288 + 32); the head.
    dense, cut = (64 * 9 * 32 + 20 * layer + 320 for layer in (32 * 288, 8 * (288 + 32)))
    share = found["arms"]["plain"]["metrics"]["multiply_adds_share_at_rank_8"]["mean"]
    assert share == pytest.approx(cut / dense)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\], got 1.1"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"nuclear_weight": -1.0}, "nuclear_weight must be >= 0, got -1"),
        ({"nuclear_weight": float("nan")}, "nuclear_weight must be >= 0, got nan"),
        ({"project": False}, "decompose=True needs project and final_projection: say decompose=False"),
        ({"final_projection": False}, "decompose=True needs project and final_projection"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        TrainedRankPruning(**options)


def test_models_that_cannot_be_pruned_are_refused(data):
    def begin(model, **options):
        return TrainingStep(model, F.cross_entropy, [TrainedRankPruning(**options)])

    with pytest.raises(InputError, match="Linear has no layer to keep low-rank"):
        begin(nn.Linear(3, 3))
    with pytest.raises(InputError, match="layers must be paths of the model, got 'stem'"):
        begin(new_model(), layers=["2", "stem"])
    with pytest.raises(
        InputError, match="layer '8' cannot be factorised: scheme must be \"channel\" for nn.Linear"
    ):
        begin(new_model(), layers="8", scheme="spatial")
    frozen = new_model()
    frozen[2].requires_grad_(False)
    with pytest.raises(InputError, match="layers must be trainable to be kept low-rank, got frozen 2"):
        begin(frozen, layers="2")
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8))
    with pytest.raises(InputError, match=r"layer '0.linear1' cannot be replaced.*decompose=False"):
        begin(encoder, layers="0")
    begin(encoder, layers="0", decompose=False)
    with pytest.raises(InputError, match="layers must lie inside the model, got the model itself"):
        begin(nn.Linear(4, 4), layers="")
    step = begin(frozen, energy=0.5)
    before = frozen[2].weight.clone()
    step(*data)
    assert torch.equal(frozen[2].weight, before)
    assert list(step.state.methods[0].ranks()) == ["4"]
    frozen[4].requires_grad_(False)
    with pytest.raises(InputError, match="got frozen 2, 4"):
        begin(frozen)


def test_broken_and_sharded_weights_are_named(data):
    model = new_model()
    step = TrainingStep(model, F.cross_entropy, [TrainedRankPruning()])
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="weight 4 is not finite at step 0"):
        step(*data)
    model[2].weight = nn.Parameter(model[2].weight.detach().flatten()[:100])
    step.state.step = 20
    with pytest.raises(InputError, match="the weight of 2 is sharded: low rank needs whole weights"):
        step(*data)
