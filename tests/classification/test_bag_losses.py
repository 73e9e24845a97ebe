"""Facts about losses on bag averages."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    AggregateLoss,
    aggregate_loss,
    bag_level_loss,
    instance_level_loss,
    within_bag_variance,
)
from coloss.ops import segment_mean


def absolute(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions - targets).abs()


def case(base: Any, rows: int = 12, bags: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, bag targets and bags of unequal sizes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3,) if base == "ce" else ()
    predictions = 2 * torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    targets = torch.rand(bags, *shape, generator=generator, dtype=torch.float64)
    if base == "ce":
        targets = targets / targets.sum(-1, keepdim=True)
    index = torch.cat([torch.arange(bags), torch.randint(bags, (rows - bags,), generator=generator)])
    return predictions, targets, index


BASES = ["mse", "bce", "ce", absolute]


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("base", "ordinary"),
    [
        ("mse", F.mse_loss),
        ("bce", F.binary_cross_entropy_with_logits),
        ("ce", F.cross_entropy),
        (absolute, F.l1_loss),
    ],
)
def test_bags_of_one_give_the_ordinary_loss(base: Any, ordinary: Any, rho: float) -> None:
    predictions, targets, index = case(base, rows=6, bags=6)
    found = aggregate_loss(predictions, targets, index, rho, base)
    torch.testing.assert_close(found, ordinary(predictions, targets))


@settings(max_examples=25)
@given(st.integers(0, 200), st.integers(1, 5))
def test_the_instance_level_adds_the_variance_within_bags(seed: int, bags: int) -> None:
    predictions, targets, index = case("mse", rows=9, bags=bags, seed=seed)
    added = instance_level_loss(predictions, targets, index) - bag_level_loss(predictions, targets, index)
    torch.testing.assert_close(added, within_bag_variance(predictions, index))
    rho = 1.7  # beyond the instance level is legal for squared error
    torch.testing.assert_close(
        aggregate_loss(predictions, targets, index, rho),
        bag_level_loss(predictions, targets, index) + rho * within_bag_variance(predictions, index),
    )


def test_the_variance_is_half_the_mean_squared_difference_of_pairs() -> None:
    predictions = torch.randn(12, dtype=torch.float64)
    bags = predictions.view(3, 4)
    pairs = (bags[:, :, None] - bags[:, None, :]).square().sum() / (2 * 3 * 4**2)
    torch.testing.assert_close(within_bag_variance(predictions, torch.arange(12) // 4), pairs)


@settings(max_examples=25)
@given(st.sampled_from(BASES), st.integers(0, 100))
def test_the_instance_level_is_never_below_the_bag_level(base: Any, seed: int) -> None:
    predictions, targets, index = case(base, seed=seed)
    bag, instance = (f(predictions, targets, index, base) for f in (bag_level_loss, instance_level_loss))
    assert instance >= bag - 1e-12
    between = aggregate_loss(predictions, targets, index, 0.25, base)
    torch.testing.assert_close(between, 0.75 * bag + 0.25 * instance)


@pytest.mark.parametrize("base", ["bce", "ce"])
def test_probabilities_are_averaged_not_logits(base: Any) -> None:
    predictions, targets, index = case(base)
    z, t, bags = predictions.numpy(), targets.numpy(), index.numpy()
    total = 0.0
    for bag in range(4):
        rows = z[bags == bag]
        if base == "ce":
            mean = (np.exp(rows) / np.exp(rows).sum(1, keepdims=True)).mean(0)
            value = -(t[bag] * np.log(mean)).sum()
        else:
            mean = (1 / (1 + np.exp(-rows))).mean()
            value = -(t[bag] * np.log(mean) + (1 - t[bag]) * np.log(1 - mean))
        total += len(rows) * value
    assert bag_level_loss(predictions, targets, index, base).item() == pytest.approx(total / 12, rel=1e-12)
    logits = segment_mean(predictions, index)
    of_mean_logit = F.cross_entropy if base == "ce" else F.binary_cross_entropy_with_logits
    sizes = index.bincount().double()
    wrong = sizes @ of_mean_logit(logits, targets, reduction="none") / 12
    assert abs(wrong.item() - total / 12) > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_right(base: Any) -> None:
    predictions, targets, index = case(base, rows=4, bags=2)
    weight = torch.rand(2, dtype=torch.float64)
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: aggregate_loss(p, targets, index, 0.3, base, weight), (predictions,)
    )


def test_certain_logits_cost_a_finite_loss_with_a_gradient() -> None:
    # In float32 the mean probability of class 0 is 0, and its logarithm minus infinity.
    logits = torch.tensor([[0.0, 200.0], [0.0, 200.0]], requires_grad=True)
    index = torch.zeros(2, dtype=torch.int64)
    loss = bag_level_loss(logits, torch.tensor([[1.0, 0.0]]), index, "ce")
    loss.backward()
    assert loss.item() == 200
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.5]] * 2))
    ones = torch.full((2,), -200.0, requires_grad=True)
    loss = bag_level_loss(ones, torch.tensor([1.0]), index, "bce")
    loss.backward()
    assert loss.item() == 200
    assert ones.grad.tolist() == [-0.5, -0.5]


def test_a_class_that_cannot_occur_costs_nothing_where_no_label_is() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    index = torch.zeros(2, dtype=torch.int64)
    loss = aggregate_loss(logits, torch.tensor([[1.0, 0.0]]), index, 0.5, "ce")
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("base", BASES)
def test_bags_without_rows_count_nothing(base: Any) -> None:
    predictions, targets, index = case(base)
    more = torch.cat([targets[:1], targets])
    found = aggregate_loss(predictions, more, index + 1, 0.4, base)
    torch.testing.assert_close(found, aggregate_loss(predictions, targets, index, 0.4, base))
    predictions.requires_grad_()
    nothing = aggregate_loss(predictions[:0], targets, index[:0], 0.4, base)
    nothing.backward()
    assert nothing.item() == 0
    assert not predictions.grad.any()


@pytest.mark.parametrize("base", ["mse", "bce", "ce"])
def test_half_precision_is_computed_in_float32(base: Any) -> None:
    predictions, targets, index = case(base)
    half = predictions.bfloat16()
    found = aggregate_loss(half, targets.bfloat16(), index, 0.4, base)
    assert found.dtype == torch.float32
    whole = aggregate_loss(half.float(), targets.bfloat16().float(), index, 0.4, base)
    torch.testing.assert_close(found, whole)


def test_bags_weigh_by_size_unless_told_otherwise() -> None:
    predictions, targets = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 3.0])
    index = torch.tensor([0, 0, 1])  # the bags' losses are 4 and 4, or 5 and 4 at the instance level
    assert instance_level_loss(predictions, targets, index).item() == pytest.approx(14 / 3)
    equal = torch.ones(2)
    assert instance_level_loss(predictions, targets, index, weight=equal).item() == 4.5
    assert instance_level_loss(predictions, targets, index, reduction="sum").item() == 14
    assert bag_level_loss(predictions, targets, index, weight=torch.tensor([0.0, 1.0])).item() == 4


def test_the_module_is_the_function() -> None:
    predictions, targets, index = case("ce")
    module = AggregateLoss("ce", rho=0.2, reduction="sum")
    expected = aggregate_loss(predictions, targets, index, 0.2, "ce", reduction="sum")
    assert torch.equal(module(predictions, targets, index), expected)
    assert "rho=0.2" in repr(module)
    assert all(
        f.batch_statistic
        for f in (module, aggregate_loss, bag_level_loss, instance_level_loss, within_bag_variance)
    )


def test_bad_input_is_named(as_users_call: None) -> None:
    predictions, targets, index = case("mse")
    for options, message in (
        ({"rho": -0.1}, "rho must be >= 0, got -0.1"),
        ({"rho": 1.1, "base": "bce"}, "rho must be >= 0 and <= 1, got 1.1"),
        ({"rho": float("nan")}, "rho must be >= 0, got nan"),
        ({"base": "hinge"}, "base must be .* got 'hinge'"),
        ({"reduction": "none"}, "a bag has a loss, a row of it has none"),
        ({"reduction": "batch"}, "reduction must be .* got 'batch'"),
        ({"base": "ce"}, r"predictions must be \(rows, classes\)"),
        ({"weight": torch.ones(3)}, r"weight must have one value for each of 4 bags, got \(3,\)"),
        ({"base": lambda p, t: p.sum()}, "base must give values for"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_loss(predictions, targets, index, **options)
    with pytest.raises(ValueError, match="predictions must have the 11 rows of bag_index"):
        aggregate_loss(predictions, targets, index[:-1])
    with pytest.raises(
        ValueError, match=r"bag_targets must be \(bags, \*\(\)\) as predictions are, got \(4, 1\)"
    ):
        aggregate_loss(predictions, targets[:, None], index)
    with pytest.raises(ValueError, match="index must be >= 0 and < 2 segments"):
        aggregate_loss(predictions, targets[:2], index)
    with pytest.raises(ValueError, match="rho must be >= 0, got -1"):
        AggregateLoss(rho=-1)
