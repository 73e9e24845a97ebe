from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coloss
from coloss import Budget, TrainingStep
from coloss.data import Batch, IndexedDataset
from coloss.distillation import (
    DualHeadDistillation,
    FeatureDistillation,
    LogitDistillation,
    TeacherLogits,
    tabulate_teacher_logits,
)
from coloss.errors import InputError
from coloss.nn import MLP, Classifier
from coloss.train import Method, State, TeacherTable, cache_teacher

METHODS = [DualHeadDistillation, LogitDistillation]
STEPS = Budget(steps=6)


def new_student() -> Classifier:
    return Classifier(MLP(6, [5], norm=None), 4)


def test_a_network_is_frozen_in_place_and_gives_no_graph() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    teacher, inputs = TeacherLogits(network), torch.randn(3, 6)
    teacher.train()
    first, second = teacher(Batch(inputs)), teacher(Batch(inputs))
    assert torch.equal(first, second) and not first.requires_grad
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("center", [False, True])
def test_only_centered_logits_hide_a_common_offset(center: bool) -> None:
    table, batch = torch.randn(16, 4), Batch(None, ids=torch.arange(16))
    plain, shifted = (TeacherLogits(table=t, center=center)(batch) for t in (table, table + 50))
    assert torch.allclose(plain, shifted, atol=1e-4) is center
    if center:
        torch.testing.assert_close(plain.mean(-1), torch.zeros(16), rtol=0, atol=1e-6)


def test_a_table_is_no_state_and_no_buffer() -> None:
    teacher = TeacherLogits(table=torch.zeros(100, 4))
    assert teacher.state_dict() == {"_extra_state": {}} and not list(teacher.buffers())


def test_stored_logits_are_those_of_each_id_and_the_teacher_keeps_its_mode() -> None:
    dataset = IndexedDataset(torch.randn(40, 6), ids=torch.randperm(50)[:40])
    network = MLP(6, [32], 4, dropout=0.5).train()
    table = tabulate_teacher_logits(network, dataset, batch_size=7)
    assert all(module.training for module in network.modules())
    torch.testing.assert_close(table[dataset.ids], network.eval()(dataset.inputs))
    others = torch.ones(len(table), dtype=torch.bool).scatter(0, dataset.ids, False)
    assert table[others].isnan().all() and others.sum() == dataset.ids.max() + 1 - 40


@pytest.mark.parametrize("kind", METHODS)
def test_training_on_stored_logits_is_training_with_the_teacher(kind: type) -> None:
    inputs, targets = torch.randn(40, 6), torch.randint(4, (40,))
    dataset = IndexedDataset(inputs, targets, ids=torch.randperm(50)[:40])
    teacher = MLP(6, [32], 4)
    found: list[dict[str, Tensor]] = []
    for options in ({"teacher": teacher}, {"teacher_logits": tabulate_teacher_logits(teacher, dataset)}):
        torch.manual_seed(1)
        student = new_student()
        coloss.fit(student, dataset, F.cross_entropy, [kind(**options)], budget=STEPS, batch_size=10)
        found.append(student.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_a_sample_without_teacher_logits_does_not_pass_unnoticed(kind: type) -> None:
    data = (torch.randn(8, 6), torch.randint(4, (8,)))
    hole = torch.zeros(8, 4)
    hole[3] = torch.nan
    with pytest.raises(InputError, match="teacher_logits must have a row of every sample, got none for id 3"):
        coloss.fit(new_student(), data, F.cross_entropy, [kind(teacher_logits=hole)], budget=STEPS)
    with pytest.raises(ValueError, match="a row for every sample id, got 7 rows and ids from 0 to 7"):
        coloss.fit(new_student(), data, F.cross_entropy, [kind(teacher_logits=hole[:7])], budget=STEPS)
    with pytest.raises(ValueError, match="looked up by sample id, and the batch has none"):
        TrainingStep(new_student(), F.cross_entropy, [kind(teacher_logits=hole)])(*data)


class PairOfLogits(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs


def test_bad_input_is_named() -> None:
    for arguments, message in (
        ({}, "exactly one of teacher and teacher_logits must be given, got neither"),
        ({"teacher": nn.Identity(), "table": torch.zeros(3, 4)}, "must be given, got both"),
        ({"table": torch.zeros(3)}, r"float \(samples, classes\) table, got torch.float32 \(3,\)"),
        ({"table": torch.zeros(3, 4).long()}, "table, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherLogits(**arguments)
    with pytest.raises(ValueError, match="teacher must give a tensor of logits, got tuple"):
        TeacherLogits(PairOfLogits())(Batch(torch.zeros(2, 3)))


@pytest.mark.parametrize(
    "kind", [*METHODS, lambda teacher: FeatureDistillation(teacher, loss="similarity", adapt=False)]
)
def test_a_student_that_is_refused_as_its_own_teacher_is_left_as_it_was(kind: Any) -> None:
    student = new_student()
    student.head.bias.requires_grad_(False)
    student.backbone.eval()
    before = [p.requires_grad for p in student.parameters()], [m.training for m in student.modules()]
    with pytest.raises(InputError, match="teacher must not share parameters with the student"):
        TrainingStep(student, F.cross_entropy, [kind(student)])
    after = [p.requires_grad for p in student.parameters()], [m.training for m in student.modules()]
    assert before == after


class LogitsWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(6, [8], 4)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(inputs)}


def test_the_teachers_logits_may_come_from_within() -> None:
    network = LogitsWithin()
    dataset = IndexedDataset(torch.randn(8, 6), torch.randint(4, (8,)))
    table = cache_teacher(network, dataset, taps=["body"])
    method = LogitDistillation(network, teacher_logits_path="body")
    expected = network.body(dataset.inputs)
    torch.testing.assert_close(method.teacher(dataset.all()), expected)
    torch.testing.assert_close(TeacherLogits(table=table, path="body")(dataset.all()), expected)
    coloss.fit(new_student(), dataset, F.cross_entropy, [method], budget=Budget(steps=1))
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(method.teacher(dataset.all()), expected)
    with pytest.raises(InputError, match="teacher has no 'bodi': .* close ones: body"):
        LogitDistillation(network, teacher_logits_path="bodi")
    with pytest.raises(InputError, match="got dict: LogitDistillation takes teacher_logits_path"):
        TeacherLogits(network)(dataset.all())


def test_a_killed_run_is_not_resumed_with_the_table_of_another_teacher(tmp_path: Path) -> None:
    class Kill(Method):
        def on_step(self, state: State) -> None:
            if state.step == 3:
                raise KeyboardInterrupt

    dataset = IndexedDataset(torch.randn(8, 6), torch.randint(4, (8,)))
    first, second = (cache_teacher(MLP(6, [8], 4), dataset) for _ in range(2))

    def train(table: TeacherTable, *others: Method, resume: bool) -> None:
        coloss.fit(
            new_student(),
            dataset,
            F.cross_entropy,
            [LogitDistillation(teacher_logits=table), *others],
            budget=STEPS,
            batch_size=4,
            checkpoint_dir=tmp_path,
            checkpoint_every=2,
            resume=resume,
        )

    with pytest.raises(KeyboardInterrupt):
        train(first, Kill(), resume=False)
    with pytest.raises(InputError, match="the teacher outputs in memory do not apply: teacher .* wanted"):
        train(second, Kill(), resume=True)
    feature = FeatureDistillation(first, {"head": ""}, loss="similarity")
    with pytest.raises(InputError, match="do not apply: teacher"):
        FeatureDistillation(second, {"head": ""}, loss="similarity").load_state_dict(feature.state_dict())


def test_stored_logits_go_to_where_the_students_are() -> None:
    method, seen = LogitDistillation(teacher_logits=torch.zeros(2, 4)), []
    method.loss = lambda student, teacher, targets: seen.append(teacher.device) or student.sum()
    state = State(new_student(), outputs=torch.zeros(2, 4, device="meta"))
    state.batch = Batch(None, ids=torch.arange(2))
    method.terms(state)
    assert seen == [torch.device("meta")]
