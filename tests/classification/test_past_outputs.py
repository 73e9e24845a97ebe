import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.classification import (
    EMATeacherLoss,
    LogitHistory,
    TrajectoryLoss,
    sharpness,
    trajectory_loss,
)
from coloss.nn import MLP

IDS = torch.arange(8)


def test_an_unchanged_prediction_costs_nothing_and_pulls_nowhere() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = trajectory_loss(logits, logits.detach() + 3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert logits.grad.abs().max() < 1e-14


def test_the_gradient_is_temperature_times_the_difference_of_softened_predictions() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    past, temperature, weight = torch.randn(8, 5, dtype=torch.float64), 5.0, 0.3
    (weight * trajectory_loss(logits, past, None, temperature)).backward()
    expected = (
        weight * temperature * ((logits / temperature).softmax(1) - (past / temperature).softmax(1)) / 8
    )
    torch.testing.assert_close(logits.grad, expected)


def test_the_loss_passes_gradcheck_and_no_gradient_reaches_the_past() -> None:
    logits, past = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seen = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda z: trajectory_loss(z, past, seen, 2.0), logits)
    trajectory_loss(logits, past, seen).backward()
    assert past.grad is None
    assert logits.grad[1].tolist() == [0.0, 0.0, 0.0]


def test_unseen_samples_count_nothing_but_in_the_number_of_samples() -> None:
    logits, past = torch.randn(8, 5), torch.randn(8, 5)
    seen = IDS < 2
    torch.testing.assert_close(
        trajectory_loss(logits, past, seen), trajectory_loss(logits[:2], past[:2]) * 2 / 8
    )
    assert trajectory_loss(logits, past, IDS < 0) == 0
    assert trajectory_loss(logits[:0], past[:0]) == 0


def test_half_precision_is_computed_in_float32() -> None:
    logits, past = torch.randn(8, 5).bfloat16(), torch.randn(8, 5).bfloat16()
    assert torch.equal(trajectory_loss(logits, past), trajectory_loss(logits.float(), past.float()))


# With a history


def test_before_the_start_epoch_the_loss_is_exactly_zero() -> None:
    loss = TrajectoryLoss(lag=2, start_epoch=4)
    found = [float(loss(torch.randn(8, 5), IDS, epoch)) for epoch in range(8)]
    assert found[:5] == [0.0] * 5
    assert all(value > 0 for value in found[5:])


def test_the_end_epoch_ends_it() -> None:
    loss = TrajectoryLoss(lag=1, start_epoch=1, end_epoch=4)
    found = [float(loss(torch.randn(8, 5), IDS, epoch)) > 0 for epoch in range(6)]
    assert found == [False, False, True, True, False, False]


@pytest.mark.parametrize(("lag", "every"), [(1, 1), (3, 1), (3, 2), (2, 5)])
def test_it_compares_with_the_outputs_lag_epochs_ago(lag: int, every: int) -> None:
    history = LogitHistory(9, dtype=torch.float64, every=every)
    loss = TrajectoryLoss(history, lag=lag, start_epoch=4, weight=0.5, temperature=2.0)
    minimal = TrajectoryLoss(
        LogitHistory((lag + every - 1) // every + 1, dtype=torch.float64, every=every),
        lag=lag,
        start_epoch=4,
        weight=0.5,
        temperature=2.0,
    )
    outputs = torch.randn(12, 8, 5, dtype=torch.float64)
    for epoch in range(12):
        found, again = (module(outputs[epoch], IDS, epoch) for module in (loss, minimal))
        if epoch > 4:
            past = (epoch - lag) // every * every
            assert found.item() == pytest.approx(
                0.5 * trajectory_loss(outputs[epoch], outputs[past], None, 2.0).item()
            )
            assert found == again


def test_a_lag_longer_than_the_start_waits_for_the_first_outputs() -> None:
    # Where unseen rows are zeros, epochs 1 and 2 would be smoothed towards the uniform prediction.
    loss = TrajectoryLoss(lag=3, start_epoch=0)
    assert [float(loss(torch.randn(8, 5), IDS, epoch)) > 0 for epoch in range(5)] == [False] * 3 + [True] * 2


def test_only_what_will_be_read_is_recorded() -> None:
    loss = TrajectoryLoss(lag=2, start_epoch=9, end_epoch=12)
    for epoch in range(14):
        loss(torch.randn(8, 5), IDS, epoch)
        assert bool(loss.history.memory_bytes) == (epoch >= 8)
    assert sorted(loss.history._tables["epochs"].unique().tolist()) == [-1, 8, 9]


def test_mixed_inputs_are_compared_with_mixed_outputs_and_not_remembered() -> None:
    history = LogitHistory(2, dtype=torch.float64)
    loss = TrajectoryLoss(history, lag=1, start_epoch=0, weight=1.0)
    before, now = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    loss(before, IDS, 0)
    partner, share = IDS.flip(0), torch.rand(8, dtype=torch.float64)
    found = loss(now, IDS, 1, mixed_ids=partner, mixed_share=share)
    mixed = share[:, None] * before + (1 - share[:, None]) * before[partner]
    torch.testing.assert_close(found, trajectory_loss(now, mixed))
    assert not history.read(IDS, 1)[1].any()
    torch.testing.assert_close(
        loss(now, IDS, 1, mixed_ids=partner, mixed_share=1.0), trajectory_loss(now, before)
    )
    with pytest.raises(ValueError, match="mixed_ids and mixed_share must be given together"):
        loss(now, IDS, 1, mixed_ids=partner)


def test_bad_input_is_named(as_users_call: None) -> None:
    for make, message in (
        (lambda: TrajectoryLoss(weight=-1.0), "weight must be >= 0 and finite, got -1.0"),
        (lambda: TrajectoryLoss(temperature=0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: TrajectoryLoss(lag=0), "lag must be >= 1 epoch, got 0"),
        (lambda: TrajectoryLoss(LogitHistory(3)), "history must have depth >= 4 for lag 3, got 3"),
        (lambda: TrajectoryLoss(end_epoch=6), "end_epoch must leave an epoch after start_epoch = 5, got 6"),
        (lambda: EMATeacherLoss(nn.Linear(1, 1), decay=1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: trajectory_loss(torch.zeros(2, 3), torch.zeros(2, 4)), r"must have the shape \(2, 3\)"),
        (
            lambda: trajectory_loss(torch.zeros(2, 3), torch.zeros(2, 3), None, -1.0),
            "temperature must be > 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# With an average


def test_without_memory_the_average_is_the_network_and_costs_nothing() -> None:
    model = MLP(6, (8,), 5, norm=None).double()
    loss, inputs = EMATeacherLoss(model, decay=0.0, start_epoch=0), torch.randn(8, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert loss(model(inputs), inputs, 1) > 0
    loss.update()
    logits = model(inputs)
    found = loss(logits, inputs, 1)
    assert found.item() == pytest.approx(0.0, abs=1e-14)
    found.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-14


def test_the_average_moves_by_the_decay_and_takes_no_gradient() -> None:
    model = MLP(6, (8,), 5)  # with batch norm
    loss = EMATeacherLoss(model, decay=0.75, start_epoch=0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(8, 6)
    loss(model(inputs), inputs, 1).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    loss.update()
    for name, value in loss.average.module.state_dict().items():
        now = model.state_dict()[name]
        expected = 0.75 * start[name] + 0.25 * now if value.is_floating_point() else now
        torch.testing.assert_close(value, expected, msg=name)
    assert all(not p.requires_grad and p.grad is None for p in loss.average.parameters())
    assert not loss.train().average.module.training


def test_the_averages_term_is_the_divergence_from_its_own_prediction() -> None:
    model = MLP(6, (8,), 5, norm=None)
    loss, inputs = EMATeacherLoss(model, weight=0.5, start_epoch=2, end_epoch=4), torch.randn(8, 6)
    before = model(inputs).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    found = [loss(model(inputs), inputs, epoch).item() for epoch in range(5)]
    expected = 0.5 * trajectory_loss(model(inputs), before).item()
    assert found == pytest.approx([0.0, 0.0, 0.0, expected, 0.0])


# Sharpness


def test_sharpness_of_a_quadratic_is_known() -> None:
    # L = w' A w / 2 with A = diag(1, 4) at w = (1, 1): g = (1, 4), u = g / sqrt(17).
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    diagonal = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def loss(outputs: torch.Tensor, targets: None) -> torch.Tensor:
        return (diagonal * outputs.square()).sum() / 2

    found = sharpness(_Weights(model), loss, (None, None), rho=0.1)
    norm, curvature = math.sqrt(17), (1 + 4 * 16) / 17
    assert found.loss == pytest.approx(2.5)
    assert found.gradient_norm == pytest.approx(norm)
    assert found.curvature == pytest.approx(curvature)
    assert found.gap == pytest.approx(0.1 * norm + 0.01 * curvature / 2)
    assert found.relative_curvature == pytest.approx(curvature / 2.5)


class _Weights(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: None) -> torch.Tensor:
        return self.layer.weight[0]


def test_measuring_leaves_no_trace() -> None:
    model = MLP(6, (8,), 3, dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = (torch.randn(16, 6), torch.randint(3, (16,)))
    first, second = (sharpness(model, F.cross_entropy, batch) for _ in range(2))
    assert first == second
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_flat_place_has_no_sharpness() -> None:
    model = nn.Linear(2, 1, bias=False)
    found = sharpness(
        model, lambda outputs, targets: (outputs - outputs.detach()).square().sum(), (torch.ones(3, 2), None)
    )
    assert (found.loss, found.gap, found.curvature) == (0.0, 0.0, 0.0)
    assert math.isnan(found.relative_curvature)
    straight = sharpness(model, lambda outputs, targets: outputs.sum(), (torch.ones(1, 2), None), rho=0.5)
    assert straight.curvature == 0.0
    assert straight.gap == pytest.approx(0.5 * math.sqrt(2), rel=1e-5)


def test_sharpness_refuses_what_has_none() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="rho must be > 0, got 0"):
        sharpness(model, F.mse_loss, (torch.ones(1, 2), torch.ones(1, 1)), rho=0)
    with pytest.raises(ValueError, match="must depend on a trainable parameter"):
        sharpness(model.requires_grad_(False), F.mse_loss, (torch.ones(1, 2), torch.ones(1, 1)))
