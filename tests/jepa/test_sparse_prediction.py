"""SparseJEPA: the proximal gradient step, what stays out of it, the meters, and every kind of run."""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes, weights
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import coloss
from coloss.data import MaskRequest, Masks
from coloss.errors import InputError
from coloss.jepa import (
    ActivationGroupSparsity,
    GaussianLatents,
    MaskedPrediction,
    SparseJEPA,
    prox_group_lasso_,
    sparse_map_trial,
)
from coloss.lab.claims import verify
from coloss.metrics import evaluate_encoder
from coloss.nn import Classifier, token_encoder_for_shape
from coloss.train import Budget, State, TrainingStep


def new_encoder() -> nn.Module:
    torch.manual_seed(0)
    return token_encoder_for_shape((1, 8, 8), dim=8, depth=1, heads=2, patch_size=4)


def new_classifier() -> nn.Module:
    return Classifier(new_encoder(), 3)


def half(request: MaskRequest) -> Masks:
    context = torch.arange(2).expand(1, request.batch_size, -1)
    return Masks(context, context + 2)


def ragged(request: MaskRequest) -> Masks:
    """Without chance: two quadrants are hidden where the first pixel is bright, else one."""
    hidden = 1 + (request.inputs[:, 0, 0, 0] > 0).long()[:, None]
    mask = (torch.arange(4) < hidden)[None]
    return Masks.of(~mask, mask)


def small(masker=half, **options) -> SparseJEPA:
    given = {"groups": 4, "predictor_depth": 1, "predictor_heads": 2, "strength": 0.02, "map_width": 3}
    return SparseJEPA(masker, **(given | options))


def samples() -> Tensor:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def started(method: SparseJEPA, model: nn.Module | None = None) -> tuple[TrainingStep, dict[str, Tensor]]:
    state = State(model or new_encoder())
    state.generator.manual_seed(0)
    state.local_generator.manual_seed(1)
    torch.manual_seed(2)
    step = TrainingStep(state.model, None, [method], state=state)
    return step, step(samples())


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
def test_the_map_takes_one_gradient_step_and_one_proximal_step_whatever_the_optimizer(optimizer) -> None:
    """Neither weight decay, nor Adam's step sizes, nor the penalty's gradient reach it."""
    method = small(prox_step=0.3, strength=0.05)
    step, terms = started(method)
    weight, own = method.map.weight, optimizer(step.trainable)
    for _ in range(2):
        expected = weight.detach().clone()
        total = sum(step.state.methods[0].term_weights[name] * term for name, term in terms.items())
        (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
        expected -= 0.3 * gradient
        prox_group_lasso_(expected, 0.3, 0.05)
        layer = method.map.layers[0].detach().clone()
        own.zero_grad()
        step.backward(terms)
        own.step()
        step.after_step()
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-7)
        assert not torch.equal(method.map.layers[0], layer)
        terms = step(samples())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clipping_in_a_run_reaches_the_maps_gradient_and_counts_it(momentum: float) -> None:
    """The optimizer is one that edits gradients in place, and still does not move the map."""
    steps, limit = [], 1e-3

    class Watched(SparseJEPA):
        def on_gradients(self, state):
            super().on_gradients(state)
            weight = self.map.weight
            gradients = [p.grad for p in state.trainable if p.grad is not None]
            assert any(gradient is weight.grad for gradient in gradients)
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            expected = weight.detach() - 0.3 * weight.grad * limit / (norm + 1e-6)
            prox_group_lasso_(expected, 0.3, 1e-5)
            steps.append((norm.item(), expected))

        def on_step(self, state):
            super().on_step(state)
            torch.testing.assert_close(self.map.weight.detach(), steps[-1][1], rtol=0, atol=1e-7)

    method = Watched(half, groups=4, predictor_depth=1, predictor_heads=2, prox_step=0.3, strength=1e-5)
    method._before_optimizer = RemovableHandle(OrderedDict())  # left by a run that was killed
    coloss.fit(
        new_encoder(),
        (samples(),),
        methods=[method],
        budget=Budget(steps=3),
        batch_size=24,
        clip_norm=limit,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=momentum, nesterov=momentum > 0, foreach=True),
    )
    assert len(steps) == 3
    assert min(norm for norm, _ in steps) > 2 * limit
    assert method._before_optimizer is None


def test_the_penalty_stands_in_no_loss() -> None:
    light, heavy = small(strength=0.0), small(strength=100.0)
    (_, first), (_, second) = started(light), started(heavy)
    assert first.keys() == second.keys() == {"latent_prediction", "generator_prior"}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_proximal_step_comes_before_the_average_moves_and_leaves_encoder_and_average_alone() -> None:
    seen = []

    class Watched(SparseJEPA):
        def on_step(self, state):
            slow = weights(self.target)
            prox = self.map.prox_step

            def watched(size, strength):
                seen.append(not [n for n, v in weights(self.target).items() if not torch.equal(v, slow[n])])
                prox(size, strength)

            self.map.prox_step = watched
            before = weights(state.model)
            super().on_step(state)
            seen.append(all(torch.equal(v, before[n]) for n, v in weights(state.model).items()))
            seen.append(any(not torch.equal(v, slow[n]) for n, v in weights(self.target).items()))
            del self.map.prox_step

    method = Watched(half, groups=4, predictor_depth=1, predictor_heads=2, strength=50.0, momentum=0.5)
    coloss.fit(new_encoder(), (samples(),), methods=[method], budget=Budget(steps=2), batch_size=8)
    assert seen == [True] * 6
    assert method.zero_columns() == 1


def test_a_strong_penalty_switches_columns_off_and_none_leaves_the_map_dense() -> None:
    shares = []
    for strength in (0.0, 0.12, 10.0):
        method = small(strength=strength)
        run = coloss.fit(
            new_encoder(),
            (samples(),),
            methods=[method],
            budget=Budget(steps=10),
            batch_size=24,
            log_every=10,
        )
        shares.append(method.zero_columns())
        assert run.history[-1].metrics["zero_columns"] == shares[-1]
        assert method.report(run.model, None) == {"zero_columns": shares[-1]}
        assert "target_std" in run.history[0].metrics
    assert shares[0] == 0
    assert 0 < shares[1] < 1
    assert shares[2] == 1


def test_codes_have_a_fixed_scale() -> None:
    seen = []

    class Watched(SparseJEPA):
        def form_predictions(self, context, found):
            self.map.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            return super().form_predictions(context, found)

    method = Watched(half, predictor_heads=2, groups=4)
    step, _ = started(method)
    assert not list(method.predictor.transformer.norm.parameters())
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(1, 24, 2), atol=1e-3, rtol=0)


def test_columns_vanish_where_the_gradient_of_the_loss_is_shorter_than_the_strength() -> None:
    method = small(strength=0.05, prox_step=0.1)
    method_step, terms = started(method)
    method.map.weight.data.zero_()
    terms = method_step(samples())
    (gradient,) = torch.autograd.grad(terms["latent_prediction"], method.map.weight, retain_graph=True)
    expected = gradient.norm(dim=1) > 0.05
    method_step.backward(terms)
    method_step.after_step()
    assert torch.equal(method.map.influence() > 0, expected)


def test_gaussian_latents_add_noise_and_their_divergence() -> None:
    latents = GaussianLatents(3, 2).double()
    codes = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, log_variance = latents.moments(codes).chunk(2, -1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    drawn = latents(codes, torch.Generator().manual_seed(3))
    again = latents(codes, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn[1], expected)
    assert torch.equal(drawn[0], again[0])
    many = torch.stack([latents(codes)[0] for _ in range(2000)])
    torch.testing.assert_close(many.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(many.std(0), normal.stddev, atol=0.1, rtol=0.1)
    latents.eval()
    assert torch.equal(latents(codes)[0], mean)
    nn.init.zeros_(latents.moments.weight)
    nn.init.zeros_(latents.moments.bias)
    assert (latents(codes)[1] == 0).all()


def test_beta_adds_the_divergence_over_hidden_tokens_that_count() -> None:
    method = small(ragged, beta=0.5)
    _, terms = started(method)
    assert method.term_weights["latent_kl"] == 0.5
    assert terms["latent_kl"] > 0
    step, _ = started(method)
    nn.init.zeros_(method.latents.moments.weight)
    method.latents.moments.bias.data.fill_(1.0)
    found = step(samples())["latent_kl"].item()
    assert found == pytest.approx(
        4 * 0.5 * (1 + torch.e - 1 - 1), rel=1e-5
    )  # four latents, mu = log sigma^2 = 1


def test_gradients_of_micro_batches_add_up() -> None:
    found = []
    for accumulate, size in ((1, 24), (3, 8)):
        method, model = small(), new_encoder().double()
        coloss.fit(
            model,
            (samples().double(),),
            methods=[method],
            budget=Budget(steps=2),
            batch_size=size,
            accumulate=accumulate,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        found.append(method.map.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [None, F.cross_entropy])
def test_fit_a_plain_loop_and_lightning_take_the_same_steps(objective) -> None:
    batches = list(zip(samples().split(8), (torch.arange(24) % 3).split(8)))
    model = check_loops(
        new_classifier if objective else new_encoder,
        lambda: small(beta=0.1),
        batches if objective else [batch[:1] for batch in batches],
        objective,
    )
    assert model.state_dict().keys() == (new_classifier() if objective else new_encoder()).state_dict().keys()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_killed_run_resumes_bit_identically(beta: float, tmp_path: Path) -> None:
    check_resume(new_encoder, lambda: small(beta=beta), (samples(),), tmp_path)


@pytest.mark.parametrize("masker", [half, ragged])
def test_two_processes_with_the_same_masks_take_the_steps_of_one(masker, tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model, method = new_encoder().double(), small(masker)
        torch.manual_seed(0)
        coloss.fit(
            model,
            (samples().double(),),
            methods=[method],
            budget=Budget(steps=4),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model) | {f"map.{name}": value for name, value in weights(method.map).items()}

    check_two_processes(train, tmp_path)


def test_bfloat16_training_and_another_method_beside_it() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    methods = [small(), ActivationGroupSparsity(groups=2)]
    run = coloss.fit(
        new_encoder(), (samples(),), methods=methods, budget=Budget(steps=2), fabric=fabric, log_every=1
    )
    assert set(run.history[-1].terms) == {"latent_prediction", "generator_prior", "activation_groups"}
    assert torch.tensor(list(run.history[-1].terms.values())).isfinite().all()
    assert methods[0].map.weight.dtype == torch.float32


def test_sparse_activations_beside_masked_prediction_and_an_objective() -> None:
    plain = ActivationGroupSparsity(groups=(6, 2), weight=0.5)
    state = State(new_encoder())
    step = TrainingStep(state.model, None, [plain], state=state)
    terms = step(samples())
    outputs = state.outputs
    expected = (6**0.5 * outputs[:, :6].norm(dim=1) + 2**0.5 * outputs[:, 6:].norm(dim=1)).mean()
    torch.testing.assert_close(terms["activation_groups"], expected)
    assert state.take_logged() == {"activation_std": outputs.std(0, correction=0).mean().item()}
    methods = [MaskedPrediction(half, predictor_heads=2), ActivationGroupSparsity(groups=4, weight=0.1)]
    data = (samples(), torch.arange(24) % 3)
    run = coloss.fit(new_classifier(), data, F.cross_entropy, methods, budget=Budget(steps=2), log_every=1)
    assert set(run.history[-1].terms) == {"cross_entropy", "latent_prediction", "activation_groups"}


def test_too_much_weight_on_activations_shrinks_them_to_zero_and_the_meter_says_so() -> None:
    found = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        method = ActivationGroupSparsity(groups=4, weight=weight, tap="1")
        run = coloss.fit(
            model,
            (samples(), torch.arange(24) % 8),
            lambda outputs, targets: F.cross_entropy(outputs, targets),
            [method],
            budget=Budget(steps=60),
            batch_size=24,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
            log_every=10,
        )
        found.append(
            (run.model(samples()).norm(dim=1).mean().item(), run.history[-1].metrics["activation_std"])
        )
    assert found[1][0] < 0.3 * found[0][0]
    assert found[1][1] < 0.3 * found[0][1]


def test_the_meter_of_activations_stands_beside_those_of_an_evaluation() -> None:
    part = [(samples(), torch.arange(24) % 3)]
    splits = SimpleNamespace(train=part, test=part)
    run = coloss.fit(
        new_encoder(),
        (samples(),),
        methods=[MaskedPrediction(half, predictor_heads=2), ActivationGroupSparsity(groups=4)],
        budget=Budget(steps=2),
        batch_size=24,
        evaluate=lambda model: evaluate_encoder(model, splits, k=1),
        evaluate_every=1,
        log_every=1,
    )
    assert {"activation_std", "feature_std"} <= set(run.history[0].metrics)


def test_activations_in_three_loops_and_resumed(tmp_path: Path) -> None:
    check_loops(new_encoder, lambda: ActivationGroupSparsity(4), [(part,) for part in samples().split(8)])
    check_resume(new_encoder, lambda: ActivationGroupSparsity(4), (samples(),), tmp_path)


def test_two_processes_share_the_mean_over_their_activations(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model = new_encoder().double()
        coloss.fit(
            model,
            (samples().double(),),
            methods=[ActivationGroupSparsity(groups=4)],
            budget=Budget(steps=3),
            batch_size=8,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            fabric=fabric,
        )
        return weights(model)

    check_two_processes(train, tmp_path)


def test_the_trial_measures_errors_where_the_encoder_is() -> None:
    """The device "meta" stands for an accelerator."""

    class Method(sparse_map_trial._Measured):
        def terms(self, state: State) -> None:
            assert state.batch.inputs.device.type == "meta"
            self.seen = torch.zeros(1, 2, 4, 3), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 3)

    found = sparse_map_trial._unexplained(Method(half), nn.Linear(2, 2, device="meta"), samples())
    assert found == 1


def test_the_claim_runs(read_by_predict_alone) -> None:
    read_by_predict_alone(sparse_map_trial)
    found = verify("sparsejepa", smoke=True, seeds=1)
    assert {"error", "zero_columns", "knn", "linear_probe"} <= found["arms"]["sparse"]["metrics"].keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseJEPA(strength=-1.0), "strength must be >= 0, or a schedule, got -1.0"),
        (lambda: SparseJEPA(prox_step=0.0), "prox_step must be > 0, or a schedule, got 0.0"),
        (lambda: SparseJEPA(prior=-1.0), "prior must be >= 0"),
        (lambda: SparseJEPA(beta=-0.1), "beta must be >= 0"),
        (lambda: SparseJEPA(groups=0), r"groups must be >= 1, got \[0\]"),
        (lambda: SparseJEPA(groups=()), "groups must be >= 1"),
        (lambda: SparseJEPA(map_width=0), "map_width must be >= 1"),
        (lambda: SparseJEPA(map_hidden=(0,)), "map_hidden must be >= 1"),
        (lambda: started(small(groups=3)), "groups must divide the 8 features, got 3"),
        (lambda: started(small(groups=(4, 5))), "add up to 8"),
        (lambda: ActivationGroupSparsity(0), "groups must be >= 1, got 0"),
        (lambda: ActivationGroupSparsity(weight=-1.0), "weight must be >= 0"),
        (lambda: ActivationGroupSparsity(meter_every=0), "meter_every must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_latents_need_sizes() -> None:
    with pytest.raises(ValueError, match="in_dim and latents must be >= 1, got 0 and 2"):
        GaussianLatents(0, 2)
