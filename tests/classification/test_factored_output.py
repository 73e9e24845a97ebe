import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification import (
    FactoredSphericalLinear,
    SphericalLoss,
    SphericalStatistics,
    spherical_loss,
    spherical_statistics,
    z_loss,
)

CLASSES, FEATURES, ROWS = 30, 5, 16
KINDS = ("z", "taylor-softmax", "spherical-softmax", "squared-error")


def new_layer(
    rate: float = 0.05, loss: SphericalLoss | None = None, **options: object
) -> FactoredSphericalLinear:
    return FactoredSphericalLinear(
        FEATURES, CLASSES, rate, loss or spherical_loss("z"), dtype=torch.float64, **options
    )


def draw(few: int = CLASSES, targets: int | None = None) -> tuple[Tensor, Tensor]:
    shape = (ROWS,) if targets is None else (ROWS, targets)
    return torch.randn(ROWS, FEATURES, dtype=torch.float64), torch.randint(few, shape)


def dense_loss(weight: Tensor, features: Tensor, target: Tensor, loss: SphericalLoss) -> Tensor:
    """The same loss from written-out logits; a column of ones stands for the bias."""
    if weight.shape[1] > features.shape[1]:
        features = F.pad(features, (0, 1), value=1.0)
    logits = features @ weight.T
    many = target.reshape(len(target), -1)
    sums = [value[:, None].expand(many.shape) for value in (logits.sum(1), logits.square().sum(1))]
    return loss(SphericalStatistics(logits.gather(1, many), *sums, weight.shape[0])).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decay", "bias"), [(0.0, True), (0.2, False)])
def test_twenty_steps_are_those_of_dense_sgd(kind: str, decay: float, bias: bool) -> None:
    loss = spherical_loss(kind)
    layer = new_layer(loss=loss, weight_decay=decay, bias=bias, stabilize_every=4)
    weight = layer.weight().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.05, weight_decay=decay)
    for step in range(20):
        # Few classes, so that targets repeat in a batch; every third batch has several targets a row.
        features, target = draw(few=6, targets=3 if step % 3 == 0 else None)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        found, expected = layer(ours, target), dense_loss(weight, theirs, target, loss)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        found.backward()
        optimizer.zero_grad()
        expected.backward()
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)
        layer.step()
        optimizer.step()
        torch.testing.assert_close(layer.weight(), weight.detach(), rtol=0, atol=1e-10)
        assert layer.bookkeeping_error() < 1e-10
    assert int(layer.steps) == 20


def test_the_statistics_are_those_of_the_logits() -> None:
    layer, (features, target) = new_layer(), draw()
    found, expected = layer.statistics(features, target), spherical_statistics(layer.scores(features), target)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_the_features_are_right() -> None:
    layer, target = new_layer(), torch.tensor([[0, 3], [3, 3], [7, 29]])
    features = torch.randn(3, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: layer(h, target), features)


def test_a_loss_of_your_own_may_use_the_statistics_in_any_way() -> None:
    margin = lambda sums: (1 - sums.target_logit).clamp(min=0) + 1e-3 * sums.square_sum.sqrt()
    layer, (features, target) = new_layer(loss=margin), draw()
    weight = layer.weight().requires_grad_()
    dense_loss(weight, features, target, margin).backward()
    layer(features, target).backward()
    layer.step()
    assert weight.grad is not None
    torch.testing.assert_close(layer.weight(), weight.detach() - 0.05 * weight.grad, rtol=0, atol=1e-12)


def test_backward_passes_before_a_step_add_up_with_their_weights() -> None:
    layer, parts = new_layer(), [draw(few=4), draw(few=4, targets=2)]
    weight = layer.weight().requires_grad_()
    for factor, (features, target) in zip((0.25, 3.0), parts):
        (factor * layer(features, target)).backward()
        (factor * dense_loss(weight, features, target, layer.loss)).backward()
    layer.step()
    assert weight.grad is not None
    torch.testing.assert_close(layer.weight(), weight.detach() - 0.05 * weight.grad, rtol=0, atol=1e-12)
    assert layer.bookkeeping_error() < 1e-12


def test_a_look_at_gradients_leaves_no_step() -> None:
    layer, (features, target) = new_layer(), draw()
    features.requires_grad_()
    once, before = copy.deepcopy(layer), layer.weight()
    loss = layer(features, target)
    torch.autograd.grad(loss, features, retain_graph=True)
    layer.step()
    assert torch.equal(layer.weight(), before) and int(layer.steps) == 0
    loss = layer(features, target)
    for _ in range(3):
        torch.autograd.grad(loss, features, retain_graph=True)
    loss.backward()
    layer.step()
    once(features, target).backward()
    once.step()
    assert torch.equal(layer.weight(), once.weight())


def test_without_gradients_nothing_is_kept() -> None:
    layer, (features, target) = new_layer(), draw()
    with torch.no_grad():
        layer(features, target)
    assert not layer._pending and not layer.has_gradients


def test_a_backward_pass_after_the_step_is_refused() -> None:
    layer, (features, target) = new_layer(), draw()
    first, second = layer(features, target), layer(features, target)
    first.backward()
    layer.step()
    with pytest.raises(RuntimeError, match="took a step between this forward pass and its backward pass"):
        second.backward()


def test_a_gradient_scaler_is_taken_off_and_its_overflow_leaves_the_step_out() -> None:
    layer, (features, target) = new_layer(), draw()
    plain, before = copy.deepcopy(layer), layer.weight()
    plain(features, target).backward()
    plain.step()
    (1024 * layer(features, target)).backward()
    layer.step(gradient_scale=1024)
    torch.testing.assert_close(layer.weight(), plain.weight(), rtol=0, atol=1e-14)
    (math.inf * plain(features, target)).backward()
    kept = plain.weight()
    plain.step(gradient_scale=1024)
    assert torch.equal(plain.weight(), kept) and not torch.equal(before, kept)
    (math.inf * plain(features, target)).backward()
    with pytest.raises(ValueError, match="gradients of the output layer must be finite"):
        plain.step()


def test_singular_values_out_of_range_come_back_and_the_weight_stays() -> None:
    layer = new_layer()
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    layer.mixing.copy_(turn * torch.tensor([1.0, 1.2, 0.7, 1e-3, 1.5, 0.6]) @ turn.T)
    before = layer.weight()
    layer.stabilize()
    values = torch.linalg.svdvals(layer.mixing)
    assert values.min() > 0.5 and values.max() < 2
    assert not torch.equal(layer.mixing, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(layer.weight(), before, rtol=0, atol=1e-12)


def test_many_singular_values_out_of_range_are_folded_into_the_rows() -> None:
    layer = new_layer()
    layer.mixing.mul_(10)
    layer.offset.fill_(0.5)
    before = layer.weight()
    layer.stabilize()
    assert torch.equal(layer.mixing, torch.eye(6, dtype=torch.float64)) and layer.offset.abs().max() == 0
    torch.testing.assert_close(layer.weight(), before)
    assert layer.bookkeeping_error() < 1e-12


def test_a_step_that_takes_a_direction_out_of_the_weight_is_exact_too() -> None:
    # Squared error of one row: W <- W (I - 2 lr h h^T) + ..., singular for lr = 1 / (2 h.h).
    loss = spherical_loss("squared-error")
    layer = new_layer(loss=loss, bias=False)
    features = torch.randn(1, FEATURES, dtype=torch.float64)
    layer.learning_rate = 0.5 / float(features.square().sum())
    weight = layer.weight().requires_grad_()
    dense_loss(weight, features, torch.tensor([4]), loss).backward()
    layer(features, torch.tensor([4])).backward()
    layer.step()
    assert weight.grad is not None
    expected = weight.detach() - layer.learning_rate * weight.grad
    torch.testing.assert_close(layer.weight(), expected, rtol=0, atol=1e-12)
    for _ in range(3):
        layer(features, torch.tensor([4])).backward()
        layer.step()
    assert layer.weight().isfinite().all()


def test_float32_rows_stay_close_to_dense_sgd_over_many_steps() -> None:
    layer = FactoredSphericalLinear(FEATURES, CLASSES, 0.1, stabilize_every=10)
    weight = layer.weight().double().requires_grad_()
    for _ in range(200):
        features, target = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
        layer(features, target).backward()
        layer.step()
        (gradient,) = torch.autograd.grad(dense_loss(weight, features.double(), target, layer.loss), weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
    assert (layer.weight().double() - weight).abs().max() < 1e-4 * weight.abs().max()
    assert layer.bookkeeping_error() < 1e-5


def test_a_large_common_offset_does_not_cancel() -> None:
    # The variance q/D - (s/D)^2 of float32 sums would be noise here.
    linear = nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        linear.bias += 1000
    layer = FactoredSphericalLinear.from_linear(linear, 0.1)
    features, target = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    torch.testing.assert_close(
        layer(features, target), z_loss(linear(features), target), rtol=1e-4, atol=1e-4
    )


def test_from_and_to_a_linear_layer() -> None:
    for bias in (True, False):
        linear = nn.Linear(FEATURES, CLASSES, bias=bias)
        back = FactoredSphericalLinear.from_linear(linear, 0.1).to_linear()
        assert {name: value.tolist() for name, value in back.state_dict().items()} == {
            name: value.tolist() for name, value in linear.state_dict().items()
        }


def test_no_optimizer_sees_it_and_its_state_is_whole() -> None:
    layer, (features, target) = new_layer(), draw()
    assert not list(layer.parameters())
    layer(features, target).backward()
    layer.step()
    other = new_layer()
    other.load_state_dict(layer.state_dict())
    for one in (layer, other):
        one(features, target).backward()
        one.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())


def test_a_change_of_precision_is_meant_for_the_rows() -> None:
    layer = new_layer().half()
    assert layer.rows.dtype == torch.float16
    assert {layer.gram.dtype, layer.mixing.dtype, layer.row_sum.dtype} == {torch.float64}
    assert layer.bookkeeping_error() < 1e-12
    assert layer.to(torch.float64).bookkeeping_error() < 1e-12


def test_half_precision_features() -> None:
    layer = FactoredSphericalLinear(FEATURES, CLASSES, 0.1)
    features = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    loss = layer(features, torch.randint(CLASSES, (ROWS,)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert (
        features.grad is not None and features.grad.dtype == torch.bfloat16 and features.grad.isfinite().all()
    )


def test_an_empty_batch_is_no_step_at_all() -> None:
    layer = new_layer()
    before = layer.weight()
    loss = layer(torch.zeros(0, FEATURES, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    layer.step()
    assert loss == 0 and torch.equal(layer.weight(), before)


def test_padding_rows_count_as_classes() -> None:
    layer, (features, target) = new_layer(), draw(few=10)
    small = nn.Linear(FEATURES, 10, dtype=torch.float64)
    with torch.no_grad():
        small.weight.copy_(layer.weight()[:10, :-1])
        small.bias.copy_(layer.weight()[:10, -1])
    assert not torch.isclose(layer(features, target), z_loss(small(features), target), rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0 and finite, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be >= 0 and finite, got inf"),
        ({"stabilize_every": 0}, "stabilize_every must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactoredSphericalLinear(**({"in_features": 4, "num_classes": 3, "learning_rate": 0.1} | arguments))


@pytest.mark.usefixtures("as_users_call")
def test_bad_batches_are_refused() -> None:
    layer, (features, target) = new_layer(), draw()
    for call, message in (
        (lambda: layer(features[:, :3], target), r"features must have shape \(batch, 5\), got \(16, 3\)"),
        (
            lambda: layer(features, target[:3]),
            r"target must have shape \(16,\) or \(16, targets\), got \(3,\)",
        ),
        (lambda: layer(features, target - 30), r"target must be in \[0, 30\), got -"),
        (lambda: layer(features, target + 30), r"target must be in \[0, 30\), got "),
        (lambda: layer(features, target, "none"), 'reduction must be "mean" or "sum", got \'none\''),
    ):
        with pytest.raises(ValueError, match=message):
            call()
