"""Facts about pruning with a rank loss: both ways to apply it, exact zeros that ship, and every loop."""

from functools import partial

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from torch import nn
from torch.nn import functional as F

import coloss
from coloss.compression import (
    RankBasedPruning,
    compress_model,
    load_compressed,
    sparsity_report,
)
from coloss.compression.rank_pruning_trial import PRUNINGS
from coloss.errors import InputError
from coloss.lab import Comparison
from coloss.lab.claims import verify
from coloss.nn import MLP
from coloss.nn.causal_language_model import CausalLanguageModel, next_token_loss
from coloss.ops import low_rank_distance_loss
from coloss.train import Budget, Method, NonFiniteLossError, State, TrainingStep, UncertaintyWeighting, fit

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PATHS = ["layers.2", "layers.4"]
Prune = partial(RankBasedPruning, every=3, delta=0.2, rank_every=3)


def new_model():
    """Two of four layers are pruned: "layers.2" and "layers.4"."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MLP(6, (12, 12, 12), 3, norm=None)


def weights_of(model):
    return [model.get_submodule(path).weight for path in PATHS]


@pytest.fixture(scope="module")
def data():
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return inputs, torch.arange(64) % 3


class Watch(Method):
    """Keeps the gradients that the optimizer sees, and after each step which weights and moments are not 0."""

    def __init__(self):
        super().__init__()
        self.gradients, self.there, self.moments = [], [], []

    def on_gradients(self, state):
        self.gradients.append([weight.grad.clone() for weight in weights_of(state.model)])

    def on_step(self, state):
        weights = weights_of(state.model)
        self.there.append([weight != 0 for weight in weights])
        self.moments.append([state.optimizer.state[weight]["momentum_buffer"] != 0 for weight in weights])


def run(data, *methods, steps=20, **options):
    defaults = {"budget": Budget(steps=steps), "batch_size": 16, "optimizer": SGD}
    return fit(new_model(), data, F.cross_entropy, methods, **(defaults | options))


# What it does in `fit`


def test_masked_weights_gradients_and_moments_are_0_while_it_trains(data):
    method, watch = Prune(final_sparsity=0.9), Watch()
    found = run(data, method, watch, log_every=1)
    counts = [sum(int(m.sum()) for m in there) for there in watch.there]
    # Updates in the steps after 3, 6, ..., 18, where 0.9 of the 20 steps are done.
    expected = [round(288 * 0.1 ** min(min(step // 3 * 3, 18) / 18, 1)) for step in range(20)]
    assert all(count <= most for count, most in zip(counts, expected))
    assert counts[-1] == expected[-1] == 29
    for step in range(20):
        for gradient, moments in zip(watch.gradients[step], watch.moments[step]):
            assert int((gradient != 0).sum()) <= expected[step] or step < 3
            assert int(moments.sum()) <= expected[step] or step < 3
    densities = [point.metrics["density"] for point in found.history if "density" in point.metrics]
    assert densities == pytest.approx([0.1 ** (j / 6) for j in range(1, 7)])


def test_what_ships_is_a_plain_network_with_exact_zeros_and_equal_outputs(data):
    method = Prune(final_sparsity=0.9)
    seen = {}

    class Last(Method):
        def finish(self, state):
            seen["outputs"] = state.model(data[0]).detach()

    found = run(data, Last(), method)
    assert sum(int(weight.count_nonzero()) for weight in weights_of(found.model)) == 29
    assert torch.equal(found.model(data[0]), seen["outputs"])
    assert found.model.state_dict().keys() == new_model().state_dict().keys()
    assert {type(part).__module__.split(".")[0] for part in found.model.modules()} <= {"torch", "coloss"}
    assert not any(isinstance(part, Method) for part in found.model.modules())
    report = method.report(found.model, data)
    rows = sparsity_report(found.model, PATHS)
    assert report["density"] == pytest.approx(29 / 288)
    every = [m.weight for m in found.model.modules() if isinstance(m, nn.Linear)]
    assert report["density_of_all"] == pytest.approx(
        sum(int(w.count_nonzero()) for w in every) / sum(w.numel() for w in every)
    )
    assert report["dead_rows"] == sum(row.dead_rows for row in rows)
    assert report["delta_rank"] == sum(row.delta_rank for row in rows) / 2


def test_the_file_has_the_bytes_of_mask_and_values_and_loads_into_the_class(data, tmp_path):
    found = run(data, Prune(final_sparsity=0.95))
    stored = compress_model(found.model)
    for path, weight in zip(PATHS, weights_of(found.model), strict=True):
        assert stored.weights[f"{path}.weight"].kind == "sparse"
        assert stored.weights[f"{path}.weight"].nbytes == 144 // 8 + 4 * int(weight.count_nonzero())
    file = stored.save(tmp_path / "pruned.coloss")
    read = load_compressed(file).load_into(new_model())
    assert torch.equal(read(data[0]), found.model(data[0]))


def test_the_loss_is_added_every_few_steps_with_its_weight(data):
    """With no other loss the gradient of the first step is that of the rank loss, and of the second there is none."""
    method, watch = Prune(rank_weight=3.0, rank_every=2, final_sparsity=0.5), Watch()
    start = new_model()
    low_rank = 3.0 * low_rank_distance_loss(weights_of(start), 0.2)
    expected = torch.autograd.grad(low_rank, weights_of(start))
    found = fit(
        new_model(), data, lambda outputs, targets: 0.0 * outputs.sum(), [method, watch],
        budget=Budget(steps=2), optimizer=SGD, batch_size=16,
    )  # fmt: skip
    torch.testing.assert_close(watch.gradients[0], list(expected))
    assert not any(gradient.any() for gradient in watch.gradients[1])
    assert [sorted(point.terms) for point in found.history][:1] == [["low_rank_distance", "objective"]]


def test_growth_only_moves_no_weight_by_itself_but_changes_what_grows(data):
    """As in the authors' released code."""
    masks, gradients = {}, {}
    for weight in (0.0, 1e4):
        watch = Watch()
        method = Prune(apply="grow", rank_weight=weight, final_sparsity=0.7, alpha=1.0)
        run(data, method, watch, steps=5)
        masks[weight], gradients[weight] = watch.there, watch.gradients
    for step in range(3):
        for one, other in zip(gradients[0.0][step], gradients[1e4][step], strict=True):
            assert torch.equal(one, other)
    changed = [int((a != b).sum()) for a, b in zip(masks[0.0][-1], masks[1e4][-1], strict=True)]
    assert sum(changed) > 0
    # Where both have a weight at the update, its gradient is that of the task alone.
    for one, other in zip(gradients[0.0][3], gradients[1e4][3], strict=True):
        both = (one != 0) & (other != 0)
        assert both.any()
        assert torch.equal(one[both], other[both])


def test_scores_of_growth_are_the_size_of_both_gradients_together():
    model = new_model()
    method = Prune(apply="grow", rank_weight=2.0)
    method.setup(state := TrainingStep(model, F.cross_entropy, [Prune()]).state)
    for weight in weights_of(model):
        weight.grad = torch.ones_like(weight)
    pulls = torch.autograd.grad(low_rank_distance_loss(weights_of(model), 0.2), weights_of(model))
    for score, pull in zip(method._scores(), pulls, strict=True):
        torch.testing.assert_close(score, (1 + 2.0 * pull).abs())
    weights_of(model)[0].grad = None
    assert method._scores()[0] is None
    assert state.model is model


def test_the_rank_loss_raises_the_rank_at_equal_density(data):
    ranks = {}
    for weight in (0.0, 20.0):
        method = Prune(rank_weight=weight, rank_every=1, final_sparsity=0.8)
        ranks[weight] = method.report(run(data, method, steps=16).model, data)
    assert ranks[0.0]["density"] == ranks[20.0]["density"]
    assert ranks[20.0]["delta_rank"] > ranks[0.0]["delta_rank"]


def test_no_rank_loss_is_plain_gradual_pruning_without_any_svd(data, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    found = run(data, Prune(rank_weight=0.0))
    assert sorted(found.history[-1].terms) == ["cross_entropy"]


def test_momentum_cannot_push_a_pruned_weight_back_nor_decay_or_adam(data):
    for optimizer in (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    ):
        counts = []

        class Count(Method):
            def on_batch(self, state, counts=counts):
                counts.append(sum(int(weight.count_nonzero()) for weight in weights_of(state.model)))

        run(data, Prune(rank_weight=0.0, grow="none", final_sparsity=0.9), Count(), optimizer=optimizer)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 29


def test_what_other_methods_write_into_pruned_weights_is_taken_out(data):
    class Fill(Method):
        def on_step(self, state):
            with torch.no_grad():
                for weight in weights_of(state.model):
                    weight.add_(0.1)

    found = run(data, Fill(), Prune(final_sparsity=0.9))
    assert sum(int(weight.count_nonzero()) for weight in weights_of(found.model)) == 29


def test_a_run_that_ends_before_the_schedule_is_cut_with_a_warning(data):
    model = new_model()
    step = TrainingStep(model, F.cross_entropy, [Prune(final_sparsity=0.9)])
    step.state.optimizer = SGD(step.trainable)
    for _ in range(12):
        step.backward(step(*data))
        step.state.optimizer.step()
        step.state.optimizer.zero_grad()
        step.after_step()
    with pytest.warns(
        UserWarning, match="training ended at density 1, before the schedule.*until must be <= 1 - 1/steps"
    ):
        step.finish()
    assert sum(int(weight.count_nonzero()) for weight in weights_of(model)) == 29


@pytest.mark.parametrize(("steps", "warns"), [(10, False), (11, True)])
def test_a_rehearsal_of_ten_steps_is_cut_without_a_warning(recwarn, steps, warns):
    method = Prune(final_sparsity=0.9)
    state = State(new_model())
    method.setup(state)
    state.step = steps
    method.finish(state)
    assert [str(found.message)[:14] for found in recwarn] == ["training ended"] * warns
    assert sum(int(weight.count_nonzero()) for weight in weights_of(state.model)) == 29


def test_a_sparsity_that_leaves_nothing_is_refused_before_training():
    with pytest.raises(InputError, match="final_sparsity must leave a density of at least 1e-12"):
        RankBasedPruning(final_sparsity=1 - 1e-13)


def test_the_report_counts_a_shared_weight_once_and_decomposes_the_pruned_layers_alone(monkeypatch):
    model = new_model()
    model.layers[4].weight = model.layers[2].weight
    method = Prune(final_sparsity=0.75)
    method.setup(State(model))
    method.sparsifier.complete()
    calls = []
    monkeypatch.setattr(
        "coloss.compression.pruned_layers.delta_rank", lambda weight, delta: calls.append(weight) or 1
    )
    report = method.report(model, None)
    assert report["density"] == 0.25
    assert report["density_of_all"] == (72 + 36 + 36) / (72 + 144 + 36)
    assert len(calls) == 1
    # One that another method replaced by the end is left out.
    model.layers[2] = nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 12))
    assert "density" not in method.report(model, None)


# Other kinds of networks


def test_convolutions_and_tied_weights(data):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 3)
    )  # fmt: skip
    model[4].weight = model[3].weight
    method = Prune(final_sparsity=0.9)
    found = fit(
        model, (torch.randn(32, 1, 5, 5), torch.arange(32) % 3), F.cross_entropy, [method],
        budget=Budget(steps=12), batch_size=16,
    )  # fmt: skip
    assert int(model[1].weight.count_nonzero()) + int(model[3].weight.count_nonzero()) == round(
        0.1 * (96 + 24 * 24)
    )
    assert found.model[4].weight is found.model[3].weight


def test_a_language_model(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(11, (16, 9))
    model = CausalLanguageModel(11, dim=16, depth=1, heads=2)
    method = Prune(final_sparsity=0.8, layers="transformer.blocks")
    found = fit(
        model, (ids[:, :-1], ids[:, 1:]), next_token_loss, [method], budget=Budget(steps=6), batch_size=8
    )
    assert method.report(found.model, None)["density"] == pytest.approx(0.2, abs=1e-3)
    file = compress_model(found.model).save(tmp_path / "model.coloss")
    read = load_compressed(file).load_into(CausalLanguageModel(11, dim=16, depth=1, heads=2)).eval()
    assert torch.equal(read(ids), found.model(ids))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(data, precision):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    found = run(data, Prune(final_sparsity=0.9), fabric=fabric)
    assert sum(int(weight.count_nonzero()) for weight in weights_of(found.model)) == 29


# Composition, resumption, other loops


class OwnGradients(Method):
    """Takes over the backward pass, as gradient surgery does."""

    def backward(self, state, terms):
        state.set_gradients(state.gradients(sum(terms.values())))


class Distil(Method):
    """A teacher's outputs as a term, as distillation adds it."""

    def setup(self, state):
        self.teacher = new_model().requires_grad_(False)

    def terms(self, state):
        return {"distance": F.mse_loss(state.outputs, self.teacher(state.batch.inputs))}


def test_it_composes_with_a_taker_with_distillation_and_with_accumulation(data):
    for more, options in (
        ([OwnGradients()], {}),
        ([Distil()], {}),
        ([], {"accumulate": 2, "batch_size": 8}),
    ):
        found = run(data, Prune(rank_weight=1.0, rank_every=1), *more, steps=12, **options)
        assert "low_rank_distance" in found.history[-1].terms
        assert ("distance" in found.history[-1].terms) == any(isinstance(method, Distil) for method in more)
        assert sum(int(weight.count_nonzero()) for weight in weights_of(found.model)) == 29


def test_learned_weights_of_losses_need_the_term_in_every_step(data):
    combine = UncertaintyWeighting(["cross_entropy", "low_rank_distance"])
    assert run(data, Prune(rank_every=1), combine=combine, steps=4).steps == 4
    with pytest.raises(InputError, match="UncertaintyWeighting was made for terms"):
        run(data, Prune(rank_every=2), combine=UncertaintyWeighting(combine.names))


@pytest.mark.parametrize("options", [{}, {"apply": "grow"}, {"grow": "random"}])
def test_killed_and_resumed_ends_bit_identically(data, tmp_path, options):
    check_resume(
        new_model, partial(Prune, final_sparsity=0.9, **options), data, tmp_path, F.cross_entropy, steps=10, kill_at=7
    )  # fmt: skip


def test_every_loop_takes_the_same_steps(data):
    states = []

    class Known(RankBasedPruning):
        def setup(self, state):
            super().setup(state)
            states.append(state)

    def optimizer(parameters):
        """A loop of one's own names its optimizer."""
        own = SGD(parameters)
        states[-1].optimizer = own
        return own

    batches = [(inputs, targets) for inputs, targets in zip(data[0].split(16), data[1].split(16))]
    shipped = check_loops(
        new_model, partial(Known, final_sparsity=0.9, every=2, rank_every=1), batches, F.cross_entropy,
        epochs=3, optimizer=optimizer,
    )  # fmt: skip
    assert sum(int(weight.count_nonzero()) for weight in weights_of(shipped)) == 29


def test_two_processes_do_what_one_does(tmp_path):
    def train(fabric):
        torch.manual_seed(0)
        inputs, targets = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
        method = Prune(final_sparsity=0.9, rank_weight=1.0)
        found = fit(
            new_model().double(), (inputs, targets), F.cross_entropy, [method], budget=Budget(steps=12),
            batch_size=16, optimizer=SGD, fabric=fabric,
        )  # fmt: skip
        return {**found.model.state_dict(), **{k: m.double() for k, m in method.sparsifier.masks.items()}}

    check_two_processes(train, tmp_path)


# The lab


def test_the_lab_builds_it_from_what_a_person_types(tmp_path):
    arms = ["rpg", "rpg:final_sparsity=0.5:rank_weight=0", "rpg:apply=grow:layers=backbone.layers.3:every=2"]
    result = Comparison("iris", arms, seeds=1, budget=Budget(steps=10)).run(tmp_path)
    densities = [trial.metrics["density"] for trial in result.trials]
    assert densities == pytest.approx([0.1, 0.5, 0.1], abs=0.01)


def test_the_claim_runs(monkeypatch):
    # One arm of each kind: "gradual, own setting" is "gradual" at another weight decay.
    ways = {name: way for name, way in PRUNINGS.items() if name != "gradual, own setting"}
    monkeypatch.setattr("coloss.compression.rank_pruning_trial.PRUNINGS", ways)
    found = verify("rpg", smoke=True, seeds=1)
    sizes = set()
    for arm in found["arms"].values():
        metrics = {name: values["values"][0] for name, values in arm["metrics"].items()}
        assert metrics["density"] == pytest.approx(0.02, abs=1e-5)
        assert metrics["accuracy"] == metrics["accuracy_before_export"]
        sizes.add(metrics["bytes"])
    assert max(sizes) - min(sizes) < 64


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity must be in \[0, 1\), got 1"),
        ({"rank_weight": -1.0}, "rank_weight must be >= 0 and finite, got -1"),
        ({"rank_weight": float("nan")}, "rank_weight must be >= 0 and finite, got nan"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1"),
        ({"rank_every": 0}, "rank_every must be >= 1, got 0"),
        ({"apply": "grow", "grow": "none"}, 'apply="grow" needs grow="gradient" and alpha > 0'),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        RankBasedPruning(**options)


def test_bad_use_is_named(data):
    model = new_model()
    step = TrainingStep(model, F.cross_entropy, [Prune()], total_steps=4)
    with pytest.raises(InputError, match="set state.optimizer of the training step"):
        step.backward(step(*data))
    step.state.optimizer = SGD(step.trainable)
    model.layers[2] = nn.Linear(12, 12)
    with pytest.raises(InputError, match="the weight layers.2 was replaced or sharded after setup"):
        step(*data)
    model.layers[2].requires_grad_(False)
    with pytest.raises(InputError, match="got a frozen one, layers.2"):
        TrainingStep(model, F.cross_entropy, [Prune(layers="layers.2")])
    with pytest.raises(InputError, match="layers must be paths of the model, got 'layer.2'"):
        TrainingStep(model, F.cross_entropy, [Prune(layers="layer.2")])
    with pytest.raises(InputError, match="layers must have at least two rows and columns"):
        TrainingStep(nn.Sequential(nn.Linear(3, 1)), F.cross_entropy, [Prune(layers="0")])
    model = new_model()
    model.layers[2].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="low_rank_distance|cross_entropy"):
        coloss.fit(model, data, F.cross_entropy, [Prune()], budget=Budget(steps=2))
