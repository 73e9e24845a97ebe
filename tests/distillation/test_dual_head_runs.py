import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.distillation import DualHeadDistillation, LogitDistillation
from coloss.distillation.dual_head import CLAIM, SYSTEM
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = Budget(steps=6)


def new_student() -> Classifier:
    return Classifier(MLP(6, [5], norm=None), 4)


def new_teacher() -> nn.Module:
    return MLP(6, [32], 4)


def new_batches(count: int = 6, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(4, (rows,))) for _ in range(count)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": state.outputs.square().mean()}


def test_the_student_ships_as_it_was_built() -> None:
    student = new_student()
    names = list(student.state_dict())
    run = coloss.fit(
        student, new_batches(), F.cross_entropy, [DualHeadDistillation(new_teacher())], budget=STEPS
    )
    assert run.model is student
    assert list(student.state_dict()) == names
    assert not any(module._forward_hooks for module in student.modules())
    fresh = new_student()
    fresh.load_state_dict(student.state_dict())
    inputs = torch.randn(3, 6)
    assert torch.equal(fresh(inputs), student(inputs))


class Killed(Exception):
    pass


class Kill(Method):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.at:
            raise Killed


@pytest.mark.parametrize("align", [True, False])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, align: bool) -> None:
    data = (torch.randn(64, 6), torch.randint(4, (64,)))
    student, teacher = new_student(), new_teacher()

    def run(kill_at: int, **options: Any) -> dict[str, Tensor]:
        method = DualHeadDistillation(copy.deepcopy(teacher), align_gradients=align)
        trained = copy.deepcopy(student)
        coloss.fit(
            trained,
            data,
            F.cross_entropy,
            [method, Kill(kill_at)],
            batch_size=16,
            budget=Budget(steps=9),
            optimizer=SGD,
            **options,
        )
        return weights(trained) | {f"method.{name}": value for name, value in weights(method).items()}

    whole = run(kill_at=0)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        run(kill_at=7, **kept)
    resumed = run(kill_at=0, resume=True, **kept)
    assert int(resumed["method.aligned_steps"]) == (9 if align else 0)
    assert same(whole, resumed)


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    from lightning.pytorch import LightningModule, Trainer

    batches, initial, teacher = new_batches(), new_student(), new_teacher()
    methods = [DualHeadDistillation(copy.deepcopy(teacher), dropout=0.0) for _ in range(3)]
    fitted, looped, lit = (copy.deepcopy(initial) for _ in range(3))

    coloss.fit(fitted, batches, F.cross_entropy, [methods[0]], budget=STEPS, optimizer=SGD, seed=3)

    torch.manual_seed(3)
    step = TrainingStep(looped, F.cross_entropy, [methods[1]], total_steps=6)
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
        callbacks=[coloss.MethodCallback([methods[2]])],
    )
    torch.manual_seed(3)
    trainer.fit(Module(), DataLoader(batches, batch_size=None))

    assert int(methods[0].aligned_steps) == 6
    assert not same(weights(initial), weights(fitted))
    for other, method in ((looped, methods[1]), (lit, methods[2])):
        assert same(weights(fitted), weights(other))
        assert same(weights(methods[0]), weights(method))


def test_it_composes_with_other_methods() -> None:
    others = [Smoothness(), LogitDistillation(new_teacher())]
    method = DualHeadDistillation(new_teacher())
    run = coloss.fit(
        new_student(), new_batches(), F.cross_entropy, [others[0], method, others[1]], budget=STEPS
    )
    assert set(run.history[-1].terms) == {"cross_entropy", "smoothness", "logit_gap", "logit_distillation"}
    assert int(method.aligned_steps) == 6


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"head": "linear"}, id="linear, aligned"),
        pytest.param({"hidden": 12, "dropout": 0.0}, id="nonlinear, aligned"),
        pytest.param(
            {
                "hidden": 12,
                "dropout": 0.0,
                "align_gradients": False,
                "weight": lambda progress: 1.0 if progress < 0.5 else 0.0,
            },
            id="nonlinear, plain backward, switched off half-way",
        ),
    ],
)
def test_two_processes_take_the_steps_of_one(options: dict[str, Any], tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        """Weights of student and head after four epochs in float64, and how many steps projected a gradient."""
        torch.manual_seed(0)
        student, teacher = new_student().double(), new_teacher().double()
        inputs, targets = torch.randn(48, 6, dtype=torch.float64), torch.randint(4, (48,))
        method = DualHeadDistillation(teacher, **options)
        coloss.fit(
            student,
            (inputs, targets),
            F.cross_entropy,
            [method],
            batch_size=16,
            budget=Budget(epochs=4),
            optimizer=SGD,
            fabric=fabric,
        )
        if "align_gradients" not in options:
            assert method.conflicting_steps > 0
        found = {f"student.{name}": value for name, value in student.state_dict().items()}
        found |= {f"head.{name}": value for name, value in method.head.state_dict().items()}
        return found | {"conflicting_steps": method.conflicting_steps}

    check_two_processes(train, tmp_path)


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("dhkd")
    assert entry.has_claim and entry.method == "coloss.distillation.DualHeadDistillation"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_lab_builds_it_with_a_teacher_of_its_own_or_from_a_file(tmp_path: Path) -> None:
    task = CLAIM.task
    assert isinstance(task, coloss.Task)
    setting = Setting.of(task, seed=0, smoke=True)
    trained = DualHeadDistillation.for_setting(setting, weight=0.5, head="linear")
    path = coloss.save_model(trained.teacher.network.module, tmp_path / "teacher.safetensors")
    stored = DualHeadDistillation.for_setting(setting, teacher=str(path))
    assert same(weights(trained.teacher), weights(stored.teacher))
    assert (trained.weight, trained.head_options[0], stored.weight) == (0.5, "linear", 1.0)
    orphan = replace(setting, task=replace(task, teacher=None))
    with pytest.raises(ValueError, match="has no teacher model"):
        DualHeadDistillation.for_setting(orphan, teacher=str(path))


def test_the_claims_data_are_disjoint_and_drawn_by_seed() -> None:
    task = CLAIM.task
    assert isinstance(task, coloss.Task)
    splits = task.load(1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (600, 362, 835)
    rows = [{tuple(row) for row in part.inputs.flatten(1).tolist()} for part in (splits.train, splits.test)]
    assert not rows[0] & rows[1]
    assert torch.equal(task.load(1).train.inputs, splits.train.inputs)
    assert not torch.equal(task.load(2).train.inputs, splits.train.inputs)


def test_the_claim_runs() -> None:
    found = verify("dhkd", smoke=True, seeds=1)
    assert set(found["arms"]) == {arm.name for arm in CLAIM.arms}
    assert found["arms"][CLAIM.method]["metrics"].keys() >= {"accuracy", "nll", "conflict_share"}
    one_head = found["arms"]["one head, logit gap"]["metrics"]
    assert all(
        -1 <= one_head[f"cosine_{place}"]["mean"] <= 1 for place in ("classifier", "features", "backbone")
    )
