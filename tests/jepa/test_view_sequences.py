"""seq-JEPA: the limit that is BYOL, what the summary may not know, the slow copy, and every kind of run."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.jepa import (
    ActionConditionedAggregator,
    ActionPredictor,
    EffectiveRankMonitor,
    LeJEPA,
    Rotations,
    Saccades,
    SeqJEPA,
    SequenceEncoder,
    Shifts,
    TransformChain,
    draw_views,
    next_view_loss,
)
from coloss.lab.claims import verify
from coloss.nn import MLP, Classifier
from coloss.train import Budget, State, TrainingStep, load_model, save_model


def new_encoder(norm: str | None = "batch") -> nn.Module:
    torch.manual_seed(0)
    return MLP(36, (12,), 8, norm=norm)


def new_classifier() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(MLP(36, (12, 8), norm=None), 3)


def small(*arguments, **options) -> SeqJEPA:
    defaults = {"observed": 2, "action_features": 4, "depth": 1, "heads": 2, "dropout": 0.0, "hidden": 16}
    return SeqJEPA(*arguments, **(defaults | options))


def images(count: int = 24) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def sequences(count: int = 24, steps: int = 3, dtype: torch.dtype = torch.float32) -> IndexedDataset:
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(count, steps + 1, 1, 6, 6, generator=generator, dtype=dtype)
    actions = torch.randn(count, steps, 2, generator=generator, dtype=dtype)
    return IndexedDataset(views, extras={"actions": actions})


def batches(labelled: bool = False) -> list[tuple[Tensor, ...]]:
    targets = torch.arange(24) % 3
    parts = images().split(8)
    return list(zip(parts, targets.split(8))) if labelled else [(part,) for part in parts]


def aggregator(**options) -> ActionConditionedAggregator:
    torch.manual_seed(0)
    defaults = {"features": 6, "action_dim": 3, "action_features": 6, "heads": 2, "depth": 2}
    return ActionConditionedAggregator(**(defaults | options)).double()


def pairs(batch: int = 5, views: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(batch, views, 6, generator=generator, dtype=torch.float64),
        torch.randn(batch, views, 3, generator=generator, dtype=torch.float64),
    )


def one_step(method: SeqJEPA, model: nn.Module, *batch) -> tuple[TrainingStep, dict[str, Tensor]]:
    state = State(model)
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1)
    torch.manual_seed(2)
    step = TrainingStep(model, None, [method], state=state)
    return step, step(*batch)


def test_one_view_without_actions_or_blocks_is_byols_loss_in_one_direction() -> None:
    method = small(observed=1, action_conditioned=False, depth=0, momentum=0.0)
    model = new_encoder(norm=None).double()
    inputs = images().double()
    step, terms = one_step(method, model, inputs)
    views, _ = draw_views(method.transform, inputs, 2, torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    byol_head = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    predicted, target = byol_head.double()(model(views[:, 0])), model(views[:, 1]).detach()
    expected = 2 - 2 * (F.normalize(predicted, dim=1) * F.normalize(target, dim=1)).sum(1)
    assert terms["next_view"].item() == pytest.approx(expected.mean().item() / 2, rel=1e-10)
    optimizer = torch.optim.SGD(step.trainable, lr=0.1)
    step.backward(terms)
    optimizer.step()
    step.after_step()  # at momentum 0 the slow copy is the encoder: SimSiam
    for name, value in method.target.module.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_order_of_the_first_pairs_does_not_matter_but_their_pairing_does() -> None:
    found = aggregator().eval()
    features, actions = pairs()
    order = torch.tensor([2, 0, 1, 3])
    plain = found(features, actions)
    torch.testing.assert_close(found(features[:, order], actions[:, order]), plain, rtol=0, atol=1e-12)
    assert (found(features, actions[:, order]) - plain).abs().max() > 1e-3
    last_moved = torch.tensor([3, 1, 2, 0])
    assert (found(features[:, last_moved], actions[:, last_moved]) - plain).abs().max() > 1e-3


def test_the_withheld_action_reaches_neither_the_summary_nor_its_statistics() -> None:
    features, actions = pairs()
    other = actions.clone()
    other[:, -1] += 100
    plain, changed, without = (aggregator(dropout=0.0).train() for _ in range(3))
    summary = plain(features, actions)
    assert torch.equal(summary, changed(features, other))
    assert torch.equal(summary, without(features, actions[:, :-1]))
    norm = plain.action_embedding[1]
    embedded = actions[:, :-1].reshape(-1, 3) @ plain.action_embedding[0].weight.T
    # The zeros that stand in for it are no actions: with them the variance would be smaller by a quarter.
    torch.testing.assert_close(norm.running_mean, 0.1 * embedded.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * embedded.var(0))
    assert torch.equal(norm.running_var, changed.action_embedding[1].running_var)


def test_actions_are_embedded_without_learned_scale_or_shift() -> None:
    found = aggregator()
    embedded = found.embed_actions(pairs(50)[1]).flatten(0, 1)
    torch.testing.assert_close(embedded.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(embedded.std(0, correction=0), torch.ones(6).double(), rtol=1e-3, atol=0)
    assert [name for name, p in found.action_embedding.named_parameters() if p.requires_grad] == ["0.weight"]


def test_the_summary_is_read_at_the_learned_token_and_takes_any_number_of_views() -> None:
    found = aggregator().eval()
    features, actions = pairs()
    assert found.out_features == 12 and torch.equal(found.token, torch.zeros(12).double())
    embedded = torch.cat([found.embed_actions(actions[:, :-1]), torch.zeros(5, 1, 6).double()], dim=1)
    tokens = torch.cat([torch.zeros(5, 1, 12).double(), torch.cat([features, embedded], dim=-1)], dim=1)
    torch.testing.assert_close(found(features, actions), found.transformer(tokens)[:, 0])
    for views in (1, 2, 4):
        given = actions[:, : views - 1] if views > 1 else None
        assert found(features[:, :views], given).shape == (5, 12)
    mean = aggregator(depth=0, action_dim=0)
    assert torch.equal(mean(features), features.mean(1))
    assert torch.equal(mean(features[:, :1]), features[:, 0])


class Given(nn.Module):
    """Predicts what it was told."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, summary: Tensor, action: Tensor) -> Tensor:
        return self.prediction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_is_one_minus_the_cosine(dtype: torch.dtype) -> None:
    features, actions = pairs()
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    loss = partial(next_view_loss, features, actions, aggregator=aggregator())
    assert float(loss(target=target, predictor=Given(target * 3))) == pytest.approx(0, abs=1e-5)
    assert float(loss(target=target, predictor=Given(target * -0.5))) == pytest.approx(2, abs=1e-5)
    other = target.flip(0)
    plain = loss(target=target, predictor=Given(other))
    assert 0 < plain < 2 and plain.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(loss(target=target * 4, predictor=Given(other * 8)), plain)
    assert float(loss(target=torch.zeros_like(target), predictor=Given(other))) == 1


def test_gradients_are_those_of_finite_differences_and_none_reaches_the_target() -> None:
    features, actions = pairs(3, 2)
    parts = aggregator(dropout=0.0, depth=1), ActionPredictor(12, 6, 5, 6).double()
    target = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = next_view_loss(features, actions, target, *parts)
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given: next_view_loss(given, actions, target.detach(), *parts), (features,)
    )


def test_no_gradient_reaches_the_slow_copy_and_its_buffers_are_the_encoders() -> None:
    method, model = small(), new_encoder()
    step, terms = one_step(method, model, images())
    step.train()
    step.backward(terms)
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    assert not any(module.training for module in method.target.module.modules())
    parts = (model, method.aggregator, method.predictor)
    trained = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert {id(p) for p in step.trainable} == trained
    assert all(p.grad is not None for p in step.trainable)
    coloss.fit(new_encoder(), (images(),), methods=[fitted := small()], budget=Budget(steps=5), batch_size=8)
    slow, encoder = fitted.target.module, fitted.sequence_encoder.encoder
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, slow.get_buffer(name))
    assert any(buffer.float().abs().sum() > 0 for _, buffer in slow.named_buffers())
    assert not torch.equal(slow.layers[0].weight, encoder.layers[0].weight)


def test_momentum_rises_from_996_to_1_by_half_a_cosine() -> None:
    seen = []

    class Watched(SeqJEPA):
        def on_step(self, state):
            super().on_step(state)
            seen.append(self.target.decay)

    method = Watched(observed=1, action_features=4, depth=0, hidden=8)
    coloss.fit(new_encoder(), (images(),), methods=[method], budget=Budget(steps=4), batch_size=8)
    expected = [1 - (1 - 0.996) * (math.cos(math.pi * step / 4) + 1) / 2 for step in range(1, 5)]
    assert seen == pytest.approx(expected)


def test_views_are_fresh_at_every_step_and_rows_stand_view_by_view() -> None:
    drawn, given = [], []

    class Watched(Shifts):
        def __call__(self, inputs, generator=None):
            views, parameters = super().__call__(inputs, generator)
            drawn.append((views, parameters))
            return views, parameters

    model = new_encoder()
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    data = (images(8),)
    coloss.fit(model, data, methods=[small(Watched())], budget=Budget(epochs=3), batch_size=8)
    assert len(torch.cat([parameters for _, parameters in drawn]).unique(dim=0)) == 3 * 8 * 3
    assert given[0].shape == (16, 1, 6, 6)
    views = drawn[0][0].unflatten(0, (8, 3))
    assert torch.equal(given[0], torch.cat([views[:, 0], views[:, 1]]))


def test_actions_in_the_loss_are_the_parameters_differences_in_units_of_their_spread() -> None:
    seen = []

    class Watched(coloss.Method):
        def terms(self, state):
            seen.append(state.batch.extras["actions"])
            return {}

    transform = TransformChain([Rotations(60), Shifts(0.1)])
    methods = [small(transform), Watched()]
    coloss.fit(new_encoder(), (images(500),), methods=methods, budget=Budget(steps=1), batch_size=500)
    assert seen[0].shape == (500, 2, 3)
    torch.testing.assert_close(seen[0].flatten(0, 1).std(0), torch.full((3,), 2**0.5), rtol=0.1, atol=0)


def test_views_may_come_with_the_data() -> None:
    data, method = sequences(), small(action_dim=2)
    model = new_encoder(norm=None).double()
    batch = {"inputs": data.inputs.double(), "actions": data.extras["actions"].double()}
    _, terms = one_step(method, model, batch)
    features = model(batch["inputs"].flatten(0, 1)).unflatten(0, (24, 4))
    torch.manual_seed(2)
    parts = (
        ActionConditionedAggregator(8, 2, 4, depth=1, heads=2, dropout=0.0).double(),
        ActionPredictor(12, 4, 16, 8).double(),
    )
    expected = next_view_loss(features[:, :-1], batch["actions"], features[:, -1], *parts)
    assert terms["next_view"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_actions_that_are_hidden_change_nothing() -> None:
    found = []
    for factor in (1.0, 50.0):
        data = sequences()
        data.extras["actions"] *= factor
        method = small(action_dim=2, action_conditioned=False)
        model = new_encoder()
        coloss.fit(model, data, methods=[method], budget=Budget(steps=3), batch_size=8)
        assert method.aggregator.out_features == 8
        found.append(weights(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    new_model = new_classifier if objective else new_encoder
    check_loops(new_model, small, batches(labelled=objective is not None), objective)


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_a_killed_run_resumes_bit_identically(objective, tmp_path: Path) -> None:
    new_model = new_classifier if objective else new_encoder
    method = partial(small, dropout=0.1)
    check_resume(new_model, method, (images(), torch.arange(24) % 3), tmp_path, objective)


def test_two_processes_with_the_same_views_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model, method = new_encoder(norm=None).double(), small(action_dim=2, momentum=0.5)
        torch.manual_seed(0)
        coloss.fit(
            model,
            sequences(dtype=torch.float64),
            methods=[method],
            budget=Budget(steps=4),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model) | {f"method.{name}": value for name, value in weights(method).items()}

    check_two_processes(train, tmp_path)


def test_micro_batches_are_joined_to_the_large_batch() -> None:
    found = []
    for accumulate, size in ((1, 24), (3, 8)):
        method, model = small(action_dim=2), new_encoder(norm=None).double()
        torch.manual_seed(0)
        coloss.fit(
            model,
            sequences(dtype=torch.float64),
            methods=[method],
            budget=Budget(steps=2),
            batch_size=size,
            accumulate=accumulate,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def test_it_composes_with_a_method_on_views_a_monitor_and_an_objective() -> None:
    monitor = EffectiveRankMonitor(every=2, min_scale=0.0, min_spread=0.0, min_rank_share=0.0)
    methods = [small(), LeJEPA(projector=(8, 4), num_slices=4), monitor]
    run = coloss.fit(new_encoder(), (images(),), methods=methods, budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"next_view", "invariance", "sigreg"}
    assert monitor.found and run.history[0].metrics["target_std"] > 0
    data = (images(), torch.arange(24) % 3)
    method = small(weight=0.5)
    run = coloss.fit(new_classifier(), data, F.cross_entropy, [method], budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"cross_entropy", "next_view"}
    assert method.term_weights == {"next_view": 0.5} and method.source.place == "head:input"
    assert method.encode(images()).shape == (24, 8)


def test_beside_an_objective_its_own_pass_leaves_no_trace() -> None:
    """With weight 0 the objective trains as if alone, batch norm and what other methods see included."""
    seen, data = [], (images(), torch.arange(24) % 3)

    class Watcher(coloss.Method):
        def terms(self, state):
            seen.append(state.outputs.detach())
            return {}

    def normed() -> nn.Module:
        torch.manual_seed(0)
        return Classifier(MLP(36, (12, 8)), 3)

    runs = [
        coloss.fit(
            normed(), data, F.cross_entropy, [*methods, Watcher()], budget=Budget(steps=3), batch_size=8
        )
        for methods in ([], [small(weight=0.0)])
    ]
    for name, value in weights(runs[0].model).items():
        assert torch.equal(weights(runs[1].model)[name], value)
    assert all(torch.equal(alone, beside) for alone, beside in zip(seen[:3], seen[3:], strict=True))


def test_both_halves_ship_and_are_loaded_back(tmp_path: Path) -> None:
    method, model = small(observed=3), new_encoder()
    before = set(model.state_dict())
    run = coloss.fit(model, (images(),), methods=[method], budget=Budget(steps=3), batch_size=8)
    assert run.model is model and set(model.state_dict()) == before
    views, angles = draw_views(method.transform, images(), 5, torch.Generator().manual_seed(0))
    actions = method.actions_of(angles)
    both = method.sequence_encoder
    assert torch.equal(method.encode(images()), run.model(images()).detach())
    features = run.model(views.flatten(0, 1)).unflatten(0, (24, 5))
    torch.testing.assert_close(method.aggregate(views, actions), method.aggregator.eval()(features, actions))
    assert not method.encode(images()).requires_grad
    save_model(both, tmp_path / "both.safetensors")
    fresh = SequenceEncoder(
        new_encoder(), ActionConditionedAggregator(8, 1, 4, depth=1, heads=2, dropout=0.0)
    )
    loaded = load_model(fresh, tmp_path / "both.safetensors").eval()
    torch.testing.assert_close(loaded.aggregate(views, actions), method.aggregate(views, actions))
    torch.testing.assert_close(loaded(images()), method.encode(images()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_training_in_half_precision_stays_finite_and_in_range(precision) -> None:
    run = coloss.fit(
        new_encoder(),
        (images(),),
        methods=[small()],
        budget=Budget(steps=3),
        fabric=Fabric(accelerator="cpu", devices=1, precision=precision),
        log_every=1,
    )
    assert all(0 <= point.terms["next_view"] <= 2 for point in run.history)
    assert all(bool(value.isfinite().all()) for value in run.model.parameters())


def test_patches_of_an_eye_train_as_other_views_do() -> None:
    method = small(Saccades(3))
    model = MLP(9, (12,), 8)
    run = coloss.fit(model, (images(),), methods=[method], budget=Budget(steps=2), batch_size=8, log_every=1)
    assert 0 <= run.history[-1].terms["next_view"] <= 2
    patches, places = draw_views(method.transform, images(), 3)
    assert method.aggregate(patches, method.actions_of(places)).shape == (24, 12)


def test_training_finds_what_the_next_view_looks_like() -> None:
    """Worlds of one bit that an action flips: only with actions can the next view be known."""
    generator = torch.Generator().manual_seed(0)
    identity = F.one_hot(torch.randint(8, (256,), generator=generator), 8).float()
    bits = torch.rand(256, 4, 1, generator=generator).round()
    flips = (bits[:, 1:] != bits[:, :-1]).float() * 2 - 1
    views = torch.cat([identity[:, None].expand(-1, 4, -1), bits * 2 - 1], dim=-1)
    data, losses = IndexedDataset(views, extras={"actions": flips}), {}
    for told in (True, False):
        torch.manual_seed(0)
        run = coloss.fit(
            nn.Linear(9, 8),
            data,
            methods=[small(action_dim=1, action_conditioned=told, hidden=32, momentum=1.0)],
            budget=Budget(steps=60),
            batch_size=64,
            optimizer=partial(torch.optim.AdamW, lr=1e-2),
        )
        losses[told] = run.history[-1].terms["next_view"]
    assert losses[True] < 0.7 * losses[False]


def test_bad_input_is_named(as_users_call: None) -> None:
    for options, message in (
        ({"observed": 0}, "observed must be >= 1, got 0"),
        ({"hidden": 0}, "hidden must be >= 1, got 0"),
        ({"meter_every": 0}, "meter_every must be >= 1, got 0"),
        ({"action_dim": 0}, "action_dim must be >= 1, and given without a transform, got 0"),
        (
            {"action_dim": 2, "transform": Rotations()},
            "action_dim must be >= 1, and given without a transform",
        ),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], or a schedule, got 1.5"),
        ({"weight": -1}, "weight must be >= 0, or a schedule, got -1"),
        ({"action": "angle"}, 'action must be "difference" or "quaternion"'),
        ({"action": "quaternion"}, "must begin with a quaternion of four numbers, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            SeqJEPA(**options)
    quick = {"budget": Budget(steps=1), "batch_size": 8}
    for data, methods, message in (
        ((images(),), [small(heads=5)], r"heads must divide features \+ action_features = 12, got 5"),
        ((torch.rand(8, 36),), [small()], r"views cannot be drawn: images must be \(batch, channels"),
        ((torch.ones(8, 1, 6, 6).long(),), [small()], "inputs must be one float tensor to make views of"),
        ((images(),), [LeJEPA(projector=(4,)), small()], "put it before other methods on views"),
        ((images(),), [small(action_dim=2)], 'their actions in the extra "actions", got none'),
        (sequences(), [small(action_dim=3)], r"action_dim = 3, got \(8, 4, 1, 6, 6\) and \(8, 3, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            coloss.fit(new_encoder(), data, methods=methods, **quick)
    labelled = (images(), torch.arange(24) % 3)
    with pytest.raises(InputError, match="cannot go beside an objective"):
        coloss.fit(new_classifier(), labelled, F.cross_entropy, [small(action_dim=2)], **quick)
    with pytest.raises(InputError, match="train it first"):
        small().encode(images())


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_saliency_below_zero_or_not_finite_is_named(value: float) -> None:
    def marked(found: Tensor) -> Tensor:
        saliency = torch.ones(len(found), 6, 6)
        saliency[2, 0, 5] = value
        return saliency

    with pytest.raises(ValueError, match=f"saliency must be >= 0 and finite, got {value}"):
        Saccades(3, saliency=marked)(images())


def test_bad_sizes_are_named(as_users_call: None) -> None:
    features, actions = pairs()
    for call, message in (
        (lambda: aggregator(heads=5), r"heads must divide features \+ action_features = 12, got 5"),
        (lambda: aggregator(action_dim=-1), "action_dim and depth must be >= 0, got -1 and 2"),
        (lambda: aggregator(action_features=0), "features and action_features must be >= 1, got 6 and 0"),
        (lambda: aggregator(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: aggregator()(features), "actions must be 3 for 4 views, got None"),
        (lambda: aggregator()(features, actions[:, :2]), "actions must be 3 for 4 views, got 2"),
        (lambda: aggregator()(features, actions[..., :2]), "actions must hold action_dim = 3 numbers, got 2"),
        (lambda: aggregator()(features[:, :0], actions), "features must be of at least one view, got 0"),
        (
            lambda: next_view_loss(features, actions[:, :3], features[:, 0], aggregator(), Given(features)),
            "actions must be 4, as many as views, got 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_claim_measures_both_halves_of_every_arm() -> None:
    found = verify("seq-jepa", smoke=True, seeds=1)
    assert {"actions hidden", "seq-jepa", "one view", "untrained", "raw pixels"} <= set(found["arms"])
    for arm in found["arms"].values():
        metrics = {name: value["mean"] for name, value in arm["metrics"].items()}
        assert {"action_r2", "action_r2_linear", "accuracy_aggregate", "accuracy_mean"} <= set(metrics)
        assert 0 < metrics["accuracy_mean"] <= 1 and metrics["action_r2"] < 1
