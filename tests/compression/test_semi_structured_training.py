"""Facts about training towards n:m: whose steps the weights take, what each estimator masks, what is shipped, and every loop and restart."""

import copy
from functools import partial

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from coloss.compression import (
    AdamS,
    MaskedWeight,
    SemiStructuredSparsity,
    compress_model,
    compression_report,
    finalize_nm_,
    load_compressed,
    masked_to_kept_ratio,
    nm_violations,
)
from coloss.distillation import LogitDistillation
from coloss.errors import InputError
from coloss.lab import find_task
from coloss.lab.claims import verify
from coloss.nn import CausalLanguageModel
from coloss.ops import distillation_kl_loss, nm_mask
from coloss.train import Budget, Method, NonFiniteLossError, Setting, TrainingStep, fit

ESTIMATORS = ("cast", "ste", "sr-ste", "fixed")
ADAM = partial(torch.optim.AdamW, lr=0.01)


def new_model(dtype=torch.float32):
    """Layer "2" is chosen by rule, of layers "0", "2", "4"."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(
            dtype
        )


def new_data(dtype=torch.float32):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return inputs, inputs[:, :3].argmax(1)


def train(*methods, steps=8, optimizer=ADAM, dtype=torch.float32, **options):
    return fit(
        new_model(dtype),
        new_data(dtype),
        F.cross_entropy,
        methods,
        budget=Budget(steps=steps),
        optimizer=optimizer,
        batch_size=16,
        **options,
    )


class Watch(Method):
    """What the forward pass sees of layer 2, the gradient of its own weight, and the masks."""

    def __init__(self):
        super().__init__()
        self.seen, self.gradients, self.upstream, self.masks, self.outputs = [], [], [], [], []

    def on_batch(self, state):
        layer = state.model[2]
        self.seen.append(layer.weight.detach().clone())
        parts = getattr(layer, "parametrizations", {"weight": []})["weight"]
        self.masks += [part.mask.clone() for part in parts if isinstance(part, MaskedWeight)]

    def on_gradients(self, state):
        layer = state.model[2]
        weight = (
            layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
        )
        self.gradients.append(weight.grad.clone())

    def on_step(self, state):
        with torch.no_grad():
            self.outputs.append(state.model(new_data()[0]))


# Whose steps the weights take


def by_hand(eta, steps=8, clip=None):
    """The card's training in a plain loop, float64, one batch of 64."""
    model, (inputs, targets) = new_model(torch.float64), new_data(torch.float64)
    teacher = copy.deepcopy(model)
    rest = [p for name, p in model.named_parameters() if name != "2.weight"]
    inside = [{"params": [model[2].weight], "sparse": True}]
    adam_s = AdamS(inside, lr=0.01, decay=0.05, total_steps=steps, mask_every=3, eps=1e-16)
    adam = ADAM(rest, eps=1e-16)
    for _ in range(steps):
        logits = model(inputs)
        kl = distillation_kl_loss(logits, teacher(inputs).detach(), temperature=1.0)
        loss = (1 - eta) * F.cross_entropy(logits, targets) + eta * kl
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in (adam_s, adam):
            optimizer.step()
            optimizer.zero_grad()
    finalize_nm_(model)
    return model


@pytest.mark.parametrize(("eta", "clip"), [(0.25, None), (0.0, 0.1)])
def test_the_method_is_adam_s_on_the_chosen_weights_and_the_convex_loss(eta, clip):
    """Clipping comes before AdamS and sees all gradients; with eta, the sum is scaled and decay with it."""
    method = SemiStructuredSparsity(eta=eta, decay=0.05, mask_every=3, scale_groups=0, eps=1e-16)
    run = fit(
        new_model(torch.float64),
        new_data(torch.float64),
        F.cross_entropy,
        [method],
        budget=Budget(steps=8),
        optimizer=partial(ADAM, eps=1e-16),
        batch_size=64,
        clip_norm=clip,
    )
    expected = by_hand(eta, clip=clip).state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_runs_optimizer_keeps_nothing_of_the_chosen_weights_and_its_rate_holds():
    made = []

    def optimizer(parameters):
        made.append(torch.optim.AdamW([{"params": parameters, "lr": 0.02}], weight_decay=10.0))
        return made[0]

    class Rate(Method):
        rates = []

        def on_step(self, state):
            self.rates.append(method._second.adam.param_groups[0]["lr"])

    method = SemiStructuredSparsity(scale_groups=0, learning_rate=0.5)
    model = train(method, Rate(), optimizer=optimizer, learning_rate_schedule=lambda p: 1 - p, steps=4).model
    assert not made[0].state.get(model[2].weight) and made[0].state[model[0].weight]
    assert Rate.rates == [0.5, 0.375, 0.25, 0.125]


def test_micro_batches_make_the_steps_of_the_whole_batch():
    def run(**options):
        method = SemiStructuredSparsity(mask_every=2, correct_second_moment=True)
        model = new_model(torch.float64)
        data = new_data(torch.float64)
        return fit(
            model, data, F.cross_entropy, [method], budget=Budget(epochs=3), optimizer=ADAM, **options
        ).model

    whole, parts = run(batch_size=64), run(batch_size=16, accumulate=4)
    torch.testing.assert_close(whole[2].weight, parts[2].weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision):
    run = train(
        SemiStructuredSparsity(decay=0.1), fabric=Fabric(accelerator="cpu", devices=1, precision=precision)
    )
    weight = run.model[2].weight
    assert weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert nm_violations(run.model) == {"2": 0} and weight.isfinite().all()


# What each estimator does


def test_cast_empties_the_losers_and_straight_through_training_does_not():
    def ratio(estimator, steps):
        method = SemiStructuredSparsity(
            1, 8, estimator=estimator, **({"decay": 0.1, "prune": False} if estimator == "cast" else {})
        )
        run = train(method, steps=steps, learning_rate_schedule=lambda p: 1 - p)
        return run, method.masked_to_kept

    run, found = ratio("cast", 60)
    assert found.mean < 0.05 and masked_to_kept_ratio(run.model, 1, 8).mean == pytest.approx(
        found.mean, abs=0.02
    )
    inputs, targets = new_data()
    before = run.model(inputs)
    finalize_nm_(run.model, 1, 8)
    accuracy = [(outputs.argmax(1) == targets).float().mean() for outputs in (before, run.model(inputs))]
    assert accuracy[0] - accuracy[1] <= 0.02
    for estimator in ("ste", "fixed"):
        assert ratio(estimator, 2)[1].mean > 0.2


@pytest.mark.parametrize("estimator", ["ste", "sr-ste", "fixed"])
def test_masks_in_the_forward_pass(estimator):
    watch, method = Watch(), SemiStructuredSparsity(estimator=estimator, mask_every=2, eta=0)
    train(method, watch, optimizer=partial(torch.optim.SGD, lr=1.0), steps=5)
    first = nm_mask(new_model()[2].weight)
    assert torch.equal(watch.masks[0], first)
    for mask, seen in zip(watch.masks, watch.seen, strict=True):
        assert not seen[~mask].any() and (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    same = [torch.equal(one, other) for one, other in zip(watch.masks, watch.masks[1:], strict=False)]
    assert all(same) if estimator == "fixed" else same[0] and same[2] and not all(same)
    reached = watch.gradients[0][~first]
    assert not reached.any() if estimator == "fixed" else (reached != 0).all()


def test_sr_ste_adds_the_decay_of_the_masked_weights_to_the_gradient():
    found = {}
    for estimator, options in {"ste": {}, "sr-ste": {"decay": 0.5}}.items():
        watch = Watch()
        train(SemiStructuredSparsity(estimator=estimator, eta=0, **options), watch, steps=1)
        found[estimator] = watch.gradients[0]
    weight = new_model()[2].weight
    # Watch comes after the method, so it sees the edited gradient.
    expected = found["ste"] + 0.5 * weight * ~nm_mask(weight)
    torch.testing.assert_close(found["sr-ste"], expected.detach())


# What is shipped


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_shipped_is_plain_pruned_and_computes_what_was_trained(estimator, tmp_path):
    watch, method = Watch(), SemiStructuredSparsity(estimator=estimator, scale_groups=2)
    model = train(method, watch, optimizer=partial(torch.optim.AdamW, lr=0.05)).model
    assert type(model[2]) is nn.Linear and set(model.state_dict()) == set(new_model().state_dict())
    assert nm_violations(model) == {"2": 0}
    inputs = new_data()[0]
    if estimator == "cast":
        kept = train(
            SemiStructuredSparsity(scale_groups=2, prune=False), optimizer=partial(torch.optim.AdamW, lr=0.05)
        ).model
        torch.testing.assert_close(kept(inputs), watch.outputs[-1], rtol=0, atol=1e-6)
        finalize_nm_(kept)
        torch.testing.assert_close(kept(inputs), model(inputs), rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(model(inputs), watch.outputs[-1], rtol=0, atol=1e-6)
    compressed = compress_model(model)
    file = compressed.save(tmp_path / "model.coloss")
    restored = load_compressed(file).load_into(new_model())
    assert torch.equal(restored(inputs), model(inputs))
    # 16 x 16 weights at 2:4: 64 groups of 3 bits (6 patterns), 128 floats.
    assert compressed.weights["2.weight"].kind == "n:m" and compressed.weights["2.weight"].nbytes == 24 + 512


def test_the_report_says_bytes_and_both_metrics():
    targets = new_data()[1]
    dense = new_model()
    model = train(SemiStructuredSparsity(1, 8), steps=2).model
    report = compression_report(
        model,
        new_data()[0],
        before=dense,
        evaluate=lambda m: float((m(new_data()[0]).argmax(1) == targets).float().mean()),
    )
    assert report.bytes_after < report.bytes_before and report.largest_difference == 0.0
    assert report.metric_after == pytest.approx(
        (model(new_data()[0]).argmax(1) == targets).float().mean().item()
    )
    row = next(row for row in report.rows if row.name == "2.weight")
    assert row.density == 1 / 8 and row.bits == 32 / 8 + 3 / 8


def test_size_of_the_losers_is_logged_and_reported():
    """By the masks that AdamS has just pulled with, which are not sorted out a second time from the weights after its step."""
    means = {}

    class Look(Method):
        def on_step(self, state):
            ((weight, mask),) = method._second.adam.masks().items()
            means[state.step] = masked_to_kept_ratio([weight], masks=[mask]).mean

    method = SemiStructuredSparsity(mask_every=3)
    run = train(method, Look(), log_every=1, steps=7, optimizer=partial(torch.optim.AdamW, lr=0.05))
    logged = {point.step: point.metrics for point in run.history if "masked_to_kept_mean" in point.metrics}
    assert list(logged) == [1, 4, 7]
    assert [logged[step]["masked_to_kept_mean"] for step in logged] == [means[step] for step in logged]
    assert method.report(run.model, None) == {
        "masked_to_kept_before_pruning": method.masked_to_kept.mean,
        "largest_masked_before_pruning": method.masked_to_kept.max,
    }


# Every loop, restarts, several processes


def attached(make):
    """Make methods, and optimizers that the newest method is attached to, as a loop of one's own does."""
    methods = []

    def new_method():
        methods.append(make())
        return methods[-1]

    def new_optimizer(parameters):
        optimizer = ADAM(parameters)
        methods[-1].attach(optimizer)
        return optimizer

    return new_method, new_optimizer


def test_every_loop_takes_the_same_steps():
    new_method, optimizer = attached(partial(SemiStructuredSparsity, mask_every=3))
    inputs, targets = new_data()
    batches = list(zip(inputs.split(16), targets.split(16), strict=True))
    check_loops(new_model, new_method, batches, F.cross_entropy, optimizer=optimizer)


@pytest.mark.parametrize("estimator", ["cast", "sr-ste"])
def test_killed_and_resumed(estimator, tmp_path):
    check_resume(
        new_model,
        partial(SemiStructuredSparsity, estimator=estimator, mask_every=4, scale_groups=2),
        new_data(),
        tmp_path,
        F.cross_entropy,
    )


@pytest.mark.parametrize("estimator", ["cast", "sr-ste"])
def test_two_processes_equal_one(estimator, tmp_path):
    def work(fabric):
        return train(
            SemiStructuredSparsity(estimator=estimator, mask_every=3),
            fabric=fabric,
            dtype=torch.float64,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        ).model.state_dict()

    check_two_processes(work, tmp_path)


def test_beside_another_teacher():
    torch.manual_seed(0)
    teacher = nn.Linear(8, 3)
    run = train(SemiStructuredSparsity(eta=0), LogitDistillation(teacher, weight=0.5))
    assert sorted(run.history[-1].terms) == ["cross_entropy", "logit_distillation"]
    assert nm_violations(run.model) == {"2": 0}


def test_blocks_of_a_language_model():
    torch.manual_seed(0)
    model = CausalLanguageModel(11, dim=16, depth=1, heads=2)
    ids = torch.randint(11, (16, 6))
    targets = ids.clone()
    targets[:, 4:] = -100

    def objective(logits, targets):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)

    method = SemiStructuredSparsity(layers="transformer.blocks", ignore_index=-100)
    embedding = model.state_dict()
    embedding = {name: value.clone() for name, value in embedding.items()}
    run = fit(
        model, (ids, targets), objective, [method], budget=Budget(steps=3), optimizer=ADAM, batch_size=8
    )
    found = nm_violations(run.model, layers="transformer.blocks")
    assert len(found) >= 4 and set(found.values()) == {0}
    assert set(run.model.state_dict()) == set(embedding)


def test_tasks_of_the_lab_start_untrained_and_so_without_a_teacher():
    setting = Setting.of(find_task("digits"), 0, Budget(steps=2), smoke=True)
    method = SemiStructuredSparsity.for_setting(setting, n=1, m=8)
    assert method.eta == 0 and (method.n, method.m) == (1, 8)
    run = setting.fit(setting.new_model(), methods=[SemiStructuredSparsity.for_setting(setting, eta=0.3)])
    (method,) = run.methods
    wide = sum(p.numel() for p in method.teacher.parameters())
    assert wide > sum(p.numel() for p in run.model.parameters())


def test_the_claim_runs():
    found = verify("cast", smoke=True, seeds=1)
    assert found["metric"] == "accuracy" and found["method"]["name"] == "cast"


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5}, r"n must be in \[1, m\], got n=5, m=4"),
        ({"decay": -1.0}, "decay must be >= 0"),
        ({"decay": 1.0, "estimator": "ste"}, 'decay must be .* got 1.0 for "ste"'),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"learning_rate": 0.1, "estimator": "fixed"}, 'learning_rate must be .* got 0.1 for "fixed"'),
        ({"mask_every": 0}, "mask_every must be >= 1, got 0"),
        ({"eta": 1.0}, r"eta must be in \[0, 1\), got 1.0"),
        ({"eta": 0, "teacher": nn.Linear(1, 1)}, "teacher needs eta > 0"),
        ({"scale_groups": -1}, "scale_groups must be >= 0, got -1"),
        ({"prune": False, "estimator": "ste"}, 'prune=False needs estimator "cast"'),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SemiStructuredSparsity(**options)


def test_runs_that_would_be_something_else_are_refused():
    frozen = new_model()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(InputError, match="layers must be trainable, got frozen 2"):
        TrainingStep(frozen, F.cross_entropy, [SemiStructuredSparsity(layers="2")])
    model = new_model()
    with pytest.raises(InputError, match="teacher must not share parameters"):
        TrainingStep(model, F.cross_entropy, [SemiStructuredSparsity(teacher=model, layers="2")])
    assert all(parameter.requires_grad for parameter in model.parameters())
    empty = nn.Sequential()
    step = TrainingStep(model, F.cross_entropy, [SemiStructuredSparsity(teacher=empty, layers="2")])
    assert step.methods[0].teacher.module is empty
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InputError, match="must not be AdamS"):
        train(
            SemiStructuredSparsity(scale_groups=0),
            optimizer=lambda p: AdamS([{"params": [p[2]], "sparse": True}], total_steps=8),
        )
    with pytest.raises(InputError, match="must hold the weights of all chosen layers, got none of 2"):
        train(SemiStructuredSparsity(), optimizer=lambda p: torch.optim.SGD(p[:2], lr=0.1))
    with pytest.raises(InputError, match="must have one learning rate"):
        train(
            SemiStructuredSparsity(layers=["2", "4"], scale_groups=0),
            optimizer=lambda p: torch.optim.SGD([{"params": p[:3]}, {"params": p[3:], "lr": 0.2}], lr=0.1),
        )


def test_a_loop_of_ones_own_must_tell_its_optimizer_and_its_length():
    """Trap: without progress the ramp stays at zero, and nothing would ever be pulled."""
    inputs, targets = new_data()
    method = SemiStructuredSparsity()
    step = TrainingStep(new_model(), F.cross_entropy, [method])
    with pytest.raises(InputError, match=r"call attach\(optimizer\)"):
        step.backward(step(inputs, targets))
    optimizer = ADAM(step.trainable)
    method.attach(optimizer)
    step.backward(step(inputs, targets))
    optimizer.step()
    with pytest.raises(InputError, match=r"give TrainingStep\(total_steps=...\)"):
        step.after_step()


def test_a_weight_that_broke_ends_the_run_before_it_is_pruned():
    step = TrainingStep(new_model(), F.cross_entropy, [SemiStructuredSparsity(eta=0)], total_steps=2)
    step.model[2].parametrizations.weight.original.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="a weight is not finite at step 0"):
        step.finish()


@pytest.mark.parametrize("estimator", ["cast", "fixed"])
def test_weights_that_are_sharded_after_setup_are_refused(estimator):
    """Trap: a flattened shard has no groups, and its training would silently be plain."""
    method = SemiStructuredSparsity(estimator=estimator)
    step = TrainingStep(new_model(), F.cross_entropy, [method], total_steps=2)
    original = step.model[2].parametrizations.weight.original
    original.data = original.data.flatten()[:128]
    with pytest.raises(
        InputError, match="the weight of 2 is sharded: masks need whole weights, use strategy ddp"
    ):
        step(*new_data())


def test_outputs_that_are_no_logits_need_eta_zero():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = new_model()

        def forward(self, inputs):
            return self.network(inputs), 0

    def objective(outputs, targets):
        return F.cross_entropy(outputs[0], targets)

    def run(eta):
        return fit(
            Pair(),
            new_data(),
            objective,
            [SemiStructuredSparsity(eta=eta)],
            budget=Budget(steps=2),
            optimizer=ADAM,
        )

    with pytest.raises(InputError, match="the model must give a tensor of logits, got tuple: use eta=0"):
        run(0.5)
    assert nm_violations(run(0).model, layers="network.2") == {"network.2": 0}


def test_scales_learn_with_the_runs_optimizer():
    seen = {}

    class Look(Method):
        def on_step(self, state):
            seen[state.step] = state.model[2].parametrizations.weight[0].scale.detach().clone()

    train(SemiStructuredSparsity(), Look(), steps=2)
    assert seen[1].shape == (16, 2)
    assert ((seen[1] - 1).abs() > 1e-3).any() and not torch.equal(seen[1], seen[2])


def test_a_stored_state_of_other_shape_is_refused():
    def stepped(width):
        method = SemiStructuredSparsity(layers="0", eta=0, scale_groups=0)
        step = TrainingStep(nn.Sequential(nn.Linear(8, width)), F.cross_entropy, [method], total_steps=2)
        optimizer = ADAM(step.trainable)
        method.attach(optimizer)
        step.backward(step(torch.randn(4, 8), torch.zeros(4, dtype=torch.long)))
        optimizer.step()
        return method

    state = stepped(3).state_dict()
    assert {name.rsplit(".", 1)[1] for name in state} == {"mu", "v", "mask", "step"}
    with pytest.raises(RuntimeError, match=r"has shape \(3, 8\), the weight \(4, 8\)"):
        stepped(4).load_state_dict(state)
