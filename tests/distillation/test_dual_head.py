import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, TrainingStep
from coloss.distillation import (
    DualHead,
    DualHeadDistillation,
    auxiliary_head,
    logit_gap_loss,
    project_conflicting,
)
from coloss.nn import MLP, Classifier, SyncBatchNorm1d
from coloss.train.combine import UncertaintyWeighting

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


# The heads


def test_the_nonlinear_head_has_the_published_order_of_layers() -> None:
    head = auxiliary_head(8, 10)
    kinds = [nn.Linear, nn.Dropout, SyncBatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head.children()] == kinds
    assert sum(p.numel() for p in head.parameters()) == 8 * 200 + 200 + 2 * 200 + 200 * 10 + 10
    assert type(auxiliary_head(8, 10, "linear")) is nn.Linear


def test_a_dual_head_gives_both_in_training_and_the_main_one_otherwise() -> None:
    head, features = DualHead(8, 10), torch.randn(4, 8)
    main, auxiliary = head(features)
    assert main.shape == auxiliary.shape == (4, 10)
    assert torch.equal(head.eval()(features), main)
    assert head.export() is head.main
    assert type(DualHead(8, 10, hidden=None).auxiliary) is nn.Linear


def test_each_loss_of_a_dual_head_reaches_its_own_head_alone() -> None:
    head, features = DualHead(8, 10), torch.randn(4, 8, requires_grad=True)
    _, auxiliary = head(features)
    logit_gap_loss(auxiliary, torch.randn(4, 10)).backward()
    assert head.main.weight.grad is None
    assert features.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"hidden": 0}, "hidden must be >= 1, got 0"),
        ({"kind": "cubic"}, "kind of head must be .* got 'cubic'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_bad_head_is_named(arguments: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        auxiliary_head(**({"in_features": 8, "num_classes": 10} | arguments))


# The term


def one_step(
    method: Method, *others: Method, student: nn.Module | None = None, **options: Any
) -> TrainingStep:
    return TrainingStep(
        student or new_student(), F.cross_entropy, [method, *others], total_steps=10, **options
    )


def test_the_term_is_the_gap_between_the_second_head_and_the_teacher() -> None:
    teacher, (inputs, targets) = new_teacher(), new_batches(1)[0]
    method = DualHeadDistillation(teacher, temperature=3.0, dropout=0.0)
    step = one_step(method)
    terms = step(inputs, targets)
    logits = method.head(step.model.backbone(inputs))
    expected = logit_gap_loss(logits, teacher(inputs), temperature=3.0)
    assert terms["logit_gap"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["cross_entropy"].item() == pytest.approx(F.cross_entropy(step.model(inputs), targets).item())


def test_the_term_never_reaches_the_main_classifier() -> None:
    method = DualHeadDistillation(new_teacher())
    step = one_step(method)
    terms = step(*new_batches(1)[0])
    backbone, classifier = list(step.model.backbone.parameters()), list(step.model.head.parameters())
    assert step.state.gradients(terms["logit_gap"], classifier) == [None, None]
    assert all(gradient is not None for gradient in step.state.gradients(terms["logit_gap"], backbone))


def test_a_classifier_on_tokens_is_distilled_token_by_token() -> None:
    student = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    method = DualHeadDistillation(nn.Linear(6, 4), head="linear")
    step = TrainingStep(student, None, [method])
    tokens = torch.randn(3, 7, 6)
    by_sequence, by_token = step(tokens)["logit_gap"], step(tokens.flatten(0, 1))["logit_gap"]
    torch.testing.assert_close(by_sequence, by_token)


def test_the_main_classifier_may_be_named() -> None:
    student = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    method = DualHeadDistillation(nn.Linear(6, 5), classifier="0", head="linear")
    one_step(method, student=student)
    assert (method.head.in_features, method.head.out_features) == (6, 5)


def test_a_huge_gap_costs_a_finite_loss_with_a_bounded_gradient() -> None:
    # Where probabilities are clamped instead, float32 gives infinity and NaN from a gap of 34 on.
    method = DualHeadDistillation(
        teacher_logits=torch.full((16, 4), 1e4), head="linear", align_gradients=False
    )
    step = one_step(method)
    inputs, targets = new_batches(1)[0]
    terms = step(inputs, targets, torch.arange(16))
    (bias,) = step.state.gradients(terms["logit_gap"], [method.head.bias])
    assert terms["logit_gap"].isfinite()
    # T / 2B for each of the 16 samples.
    torch.testing.assert_close(bias, torch.full((4,), -1.0))


def test_half_precision_students_get_a_half_precision_head_and_a_float32_loss() -> None:
    method = DualHeadDistillation(new_teacher().bfloat16(), temperature=2.0)
    step = one_step(method, student=new_student().bfloat16())
    inputs, targets = new_batches(1)[0]
    terms = step(inputs.bfloat16(), targets)
    step.backward(terms)
    assert terms["logit_gap"].dtype == torch.float32
    assert method.head[0].weight.dtype == torch.bfloat16
    assert all(p.grad is None or p.grad.isfinite().all() for p in step.trainable)


@pytest.mark.parametrize("align", [True, False])
def test_mixed_precision_training_stays_finite(align: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    student = new_student()
    coloss.fit(
        student,
        new_batches(),
        F.cross_entropy,
        [DualHeadDistillation(new_teacher(), align_gradients=align)],
        budget=STEPS,
        fabric=fabric,
    )
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_a_single_sample_is_too_few_for_the_nonlinear_head_only() -> None:
    (batch,) = new_batches(1, rows=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        one_step(DualHeadDistillation(new_teacher()))(*batch)
    assert one_step(DualHeadDistillation(new_teacher(), head="linear"))(*batch)["logit_gap"].isfinite()


# Gradient alignment


@pytest.mark.parametrize("over", ["all", "shared"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["agreeing", "opposed"])
def test_aligned_gradients_are_the_projection_of_the_weighted_terms(over: Any, sign: float) -> None:
    (batch,) = new_batches(1)
    method = DualHeadDistillation(new_teacher(), weight=0.7, dropout=0.0, over=over, align_gradients=True)
    step = one_step(method, Smoothness(), combine={"smoothness": sign * 20.0})
    terms = step(*batch)
    main = step.state.gradients(terms["cross_entropy"] + sign * 20.0 * terms["smoothness"])
    auxiliary = step.state.gradients(0.7 * terms["logit_gap"])
    expected, conflicting = project_conflicting(main, auxiliary, over)
    step.backward(terms)
    for parameter, gradient in zip(step.trainable, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert method.conflict_share() == float(conflicting)


def inner_product(first: list[Tensor | None], second: list[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def test_a_conflict_is_removed_and_anything_else_is_left_alone() -> None:
    student, method = new_student(), DualHeadDistillation(new_teacher(), dropout=0.0, align_gradients=True)
    step = one_step(method, student=student)
    optimizer = SGD(step.trainable)
    seen = set()
    for batch in new_batches(30):
        terms = step(*batch)
        main, gap = (step.state.gradients(terms[name]) for name in ("cross_entropy", "logit_gap"))
        before = int(method.conflicting_steps)
        step.backward(terms)
        total = [p.grad for p in step.trainable]
        rest = [a if b is None else a - b for a, b in zip(total, main, strict=True)]
        conflicting = int(method.conflicting_steps) - before
        assert conflicting == (inner_product(main, gap) < 0)
        expected = 0.0 if conflicting else inner_product(main, gap)
        assert inner_product(main, rest) == pytest.approx(expected, abs=1e-6)
        seen.add(conflicting)
        optimizer.step()
        step.after_step()
    assert seen == {0, 1}
    assert method.conflict_share() == int(method.conflicting_steps) / 30
    assert method.report(student, None) == {"conflict_share": method.conflict_share()}
    assert DualHeadDistillation(new_teacher(), align_gradients=False).report(student, None) == {}


def test_without_shared_parameters_alignment_changes_nothing() -> None:
    found = []
    for align in (True, False):
        torch.manual_seed(1)
        student = new_student()
        student.backbone.requires_grad_(False)
        method = DualHeadDistillation(new_teacher(), align_gradients=align)
        coloss.fit(student, new_batches(), F.cross_entropy, [method], budget=STEPS, optimizer=SGD)
        found.append(weights(student) | weights(method.head))
    assert not differing(*found)


def test_the_weight_is_whatever_the_combiner_makes_of_it() -> None:
    combine = UncertaintyWeighting(["cross_entropy", "logit_gap"])
    combine.log_variances.data = torch.tensor([0.5, -1.0])
    method = DualHeadDistillation(new_teacher(), align_gradients=True)
    step = one_step(method, combine=combine)
    terms = step(*new_batches(1)[0])
    main = step.state.gradients(combine(step.state, {**terms, "logit_gap": terms["logit_gap"].detach()}))
    auxiliary = step.state.gradients(terms["logit_gap"] * math.exp(1.0) / 2)
    expected, _ = project_conflicting(main, auxiliary)
    step.backward(terms)
    for parameter, gradient in zip(step.trainable, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert combine.log_variances.grad is not None


def test_two_takers_of_the_backward_pass_are_refused() -> None:
    methods = [DualHeadDistillation(new_teacher(), align_gradients=True) for _ in range(2)]
    with pytest.raises(ValueError, match="each take over the backward pass"):
        TrainingStep(new_student(), F.cross_entropy, methods)
    assert not DualHeadDistillation(new_teacher()).takes_backward


def test_a_second_run_counts_its_own_steps() -> None:
    method = DualHeadDistillation(new_teacher(), align_gradients=True)
    for _ in range(2):
        coloss.fit(new_student(), new_batches(), F.cross_entropy, [method], budget=STEPS)
        assert int(method.aligned_steps) == 6 >= int(method.conflicting_steps)


def test_the_share_of_conflicts_is_unknown_before_the_first_step() -> None:
    assert math.isnan(DualHeadDistillation(new_teacher()).conflict_share())


# Switching off


class CountingTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = new_teacher(), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.network(inputs)


@pytest.mark.parametrize("align", [True, False])
def test_neither_teacher_nor_head_is_trained_on_while_the_weight_is_zero(align: bool) -> None:
    teacher = CountingTeacher()
    method = DualHeadDistillation(
        teacher, weight=lambda progress: 1.0 if progress < 0.5 else 0.0, align_gradients=align
    )
    run = coloss.fit(new_student(), new_batches(), F.cross_entropy, [method], budget=STEPS, log_every=1)
    assert teacher.calls == 3
    assert [point.terms["logit_gap"] > 0 for point in run.history] == [True] * 3 + [False] * 3
    assert int(method.aligned_steps) == (3 if align else 0)


def test_the_term_may_end_early() -> None:
    methods = [
        DualHeadDistillation(new_teacher(), weight=0.1, until=0.5),
        DualHeadDistillation(new_teacher(), weight=lambda progress: 0.1 if progress < 0.5 else 0.0),
    ]
    for method in methods:
        run = coloss.fit(new_student(), new_batches(), F.cross_entropy, [method], budget=STEPS, log_every=1)
        assert [point.terms["logit_gap"] > 0 for point in run.history] == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match=r"until must be in \(0, 1\], got 0"):
        DualHeadDistillation(new_teacher(), until=0)


def test_the_teachers_offset_can_be_taken_off() -> None:
    table, (inputs, targets) = torch.randn(16, 4), new_batches(1)[0]
    found = []
    for offset, center in ((0.0, True), (1e3, True), (1e3, False)):
        torch.manual_seed(0)
        method = DualHeadDistillation(
            teacher_logits=(table + offset).double(), center_teacher=center, head="linear"
        )
        found.append(
            one_step(method, student=new_student())(inputs, targets, torch.arange(16))["logit_gap"].item()
        )
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] > 1000


@pytest.mark.parametrize("align", [True, False])
def test_a_weight_of_zero_is_training_without_the_method(align: bool) -> None:
    batches, found = new_batches(), []
    for methods in ([], [DualHeadDistillation(new_teacher(), weight=0, align_gradients=align)]):
        torch.manual_seed(1)
        student = new_student()
        coloss.fit(student, batches, F.cross_entropy, methods, budget=STEPS, optimizer=SGD)
        found.append(weights(student))
    assert not differing(*found)


# The teacher


def test_the_teacher_does_not_change_and_is_not_trained() -> None:
    teacher = new_teacher().train()
    before = weights(teacher)
    method = DualHeadDistillation(teacher)
    step = one_step(method)
    assert not {id(p) for p in step.trainable} & {id(p) for p in teacher.parameters()}
    coloss.fit(new_student(), new_batches(), F.cross_entropy, [DualHeadDistillation(teacher)], budget=STEPS)
    assert not differing(before, weights(teacher))
    assert not teacher.training


def test_bad_input_is_named(as_users_call: None) -> None:
    teacher, student = new_teacher(), new_student()
    for arguments, message in (
        ({"teacher": teacher, "temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"teacher": teacher, "weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
        ({"teacher": teacher, "over": "some"}, 'over must be "all" or "shared", got \'some\''),
        ({"teacher": teacher, "head": "cubic"}, "got 'cubic'"),
        ({"teacher": teacher, "dropout": 1.5}, "dropout must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            DualHeadDistillation(**arguments)
    for arguments, message in (
        ({"classifier": "tail"}, "must name a module of the model, got 'tail'"),
        ({"classifier": "backbone"}, "must be the path of an nn.Linear, got 'backbone', which is MLP"),
    ):
        with pytest.raises(ValueError, match=message):
            one_step(DualHeadDistillation(teacher, **arguments))
    with pytest.raises(ValueError, match="must not share parameters with the student"):
        one_step(DualHeadDistillation(student), student=student)
    with pytest.raises(ValueError, match="must contain an nn.Linear"):
        TrainingStep(nn.Conv1d(1, 1, 1), F.cross_entropy, [DualHeadDistillation(teacher)])
    with pytest.raises(ValueError, match=r"must have the shape \(16, 4\) of student_logits, got \(16, 5\)"):
        one_step(DualHeadDistillation(nn.Linear(6, 5)))(*new_batches(1)[0])
