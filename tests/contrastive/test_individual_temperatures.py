"""The global contrastive loss equals its formulas, learns its temperatures by the right gradient, and keeps its state by sample id."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.contrastive import (
    BimodalGlobalContrastive,
    GlobalContrastive,
    GlobalContrastiveLoss,
    NTXent,
    decaying_gamma,
    log_mean_contrast,
)
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.nn import MLP, Classifier, DualEncoder
from coloss.train import Budget

DOUBLE = torch.float64


def new_loss(**options) -> GlobalContrastiveLoss:
    return GlobalContrastiveLoss(**({"dtype": DOUBLE} | options))


def contrasts(first: Tensor, second: Tensor) -> Tensor:
    """h of (2B, 2B - 2) for two views, written out anchor by anchor."""
    rows = F.normalize(torch.cat([first, second]), dim=1)
    count, samples = len(rows), len(first)
    found = []
    for i in range(count):
        positive = (i + samples) % count
        others = [k for k in range(count) if k not in (i, positive)]
        found.append(rows[others] @ rows[i] - rows[positive] @ rows[i])
    return torch.stack(found)


def cross_contrasts(first: Tensor, second: Tensor) -> Tensor:
    """h of (B, B - 1) for the rows of one modality against the other."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    found = []
    for i in range(len(first)):
        others = [k for k in range(len(first)) if k != i]
        found.append(second[others] @ first[i] - second[i] @ first[i])
    return torch.stack(found)


def contrastive_values(h: Tensor, temperature: Tensor) -> Tensor:
    return temperature * (h / temperature[:, None]).exp().mean(1).log()


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_with_gamma_1_it_is_the_mini_batch_loss_and_its_gradient(temperature):
    first, second = (torch.randn(6, 4, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    loss = new_loss(temperature=temperature, gamma=1.0)(first, second, torch.arange(6))
    expected = contrastive_values(
        contrasts(first, second), torch.full((12,), temperature, dtype=DOUBLE)
    ).mean()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(*(torch.autograd.grad(value, [first, second]) for value in (loss, expected))):
        torch.testing.assert_close(one, other)


def test_two_modalities_are_the_mean_of_both_directions():
    first, second = (torch.randn(5, 4, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    loss = new_loss(temperature=0.2, gamma=1.0, bimodal=True)(first, second, torch.arange(5))
    temperature = torch.full((5,), 0.2, dtype=DOUBLE)
    sides = [
        contrastive_values(cross_contrasts(*pair), temperature) for pair in ((first, second), (second, first))
    ]
    expected = torch.stack(sides).mean()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(*(torch.autograd.grad(value, [first, second]) for value in (loss, expected))):
        torch.testing.assert_close(one, other)


def by_the_card(h: Tensor, old: Tensor, gamma: float, temperature: Tensor, rho: float):
    """Weights, average and gradient of the temperature in the linear domain, row by row."""
    e = torch.exp(h / temperature[:, None])
    average = (1 - gamma) * old + gamma * e.mean(1)
    weights = e / average[:, None]
    gradient = average.log() + rho - (weights * h / temperature[:, None]).mean(1)
    return average, weights, gradient


def test_the_moving_average_weighs_negatives_and_steps_temperatures_as_published():
    torch.manual_seed(0)
    ids, gamma, rho, share, rate = torch.tensor([7, 3, 11, 5]), 0.7, 0.4, 0.6, 0.05
    loss = new_loss(
        temperature=0.3,
        gamma=gamma,
        individual=True,
        rho=rho,
        temperature_learning_rate=rate,
        temperature_gradient_share=share,
        temperature_bounds=(0.05, 0.9),
        largest_gradient=50.0,
    )
    average, tau = torch.zeros(4, dtype=DOUBLE), torch.full((4,), 0.3, dtype=DOUBLE)
    smoothed = torch.zeros(4, dtype=DOUBLE)
    for step in range(3):
        views = torch.randn(2, 4, 3, dtype=DOUBLE, requires_grad=True)
        found = torch.autograd.grad(loss(views[0], views[1], ids), views)[0]
        h = contrasts(views[0], views[1])
        both = tau.repeat(2)
        old = average.repeat(2)
        new, weights, gradient = by_the_card(h.detach(), old, gamma if step else 1.0, both, rho)
        expected = torch.autograd.grad((weights * h).mean(), views)[0]
        torch.testing.assert_close(found, expected)
        average = new.view(2, 4).mean(0)
        smoothed = (1 - share) * smoothed + share * gradient.view(2, 4).mean(0)
        tau = (tau - rate * smoothed).clamp(0.05, 0.9)
        order = ids.argsort()
        torch.testing.assert_close(loss.tables[0].column("log_average").exp(), average[order])
        torch.testing.assert_close(loss.temperatures(ids), tau)
    assert tau.std() > 0


def test_a_temperatures_gradient_is_that_of_the_robust_objective():
    first, second = (torch.randn(5, 3, dtype=DOUBLE) for _ in range(2))
    loss = new_loss(
        temperature=0.4,
        gamma=1.0,
        individual=True,
        rho=0.2,
        temperature_learning_rate=1.0,
        temperature_gradient_share=1.0,
        temperature_bounds=(1e-6, 1e6),
        largest_gradient=1e6,
        bimodal=True,
    )
    ids = torch.arange(5)
    loss(first, second, ids)
    for side, pair in enumerate(((first, second), (second, first))):
        tau = torch.full((5,), 0.4, dtype=DOUBLE, requires_grad=True)
        objective = contrastive_values(cross_contrasts(*pair), tau) + 0.2 * tau
        (expected,) = torch.autograd.grad(objective.sum(), tau)
        torch.testing.assert_close((0.4 - loss.temperatures(ids, side)).double(), expected)


def test_equal_contrasts_leave_the_temperature_alone_without_rho():
    # All samples on one point, all views of it equal: every h is 0.
    rows = torch.ones(6, 3, dtype=DOUBLE)
    loss = new_loss(temperature=0.2, individual=True, rho=0.0, temperature_learning_rate=1.0)
    loss(rows, rows, torch.arange(6))
    torch.testing.assert_close(loss.temperatures(torch.arange(6)), torch.full((6,), 0.2, dtype=DOUBLE))


def test_logarithms_agree_with_the_shifted_averages_of_the_authors_code():
    torch.manual_seed(1)
    tau, gamma, ids = 0.5, 0.8, torch.arange(5)
    loss = new_loss(temperature=tau, gamma=gamma, bimodal=True)
    s, b = torch.zeros(5, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    for step in range(4):
        first, second = (torch.randn(5, 3, dtype=DOUBLE) for _ in range(2))
        loss(first, second, ids)
        h = cross_contrasts(first, second) / tau
        shift = torch.maximum(b, h.amax(1))
        g = (h - shift[:, None]).exp().mean(1)
        s = g if step == 0 else (1 - gamma) * s * (b - shift).exp() + gamma * g
        b = shift
    torch.testing.assert_close(loss.tables[0].column("log_average"), s.log() + b)


def test_low_temperatures_are_safe_in_single_precision():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for views in ((rows, rows), (rows, -rows)):
        first, second = (part.clone().requires_grad_() for part in views)
        loss = GlobalContrastiveLoss(0.005, bimodal=True)
        for _ in range(2):
            value = loss(first, second, torch.arange(3))
            gradient = torch.autograd.grad(value, first)[0]
        assert value.isfinite() and gradient.isfinite().all()
        # h ranges over 4 / 0.005, far beyond what an exponential holds; its largest value is what counts.
        expected = (cross_contrasts(first, second).amax(1) + 0.005 * math.log(0.5)).mean().item()
        assert value.item() == pytest.approx(expected, abs=0.01)


def test_state_of_others_never_changes_and_a_first_visit_starts_afresh():
    loss = new_loss(individual=True, gamma=0.5)
    loss(torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1, 2, 3, 4]))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    # A mixed batch: 3 and 4 are known, 8 and 9 are not.
    views = torch.randn(2, 4, 3, dtype=DOUBLE)
    loss(views[0], views[1], torch.tensor([3, 4, 8, 9]))
    after = loss.state_dict()
    assert after["tables.0.ids"].tolist() == [1, 2, 3, 4, 8, 9]
    for name in ("log_average", "temperature", "gradient"):
        assert torch.equal(before[f"tables.0.{name}"][:2], after[f"tables.0.{name}"][:2])
        assert not torch.equal(before[f"tables.0.{name}"][2:], after[f"tables.0.{name}"][2:4])
    fresh = (contrasts(*views) / 0.1).exp().mean(1).view(2, 4).mean(0).log()
    torch.testing.assert_close(after["tables.0.log_average"][4:], fresh[2:])


def test_state_round_trips_and_evaluation_leaves_it():
    first, second = new_loss(individual=True), new_loss(individual=True)
    ids = torch.tensor([-5, 2**60, 3])
    views = torch.randn(2, 3, 4, dtype=DOUBLE)
    first(views[0], views[1], ids)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    one, other = (loss(views[1], views[0], ids) for loss in (first, second))
    assert torch.equal(one, other)
    assert all(torch.equal(v, second.state_dict()[name]) for name, v in first.state_dict().items())
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    first.eval()(views[0], views[1], ids)
    first(views[0], views[1], torch.tensor([100, 101, 102]))
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in kept.items())
    assert not any(value.requires_grad for value in first.state_dict().values())


def test_duplicates_are_no_negatives_and_their_state_is_their_mean():
    views = torch.randn(2, 3, 4, dtype=DOUBLE)
    views = torch.cat([views, views[:, :1]], 1)
    once, twice = new_loss(gamma=1.0), new_loss(gamma=1.0)
    once(views[0, :3], views[1, :3], torch.arange(3))
    twice(views[0], views[1], torch.tensor([0, 1, 2, 0]))
    # The negatives of sample 0 are the same; the others see it twice.
    averages = [loss.tables[0].column("log_average") for loss in (once, twice)]
    torch.testing.assert_close(averages[0][0], averages[1][0])
    assert not torch.isclose(averages[0][1], averages[1][1])


def test_without_negatives_there_is_no_loss_and_no_state():
    views = torch.randn(2, 1, 3, requires_grad=True)
    loss = GlobalContrastiveLoss(individual=True)
    value = loss(views[0], views[1], torch.tensor([4]))
    assert value.item() == 0 and torch.autograd.grad(value, views)[0].abs().sum() == 0
    assert len(loss.tables[0]) == 0 and math.isnan(loss.stats()["mean"])
    assert loss(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0


def test_half_precision_is_computed_in_single():
    views = torch.randn(2, 6, 8)
    found = [
        GlobalContrastiveLoss(0.05)(v[0], v[1], torch.arange(6))
        for v in (views.bfloat16(), views.bfloat16().float())
    ]
    assert found[0].dtype == torch.float32 and torch.equal(*found)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 8.0), st.floats(0.1, 1.0))
def test_temperatures_stay_within_their_bounds(seed, rho, gamma):
    generator = torch.Generator().manual_seed(seed)
    loss = GlobalContrastiveLoss(
        gamma=gamma, individual=True, rho=rho, temperature_learning_rate=0.5, temperature_bounds=(0.05, 0.7)
    )
    for _ in range(3):
        views = torch.randn(2, 5, 3, generator=generator)
        assert loss(views[0], views[1], torch.arange(5)).isfinite()
    temperatures = loss.temperatures(torch.arange(5))
    assert (temperatures >= 0.05 - 1e-7).all() and (temperatures <= 0.7 + 1e-7).all()


def test_a_larger_radius_means_lower_temperatures():
    means = []
    for rho in (0.0, 1.0):
        torch.manual_seed(0)
        loss = GlobalContrastiveLoss(individual=True, rho=rho)
        for _ in range(10):
            loss(torch.randn(8, 4), torch.randn(8, 4), torch.arange(8))
        means.append(loss.stats()["mean"])
    assert means[1] < means[0]


def test_gamma_falls_to_its_final_value():
    gamma = decaying_gamma(0.8, until=0.5)
    assert [gamma(p) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.9, 0.8, 0.8])
    loss = GlobalContrastiveLoss(gamma=0.6, gamma_schedule="cosine")
    assert loss.gamma == 1.0
    loss.set_progress(0.7)
    assert loss.gamma == pytest.approx(0.6)


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"gamma_schedule": "linear"}, 'gamma_schedule must be "constant" or "cosine", got \'linear\''),
        ({"rho": -1.0}, "rho must be >= 0 and finite, got -1.0"),
        ({"temperature_learning_rate": -1.0}, "temperature_learning_rate must be >= 0 and finite, got -1.0"),
        ({"temperature_gradient_share": 0.0}, r"temperature_gradient_share must be in \(0, 1\], got 0.0"),
        ({"temperature_bounds": (0.2, 0.7)}, "temperature_bounds must hold the temperature 0.1 and be > 0"),
        ({"largest_gradient": 0.0}, "largest_gradient must be > 0, got 0.0"),
        ({"weight": -1.0}, "weight must be >= 0 and finite, or a schedule, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            GlobalContrastive(**options)
    with pytest.raises(InputError, match=r"until must be in \(0, 1\], got 0.0"):
        decaying_gamma(until=0.0)
    with pytest.raises(ValueError, match=r"ids must have shape \(4,\), got \(3,\)"):
        GlobalContrastiveLoss()(torch.zeros(4, 2), torch.zeros(4, 2), torch.arange(3))
    rows, ids = torch.randn(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match=r"positives must have shape \(3, 2\), got \(2, 2\)"):
        log_mean_contrast(rows, rows[:2], rows, 0.1, query_ids=ids, key_ids=ids)
    three = GlobalContrastive(view=lambda inputs, generator: inputs.expand(3, *inputs.shape))
    with pytest.raises(InputError, match="view must give two views, got 3"):
        coloss.fit(new_model(), new_data(), methods=[three], budget=Budget(steps=1))
    with pytest.raises(InputError, match="the data must give sample ids"):
        coloss.fit(new_model(), [(torch.randn(8, 6),)], methods=[method()], budget=Budget(steps=1))
    with pytest.raises(InputError, match="the model must give a pair of embeddings, got Tensor"):
        coloss.fit(new_model(), new_data(), methods=[BimodalGlobalContrastive()], budget=Budget(steps=1))
    two = [NTXent(view=lambda inputs, generator: inputs.expand(3, *inputs.shape)), method()]
    with pytest.raises(InputError, match="compares two views, got 3"):
        coloss.fit(new_model(), new_data(), methods=two, budget=Budget(steps=1))


def noisy(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return inputs + 0.1 * torch.randn(2, *inputs.shape, generator=generator)


def fixed(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Views that do not depend on the process that makes them."""
    return torch.stack([inputs, 0.5 * inputs + 0.1])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MLP(6, (8,), 5, norm=None)


def new_pair_model() -> nn.Module:
    torch.manual_seed(3)
    return DualEncoder(MLP(6, (8,), 5, norm=None), MLP(4, (8,), 5, norm=None))


def new_data(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return IndexedDataset(inputs.to(dtype), ids=torch.arange(32) * 2**40 - 7)


def new_pairs(dtype: torch.dtype = torch.float32) -> IndexedDataset:
    data = new_data(dtype)
    return IndexedDataset((data.inputs, data.inputs[:, 1:5]), ids=data.ids)


def method(**options) -> GlobalContrastive:
    return GlobalContrastive(**({"view": noisy, "projector": (8, 4)} | options))


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    data, labels = new_data(), torch.randint(3, (32,))
    batches = list(zip(data.inputs.split(8), labels.split(8), data.ids.split(8)))
    check_loops(lambda: Classifier(new_model(), 3), method, batches, F.cross_entropy)


def test_two_encoders_take_the_same_steps_in_every_loop():
    data = new_pairs()
    parts = [part.split(8) for part in data.inputs]
    batches = [(pair, torch.zeros(8), ids) for pair, ids in zip(zip(*parts, strict=True), data.ids.split(8))]
    check_loops(new_pair_model, BimodalGlobalContrastive, batches)


def test_a_killed_run_resumes_bit_identically_with_its_temperatures(tmp_path: Path):
    check_resume(new_model, lambda: method(gamma_schedule="cosine"), new_data(), tmp_path / "views")
    check_resume(new_pair_model, BimodalGlobalContrastive, new_pairs(), tmp_path / "pairs")


@pytest.mark.parametrize("form", ["views", "pairs"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, form: str):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        views = form == "views"
        own = method(view=fixed) if views else BimodalGlobalContrastive(temperature=0.1)
        model = new_model() if views else new_pair_model()
        run = coloss.fit(
            model.double(),
            new_data(DOUBLE) if views else new_pairs(DOUBLE),
            methods=[own],
            budget=Budget(steps=6),
            batch_size=8,
            fabric=fabric,
        )
        return {**run.model.state_dict(), **own.loss.state_dict()}

    check_two_processes(train, tmp_path)


def test_it_reports_its_temperatures_and_runs_beside_another_method():
    own = method()
    run = coloss.fit(
        new_model(), new_data(), methods=[own, NTXent(view=noisy, projector=(4,))], budget=Budget(epochs=3)
    )
    point = run.history[-1]
    assert sorted(point.terms) == ["global_contrastive", "nt_xent"]
    stats = own.loss.stats()
    assert 0.05 <= stats["low"] <= stats["median"] <= stats["high"] <= 0.7
    assert {"temperature_mean", "temperature_at_bounds"} <= point.metrics.keys()
    assert len(own.loss.tables[0]) == 32
    # The encoder ships as it was built.
    assert run.model.state_dict().keys() == new_model().state_dict().keys()


def test_one_temperature_for_all_is_reported_as_such():
    loss = GlobalContrastiveLoss(0.3)
    loss(torch.randn(4, 3), torch.randn(4, 3), torch.arange(4))
    assert loss.tables[0].state_dict().keys() == {"ids", "log_average"}
    assert loss.temperatures(torch.tensor([1, 99])).tolist() == pytest.approx([0.3, 0.3])
    assert loss.stats()["mean"] == pytest.approx(0.3)


def test_pairs_of_the_lab_get_the_form_for_two_encoders():
    from coloss.lab.tasks import find_task
    from coloss.train import Setting

    for name, form in (("digits-halves", BimodalGlobalContrastive), ("digits-ssl", GlobalContrastive)):
        setting = Setting.of(find_task(name, limit=40), 0, Budget(steps=2))
        own = GlobalContrastive.for_setting(setting, rho=0.2)
        assert isinstance(own, form) and own.loss.rho == 0.2
        terms = setting.fit(setting.new_model(), methods=[own]).history[-1].terms
        assert sorted(terms) == ["global_contrastive"]


def test_the_claim_runs():
    from coloss.lab.claims import verify

    found = verify("isogclr", smoke=True, seeds=1)
    assert {"long tail", "no tail"} <= found["arms"].keys()
    assert {"frequency_correlation", "balanced_accuracy", "tail_accuracy"} <= found["arms"]["long tail"][
        "metrics"
    ].keys()
