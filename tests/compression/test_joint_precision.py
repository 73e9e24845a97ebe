"""Joint training: an update after every precision, rates by hand, and what every method promises."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from contract import SGD, check_resume, check_two_processes, differing, weights
from torch import nn

import coloss
from coloss import Budget, TrainingStep
from coloss.compression import (
    DoubleRounding,
    JointPrecisionStep,
    ScaleAdam,
    adaptive_scale_rate,
    compress_model,
    double_rounding,
    load_compressed,
    make_switchable,
    set_bits,
)
from coloss.data import Batch, load
from coloss.errors import InputError
from coloss.nn import MLP, CausalLanguageModel, Classifier, ConvNet, next_token_loss
from coloss.train import Method, NonFiniteLossError, Setting, State

CE = nn.functional.cross_entropy


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def table(rows: int = 32, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return inputs, (inputs[:, 0] > 0).long()


def test_a_batch_takes_a_step_after_every_precision():
    """A plain loop over precisions, written out, ends where the method does."""
    inputs, targets = table()
    model, twin = small(), small()
    method = DoubleRounding((8, 4, 2), activations=False, scale_rate=0.01)
    run = coloss.fit(
        model, [(inputs, targets)] * 3, CE, [method], budget=Budget(steps=3), optimizer=SGD, log_every=1
    )
    make_switchable(twin, (8, 4, 2))
    scales = ScaleAdam(twin)
    optimizer = SGD([p for p in twin.parameters() if p.ndim])
    for _ in range(3):
        for bits in (8, 4, 2):
            set_bits(twin, bits)
            optimizer.zero_grad()
            scale = twin[2].weight_quantizer.log_scale
            scale.grad = None
            CE(twin(inputs), targets).backward()
            own = scale.grad / scale.detach().exp()
            optimizer.step()
            scales.step({id(scale): scale.grad}, {bits: adaptive_scale_rate([own], 0.01, 8, bits)})
    set_bits(twin, 8)
    twin.eval()
    assert torch.equal(run.model.eval()(inputs), twin(inputs))
    assert {"loss_at_8_bits", "loss_at_2_bits", "scale_rate_at_4_bits"} <= run.history[0].metrics.keys()


def test_the_step_of_a_loop_of_ones_own_is_the_same():
    inputs, targets = table()
    model, twin = small(), small()
    method = DoubleRounding((8, 2), activations=False, scale_rate=5e-3)
    run = coloss.fit(model, [(inputs, targets)] * 3, CE, [method], budget=Budget(steps=3), optimizer=SGD)
    make_switchable(twin, (8, 2))
    step = JointPrecisionStep(twin, CE, SGD(twin.parameters()))
    losses = [step(inputs, targets) for _ in range(3)]
    assert list(losses[0]) == [8, 2] and losses[-1][8] < losses[0][8]
    assert torch.equal(run.model.eval()(inputs), twin.eval()(inputs))
    with pytest.raises(InputError, match="bits must be among"):
        JointPrecisionStep(twin, CE, SGD(twin.parameters()), bits=(8, 4))
    with pytest.raises(NonFiniteLossError, match="the loss is nan at 8 bits"):
        step(inputs * torch.nan, targets)


@pytest.mark.parametrize("activations", [False, True])
def test_the_shipped_model_the_file_and_training_agree(tmp_path, activations: bool):
    torch.manual_seed(0)
    model = Classifier(ConvNet(1, (4, 8, 8)), 2)
    x = torch.rand(32, 1, 6, 6)
    data = (x, (x.mean((1, 2, 3)) > 0.5).long())
    seen: dict[str, torch.Tensor] = {}

    class Look(DoubleRounding):
        def finish(self, state: State) -> None:
            set_bits(state.model, 4)
            seen["outputs"] = state.model.eval()(x).detach()
            super().finish(state)

    method = Look(ship_bits=4, activations=activations)
    run = coloss.fit(model, data, CE, [method], budget=Budget(steps=3), batch_size=16)
    assert torch.equal(run.model(x), seen["outputs"])
    assert {type(m) for m in run.model.modules()} == {
        type(m) for m in Classifier(ConvNet(1, (4,)), 2).modules()
    }
    fresh = Classifier(ConvNet(1, (4, 8, 8)), 2)
    again = method.artefact.set_bits(4).load_into(fresh, activations=activations).eval()
    assert torch.equal(again(x), seen["outputs"])
    given = method.stored_weights(run.model)
    compressed = compress_model(run.model, given)
    back = load_compressed(compressed.save(tmp_path / "m.coloss"))
    plain = back.load_into(Classifier(ConvNet(1, (4, 8, 8)), 2)).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), run.model.state_dict().values())
    )
    assert compressed.weights["backbone.stages.2.0.weight"].nbytes <= 8 * 8 * 9 // 2 + 4


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    make = partial(DoubleRounding, (8, 4, 2), distill=True, sensitivity={"2": 1.0}, sigma=1.0)
    check_resume(small, make, table(), tmp_path, CE)


def test_two_processes_take_the_steps_of_one(tmp_path):
    data = table(16, torch.float64)

    def train(fabric):
        model = small().double()
        run = coloss.fit(
            model,
            data,
            CE,
            [DoubleRounding((8, 2))],
            budget=Budget(steps=3),
            batch_size=8,
            optimizer=SGD,
            fabric=fabric,
        )
        return {n: v for n, v in run.model.state_dict().items() if isinstance(v, torch.Tensor)}

    check_two_processes(train, tmp_path)


def test_a_plain_loop_and_lightning_take_the_steps_of_fit():
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    batches = [tuple(part[i : i + 8] for part in table()) for i in range(0, 32, 8)]
    make = partial(DoubleRounding, (8, 2), scale_rate=0.01)
    fitted = coloss.fit(small(), batches, CE, [make()], budget=Budget(epochs=1), optimizer=SGD).model

    step = TrainingStep(small(), CE, [make()])
    with pytest.raises(InputError, match=r"set state\.optimizer"):
        step.backward(step(Batch.of(batches[0])))
    step = TrainingStep(small(), CE, [make()])
    optimizer = step.state.optimizer = SGD(step.trainable)
    for batch in batches:
        optimizer.zero_grad()
        step.backward(step(Batch.of(batch)))
        optimizer.step()
        step.after_step()
    assert not differing(weights(fitted), weights(step.finish()))

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def training_step(self, batch, index):
            return self.model(batch[0]).sum()

        def configure_optimizers(self):
            return SGD(list(self.parameters()))

    module = Module()
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callback = coloss.MethodCallback([make(objective=CE)])
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[callback], **off)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert not differing(weights(fitted), weights(module.model))


def test_terms_of_another_method_count_at_every_precision():
    calls = []

    class Pull(Method):
        def terms(self, state: State):
            calls.append(state.model[2].bits)
            return {"pull": state.outputs.square().mean()}

        def on_gradients(self, state: State) -> None:
            calls.append("edit")

    coloss.fit(
        small(), [table()], CE, [DoubleRounding((8, 4)), Pull()], budget=Budget(steps=1), optimizer=SGD
    )
    assert calls == [8, "edit", 4, "edit"]


def test_with_distillation_lower_precisions_see_no_targets():
    inputs, targets = table()
    seen = []

    def loss(outputs, targets):
        seen.append(1)
        return CE(outputs, targets)

    method = DoubleRounding((8, 4, 2), distill=True)
    coloss.fit(small(), [(inputs, targets)], loss, [method], budget=Budget(steps=2))
    assert len(seen) == 2


def test_layers_drift_to_precisions_of_their_own():
    model = MLP(4, (8, 8, 8), 2)
    drawn = []

    class Look(DoubleRounding):
        def _precisions(self, state: State):
            plan = super()._precisions(state)
            drawn.append(plan)
            return plan

    paths = {"layers.3": 5.0, "layers.6": 1.0}
    method = Look((8, 4, 2), sensitivity=paths, sigma=1.0, ship_bits={"layers.3": 8, "layers.6": 2})
    run = coloss.fit(model, table(64), CE, [method], budget=Budget(steps=8), batch_size=8)
    assert all(plan[0] == ("at_8_bits", 8) and plan[2] == ("at_2_bits", 2) for plan in drawn)
    assert drawn[0][1][1] == dict.fromkeys(paths, 4)
    assert len({tuple(plan[1][1].values()) for plan in drawn}) > 3
    assert run.model.layers[6].weight.unique().numel() <= 4 < run.model.layers[3].weight.unique().numel()
    with pytest.raises(InputError, match="sensitivity must name the switchable layers"):
        TrainingStep(MLP(4, (8, 8, 8), 2), CE, [DoubleRounding(sensitivity={"layers.0": 1.0})])


def test_a_language_model_is_switched():
    torch.manual_seed(0)
    model = CausalLanguageModel(11, 16, 1, 2, context=8)
    ids = torch.randint(11, (16, 8))
    method = DoubleRounding((8, 4), layers="transformer.blocks")
    run = coloss.fit(model, (ids, ids), next_token_loss, [method], budget=Budget(steps=2), batch_size=8)
    fresh = CausalLanguageModel(11, 16, 1, 2, context=8)
    again = method.artefact.load_into(fresh, activations=True).eval()
    assert torch.equal(again(ids), run.model.eval()(ids))
    signs = method.artefact.compressed.notes["double_rounding"]["activations"]
    assert any(signed for steps in signs.values() for _, signed in steps.values())


def test_half_precision_runs_learn_and_stay_equal():
    from lightning_fabric import Fabric

    model, (inputs, targets) = small(), table(64)
    before = copy.deepcopy(model[2].weight.detach())
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        model,
        (inputs, targets),
        CE,
        [DoubleRounding((8, 2))],
        budget=Budget(steps=20),
        fabric=fabric,
        batch_size=32,
    )
    losses = [point.metrics["loss_at_2_bits"] for point in run.history]
    assert losses[-1] < losses[0] and not torch.equal(run.model[2].weight, before)


def test_scales_learn_in_runs_whose_weights_are_in_half_precision():
    from lightning_fabric import Fabric

    model = small()
    before = nn.Sequential(*copy.deepcopy(model))
    make_switchable(before, (8, 2))
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    moved = []

    class Look(DoubleRounding):
        def finish(self, state: State) -> None:
            scale = state.model[2].weight_quantizer.log_scale
            moved.append((scale.dtype, scale.item()))
            super().finish(state)

    coloss.fit(model, [table()], CE, [Look((8, 2), scale_rate=5e-3)], budget=Budget(steps=4), fabric=fabric)
    ((dtype, value),) = moved
    assert dtype == torch.float32
    assert 1e-3 < abs(value - before[2].weight_quantizer.log_scale.item()) < 0.04


class Unused(nn.Module):
    """Its forward pass leaves one of its layers out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.unused, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)).relu())


def test_a_layer_that_never_ran_does_not_lose_the_run():
    method = DoubleRounding((8, 2), ship_bits=2)
    run = coloss.fit(Unused(), [table()], CE, [method], budget=Budget(steps=1))
    assert not run.model.unused._forward_pre_hooks and len(run.model.inner._forward_pre_hooks) == 1
    again = method.artefact.load_into(Unused(), activations=True).eval()
    assert torch.equal(again(table()[0]), run.model.eval()(table()[0]))


def test_a_bad_batch_leaves_weights_and_scales_for_the_next():
    model = small()
    make_switchable(model, (8, 2), activations=True)
    before = weights(model)
    step = JointPrecisionStep(model, CE, SGD(model.parameters()))
    inputs, targets = table()
    with pytest.raises(NonFiniteLossError):
        step(inputs * torch.nan, targets)
    assert not differing(before, weights(model))
    assert all(math.isfinite(loss) for loss in step(inputs, targets).values())


def test_distillation_needs_logits_and_a_teacher_of_the_highest_precision():
    model = small()
    make_switchable(model, (8, 2))
    with pytest.raises(InputError, match="bits must begin with the highest"):
        JointPrecisionStep(model, CE, SGD(model.parameters()), bits=(2, 8), distill=True)
    model[4] = nn.Linear(8, 1)
    before = weights(model)
    mse = nn.functional.mse_loss
    step = JointPrecisionStep(model, mse, SGD(model.parameters()), distill=True)
    data = table()[0], torch.ones(32, 1)
    with pytest.raises(InputError, match="needs logits of two classes or more"):
        step(*data)
    assert not differing(before, weights(model))
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.raises(InputError, match="needs logits of two classes or more"):
        coloss.fit(plain, [data], mse, [DoubleRounding((8, 2), distill=True)], budget=Budget(steps=1))


@pytest.mark.parametrize(
    "options", [{"independent": True}, {"rounding": "middle"}, {"alrs": "literal"}, {"alrs": False}]
)
def test_options_reach_the_shipped_weights(options):
    inputs, targets = table()
    method = DoubleRounding((8, 2), ship_bits=2, activations=False, scale_rate=0.01, **options)
    run = coloss.fit(
        small(), [(inputs, targets)] * 2, CE, [method], budget=Budget(steps=2), optimizer=SGD, log_every=1
    )
    twin = small()
    make_switchable(twin, (8, 2), **{k: v for k, v in options.items() if k != "alrs"})
    step = JointPrecisionStep(
        twin, CE, SGD(twin.parameters()), scale_rate=0.01, alrs=options.get("alrs", True)
    )
    for _ in range(2):
        step(inputs, targets)
    set_bits(twin, 2)
    assert torch.equal(run.model.eval()(inputs), twin.eval()(inputs))
    assert (method.artefact is None) == bool(options.get("independent"))
    values = set(run.model[2].weight.unique().tolist())
    assert len(values) <= 4 and (0.0 in values) == (options.get("rounding") != "middle")
    rate = run.history[0].metrics["scale_rate_at_2_bits"]
    if "alrs" in options:
        assert rate == pytest.approx(0.0 if options["alrs"] == "literal" else 0.01)


def test_weight_decay_of_the_optimizer_leaves_scales_alone():
    model = small()
    make_switchable(model, (8, 2))
    scale = model[2].weight_quantizer.log_scale
    before = scale.item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    JointPrecisionStep(model, CE, optimizer, scale_rate=1e-9)(*table())
    assert scale.item() == pytest.approx(before, abs=1e-6)


def test_bad_options_are_named(as_users_call):
    for options, message in (
        ({"ship_bits": 3}, "ship_bits must be among"),
        ({"scale_rate": 0.0}, "scale_rate must be > 0, got 0.0"),
        ({"sigma": 2.0}, "sigma must be in"),
        ({"rounding": "up"}, "rounding must be"),
    ):
        with pytest.raises(ValueError, match=message):
            DoubleRounding(**options)
    model = small()
    make_switchable(model)
    with pytest.raises(InputError, match="switchable already"):
        TrainingStep(model, CE, [DoubleRounding()])
    with pytest.raises(NonFiniteLossError):
        coloss.fit(
            small(), (table()[0] * math.inf, table()[1]), CE, [DoubleRounding()], budget=Budget(steps=1)
        )


def test_the_claim_runs():
    found = double_rounding._trial(
        Setting.of(
            replace(
                double_rounding.CLAIM.task,
                load=lambda seed: load("digits", seed=seed, limit=60),
                model=lambda splits: Classifier(ConvNet(1, (8, 16)), splits.num_classes),
            ),
            0,
            Budget(steps=1),
            True,
        )
    )
    names = {f"accuracy_at_{bits}_bits" for bits in (8, 6, 4, 2)} | {"bytes", "dense_accuracy"}
    assert all(set(metrics) == names for metrics in found.values())
    assert found["second rounding"]["bytes"] == found["bits cut off"]["bytes"]
    assert found["trained jointly"]["bytes"] < found["trained separately"]["bytes"] / 2
