"""Facts about training on bag averages."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss import Budget, Method, Setting, TrainingStep
from coloss.classification import AggregateSupervision, BagSampler, aggregate_loss, bag_dataset
from coloss.data import Batch, IndexedDataset, Loader
from coloss.lab.claims import verify
from coloss.lab.tasks import find_task
from coloss.ops import segment_mean

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)


def bags_of_four(samples: int = 40) -> IndexedDataset:
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))
    bags = torch.arange(samples) // 4
    classes = (inputs[:, :3].argmax(1)).long()
    return bag_dataset(inputs, segment_mean(F.one_hot(classes, 3).float(), bags), bags)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))


def loader(data: IndexedDataset, bags_per_batch: int = 3) -> Loader:
    return Loader(data, None, sampler=BagSampler(data.extras["bag"], bags_per_batch), seed=3)


class Smoothness(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"smoothness": state.outputs.square().mean()}


class Stop(RuntimeError):
    pass


class StopAt(Method):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step(self, state: coloss.State) -> None:
        if state.step == self.step:
            raise Stop


def test_the_terms_are_the_two_levels_and_their_weighted_sum_is_the_loss() -> None:
    data = bags_of_four()
    step = TrainingStep(network().eval(), None, [AggregateSupervision("ce", rho=0.3)])
    batch = next(loader(data).batches(0))
    terms = step(batch)
    bags = batch.extras["bag"]
    averages = segment_mean(data.targets, data.extras["bag"])
    expected = aggregate_loss(step.model(batch.inputs), averages, bags, 0.3, "ce")
    torch.testing.assert_close(step.combine(step.state, terms), expected)
    assert set(terms) == {"bag_level", "instance_level"}


@pytest.mark.parametrize(("rho", "name"), [(0, "bag_level"), (1, "instance_level")])
def test_an_end_needs_one_term_alone(rho: float, name: str) -> None:
    run = coloss.fit(
        network(), loader(bags_of_four()), None, [AggregateSupervision(rho=rho)], budget=Budget(steps=2)
    )
    assert set(run.history[-1].terms) == {name}


def test_the_knob_may_follow_a_schedule() -> None:
    method = AggregateSupervision(rho=lambda progress: progress)
    step = TrainingStep(network().eval(), None, [method], total_steps=2)
    terms = step(next(loader(bags_of_four()).batches(0)))
    for progress in (0.0, 0.25, 1.0):
        step.state.progress = progress
        expected = (1 - progress) * terms["bag_level"] + progress * terms["instance_level"]
        torch.testing.assert_close(step.combine(step.state, terms), expected)


def test_a_single_output_may_have_a_last_dimension_of_one() -> None:
    inputs, bags = torch.randn(6, 2), torch.arange(6) // 3
    averages = torch.randn(2)
    model = nn.Linear(2, 1)
    step = TrainingStep(model, None, [AggregateSupervision("mse", rho=0.0)])
    terms = step(bag_dataset(inputs, averages, bags).all())
    expected = (segment_mean(model(inputs)[:, 0], bags) - averages).square().mean()
    torch.testing.assert_close(terms["bag_level"], expected)


def test_training_recovers_labels_from_proportions() -> None:
    data = bags_of_four(400)
    model = nn.Linear(6, 3)
    coloss.fit(
        model,
        loader(data, 20),
        None,
        [AggregateSupervision("ce", rho=0.0)],
        budget=Budget(steps=40),
        optimizer=partial(torch.optim.Adam, lr=0.1),
    )
    right = model(data.inputs).argmax(1) == data.inputs[:, :3].argmax(1)
    assert right.float().mean() > 0.9


def test_a_part_of_a_bag_is_refused_rather_than_trained_on() -> None:
    data = bags_of_four()
    step = TrainingStep(network(), None, [AggregateSupervision()])
    with pytest.raises(ValueError, match="bag 1 is not whole in its batch: use BagSampler"):
        step(data.take(torch.arange(7)))
    with pytest.raises(ValueError, match="batches must say which bag a sample is of"):
        step(Batch(data.inputs, data.targets))
    with pytest.raises(ValueError, match="is not whole"):
        coloss.fit(network(), data, None, [AggregateSupervision()], budget=Budget(steps=1), batch_size=6)


def test_bags_are_fetched_whole_by_the_method_itself() -> None:
    data = bags_of_four()
    method = AggregateSupervision(data=data)
    step = TrainingStep(network().double(), None, [method])
    seen = set()
    for _ in range(20):
        step(torch.zeros(12, 6, dtype=torch.float64), torch.zeros(12))
        batch = step.state.batch
        assert batch.extras["bag"].unique(return_counts=True)[1].tolist() == [4, 4, 4]
        assert torch.equal(batch.inputs, data.inputs[batch.ids].double())
        assert torch.equal(batch.targets, data.targets[batch.ids])
        seen |= set(batch.extras["bag"].tolist())
    assert seen == set(range(10))
    step(torch.zeros(1, 6).double())
    assert len(step.state.batch) == 4


def test_it_runs_beside_another_method_and_leaves_nothing_behind() -> None:
    model = network()
    keys = list(model.state_dict())
    run = coloss.fit(
        model,
        loader(bags_of_four()),
        F.cross_entropy,
        [AggregateSupervision("ce", rho=0.1), Smoothness()],
        combine={"smoothness": 0.01},
        budget=Budget(steps=4),
    )
    # The task's own objective would not even take these targets as class numbers.
    assert set(run.history[-1].terms) == {"bag_level", "instance_level", "smoothness"}
    assert run.model is model
    assert list(model.state_dict()) == keys
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("fetched", [False, True])
def test_killed_and_resumed_ends_bit_identically(tmp_path: Path, fetched: bool) -> None:
    data = bags_of_four()

    def go(*extra: Method, **options: Any) -> coloss.Fit:
        method = AggregateSupervision("ce", data=data if fetched else None)
        given = data if fetched else loader(data)
        budget = Budget(steps=9)
        return coloss.fit(network(), given, None, [method, *extra], budget=budget, batch_size=8, **options)

    whole = go()
    with pytest.raises(Stop):
        go(StopAt(5), checkpoint_dir=tmp_path, checkpoint_every=2)
    resumed = go(StopAt(-1), checkpoint_dir=tmp_path, checkpoint_every=2, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_plain_loop_takes_the_steps_of_fit() -> None:
    data, fitted = bags_of_four(), nn.Linear(6, 3)
    plain = nn.Linear(6, 3)
    plain.load_state_dict(fitted.state_dict())
    coloss.fit(fitted, loader(data), None, [AggregateSupervision()], budget=Budget(epochs=1), optimizer=SGD)
    step = TrainingStep(plain, None, [AggregateSupervision()])
    optimizer = SGD(step.trainable)
    for batch in loader(data).batches(0):
        optimizer.zero_grad()
        step.backward(step(batch))
        optimizer.step()
        step.after_step()
    assert torch.equal(step.finish().weight, fitted.weight)


def test_accumulated_parts_of_bags_are_the_large_batch() -> None:
    data = bags_of_four()
    found = []
    for size, accumulate in ((40, 1), (10, 4)):
        torch.manual_seed(1)
        model = nn.Linear(6, 3)
        given = Loader(data, size, shuffle=False)
        options: Any = {"optimizer": SGD, "accumulate": accumulate, "budget": Budget(steps=3)}
        coloss.fit(model, given, None, [AggregateSupervision("ce", rho=0.3)], **options)
        found.append(model.weight.detach())
    torch.testing.assert_close(found[0], found[1])


def test_mixed_precision_training_stays_finite() -> None:
    model = network()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    coloss.fit(
        model, loader(bags_of_four()), None, [AggregateSupervision()], budget=Budget(steps=4), fabric=fabric
    )
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_lab_hides_labels_behind_averages() -> None:
    setting = Setting.of(find_task("digits", limit=120), seed=0)
    method = AggregateSupervision.for_setting(setting, bag_size=6, rho=0.0)
    data = method.data
    assert (method.base, method.rho) == ("ce", 0.0)
    assert data.extras["bag_size"].unique().tolist() == [6]
    assert torch.equal(data.ids, setting.splits.train.ids)
    labels, bag = setting.splits.train.targets, data.extras["bag"]
    third = labels[bag == 3].bincount(minlength=10) / 6
    torch.testing.assert_close(data.targets[bag == 3], third.expand(6, 10))
    again = AggregateSupervision.for_setting(setting, bag_size=6)
    assert torch.equal(bag, again.data.extras["bag"])
    private = AggregateSupervision.for_setting(setting, bag_size=6, epsilon=0.5)
    assert not torch.equal(private.data.targets, data.targets)
    torch.testing.assert_close(private.data.targets.sum(1), torch.ones(len(labels)))
    regression = Setting.of(find_task("diabetes"), seed=0)
    method = AggregateSupervision.for_setting(regression, bag_size=5, epsilon=1.0, clip=2.0)
    assert (method.base, method.data.targets.ndim) == ("mse", 1)
    run = regression.fit(regression.new_model(), methods=[method], budget=Budget(steps=2))
    assert set(run.history[-1].terms) == {"bag_level", "instance_level"}


def test_bad_input_is_named(as_users_call: None) -> None:
    for arguments, message in (
        ({"base": "hinge"}, "base must be .* got 'hinge'"),
        ({"rho": 1.5}, "rho must be >= 0 and <= 1, got 1.5"),
        ({"data": IndexedDataset(torch.zeros(3))}, "data must be made by bag_dataset"),
    ):
        with pytest.raises(coloss.errors.InputError, match=message):
            AggregateSupervision(**arguments)


@pytest.mark.parametrize("fetched", [False, True])
def test_two_processes_take_the_steps_of_one(fetched: bool, tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        inputs, bags = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) // 4
        data = bag_dataset(inputs, torch.rand(10, 3, dtype=torch.float64).softmax(-1), bags)
        loader = (
            Loader(data, 8, seed=1) if fetched else Loader(data, None, sampler=BagSampler(bags, 2), seed=1)
        )
        coloss.fit(
            model,
            loader,
            None,
            [AggregateSupervision("ce", rho=0.3, data=data if fetched else None)],
            budget=Budget(epochs=3),
            optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
            fabric=fabric,
        )
        return dict(model.state_dict())

    check_two_processes(train, tmp_path)


def test_the_claim_runs() -> None:
    found = verify("aggregate-responses", smoke=True, seeds=1)
    assert found["metric"] == "mse"
    assert {"mse", "mse_in_bags_of_20"} <= found["arms"]["interpolated"]["metrics"].keys()
    assert {"chosen end", "best end in hindsight", "instance level"} <= found["arms"].keys()
