"""Facts about LeJEPA: the statistic, the loss, and the method in every kind of training loop."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import coloss
from coloss.data import MultiView, small_image_views, stacked_views
from coloss.errors import InputError, UnknownNameError
from coloss.jepa import (
    LeJEPA,
    SIGReg,
    default_views,
    epps_pulley,
    invariance_loss,
    lejepa_loss,
    projection_head,
)
from coloss.jepa.univariate import UNIVARIATE, moment_match
from coloss.lab.claims import verify
from coloss.nn import MLP, Classifier, ConvNet, SyncBatchNorm1d
from coloss.ops import random_directions
from coloss.train import Budget, Method, Setting, State, TrainingStep, UncertaintyWeighting, cosine, fit
from coloss.train.encoder_task import digits_encoder_task

KNOTS = torch.arange(17, dtype=torch.float64) * 3 / 16
QUADRATURE = torch.full((17,), 2 * 3 / 16, dtype=torch.float64) * torch.exp(-(KNOTS**2) / 2)
QUADRATURE[[0, -1]] /= 2


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("samples", [4, 64, 512])
def test_floor_under_the_goal_is_the_same_for_every_number_of_samples(samples):
    floor = (QUADRATURE * (1 - torch.exp(-(KNOTS**2)))).sum().item()
    assert floor == pytest.approx(1.0525, abs=1e-4)
    found = SIGReg(num_slices=256)(normal(40, samples, 16))
    # 40 independent clouds; directions of one cloud are correlated.
    assert found.item() == pytest.approx(floor, abs=0.06)


def test_collapse_to_the_origin_costs_in_proportion_to_the_samples():
    height = (QUADRATURE * (1 - torch.exp(-(KNOTS**2) / 2)) ** 2).sum().item()
    assert height == pytest.approx(0.4020, abs=1e-4)
    for samples in (10, 1000):
        assert SIGReg(8)(torch.zeros(samples, 3)).item() == pytest.approx(samples * height, rel=1e-5)


@pytest.mark.parametrize(("scale", "limit"), [(0.5, 0.1512), (2.0, 0.2361), (1.0, 0.0)])
def test_scale_is_judged(scale, limit):
    embeddings = scale * normal(20_000, 4)
    assert SIGReg(64)(embeddings).item() / 20_000 == pytest.approx(limit, abs=2e-3)


def test_order_of_samples_does_not_matter_and_neither_does_rotation_on_average():
    embeddings = normal(100, 6) ** 3
    rotation, _ = torch.linalg.qr(normal(6, 6, seed=1))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    value = SIGReg(8192)(embeddings)
    assert SIGReg(8192)(embeddings[order]).item() == pytest.approx(value.item(), rel=1e-5)
    assert SIGReg(8192)(embeddings @ rotation).item() == pytest.approx(value.item(), rel=0.02)
    assert SIGReg(8192)(embeddings + 1).item() > 1.5 * value.item()


def test_a_missing_direction_is_seen():
    embeddings = normal(512, 8)
    flat = embeddings.clone()
    flat[:, 0] = 0
    assert SIGReg(512)(flat) > 1.3 * SIGReg(512)(embeddings)


def test_value_is_the_mean_over_its_slices(generator):
    embeddings = normal(30, 5, dtype=torch.float64)
    value = SIGReg(12, knots=9, t_max=2.0)(embeddings, generator)
    directions = random_directions(5, 12, torch.Generator().manual_seed(0), torch.float64)
    assert value.item() == pytest.approx(
        epps_pulley(embeddings @ directions, 2.0, 9).mean().item(), rel=1e-12
    )


def test_chunks_change_nothing(generator):
    embeddings = normal(3, 30, 5, dtype=torch.float64).requires_grad_()
    seen = []
    for chunk in (None, 5):
        value = SIGReg(12, chunk_size=chunk)(embeddings, torch.Generator().manual_seed(1))
        seen.append((value, *torch.autograd.grad(value, embeddings)))
    for one, other in zip(*seen):
        assert torch.allclose(one, other, rtol=1e-12)


def test_views_are_judged_one_by_one_not_in_one_heap(generator):
    # Each view is off to its own side; together they are centred, which a test of the mixture would accept more readily.
    views = normal(2, 256, 4)
    views[0] += 0.5
    views[1] -= 0.5
    value = SIGReg(64)(views)
    each = sum(SIGReg(64)(view) for view in views) / 2
    assert value.item() == pytest.approx(each.item(), rel=1e-5)
    assert SIGReg(64)(views.flatten(0, 1)).item() < 0.5 * value.item()


def test_slices_are_new_at_every_call_and_equal_wherever_it_is_called():
    embeddings = normal(50, 8) ** 2
    one, other = SIGReg(4), SIGReg(4)
    first = [one(embeddings).item() for _ in range(3)]
    torch.rand(5)  # a process whose global generator has moved on
    assert [other(embeddings).item() for _ in range(3)] == first
    assert len(set(first)) == 3
    resumed = SIGReg(4)
    resumed.load_state_dict(one.state_dict())
    assert resumed(embeddings).item() == one(embeddings).item()
    given = [SIGReg(4)(embeddings, torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert given[0] == given[1] != given[2]


def test_another_test_in_the_slot(generator):
    # moment_match over all directions asks for mean 0 and covariance 1: VICReg's two terms.
    embeddings = normal(4000, 3, dtype=torch.float64)
    assert SIGReg(64, univariate=moment_match)(embeddings).item() < 1e-3
    assert SIGReg(64, univariate=moment_match)(embeddings * 0).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    embeddings = (5 * normal(64, 8)).to(dtype).requires_grad_()
    value = SIGReg(32)(embeddings)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(SIGReg(32)(embeddings.detach().float()).item(), rel=1e-6)
    value.backward()
    assert embeddings.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SIGReg(32)(embeddings.detach().float()).item() == value.item()


@pytest.mark.parametrize("samples", [0, 1])
def test_no_sample_and_one_sample(samples):
    embeddings = torch.ones(2, samples, 4, requires_grad=True)
    loss, _ = lejepa_loss(embeddings, sigreg=SIGReg(8))
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()


def test_invariance_by_hand():
    views = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[4.0, 6.0]]])
    # Around the mean (2, 2) of all: 4 + 4, 0 + 4, 4 + 16. Around the mean (1, 0) of the first two: 1, 1, 9 + 36.
    assert invariance_loss(views).item() == pytest.approx(32 / 6)
    assert invariance_loss(views, global_views=2).item() == pytest.approx(47 / 6)
    assert invariance_loss(views[:1]).item() == 0
    # Twice the mean squared distance to the mean is the mean squared distance of pairs.
    pairs = torch.stack([(a - b).square().mean() for a in views for b in views]).mean()
    assert invariance_loss(views).item() == pytest.approx(pairs.item() / 2)


def test_gradient_flows_through_the_mean():
    views = normal(3, 5, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(invariance_loss, global_views=2), views)
    (found,) = torch.autograd.grad(invariance_loss(views, 1), views)
    assert torch.allclose(found.sum(0), torch.zeros(5, 2, dtype=torch.float64))
    assert found[0].abs().max() > 0


def test_loss_weighs_its_terms(generator):
    views = normal(4, 64, 8)
    loss, terms = lejepa_loss(views, weight=0.2, sigreg=SIGReg(16), global_views=2)
    assert set(terms) == {"invariance", "sigreg"}
    assert terms["invariance"].item() == invariance_loss(views, 2).item()
    assert terms["sigreg"].item() == SIGReg(16)(views).item()
    assert loss.item() == pytest.approx(0.8 * terms["invariance"].item() + 0.2 * terms["sigreg"].item())


def test_loss_alone_takes_its_slices_from_the_generator(generator):
    views = normal(2, 16, 4)
    first, _ = lejepa_loss(views, generator=torch.Generator().manual_seed(3))
    second, _ = lejepa_loss(views, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    without, _ = lejepa_loss(views)
    again, _ = lejepa_loss(views)
    assert first.item() == second.item() == without.item() != again.item()


def test_descent_on_the_loss_spreads_a_collapsed_cloud():
    embeddings = (0.01 * normal(1, 128, 3)).requires_grad_()
    sigreg, optimizer = SIGReg(32), torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        lejepa_loss(embeddings, sigreg=sigreg)[0].backward()
        optimizer.step()
    covariance = torch.cov(embeddings.detach()[0].T)
    assert torch.allclose(covariance, torch.eye(3), atol=0.25)
    assert embeddings.mean(1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SIGReg(0), "num_slices must be >= 1, got 0"),
        (lambda: SIGReg(knots=1), "knots must be >= 2, got 1"),
        (lambda: SIGReg(t_max=0.0), "t_max must be > 0 and finite, got 0"),
        (lambda: SIGReg(chunk_size=0), "chunk_size must be >= 1, got 0"),
        (lambda: invariance_loss(torch.zeros(0, 2, 2)), "at least one view, got 0"),
        (lambda: invariance_loss(torch.zeros(2, 2, 2), 3), r"global_views must be in \[1, 2\], got 3"),
        (lambda: lejepa_loss(torch.zeros(2, 2, 2), weight=1.5), r"weight must be in \[0, 1\], got 1.5"),
        (lambda: projection_head(4, ()), "at least one"),
        (lambda: projection_head(4, (0, 2)), "each >= 1"),
        (lambda: LeJEPA(weight=-0.1), r"weight must be in \[0, 1\]"),
        (lambda: LeJEPA(scale=-1), "scale must be >= 0"),
        (lambda: LeJEPA(views=0), "views must be >= 1, got 0"),
        (lambda: LeJEPA(num_slices=0), "num_slices must be >= 1, got 0"),
        (lambda: LeJEPA(global_views=5), r"global_views must be in \[1, views = 4\], got 5"),
        (lambda: LeJEPA(projector=()), "projector must hold widths"),
        (lambda: default_views(torch.zeros(2)), "give a view function"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_projector_ends_in_a_linear_layer_without_a_norm():
    head = projection_head(10, (6, 5, 3))
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, SyncBatchNorm1d, nn.ReLU, nn.Linear, SyncBatchNorm1d, nn.ReLU, nn.Linear]
    assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [6, 5, 3]
    assert [type(layer) for layer in projection_head(10, (3,))] == [nn.Linear]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 20), (3, 16, 16), (1, 40, 40), (2, 30), (7,)])
def test_default_views_fit_every_kind_of_input(shape, generator):
    inputs = torch.rand(6, *shape, generator=generator)
    views = default_views(inputs, 3, torch.Generator().manual_seed(1))
    assert views.shape == (3, 6, *shape)
    assert views.isfinite().all()
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views, default_views(inputs, 3, torch.Generator().manual_seed(1)))


def test_view_functions_may_give_lists(generator):
    inputs = torch.rand(4, 1, 8, 8)
    views = stacked_views(MultiView([lambda x, generator: x, lambda x, generator: 1 - x]), inputs)
    assert torch.equal(views, torch.stack([inputs, 1 - inputs]))


@pytest.mark.parametrize(
    ("view", "inputs", "message"),
    [
        (lambda x, generator: [x, x[:, :1]], torch.zeros(4, 2), r"one shape, got \[\(4, 1\), \(4, 2\)\]"),
        (lambda x, generator: x, torch.zeros(4, 2), r"view must give \(views, 4, ...\), got shape \(4, 2\)"),
        (
            lambda x, generator: x[None],
            torch.zeros(4, 2).long(),
            "float tensor to make views of, got torch.int64",
        ),
        (lambda x, generator: x[None], (torch.zeros(4), torch.zeros(4)), "got tuple"),
    ],
)
def test_views_that_do_not_fit_are_refused(view, inputs, message):
    with pytest.raises(InputError, match=message):
        stacked_views(view, inputs)


def network(objective):
    return encoder() if objective is None else classifier()


class Stop(Exception):
    pass


class StopAt(Method):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise Stop


class Watcher(Method):
    """Notes what another method may rely on after LeJEPA's terms."""

    def setup(self, state):
        state.tap("hidden", "backbone")
        self.seen = []

    def terms(self, state):
        hidden = state.features["hidden"]
        self.seen.append((state.batch.inputs.shape, state.outputs, hidden, state.model.head(hidden)))
        return {"size": 0.01 * hidden.square().mean()}


@pytest.fixture
def images():
    return torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets():
    return torch.arange(96) % 3


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ConvNet(1, (8, 12))


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Classifier(MLP(64, (16,)), 3)


def test_terms_are_those_of_the_loss_on_the_same_views(images):
    method = LeJEPA(weight=0.1, views=3, num_slices=8)
    step = TrainingStep(encoder(), None, [method])
    step.state.generator.manual_seed(5)
    step.state.local_generator.manual_seed(6)
    terms = step(images)
    views = default_views(images, 3, torch.Generator().manual_seed(6))
    twin = nn.Sequential(encoder(), method.projector)
    embeddings = twin(views.flatten(0, 1)).unflatten(0, (3, 96))
    loss, expected = lejepa_loss(
        embeddings, weight=0.1, sigreg=SIGReg(8), generator=torch.Generator().manual_seed(5)
    )
    for name in ("invariance", "sigreg"):
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
    assert step.combine(step.state, terms).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_batch_without_labels_becomes_all_its_views(images, targets):
    method = LeJEPA(views=3, projector=(5,))
    step = TrainingStep(encoder(), None, [method])
    step(images, targets, torch.arange(96))
    batch = step.state.batch
    assert batch.inputs.shape == (288, 1, 8, 8)
    assert torch.equal(batch.targets, targets.repeat(3))
    assert torch.equal(batch.ids, torch.arange(96).repeat(3))
    assert batch.extras["embeddings"].shape == (288, 5)
    assert not batch.extras["embeddings"].requires_grad


def test_views_differ_between_processes_and_slices_do_not(images):
    seen = []
    for number in range(2):
        state = State(encoder())
        state.local_generator.manual_seed(number)
        method = LeJEPA(num_slices=4)
        method.sigreg.register_forward_pre_hook(lambda module, given: seen.append(given[1].get_state()))
        TrainingStep(state.model, None, [method], state=state)(images)
        seen.append(state.batch.inputs)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


def test_schedules_of_weight_and_scale(images):
    method = LeJEPA(weight=lambda progress: 0.5 * progress, scale=2.0)
    step = TrainingStep(encoder(), None, [method], total_steps=4)
    step.state.progress = 0.5
    terms = step(images)
    expected = 2 * (0.75 * terms["invariance"] + 0.25 * terms["sigreg"])
    assert step.combine(step.state, terms).item() == pytest.approx(expected.item(), rel=1e-6)


def test_beside_an_objective_the_batch_and_what_others_see_stay(images, targets):
    watcher, model = Watcher(), classifier()
    step = TrainingStep(model, F.cross_entropy, [LeJEPA(views=2, scale=0.1), watcher])
    plain = model(images)
    before = {name: value.clone() for name, value in model.named_buffers()}
    terms = step(images, targets)
    after_batch = dict(model.named_buffers())
    assert terms["cross_entropy"].item() == pytest.approx(F.cross_entropy(plain, targets).item(), rel=1e-6)
    (shape, outputs, hidden, from_hidden) = watcher.seen[0]
    assert shape == images.shape
    assert outputs.shape == (96, 3)
    assert torch.equal(outputs, from_hidden)
    # Batch norm's running statistics have moved by the batch alone, once.
    twin = classifier()
    twin(images)
    twin(images)
    for name, value in twin.named_buffers():
        assert torch.equal(after_batch[name], value), name
        assert not torch.equal(before[name], value)


def test_beside_an_objective_features_enter_before_the_classifier(images, targets):
    model = classifier()
    step = TrainingStep(model, F.cross_entropy, [LeJEPA()])
    terms = step(images, targets)
    gradients = torch.autograd.grad(
        terms["invariance"] + terms["sigreg"],
        [model.head.weight, model.backbone.layers[0].weight],
        allow_unused=True,
    )
    assert gradients[0] is None
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_training_leaves_the_model_as_it_was_built(images, targets, objective):
    model = network(objective)
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    method = LeJEPA(num_slices=16)
    run = fit(model, (images, targets), objective, [method], budget=Budget(steps=6), batch_size=32)
    assert list(run.model.state_dict()) == keys
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert {"invariance", "sigreg"} <= set(run.history[-1].terms)
    assert run.model is model


def test_training_spreads_embeddings_where_invariance_alone_lets_them_shrink():
    data, smallest = (normal(128, 8),), []
    for weight in (0.0, 0.2):
        method = LeJEPA(weight=weight, num_slices=32, projector=(32, 4))
        run = fit(
            MLP(8, (32,), 16), data, methods=[method], budget=Budget(steps=60), batch_size=128,
            optimizer=partial(torch.optim.AdamW, lr=5e-3),
        )  # fmt: skip
        with torch.no_grad():
            embeddings = method.projector.eval()(run.model.eval()(data[0]))
        smallest.append(embeddings.std(0).min().item())
    assert smallest[0] < 0.1 < 0.4 < smallest[1]


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stop_and_go_on(images, targets, tmp_path, objective, stop):
    def go(*extra, **options):
        method = LeJEPA(num_slices=8, views=2)
        names = ["invariance", "sigreg"] + ["cross_entropy"] * (objective is not None)
        return fit(
            network(objective), (images, targets), objective, [method, *extra], budget=Budget(steps=7), batch_size=40,
            combine=UncertaintyWeighting(names), learning_rate_schedule=cosine(), log_every=2, **options,
        )  # fmt: skip

    whole = go()
    with pytest.raises(Stop):
        go(StopAt(stop), checkpoint_dir=tmp_path, checkpoint_every=2)
    resumed = go(StopAt(-1), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    for one, other in ((whole.model, resumed.model), (whole.methods[0], resumed.methods[0])):
        first, second = one.state_dict(), other.state_dict()
        assert list(first) == list(second)
        for name, value in first.items():
            assert (
                torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            )
    assert [p.terms for p in whole.history] == [p.terms for p in resumed.history]


def test_plain_loop_and_fit_go_the_same_way(images):
    run = fit(
        encoder(), [(images,)] * 3, methods=[LeJEPA(num_slices=8, projector=(6, 2))], budget=Budget(steps=3),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    state = State(encoder())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state.generator.manual_seed(0)
        state.local_generator.manual_seed(1_000_003)
        step = TrainingStep(state.model, None, [LeJEPA(num_slices=8, projector=(6, 2))], state=state)
    optimizer = torch.optim.SGD(step.trainable, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step.backward(step(images))
        optimizer.step()
        step.after_step()
    for one, other in zip(run.model.parameters(), step.finish().parameters()):
        assert torch.allclose(one, other, atol=1e-6)


def test_in_a_lightning_trainer_it_is_an_auxiliary_loss(images, targets):
    lightning = pytest.importorskip("lightning.pytorch")
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = classifier()

        def training_step(self, batch, index):
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, method = Module(), LeJEPA(num_slices=8)
    lightning.Trainer(
        max_steps=3, callbacks=[coloss.MethodCallback([method])], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    ).fit(module, DataLoader(TensorDataset(images, targets), batch_size=32))  # fmt: skip
    assert set(module.state_dict()) == {f"model.{name}" for name in classifier().state_dict()}
    fresh = projection_head(16, (128, 16))
    assert not torch.equal(method.projector[0].weight, fresh[0].weight)
    assert not torch.equal(module.model.backbone.layers[0].weight, classifier().backbone.layers[0].weight)


def test_bfloat16_training(images):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = fit(encoder(), (images,), methods=[LeJEPA(num_slices=8)], budget=Budget(steps=3), fabric=fabric)
    assert all(math.isfinite(value) for value in run.history[-1].terms.values())
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_the_width_of_features_must_be_known(images):
    class Anonymous(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP(64, (8,))

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(
        InputError, match="Anonymous does not declare the width of its features: give in_features"
    ):
        fit(Anonymous(), (images,), methods=[LeJEPA()], budget=Budget(steps=1))
    for options in ({"in_features": 8}, {"tap": "inner"}):
        assert fit(Anonymous(), (images,), methods=[LeJEPA(**options)], budget=Budget(steps=1)).steps == 1
    with pytest.raises(InputError, match="close ones: inner"):
        fit(Anonymous(), (images,), methods=[LeJEPA(tap="innner")], budget=Budget(steps=1))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Conv2d(1, 4, 3), {"in_features": 4}, r"one vector for each row, got \(384, 4, 6, 6\) at the model's output"),
        (MLP(64, (8,)), {"view": lambda x, generator: x[None], "global_views": 2}, "at least global_views = 2 views, got 1"),
    ],
)  # fmt: skip
def test_models_and_views_that_do_not_fit_are_refused(images, model, options, message):
    with pytest.raises(InputError, match=message):
        fit(model, (images,), methods=[LeJEPA(**options)], budget=Budget(steps=1), batch_size=96)


def test_the_lab_builds_it_by_name():
    setting = Setting(digits_encoder_task(Budget(steps=1)), 0, None, Budget(steps=1))
    assert (
        LeJEPA.for_setting(setting, univariate="moment_match", weight=0.2).sigreg.univariate is moment_match
    )
    for name in UNIVARIATE:
        LeJEPA.for_setting(setting, univariate=name)
    with pytest.raises(UnknownNameError, match="did you mean 'moment_match'"):
        LeJEPA.for_setting(setting, univariate="momentmatch")


def test_views_of_digits_are_those_of_the_floor_below(images):
    expected = small_image_views(images, 4, torch.Generator().manual_seed(1))
    assert torch.equal(default_views(images, 4, torch.Generator().manual_seed(1)), expected)


def test_claim_runs():
    found = verify("lejepa", smoke=True, seeds=1)
    metrics = set(found["arms"]["lejepa"]["metrics"])
    assert {
        "knn",
        "linear_probe",
        "raw_knn",
        "raw_linear_probe",
        "rankme_embeddings",
        "embedding_std",
    } <= metrics
    assert found["metric"] == "knn"
