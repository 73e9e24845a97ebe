"""Several heads with a temperature for each pair: the formulas of every form, where they are ill-posed, and what every method promises."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import coloss
from coloss.contrastive import (
    AdaptiveMultiHead,
    AdaptiveMultiHeadLoss,
    FeaturePairTemperature,
    MultiHeadProjector,
    NTXent,
    PairTemperature,
    adaptive_barlow_twins_loss,
    adaptive_contrastive_loss,
    adaptive_simsiam_loss,
    nt_xent_loss,
    omega,
    similarity_overlap,
)
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import MLP, Classifier
from coloss.train import Budget, Setting
from coloss.train.encoder_task import digits_encoder_task

DOUBLE = torch.float64


def new_views(samples: int = 5, heads: int = 3, dim: int = 4) -> Tensor:
    return torch.randn(2, samples, heads, dim, dtype=DOUBLE)


def new_temperature(dim: int = 4, **options) -> PairTemperature:
    torch.manual_seed(1)
    return PairTemperature(dim, 8, **options).double()


def normaliser(tau: float, dim: int) -> float:
    return 1 / tau + dim / 2 * math.log(tau)


def by_formula(views: Tensor, temperature: PairTemperature, beta: float, base: str, competes: bool) -> float:
    """The table of losses, anchor by anchor and head by head."""
    rows = F.normalize(views.flatten(0, 1), dim=2)
    count, samples, heads, dim = len(rows), views.shape[1], views.shape[2], views.shape[3]
    total = 0.0
    for i in range(count):
        positive = (i + samples) % count
        others = [k for k in range(count) if k % samples != i % samples]
        tau = torch.stack([temperature(rows[i], rows[k]) for k in range(count)]).tolist()
        for c in range(heads):
            s = (rows[:, c] @ rows[i, c]).tolist()
            t = tau[positive][c]
            if base == "max":
                n = max(others, key=s.__getitem__)
                if competes and s[positive] >= s[n]:
                    continue
                t_n = tau[n][c]
                total += -s[positive] / t + s[n] / t_n + beta * (normaliser(t, dim) - normaliser(t_n, dim))
            else:
                terms = [math.exp(s[k] / tau[k][c]) for k in [*others, positive]]
                total += -s[positive] / t + math.log(sum(terms)) + beta * normaliser(t, dim)
    return total / count


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("base", "competes"), [("max", False), ("max", True), ("logsumexp", False)])
def test_contrastive_forms_equal_their_formulas(beta, base, competes):
    torch.manual_seed(0)
    views, temperature = new_views(), new_temperature()
    loss = adaptive_contrastive_loss(*views, temperature, beta=beta, base=base, positive_competes=competes)
    with torch.no_grad():
        assert loss.item() == pytest.approx(by_formula(views, temperature, beta, base, competes))


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.9, 0.9), st.integers(1, 200), st.floats(0.05, 1.0))
def test_where_the_temperature_of_a_positive_is_best(cosine, dim, beta):
    """2(1 - s)/d for the likelihood, 2(beta - s)/(beta d) in general; none at all for s >= beta."""

    def cost(tau: float) -> float:
        return -cosine / tau + beta * float(omega(torch.tensor(tau, dtype=DOUBLE), dim))

    best = 2 * (beta - cosine) / (beta * dim)
    if cosine >= beta:
        assert cost(1e-4) < cost(1e-3) < cost(1e-2)
    elif best > 1e-3:
        found = minimize_scalar(
            cost, bounds=(best / 10, best * 10), method="bounded", options={"xatol": 1e-9}
        )
        assert found.x == pytest.approx(best, rel=1e-3)
    one = minimize_scalar(
        lambda tau: -cosine / tau + float(omega(torch.tensor(tau, dtype=DOUBLE), dim)),
        bounds=(0.2 * (1 - cosine) / dim, 20 * (1 - cosine) / dim),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert one.x == pytest.approx(2 * (1 - cosine) / dim, rel=1e-3)


def test_a_negatives_temperature_has_a_maximum_and_no_minimum():
    """The trap of the published form: descent takes it to a bound, from either side."""
    cosine, beta, dim = 0.0, 0.5, 128
    peak = 2 * (beta - cosine) / (beta * dim)
    for start, direction in ((2 * peak, 1.0), (peak / 2, -1.0)):
        tau = torch.tensor(start, dtype=DOUBLE, requires_grad=True)
        (slope,) = torch.autograd.grad(cosine / tau - beta * omega(tau, dim), tau)
        assert -slope.sign().item() == direction


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.floats(0.0, 3.0), st.floats(0.0, 1e4))
def test_temperatures_stay_within_their_bounds(seed, low, width, scale):
    generator = torch.Generator().manual_seed(seed)
    temperature = PairTemperature(3, 4, bounds=(low, low + width))
    first, second = scale * torch.randn(2, 5, 2, 3, generator=generator)
    tau = temperature(first, second)
    assert (tau >= low * (1 - 1e-6)).all() and (tau <= (low + width) * (1 + 1e-6)).all()
    torch.testing.assert_close(tau, temperature(second, first))


@pytest.mark.parametrize("heads", [None, 3])
def test_temperatures_of_all_pairs_are_those_of_each(heads):
    temperature, views = new_temperature(heads=heads), new_views()
    found = temperature.pairwise(views[0], views[1][:4])
    for i in range(5):
        for j in range(4):
            torch.testing.assert_close(found[i, j], temperature(views[0, i], views[1, j]))


def test_one_head_at_a_constant_temperature_is_the_hardest_negative_minus_the_positive():
    views = new_views(heads=1).requires_grad_()
    loss = adaptive_contrastive_loss(*views, new_temperature(bounds=(0.2, 0.2)), beta=0.0)
    rows = F.normalize(views.flatten(0, 1).squeeze(1), dim=1)
    scores = rows @ rows.T
    same = torch.arange(5).repeat(2)
    hardest = scores.masked_fill(same[:, None] == same, -math.inf).amax(1)
    expected = ((hardest - scores.diagonal(5).repeat(2)) / 0.2).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, views)[0] for value in (loss, expected)))


def test_it_is_the_limit_of_nt_xent_at_low_temperature():
    views = new_views(heads=1)
    hinge = adaptive_contrastive_loss(
        *views, new_temperature(bounds=(1.0, 1.0)), beta=0.0, positive_competes=True
    )
    assert 1e-4 * nt_xent_loss(views.squeeze(2), 1e-4).item() == pytest.approx(hinge.item(), abs=1e-3)


def test_several_heads_at_a_constant_temperature_are_the_sum_of_nt_xent():
    views = new_views()
    for beta in (0.0, 0.3):
        loss = adaptive_contrastive_loss(
            *views, new_temperature(bounds=(0.5, 0.5)), beta=beta, base="logsumexp"
        )
        each = sum(nt_xent_loss(views[:, :, head], 0.5) for head in range(3))
        torch.testing.assert_close(loss, each + 3 * beta * omega(torch.tensor(0.5, dtype=DOUBLE), 4))


@pytest.mark.parametrize("base", ["max", "logsumexp"])
def test_the_order_of_heads_does_not_matter_and_each_learns_for_itself(base):
    views, temperature = new_views().requires_grad_(), new_temperature()
    loss = adaptive_contrastive_loss(*views, temperature, base=base)
    (gradient,) = torch.autograd.grad(loss, views)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss, adaptive_contrastive_loss(*views[:, :, order], temperature, base=base))
    assert not torch.allclose(gradient[:, :, 0], gradient[:, :, 1])


def test_gradients_reach_embeddings_and_the_temperatures_network():
    views = new_views(samples=2, heads=1, dim=2).requires_grad_()
    temperature = new_temperature(2, reads_only=False)
    for base in ("max", "logsumexp"):
        assert torch.autograd.gradcheck(
            lambda both, base=base: adaptive_contrastive_loss(*both, temperature, base=base), views, atol=1e-4
        )
        gradients = torch.autograd.grad(
            adaptive_contrastive_loss(*views, temperature, base=base), list(temperature.parameters())
        )
        assert all(gradient.abs().sum() > 0 for gradient in gradients[:-1])


@pytest.mark.parametrize("base", ["max", "logsumexp"])
def test_equal_ids_are_no_negatives_and_without_negatives_there_is_no_loss(base):
    views, temperature = new_views(), new_temperature()
    ids = torch.tensor([0, 1, 2, 3, 0])
    loss = adaptive_contrastive_loss(*views, temperature, base=base, ids=ids)
    assert loss.item() != adaptive_contrastive_loss(*views, temperature, base=base).item()
    for bounds in ((0.05, 2.0), (0.5, 0.5)):
        leaf = views.clone().requires_grad_()
        alone = adaptive_contrastive_loss(
            *leaf, new_temperature(bounds=bounds), base=base, ids=torch.zeros(5, dtype=torch.int64)
        )
        assert alone.item() == 0 and torch.autograd.grad(alone, leaf)[0].abs().sum() == 0


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_simsiam_equals_its_formula_and_leaves_the_projections_alone(beta):
    torch.manual_seed(0)
    predictions, projections = (
        new_views().requires_grad_(),
        torch.randn(2, 5, 4, dtype=DOUBLE, requires_grad=True),
    )
    temperature = new_temperature()
    loss = adaptive_simsiam_loss(tuple(predictions), tuple(projections), temperature, beta=beta)
    expected = 0.0
    for i in range(5):
        for own, other in ((predictions[0, i], projections[1, i]), (predictions[1, i], projections[0, i])):
            z, h = F.normalize(own, dim=1), F.normalize(other, dim=0).expand(3, 4)
            tau = temperature(z, h)
            expected = expected + (-(z * h).sum(1) / (2 * tau) + beta * omega(tau, 4)).sum() / 5
    torch.testing.assert_close(loss, expected)
    reached = torch.autograd.grad(loss, [predictions, projections], allow_unused=True)
    assert reached[0].abs().sum() > 0 and reached[1] is None


def test_barlow_twins_equals_its_formula():
    torch.manual_seed(0)
    first, second = new_views(samples=7)
    temperatures = FeaturePairTemperature(4, 3, bounds=(0.1, 1.5)).double()
    nn.init.normal_(temperatures.table)
    tau = temperatures().detach()
    torch.testing.assert_close(tau, tau.mT)
    loss = adaptive_barlow_twins_loss(first, second, tau, beta=0.2, redundancy_weight=0.01)
    expected = 0.0
    for c in range(3):
        a, b = (
            (view[:, c] - view[:, c].mean(0)) / view[:, c].std(0, correction=0) for view in (first, second)
        )
        correlation = a.T @ b / 7
        for row in range(4):
            for column in range(4):
                value, t = correlation[row, column].item(), tau[c, row, column].item()
                expected += (
                    (1 - value / t) ** 2 + 0.2 * normaliser(t, 4)
                    if row == column
                    else 0.01 * value**2 / t - 0.2 * normaliser(t, 4)
                )
    assert loss.item() == pytest.approx(expected)


def test_features_without_variance_have_no_correlation():
    rows = torch.ones(4, 2, 3, requires_grad=True)
    loss = adaptive_barlow_twins_loss(rows, rows, torch.ones(2, 3, 3), beta=0.0)
    assert loss.item() == 6.0  # (1 - 0)^2 for each of 2 x 3 features
    assert torch.autograd.grad(loss, rows)[0].isfinite().all()


def test_half_precision_is_computed_in_single():
    views = torch.randn(2, 6, 3, 8)
    temperature = PairTemperature(8)
    for base in ("max", "logsumexp"):
        found = [
            adaptive_contrastive_loss(v[0], v[1], temperature, base=base)
            for v in (views.bfloat16(), views.bfloat16().float())
        ]
        assert found[0].dtype == torch.float32 and torch.equal(*found)
    small = adaptive_contrastive_loss(*views.bfloat16(), PairTemperature(8).bfloat16())
    assert small.dtype == torch.float32 and small.isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adaptive_contrastive_loss(views[0], views[1], temperature).dtype == torch.float32


def test_heads_are_independent_perceptrons():
    projector = MultiHeadProjector(6, 5, 4, heads=2)
    features = torch.randn(3, 6)
    found = projector(features)
    for head in range(2):
        hidden = torch.relu(features @ projector.first.weight[head] + projector.first.bias[head])
        torch.testing.assert_close(
            found[:, head], hidden @ projector.last.weight[head] + projector.last.bias[head]
        )
    assert not torch.allclose(found[:, 0], found[:, 1])


def test_the_module_reports_its_temperatures():
    loss = AdaptiveMultiHeadLoss(PairTemperature(4, bounds=(0.3, 0.3)))
    assert loss.stats() == {}
    views = torch.randn(2, 5, 3, 4)
    assert torch.equal(loss(*views), adaptive_contrastive_loss(*views, loss.temperature))
    assert loss.stats() == pytest.approx(
        {"positive_temperature": 0.3, "negative_temperature": 0.3, "at_bounds": 1.0}
    )


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"form": "moco"}, "form must be one of simclr, infonce, simsiam, barlow, got 'moco'"),
        ({"base": "mean"}, 'base must be "max" or "logsumexp", got \'mean\''),
        (
            {"base": "logsumexp", "form": "infonce"},
            'base="logsumexp" is for form="simclr", got form=\'infonce\'',
        ),
        (
            {"projector": (8,)},
            r"projector must hold two widths, of the hidden layer and of embeddings, got \[8\]",
        ),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"beta": -1.0}, "beta must be >= 0 and finite, got -1.0"),
        ({"bounds": (0.0, 1.0)}, r"bounds must be 0 < low <= high and finite, got \(0.0, 1.0\)"),
        ({"redundancy_weight": -1.0}, "redundancy_weight must be >= 0 and finite, got -1.0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            AdaptiveMultiHead(**options)
    with pytest.raises(InputError, match="hidden must be >= 1, got 0"):
        PairTemperature(4, 0)
    with pytest.raises(InputError, match="dim must be >= 1, got 0"):
        FeaturePairTemperature(0)
    views = torch.randn(2, 5, 3, 4)
    with pytest.raises(InputError, match="both views must have one shape"):
        adaptive_contrastive_loss(views[0], views[1][:3], PairTemperature(4))
    with pytest.raises(InputError, match='base must be "max" or "logsumexp", got \'mean\''):
        adaptive_contrastive_loss(*views, PairTemperature(4), base="mean")
    three = method(view=lambda inputs, generator: inputs.expand(3, *inputs.shape))
    with pytest.raises(InputError, match="view must give two views, got 3"):
        coloss.fit(new_model(), new_data(), methods=[three], budget=Budget(steps=1))


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, inputs.tanh() + 0.1])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    return IndexedDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).to(dtype))


def method(**options) -> AdaptiveMultiHead:
    return AdaptiveMultiHead(
        **({"view": noisy, "projector": (8, 4), "temperature_hidden": 6, "heads": 2} | options)
    )


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = list(zip(new_data().inputs.split(8), torch.randint(3, (32,)).split(8)))
    check_loops(lambda: Classifier(new_model(), 3), method, batches, F.cross_entropy)


@pytest.mark.parametrize("form", ["simclr", "simsiam", "barlow"])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, form: str):
    check_resume(new_model, lambda: method(form=form), new_data(), tmp_path)


FORMS = [{}, {"base": "logsumexp"}, {"form": "infonce"}, {"form": "simsiam"}, {"form": "barlow"}]


@pytest.mark.parametrize("options", FORMS, ids=lambda options: "-".join(options.values()) or "max")
def test_two_processes_take_the_steps_of_one(tmp_path: Path, options: dict):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        own = method(view=fixed, **options)
        run = coloss.fit(
            new_model().double(),
            new_data(DOUBLE),
            methods=[own],
            budget=Budget(steps=4),
            batch_size=8,
            fabric=fabric,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        )
        return {**run.model.state_dict(), **own.state_dict()}

    check_two_processes(train, tmp_path)


def test_every_form_trains_beside_another_method_and_leaves_the_encoder_as_it_was_built():
    for options in (*FORMS, {"shared": False}):
        methods = [method(**options), NTXent(view=noisy, projector=(4,))]
        run = coloss.fit(new_model(), new_data(), methods=methods, budget=Budget(epochs=1))
        point = run.history[-1]
        assert sorted(point.terms) == ["adaptive_multi_head", "nt_xent"]
        assert 0.05 <= point.metrics["positive_temperature"] <= 2
        assert 0 <= point.metrics["temperatures_at_bounds"] <= 1
        assert run.model.state_dict().keys() == new_model().state_dict().keys()


def test_temperatures_only_read_the_embeddings_unless_told_otherwise():
    views = new_views().requires_grad_()
    rows = views.flatten(0, 1)
    for reads_only in (True, False):
        temperature = new_temperature(reads_only=reads_only)
        for found in (temperature(rows[:5], rows[5:]), temperature.pairwise(rows, rows)):
            (slope,) = torch.autograd.grad(found.sum(), views, allow_unused=True)
            assert (slope is None) == reads_only


def test_everything_in_one_point_costs_nothing_in_the_published_form():
    """The trap behind its collapse: with positives and hardest negatives alike, whatever the temperatures, the loss is 0."""
    views = torch.ones(2, 6, 3, 4, dtype=DOUBLE, requires_grad=True)
    loss = adaptive_contrastive_loss(*views, new_temperature(), beta=0.7)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, views)[0].abs().sum() < 1e-12


def test_overlap_of_similarities():
    apart, spread = torch.eye(6), torch.randn(200, 3)
    assert similarity_overlap(apart, apart) == 0
    assert similarity_overlap(torch.ones(5, 2), torch.ones(5, 2)) == pytest.approx(1)
    # Views that have nothing to do with each other: two samples of one distribution.
    assert similarity_overlap(spread, torch.randn(200, 3), bins=4) > 0.8
    near, far = (similarity_overlap(spread, spread + scale * torch.randn(200, 3)) for scale in (0.1, 1.0))
    assert near < far
    with pytest.raises(ValueError, match="first must hold at least two samples, got 1"):
        similarity_overlap(apart[:1], apart[:1])
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        similarity_overlap(apart, apart, bins=0)


def test_the_claim_runs():
    from coloss.lab.claims import verify

    found = verify("amcl", smoke=True, seeds=1)
    assert {found["method"]["name"], found["baseline"]["name"]} <= found["arms"].keys()
    assert {"knn", "overlap"} <= found["arms"][found["method"]["name"]]["metrics"].keys()


def test_the_lab_gets_the_form_that_does_not_collapse():
    setting = Setting.of(digits_encoder_task(Budget(steps=1)), seed=0)
    assert AdaptiveMultiHead.for_setting(setting).base == "logsumexp"
    assert AdaptiveMultiHead.for_setting(setting, base="max").base == "max"
    assert AdaptiveMultiHead.for_setting(setting, form="simsiam").base == "max"
