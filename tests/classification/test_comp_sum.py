import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import CompSumObjective, comp_sum_loss, projected_gradient_attack, robust_accuracy
from coloss.classification.comp_sum import SYSTEM
from coloss.data import load
from coloss.errors import InputError
from coloss.lab import find_entry, verify
from coloss.lab.arms import build_arm, parse_arm
from coloss.lab.catalog import import_name
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = Budget(steps=6)


def new_model() -> Classifier:
    return Classifier(MLP(6, [5], norm="batch", dropout=0.2), 4)


def new_batches(count: int = 6, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(4, (rows,))) for _ in range(count)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Smoothness(Method):
    """A second source of loss, which reads a tapped feature and the outputs after the attack has run."""

    seen: Tensor

    def setup(self, state: coloss.State) -> None:
        state.tap("hidden", "backbone")

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        self.seen = state.features["hidden"]
        return {"smoothness": state.outputs.square().mean()}


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


def test_the_objective_is_replaced_or_added_to() -> None:
    model, batch = new_model().eval(), new_batches(1)[0]
    expected = comp_sum_loss(model(batch[0]), batch[1], tau=1.6, rho=2.0)
    for replace, names in ((True, {"comp_sum"}), (False, {"comp_sum", "cross_entropy"})):
        method = CompSumObjective(1.6, rho=2.0, replace_objective=replace)
        terms = TrainingStep(model, F.cross_entropy, [method])(*batch)
        assert set(terms) == names
        torch.testing.assert_close(terms["comp_sum"], expected)


def test_warmup_moves_tau_from_cross_entropy_to_its_value() -> None:
    method = CompSumObjective(1.8, warmup=0.5)
    assert [method.tau_at(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [1, 1.4, 1.8, 1.8]
    )
    scheduled = CompSumObjective(lambda progress: 1 + progress)
    assert scheduled.tau_at(0.25) == 1.25
    model, batch = new_model().eval(), new_batches(1)[0]
    terms = TrainingStep(model, None, [method])(*batch)
    torch.testing.assert_close(terms["comp_sum"], F.cross_entropy(model(batch[0]), batch[1]))


def test_the_attack_leaves_no_trace_on_what_other_methods_see() -> None:
    smoothness, batch = Smoothness(), new_batches(1)[0]
    step = TrainingStep(
        new_model(), None, [CompSumObjective(1.0, eps=0.5, nu=0.3, steps=2), smoothness], total_steps=5
    )
    seen: list[Tensor] = []
    handle = step.model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    terms = step(*batch)
    handle.remove()
    assert len(seen) == 1 + 1 + 2 + 1  # clean, reference, two steps of the attack, attacked
    assert step.state.outputs is seen[0] and step.model.training
    torch.testing.assert_close(step.model.head(smoothness.seen), seen[0])
    assert set(terms) == {"comp_sum", "margin_shift", "smoothness"} and terms["margin_shift"] > 0
    total = step.combine(step.state, terms)
    torch.testing.assert_close(total, terms["comp_sum"] + 0.3 * terms["margin_shift"] + terms["smoothness"])
    step.backward(terms)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in step.model.parameters())


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    data, start = (torch.randn(64, 6), torch.randint(4, (64,))), new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        trained = copy.deepcopy(start)
        found = coloss.fit(
            trained,
            data,
            F.cross_entropy,
            [CompSumObjective(1.5, warmup=0.8, eps=0.2, steps=2), Smoothness(), Kill(kill_at)],
            batch_size=16,
            budget=Budget(steps=9),
            optimizer=SGD,
            **options,
        )
        assert set(found.history[-1].terms) == {"comp_sum", "margin_shift", "smoothness"}
        assert found.model is trained and not any(m._forward_hooks for m in trained.modules())
        return weights(trained)

    whole = run(kill_at=0)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        run(kill_at=7, **kept)
    assert same(whole, run(kill_at=0, resume=True, **kept))
    assert whole.keys() == weights(start).keys()


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer

    batches, initial = new_batches(), Classifier(MLP(6, [5], norm=None), 4)
    fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))
    coloss.fit(fitted, batches, F.cross_entropy, [CompSumObjective(1.5)], budget=STEPS, optimizer=SGD, seed=3)
    step = TrainingStep(looped, F.cross_entropy, [CompSumObjective(1.5)], total_steps=6)
    optimizer = SGD(step.trainable)
    for batch in batches:
        optimizer.zero_grad()
        step.backward(step(*batch))
        optimizer.step()
        step.after_step()
    step.finish()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = lit

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD([p for p in self.parameters() if p.requires_grad])

    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[coloss.MethodCallback([CompSumObjective(1.5)])],
    )
    trainer.fit(Module(), DataLoader(batches, batch_size=None))
    assert not same(weights(initial), weights(fitted))
    assert same(weights(fitted), weights(looped)) and same(weights(fitted), weights(lit))


def test_accumulated_micro_batches_take_the_steps_of_whole_batches() -> None:
    data, initial = (torch.randn(64, 6), torch.randint(4, (64,))), Classifier(MLP(6, [5], norm=None), 4)
    found = []
    for accumulate in (1, 4):
        model = copy.deepcopy(initial)
        options: dict[str, Any] = {"batch_size": 32 // accumulate, "accumulate": accumulate}
        coloss.fit(model, data, methods=[CompSumObjective(1.5)], budget=STEPS, optimizer=SGD, **options)
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_under_mixed_precision_the_loss_is_float32_and_reaches_every_parameter() -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = Classifier(MLP(6, [5]), 4)
    before = weights(model)
    method = CompSumObjective(1.5, eps=0.1, steps=2)
    run = coloss.fit(model, new_batches(), methods=[method], budget=STEPS, optimizer=SGD, fabric=fabric)
    assert method.tau_at(1.0) == 1.5 and run.steps == 6
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_adversarial_training_makes_digits_robust() -> None:
    splits = load("digits", seed=0)
    test = splits.test.all()
    attack = partial(projected_gradient_attack, eps=0.1, steps=10, bounds=(0.0, 1.0))
    shares = []
    for method in (CompSumObjective(1.0), CompSumObjective(1.0, eps=0.1, steps=2, nu=0.3, low=0.0, high=1.0)):
        torch.manual_seed(0)
        model = MLP(64, (64,), 10, norm=None)
        coloss.fit(
            model, splits.train, methods=[method], budget=Budget(epochs=5), optimizer=partial(SGD, lr=0.05)
        )
        shares.append(float(robust_accuracy(model, test.inputs, test.targets, attack)))
    assert shares[1] > shares[0] + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1.0}, "tau must be >= 0 and finite, got -1.0"),
        ({"rho": 0.0}, "rho must be > 0 and finite, got 0.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be >= 0 and finite, got -1.0"),
        ({"steps": 0, "eps": 0.1}, "steps must be >= 1, got 0"),
        ({"nu": -1.0}, "nu must be >= 0 and finite, or a schedule, got -1.0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"low": 0.0}, "low and high must both be given, or neither, got 0.0 and None"),
        ({"low": 1.0, "high": 0.0}, r"bounds must be \(low, high\)"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompSumObjective(**options)


def test_what_does_not_fit_is_named_at_the_first_step() -> None:
    inputs, targets = new_batches(1)[0]
    with pytest.raises(InputError, match="target must hold class numbers in"):
        TrainingStep(new_model(), None, [CompSumObjective()])(inputs, targets + 4)
    with pytest.raises(InputError, match="needs logits and targets as tensors, got Tensor and NoneType"):
        TrainingStep(new_model(), None, [CompSumObjective()])(inputs)
    with pytest.raises(InputError, match=r"an attack needs logits \(batch, classes\) and class numbers"):
        soft = F.one_hot(targets, 4).float()
        TrainingStep(new_model(), None, [CompSumObjective(eps=0.1)])(inputs, soft)
    with pytest.raises(InputError, match="inputs must lie within bounds"):
        TrainingStep(new_model(), None, [CompSumObjective(eps=0.1, low=0.0, high=1.0)])(inputs, targets)


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("comp-sum-losses")
    assert entry.has_claim and entry.example
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_from_what_a_person_types() -> None:
    task = find_task("digits")
    arm = build_arm(parse_arm("comp-sum-losses:tau=1.7:warmup=0.2:eps=0.1:norm=l2", task))
    (method,) = arm.methods(Setting(task, 0, None, task.budget))
    assert isinstance(method, CompSumObjective)
    assert (method.tau, method.warmup, method.eps, method.attack.keywords["norm"]) == (1.7, 0.2, 0.1, "l2")


def test_the_claim_runs() -> None:
    found = verify("comp-sum-losses", smoke=True, seeds=1)
    assert found["method"]["name"] == "tau 1.5" and found["baseline"]["name"] == "cross-entropy"
    plain = found["arms"]["cross-entropy"]["metrics"]
    assert plain.keys() >= {"accuracy", "accuracy_right_labels", "accuracy_attacked"}
    assert "cross-entropy, stopped early" in found["arms"]
