import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from coloss.classification import (
    GaussianNBHead,
    ProbeCurve,
    feature_diagnostics,
    fit_linear_head,
    probe_curve,
    sample_gaussian_mixture,
)

METHODS = ("naive_bayes", "lda", "logistic", "ridge", "prototype")


def draw(samples: int = 90, classes: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.arange(samples) % classes
    return torch.randn(samples, 4, dtype=torch.float64) + 3 * torch.eye(4)[target], target


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [2, 3])
def test_scaling_is_folded_into_the_layer(method: str, classes: int) -> None:
    features, target = draw(classes=classes)
    moved = features * torch.tensor([100.0, 1e-2, 5.0, 1.0]) + torch.tensor([1.0, -50.0, 0.0, 7.0])
    low, high = moved.aminmax(dim=0)
    scaled = (moved - low) / (high - low)
    inside = fit_linear_head(scaled, target, method, scale="none")
    outside = fit_linear_head(moved, target, method, scale="minmax")
    assert type(outside) is nn.Linear and outside.weight.dtype == torch.float32
    # Far beyond the range seen, too: nothing is clipped.
    for factor in (1, 10):
        new = torch.randn(20, 4, dtype=torch.float64) * factor
        a = inside(new.float())
        b = outside((new * (high - low) + low).float())
        torch.testing.assert_close(a - a[:, :1], b - b[:, :1], rtol=1e-3, atol=1e-2 * factor)


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_learns(method: str) -> None:
    features, target = draw()
    for scale in ("minmax", "standard", "none"):
        head = fit_linear_head(features, target, method, scale=scale)
        assert (head(features.float()).argmax(1) == target).double().mean() > 0.85


def test_probabilities_of_two_classes_are_those_of_scikit_learn() -> None:
    features, target = draw(classes=2)
    head = fit_linear_head(features, target, "logistic", scale="none", C=0.5)
    theirs = LogisticRegression(C=0.5, max_iter=1000).fit(features, target).predict_proba(features)
    np.testing.assert_allclose(head(features.float()).softmax(1).detach(), theirs, atol=1e-5)


def test_naive_bayes_is_the_head() -> None:
    features, target = draw()
    head = GaussianNBHead(4, 3, smoothing=0.3, prior="uniform")
    head.update(features, target)
    layer = fit_linear_head(features, target, scale="none", smoothing=0.3, prior="uniform")
    torch.testing.assert_close(layer.weight, head.to_linear().weight)
    torch.testing.assert_close(layer.bias, head.to_linear().bias)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_samples_is_impossible(method: str) -> None:
    features, target = draw()
    layer = fit_linear_head(features, 2 * target, method, num_classes=6)
    logits = layer(features.float())
    assert logits[:, 1::2].eq(-torch.inf).all() and logits[:, ::2].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_feature_does_no_harm(method: str) -> None:
    features, target = draw()
    features[:, 1] = 1e6
    layer = fit_linear_head(features, target, method)
    assert layer.weight.isfinite().all()
    assert (layer.double()(features).argmax(1) == target).double().mean() > 0.6


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_refused() -> None:
    features, target = draw()
    for call, message in (
        (lambda: fit_linear_head(features, target, "svm"), "method must be .*, got 'svm'"),
        (lambda: fit_linear_head(features, target, scale="log"), "scale must be .*, got 'log'"),
        (lambda: fit_linear_head(features * torch.nan, target), "features must be finite"),
        (lambda: fit_linear_head(features, target[:3]), r"features must be \(samples, features\)"),
        (
            lambda: fit_linear_head(features, target, num_classes=2),
            r"classes must be in \[0, 2\), got 0 to 2",
        ),
        (
            lambda: fit_linear_head(features, target * 0, "lda"),
            "classes must be two at least for 'lda', got 1",
        ),
        (lambda: fit_linear_head(features, target, "prototype", C=1), "has no options, got C"),
        (lambda: probe_curve(features, target, features, target, [2]), r"sizes must be in \[3, 90\].*got 2"),
        (
            lambda: probe_curve(features, target, features, target, [91]),
            r"sizes must be in \[3, 90\].*got 91",
        ),
        (lambda: probe_curve(features, target, features, target, []), "sizes must be one at least"),
        (lambda: probe_curve(features, target, features, target, [5], ()), "methods must be one at least"),
        (
            lambda: probe_curve(features, target, features, target, [5], repeats=0),
            "repeats must be >= 1, got 0",
        ),
        (lambda: feature_diagnostics(features, target, bins=1), "bins must be >= 2, got 1"),
        (lambda: feature_diagnostics(features, target[:3]), r"features must be \(samples, features\)"),
        (lambda: sample_gaussian_mixture(3, 1), "num_features must be >= 2, got 1"),
        (lambda: ProbeCurve((1,), {"a": np.zeros((1, 1))}).excess("b"), "method must be one of a, got 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Curves


def test_subsets_hold_every_class_and_are_the_same_for_all_methods_and_seeds() -> None:
    features, target = draw()
    target[:80] = 0  # two rare classes
    arguments = (features, target, features, target, [3, 6, 90])
    twins = {"one": {"method": "prototype"}, "two": {"method": "prototype"}}
    curve = probe_curve(*arguments, twins, repeats=4)
    assert np.array_equal(curve.errors["one"], curve.errors["two"])
    assert np.isfinite(curve.errors["one"]).all()
    again = probe_curve(*arguments, twins, repeats=4)
    other = probe_curve(*arguments, twins, repeats=4, seed=1)
    assert np.array_equal(curve.errors["one"], again.errors["one"])
    assert not np.array_equal(curve.errors["one"], other.errors["one"])
    # All labels leave nothing to draw.
    assert np.ptp(curve.errors["one"][-1]) == 0


def test_test_labels_reach_nothing_but_the_error() -> None:
    features, target = draw()
    right = probe_curve(features, target, features, target, [30], ["naive_bayes"])
    wrong = probe_curve(features, target, features, (target + 1) % 3, [30], ["naive_bayes"])
    assert (right.errors["naive_bayes"] + wrong.errors["naive_bayes"] >= 1).all()


def test_sizes_of_interest() -> None:
    errors = {"a": np.array([[0.3], [0.2], [0.2], [0.2]]), "b": np.array([[0.2], [0.3], [0.1], [0.1]])}
    curve = ProbeCurve((10, 20, 40, 80), errors)
    # b is lower at 10 as well, but not from there on.
    assert curve.crossover("a", "b") == 40
    assert curve.crossover("b", "a") is None
    assert curve.size_within("b", 0.2) == 40 and curve.size_within("a", 0.1) is None
    assert curve.excess("a") == pytest.approx([0.1, 0.0, 0.0, 0.0])
    assert curve.table().iloc[0].tolist() == [10, "a", 0.3, 0.0]


def test_naive_bayes_needs_few_samples_where_its_assumption_holds() -> None:
    # n features of which one direction tells the classes apart: logistic regression needs of the order of n samples.
    needed: dict[str, list[int]] = {"naive_bayes": [], "logistic": []}
    for features in (40, 160):
        generator = torch.Generator().manual_seed(0)
        target = torch.arange(3000) % 2
        rows = torch.randn(3000, features, generator=generator) + 2 / features**0.5 * (
            2 * target[:, None] - 1
        )
        curve = probe_curve(
            rows[:2000],
            target[:2000],
            rows[2000:],
            target[2000:],
            [80, 160, 320, 640, 1280],
            {"naive_bayes": {}, "logistic": {"scale": "standard"}},
            repeats=2,
        )
        for name, found in needed.items():
            # The best there is has an error of P(normal > 2) = 0.0228.
            found.append(curve.size_within(name, 0.0228 + 0.01) or 2560)
    for few, many in zip(needed["naive_bayes"], needed["logistic"]):
        assert many >= 4 * few


# How Gaussian, how independent


def test_the_mixture_is_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    easy, classes = sample_gaussian_mixture(20000, 6, 3, generator=generator)
    for number, mean in enumerate((-1.0, 1.0, 2.0)):
        rows = easy[classes == number]
        torch.testing.assert_close(rows.mean(0), torch.full((6,), mean).double(), rtol=0, atol=0.15)
        torch.testing.assert_close(rows.var(0), torch.tensor([6.0, 6, 6, 1, 1, 1]).double(), rtol=0.1, atol=0)
    found = feature_diagnostics(easy, classes)
    assert found.dependence < 0.02 and found.overconfidence == pytest.approx(1, abs=0.05)
    hard, classes = sample_gaussian_mixture(20000, 6, 2, hard=True, generator=generator)
    torch.testing.assert_close(
        hard[classes == 0].var(0), torch.tensor([6.0, 6, 6, 1, 1, 1]).double(), rtol=0.1, atol=0
    )
    assert feature_diagnostics(hard, classes).dependence > 0.1


def test_diagnostics_by_hand() -> None:
    classes = torch.arange(2).repeat(2000)
    normal = torch.randn(4000, 2, dtype=torch.float64)
    features = torch.cat([normal, normal[:, :1].sign() + 0.0, torch.full((4000, 1), 5.0)], 1)
    features = features + classes[:, None] * torch.tensor([1.0, 2.0, 3.0, 0.0])
    found = feature_diagnostics(features, classes)
    torch.testing.assert_close(found.deviation, torch.tensor([1.0, 1, 1, 0]).double(), rtol=0.05, atol=1e-9)
    assert found.non_gaussianity[0] < 0.02 < 1 < found.non_gaussianity[2]
    assert found.non_gaussianity[3] == 0
    # The sign of a normal number correlates with it by sqrt(2 / pi); the other two pairs do not.
    assert found.dependence == pytest.approx((2 / torch.pi) ** 0.5 / 3, abs=0.02)


def test_overconfidence_counts_copies() -> None:
    classes = torch.arange(3).repeat(500)
    features = torch.randn(1500, 2, dtype=torch.float64) + classes[:, None] * torch.tensor([1.0, -1.0])
    single = feature_diagnostics(features, classes).overconfidence
    assert feature_diagnostics(features.repeat(1, 4), classes).overconfidence == pytest.approx(4 * single)
    assert feature_diagnostics(torch.ones(4, 2), torch.tensor([0, 1, 0, 1])).overconfidence == 1.0
