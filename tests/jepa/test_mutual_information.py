"""MIST: the networks' invariances, the pinball loss, the shipped estimator against the truth, training from the command, and the claim."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_iris, load_wine

import coloss.jepa.mutual_information_training as training
import coloss.jepa.mutual_information_trial as trial
from coloss import Budget
from coloss.errors import InputError
from coloss.jepa import (
    KSG,
    CellMIRegressor,
    GaussianMI,
    JudgedEstimate,
    MIMetaDataset,
    SetMIRegressor,
    SupervisedMI,
    crossing_rate,
    describe_weights,
    draw_pair,
    error_by_bin,
    fit_regressor,
    interval_coverage,
    judge_estimator,
    mean_squared_error,
    pinball_loss,
    rank_agreement,
    rank_gaussianise,
    train_mist,
)
from coloss.jepa.mutual_information import WEIGHTS
from coloss.jepa.mutual_information_report import KSG_NEIGHBOURS, choose_neighbours
from coloss.lab.claims import verify

NETWORKS = {
    "cells": lambda: CellMIRegressor(width=8, depth=2, heads=2, inducing=3),
    "rows": lambda: SetMIRegressor(8, width=8, heads=2, inducing=3, full=1, induced=1),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """Of either layout, with a last layer that does something."""
    built = NETWORKS[request.param]()
    torch.nn.init.normal_(built.head.last.weight)
    return built.double().eval()


@pytest.fixture(scope="module")
def shipped():
    return SupervisedMI.pretrained()


def tables(sets=2, samples=30, dim_x=2, dim_y=3):
    x, y = torch.randn(sets, samples, dim_x).double(), torch.randn(sets, samples, dim_y).double()
    y[..., :1] += x[..., :1]
    return x, y


# Pinball loss


def test_the_pinball_loss_at_one_half_is_half_the_absolute_error():
    predictions, targets = torch.randn(2, 50)
    half = pinball_loss(predictions, targets, torch.full((50,), 0.5))
    torch.testing.assert_close(half, (predictions - targets).abs().mean() / 2)


@pytest.mark.parametrize("level", [0.05, 0.3, 0.9])
def test_the_best_constant_is_the_quantile(level):
    targets = torch.randn(201, dtype=torch.float64)
    answers = torch.linspace(-3, 3, 601, dtype=torch.float64)
    tau = torch.full((201,), level, dtype=torch.float64)
    losses = torch.stack([pinball_loss(torch.full_like(tau, float(one)), targets, tau) for one in answers])
    assert (losses >= 0).all()
    assert answers[losses.argmin()] == pytest.approx(targets.quantile(level).item(), abs=0.05)


def test_the_pinball_loss_at_the_edges():
    nothing = torch.zeros(0)
    assert pinball_loss(nothing, nothing, nothing) == 0
    assert pinball_loss(torch.ones(2).half(), torch.zeros(2).half(), torch.ones(2)).dtype is torch.float32
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got 0.5 to 1.5"):
        pinball_loss(torch.zeros(2), torch.zeros(2), torch.tensor([0.5, 1.5]))


# Networks


def test_the_order_of_samples_does_not_matter(network):
    x, y = tables()
    order = torch.randperm(30)
    torch.testing.assert_close(network(x[:, order], y[:, order]), network(x, y))


def test_padding_does_not_matter_whatever_it_holds(network):
    x, y = tables()
    valid = torch.tensor([[True] * 30 + [False] * 5] * 2)
    for rubbish in (0.0, -1e6):
        padded = [torch.cat([side, torch.full_like(side[:, :5], rubbish)], 1) for side in (x, y)]
        torch.testing.assert_close(network(*padded, valid), network(x, y))


def test_a_genuine_sample_that_sums_to_zero_is_seen(network):
    x, y = tables(1, 9, 1, 1)
    x[0, 4], y[0, 4] = 0.0, 0.0
    valid = torch.ones(1, 9, dtype=torch.bool)
    torch.testing.assert_close(network(x, y, valid), network(x, y))
    valid[0, 4] = False
    assert not torch.allclose(network(x, y, valid), network(x, y))


def test_sets_of_zeros_and_of_padding_are_finite(network):
    nothing = torch.zeros(2, 6, 1).double()
    assert network(nothing, nothing).isfinite().all()
    assert network(nothing, nothing, torch.zeros(2, 6, dtype=torch.bool)).isfinite().all()


def test_units_and_monotone_maps_do_not_matter(network):
    x, y = tables()
    torch.testing.assert_close(network(1e6 * x - 3, y.exp()), network(x, y))


def test_the_order_of_columns_and_of_sides_does_not_matter_to_cells():
    network = NETWORKS["cells"]().double()
    torch.nn.init.normal_(network.head.last.weight)
    x, y = tables()
    value = network(x, y)
    torch.testing.assert_close(network(x.flip(2), y[..., [2, 0, 1]]), value)
    torch.testing.assert_close(network(y, x), value)
    # Which side a column is on does matter.
    assert not torch.allclose(network(torch.cat([x, y[..., :1]], 2), y[..., 1:]), value)
    # Any number of columns goes in.
    assert network(*tables(1, 20, 12, 9)).isfinite().all()


def test_too_many_columns_are_refused_not_cut_off():
    with pytest.raises(ValueError, match="at most max_dim = 8 columns, got 9"):
        NETWORKS["rows"]().double()(*tables(1, 9, 4, 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CellMIRegressor(heads=3), "heads must be even"),
        (lambda: CellMIRegressor(depth=0), "depth must be >= 1, got 0"),
        (lambda: SetMIRegressor(max_dim=1), "max_dim must be >= 2, got 1"),
        (lambda: SetMIRegressor(full=-1), "full must be >= 0, got -1"),
    ],
)
def test_impossible_networks(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_both_networks_learn_and_levels_order_their_quantiles(network):
    network = network.float()
    sets = {"families": ["normal-sparse"], "maps": ["mirror"], "samples": (40, 40), "dims": (1, 1)}
    data = MIMetaDataset(**sets, batch_size=12, batches=20, seed=5)
    fresh = MIMetaDataset(**sets, batch_size=32, batches=1, seed=6).batch(0)

    def quantile(level):
        with torch.no_grad():
            return network(fresh.x, fresh.y, None, torch.full((32,), level))

    torch.nn.init.zeros_(network.head.last.weight)
    before = (quantile(0.5) - fresh.information).abs().mean()
    assert fit_regressor(network, data, budget=Budget(steps=20), rate=2e-2).steps == 20
    assert (quantile(0.5) - fresh.information).abs().mean() < 0.9 * before
    assert quantile(0.1).mean() < quantile(0.9).mean()


# The shipped estimator


def test_the_file_is_small_plain_and_says_how_it_was_made():
    assert WEIGHTS.stat().st_size < 1_000_000
    found = describe_weights()
    assert found["command"].startswith("coloss run mist --budget ")
    assert int(found["steps"]) > 100
    assert found["seed"] == "0"
    assert all(value.isfinite().all() for value in load_file(WEIGHTS).values())


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_normal_pairs_are_within_reach_of_the_truth(shipped, correlation):
    normal = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    normal = torch.linalg.qr((normal - normal.mean(0)).double()).Q.float() * math.sqrt(2000)
    x, y = normal[:, :1], correlation * normal[:, :1] + math.sqrt(1 - correlation**2) * normal[:, 1:]
    truth = -0.5 * math.log(1 - correlation**2)
    assert shipped.estimate(x, y).item() == pytest.approx(truth, abs=0.06)
    low, high = shipped.interval(x[:200], y[:200])
    assert 0 <= low < high


def test_what_correlations_do_not_see_is_seen(shipped):
    # Mirrored sets: the linear estimate is about 0, the truth is not.
    data = MIMetaDataset(
        ["normal-sparse"],
        ["mirror"],
        samples=(200, 200),
        dims=(1, 1),
        batch_size=12,
        batches=2,
        independent=0.0,
        seed=77,
    )
    found, copula = (
        judge_estimator(one, data) for one in (shipped, GaussianMI(correct=True, gaussianise=True))
    )
    assert mean_squared_error(found) < 0.2 * mean_squared_error(copula)


def test_intervals_hold_the_truth_about_as_often_as_they_say(shipped):
    data = MIMetaDataset(batch_size=32, batches=8, samples=(50, 200), seed=4_000_000)
    inside = []
    for batch in data:
        levels = torch.tensor([0.05, 0.95]).repeat_interleave(32)
        found = shipped.network(batch.x.repeat(2, 1, 1), batch.y.repeat(2, 1, 1), None, levels)
        low, high = found.view(2, 32)
        inside.append((low.clamp(min=0) <= batch.information) & (batch.information <= high))
    assert 0.84 <= torch.cat(inside).float().mean() <= 0.97
    assert crossing_rate(shipped, MIMetaDataset(batches=2, samples=(50, 200), seed=4_000_001)) < 0.1


def test_quantiles_are_sorted_even_where_the_network_crosses():
    class Falling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y, valid, tau):
            return self.weight * (1 - tau)

    estimator = SupervisedMI(Falling())
    x = torch.randn(20, 1)
    torch.testing.assert_close(estimator.quantiles(x, x, (0.1, 0.5, 0.8)), torch.tensor([0.2, 0.5, 0.9]))
    assert crossing_rate(estimator, MIMetaDataset(batch_size=4, batches=1)) == 1


def test_reported_intervals_are_not_below_zero(shipped):
    x, y = torch.randn(20, 40, 1), torch.randn(20, 40, 1)
    pairs = list(zip(x, y))
    assert all(shipped.interval(*pair).low >= 0 for pair in pairs)


def test_as_a_loss_it_raises_the_information_and_keeps_its_weights(shipped):
    x, noise = torch.randn(2, 100, 1, generator=torch.Generator().manual_seed(3))
    y = 0.7 * x + noise
    change = torch.zeros(100, 1, requires_grad=True)
    before = {name: value.clone() for name, value in shipped.state_dict().items()}
    optimizer = torch.optim.Adam([change], lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        (-shipped(x, y + change)).backward()
        assert change.grad.isfinite().all()
        optimizer.step()
    # The estimator's own number may be fooled; neighbours agree that the two are closer tied.
    for witness in (shipped, KSG(gaussianise=True)):
        assert witness.estimate(x, y + change.detach()) > witness.estimate(x, y) + 0.1
    assert all(torch.equal(value, before[name]) for name, value in shipped.state_dict().items())
    assert not any(weight.requires_grad for weight in shipped.parameters())
    assert not torch.nn.Sequential(shipped).train()[0].network.training


def test_the_gradient_is_finite_for_constants_ties_and_copies(shipped):
    for x, y in (
        (torch.zeros(30, 1), torch.randn(30, 1)),
        (torch.randn(30, 2).round(), torch.randn(30, 1).round()),
        (torch.arange(30.0)[:, None],) * 2,
    ):
        free = x.clone().requires_grad_()
        shipped(free, y).backward()
        assert free.grad.isfinite().all()


def test_the_gradient_is_the_networks_own_through_the_fixed_curve(network):
    # With the ranks' curve held fixed, the rest is an ordinary differentiable function.
    x, y = (rank_gaussianise(side) for side in tables(1, 8, 1, 1))
    from coloss.jepa.rank_gaussian import gaussian_copula_information

    assert torch.autograd.gradcheck(
        lambda a, b: gaussian_copula_information(a, b), (x.requires_grad_(), y.requires_grad_())
    )


def test_many_samples_are_read_in_blocks(shipped):
    draw = draw_pair("normal-sparse", "base", 900, 2, 2, torch.Generator().manual_seed(3))
    blocks = torch.stack([shipped.estimate(draw.x[i::3], draw.y[i::3]) for i in range(3)])
    torch.testing.assert_close(shipped.estimate(draw.x, draw.y), blocks.mean())


def test_half_precision_integers_and_one_wide_side(shipped):
    x, y = torch.randn(50, 6), torch.randint(9, (50, 1))
    assert shipped.estimate(x.half(), y).dtype is torch.float32
    assert shipped.estimate(x.double(), y).dtype is torch.float64


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda one: one.quantiles(torch.zeros(9, 1), torch.zeros(9, 1), (0.9, 0.1)), "levels must rise"),
        (lambda one: one.interval(torch.zeros(9, 1), torch.zeros(9, 1), 0.0, 0.9), "0 < low < high < 1"),
        (lambda one: one(torch.full((9, 1), math.inf), torch.zeros(9, 1)), "x must be finite"),
        (lambda one: one(torch.zeros(1, 1), torch.zeros(1, 1)), "at least 2 samples, got 1"),
        (lambda one: SupervisedMI(one.network, block=1), "block must be >= 2, got 1"),
        (lambda one: SupervisedMI.from_file("nowhere.safetensors"), "cannot read the estimator nowhere"),
        (lambda one: SupervisedMI(SetMIRegressor(4, 8, 2)).save("x"), "network must be a CellMIRegressor"),
    ],
)
def test_impossible_requests(shipped, ask, message):
    with pytest.raises(InputError, match=message):
        ask(shipped)


def test_a_file_of_something_else_is_refused(tmp_path):
    from coloss.train import save_model

    path = save_model(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no mutual-information estimator"):
        SupervisedMI.from_file(path)


@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_pairs_of_real_columns_are_ranked_as_neighbours_rank_them(shipped, load):
    assert rank_agreement(shipped, torch.from_numpy(load().data)) > 0.8


# Judging


def test_errors_are_told_by_size_columns_and_information():
    judged = [
        JudgedEstimate(0.5, 0.0, 1.0, 0.2, 60, 1, 1, "clayton", "base"),
        JudgedEstimate(0.1, 0.0, 1.0, 0.2, 60, 1, 1, "clayton", "base"),
        JudgedEstimate(2.0, 0.0, 1.0, 1.5, 150, 2, 1, "clayton", "base"),
    ]
    assert error_by_bin(judged) == {
        ("n < 100", "d = 2", "I < 0.3"): pytest.approx((0.09 + 0.01) / 2),
        ("n >= 100", "d = 3", "I >= 1"): pytest.approx(0.25),
    }
    assert interval_coverage(judged) == pytest.approx(2 / 3)
    assert math.isnan(mean_squared_error([]))


def test_every_so_many_th_set_is_taken_across_batches():
    data = MIMetaDataset(batch_size=3, batches=4, samples=(20, 20), dims=(1, 1))
    everything = judge_estimator(GaussianMI(), data)
    some = judge_estimator(GaussianMI(), data, every=5)
    assert [one.estimate for one in some] == [one.estimate for one in everything[::5]]
    with pytest.raises(InputError, match="every must be >= 1"):
        judge_estimator(GaussianMI(), data, every=0)


def test_tables_without_three_columns_that_vary_have_no_ranking(shipped):
    with pytest.raises(InputError, match="at least 3 columns that vary, got 2"):
        rank_agreement(shipped, torch.cat([torch.randn(20, 2), torch.ones(20, 4)], 1))


# The recipe and the claim


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    training = "coloss.jepa.mutual_information_training"
    monkeypatch.setattr(f"{training}._judge", lambda estimator, seed: ({}, {}))
    monkeypatch.setattr(f"{training}.MIMetaDataset", partial(MIMetaDataset, batch_size=3, samples=(20, 40)))
    whole = train_mist("iris", tmp_path / "whole", budget=Budget(steps=4))
    assert set(whole) == {"rank_agreement"}

    def stop(share):
        if share >= 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr(f"{training}.CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(
        "coloss.train.loop.REPORT_SECONDS", -1.0
    )  # four steps may be over before the second report is due
    with pytest.raises(KeyboardInterrupt):
        train_mist("iris", tmp_path / "parts", budget=Budget(steps=4), progress=stop)
    train_mist("iris", tmp_path / "parts", budget=Budget(steps=4))
    first, second = (load_file(tmp_path / name / "mist.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        SupervisedMI.from_file(tmp_path / "whole" / "mist.safetensors")
        .estimate(*torch.randn(2, 20, 1))
        .isfinite()
    )
    with pytest.raises(InputError, match="choose another folder"):
        train_mist("wine", tmp_path / "whole", budget=Budget(steps=4))


def test_budgets_in_epochs_are_refused(tmp_path):
    with pytest.raises(InputError, match="no set is seen twice"):
        train_mist("iris", tmp_path, budget=Budget(epochs=1))


def test_neighbours_are_chosen_on_training_sets(monkeypatch, shipped):
    sets = MIMetaDataset(batches=4, batch_size=8, seed=3_000_000)
    errors = {k: mean_squared_error(judge_estimator(KSG(k), sets)) for k in (1, 2, 3, 5, 8)}
    assert choose_neighbours(sets) == min(errors, key=errors.get) == KSG_NEIGHBOURS
    assert choose_neighbours(sets, [8, 5]) == 5
    with pytest.raises(InputError, match="choices must hold at least one number of neighbours, got none"):
        choose_neighbours(sets, [])
    judged = []

    def record(estimator, sets, levels=None, every=1):
        judged.append(estimator)
        return [JudgedEstimate(0.3, 0.1, 0.5, 0.2, 100, 1, 1, "clayton", "base")]

    monkeypatch.setattr(training, "judge_estimator", record)
    monkeypatch.setattr(training, "crossing_rate", lambda estimator, sets: 0.0)
    training._judge(shipped, 0)
    assert {one.k for one in judged if isinstance(one, KSG)} == {KSG_NEIGHBOURS}


def test_held_out_sets_are_held_out():
    sets = trial.held_out_sets(seed=0, batches=1)
    defaults = MIMetaDataset()
    assert not set(sets["new_family"].families) & set(defaults.families)
    assert not set(sets["new_map"].maps) & set(defaults.maps)
    assert not (
        set(sets["both_new"].families) & set(defaults.families)
        or set(sets["both_new"].maps) & set(defaults.maps)
    )
    seeds = [one.seed for seed in range(9) for one in trial.held_out_sets(seed, 1).values()]
    assert len(set(seeds)) == len(seeds)


def test_the_claim_can_be_measured():
    found = verify("mist", smoke=True, seeds=1)
    assert found["metric"] == "squared_error"
    arms = found["arms"]
    assert {"KSG", "KSG, k = 5", "Gaussian", "Gaussian copula", "InfoNCE", "mist"} <= set(arms)
    assert {"coverage_held_out", "coverage_seen", "interval_width"} <= set(arms["mist"]["metrics"])
    tuned = judge_estimator(KSG(KSG_NEIGHBOURS), trial.held_out_sets(0, batches=1)["new_family"])
    (first, *_) = arms["KSG"]["metrics"]["squared_error_new_family"]["values"]
    assert first == pytest.approx(mean_squared_error(tuned))
