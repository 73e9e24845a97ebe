import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    ConfidenceLoss,
    balanced_assignment,
    balanced_weak_labels,
    confidence_loss,
    hardened_predictions,
    linear_warmup,
    product_loss,
    window_loss,
)


def sample(rows: int = 16, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, classes, dtype=torch.float64), torch.randn(rows, classes).double().softmax(1)


# The confidence loss


@pytest.mark.parametrize("classes", [2, 5])
def test_without_confidence_it_is_cross_entropy_with_soft_targets(classes: int) -> None:
    logits, weak = sample(classes=classes)
    assert torch.equal(confidence_loss(logits, weak, 0.0), F.cross_entropy(logits, weak))
    weight = torch.rand(classes, dtype=torch.float64)
    torch.testing.assert_close(
        confidence_loss(logits, weak, 0.0, weight=weight), F.cross_entropy(logits, weak, weight=weight)
    )
    torch.testing.assert_close(
        confidence_loss(logits, weak, 0.0, reduction="sum"), F.cross_entropy(logits, weak, reduction="sum")
    )


@pytest.mark.parametrize("student", ["balanced", "argmax", "soft"])
def test_the_mixture_of_losses_is_the_loss_on_the_mixed_target(student: str) -> None:
    logits, weak = sample()
    own = hardened_predictions(logits, weak, student=student)
    mixture = 0.3 * F.cross_entropy(logits, weak) + 0.7 * F.cross_entropy(logits, own)
    torch.testing.assert_close(confidence_loss(logits, weak, 0.7, student=student), mixture)


def test_class_numbers_are_one_hot_weak_labels() -> None:
    logits, labels = torch.randn(16, 3), torch.randint(3, (16,))
    soft = F.one_hot(labels, 3).float()
    for loss in (lambda w: confidence_loss(logits, w, 0.5), lambda w: window_loss(logits, w)):
        assert torch.equal(loss(labels), loss(soft))
    # A hard label leaves the student nothing to add to a product.
    torch.testing.assert_close(product_loss(logits, labels), F.cross_entropy(logits, labels))


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_the_share_hardened_to_a_class_is_that_of_the_weak_labels(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 2, generator=generator)
    weak = torch.randn(rows, 2, generator=generator).softmax(1)
    count = float(hardened_predictions(logits, weak)[:, 1].sum())
    assert abs(count - rows * float(weak[:, 1].mean())) <= 0.5 + 1e-4
    # The authors' rule: class 0 where p_0 reaches the quantile of p_0 at the weak labels' mean for class 1.
    first = logits.softmax(1)[:, 0]
    published = float((first < first.quantile(weak[:, 1].mean())).sum())
    assert abs(count - published) <= 1


def test_the_most_confident_are_hardened_to_their_class() -> None:
    logits, weak = sample(21)
    chosen = hardened_predictions(logits, weak)[:, 1].bool()
    margin = logits[:, 1] - logits[:, 0]
    assert margin[chosen].min() > margin[~chosen].max()


def test_ties_go_by_weak_label_and_not_all_to_one_class() -> None:
    # A zero-initialised head: a quantile would send every sample to class 0.
    weak = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8]])
    assert hardened_predictions(torch.zeros(4, 2), weak)[:, 1].tolist() == [0, 1, 0, 1]
    shares = torch.eye(3)[[2, 0, 1, 1, 0]]
    assert torch.equal(hardened_predictions(torch.zeros(5, 3), shares), shares)


def test_no_gradient_flows_through_the_hardened_predictions() -> None:
    for student in ("balanced", "argmax", "soft"):
        logits, weak = sample()
        logits.requires_grad_()
        own = hardened_predictions(logits, weak, student=student)
        assert not own.requires_grad
        (found,) = torch.autograd.grad(confidence_loss(logits, weak, 0.6, student=student), logits)
        expected = (logits.softmax(1) - 0.4 * weak - 0.6 * own) / len(logits)
        torch.testing.assert_close(found, expected)


def test_a_threshold_hardens_each_sample_by_itself() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    own = hardened_predictions(probabilities.log(), probabilities, threshold=0.7)
    assert own[:, 0].tolist() == [1, 0, 0]
    each = confidence_loss(probabilities.log(), probabilities, 1.0, threshold=0.7, reduction="none")
    torch.testing.assert_close(each, -torch.tensor([0.9, 0.4, 0.7]).log())


def test_a_balance_over_the_batch_has_no_values_by_sample() -> None:
    logits, weak = sample()
    assert confidence_loss.batch_statistic  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="which class a sample is hardened to depends on the others"):
        confidence_loss(logits, weak, 0.5, reduction="none")
    assert confidence_loss(logits, weak, 0.5, student="argmax", reduction="none").shape == (16,)
    with pytest.raises(ValueError, match="samples depend on each other"):
        ConfidenceLoss(reduction="none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, weak = (part.to(dtype) for part in sample())
    for loss in (
        lambda z, q: confidence_loss(z, q, 0.5),
        lambda z, q: product_loss(z, q),
        lambda z, q: window_loss(z, q),
    ):
        assert torch.equal(loss(logits, weak), loss(logits.float(), weak.float()))


def test_extreme_empty_and_single_batches_are_finite() -> None:
    for scale in (1e4, 1e30):
        logits = (torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]) * scale).requires_grad_()
        weak = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        for loss in (
            confidence_loss(logits, weak, 0.5),
            product_loss(logits, weak),
            window_loss(logits, weak),
        ):
            (gradient,) = torch.autograd.grad(loss, logits)
            assert loss.isfinite() and gradient.isfinite().all()
    empty = torch.zeros(0, 3)
    for loss in (confidence_loss(empty, empty, 0.5), product_loss(empty, empty), window_loss(empty, empty)):
        assert loss == 0
    assert confidence_loss(torch.randn(1, 2), torch.tensor([[0.4, 0.6]]), 1.0).isfinite()
    assert confidence_loss(torch.full((3, 4), math.nan), torch.full((3, 4), 0.25), 0.5).isnan()


# Balanced assignments


def brute_force(scores: np.ndarray, counts: list[int]) -> float:
    rows = len(scores)
    labels = itertools.product(range(len(counts)), repeat=rows)
    return max(
        sum(scores[row, label] for row, label in enumerate(chosen))
        for chosen in labels
        if [chosen.count(c) for c in range(len(counts))] == counts
    )


@given(st.integers(0, 10**6))
def test_an_assignment_is_the_best_of_those_with_its_shares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)  # 3, 0.6 and 2.4 of six
    chosen = balanced_assignment(scores, shares)
    assert chosen.bincount(minlength=3).tolist() == [3, 1, 2]
    total = float(scores.gather(1, chosen[:, None]).sum())
    assert total == pytest.approx(brute_force(scores.numpy(), [3, 1, 2]))


def test_two_classes_are_assigned_as_many_are() -> None:
    from scipy.optimize import linear_sum_assignment

    scores, shares = torch.randn(15, 2, dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    cost = -scores[:, [0] * 9 + [1] * 6].numpy()
    rows, columns = linear_sum_assignment(cost)
    expected = torch.from_numpy((columns >= 9).astype(np.int64))[torch.from_numpy(rows).argsort()]
    assert torch.equal(balanced_assignment(scores, shares), expected)


def test_an_impossible_class_is_taken_last() -> None:
    scores = torch.tensor([[0.0, -math.inf, -1.0], [-1.0, 0.0, -math.inf], [0.0, 0.0, -5.0]])
    assert balanced_assignment(scores, torch.full((3,), 1 / 3)).tolist() == [2, 1, 0]


# The other losses


def test_the_product_multiplies_and_normalises() -> None:
    logits, weak = sample(classes=3)
    target = logits.softmax(1) ** 0.5 * weak**2
    target = target / target.sum(1, keepdim=True)
    torch.testing.assert_close(
        product_loss(logits, weak, weak_power=2.0, strong_power=0.5), F.cross_entropy(logits, target)
    )
    torch.testing.assert_close(product_loss(logits, weak, strong_power=0.0), F.cross_entropy(logits, weak))
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(product_loss(logits, weak, weak_power=0.0), entropy)


def test_a_product_of_predictions_that_exclude_each_other_keeps_the_weak_label() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    found = product_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    assert found == math.inf
    assert product_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]])) == 0


def test_the_window_leaves_out_what_the_student_is_sure_of() -> None:
    probabilities = torch.tensor([[0.64, 0.36], [0.66, 0.34], [0.2, 0.8], [0.5, 0.5]])
    each = window_loss(probabilities.log(), torch.tensor([1, 1, 1, 0]), reduction="none")
    torch.testing.assert_close(each, torch.tensor([-math.log(0.36), 0.0, 0.0, math.log(2)]))
    mean = window_loss(probabilities.log(), torch.tensor([1, 1, 1, 0]))
    torch.testing.assert_close(mean, each.sum() / 4)


def test_balanced_weak_labels_have_mean_log_odds_zero() -> None:
    weak = torch.rand(20, 1, dtype=torch.float64)
    weak = torch.cat([1 - weak, weak], dim=1)
    odds, balanced = weak.logit()[:, 1], balanced_weak_labels(weak).logit()[:, 1]
    torch.testing.assert_close(balanced, odds - odds.mean())
    torch.testing.assert_close(balanced_weak_labels(balanced_weak_labels(weak)), balanced_weak_labels(weak))
    hard = balanced_weak_labels(torch.eye(2), floor=0.01)
    torch.testing.assert_close(hard, torch.tensor([[1 / 1.01, 0.01 / 1.01], [0.01 / 1.01, 1 / 1.01]]))
    assert balanced_weak_labels(torch.zeros(0, 3)).shape == (0, 3)


# The module


def test_the_ramp_reaches_its_maximum_without_a_jump() -> None:
    # The released code rises to the warm-up share itself and then jumps to 1.
    ramp = linear_warmup(0.75, 0.2)
    values = [ramp(step / 1000) for step in range(1001)]
    assert values[0] == 0 and values[100] == pytest.approx(0.375) and set(values[200:]) == {0.75}
    assert max(after - before for before, after in itertools.pairwise(values)) < 0.004
    assert linear_warmup(0.5, 0.0)(0.0) == 0.5
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        linear_warmup(0.5, 1.5)


def test_the_module_is_the_function_at_the_schedules_alpha() -> None:
    logits, weak = sample()
    loss = ConfidenceLoss(linear_warmup(0.8, 0.5))
    for progress, alpha in ((0.0, 0.0), (0.25, 0.4), (1.0, 0.8)):
        torch.testing.assert_close(loss(logits, weak, progress), confidence_loss(logits, weak, alpha))
    assert torch.equal(ConfidenceLoss(0.8)(logits, weak), loss(logits, weak))
    weight = torch.tensor([0.2, 0.8])
    torch.testing.assert_close(
        ConfidenceLoss(0.8, weight=weight)(logits, weak), confidence_loss(logits, weak, 0.8, weight=weight)
    )
    assert loss.batch_statistic and not ConfidenceLoss(student="soft").batch_statistic
    assert not ConfidenceLoss(memory=4).batch_statistic and not ConfidenceLoss(threshold=0.5).batch_statistic


@pytest.mark.parametrize("classes", [2, 4])
def test_a_memory_ranks_small_batches_among_those_before(classes: int) -> None:
    logits, weak = sample(24, classes)
    loss = ConfidenceLoss(1.0, memory=20)
    for start in range(0, 24, 4):
        rows = slice(start, start + 4)
        window = slice(max(start - 20, 0), start + 4)
        own = hardened_predictions(logits[window], weak[window])[-4:]
        torch.testing.assert_close(loss(logits[rows], weak[rows]), F.cross_entropy(logits[rows], own))
    assert loss._seen is not None and len(loss._seen) == 20  # the published buffer grows without bound


def test_a_single_sample_with_a_memory_is_not_always_given_the_weak_majority() -> None:
    weak, found = torch.tensor([[0.4, 0.6]]), []
    alone, remembering = ConfidenceLoss(1.0), ConfidenceLoss(1.0, memory=32)
    for margin in torch.randn(200):
        logits = torch.stack([-margin, margin])[None]
        costs = [loss(logits, weak) for loss in (alone, remembering)]
        found.append([bool(torch.isclose(cost, -logits.log_softmax(1)[0, 1])) for cost in costs])
    shares = torch.tensor(found).float().mean(0)
    assert shares[0] == 1.0
    assert 0.5 < shares[1] < 0.7


def test_the_memory_is_part_of_the_state() -> None:
    logits, weak = sample(8, 3)
    first, second = ConfidenceLoss(1.0, memory=8), ConfidenceLoss(1.0, memory=8)
    second.load_state_dict(first.state_dict())
    first(logits.float(), weak.float())
    second.load_state_dict(first.state_dict())
    more = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    assert torch.equal(first(*more), second(*more))


def test_bad_input_is_named(as_users_call: None) -> None:
    logits, weak = sample()
    for call, message in (
        (lambda: confidence_loss(logits, weak, 1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (
            lambda: confidence_loss(logits, weak, 0.5, student="hard"),
            "student must be \"balanced\", .* got 'hard'",
        ),
        (
            lambda: confidence_loss(logits, weak, 0.5, reduction="max"),
            "reduction must be \"mean\", .* got 'max'",
        ),
        (lambda: confidence_loss(logits, weak[:, :1], 0.5), r"weak_labels must have the shape \(16, 2\)"),
        (
            lambda: confidence_loss(logits, torch.ones(3).long(), 0.5),
            "weak_labels must hold 16 class numbers",
        ),
        (
            lambda: confidence_loss(logits, torch.full((16,), 2), 0.5),
            r"class numbers in \[0, 2\), got \[2, 2",
        ),
        (lambda: confidence_loss(logits[0], weak, 0.5), r"logits must be \(batch, classes\), got \(2,\)"),
        (lambda: confidence_loss(*sample(4, 3), 0.5, threshold=0.5), "threshold is for 2 classes, got 3"),
        (
            lambda: confidence_loss(logits, weak, 0.5, threshold=2.0),
            r"threshold must be in \[0, 1\], got 2.0",
        ),
        (lambda: product_loss(logits, weak, weak_power=-1.0), "weak_power must be >= 0 and finite, got -1.0"),
        (lambda: window_loss(logits, weak, -0.1), "radius must be >= 0, got -0.1"),
        (lambda: balanced_weak_labels(weak, 0.0), r"floor must be in \(0, 1\), got 0.0"),
        (lambda: ConfidenceLoss(2.0), r"alpha must be in \[0, 1\], got 2.0"),
        (lambda: ConfidenceLoss(memory=-1), "memory must be >= 0, got -1"),
        (lambda: ConfidenceLoss(memory=4, student="soft"), 'memory is for student="balanced"'),
        (lambda: ConfidenceLoss(student="hard"), 'student must be "balanced"'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
