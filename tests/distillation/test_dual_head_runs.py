import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method
from coloss.data import load
from coloss.distillation import DualHeadDistillation, LogitDistillation, dual_head_trial, logit_gap_loss
from coloss.distillation.dual_head import SYSTEM
from coloss.distillation.dual_head_trial import QUESTIONS, USES, Use, few_questions
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier
from coloss.train.task import Setting

STEPS = Budget(steps=6)


def new_student() -> Classifier:
    return Classifier(MLP(6, [5], norm=None), 4)


def new_teacher() -> nn.Module:
    return MLP(6, [32], 4)


def new_batches(count: int = 6, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(4, (rows,))) for _ in range(count)]


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


@pytest.mark.parametrize("options", [{"align_gradients": True}, {}, {"until": 0.5}], ids=str)
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, options: dict[str, Any]) -> None:
    # Killed before half-way, where `until` takes the term off.
    data = (torch.randn(64, 6), torch.randint(4, (64,)))
    check_resume(
        new_student,
        lambda: DualHeadDistillation(new_teacher(), **options),
        data,
        tmp_path,
        F.cross_entropy,
        kill_at=5,
    )


@pytest.mark.parametrize("align", [True, False])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(align: bool) -> None:
    teacher = new_teacher()

    def new_method() -> Method:
        return DualHeadDistillation(copy.deepcopy(teacher), dropout=0.0, align_gradients=align)

    check_loops(new_student, new_method, new_batches(), F.cross_entropy)


def test_it_composes_with_other_methods() -> None:
    others = [Smoothness(), LogitDistillation(new_teacher())]
    method = DualHeadDistillation(new_teacher(), align_gradients=True)
    run = coloss.fit(
        new_student(), new_batches(), F.cross_entropy, [others[0], method, others[1]], budget=STEPS
    )
    assert set(run.history[-1].terms) == {"cross_entropy", "smoothness", "logit_gap", "logit_distillation"}
    assert int(method.aligned_steps) == 6


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"head": "linear", "align_gradients": True}, id="linear, aligned"),
        pytest.param({"hidden": 12, "dropout": 0.0, "align_gradients": True}, id="nonlinear, aligned"),
        pytest.param(
            {
                "hidden": 12,
                "dropout": 0.0,
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
        if method.align_gradients:
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
    setting = Setting.of(find_task("iris"), seed=0, smoke=True)
    trained = DualHeadDistillation.for_setting(setting, weight=0.5, head="linear")
    path = coloss.save_model(trained.teacher.network.module, tmp_path / "teacher.safetensors")
    stored = DualHeadDistillation.for_setting(setting, teacher=str(path))
    assert not differing(weights(trained.teacher), weights(stored.teacher))
    assert (trained.weight, trained.head_options[0], stored.weight) == (0.5, "linear", 1.0)
    orphan = replace(setting, task=replace(setting.task, teacher=None))
    with pytest.raises(ValueError, match="has no teacher model"):
        DualHeadDistillation.for_setting(orphan, teacher=str(path))


# The claim


def test_the_claims_data_are_disjoint_and_drawn_by_seed() -> None:
    splits = few_questions(1)
    assert (len(splits.train), len(splits.test)) == (QUESTIONS, 3080)
    assert not set(splits.train.ids.tolist()) & set(splits.validation.ids.tolist())
    assert torch.equal(few_questions(1).train.ids, splits.train.ids)
    assert not torch.equal(few_questions(2).train.ids, splits.train.ids)


def test_each_use_of_the_teacher_is_what_its_name_says() -> None:
    table = torch.randn(4, 3)
    assert USES["cross-entropy"].methods(table) == []
    for name, use in USES.items():
        for method in use.methods(table):
            assert isinstance(method, LogitDistillation if "one head" in name else DualHeadDistillation)
            assert not method.takes_backward
    assert USES["dual head"].methods(table)[0].head_options[0] == "nonlinear"
    assert USES["one head, logit gap"].methods(table)[0].loss.function is logit_gap_loss


def test_a_use_decides_learning_rate_and_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spied(*args: Any, **options: Any) -> Any:
        seen.append(options["optimizer"].keywords)
        return coloss.fit(*args, **options)

    monkeypatch.setattr(dual_head_trial, "fit", spied)
    dual_head_trial.train_student(load("iris", seed=0), torch.zeros(1, 3), Use(0.7, 3e-3), seed=0, epochs=0.1)
    assert seen == [{"lr": 0.7, "momentum": 0.9, "weight_decay": 3e-3}]


def test_the_claim_runs() -> None:
    found = verify("dhkd", smoke=True, seeds=1)
    assert found["arms"].keys() == USES.keys() | {"teacher"}
    for arm in found["arms"].values():
        assert arm["metrics"].keys() >= {"accuracy", "nll"}
    one_head = found["arms"]["one head, logit gap"]["metrics"]
    assert all(
        -1 <= one_head[f"cosine_{place}"]["mean"] <= 1 for place in ("classifier", "features", "backbone")
    )
