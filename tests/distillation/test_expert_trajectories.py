"""Experts: the loss ramp is a warm-up, the penalty is worked by hand, trajectories hold every epoch and can be had again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.distillation import input_gradient_penalty, loss_ramp, record_trajectory, step_lengths
from coloss.distillation.expert_trajectories import require_matchable
from coloss.errors import InputError
from coloss.train import FlatParameters


def blobs(count: int = 48) -> IndexedDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    return IndexedDataset(torch.randn(count, 4, generator=generator) + F.one_hot(targets, 4) * 2, targets)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def record(**options) -> Tensor:
    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 0.1}
    return record_trajectory(
        network(), blobs(), **settings | options, generator=torch.Generator().manual_seed(1)
    )


def test_the_ramp_has_the_ten_published_values() -> None:
    ramp = loss_ramp()
    published = [0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0, 1.0]
    assert [ramp(epoch) for epoch in range(12)] == pytest.approx(published)


def test_a_factor_of_the_loss_is_a_factor_of_the_rate_for_plain_sgd_without_decay() -> None:
    scaled = record(loss_scale=lambda epoch: 0.25, decay_at=None)
    slower = record(learning_rate=0.025, decay_at=None)
    assert torch.equal(scaled, slower)  # a power of two: not even rounding differs
    decayed = record(loss_scale=lambda epoch: 0.25, decay_at=None, weight_decay=0.1)
    assert not torch.allclose(decayed, record(learning_rate=0.025, decay_at=None, weight_decay=0.1))


def test_the_penalty_is_zero_for_a_linear_map_with_a_unit_gradient_and_counts_the_distance_else() -> None:
    # Channels are dimension 1; the gradient of the summed logits by each pixel is the column sum of the weights.
    weight = torch.tensor([[0.6, 0.0], [0.0, 0.8]])  # column sums (0.6, 0.8): length 1
    x = torch.randn(5, 2, 3, 3)

    def model(x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * torch.einsum("kc,bchw->bk", weight, x)

    assert input_gradient_penalty(model, x).item() == pytest.approx(0.0, abs=1e-12)
    assert input_gradient_penalty(lambda x: model(x, 3.0), x).item() == pytest.approx(4.0)
    # Over the whole sample the gradient of 9 pixels has length 3.
    assert input_gradient_penalty(model, x, dim=None).item() == pytest.approx(4.0)
    assert input_gradient_penalty(model, x, target=0.0).item() == pytest.approx(1.0)


def test_the_penalty_trains_and_a_gradient_of_zero_gives_no_nan() -> None:
    model = network()
    input_gradient_penalty(model, torch.randn(4, 4)).backward()
    assert model[0].weight.grad.abs().sum() > 0
    weight = torch.zeros(3, 4, requires_grad=True)
    penalty = input_gradient_penalty(lambda x: x @ weight.T, torch.randn(2, 4))
    penalty.backward()
    assert penalty.item() == 1.0
    assert torch.isfinite(weight.grad).all()


def test_a_trajectory_starts_at_the_fresh_network_and_ends_at_the_trained_one() -> None:
    model = network()
    first = FlatParameters(model).vector()
    trajectory = record_trajectory(model, blobs(), epochs=4, learning_rate=0.1, batch_size=16)
    assert trajectory.shape == (5, len(first))
    assert torch.equal(trajectory[0], first)
    assert torch.equal(trajectory[-1], FlatParameters(model).vector())
    assert (step_lengths(trajectory) > 0).all()


def test_epochs_are_full_passes_and_steps_can_be_kept_instead() -> None:
    by_step = record(every=1, decay_at=None)
    assert len(by_step) == 1 + 3 * 3  # 48 samples in batches of 16
    assert torch.equal(by_step[::3], record(decay_at=None))
    assert torch.equal(record(every=4, decay_at=None), by_step[[0, 4, 8, 9]])


def test_the_rate_decays_after_half_of_the_epochs() -> None:
    # The published decay comes at epoch E/2 + 1: with four epochs, 0 to 2 at the full rate and 3 at 0.6 of it.
    plain, decayed = record(epochs=4, decay_at=None), record(epochs=4)
    assert torch.equal(plain[:4], decayed[:4])
    one = record(epochs=4, decay_at=0.5, decay=1.0)
    assert torch.equal(one, plain)
    assert not torch.equal(decayed[4], plain[4])


def test_momentum_makes_the_first_step_longer_and_the_ramp_shorter() -> None:
    plain, jumpy = (step_lengths(record(momentum=m))[0] for m in (0.0, 0.9))
    ramped = step_lengths(record(momentum=0.9, loss_scale=loss_ramp()))[0]
    assert jumpy > plain
    assert jumpy > 1.4 * ramped


def test_the_same_generator_gives_the_same_expert() -> None:
    noisy = {"augment": lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g), "penalty": 0.1}
    assert torch.equal(record(**noisy), record(**noisy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(record(), record())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"penalty": -1.0}, "penalty must be >= 0, got -1"),
        ({"every": 0}, "every must be >= 1, got 0"),
    ],
)
def test_bad_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        record(**options)


def test_batch_norm_is_refused_and_divergence_is_an_error() -> None:
    from coloss.nn import MLP
    from coloss.train import NonFiniteLossError

    with pytest.raises(InputError, match="model must not have batch norm"):
        record_trajectory(MLP(4, [8], 3), blobs(), epochs=1)
    with pytest.raises(NonFiniteLossError, match="the expert diverged in epoch"):
        record(learning_rate=1e30, weight_decay=1.0, epochs=9)
    with pytest.raises(ValueError, match=r"start must be in \(0, 1\], got 0"):
        loss_ramp(0.0)
    with pytest.raises(ValueError, match="target must be >= 0, got -1"):
        input_gradient_penalty(network(), torch.ones(1, 4), target=-1.0)


def test_training_can_stop_early_on_the_way_of_a_longer_schedule() -> None:
    noisy = {"augment": lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g), "epochs": 4}
    whole = record(**noisy)
    shares: list[float] = []
    assert torch.equal(record(**noisy, stop_after=2, progress=shares.append), whole[:3])
    assert shares == [0.5, 1.0]
    assert torch.equal(record(**noisy, stop_after=4), whole)  # the decay comes where it did
    for bad in (0, 5):
        with pytest.raises(InputError, match=rf"stop_after must be in \[1, 4\], got {bad}"):
            record(**noisy, stop_after=bad)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), r"model must not be random in training.*dropout.*at '1'"),
        (nn.Dropout2d(0.5), "model must not be random in training"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "model must not be random in training"),
        (nn.InstanceNorm1d(4, track_running_stats=True), "model must not have norms with running statistics"),
        (nn.BatchNorm1d(4, track_running_stats=False), "model must not have batch norm"),
    ],
)
def test_models_whose_behaviour_is_not_in_their_parameters_alone_are_refused(
    layer: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        require_matchable(nn.Sequential(nn.Linear(4, 4), layer))


def test_layers_without_chance_or_statistics_are_matchable() -> None:
    layers = (nn.Dropout(0.0), nn.InstanceNorm1d(4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2))
    refused = []
    for layer in layers:
        try:
            require_matchable(nn.Sequential(nn.Linear(4, 4), layer))
        except InputError as error:
            refused.append(str(error))
    assert refused == []
