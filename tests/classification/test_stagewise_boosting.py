import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neural_network import MLPRegressor
from torch import Tensor, nn

from coloss.classification import (
    BoostedMLP,
    BoostingOptions,
    boost_network,
    boosting_loss,
    init_score,
    newton_step,
    pseudo_residual,
    stagewise_boosting,
    truncate_units,
)

LOSSES = ("squared", "logistic", "softmax")
SMALL = BoostingOptions(stages=5, units_per_stage=2, learning_rate=0.5, max_iter=30)


def draw(loss: str, samples: int = 60) -> tuple[Tensor, Tensor]:
    features = torch.randn(samples, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 2
    if loss == "squared":
        return features, torch.stack([features[:, 0] ** 2, 30 * features[:, 2] + 7], 1)
    if loss == "logistic":
        return features, torch.where(features[:, :1] > 2, 1.0, -1.0).double()
    return features, F.one_hot((features[:, 0] > 1.5).long() + (features[:, 0] > 2.5).long(), 3).double()


def scores_for(loss: str, targets: Tensor) -> Tensor:
    return torch.randn(targets.shape, dtype=torch.float64)


# Losses


@pytest.mark.parametrize("loss", LOSSES)
def test_the_residual_is_the_negative_gradient(loss: str) -> None:
    targets = draw(loss)[1]
    scores = scores_for(loss, targets).requires_grad_()
    (gradient,) = torch.autograd.grad(len(targets) * boosting_loss(loss, targets, scores), scores)
    torch.testing.assert_close(pseudo_residual(loss, targets, scores.detach()), -gradient)


def test_rows_of_the_softmax_residual_sum_to_zero() -> None:
    targets = draw("softmax")[1]
    residual = pseudo_residual("softmax", targets, scores_for("softmax", targets))
    assert residual.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_the_start_is_the_best_constant(loss: str) -> None:
    targets = draw(loss)[1]
    start = init_score(loss, targets).requires_grad_()
    (gradient,) = torch.autograd.grad(boosting_loss(loss, targets, start.expand_as(targets)), start)
    assert gradient.abs().max() < 1e-12
    if loss == "logistic":
        mean = targets.mean()
        torch.testing.assert_close(start[0].detach(), 0.5 * ((1 + mean) / (1 - mean)).log())


def test_an_absent_class_has_half_a_sample() -> None:
    assert init_score("logistic", torch.ones(4, 1)).item() == pytest.approx(0.5 * math.log(8))
    found = init_score("softmax", torch.tensor([[1.0, 0.0, 0.0]] * 4))
    assert found.isfinite().all() and found[0] - found[1] == pytest.approx(math.log(8))


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_the_newton_step_divides_by_the_second_derivative(loss: str) -> None:
    targets = draw(loss, 7)[1]
    scores, direction = scores_for(loss, targets), torch.randn(targets.shape, dtype=torch.float64)
    total = lambda values: len(targets) * boosting_loss(loss, targets, values)
    hessian = torch.autograd.functional.hessian(total, scores).reshape(targets.numel(), targets.numel())
    residual = pseudo_residual(loss, targets, scores)
    expected = (residual * direction).sum() / (direction.flatten() ** 2 * hessian.diagonal()).sum()
    assert newton_step(loss, targets, residual, direction) == pytest.approx(float(expected))


def test_newton_steps_at_the_edge() -> None:
    targets = torch.tensor([[1.0], [1.0]])
    step = lambda scores, direction, **options: newton_step(
        "logistic",
        targets,
        pseudo_residual("logistic", targets, torch.tensor(scores)[:, None]),
        torch.tensor(direction)[:, None],
        **options,
    )
    assert step([0.0, 0.0], [0.0, 0.0]) == 0.0  # a unit that stalled at 0: 0 / 0 in the formula
    assert step([0.0, 0.0], [math.nan, 1.0]) == 0.0
    assert step([0.0, 0.0], [1.0, -1.0]) == 0.0
    assert step([0.0, 0.0], [-1.0, -1.0]) == -1.0  # the sign is kept
    # Nearly certain: the curvature vanishes with the slope times the same, unless the direction is tiny.
    assert step([0.0, 0.0], [1e-9, 1e-9]) == 1e3
    assert step([0.0, 0.0], [-1e-9, -1e-9], largest=5.0) == -5.0
    assert newton_step("squared", targets, targets, targets) == 1.0
    saturated = torch.tensor([[500.0, 0.0], [500.0, 0.0]])
    one_hot = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    residual = pseudo_residual("softmax", one_hot, saturated)
    assert abs(newton_step("softmax", one_hot, residual, residual)) <= 1e3


@given(st.integers(0, 500), st.sampled_from(["logistic", "softmax"]))
def test_a_step_along_the_residual_is_never_backwards(seed: int, loss: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(6, 1 if loss == "logistic" else 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(2 if loss == "logistic" else 3, (6,), generator=generator)
    targets = 2.0 * labels[:, None].double() - 1 if loss == "logistic" else F.one_hot(labels, 3).double()
    residual = pseudo_residual(loss, targets, scores)
    assert 0 <= newton_step(loss, targets, residual, residual) <= 1e3


# Growing


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["logistic", "tanh", "relu"])
def test_the_folded_network_is_the_sum_of_its_stages(
    loss: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, targets = draw(loss)
    options = BoostingOptions(stages=4, units_per_stage=2, max_iter=20, activation=activation)
    seen = []
    original = stagewise_boosting._stages

    def recorded(inputs: Tensor, *rest: object) -> object:
        for rho, stage in original(inputs, *rest):
            seen.append(options.learning_rate * rho * stage(inputs))
            yield rho, stage

    monkeypatch.setattr(stagewise_boosting, "_stages", recorded)
    found = boost_network(features, targets, loss, options, random_state=0)
    unit = targets.std(0, correction=0) if loss == "squared" else 1.0
    outer = 2.0 if loss == "logistic" else 1.0
    expected = init_score(loss, targets / unit) * unit * outer
    torch.testing.assert_close(
        found.network(features, stages=0), expected.expand_as(targets), rtol=0, atol=1e-9
    )
    for stage, part in enumerate(seen, 1):
        expected = expected + outer * unit * part
        torch.testing.assert_close(found.network(features, stages=stage), expected, rtol=0, atol=1e-5)
    assert found.network.stages == len(seen) == 4
    torch.testing.assert_close(found.network.to_sequential()(features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_recorded_losses_are_those_of_the_network(loss: str) -> None:
    features, targets = draw(loss)
    held = draw(loss, 20)
    found = boost_network(features, targets, loss, SMALL, random_state=0, validation=held)
    outer = 2.0 if loss == "logistic" else 1.0
    for stages in range(found.network.stages + 1):
        for (inputs, wanted), losses in (
            ((features, targets), found.losses),
            (held, found.validation_losses),
        ):
            value = boosting_loss(loss, wanted, found.network(inputs, stages=stages) / outer)
            assert losses[stages] == pytest.approx(value.item(), rel=1e-6)
    assert found.losses[-1] < 0.5 * found.losses[0]


def test_probabilities_of_two_classes_are_sigmoid_of_twice_the_score() -> None:
    # Labels do not notice a missing factor of 2; the likelihood does.
    features, targets = draw("logistic")
    found = boost_network(features, targets, "logistic", SMALL, random_state=0)
    likelihood = F.binary_cross_entropy_with_logits(found.network(features), (targets + 1) / 2)
    assert found.losses[-1] == pytest.approx(float(likelihood), rel=1e-9)
    start = found.network(features[:1], stages=0).sigmoid().item()
    assert start == pytest.approx(float((targets > 0).double().mean()))


def test_one_stage_without_subsampling_is_a_plain_fit() -> None:
    features, targets = draw("squared")
    targets = targets[:, :1]
    options = BoostingOptions(stages=1, units_per_stage=3, learning_rate=1.0, subsample=1.0, max_iter=50)
    found = boost_network(
        features, targets, "squared", options, standardize=False, random_state=np.random.RandomState(3)
    )
    random = np.random.RandomState(3)
    rows = random.permutation(60)
    plain = MLPRegressor(
        hidden_layer_sizes=(3,), activation="logistic", solver="lbfgs", max_iter=50, max_fun=5000, tol=0.0,
        random_state=random.randint(2**31 - 1),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.fit(features[rows], (targets - targets.mean())[rows, 0])
    expected = plain.predict(features) + float(targets.mean())
    np.testing.assert_allclose(found.network(features)[:, 0].detach(), expected, rtol=1e-3)


def test_the_squared_loss_never_rises_on_all_samples() -> None:
    features, targets = draw("squared")
    for rate in (0.3, 1.0):
        options = BoostingOptions(stages=8, units_per_stage=1, learning_rate=rate, subsample=1.0, max_iter=20)
        losses = np.array(boost_network(features, targets, "squared", options, random_state=0).losses)
        assert (np.diff(losses) <= 1e-9 * losses[0]).all()


def test_equal_seeds_give_equal_networks_and_leave_the_global_state() -> None:
    features, targets = draw("softmax")
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one, two, three = (
        boost_network(features, targets, "softmax", SMALL, random_state=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), two.network.parameters()))
    assert not torch.equal(one.network.output.weight, three.network.output.weight)


def test_units_of_features_and_targets_do_not_matter() -> None:
    features, targets = draw("squared")
    found = boost_network(features, targets, "squared", SMALL, random_state=0).network(features)
    moved = boost_network(1000 * features - 5, 0.01 * targets + 3, "squared", SMALL, random_state=0)
    expected = 0.01 * found + 3
    torch.testing.assert_close(moved.network(1000 * features - 5), expected, rtol=1e-4, atol=1e-4)


def test_stages_that_predict_nothing_are_left_out() -> None:
    constant = torch.full((20, 1), 4.0, dtype=torch.float64)
    features = torch.randn(20, 2, dtype=torch.float64)
    found = boost_network(features, constant, "squared", SMALL, random_state=0)
    torch.testing.assert_close(found.network(features), constant, rtol=0, atol=1e-6)
    assert all(math.isfinite(loss) for loss in found.losses)
    blank = boost_network(
        torch.zeros(20, 2), F.one_hot(torch.arange(20) % 2).double(), "softmax", SMALL, random_state=0
    )
    assert blank.network(torch.zeros(1, 2, dtype=torch.float64)).isfinite().all()


def test_no_stages_are_a_constant() -> None:
    features, targets = draw("softmax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = boost_network(features, targets, "softmax", BoostingOptions(stages=0))
    torch.testing.assert_close(found.network(features).softmax(1)[0], targets.mean(0))
    assert found.network.to_sequential()(features).shape == (60, 3)


def test_a_stage_that_points_backwards_is_kept_and_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = draw("logistic")
    original = stagewise_boosting._fit_stage
    turned = lambda inputs, residual, *rest: original(inputs, -residual, *rest)
    monkeypatch.setattr(stagewise_boosting, "_fit_stage", turned)
    with pytest.warns(UserWarning, match="5 of 5 Newton steps were negative"):
        found = boost_network(features, targets, "logistic", SMALL, random_state=0)
    assert found.losses[-1] < 0.5 * found.losses[0]


def test_full_steps_of_the_softmax_loss_stay_finite() -> None:
    # Learning rate 1 on separable classes: the curvature vanishes.
    features, targets = draw("softmax")
    options = BoostingOptions(stages=20, units_per_stage=3, learning_rate=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = boost_network(features, targets, "softmax", options, random_state=0)
    assert all(math.isfinite(loss) for loss in found.losses) and max(map(abs, found.steps)) <= 1e3


# The network


def new_network() -> BoostedMLP:
    return BoostedMLP(nn.Linear(4, 6), torch.randn(2, 6), torch.randn(4, 2), "tanh")


def test_truncation_drops_units_and_their_share_of_the_bias() -> None:
    network, inputs = new_network(), torch.randn(5, 4)
    assert torch.equal(network.truncate(3)(inputs), network(inputs))
    torch.testing.assert_close(network.truncate(0)(inputs), network.bias_shares[0].expand(5, 2))
    for stages in range(4):
        units = 2 * stages
        active = torch.tanh(inputs @ network.hidden.weight[:units].T + network.hidden.bias[:units])
        expected = active @ network.output.weight[:, :units].T + network.bias_shares[: stages + 1].sum(0)
        for found in (
            network(inputs, stages=stages),
            network.truncate(stages)(inputs),
            network.truncate(stages).to_sequential()(inputs),
            truncate_units(network.to_sequential(), units, network.bias_shares)(inputs),
        ):
            torch.testing.assert_close(found, expected)
    assert network.truncate(2).truncate(1).hidden.out_features == 2


def test_training_goes_on_and_truncation_follows() -> None:
    network, inputs = new_network(), torch.randn(5, 4)
    before = network(inputs, stages=1).detach()
    with torch.no_grad():
        network.output.bias += 3
    torch.testing.assert_close(network(inputs, stages=1), before + 3)
    torch.testing.assert_close(network.truncate(1)(inputs), before + 3)
    network(inputs, stages=1).sum().backward()
    assert network.hidden.weight.grad is not None and network.hidden.weight.grad[2:].abs().max() == 0


def test_the_network_is_stored_and_takes_half_precision() -> None:
    network, other, inputs = new_network(), new_network(), torch.randn(5, 4)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.truncate(1)(inputs), network.truncate(1)(inputs))
    halved = network.bfloat16()
    assert halved(inputs.bfloat16(), stages=2).dtype == torch.bfloat16


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_refused() -> None:
    features, targets = draw("softmax")
    network = new_network()
    for call, message in (
        (lambda: boost_network(features, targets, "hinge"), "loss must be .*, got 'hinge'"),
        (lambda: boost_network(features, targets, "logistic"), "logistic loss must be -1 or 1"),
        (lambda: boost_network(features, 2 * targets, "softmax"), "softmax loss must be one-hot rows"),
        (lambda: boost_network(features[:3], targets, "softmax"), r"features must be \(60, features\)"),
        (lambda: boost_network(features * math.inf, targets, "softmax"), "features must be finite"),
        (lambda: boost_network(features, targets * math.nan, "squared"), "targets must be finite"),
        (
            lambda: boost_network(features[:0], targets[:0], "squared"),
            r"targets must be \(samples, outputs\)",
        ),
        (
            lambda: newton_step("squared", targets, targets, targets, largest=0.0),
            "largest must be > 0, got 0",
        ),
        (lambda: BoostingOptions(units_per_stage=0), "units_per_stage must be >= 1, got 0"),
        (lambda: BoostingOptions(learning_rate=0.0), "learning_rate must be > 0 and finite, got 0.0"),
        (lambda: BoostingOptions(subsample=1.5), r"subsample must be in \(0, 1\], got 1.5"),
        (lambda: BoostingOptions(l2=-1.0), "l2 must be >= 0 and finite, got -1.0"),
        (lambda: BoostingOptions(activation="sine"), "activation must be .*, got 'sine'"),
        (lambda: network.truncate(4), r"stages must be in \[0, 3\], got 4"),
        (lambda: network(torch.ones(1, 4), stages=-1), r"stages must be in \[0, 3\], got -1"),
        (
            lambda: truncate_units(network.to_sequential(), 3, network.bias_shares),
            "keep must be a multiple of 2",
        ),
        (lambda: truncate_units(nn.Sequential(nn.ReLU()), 3, network.bias_shares), "got 1 layers"),
        (
            lambda: truncate_units(nn.Sequential(*[nn.ReLU()] * 3), 3, network.bias_shares),
            "got ReLU and ReLU",
        ),
        (lambda: BoostedMLP(nn.Linear(2, 5), torch.ones(1, 5), torch.ones(3, 1)), "multiple of 2 units"),
        (
            lambda: BoostedMLP(nn.Linear(2, 4), torch.ones(2, 4), torch.ones(3, 1)),
            "output_weight must have shape",
        ),
        (
            lambda: BoostedMLP(nn.Linear(2, 4), torch.ones(1, 4), torch.ones(3, 1), "sine"),
            "activation must be",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
