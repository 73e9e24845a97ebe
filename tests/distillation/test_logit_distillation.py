from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import coloss
from coloss import Budget, TrainingStep
from coloss.distillation import LogitDistillation, binary_kl_loss, distillation_kl_loss, logit_gap_loss
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
