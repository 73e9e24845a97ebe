import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, differing, weights
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import coloss
from coloss import Budget, TrainingStep
from coloss.data import Batch
from coloss.distillation import (
    Branch,
    BranchOutputs,
    LayeredSelfDistillation,
    LogitDistillation,
    ProgressiveSelfDistillation,
    SelfDistillationLoss,
    layer_feature_loss,
    layer_kl_loss,
    soften_targets,
)
from coloss.distillation.self_distillation import CLAIM, SYSTEM
from coloss.lab import find_entry, verify
from coloss.lab.catalog import import_name
from coloss.nn import MLP, Classifier, ConvNet
from coloss.ops import joint_labels, rotate4, soft_cross_entropy_loss
from coloss.train.task import Setting

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CLASSES, COPIES = 3, 4


def new_model() -> Classifier:
    return Classifier(ConvNet(1, (2, 4)), CLASSES)


def new_data(rows: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 1, 6, 6, generator=generator)
    return inputs, torch.randint(CLASSES, (rows,), generator=generator), torch.arange(rows)


def setting_of(*shape: int) -> Setting:
    assert isinstance(CLAIM.task, coloss.Task)
    return Setting(CLAIM.task, 0, SimpleNamespace(input_shape=shape), Budget(steps=1))


def new_branch_outputs(rows: int, branches: int = 2) -> list[BranchOutputs]:
    return [
        BranchOutputs(torch.randn(rows * COPIES, CLASSES * COPIES), torch.randn(rows * COPIES, 5))
        for _ in range(branches)
    ]


# The losses


def test_without_past_and_weights_it_is_the_cross_entropies_of_hsakd() -> None:
    loss = SelfDistillationLoss(CLASSES, branches=2, copies=COPIES)
    _, targets, ids = new_data()
    for epoch in range(2):
        logits, branches = torch.randn(16, CLASSES), new_branch_outputs(16)
        terms = loss(logits, targets, ids, epoch, 0.0, branches)
        joint = sum(F.cross_entropy(branch.logits, joint_labels(targets, COPIES)) for branch in branches)
        torch.testing.assert_close(terms["soft_cross_entropy"], F.cross_entropy(logits, targets))
        torch.testing.assert_close(terms["joint_cross_entropy"], joint)
        torch.testing.assert_close(terms["layer_kl"], layer_kl_loss([b.logits for b in branches], 3.0))
        torch.testing.assert_close(
            terms["layer_features"], layer_feature_loss([b.features for b in branches])
        )


def test_without_branches_it_is_ps_kd() -> None:
    loss = SelfDistillationLoss(CLASSES, dtype="float32")
    _, targets, ids = new_data()
    before, order = torch.randn(16, CLASSES), torch.randperm(16)
    first = loss(before, targets, ids, 0, 0.9)
    assert first.keys() == {"soft_cross_entropy"}
    torch.testing.assert_close(first["soft_cross_entropy"], F.cross_entropy(before, targets))
    now = torch.randn(16, CLASSES)
    soft = 0.4 * F.one_hot(targets, CLASSES) + 0.6 * before.softmax(1)
    found = loss(now[order], targets[order], ids[order], 1, 0.6)["soft_cross_entropy"]
    torch.testing.assert_close(found, F.cross_entropy(now, soft))


def test_every_branch_and_copy_learns_from_its_own_past() -> None:
    loss = SelfDistillationLoss(CLASSES, branches=2, copies=COPIES, dtype="float32")
    _, targets, ids = new_data(4)
    before, now, order = new_branch_outputs(4), new_branch_outputs(4), torch.tensor([2, 0, 3, 1])
    logits = torch.randn(4, CLASSES)
    loss(logits, targets, ids, 0, 0.5, before)
    rows = (order.unsqueeze(1) * COPIES + torch.arange(COPIES)).flatten()
    shuffled = [BranchOutputs(b.logits[rows], b.features[rows]) for b in now]
    found = loss(logits[order], targets[order], ids[order], 1, 0.5, shuffled)["joint_cross_entropy"]
    expected = 0.0
    for past, present in zip(before, now):
        for sample in range(4):
            for turn in range(COPIES):  # one row at a time
                row = sample * COPIES + turn
                label = F.one_hot(targets[sample] * COPIES + turn, CLASSES * COPIES)
                soft = 0.5 * label + 0.5 * past.logits[row].softmax(0)
                expected -= float((soft * present.logits[row].log_softmax(0)).sum()) / 16
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_networks_own_past_can_soften_the_branches_too() -> None:
    loss = SelfDistillationLoss(CLASSES, branches=1, copies=COPIES, remember="classes", dtype="float32")
    assert set(loss.memory.rows.state_dict()) == {"ids", "classes"}
    _, targets, ids = new_data(4)
    before, (now,) = torch.randn(4, CLASSES), new_branch_outputs(4, 1)
    loss(before, targets, ids, 0, 0.5, new_branch_outputs(4, 1))
    found = loss(before, targets, ids, 1, 0.5, [now])["joint_cross_entropy"]
    classes = soften_targets(targets, before.softmax(1), 0.5)
    soft = torch.zeros(4, COPIES, CLASSES, COPIES)
    for turn in range(COPIES):
        soft[:, turn, :, turn] = classes
    torch.testing.assert_close(found, soft_cross_entropy_loss(now.logits, soft.view(16, -1)))


def test_what_was_left_out_for_an_epoch_keeps_its_label() -> None:
    loss = SelfDistillationLoss(CLASSES)
    logits, target, ids = torch.randn(1, CLASSES), torch.tensor([1]), torch.tensor([3])
    loss(logits, target, ids, 0, 0.8)
    torch.testing.assert_close(
        loss(logits, target, ids, 2, 0.8)["soft_cross_entropy"], F.cross_entropy(logits, target)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_left_and_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    loss = SelfDistillationLoss(CLASSES, branches=1, copies=1, dtype="float64")
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype, requires_grad=True)
    branch = BranchOutputs(logits, torch.zeros(1, 2, dtype=dtype))
    for epoch in range(2):
        terms = loss(logits, torch.tensor([1]), torch.tensor([0]), epoch, 0.5, [branch])
        assert all(
            term.dtype in (torch.float32, torch.float64) and term.isfinite() for term in terms.values()
        )
        (gradient,) = torch.autograd.grad(sum(terms.values()), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("remember", ["joint", "classes"])
def test_under_autocast_targets_keep_their_mass(remember: Any) -> None:
    """A row of targets that sums to 1.004, as bfloat16 would have it, changes the loss in the third digit."""
    losses = [
        SelfDistillationLoss(CLASSES, branches=1, copies=COPIES, remember=remember, dtype="float32")
        for _ in range(2)
    ]
    logits, branches, (_, targets, ids) = torch.randn(16, CLASSES), new_branch_outputs(16, 1), new_data()
    found = []
    for loss, enabled in zip(losses, (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for epoch in range(2):
                terms = loss(logits, targets, ids, epoch, 0.8, branches)
        found.append(terms)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=0)


def test_bad_input_to_the_losses() -> None:
    _, targets, ids = new_data(4)
    logits = torch.zeros(4, CLASSES)
    plain, branched = SelfDistillationLoss(CLASSES), SelfDistillationLoss(CLASSES, branches=2, copies=COPIES)
    for options, message in (
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"num_classes": 2, "copies": 0}, "copies must be >= 1, got 0"),
        ({"num_classes": 2, "branches": -1}, "branches must be >= 0, got -1"),
        ({"num_classes": 2, "temperature": 0.0}, r"temperature must be > 0 and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfDistillationLoss(**options)  # type: ignore[arg-type]
    for arguments, message in (
        ((logits, targets, None, 0, 0.5), "found by sample id and the batch has none"),
        ((torch.zeros(4, 2), targets, ids, 0, 0.5), r"logits \(batch, num_classes = 3\), got \(4, 2\)"),
        ((logits, torch.zeros(4, 3), ids, 0, 0.5), r"one class number for each of 4 rows, got torch.float32"),
        (
            (logits, torch.tensor([0, 1, 3, 0]), ids, 0, 0.5),
            r"targets must be in \[0, num_classes = 3\), got 3",
        ),
        ((logits, targets, ids, 0, 1.5), r"share must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(*arguments)
    with pytest.raises(ValueError, match="there must be 2 branches, got 1"):
        branched(logits, targets, ids, 0, 0.5, new_branch_outputs(4, 1))
    with pytest.raises(ValueError, match=r"a branch must give logits \(16, 12\) .* got \(12, 12\)"):
        branched(logits, targets, ids, 0, 0.5, new_branch_outputs(3))


# The methods


def test_ps_kd_in_a_run_is_its_loss_with_the_share_growing() -> None:
    """Two epochs of one batch, by hand."""
    inputs, targets, ids = new_data(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).double()
    by_hand = copy.deepcopy(model)
    seen = []
    coloss.fit(
        model,
        [(inputs.double(), targets, ids)],
        F.mse_loss,  # is replaced
        [ProgressiveSelfDistillation(dtype="float64")],
        budget=Budget(epochs=4),
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    past = None
    for epoch in range(4):
        logits = by_hand(inputs.double())
        labels = F.one_hot(targets, CLASSES).double()
        share = 0.8 * epoch / 4
        soft = labels if past is None else (1 - share) * labels + share * past
        past = logits.detach().softmax(1)
        seen.append(share)
        gradients = torch.autograd.grad(F.cross_entropy(logits, soft), list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients):
                parameter -= 0.5 * gradient
    for found, expected in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_branches_see_the_versions_in_the_order_of_their_labels() -> None:
    """The rows handed to the losses are what a plain pass over `rotate4` gives (no batch norm: it would see other batches)."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES))
    branch = Branch(nn.Flatten(), 64, CLASSES * COPIES)
    method = LayeredSelfDistillation(branches={"0": branch})
    inputs, targets, ids = new_data(4)
    step = TrainingStep(model, None, [method])
    terms = step(inputs, targets, ids)
    (found,) = method.branch_outputs(step.state)
    torch.testing.assert_close(found.logits, branch(model[0](rotate4(inputs))).logits)
    expected = F.cross_entropy(branch(model[0](rotate4(inputs))).logits, joint_labels(targets, COPIES))
    torch.testing.assert_close(terms["joint_cross_entropy"], expected)
    torch.testing.assert_close(terms["soft_cross_entropy"], F.cross_entropy(model(inputs), targets))


def test_an_empty_batch_has_no_versions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES))
    method = LayeredSelfDistillation(branches={"0": Branch(nn.Flatten(), 64, CLASSES * COPIES)})
    terms = TrainingStep(model, None, [method])(*(part[:0] for part in new_data()))
    assert all(term == 0 for term in terms.values()) and len(method.loss.memory.rows) == 0


def test_running_statistics_outputs_and_features_are_those_of_upright_images() -> None:
    """Batch norm is evaluated on upright images, so it must not average over turned ones."""
    model, twin = new_model(), new_model()
    twin.load_state_dict(model.state_dict())
    inputs, targets, ids = new_data()
    inputs = inputs + torch.linspace(0, 9, 6)  # far from looking the same when turned
    step = TrainingStep(model, None, [LayeredSelfDistillation()])
    step(inputs, targets, ids)
    outputs = twin(inputs)
    assert torch.equal(step.state.outputs, outputs)
    assert not differing(weights(model), weights(twin))


@pytest.mark.parametrize("variant", ["ps-kd", "lsskd"])
def test_what_ships_is_the_plain_model_in_weights_hooks_and_work(variant: str) -> None:
    model, plain = new_model(), new_model()
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    method = LayeredSelfDistillation.for_setting(
        setting_of(1, 6, 6),
        variant=variant,
    )
    data = new_data()
    run = coloss.fit(model, data, F.cross_entropy, [method], budget=Budget(epochs=2), batch_size=8)
    assert run.model is model
    assert list(model.state_dict()) == names and [name for name, _ in model.named_modules()] == modules
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in hooks)
    plain.load_state_dict(model.state_dict())
    work = []
    for network in (plain.eval(), model.eval()):
        with FlopCounterMode(display=False) as counter:
            network(data[0])
        work.append(counter.get_total_flops())
    assert work[0] == work[1] > 0
    assert torch.equal(plain(data[0]), model(data[0]))
    exported = [torch.export.export(network, (data[0],)) for network in (plain, model)]
    assert exported[0].graph_module.code == exported[1].graph_module.code
    assert torch.equal(exported[1].module()(data[0]), plain(data[0]))


def test_it_learns_the_joint_task_and_composes_with_another_method() -> None:
    inputs, targets, ids = new_data(24)
    inputs = inputs * 0.1
    inputs[torch.arange(24), 0, targets, 0] += 3.0  # a bright spot says class and turn
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    methods = [LayeredSelfDistillation(), LogitDistillation(teacher, weight=0.1)]
    model = Classifier(ConvNet(1, (8, 8), downsample=False), CLASSES)
    run = coloss.fit(
        model,
        (inputs, targets, ids),
        F.cross_entropy,
        methods,
        budget=Budget(epochs=20),
        batch_size=12,
        log_every=2,
        optimizer=partial(torch.optim.AdamW, lr=0.02),
    )
    first, last = run.history[0].terms, run.history[-1].terms
    assert set(last) == {
        "soft_cross_entropy",
        "joint_cross_entropy",
        "layer_kl",
        "layer_features",
        "logit_distillation",
    }
    assert last["joint_cross_entropy"] < 0.7 * first["joint_cross_entropy"]


@pytest.mark.parametrize("new_method", [ProgressiveSelfDistillation, LayeredSelfDistillation])
def test_it_trains_alike_in_every_loop(new_method: Any) -> None:
    inputs, targets, ids = new_data()
    batches = [(inputs[:8], targets[:8], ids[:8]), (inputs[8:], targets[8:], ids[8:])]
    check_loops(new_model, new_method, batches, F.cross_entropy)


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    """Kill and resumption fall into different epochs, so the tables must come back."""
    check_resume(
        new_model, LayeredSelfDistillation, new_data(), tmp_path, F.cross_entropy, steps=7, kill_at=4
    )


class Plain(nn.Module):
    """Without batch norm, whose statistics belong to a process."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.hidden(inputs))


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Plain().double()
        branches = {
            "hidden.1": Branch(nn.Linear(5, 5), 5, CLASSES * COPIES),
            "hidden": Branch(nn.Identity(), 5, CLASSES * COPIES),
        }
        method = LayeredSelfDistillation(branches=branches, dtype="float64")
        inputs, targets, ids = new_data()
        coloss.fit(
            model,
            (inputs.double(), targets, ids),
            F.cross_entropy,
            [method],
            budget=Budget(epochs=3),
            batch_size=8,
            optimizer=SGD,
            fabric=fabric,
        )
        assert len(method.loss.memory.rows) == 16
        return weights(model) | {"memory": method.loss.memory.rows.column("joint")}

    check_two_processes(train, tmp_path)


def test_series_run_backwards_and_vectors_stay_as_they_are() -> None:
    def build(*shape: int) -> LayeredSelfDistillation:
        method = LayeredSelfDistillation.for_setting(setting_of(*shape))
        assert isinstance(method, LayeredSelfDistillation)
        return method

    assert [build(*shape).copies for shape in ((1, 8, 8), (3, 50), (12,), (1, 8, 6))] == [4, 2, 1, 1]
    run = coloss.fit(
        Classifier(MLP(12, [5]), CLASSES),
        (torch.randn(16, 12), torch.randint(CLASSES, (16,))),
        methods=[build(12)],
        budget=Budget(epochs=2),
    )
    assert run.history[-1].terms["layer_kl"] == 0


def test_bad_input_to_the_methods() -> None:
    inputs, targets, ids = new_data(4)

    def one_step(method: Any, batch: Any, model: nn.Module | None = None) -> None:
        TrainingStep(model or new_model(), None, [method])(Batch.of(batch))

    for make, message in (
        (lambda: ProgressiveSelfDistillation(1.5), r"share must be in \[0, 1\], or a schedule, got 1.5"),
        (lambda: ProgressiveSelfDistillation(max_age=0), "max_age must be >= 1 epoch, got 0"),
        (lambda: ProgressiveSelfDistillation(num_samples=0), "num_samples must be >= 1, got 0"),
        (
            lambda: LayeredSelfDistillation(kl_weight=-1.0),
            "kl_weight must be >= 0 and finite, or a schedule, got -1.0",
        ),
        (lambda: LayeredSelfDistillation(temperature=0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: LayeredSelfDistillation(branches={}), "branches must hold at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    psd = ProgressiveSelfDistillation
    with pytest.raises(ValueError, match="share must stay in .* got 2.0 from the schedule at progress 0"):
        one_step(psd(lambda progress: 2.0), (inputs, targets, ids))
    with pytest.raises(ValueError, match="found by sample id and the batch has none"):
        one_step(psd(), (inputs, targets))
    mixed = replace(Batch(inputs, targets, ids), extras={"mixed_ids": ids})
    with pytest.raises(ValueError, match="says that inputs are mixed: leave out the mixing"):
        one_step(psd(), mixed)
    with pytest.raises(ValueError, match="num_classes must be given"):
        one_step(psd(), (inputs, targets, ids), ConvNet(1, (2,)))
    with pytest.raises(ValueError, match=r"square .* got shape \(4, 1, 6, 5\): give transformations"):
        one_step(LayeredSelfDistillation(), (inputs[..., 1:], targets, ids))
    with pytest.raises(ValueError, match=r"12 outputs \(3 classes in 4 versions\), got 7 at 'backbone'"):
        one_step(
            LayeredSelfDistillation(branches={"backbone": Branch(nn.Identity(), 4, 7)}),
            (inputs, targets, ids),
        )
    with pytest.raises(ValueError, match="branches cannot be placed: .* got 'backbon'"):
        one_step(
            LayeredSelfDistillation(branches={"backbon": Branch(nn.Identity(), 4, 12)}),
            (inputs, targets, ids),
        )
    uneven = {"backbone": Branch(nn.Identity(), 4, 12), "": Branch(nn.Identity(), CLASSES, 12)}
    with pytest.raises(ValueError, match=r"branches must have features of one width, got \[3, 4\]"):
        one_step(LayeredSelfDistillation(branches=uneven), (inputs, targets, ids))


# In the lab


def test_the_catalog_entry_names_what_exists() -> None:
    entry = find_entry("lsskd")
    assert entry.has_claim and entry.method == "coloss.distillation.LayeredSelfDistillation"
    assert [import_name(path).__name__ for path in SYSTEM.api] == [path.split(".")[-1] for path in SYSTEM.api]


def test_the_claims_test_images_are_nobodys_training_images() -> None:
    task = CLAIM.task
    assert isinstance(task, coloss.Task)
    tests, trains = [], []
    for seed in (0, 1, 100):
        splits = task.load(seed)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (300, 200, 400)
        tests.append(splits.test.ids)
        trains.append(splits.train.ids)
        assert not set(splits.test.ids.tolist()) & set(
            splits.train.ids.tolist() + splits.validation.ids.tolist()
        )
    assert torch.equal(tests[0], tests[1]) and torch.equal(tests[0], tests[2])
    assert not torch.equal(trains[0], trains[1])


def test_the_claim_runs() -> None:
    found = verify("lsskd", smoke=True, seeds=1)
    for arm in found["arms"].values():
        assert arm["metrics"].keys() >= {"accuracy", "nll", "ece"}
    assert {CLAIM.baseline, CLAIM.method} <= found["arms"].keys()
