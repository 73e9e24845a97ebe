"""Distillation through made-up texts: who learns from what, equal limits, the traps, and what every method promises."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import (
    SGD,
    Kill,
    Killed,
    check_loops,
    check_resume,
    check_two_processes,
    differing,
    run_processes,
    weights,
)
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, TrainingStep, fit
from coloss.data import IndexedDataset
from coloss.distillation import (
    DataFreeDistillation,
    TextRewriter,
    distillation_kl_loss,
    small_text_classifier,
    student_and_rewriter_adamw,
    write_texts,
)
from coloss.errors import InputError
from coloss.train import NonFiniteLossError

WORDS, CLASSES, LENGTH = 14, 3, 5
PUBLIC = torch.randint(3, WORDS, (48, LENGTH), generator=torch.Generator().manual_seed(0))
PUBLIC[::3, 3:] = 0


def network(seed: int = 0, dim: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return small_text_classifier(WORDS, CLASSES, dim, LENGTH).to(dtype)


def rewriter(seed: int = 0) -> TextRewriter:
    torch.manual_seed(seed)
    return TextRewriter(WORDS, CLASSES, LENGTH, dim=8, heads=2)


def teacher() -> nn.Module:
    """One that is sure of words: label by the first word."""
    return _FirstWord()


class _FirstWord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, CLASSES)
        with torch.no_grad():
            self.embedding.weight.copy_(4.0 * F.one_hot(torch.arange(WORDS) % CLASSES, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[:, 0]


def one_step(method: DataFreeDistillation, student: nn.Module) -> TrainingStep:
    step = TrainingStep(student, methods=[method])
    step.backward(step(PUBLIC[:16]))
    return step


def test_losses_are_those_written_down():
    """Balance and specificity worked out again from the texts and answers that were kept."""
    method, student = DataFreeDistillation(teacher(), rewriter(), student_steps=1), network(1)
    step = one_step(method, student)
    logged = step.state.take_logged()
    shares = method.answers.softmax(1).mean(0)
    assert logged["label_entropy"] == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)
    expected = distillation_kl_loss(student(method.texts), method.teacher(method.texts), 8.0)
    assert step.state.terms["distillation"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert logged["disagreement"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["drift"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(method.texts == 0, PUBLIC[:16] == 0)


def test_gradients_reach_whom_they_belong_to():
    own, student, big = rewriter(), network(1), network(2)
    one_step(DataFreeDistillation(big, own), student)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in big.parameters())
    assert all(parameter.grad is not None for parameter in own.parameters())
    together = [parameter.grad.clone() for parameter in student.parameters()]
    # The student's gradients are those of its own loss alone.
    method = DataFreeDistillation(
        network(2), rewriter(), specificity=0.0, balance=0.0, adversarial=0.0, readable=0.0
    )
    alone = network(1)
    one_step(method, alone)
    for found, parameter in zip(together, alone.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_batch_norm_of_the_student_counts_each_text_once():
    torch.manual_seed(0)
    wide = 4 * LENGTH
    student = nn.Sequential(
        nn.Embedding(WORDS, 4), nn.Flatten(), nn.BatchNorm1d(wide), nn.Linear(wide, CLASSES)
    )
    twin, method = copy.deepcopy(student), DataFreeDistillation(teacher(), rewriter(), student_steps=1)
    one_step(method, student)
    twin(method.texts)
    for name, buffer in twin.named_buffers():
        assert torch.equal(student.get_buffer(name), buffer), name


def test_without_losses_or_learning_it_is_plain_distillation_on_the_texts():
    frozen = rewriter().requires_grad_(False)
    student, plain = network(1), network(1)
    method = DataFreeDistillation(network(2), frozen, student_steps=1)
    step = TrainingStep(student, methods=[method])
    optimizer = SGD(step.trainable)
    own = SGD(list(plain.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        step.backward(step(PUBLIC[:16]))
        optimizer.step()
        step.after_step()
        own.zero_grad()
        texts = method.texts[-16:]
        distillation_kl_loss(plain(texts), method.teacher(texts), 8.0).backward()
        own.step()
    for one, two in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), rewriter().parameters(), strict=True))


def test_without_a_rewriter_the_texts_are_the_batches():
    method = DataFreeDistillation(teacher(), student_steps=1)
    one_step(method, network(1))
    assert torch.equal(method.texts, PUBLIC[:16]) and method.queries == 16


def _trained(student_rate: float = 1e-3, **losses: object) -> list[dict[str, float]]:
    """What the rewriter's losses were over its first and its last ten steps."""
    method = DataFreeDistillation(teacher(), rewriter(), student_steps=1, **losses)
    run = fit(
        network(1),
        IndexedDataset(PUBLIC),
        methods=[method],
        budget=Budget(steps=20),
        batch_size=24,
        optimizer=student_and_rewriter_adamw(method.rewriter, student_rate, 3e-2),
        log_every=10,
    )
    return [point.metrics for point in run.history if point.metrics]


def test_specificity_makes_the_teacher_read_what_was_asked_for():
    first, last = _trained(balance=0.0, adversarial=0.0, readable=0.0)
    assert last["specificity"] < 0.5 * first["specificity"]
    assert "disagreement" not in last and "drift" not in last


def test_balance_undoes_the_collapse_of_a_lopsided_prior():
    only = (1.0, 0.0, 0.0)
    *_, collapsed = _trained(balance=0.0, adversarial=0.0, readable=0.0, label_prior=only)
    *_, balanced = _trained(specificity=0.1, balance=3.0, adversarial=0.0, readable=0.0, label_prior=only)
    assert balanced["label_entropy"] > collapsed["label_entropy"] + 0.3


def test_the_rewriter_looks_for_what_a_student_gets_wrong_and_stays_near_its_start_if_told():
    alone = {"specificity": 0.0, "balance": 0.0}
    first, last = _trained(1e-9, **alone, readable=1e-6)
    assert last["disagreement"] > first["disagreement"]
    *_, held = _trained(1e-9, **alone, readable=1e4)
    assert held["drift"] < 0.2 * last["drift"]


def test_queries_are_counted_and_old_texts_forgotten():
    method = DataFreeDistillation(teacher(), rewriter(), student_steps=3, replay=20)
    fit(network(1), IndexedDataset(PUBLIC), methods=[method], budget=Budget(steps=10), batch_size=12)
    assert method.queries == 4 * 12 and method.texts.shape == (20, LENGTH)
    torch.testing.assert_close(method.answers, method.teacher(method.texts).cpu())


def test_the_rewriter_stands_still_between_rounds():
    method = DataFreeDistillation(teacher(), rewriter(), student_steps=3)
    seen: list[Tensor] = []

    class Look(coloss.Method):
        def on_step(self, state: coloss.train.State) -> None:
            seen.append(method.rewriter.preferences.detach().clone())

    fit(network(1), IndexedDataset(PUBLIC), methods=[method, Look()], budget=Budget(steps=6), batch_size=12)
    assert (
        torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])
    )


def test_loops_agree(tmp_path):
    batches = [(PUBLIC[:16], PUBLIC[:16, 0]), (PUBLIC[16:32], PUBLIC[16:32, 0])]
    check_loops(
        partial(network, 1), lambda: DataFreeDistillation(network(2), rewriter(), student_steps=2), batches
    )


def test_a_killed_run_goes_on_bit_identically_with_its_rewriter_and_its_texts(tmp_path):
    check_resume(
        partial(network, 1),
        lambda: DataFreeDistillation(network(2), rewriter(), student_steps=2, replay=20),
        IndexedDataset(PUBLIC),
        tmp_path,
    )


def test_both_learning_rates_and_their_states_survive_a_kill(tmp_path):
    def run(kill_at: int, **more: object) -> dict[str, Tensor]:
        method = DataFreeDistillation(network(2), rewriter(), student_steps=2)
        own = student_and_rewriter_adamw(method.rewriter, 1e-2, 3e-2)
        found = fit(
            network(1),
            IndexedDataset(PUBLIC),
            methods=[method, Kill(kill_at)],
            budget=Budget(steps=8),
            batch_size=8,
            optimizer=own,
            checkpoint_dir=tmp_path / str(bool(more or kill_at)),
            checkpoint_every=2,
            **more,
        )
        return weights(found.model) | weights(method.rewriter)

    whole = run(0)
    with pytest.raises(Killed):
        run(5)
    assert not differing(whole, run(0, resume=True))


def test_two_processes_train_as_one_on_given_texts(tmp_path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        method = DataFreeDistillation(network(2, dtype=torch.float64), student_steps=1)
        return _weights(fabric, method, torch.float64)

    check_two_processes(train, tmp_path)


def test_two_processes_hold_the_same_rewriter_student_and_texts(tmp_path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        method = DataFreeDistillation(network(2), rewriter(), student_steps=2)
        found = _weights(fabric, method)
        return found | {"texts": method.texts, "preferences": method.rewriter.preferences}

    first, second = run_processes(train, tmp_path)
    assert len(first["texts"]) == 3 * 16
    assert all(torch.equal(first[name], second[name]) for name in first)


def _weights(
    fabric: Fabric, method: DataFreeDistillation, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    run = fit(
        network(1, dtype=dtype),
        IndexedDataset(PUBLIC),
        methods=[method],
        budget=Budget(steps=6),
        batch_size=16,
        optimizer=SGD,
        fabric=fabric,
    )
    return dict(run.model.state_dict())


def test_it_trains_in_bfloat16_beside_another_method():
    class Small(coloss.Method):
        def terms(self, state: coloss.train.State) -> dict[str, Tensor]:
            return {"size": sum(p.square().sum() for p in state.model.parameters())}

    method = DataFreeDistillation(network(2), rewriter(), student_steps=2)
    run = fit(
        network(1),
        IndexedDataset(PUBLIC),
        methods=[method, Small()],
        budget=Budget(steps=4),
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
        log_every=1,
    )
    assert sorted(run.history[-1].terms) == ["distillation", "size"]
    assert all(p.isfinite().all() for p in (*run.model.parameters(), *method.rewriter.parameters()))


def test_a_rewriter_that_diverged_stops_the_run():
    own = rewriter()
    with torch.no_grad():
        own.output.bias[5] = torch.nan
    with pytest.raises(NonFiniteLossError, match="rewriter's loss is not finite at step 0: specificity"):
        one_step(DataFreeDistillation(teacher(), own), network(1))


def test_kept_texts_are_confident_distinct_and_carry_the_teachers_answers():
    big, own = teacher(), rewriter()
    sources = PUBLIC.repeat(20, 1)
    texts, logits = write_texts(
        own, big, sources, min_confidence=0.9, generator=torch.Generator().manual_seed(0)
    )
    assert 0 < len(texts) < len(sources) and len(texts.unique(dim=0)) == len(texts)
    assert torch.equal(logits, big(texts)) and bool((logits.softmax(1).amax(1) > 0.9).all())
    assert write_texts(own, big, sources, min_confidence=0.99)[0].shape == (0, LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"adversarial": -1.0}, "adversarial must be >= 0 and finite, got -1.0"),
        ({"choice_temperature": 0.0}, "choice_temperature must be > 0 and finite, or a schedule, got 0.0"),
        ({"kind": "l2"}, 'kind must be "kl", "l1" or "js", got'),
        ({"student_steps": 0}, "student_steps must be >= 1, got 0"),
        ({"replay": 0}, "replay must be >= 1, got 0"),
        ({"label_prior": (1.0, 1.0)}, "label_prior must give each of the 3 labels"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        DataFreeDistillation(teacher(), rewriter(), **options)


def test_parts_that_do_not_fit_are_named():
    torch.manual_seed(0)
    for learns in (True, False):
        two_labels = TextRewriter(WORDS, 2, LENGTH, dim=8, heads=2).requires_grad_(learns)
        with pytest.raises(InputError, match="rewriter must know the teacher's 3 labels, got num_labels=2"):
            one_step(DataFreeDistillation(teacher(), two_labels), network(1))
    with pytest.raises(InputError, match="sources must hold at least one text, got none"):
        write_texts(rewriter(), teacher(), PUBLIC[:0])
    with pytest.raises(InputError, match=r"min_confidence must be in \[0, 1\), got 1"):
        write_texts(rewriter(), teacher(), PUBLIC, min_confidence=1.0)
    with pytest.raises(InputError, match="rewriter_lr must be > 0, got 0"):
        student_and_rewriter_adamw(None, 0.1, 0.0)


class _TwoTables(_FirstWord):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(WORDS, CLASSES)


def test_embeddings_are_looked_up_before_the_run_and_named_where_several_fit():
    other = nn.Sequential(nn.Embedding(WORDS + 1, 4), nn.Flatten(), nn.Linear(4 * LENGTH, CLASSES))
    with pytest.raises(InputError, match="student cannot be read: Sequential must have one .* got 0"):
        TrainingStep(other, methods=[DataFreeDistillation(teacher(), rewriter())])
    with pytest.raises(InputError, match="teacher cannot be read: _TwoTables must have .* got 2: embedding"):
        TrainingStep(network(1), methods=[DataFreeDistillation(_TwoTables(), rewriter())])
    # Neither is read word by word.
    one_step(DataFreeDistillation(teacher(), rewriter(), adversarial=0.0), other)
    one_step(DataFreeDistillation(_TwoTables(), rewriter().requires_grad_(False)), network(1))
    found = []
    double = network(1)
    path = next(name for name, part in double.named_modules() if isinstance(part, nn.Embedding))
    double.other = nn.Embedding(WORDS, CLASSES)
    for big, student, paths in (
        (teacher(), network(1), {}),
        (_TwoTables(), double, {"teacher_embedding": "embedding", "student_embedding": path}),
    ):
        method = DataFreeDistillation(big, rewriter(), **paths)
        one_step(method, student)
        found.append(method.rewriter.preferences.grad)
    assert torch.equal(*found)


def test_given_modules_are_left_apart(tmp_path: Path):
    """The pretrained rewriter that holds the new one back is a copy."""
    own = rewriter()
    method = DataFreeDistillation(teacher(), own)
    before = copy.deepcopy(own.state_dict())
    fit(network(1), IndexedDataset(PUBLIC), methods=[method], budget=Budget(steps=4))
    assert all(
        torch.equal(before[name], value) for name, value in method.pretrained.module.state_dict().items()
    )
    assert not torch.equal(before["preferences"], own.preferences.detach())
