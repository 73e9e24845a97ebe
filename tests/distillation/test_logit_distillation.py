import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, TrainingStep
from coloss.distillation import (
    DualHeadDistillation,
    LogitDistillation,
    binary_kl_loss,
    dist_loss,
    distillation_kl_loss,
    dkd_loss,
    logit_gap_loss,
    logit_loss,
    standardized_kl_loss,
    standardized_logits,
)
from coloss.distillation.logit_distillation import term_weight
from coloss.lab.arms import parse_arm
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier

NAMES: tuple[Any, ...] = ("kl", "dkd", "dist", "standardized", "binary_kl", "logit_gap")


def new_student() -> Classifier:
    return Classifier(MLP(6, [5], norm=None), 4)


@pytest.mark.parametrize("loss", [distillation_kl_loss, binary_kl_loss, logit_gap_loss])
def test_the_term_compares_the_output_of_the_student_itself(loss: Callable[..., Tensor]) -> None:
    teacher, inputs, targets = MLP(6, [32], 4), torch.randn(16, 6), torch.randint(4, (16,))
    step = TrainingStep(
        new_student(), F.cross_entropy, [LogitDistillation(teacher, loss=loss, temperature=3.0)]
    )
    terms = step(inputs, targets)
    torch.testing.assert_close(terms["logit_distillation"], loss(step.model(inputs), teacher(inputs), 3.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kl", lambda z, t, y: distillation_kl_loss(z, t, 4.0)),
        ("dkd", lambda z, t, y: dkd_loss(z, t, y, 4.0)),
        ("dist", lambda z, t, y: dist_loss(z, t, 1.0)),
        (
            "standardized",
            lambda z, t, y: distillation_kl_loss(standardized_logits(z), standardized_logits(t), 2.0),
        ),
        ("binary_kl", lambda z, t, y: binary_kl_loss(z, t, 2.0)),
        ("logit_gap", lambda z, t, y: logit_gap_loss(z, t, 2.0)),
    ],
)
def test_each_name_is_its_loss_at_its_temperature(name: Any, expected: Callable[..., Tensor]) -> None:
    teacher, inputs, targets = MLP(6, [32], 4), torch.randn(16, 6), torch.randint(4, (16,))
    method = LogitDistillation(teacher, loss=name)
    step = TrainingStep(new_student(), F.cross_entropy, [method])
    found = step(inputs, targets)["logit_distillation"]
    torch.testing.assert_close(found, expected(step.model(inputs), teacher(inputs), targets))
    assert method.batch_statistic == (name == "dist")


def test_decoupled_distillation_needs_classes() -> None:
    step = TrainingStep(new_student(), lambda z, y: z.sum(), [LogitDistillation(MLP(6, [8], 4), loss="dkd")])
    with pytest.raises(ValueError, match="loss='dkd' needs class numbers as targets, got torch.float32"):
        step(torch.randn(3, 6), torch.rand(3, 4))


def test_a_weight_of_zero_is_training_without_the_method_and_without_the_teacher() -> None:
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(6)]
    holes = torch.full((16, 4), torch.nan)  # a table that cannot be read without leaving a trace
    found = []
    for methods in ([], [LogitDistillation(teacher_logits=holes, weight=lambda progress: 0.0)]):
        torch.manual_seed(1)
        student = new_student()
        coloss.fit(
            student,
            batches,
            F.cross_entropy,
            methods,
            budget=Budget(steps=6),
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_impossible_classes_of_the_student_survive_a_weight_of_zero() -> None:
    method = LogitDistillation(MLP(6, [8], 4), weight=0.0)
    state = coloss.State(new_student(), outputs=torch.tensor([[0.0, -torch.inf]]))
    assert method.terms(state)["logit_distillation"] == 0


# In every loop


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    teacher = MLP(6, [8], 4)
    batches = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(3)]
    check_loops(
        new_student,
        lambda: LogitDistillation(copy.deepcopy(teacher), loss="dkd", warmup=0.4),
        batches,
        F.cross_entropy,
    )


def test_it_composes_with_a_method_that_takes_the_backward_pass() -> None:
    data = (torch.randn(16, 6), torch.randint(4, (16,)))
    methods = [
        LogitDistillation(MLP(6, [8], 4), loss="dist"),
        DualHeadDistillation(MLP(6, [8], 4), align_gradients=True),
    ]
    student = new_student()
    names = list(student.state_dict())
    run = coloss.fit(student, data, F.cross_entropy, methods, budget=Budget(steps=2))
    assert set(run.history[-1].terms) == {"cross_entropy", "logit_distillation", "logit_gap"}
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert list(student.state_dict()) == names
    assert not any(module._forward_hooks for module in student.modules())


def test_a_killed_run_resumes_within_the_warm_up(tmp_path: Path) -> None:
    data = (torch.randn(32, 6), torch.randint(4, (32,)))
    check_resume(
        new_student,
        lambda: LogitDistillation(MLP(6, [8], 4), loss="dkd", warmup=0.9),
        data,
        tmp_path,
        F.cross_entropy,
    )


def test_two_processes_take_the_steps_of_one_even_where_samples_are_correlated(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        found = {}
        for name in ("dist", "dkd"):
            torch.manual_seed(0)
            student, teacher = new_student().double(), MLP(6, [8], 4).double()
            data = (torch.randn(32, 6, dtype=torch.float64), torch.randint(4, (32,)))
            method = LogitDistillation(teacher, loss=name)
            sgd = partial(torch.optim.SGD, lr=0.1)
            coloss.fit(
                student,
                data,
                F.cross_entropy,
                [method],
                batch_size=16,
                budget=Budget(epochs=2),
                optimizer=sgd,
                fabric=fabric,
            )
            found |= {f"{name}.{key}": value for key, value in student.state_dict().items()}
        return found

    check_two_processes(train, tmp_path)


# Schedules


def test_the_warm_up_is_a_rise_from_nothing_to_the_weight() -> None:
    # 20 of 240 epochs, as decoupled distillation is published: min(epoch / 20, 1).
    schedule = term_weight(2.0, warmup=20 / 240)
    assert callable(schedule)
    assert [schedule(epoch / 240) for epoch in (0, 5, 20, 240)] == pytest.approx([0, 0.5, 2, 2])
    falling = term_weight(lambda progress: 1 - progress, warmup=0.5, until=0.8)
    assert callable(falling)
    assert [falling(progress) for progress in (0.25, 0.5, 0.8)] == pytest.approx([0.375, 0.5, 0.0])
    assert term_weight(0.5) == 0.5


def test_the_combined_loss_follows_the_warm_up() -> None:
    method = LogitDistillation(MLP(6, [8], 4), weight=3.0, warmup=0.5)
    step = TrainingStep(new_student(), F.cross_entropy, [method], total_steps=8)
    terms = step(torch.randn(16, 6), torch.randint(4, (16,)))
    step.state.progress = 0.25
    expected = terms["cross_entropy"] + 1.5 * terms["logit_distillation"]
    torch.testing.assert_close(step.combine(step.state, terms), expected)


# Options


def test_options_reach_the_loss() -> None:
    student, teacher, targets = torch.randn(5, 4), torch.randn(5, 4), torch.randint(4, (5,))
    found = logit_loss("dkd", 2.0, {"target_weight": 0.5, "other_weight": 3.0})(student, teacher, targets)
    expected = dkd_loss(student, teacher, targets, 2.0, target_weight=0.5, other_weight=3.0)
    torch.testing.assert_close(found, expected)
    own = logit_loss(
        lambda z, t, temperature, power: (z - t).abs().pow(power).mean() * temperature, 2.0, {"power": 3}
    )
    torch.testing.assert_close(own(student, teacher), 2 * (student - teacher).abs().pow(3).mean())


@pytest.mark.parametrize("name", NAMES)
def test_ignored_positions_count_for_nothing_whatever_they_hold(name: Any) -> None:
    student = torch.randn(2, 5, 4).requires_grad_()
    teacher, targets = torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    targets[0, 3:], targets[1, 0] = -100, -100
    counted = targets != -100
    alone = logit_loss(name)(student[counted], teacher[counted], targets[counted])
    teacher[~counted] = torch.nan
    found = logit_loss(name, ignore_index=-100)(student, teacher, targets)
    torch.testing.assert_close(found, alone)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient[~counted].eq(0).all() and gradient[counted].abs().sum() > 0
    nothing = logit_loss(name, ignore_index=-100)(student, teacher, torch.full((2, 5), -100))
    assert nothing == 0


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_distilled_one_by_one(name: Any) -> None:
    student, teacher, targets = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    loss = logit_loss(name)
    by_token = loss(student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss(student, teacher, targets), by_token)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_of_the_teacher_is_not_taken_for_agreement(name: Any) -> None:
    teacher = torch.randn(5, 4)
    teacher[2, 1] = torch.nan
    assert logit_loss(name)(torch.randn(5, 4), teacher, torch.randint(4, (5,))).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_extreme_logits_stay_finite(name: Any) -> None:
    student = torch.tensor([[80.0, -80.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.bfloat16).requires_grad_()
    teacher = torch.tensor([[-80.0, 80.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.bfloat16)
    loss = logit_loss(name)(student, teacher, torch.tensor([0, 1]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()


def test_standardised_logits_do_not_see_a_scale_or_an_offset() -> None:
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert standardized_kl_loss(7 * teacher - 2, teacher).abs() < 1e-12


def test_the_students_logits_may_come_from_within() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = new_student()

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(inputs)}

    def objective(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets)

    student, teacher = Student(), MLP(6, [8], 4)
    inputs, targets = torch.randn(8, 6), torch.randint(4, (8,))
    step = TrainingStep(student, objective, [LogitDistillation(teacher, student_logits="body")])
    found = step(inputs, targets)["logit_distillation"]
    torch.testing.assert_close(found, distillation_kl_loss(student.body(inputs), teacher(inputs), 4.0))
    for weight in (1.0, 0.0):
        step = TrainingStep(student, objective, [LogitDistillation(teacher, weight=weight)])
        with pytest.raises(
            ValueError, match="student must give a tensor of logits, got dict: name the module"
        ):
            step(inputs, targets)


# In the lab


def test_it_is_typed_as_an_arm_with_its_options() -> None:
    text = 'coloss.distillation:LogitDistillation:loss=dkd:options={"other_weight":2.0}:warmup=0.1:report_conflict=true'
    (method,) = parse_arm(text, find_task("iris")).methods
    assert method["parameters"] == {
        "loss": "dkd",
        "options": {"other_weight": 2.0},
        "warmup": 0.1,
        "report_conflict": True,
    }
    assert json.dumps(method)
    with pytest.raises(ValueError, match="loss of .* must be"):
        parse_arm("coloss.distillation:LogitDistillation:loss=3", find_task("iris"))


def test_the_report_says_how_objective_and_distillation_agree() -> None:
    data = (torch.randn(32, 6), torch.randint(4, (32,)))
    teacher = torch.zeros(32, 4)

    def same(logits: Tensor, targets: Tensor) -> Tensor:
        return logit_gap_loss(logits, torch.zeros_like(logits))

    method = LogitDistillation(teacher_logits=teacher, loss="logit_gap", report_conflict=True)
    run = coloss.fit(new_student(), data, same, [method], budget=Budget(steps=1))
    report = method.report(run.model, data)
    assert report["cosine_classifier"] == pytest.approx(1, abs=1e-6)
    assert report["conflict_share_classifier_rows"] == report["conflict_share_backbone"] == 0
    silent = LogitDistillation(teacher_logits=teacher)
    assert silent.report(run.model, data) == {}


def test_bad_input_is_named(as_users_call: None) -> None:
    teacher = MLP(6, [8], 4)
    for arguments, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be > 0 and finite, got inf"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"report_conflict": True, "student_logits": "head"}, "report_conflict needs a student that returns"),
        ({"loss": "hinton"}, "loss must be a function or one of kl, dkd, .* got 'hinton'"),
        ({"options": {"beta": 1.0}}, "options of loss='kl' must be left out, got beta"),
        ({"loss": "dkd", "options": {"beta": 1.0}}, "must be among target_weight, other_weight, got beta"),
    ):
        with pytest.raises(ValueError, match=message):
            LogitDistillation(teacher, **arguments)
    with pytest.raises(ValueError, match="exactly one of teacher and teacher_logits"):
        LogitDistillation()
    with pytest.raises(ValueError, match=r"until must be in \(0, 1\], got 0.0"):
        term_weight(1.0, until=0.0)
    student = new_student()
    with pytest.raises(ValueError, match="must not share parameters with the student"):
        TrainingStep(student, F.cross_entropy, [LogitDistillation(student.backbone)])
    for loss in (logit_loss("kl", ignore_index=0), logit_loss("dkd")):
        with pytest.raises(ValueError, match="needs class numbers as targets, got NoneType"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="ignore_index needs a target for each position"):
        logit_loss("kl", ignore_index=0)(
            torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)
        )
