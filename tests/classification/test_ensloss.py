import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes, run_processes
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.classification import CompSumObjective, EnsLoss, EnsLossObjective, random_calibrated_derivatives
from coloss.classification.ensloss import CLAIM, SYSTEM
from coloss.errors import InputError
from coloss.lab import find_entry, verify
from coloss.lab.arms import build_arm, parse_arm
from coloss.lab.catalog import import_name
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = Budget(steps=6)


def new_model(classes: int = 4) -> Classifier:
    return Classifier(MLP(6, [5], norm=None), classes)


def new_batches(count: int = 6, rows: int = 16, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(classes, (rows,))) for _ in range(count)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
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


def test_the_term_shows_the_logistic_loss_and_pulls_by_drawn_slopes() -> None:
    model, (inputs, target) = new_model(2), new_batches(1, classes=2)[0]
    step = TrainingStep(model, None, [EnsLossObjective()])
    step.state.generator.manual_seed(5)
    terms = step(inputs, target)
    torch.testing.assert_close(terms["ens_loss"], F.cross_entropy(model(inputs), target))
    scores = step.state.outputs[:, 1] - step.state.outputs[:, 0]
    signs = 2.0 * target - 1
    slopes = random_calibrated_derivatives(signs * scores, generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad(terms["ens_loss"], step.state.outputs)
    torch.testing.assert_close(found[:, 1], signs * slopes / 16)


def test_lam_is_drawn_anew_after_each_period_of_epochs() -> None:
    method = EnsLossObjective(period=2, lam_range=(0.5, 0.9))
    seen: list[float] = []

    class Watch(Method):
        def on_batch(self, state: coloss.State) -> None:
            seen.append(float(method.lam))

    coloss.fit(new_model(), new_batches(2), methods=[method, Watch()], budget=Budget(epochs=5), optimizer=SGD)
    assert seen[:4] == [0.0] * 4 and len(set(seen[4:8])) == 1 and len(set(seen)) == 3
    assert all(0.5 <= value <= 0.9 for value in seen[4:])


@pytest.mark.parametrize("as_objective", [True, False])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, as_objective: bool) -> None:
    data, start = (torch.randn(64, 6), torch.randint(4, (64,))), new_model()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        trained = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(1)
        objective = EnsLoss(period=2, generator=generator) if as_objective else None
        methods = [Smoothness(), Kill(kill_at)] + ([] if as_objective else [EnsLossObjective(period=1)])
        found = coloss.fit(
            trained,
            data,
            objective,
            methods,
            batch_size=16,
            budget=Budget(steps=9),
            optimizer=SGD,
            **options,
        )
        assert set(found.history[-1].terms) == {"ens" if as_objective else "ens_loss", "smoothness"}
        assert found.model is trained
        return weights(trained)

    whole = run(kill_at=0)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        run(kill_at=7, **kept)
    assert same(whole, run(kill_at=0, resume=True, **kept))
    assert whole.keys() == weights(start).keys()


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer

    batches, initial = new_batches(), new_model()
    fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))
    # Lightning's callback seeds the shared generator with 0.
    coloss.fit(fitted, batches, F.cross_entropy, [EnsLossObjective()], budget=STEPS, optimizer=SGD, seed=0)
    step = TrainingStep(looped, F.cross_entropy, [EnsLossObjective()], total_steps=6)
    step.state.generator.manual_seed(0)
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
        callbacks=[coloss.MethodCallback([EnsLossObjective()])],
    )
    trainer.fit(Module(), DataLoader(batches, batch_size=None))
    assert not same(weights(initial), weights(fitted))
    assert same(weights(fitted), weights(looped)) and same(weights(fitted), weights(lit))


def test_accumulated_micro_batches_are_ranked_together() -> None:
    data, initial = (torch.randn(64, 6).double(), torch.randint(4, (64,))), new_model().double()
    found = []
    for accumulate in (1, 4):
        model = copy.deepcopy(initial)
        options: dict[str, Any] = {"batch_size": 32 // accumulate, "accumulate": accumulate}
        coloss.fit(model, data, methods=[EnsLossObjective()], budget=STEPS, optimizer=SGD, **options)
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


JOINED = {
    "comp-sum": lambda: CompSumObjective(1.5, warmup=0.8),
    "ensloss": lambda: EnsLossObjective(period=1),
    "attacked": lambda: CompSumObjective(1.0, eps=0.1, steps=2),
}


def train_jointly(variant: str, fabric: Fabric) -> dict[str, Tensor]:
    """Weights after two epochs in float64."""
    torch.manual_seed(0)
    model = Classifier(MLP(6, [5], norm=None), 4).double()
    coloss.fit(
        model,
        (torch.randn(48, 6, dtype=torch.float64), torch.randint(4, (48,))),
        methods=[JOINED[variant]()],
        batch_size=16,
        budget=Budget(epochs=2),
        optimizer=SGD,
        fabric=fabric,
    )
    return dict(model.state_dict())


@pytest.mark.parametrize("variant", ["comp-sum", "ensloss"])
def test_two_processes_take_the_steps_of_one(variant: str, tmp_path: Path) -> None:
    check_two_processes(partial(train_jointly, variant), tmp_path)


def test_on_two_processes_each_draws_the_start_of_its_own_attacks(tmp_path: Path) -> None:
    train = partial(train_jointly, "attacked")
    alone, both = run_processes(train, tmp_path, 1)[0], run_processes(train, tmp_path)
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert bool(both[0][name].isfinite().all()) and not torch.equal(both[0][name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": float("inf")}, "lam must be finite, got inf"),
        ({"clip": -1.0}, "clip must be > 0 and finite, or None, got -1.0"),
        ({"tail": 0.0}, "tail must be > 0 and finite, or None, got 0.0"),
        ({"period": 0}, "period must be >= 1, got 0"),
        ({"lam_range": (1.0, 0.0)}, "lam_range must be .* low <= high"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnsLossObjective(**options)


def test_what_does_not_fit_is_named_at_the_first_step() -> None:
    inputs, targets = new_batches(1)[0]
    with pytest.raises(InputError, match="soft labels have no meaning here"):
        TrainingStep(new_model(), None, [EnsLossObjective()])(inputs, F.one_hot(targets, 4).float())
    with pytest.raises(InputError, match="needs logits and hard labels as tensors, got Tensor and NoneType"):
        TrainingStep(new_model(), None, [EnsLossObjective()])(inputs)


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("ensloss")
    assert entry.has_claim and entry.example
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_from_what_a_person_types() -> None:
    task = find_task("digits")
    arm = build_arm(parse_arm("ensloss:lam=0.5:period=3:lam_range=[-0.5, 0.5]:tail=none", task))
    (method,) = arm.methods(Setting(task, 0, None, task.budget))
    assert isinstance(method, EnsLossObjective)
    assert (float(method.lam), method.period, tuple(method.lam_range), method.tail) == (
        0.5,
        3,
        (-0.5, 0.5),
        None,
    )


def test_the_claim_runs() -> None:
    found = verify("ensloss", smoke=True, seeds=1)
    assert set(found["arms"]) == {"cross-entropy", "hinge", "ensloss"} and CLAIM.baseline == "cross-entropy"
    assert found["arms"]["ensloss"]["metrics"].keys() >= {"accuracy", "training_accuracy", "accuracy_cat-dog"}
