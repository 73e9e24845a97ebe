import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.distillation import (
    Agreement,
    ConflictReport,
    TeacherLogits,
    conflict_report,
    distillation_kl_loss,
    logit_gap_loss,
    tabulate_teacher_logits,
)
from coloss.nn import MLP, Classifier


def data(rows: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(4, (rows,))


def towards_zero(logits: Tensor, targets: Tensor) -> Tensor:
    return logit_gap_loss(logits, torch.zeros_like(logits))


def test_a_loss_agrees_with_itself_and_opposes_its_negative_everywhere() -> None:
    student, zeros = Classifier(MLP(6, [8]), 4), torch.zeros(64, 4)
    same = conflict_report(student, zeros, data(), objective=towards_zero)
    opposed = conflict_report(student, zeros, data(), objective=lambda z, y: -towards_zero(z, y))
    for place in ("classifier", "features", "backbone"):
        assert getattr(same, place).mean_cosine == pytest.approx(1, abs=1e-6)
        assert getattr(same, place).share_in_conflict == 0
        assert getattr(opposed, place).mean_cosine == pytest.approx(-1, abs=1e-6)
        assert getattr(opposed, place).share_in_conflict == 1
    assert same.recommendation.endswith(
        "one head will do: mean cosine 1.00 on the classifier, 1.00 on its input, conflict in 0% of batches in the backbone."
    )
    assert (same.rows, opposed.rows) == (0, 1)
    assert opposed.second_head and not same.second_head
    assert opposed.recommendation.startswith(
        "For a logit gap weighed by about 10 / classes, use a second head: mean cosine -1.00 on the classifier, -1.00 on its"
    )
    assert opposed.metrics()["cosine_features"] == opposed.features.mean_cosine


def test_a_linear_student_by_hand() -> None:
    (inputs, targets), student, table = data(32), nn.Linear(6, 4), torch.randn(32, 4)
    report = conflict_report(student, table, (inputs, targets), temperature=1.5, batch_size=32)
    features, logits = inputs.double().numpy(), student(inputs).detach().double().numpy()
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    first = (probability - np.eye(4)[targets.numpy()]).T @ features
    second = np.tanh((logits - table.double().numpy()) / 3.0).T @ features
    cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    assert report.classifier.mean_cosine == pytest.approx(cosine, rel=1e-4)
    assert report.rows == ((first * second).sum(1) < 0).mean()
    assert math.isnan(report.features.mean_cosine) and math.isnan(report.backbone.share_in_conflict)
    assert report.recommendation.endswith("nothing is trained below it.")


def test_a_second_head_is_never_advised_where_nothing_that_ships_would_learn_from_it() -> None:
    opposed = conflict_report(
        nn.Linear(6, 4), torch.zeros(64, 4), data(), objective=lambda z, y: -towards_zero(z, y)
    )
    assert opposed.classifier.mean_cosine == pytest.approx(-1, abs=1e-6)
    assert opposed.second_head is False


def test_any_distillation_loss_may_be_looked_at() -> None:
    student, samples, table = Classifier(MLP(6, [8]), 4), data(), torch.randn(64, 4) + 5
    by_name = conflict_report(student, table, samples, loss="kl", temperature=3.0)
    own = conflict_report(student, table, samples, loss=distillation_kl_loss, temperature=3.0)
    assert by_name == own != conflict_report(student, table, samples, loss="logit_gap", temperature=3.0)
    assert conflict_report(student, table, samples, loss="dkd").batches == 1  # it needs the targets
    assert (own.second_head, own.recommendation.split(":")[0]) == (None, "No advice for this loss")
    assert conflict_report(student, table, samples, loss=logit_gap_loss).second_head is not None
    centred = conflict_report(student, TeacherLogits(table=table, center=True), samples)
    assert centred == conflict_report(student, table - table.mean(1, keepdim=True), samples)


def test_gradients_that_are_no_numbers_are_not_taken_for_agreement(as_users_call: None) -> None:
    student = Classifier(MLP(6, [8]), 4)
    with pytest.raises(
        ValueError, match="finite gradients to be compared, got NaN or infinity on the classifier in batch 0"
    ):
        conflict_report(student, torch.zeros(64, 4), data(), objective=lambda z, y: z.sum() * torch.nan)
    assert not any(module._forward_hooks for module in student.modules())


def test_the_student_is_seen_as_in_training_and_left_as_it_was() -> None:
    student, teacher = Classifier(MLP(6, [8], dropout=0.2), 4), MLP(6, [8], 4, dropout=0.5).train()
    student.backbone.layers[0].eval()
    samples = data()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    random = torch.get_rng_state()
    first = conflict_report(student, teacher, samples, batches=2, batch_size=16)
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in [*student.parameters(), *teacher.parameters()])
    assert all(module.training for module in teacher.modules())
    assert not any(module._forward_hooks for module in student.modules())
    assert torch.equal(torch.get_rng_state(), random)
    # Running statistics do not matter where batch statistics are used.
    student.backbone.layers[1].running_mean += 100
    assert conflict_report(student, teacher, samples, batches=2, batch_size=16) == first
    assert conflict_report(student, teacher, samples, batches=2, batch_size=16, seed=1) != first


def test_stored_logits_stand_in_for_the_teacher() -> None:
    student, teacher = Classifier(MLP(6, [8]), 4), MLP(6, [16], 4)
    dataset = IndexedDataset(*data())
    by_network = conflict_report(student, teacher, dataset, batches=3, batch_size=16)
    by_table = conflict_report(
        student, tabulate_teacher_logits(teacher, dataset), dataset, batches=3, batch_size=16
    )
    assert by_table.features.mean_cosine == pytest.approx(by_network.features.mean_cosine, abs=1e-5)


def test_frozen_parts_are_left_out() -> None:
    student = Classifier(MLP(6, [8]), 4)
    student.head.requires_grad_(False)
    report = conflict_report(student, MLP(6, [16], 4), data())
    assert math.isnan(report.classifier.mean_cosine) and not report.second_head
    assert -1 <= report.backbone.mean_cosine <= 1


def test_there_are_at_most_the_batches_of_an_epoch() -> None:
    student, teacher = Classifier(MLP(6, [8]), 4), MLP(6, [16], 4)
    assert conflict_report(student, teacher, data(), batches=100, batch_size=16).batches == 4
    assert conflict_report(student, teacher, [data(8)] * 3, batches=2).batches == 2


def test_the_advice_follows_from_the_features_alone() -> None:
    below = Agreement(0.2, 0.05)
    for classifier, features, second_head in ((0.3, -0.2, False), (0.3, -0.6, True), (-0.6, 0.3, False)):
        report = ConflictReport(Agreement(classifier, 0.0), Agreement(features, 0.0), below, batches=20)
        assert report.second_head is second_head


def test_an_objective_may_give_several_losses_by_name(as_users_call: None) -> None:
    student, teacher, samples = Classifier(MLP(6, [8]), 4), MLP(6, [16], 4), data()
    parts = conflict_report(
        student,
        teacher,
        samples,
        objective=lambda z, y: {"half": F.cross_entropy(z, y) / 2, "rest": F.cross_entropy(z, y) / 2},
    )
    assert parts.features.mean_cosine == pytest.approx(
        conflict_report(student, teacher, samples).features.mean_cosine
    )
    for objective, got in (
        (lambda z, y: {}, "none"),
        (lambda z, y: z, r"\(64, 4\)"),
        (lambda z, y: 0.0, "float"),
    ):
        with pytest.raises(
            ValueError, match=f"objective must give a scalar tensor, or some by name, got {got}"
        ):
            conflict_report(student, teacher, samples, objective=objective)


def test_bad_input_is_named(as_users_call: None) -> None:
    student, teacher = Classifier(MLP(6, [8]), 4), MLP(6, [16], 4)
    with pytest.raises(ValueError, match="batches must be >= 1, got 0"):
        conflict_report(student, teacher, data(), batches=0)
    with pytest.raises(ValueError, match="must name a module of the model, got 'tail'"):
        conflict_report(student, teacher, data(), classifier="tail")
    with pytest.raises(ValueError, match="'backbone', which is MLP"):
        conflict_report(student, teacher, data(), classifier="backbone")
    with pytest.raises(ValueError, match="temperature must be > 0"):
        conflict_report(student, teacher, data(), temperature=0.0)
    with pytest.raises(ValueError, match=r"got \(64, 3\)"):
        conflict_report(student, nn.Linear(6, 3), data())
    assert student.training and not any(module._forward_hooks for module in student.modules())


def test_cross_entropy_is_the_default_objective() -> None:
    student, teacher, samples = Classifier(MLP(6, [8]), 4), MLP(6, [16], 4), data()
    given = conflict_report(student, teacher, samples, objective=F.cross_entropy)
    assert given == conflict_report(student, teacher, samples)
