"""Matching: the loss at its fixed points, options that change nothing when off, traps of the published code, exact steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset
from coloss.distillation import (
    TrajectoryMatcher,
    balance_factor,
    perturb_weights,
    record_trajectory,
    trajectory_matching_loss,
)
from coloss.errors import InputError
from coloss.train import FlatParameters, NonFiniteLossError, unroll


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.fixture(scope="module")
def data() -> IndexedDataset:
    targets = torch.arange(32) % 2
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) + 2 * targets[:, None]
    return IndexedDataset(inputs, targets)


@pytest.fixture(scope="module")
def experts(data: IndexedDataset) -> list[Tensor]:
    return [
        record_trajectory(
            network(),
            data,
            epochs=5,
            learning_rate=0.1,
            batch_size=32,
            generator=torch.Generator().manual_seed(n),
        )
        for n in range(2)
    ]


def matcher(experts: list[Tensor], data: IndexedDataset, **options) -> TrajectoryMatcher:
    settings = {"steps": 4, "max_start": 3, "learning_rate": 0.1} | options
    return TrajectoryMatcher(
        network(),
        experts,
        data.inputs[:2],
        data.targets[:2],
        generator=torch.Generator().manual_seed(3),
        **settings,
    )


def test_a_student_that_learns_from_the_real_data_arrives_and_one_that_rests_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(24, 4, generator=generator).double(), torch.arange(24) % 2
    model = network().double()
    flat = FlatParameters(model)
    start = flat.vector()
    orders = [torch.randperm(24, generator=generator).split(8) for _ in range(2)]
    rows = [part for order in orders for part in order]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for part in rows:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    target = flat.vector()

    def end(rate: float) -> Tensor:
        loss = lambda theta, part: F.cross_entropy(flat(theta, inputs[part]), targets[part])
        return unroll(start, loss, rows, rate)[-1]

    assert trajectory_matching_loss(end(0.2), start, target).item() < 1e-24
    assert trajectory_matching_loss(end(0.0), start, target).item() == 1.0


@pytest.mark.usefixtures("as_users_call")
def test_an_expert_at_rest_is_infinitely_far_and_nan_stays_nan() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert trajectory_matching_loss(one, zero, zero).item() == math.inf
    assert trajectory_matching_loss(zero, zero, zero).isnan()
    assert trajectory_matching_loss(one * math.nan, zero, one).isnan()
    half = trajectory_matching_loss(one.half() * 300, zero.half(), one.half() * 400)
    assert half.dtype == torch.float32
    assert half.item() == 1 / 16  # 400 squared overflows in half precision
    with pytest.raises(ValueError, match="must have one shape"):
        trajectory_matching_loss(one, zero, torch.ones(3))


def test_with_every_option_off_it_is_plain_trajectory_matching_bit_for_bit(
    experts: list[Tensor], data: IndexedDataset
) -> None:
    ours = matcher(experts, data)
    loss = ours.loss()
    # The same draws by hand: expert, start, then the seeds of augmentations that are not there.
    generator = torch.Generator().manual_seed(3)
    expert = experts[int(torch.randint(2, (), generator=generator))]
    begin = int(torch.randint(3, (), generator=generator))
    flat, x = FlatParameters(network()), data.inputs[:2].clone().requires_grad_()
    labels = F.one_hot(data.targets[:2], 2).float()
    theta, rate = expert[begin].clone().requires_grad_(), torch.tensor(math.log(0.1)).exp()
    for _ in range(4):
        cost = -(labels * flat(theta, x).log_softmax(1)).sum(1).sum() / 2
        theta = theta - rate * torch.autograd.grad(cost, theta, create_graph=True)[0]
    by_hand = (theta - expert[begin + 2]).square().sum() / (expert[begin] - expert[begin + 2]).square().sum()
    assert torch.equal(loss, by_hand)
    loss.backward()
    torch.testing.assert_close(ours.images.grad, torch.autograd.grad(by_hand, x)[0])


def test_points_between_are_added_with_their_weights(experts: list[Tensor], data: IndexedDataset) -> None:
    options = {"expert_steps": 3, "steps": 7, "max_start": 1}
    plain, equal, rising = (
        matcher(experts[:1], data, intermediate=kind, **options).loss()
        for kind in ("none", "equal", "rising")
    )
    flat, expert = FlatParameters(network()), experts[0]
    labels = F.one_hot(data.targets[:2], 2).float()
    path = unroll(
        expert[0],
        lambda t, _: F.cross_entropy(flat(t, data.inputs[:2]), labels),
        range(7),
        math.exp(math.log(0.1)),
    )
    between = [trajectory_matching_loss(path[2 * i], expert[0], expert[i]) for i in (1, 2)]
    torch.testing.assert_close(equal - plain, between[0] + between[1])
    torch.testing.assert_close(rising - plain, between[0] / 3 + 2 * between[1] / 3)


def test_the_balance_factor_scales_the_inner_loss_as_published(
    experts: list[Tensor], data: IndexedDataset
) -> None:
    assert balance_factor(3, 6) == pytest.approx(math.log(8) / math.log(5))
    assert balance_factor(2, 6) == pytest.approx(math.log(5) / math.log(9))
    assert [balance_factor(s, 6) for s in range(6)] == sorted(balance_factor(s, 6) for s in range(6))
    options = {"max_start": 1, "steps": 1}
    balanced = matcher(experts, data, balanced=True, **options).loss()
    scaled = matcher(experts, data, learning_rate=0.1 * balance_factor(0, 1), **options).loss()
    torch.testing.assert_close(balanced, scaled)
    with pytest.raises(ValueError, match=r"start must be in \[0, 6\), got 6"):
        balance_factor(6, 6)


def test_perturbation_moves_weights_relative_to_their_size_and_nothing_else() -> None:
    flat = FlatParameters(network())
    vector = flat.vector()
    moved = perturb_weights(flat, vector, 0.5, torch.Generator().manual_seed(0))
    before, after = flat.unflatten(vector), flat.unflatten(moved)
    for name in flat.names:
        if name.endswith("bias"):
            assert torch.equal(before[name], after[name])
        else:
            relative = (after[name] - before[name]) / before[name]
            assert torch.linalg.vector_norm(relative).item() == pytest.approx(0.5, rel=1e-4)
    assert perturb_weights(flat, vector, 0.0) is vector
    with pytest.raises(ValueError, match="strength must be >= 0, got -1"):
        perturb_weights(flat, vector, -1.0)


def test_the_learned_rate_stays_positive_whatever_the_gradient(
    experts: list[Tensor], data: IndexedDataset
) -> None:
    ours = matcher(experts, data, image_rate=1e6)
    for _ in range(3):
        ours.step()
        assert 0 < ours.learning_rate < 150


def test_steps_without_a_finite_gradient_change_nothing_and_end_the_run_at_last(
    experts: list[Tensor], data: IndexedDataset
) -> None:
    ours = matcher(experts, data, learning_rate=1e38, steps=6)
    before = copy.deepcopy(ours.state_dict())
    for _ in range(9):
        assert not math.isfinite(ours.step())
    assert torch.equal(ours.images, before["images"])
    assert torch.equal(ours.log_rate, before["log_rate"])
    assert ours.skipped.tolist() == [9, 9]
    with pytest.raises(NonFiniteLossError, match="10 outer steps in a row"):
        ours.step()


@pytest.mark.parametrize("options", [{"augment": True}, {"inner_batch": 3, "momentum": 0.9}])
def test_recomputed_steps_and_a_restored_state_give_the_same_bits(
    options: dict, experts: list[Tensor], data: IndexedDataset
) -> None:
    options = dict(options)
    if options.get("augment"):
        options["augment"] = lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g)

    def new(**more) -> TrajectoryMatcher:
        generator = torch.Generator().manual_seed(5)
        return TrajectoryMatcher(
            network(),
            experts,
            data.inputs[:8],
            data.targets[:8],
            steps=5,
            max_start=3,
            learn_labels=True,
            generator=generator,
            **options | more,
        )

    whole, again = new(), new(checkpoint=True)
    losses = [(whole.step(), again.step()) for _ in range(3)]
    assert all(one == other for one, other in losses)
    resumed = new()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.generator.set_state(whole.generator.get_state())
    assert [whole.step() for _ in range(2)] == [resumed.step() for _ in range(2)]
    for one, other in zip(whole.dataset()[:2], resumed.dataset()[:2]):
        assert torch.equal(one, other)
    images, labels, _ = whole.dataset()
    assert not torch.equal(images, data.inputs[:8])
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert not torch.equal(labels.max(1).values, torch.full((8,), 0.95))  # they were learned


def test_small_inner_batches_go_through_all_images(experts: list[Tensor], data: IndexedDataset) -> None:
    ours = TrajectoryMatcher(
        network(), experts, data.inputs[:6], data.targets[:6], steps=4, max_start=2, inner_batch=3
    )
    rows = [part for part, _ in ours._inner_batches()]
    assert [len(part) for part in rows] == [3, 3, 3, 3]
    assert torch.cat(rows[:2]).sort().values.tolist() == list(range(6))


def test_starts_must_lie_within_the_trajectory_and_move(experts: list[Tensor], data: IndexedDataset) -> None:
    matcher(experts, data, max_start=4)  # 4 - 1 + 2 = 5 epochs
    with pytest.raises(InputError, match=r"must have max_start \+ expert_steps = 7 points, got 6"):
        matcher(experts, data, max_start=5)
    with pytest.raises(InputError, match="trajectory 0 must have 44 parameters as the model has"):
        matcher([experts[0][:, 1:]], data)
    rest = experts[0].clone()
    rest[2] = rest[1]
    with pytest.raises(InputError, match="trajectory 0 must move from every start"):
        matcher([rest], data)
    broken = experts[0].clone()
    broken[1, 0] = math.nan
    with pytest.raises(InputError, match="trajectory 0 must be finite"):
        matcher([broken], data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"learning_rate": -0.1}, "learning_rate must be > 0 and finite, got -0.1"),
        ({"inner_batch": 0}, "inner_batch must be >= 1, got 0"),
        ({"clip": 0.0}, "clip must be > 0, got 0"),
        (
            {"steps": 1, "intermediate": "equal"},
            "steps must be >= expert_steps to match points between, got 1",
        ),
    ],
)
def test_bad_values_are_named(
    options: dict, message: str, experts: list[Tensor], data: IndexedDataset
) -> None:
    with pytest.raises(InputError, match=message):
        matcher(experts, data, **options)


def test_labels_and_models_that_do_not_fit_are_refused(experts: list[Tensor], data: IndexedDataset) -> None:
    with pytest.raises(InputError, match=r"labels must be in \[0, 2\), got 0 to 5"):
        TrajectoryMatcher(network(), experts, data.inputs[:2], torch.tensor([0, 5]), max_start=3)
    for rows in ([[9.0, 9.0], [0.5, 0.5]], [[-0.5, 1.5], [0.5, 0.5]], [[math.nan, 1.0], [0.5, 0.5]]):
        with pytest.raises(InputError, match="labels must be class numbers or probabilities of 2 classes"):
            TrajectoryMatcher(network(), experts, data.inputs[:2], torch.tensor(rows), max_start=3)
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(InputError, match=r"model must not have batch norm.*'1'"):
        TrajectoryMatcher(normed, experts, data.inputs[:2], data.targets[:2], max_start=3)


@pytest.mark.parametrize(("intermediate", "expected"), [("none", 1.0), ("equal", 3.0), ("rising", 2.0)])
def test_the_loss_at_rest_is_that_of_a_student_which_does_not_move(
    intermediate: str, expected: float, experts: list[Tensor], data: IndexedDataset
) -> None:
    ours = matcher(
        experts, data, intermediate=intermediate, expert_steps=3, learning_rate=1e-30, perturbation=0.1
    )
    assert ours.loss_at_rest == expected
    assert ours.loss().item() == pytest.approx(expected, rel=1e-4)
