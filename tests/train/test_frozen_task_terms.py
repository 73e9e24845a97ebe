"""Terms through frozen networks in runs: loops, resumption, processes, caches, every k-th step, strengths."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, differing, weights
from torch import nn

import coloss
from coloss import Budget
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import FrozenTaskLoss
from coloss.train import (
    FrozenTaskTerms,
    State,
    TeacherTable,
    TrainingStep,
    cache_teacher,
    gradient_norms,
    matched_weights,
)


def new_model():
    torch.manual_seed(0)
    return nn.Conv2d(1, 1, 3, padding=1)


def new_network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh())


def new_method(**options):
    return FrozenTaskTerms({"seen": FrozenTaskLoss(new_network(), F.mse_loss, weight=2.0)}, **options)


def data(samples=16):
    generator = torch.Generator().manual_seed(0)
    return IndexedDataset(*torch.rand(2, samples, 1, 5, 5, generator=generator).unbind(0))


def batches():
    return [(part.inputs, part.targets) for part in (data().take(torch.arange(k, k + 8)) for k in (0, 8))]


def run(method, model=None, **options):
    model = model or new_model()
    methods = [method] if method is not None else []
    options = {"budget": Budget(steps=4), "batch_size": 8, "optimizer": SGD, "log_every": 1} | options
    return coloss.fit(model, data(), F.l1_loss, methods, **options)


def test_every_loop_takes_the_same_steps_and_the_network_stays_outside():
    shipped = check_loops(new_model, new_method, batches(), F.l1_loss, epochs=1)
    assert set(shipped.state_dict()) == {"weight", "bias"}
    method = new_method()
    assert not list(method.parameters())
    assert not list(method.buffers())
    step = TrainingStep(new_model(), F.l1_loss, [method])
    assert len(step.trainable) == 2
    assert not any("conv" in name or "losses" in name for name in step.state_dict())


def test_a_killed_run_is_resumed_to_the_bit_and_another_network_is_refused(tmp_path):
    check_resume(
        new_model,
        lambda: new_method(every=2),
        data(),
        tmp_path,
        F.l1_loss,
        steps=6,
        kill_at=5,
        checkpoint_every=2,
    )
    other = FrozenTaskTerms({"seen": FrozenTaskLoss(new_network(2), F.mse_loss)})
    with pytest.raises(InputError, match="the frozen network of seen is another one"):
        run(other, checkpoint_dir=tmp_path, resume=True)


def test_two_processes_take_the_steps_of_one(tmp_path):
    def train(fabric):
        torch.manual_seed(0)
        loss = FrozenTaskLoss(new_network().double(), F.mse_loss)
        found = coloss.fit(
            new_model().double(),
            IndexedDataset(data().inputs.double(), data().targets.double()),
            F.mse_loss,
            [FrozenTaskTerms({"seen": loss})],
            budget=Budget(steps=3),
            batch_size=8,
            optimizer=SGD,
            fabric=fabric,
        )
        return weights(found.model)

    check_two_processes(train, tmp_path)


def test_weight_zero_is_training_without_the_method_to_the_bit():
    plain = run(None)
    for method in (new_method(weights={"seen": 0.0}), new_method(weights={"seen": lambda progress: 0.0})):
        network = method.losses["seen"].network
        network.register_forward_hook(lambda *_: pytest.fail("the network ran"))
        assert not differing(weights(plain.model), weights(run(method).model))


def test_the_term_is_the_loss_of_outputs_and_targets_and_changes_the_steps():
    method, model = new_method(), new_model()
    step = TrainingStep(model, F.l1_loss, [method])
    inputs, targets = batches()[0]
    terms = step(inputs, targets)
    expected = method.losses["seen"].unweighted(model(inputs), targets)
    torch.testing.assert_close(terms["seen"], expected)
    total = step.combine(step.state, terms)
    torch.testing.assert_close(total, F.l1_loss(model(inputs), targets) + 2 * expected)
    assert differing(weights(run(None).model), weights(run(new_method()).model))


def test_the_networks_parameters_and_statistics_are_bit_identical_after_a_run():
    method = new_method()
    before = weights(method.losses["seen"].network)
    run(method)
    assert not differing(before, weights(method.losses["seen"].network))


def test_every_other_step_is_twice_as_strong_and_free_between():
    method, passes = new_method(every=2), []
    method.losses["seen"].network.register_forward_hook(lambda *_: passes.append(1))
    found = run(
        method, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), budget=Budget(steps=4)
    )
    values = [point.terms["seen"] for point in found.history]
    assert [value > 0 for value in values] == [True, False, True, False]
    assert len(passes) == 2 * 2  # prediction and truth
    every = run(
        new_method(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), budget=Budget(steps=1)
    )
    assert values[0] == pytest.approx(2 * every.history[0].terms["seen"])


def test_cached_targets_give_the_same_run_with_half_the_passes_and_stale_ones_are_refused():
    plain, method = run(new_method()), new_method()
    passes = []
    network = method.losses["seen"].network
    table = cache_teacher(network, IndexedDataset(data().targets, ids=data().ids))
    network.register_forward_hook(lambda *_: passes.append(1))
    cached = FrozenTaskTerms(method.losses, cached={"seen": table})
    found = run(cached)
    assert len(passes) == 4
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value)

    class Cropped(coloss.Method):
        def on_batch(self, state):
            state.batch.targets = state.batch.targets.flip(3)

    with pytest.raises(InputError, match="cached outputs of 'seen'"):
        coloss.fit(new_model(), data(), F.l1_loss, [Cropped(), cached], budget=Budget(steps=1), batch_size=8)


def test_cached_outputs_of_another_network_are_refused():
    table = cache_teacher(new_network(2), IndexedDataset(data().targets, ids=data().ids))
    with pytest.raises(InputError, match="teacher .* stored, .* wanted"):
        new_method(cached={"seen": table})
    # Of a table of any origin nothing is known.
    new_method(cached={"seen": TeacherTable.of(torch.zeros(16, 2, 3, 3))})


def test_strengths_are_reported_beside_the_objectives():
    found = run(new_method(measure_every=2), budget=Budget(steps=3))
    reported = [point.metrics.get("seen_gradient_ratio") for point in found.history]
    assert [value is not None for value in reported] == [True, False, True]
    model, method = new_model(), new_method()
    batch = data().take(torch.arange(8))
    outputs = model(batch.inputs)
    norms = gradient_norms(
        {
            "objective": F.l1_loss(outputs, batch.targets),
            "seen": 2 * method.losses["seen"].unweighted(outputs, batch.targets),
        },
        outputs,
    )
    step = TrainingStep(model, F.l1_loss, [new_method(measure_every=1)])
    step(batch.inputs, batch.targets)
    assert step.state.logged["seen_gradient_ratio"][0] == pytest.approx(norms["seen"] / norms["objective"])


def test_strengths_are_measured_where_the_prediction_is_made_of_the_outputs():
    inputs, targets = batches()[0]

    def ratio(**options):
        step = TrainingStep(new_model(), F.l1_loss, [new_method(measure_every=1, **options)])
        step(inputs, targets)
        return step.state.logged["seen_gradient_ratio"][0]

    whole = ratio()
    assert ratio(prediction=lambda out: out.clamp(-100, 100)) == pytest.approx(whole)
    assert ratio(prediction=lambda out: out[:, :, 1:], truth=lambda truth: truth[:, :, 1:]) > 0


def test_without_a_gradient_of_the_objective_there_is_no_strength():
    step = TrainingStep(new_model(), lambda out, _: 0 * out.sum(), [new_method(measure_every=1)])
    step(*batches()[0])
    assert math.isnan(step.state.logged["seen_gradient_ratio"][0])


def test_strengths_are_means_over_steps_where_terms_are_computed_at_some():
    still = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        "budget": Budget(steps=5),
        "batch_size": 16,
    }
    reported = [
        [point.metrics.get("seen_gradient_ratio") for point in run(new_method(**options), **still).history]
        for options in ({"measure_every": 1}, {"every": 2, "measure_every": 1})
    ]
    every, some = reported
    assert [value is not None for value in some] == [True, False, True, False, True]
    assert [some[0], some[2], some[4]] == pytest.approx([every[0], every[2], every[4]], rel=1e-4)


def test_after_the_run_the_networks_are_where_they_came_from(monkeypatch):
    method, moves = new_method(), []
    monkeypatch.setattr(method.losses["seen"], "to", moves.append)
    step = TrainingStep(new_model(), F.l1_loss, [method])
    step.to("meta")
    step.finish()
    assert [str(device) for device in moves] == ["cpu", "meta", "cpu"]


def test_matched_weights_make_terms_as_strong_as_asked():
    model, losses = new_model(), new_method().losses
    outputs, truth = model(data().inputs), data().targets
    objective = F.l1_loss(outputs, truth)
    found = matched_weights(losses, outputs, truth, objective, ratio=3.0)
    norms = gradient_norms(
        {"objective": objective, "seen": found["seen"] * losses["seen"].unweighted(outputs, truth)}, outputs
    )
    assert norms["seen"] == pytest.approx(3 * norms["objective"], rel=1e-5)
    nothing = {"none": FrozenTaskLoss(nn.Identity(), lambda x, y: 0 * (x - y).sum())}
    with pytest.raises(InputError, match="the term none must have a gradient on the prediction, got none"):
        matched_weights(nothing, outputs, truth, objective)


def test_it_reads_a_part_of_outputs_and_targets_boxes_and_composes_with_itself():
    losses = {"cut": FrozenTaskLoss(nn.Identity(), F.mse_loss, crop_size=(2, 2))}
    cut = FrozenTaskTerms(
        losses, boxes="box", prediction=lambda out: out[0], truth=lambda target: target["x"]
    )

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = new_model()

        def forward(self, x):
            return self.layer(x), x

    step = TrainingStep(
        Two(),
        lambda outputs, targets: outputs[0].mean(),
        [
            cut,
            FrozenTaskTerms(
                {"seen": FrozenTaskLoss(new_network(), F.mse_loss)},
                prediction=lambda out: out[0],
                truth=lambda t: t["x"],
            ),
        ],
    )
    inputs, targets = batches()[0]
    batch = {"inputs": inputs, "targets": {"x": targets}, "box": torch.tensor([[1.0, 1, 3, 3]]).repeat(8, 1)}
    terms = step(batch)
    expected = F.mse_loss(step.model(inputs)[0][..., 1:3, 1:3], targets[..., 1:3, 1:3])
    torch.testing.assert_close(terms["cut"], expected)
    assert set(terms) == {"objective", "cut", "seen"}
    with pytest.raises(InputError, match="batch.extras must hold 'box'"):
        step({"inputs": inputs, "targets": {"x": targets}})


def test_the_networks_follow_to_a_device_but_keep_their_precision():
    method = new_method()
    method.to(torch.float64)
    assert method.losses["seen"].network[0].weight.dtype == torch.float32
    method.to("meta")
    assert method.losses["seen"].network[0].weight.device.type == "meta"


def test_bad_input_is_named():
    loss = FrozenTaskLoss(nn.Identity(), F.mse_loss)
    table = cache_teacher(nn.Identity(), IndexedDataset(torch.rand(2, 3)))
    shaped = FrozenTaskLoss(nn.Identity(), F.mse_loss, preprocess=lambda x: x)
    for call, message in (
        (lambda: FrozenTaskTerms({}), "losses must hold at least one, got none"),
        (
            lambda: FrozenTaskTerms({"a": loss}, weights={"b": 1.0}),
            "weights must be of the losses a, got 'b'",
        ),
        (
            lambda: FrozenTaskTerms({"a": loss}, weights={"a": -1.0}),
            "the weight of a must be >= 0 and finite",
        ),
        (
            lambda: FrozenTaskTerms({"a": loss}, cached={"b": table}),
            "cached must be of the losses a, got 'b'",
        ),
        (lambda: FrozenTaskTerms({"a": shaped}, cached={"a": table}), "has a preprocess"),
        (lambda: FrozenTaskTerms({"a": loss}, cached={"a": table}, boxes="box"), "give one of the two"),
        (lambda: FrozenTaskTerms({"a": loss}, every=0), "every must be >= 1, got 0"),
        (lambda: FrozenTaskTerms({"a": loss}, measure_every=-1), "measure_every must be >= 0, got -1"),
        (
            lambda: matched_weights({"a": loss}, torch.ones(1), torch.ones(1), torch.ones(()), 0.0),
            "ratio must be > 0",
        ),
        (
            lambda: matched_weights({"a": loss}, torch.ones(1), torch.ones(1), torch.ones(())),
            "objective must have a gradient",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
    model = new_model()
    with pytest.raises(InputError, match="must not share parameters with the model"):
        FrozenTaskTerms({"a": FrozenTaskLoss(model, F.mse_loss)}).setup(State(model))
