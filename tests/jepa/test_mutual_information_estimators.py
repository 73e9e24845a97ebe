"""Estimators that need no network of ours: against the truth, against slow twins, and at the edges."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_regression

from coloss.errors import InputError
from coloss.jepa import (
    KSG,
    NWJ,
    DonskerVaradhan,
    GaussianMI,
    InfoNCE,
    bivariate_gaussian_information,
    donsker_varadhan_bound,
    info_nce_bound,
    nwj_bound,
)


def correlated(samples, correlation, dims=1, seed=0):
    """Normal samples whose correlations in the sample are exactly those wanted."""
    normal = torch.randn(samples, 2 * dims, generator=torch.Generator().manual_seed(seed))
    exact = torch.linalg.qr((normal - normal.mean(0)).double()).Q.float() * math.sqrt(samples)
    x, noise = exact[:, :dims], exact[:, dims:]
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


@pytest.mark.parametrize(
    "estimator", [KSG(), GaussianMI(), KSG(gaussianise=True), GaussianMI(gaussianise=True)]
)
@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_truth_is_met_for_2000_samples(estimator, correlation):
    found = estimator.estimate(*correlated(2000, correlation))
    assert found.item() == pytest.approx(bivariate_gaussian_information(correlation), abs=0.05)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_neighbours_are_counted_as_a_slow_twin_does(dims, tied):
    x, y = correlated(40, 0.7, dims)
    if tied:
        x, y = (2 * x).round(), (2 * y).round()
    k, first, second = 3, x.double().numpy(), y.double().numpy()
    apart = [np.abs(side[:, None] - side[None]).max(2) for side in (first, second)]
    total = 0.0
    for i in range(40):
        joint = np.maximum(apart[0][i], apart[1][i])
        distance = np.sort(np.delete(joint, i))[k - 1]
        total += sum(digamma((np.delete(one[i], i) < distance).sum() + 1) for one in apart)
    expected = digamma(k) + digamma(40) - total / 40
    assert KSG(k).estimate(x, y).item() == pytest.approx(expected, abs=1e-5)


def test_one_column_each_agrees_with_scikit_learn():
    x, y = correlated(300, 0.8)
    scaled = [(side / side.std()).double().numpy() for side in (x, y)]
    theirs = mutual_info_regression(scaled[0], scaled[1][:, 0], n_neighbors=5, random_state=0)[0]
    ours = KSG(5).estimate(*(torch.from_numpy(side) for side in scaled)).item()
    assert ours == pytest.approx(theirs, abs=0.02)


def test_a_copy_is_large_but_finite():
    x, _ = correlated(200, 0.5, dims=2)
    mix = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    found = GaussianMI().estimate(x, x @ mix)
    assert 15 < found < 40
    assert KSG().estimate(x, x).isfinite()
    # Columns that depend on each other on one side are no information about the other side.
    doubled = torch.cat([x, x], 1)
    y = torch.randn(200, 1, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(GaussianMI().estimate(doubled, y), GaussianMI().estimate(x, y))


def test_constants_share_nothing():
    x, _ = correlated(50, 0.5)
    assert GaussianMI().estimate(x, torch.ones(50, 1)) == 0
    assert KSG().estimate(x, torch.ones(50, 1)).abs() < 0.5


def test_correction_takes_the_excess_off():
    tables = torch.randn(100, 2, 30, 3).unbind()
    plain, corrected = (
        torch.stack([GaussianMI(correct=correct).estimate(x, y) for x, y in tables]).mean()
        for correct in (False, True)
    )
    assert plain > 0.12
    assert corrected.abs() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_tell_nothing_new_are_not_corrected_for(dtype):
    x, y = torch.randn(2, 24, 2, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    # The sum, and the mean of numbers 0.1, are rounded.
    constant = torch.full((24, 1), 0.1, dtype=dtype)
    wide, other = torch.cat([x, x.sum(1, keepdim=True), constant], 1), torch.cat([y, constant], 1)
    for correct in (False, True):
        estimator = GaussianMI(correct=correct)
        torch.testing.assert_close(estimator.estimate(wide, other), estimator.estimate(x, y))
        assert estimator.estimate(x, constant) == 0
    # Six samples are enough for four independent columns.
    assert GaussianMI().estimate(wide[:6], other[:6]).isfinite()


def test_neither_order_of_samples_nor_of_sides_matters():
    x, y = correlated(60, 0.6, 2)
    order = torch.randperm(60)
    for estimator in (KSG(), GaussianMI()):
        value = estimator.estimate(x, y)
        torch.testing.assert_close(estimator.estimate(y, x), value)
        torch.testing.assert_close(estimator.estimate(x[order], y[order]), value)


def test_intervals_by_halves_have_about_the_width_of_the_standard_error():
    x, y = correlated(400, 0.6)
    low, high = GaussianMI().interval(x, y, 0.05, 0.95)
    # The correlation's standard error is (1 - r^2) / sqrt(n); I changes by r / (1 - r^2) for each unit of it.
    width = 2 * 1.645 * 0.6 / math.sqrt(400)
    assert high - low == pytest.approx(width, rel=0.35)
    assert low < GaussianMI().estimate(x, y) < high
    assert GaussianMI().interval(x, y) == (low, high)


def test_bounds_of_a_perfect_and_of_an_ignorant_critic():
    perfect, ignorant = 50 * torch.eye(8), torch.zeros(8, 8)
    assert info_nce_bound(perfect).item() == pytest.approx(math.log(8))
    assert donsker_varadhan_bound(perfect) == 50
    assert info_nce_bound(ignorant).item() == pytest.approx(0, abs=1e-6)
    assert donsker_varadhan_bound(ignorant) == 0
    assert nwj_bound(ignorant).item() == pytest.approx(-math.exp(-1))
    assert nwj_bound(torch.ones(8, 8)) == 0


def test_info_nce_never_exceeds_the_logarithm_of_the_number_of_samples():
    for seed in range(20):
        scores = 30 * torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        assert info_nce_bound(scores) <= math.log(6)


def test_bounds_with_the_true_density_ratio_are_the_information():
    # T = log p(x, y) / (p(x) p(y)), and one more for NWJ; r = 0.6, 0.2231 nats.
    x, y = (side.double() for side in correlated(1500, 0.6))
    r = 0.6
    ratio = -0.5 * math.log(1 - r**2) + (2 * r * x @ y.T - r**2 * (x**2 + y.T**2)) / (2 * (1 - r**2))
    for value in (info_nce_bound(ratio), donsker_varadhan_bound(ratio), nwj_bound(ratio + 1)):
        assert value.item() == pytest.approx(0.2231, abs=0.04)


def test_bounds_take_extreme_scores_and_half_precision():
    scores = 1e4 * torch.eye(4)
    assert info_nce_bound(scores).isfinite()
    assert donsker_varadhan_bound(scores.half()).dtype is torch.float32
    # Differentiable.
    free = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    for bound in (info_nce_bound, donsker_varadhan_bound, nwj_bound):
        assert torch.autograd.gradcheck(bound, free)


@pytest.mark.parametrize("bound", [InfoNCE, DonskerVaradhan, NWJ])
def test_trained_bounds_find_dependence_and_do_not_invent_it(bound):
    x, y = correlated(160, 0.9)
    estimator = bound(steps=60, rate=1e-2)
    found, chance = estimator.estimate(x, y), estimator.estimate(x, y.roll(1, 0))
    assert 0.4 < found < 1.2  # the truth: 0.83
    assert 0 <= chance < 0.15


def test_training_a_bound_leaves_the_global_randomness_alone():
    before = torch.get_rng_state()
    InfoNCE(steps=2).estimate(*correlated(20, 0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_a_bound_leaves_the_generators_of_gpus_alone(monkeypatch):
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    InfoNCE(steps=1).estimate(*correlated(20, 0.5))
    assert not reseeded


def test_a_bound_is_trained_in_full_precision_under_autocast():
    pair, estimator = correlated(60, 0.9), InfoNCE(steps=30, rate=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimator.estimate(*pair)
    assert torch.equal(found, estimator.estimate(*pair)) and found > 0.2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KSG(0), "k must be >= 1, got 0"),
        (lambda: KSG(5).estimate(torch.zeros(5, 1), torch.zeros(5, 1)), "more than k = 5 samples, got 5"),
        (
            lambda: GaussianMI().estimate(torch.randn(5, 2), torch.randn(5, 2)),
            "more than 5 samples for 4 independent columns, got 5",
        ),
        (lambda: InfoNCE(steps=0), "steps must be >= 1, got 0"),
        (lambda: InfoNCE(rate=0.0), "rate must be > 0, got 0.0"),
        (lambda: InfoNCE().estimate(torch.zeros(7, 1), torch.zeros(7, 1)), "at least 8 samples, got 7"),
        (lambda: KSG().estimate(torch.tensor([[math.nan]]), torch.zeros(1, 1)), "x must be finite"),
        (lambda: KSG().estimate(torch.zeros(9, 0), torch.zeros(9, 1)), "x must have samples in rows"),
        (
            lambda: GaussianMI().interval(*correlated(50, 0.5), 0.9, 0.1),
            "0 < low < high < 1, got 0.9 and 0.1",
        ),
    ],
)
def test_impossible_input(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_unpaired_samples(as_users_call):
    with pytest.raises(InputError, match="equal numbers of samples, got 9 and 8"):
        KSG().estimate(torch.zeros(9, 1), torch.zeros(8, 1))
    with pytest.raises(ValueError, match="scores must be square"):
        info_nce_bound(torch.zeros(3, 4))


def test_integers_and_half_precision_are_taken():
    x, y = correlated(100, 0.8)
    assert GaussianMI().estimate(x.half(), y.half()).dtype is torch.float32
    assert GaussianMI().estimate((9 * x).long(), (9 * y).long()).item() == pytest.approx(
        GaussianMI().estimate(x, y).item(), abs=0.05
    )
