from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import coloss
from coloss import Budget, TrainingStep
from coloss.distillation import (
    LogitDistillation,
    binary_kl_loss,
    dist_loss,
    distillation_kl_loss,
    dkd_loss,
    logit_gap_loss,
    standardized_logits,
)
from coloss.nn import MLP, Classifier


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


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0.0"):
        LogitDistillation(MLP(6, [8], 4), temperature=0.0)
    with pytest.raises(ValueError, match="exactly one of teacher and teacher_logits"):
        LogitDistillation()
