"""Soft confusion counts and their metrics: what scikit-learn says of hard decisions, hand-worked soft ones, gradients."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from coloss.classification import (
    ConfusionCounts,
    all_reduce_counts,
    amplify,
    amplify_classes,
    confusion_metrics,
    find_metric,
    soft_confusion,
)
from coloss.classification.confusion_metrics import METRICS
from coloss.errors import UnknownNameError

SKLEARN = {
    "accuracy": reference.accuracy_score,
    "balanced_accuracy": reference.balanced_accuracy_score,
    "cohen_kappa": reference.cohen_kappa_score,
    "fowlkes_mallows": lambda y, p: math.sqrt(reference.precision_score(y, p) * reference.recall_score(y, p)),
    "g_mean": lambda y, p: math.sqrt(
        reference.recall_score(y, p) * reference.recall_score(y, p, pos_label=0)
    ),
    "jaccard": reference.jaccard_score,
    "matthews_correlation": reference.matthews_corrcoef,
    "precision": reference.precision_score,
    "recall": reference.recall_score,
    "specificity": lambda y, p: reference.recall_score(y, p, pos_label=0),
    "youden_index": lambda y, p: reference.balanced_accuracy_score(y, p, adjusted=True),
    "f1": reference.f1_score,
    "f2": lambda y, p: reference.fbeta_score(y, p, beta=2),
    "f0.5": lambda y, p: reference.fbeta_score(y, p, beta=0.5),
}
every_metric = pytest.mark.parametrize("name", SKLEARN)


def decisions(seed, count=60, share=0.3):
    generator = np.random.default_rng(seed)
    target = (generator.random(count) < share).astype(int)
    predicted = np.where(generator.random(count) < 0.25, 1 - target, target)
    return torch.from_numpy(target), torch.from_numpy(predicted)


@every_metric
@pytest.mark.parametrize("seed", range(3))
def test_saturated_decisions_have_the_metrics_of_scikit_learn(name, seed):
    target, predicted = decisions(seed)
    expected = SKLEARN[name](target.numpy(), predicted.numpy())
    logits = (2.0 * predicted - 1) * 40
    soft = find_metric(name)(soft_confusion(logits, target, amplification=73.0, from_logits=True))
    hard = find_metric(name)(soft_confusion(predicted.double(), target))
    assert soft.item() == pytest.approx(expected, abs=1e-6) and hard.item() == pytest.approx(
        expected, abs=1e-12
    )


def test_every_metric_is_compared_with_scikit_learn():
    assert set(METRICS) <= set(SKLEARN)


@every_metric
def test_a_perfect_classifier_scores_one(name):
    target, _ = decisions(0)
    assert find_metric(name)(soft_confusion(target.double(), target)).item() == pytest.approx(1)


def test_counts_worked_by_hand():
    counts = soft_confusion(torch.tensor([0.9, 0.2, 0.4, 0.7]), torch.tensor([1, 0, 1, 0]))
    assert [round(float(count), 6) for count in counts] == [1.3, 0.9, 0.7, 1.1]
    assert counts.positives == 2 and counts.negatives == 2
    assert counts.predicted.item() == pytest.approx(2.2) and counts.rejected.item() == pytest.approx(1.8)
    weighted = soft_confusion(
        torch.tensor([0.9, 0.2, 0.4, 0.7]),
        torch.tensor([1, 0, 1, 0]),
        weight=torch.tensor([2.0, 0.0, 1.0, 3.0]),
    )
    assert [round(float(count), 6) for count in weighted] == [2.2, 2.1, 0.8, 0.9]


@given(st.integers(0, 10_000), st.sampled_from([None, 1.0, 10.0, 73.0]))
def test_closed_forms_of_the_paper(seed, amplification):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(20, generator=generator, dtype=torch.float64)
    y = (torch.rand(20, generator=generator) < 0.4).double()
    y[0], y[1] = 1, 0
    soft = p if amplification is None else amplify(p, amplification)
    counts = soft_confusion(p, y, amplification=amplification)
    n, s, s_hat, tp = len(y), y.sum(), soft.sum(), (y * soft).sum()
    expected = {
        "accuracy": (n - s - s_hat + 2 * tp) / n,
        "f2": 5 * tp / (4 * s + s_hat),
        "g_mean": torch.sqrt(tp * (n - s - s_hat + tp) / (s * (n - s))),
        "balanced_accuracy": (n * (tp + s) - s * (s_hat + s)) / (2 * s * (n - s)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(find_metric(name)(counts), value, rtol=1e-9, atol=1e-12)
    for count in counts:
        assert count >= 0
    assert sum(counts).item() == pytest.approx(n)


def test_f1_without_an_amplifier_is_the_soft_dice_score():
    p, y = torch.rand(30, dtype=torch.float64), (torch.rand(30) < 0.5).double()
    dice = 2 * (p * y).sum() / (p.sum() + y.sum())
    torch.testing.assert_close(find_metric("f1")(soft_confusion(p, y)), dice)
    torch.testing.assert_close(confusion_metrics.tversky(soft_confusion(p, y)), dice)


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy"])
def test_linear_metrics_pull_equally_at_all_samples_of_a_side(name):
    soft = torch.rand(12, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1] * 4 + [0] * 8)
    (gradient,) = torch.autograd.grad(find_metric(name)(soft_confusion(soft, y)), soft)
    expected = torch.tensor([1 / 12] * 4 + [-1 / 12] * 8)
    if name == "balanced_accuracy":
        expected = torch.tensor([1 / 8] * 4 + [-1 / 16] * 8)
    torch.testing.assert_close(gradient, expected.double())


@every_metric
@pytest.mark.parametrize("amplification", [None, 10.0])
def test_gradients_are_those_of_finite_differences(name, amplification):
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 1])
    assert torch.autograd.gradcheck(
        lambda x: find_metric(name)(soft_confusion(x, y, amplification=amplification, from_logits=True)),
        logits,
    )


def test_gradients_of_exclusive_classes_are_those_of_finite_differences():
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 1, 0, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x: find_metric("g_mean")(soft_confusion(x, y, amplification=10.0, from_logits=True)), logits
    )


def test_the_g_mean_has_its_own_slope_and_not_four_times_it():
    # recall 1/2 and specificity 1: d sqrt(recall) / d s = (1 / 2 positives) / (2 sqrt(1/2))
    soft = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    counts = soft_confusion(soft, torch.tensor([1, 1, 0]))
    (gradient,) = torch.autograd.grad(confusion_metrics.g_mean(counts), soft)
    assert gradient[0].item() == pytest.approx(0.5 / (2 * math.sqrt(0.5)))


@every_metric
def test_the_order_of_samples_does_not_matter(name):
    p, y = torch.rand(25, dtype=torch.float64), torch.rand(25) < 0.4
    order = torch.randperm(25)
    first, second = (
        find_metric(name)(soft_confusion(*pair, amplification=5.0)) for pair in ((p, y), (p[order], y[order]))
    )
    torch.testing.assert_close(first, second)


def test_a_large_amplification_counts_hard_decisions():
    p, y = torch.rand(50, dtype=torch.float64), torch.rand(50) < 0.4
    for soft, hard in zip(soft_confusion(p, y, amplification=1e6), soft_confusion((p > 0.5).double(), y)):
        torch.testing.assert_close(soft, hard)
    classes, target = torch.rand(50, 4, dtype=torch.float64).softmax(1), torch.randint(4, (50,))
    winner = torch.nn.functional.one_hot(classes.argmax(1), 4).double()
    for soft, hard in zip(soft_confusion(classes, target, amplification=1e7), soft_confusion(winner, target)):
        torch.testing.assert_close(soft, hard)


def test_the_amplifier():
    found = amplify(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert found[0].item() == pytest.approx(math.exp(-36.5), rel=1e-9) and found[1] == 0.5
    p = torch.tensor(0.5, requires_grad=True)
    amplify(p, 40.0).backward()
    assert p.grad == 10.0
    pairs = torch.rand(6, 1, dtype=torch.float64)
    pairs = torch.cat([pairs, 1 - pairs], 1)
    torch.testing.assert_close(amplify_classes(pairs, 17.0), amplify(pairs, 17.0))


def test_a_certain_sample_keeps_a_gradient_in_float32():
    logits = torch.tensor(
        [8.0, -8.0], requires_grad=True
    )  # p - 1/2 is 0.4997, where s rounds to 1 in float32
    counts = soft_confusion(logits, torch.tensor([0, 1]), amplification=73.0, from_logits=True)
    assert counts.false_positive == 1
    (counts.false_positive - counts.true_positive).backward()
    exact = 73 * math.exp(-36.5 + 73 * 3.3535e-4) * 3.3535e-4
    assert logits.grad[0].item() == pytest.approx(exact, rel=1e-2)
    assert logits.grad[1].item() == pytest.approx(-exact, rel=1e-2)


def test_an_untrained_network_of_many_classes_has_a_gradient():
    logits = (0.1 * torch.randn(40, 10)).requires_grad_()
    counts = soft_confusion(logits, torch.arange(40) % 10, amplification=73.0, from_logits=True)
    find_metric("f1")(counts).mean().backward()
    assert logits.grad.abs().mean() > 1e-4
    held_against_a_half = amplify(logits.detach().softmax(1))
    assert held_against_a_half.max() < 1e-9  # where one-vs-rest decisions would have had none


def test_classes_one_by_one_are_binary_problems():
    p, y = torch.rand(20, 3).softmax(1), torch.randint(3, (20,))
    counts = soft_confusion(p, y)
    for number in range(3):
        for found, expected in zip(counts.of_class(number), soft_confusion(p[:, number], y == number)):
            torch.testing.assert_close(found, expected)
    assert counts.summed().positives.item() == pytest.approx(20)
    labels = torch.rand(20, 3) < 0.5
    several = soft_confusion(p, labels, amplification=9.0)
    for number in range(3):
        alone = soft_confusion(p[:, number], labels[:, number], amplification=9.0)
        for found, expected in zip(several.of_class(number), alone):
            torch.testing.assert_close(found, expected)


def test_counts_of_batches_add_up():
    p, y = torch.rand(20, dtype=torch.float64), torch.rand(20) < 0.4
    joined = soft_confusion(p[:7], y[:7]) + soft_confusion(p[7:], y[7:])
    for found, expected in zip(joined, soft_confusion(p, y)):
        torch.testing.assert_close(found, expected)


NOTHING = {  # truth, decisions -> metrics of a share or correlation of nothing
    "no positive": ([0, 0, 0], [1, 0, 0], {"recall": 1, "f1": 0, "balanced_accuracy": 5 / 6, "g_mean": math.sqrt(2 / 3), "matthews_correlation": 0, "jaccard": 0}),
    "no negative": ([1, 1, 1], [1, 0, 1], {"specificity": 1, "balanced_accuracy": 5 / 6, "precision": 1, "cohen_kappa": 0}),
    "none predicted": ([1, 0, 0], [0, 0, 0], {"precision": 1, "f1": 0, "recall": 0, "matthews_correlation": 0, "g_mean": 0}),
    "no positive, none predicted": ([0, 0], [0, 0], {"f1": 1, "jaccard": 1, "accuracy": 1, "cohen_kappa": 0}),
    "empty": ([], [], {"accuracy": 1, "f1": 1, "balanced_accuracy": 1, "matthews_correlation": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_shares_of_nothing_are_defined_and_have_no_gradient(case):
    target, predicted, expected = NOTHING[case]
    for name in SKLEARN:
        soft = torch.tensor(predicted, dtype=torch.float64, requires_grad=True)
        score = find_metric(name)(soft_confusion(soft, torch.tensor(target, dtype=torch.int64)))
        if name in expected:
            assert score.item() == pytest.approx(expected[name])
        (gradient,) = torch.autograd.grad(score, soft)
        assert gradient.isfinite().all()
        if name == "recall" and case == "no positive":
            assert not gradient.any()


def test_a_diverged_network_is_not_taken_for_an_empty_batch():
    for name in SKLEARN:
        counts = soft_confusion(
            torch.tensor([math.nan, 1.0]), torch.tensor([1, 0]), from_logits=True, amplification=10.0
        )
        assert find_metric(name)(counts).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_counted_in_float32(dtype):
    logits, y = torch.randn(3000).to(dtype), torch.rand(3000) < 0.3
    found = soft_confusion(logits, y, amplification=20.0, from_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = soft_confusion(logits, y, amplification=20.0, from_logits=True)
    for count, expected, same in zip(
        found, soft_confusion(logits.float(), y, amplification=20.0, from_logits=True), again
    ):
        assert count.dtype == torch.float32
        torch.testing.assert_close(count, expected)
        torch.testing.assert_close(count, same)


def test_extreme_logits_are_finite():
    logits = torch.tensor([1e4, -1e4, math.inf, -math.inf], requires_grad=True)
    counts = soft_confusion(logits, torch.tensor([1, 0, 0, 1]), amplification=73.0, from_logits=True)
    assert [count.item() for count in counts] == [1, 1, 1, 1]
    confusion_metrics.matthews_correlation(counts).backward()
    assert logits.grad.isfinite().all()


def test_large_counts_do_not_overflow():
    counts = ConfusionCounts(*(torch.full((), value) for value in (3e12, 1e12, 1e12, 3e12)))
    assert confusion_metrics.matthews_correlation(counts).item() == pytest.approx(0.5)


def test_costs():
    counts = soft_confusion(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1, 0, 1, 0]))
    assert confusion_metrics.cost_score(counts) == confusion_metrics.accuracy(counts) == 0.5
    # wrong: one negative at 1, one positive at 5; all wrong: 2 * 1 + 2 * 5
    assert confusion_metrics.cost_score(counts, 1.0, 5.0).item() == pytest.approx(1 - 6 / 12)
    counts = soft_confusion(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1, 0, 1, 0]))
    assert confusion_metrics.cost_score(counts, 1.0, 5.0).item() == pytest.approx(1 - 1 / 12)


def test_one_process_pools_nothing():
    counts = soft_confusion(torch.rand(5), torch.ones(5))
    assert all_reduce_counts(counts) is counts


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (torch.rand(3), torch.ones(4)),
            {},
            r"target must have the shape of probabilities \(3,\) .*, got \(4,\)",
        ),
        ((torch.rand(3, 2), torch.ones(3)), {}, "target must be class numbers"),
        ((torch.rand(3, 2, 2), torch.ones(3, 2, 2)), {}, r"must be \(batch,\) or \(batch, classes\)"),
        (
            (torch.rand(3, 2), torch.tensor([0, 1, 2])),
            {},
            r"target must be in \[0, 1\], got values from 0 to 2",
        ),
        ((torch.rand(2), torch.tensor([0.0, 1.5])), {}, r"target must be in \[0, 1\]"),
        ((torch.rand(2), torch.tensor([0.0, math.nan])), {}, r"target must be in \[0, 1\]"),
        (
            (torch.rand(2), torch.ones(2)),
            {"amplification": 0.0},
            "amplification must be > 0 and finite, got 0.0",
        ),
        ((torch.rand(2), torch.ones(2)), {"amplification": math.inf}, "amplification must be > 0 and finite"),
    ],
)
def test_bad_input_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(soft_confusion)(*arguments, **options)


def test_an_unknown_metric_is_refused():
    with pytest.raises(
        UnknownNameError, match="no metric named 'balanced'; did you mean 'balanced_accuracy'"
    ):
        find_metric("balanced")
    with pytest.raises(UnknownNameError, match="no metric named 'f0'"):
        find_metric("f0")
