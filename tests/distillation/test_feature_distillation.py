from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import SGD, check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, TrainingStep
from coloss.data import IndexedDataset
from coloss.distillation import FeatureDistillation, LogitDistillation
from coloss.errors import InputError
from coloss.lab.arms import build_arm, parse_arm
from coloss.lab.tasks import find_task
from coloss.nn import MLP, Classifier, ConvNet, ShapeAdapter, SharedTeacher
from coloss.ops import attention_transfer_loss, hint_loss, similarity_preserving_loss
from coloss.train import Setting, cache_teacher

LOSSES = ["hint", "information", "attention", "similarity", "rkd"]
STEPS = Budget(steps=4)
PAIRS = {"backbone.stages.0": "backbone.stages.1"}


def new_student(dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(1)
    return Classifier(ConvNet(1, (2, 3), downsample=False), 3).to(dtype)


def new_teacher(dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(2)
    return Classifier(ConvNet(1, (4, 5)), 3).to(dtype)


def new_data(rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(rows, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(rows) % 3


def new_method(loss: Any = "hint", dtype: torch.dtype = torch.float32, **options: Any) -> FeatureDistillation:
    torch.manual_seed(4)
    options = {"pairs": PAIRS, "example": new_data(2, dtype)[0], **options}
    return FeatureDistillation(options.pop("teacher", new_teacher(dtype)), loss=loss, **options)


def term(method: FeatureDistillation, student: nn.Module | None = None) -> Tensor:
    step = TrainingStep(student or new_student(), F.cross_entropy, [method])
    return step(*new_data())[method.term]


def features(model: nn.Module, path: str, inputs: Tensor) -> Tensor:
    with coloss.nn.Taps(model, {"it": path}) as taps:
        model(inputs)
        return taps["it"]


@pytest.mark.parametrize(
    ("name", "loss"), [("attention", attention_transfer_loss), ("similarity", similarity_preserving_loss)]
)
def test_the_term_is_the_loss_of_the_tapped_features_summed_over_pairs(name: str, loss: Any) -> None:
    student, inputs = new_student().eval(), new_data()[0]
    pairs = PAIRS | {"backbone.stages.1": "backbone.stages.0"}
    teacher = new_teacher().eval()
    expected = sum(
        loss(features(student, mine, inputs), features(teacher, theirs, inputs))
        for mine, theirs in pairs.items()
    )
    torch.testing.assert_close(term(new_method(name, pairs=pairs), student), expected)


def test_a_hint_is_taken_after_the_adapter_and_reaches_it_and_the_student() -> None:
    student, method = new_student().eval(), new_method()
    found = term(method, student)
    adapter = method.adapters[0]
    assert isinstance(adapter, ShapeAdapter)
    inputs = new_data()[0]
    mine = features(student, "backbone.stages.0", inputs)
    theirs = features(new_teacher().eval(), "backbone.stages.1", inputs)
    torch.testing.assert_close(found, hint_loss(adapter(mine), theirs))
    found.backward()
    assert bool(adapter.regressor.weight.grad.abs().sum() > 0)
    assert bool(student.backbone.stages[0][0].weight.grad.abs().sum() > 0)
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_by_default_the_classifiers_inputs_are_paired() -> None:
    method = new_method(pairs=None)
    term(method)
    assert method.pairs == {"head:input": "head:input"}
    assert method.adapters[0].regressor.weight.shape == (5, 3)


def test_setup_leaves_both_networks_as_they_were() -> None:
    student, teacher = new_student(), new_teacher()
    before = weights(student), weights(teacher)
    method = FeatureDistillation(teacher, PAIRS, loss="similarity", adapt=True, example=new_data(2)[0])
    TrainingStep(student, F.cross_entropy, [method])
    assert not differing(before[0], weights(student)) and not differing(before[1], weights(teacher))
    assert student.training and not teacher.training and len(method.adapters) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_it_trains_and_leaves_the_student_as_it_was_built(loss: str) -> None:
    student, method = new_student(), new_method(loss)
    keys, hooks = list(student.state_dict()), sum(len(m._forward_hooks) for m in student.modules())
    run = coloss.fit(student, new_data(), F.cross_entropy, [method], budget=STEPS, batch_size=8)
    assert set(run.history[-1].terms) == {"cross_entropy", f"{loss}_distillation"}
    assert list(run.model.state_dict()) == keys and type(run.model) is Classifier
    both = (*student.modules(), *method.teacher.module.modules())
    assert sum(len(m._forward_hooks) for m in both) == hooks == 0
    found = {name for name, _ in method.named_parameters() if not name.startswith("teacher.")}
    adapter = {"adapters.0.regressor.weight", "adapters.0.regressor.bias"}
    expected = {"hint": adapter, "information": adapter | {"raw_variances.0"}}
    assert found == expected.get(loss, set())


def test_a_method_can_be_used_in_a_second_run() -> None:
    method, found = new_method("hint"), []
    for _ in range(2):
        student = new_student()
        coloss.fit(student, new_data(), F.cross_entropy, [method], budget=STEPS, batch_size=8)
        found.append(weights(student))
    assert not differing(*found)


def test_a_hint_brings_features_closer() -> None:
    student, method = new_student(), new_method(weight=10.0)
    step = TrainingStep(student, F.cross_entropy, [method])
    optimizer, values = torch.optim.Adam(step.trainable, lr=0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        terms = step(*new_data())
        step.backward(terms)
        optimizer.step()
        step.after_step()
        values.append(terms["hint_distillation"].item())
    assert values[-1] < 0.7 * values[0]


def test_fit_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    inputs, targets = new_data()
    batches = list(zip(inputs.split(8), targets.split(8)))
    check_loops(new_student, partial(new_method, "information"), batches, F.cross_entropy)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    check_resume(new_student, partial(new_method, "information"), new_data(), tmp_path, F.cross_entropy)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """With an adapter, and with a loss that relates samples of both processes."""
    inputs, targets = new_data(dtype=torch.float64)
    inputs = inputs.flatten(1)

    def train(fabric: Fabric) -> dict[str, Tensor]:
        student = Classifier(MLP(16, [6, 5], norm=None), 3).double()
        teacher = SharedTeacher(Classifier(MLP(16, [9], norm=None), 3).double())
        methods = [
            FeatureDistillation(teacher, loss=loss, example=inputs[:2], weight=0.3)
            for loss in ("information", "rkd")
        ]
        coloss.fit(
            student,
            (inputs, targets),
            F.cross_entropy,
            methods,
            budget=STEPS,
            batch_size=8,
            optimizer=SGD,
            fabric=fabric,
        )
        return dict(student.state_dict())

    check_two_processes(train, tmp_path)


def test_micro_batches_of_a_loss_on_relations_are_joined() -> None:
    def run(**options: Any) -> dict[str, Any]:
        torch.manual_seed(5)
        student = Classifier(MLP(16, [6], norm=None), 3)
        method = FeatureDistillation(Classifier(MLP(16, [9], norm=None), 3), loss="rkd")
        data = (new_data()[0].flatten(1), new_data()[1])
        coloss.fit(student, data, F.cross_entropy, [method], budget=STEPS, optimizer=SGD, **options)
        return weights(student)

    whole, joined = run(batch_size=16), run(batch_size=4, accumulate=4)
    for name, value in whole.items():
        torch.testing.assert_close(joined[name], value)


def test_a_shared_teacher_runs_once_for_both_kinds_of_distillation() -> None:
    found = []
    for teacher in (SharedTeacher(new_teacher()), None):
        student = new_student()
        methods = [
            LogitDistillation(teacher if teacher is not None else new_teacher()),
            new_method(teacher=teacher if teacher is not None else new_teacher()),
        ]
        coloss.fit(student, new_data(), F.cross_entropy, methods, budget=STEPS, batch_size=8)
        found.append(weights(student))
        if teacher is not None:
            assert teacher.passes == 4 + 1  # one more for the example
    assert not differing(*found)


def test_a_table_of_stored_features_stands_in_for_the_teacher() -> None:
    data = IndexedDataset(*new_data(), ids=torch.randperm(40)[:16])
    table = cache_teacher(new_teacher(), data, taps=list(PAIRS.values()))
    found = []
    for teacher in (table, new_teacher()):
        student = new_student()
        method = new_method(teacher=teacher)
        coloss.fit(student, data, F.cross_entropy, [method], budget=STEPS, batch_size=8)
        found.append(weights(student))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="the teacher has no 'head': teacher outputs hold no 'head'"):
        term(new_method(teacher=table, pairs={"head": "head"}))
    with pytest.raises(InputError, match="pairs must be given where the teacher is a table"):
        term(new_method(teacher=table, pairs=None))


@pytest.mark.parametrize("loss", LOSSES)
def test_mixed_precision_gives_finite_terms(loss: str) -> None:
    student = new_student()
    step = TrainingStep(student, F.cross_entropy, [new_method(loss)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(*new_data())[f"{loss}_distillation"]
    found.backward()
    assert found.dtype == torch.float32 and bool(found.isfinite())
    assert bool(student.backbone.stages[0][0].weight.grad.isfinite().all())


def test_a_function_is_adapted_where_shapes_differ_and_may_relate_samples() -> None:
    method = new_method(F.l1_loss)
    assert term(method).item() > 0 and isinstance(method.adapters[0], ShapeAdapter)
    same = new_method(F.l1_loss, teacher=new_student())
    same.pairs = {"backbone.stages.0": "backbone.stages.0"}
    term(same)
    assert isinstance(same.adapters[0], nn.Identity) and same.term == "feature_distillation"

    def spread(student: Tensor, teacher: Tensor) -> Tensor:
        return (student.std() - teacher.std()).square()

    spread.batch_statistic = True  # type: ignore[attr-defined]
    assert new_method(spread, adapt=False, name="spread").batch_statistic
    assert not method.batch_statistic


def test_tokens_are_matched_with_maps() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.embed(images.view(-1, 4, 4)).mean(1))

    for loss, expected in (("hint", "tokens"), ("attention", None)):
        method = new_method(loss, pairs={"embed": "backbone.stages.0"})
        if expected is None:
            with pytest.raises(InputError, match="'embed' of the student .* must be maps"):
                term(method, Tokens())
        else:
            assert term(method, Tokens()).item() > 0
            assert method.adapters[0].student_layout == expected


def test_adapted_features_are_read_in_the_teachers_layout() -> None:
    class Series(nn.Module):
        """Maps (batch, channels, steps) within."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv1d(4, 2, 1), nn.Linear(2, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.convolution(images.view(-1, 4, 4)).mean(2))

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.embed(images.view(-1, 4, 4)).mean(1))

    student, teacher, images = Series(), Tokens(), new_data()[0]
    method = new_method(
        "attention", teacher=teacher, pairs={"convolution": "embed"}, adapt=True, student_layout="maps"
    )
    found = term(method, student)
    adapted = method.adapters[0](features(student, "convolution", images))
    expected = attention_transfer_loss(adapted.mT, features(teacher, "embed", images).mT)
    torch.testing.assert_close(found, expected)


def test_while_the_weight_is_zero_the_teacher_does_not_run() -> None:
    method = new_method("information", weight=lambda progress: 0.0 if progress < 0.5 else 1.0)
    run = coloss.fit(
        new_student(), new_data(), F.cross_entropy, [method], budget=STEPS, batch_size=8, log_every=1
    )
    values = [point.terms["information_distillation"] for point in run.history if point.terms]
    assert values[0] == values[1] == 0 and values[-1] != 0
    assert method.teacher.passes == 2 + 1


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named() -> None:
    close = "close ones: backbone.stages.0"
    for options, message in (
        ({"pairs": {"backbone.stage.0": "head"}}, f"the student has no 'backbone.stage.0': .*{close}"),
        ({"pairs": {"head": "backbone.stage.0"}}, f"the teacher has no 'backbone.stage.0': .*{close}"),
        ({"example": None}, "loss='hint' needs an adapter to the teacher's shape: give example="),
        (
            {"loss": "attention", "pairs": {"head": "head"}},
            "'head' of the student and 'head' .* must be maps",
        ),
    ):
        with pytest.raises(InputError, match=message):
            term(new_method(**options))
    with pytest.raises(InputError, match="loss must be a function or one of hint, .* got 'fitnet'"):
        new_method("fitnet")
    with pytest.raises(InputError, match="pairs must name at least one place"):
        new_method(pairs={})
    with pytest.raises(InputError, match="adapt must be True or None for loss='information'"):
        new_method("information", adapt=False)
    student = new_student()
    with pytest.raises(InputError, match="teacher must not share parameters with the student"):
        term(new_method(teacher=student), student)


def test_it_is_reached_by_its_import_path_in_a_comparison() -> None:
    text = 'coloss.distillation:FeatureDistillation:loss=similarity:weight=0.5:pairs={"head:input": "head:input"}'
    arm = build_arm(parse_arm(text, find_task("digits")))
    task = find_task("digits")
    setting = Setting.of(task, 0, Budget(steps=2), smoke=True)
    (method,) = arm.methods(setting)
    assert isinstance(method, FeatureDistillation) and method.weight == 0.5
    run = setting.fit(setting.new_model(), methods=[method])
    assert "similarity_distillation" in run.history[-1].terms
    with pytest.raises(InputError, match="loss of .* must be"):
        parse_arm("coloss.distillation:FeatureDistillation:loss=3", task)
