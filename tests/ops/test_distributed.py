"""Facts about statistics over processes: two gloo processes see what one sees on the joined batch."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from contract import run_processes
from torch import Tensor

from coloss.ops import (
    all_reduce_mean,
    dealt_places,
    gather_with_gradient,
    is_distributed,
    own_place,
    rank,
    sliced_statistic,
    world_size,
)

WORKER = Path(__file__).with_name("gloo_worker.py")
LOSSES = ["contrastive", "pooled", "sliced", "moments"]


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gloo_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    joined = randn(8, 4)
    return {
        "joined": joined,
        "local_0": joined[:3].clone(),
        "local_1": joined[3:].clone(),
        "directions": randn(4, 7),
        "weight": randn(4, 4),
        "bias": randn(4),
    }


@pytest.fixture(scope="module")
def seen(inputs, tmp_path_factory) -> list[dict[str, Tensor]]:
    """What each of two processes saw."""
    worker = worker_module()
    return run_processes(
        lambda fabric: worker.observe(fabric.global_rank, inputs), tmp_path_factory.mktemp("gloo")
    )


def test_one_process_is_not_a_group():
    x = torch.ones(2, 3)
    assert (is_distributed(), rank(), world_size()) == (False, 0, 1)
    assert gather_with_gradient(x) is x
    assert all_reduce_mean(x) is x


@pytest.mark.usefixtures("as_users_call")
def test_a_scalar_cannot_be_gathered():
    with pytest.raises(ValueError, match="x must have at least one dimension, got a scalar"):
        gather_with_gradient(torch.tensor(1.0))


def test_each_process_knows_its_number(seen):
    assert [s["group"].tolist() for s in seen] == [[0, 2, 1], [1, 2, 1]]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_those_of_the_joined_batch(name, inputs, seen):
    expected = worker_module().loss_functions(inputs["directions"])[name](inputs["joined"])
    for process in seen:
        torch.testing.assert_close(process[f"{name}.value"], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_bare_gradients_are_those_of_the_joined_batch_times_the_number_of_processes(name, inputs, seen):
    z = inputs["joined"].clone().requires_grad_()
    worker_module().loss_functions(inputs["directions"])[name](z).backward()
    gathered = torch.cat([process[f"{name}.gradient"] for process in seen])
    torch.testing.assert_close(gathered, 2 * z.grad)


def test_processes_that_weigh_a_statistic_unlike_follow_the_sum_of_their_weights(inputs, seen):
    z = inputs["joined"].clone().requires_grad_()
    ((1 + 2) * sliced_statistic(z, inputs["directions"])).backward()
    torch.testing.assert_close(torch.cat([process["unequal.gradient"] for process in seen]), z.grad)


def network_on_the_joined_batch(inputs) -> tuple[torch.nn.Linear, Tensor]:
    network = torch.nn.Linear(4, 4, dtype=torch.float64)
    network.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    return network, network(inputs["joined"])


@pytest.mark.parametrize("name", LOSSES)
def test_under_ddp_parameter_gradients_are_exactly_those_of_the_joined_batch(name, inputs, seen):
    network, z = network_on_the_joined_batch(inputs)
    worker_module().loss_functions(inputs["directions"])[name](z).backward()
    for process in seen:
        torch.testing.assert_close(process[f"{name}.ddp"], network.weight.grad)


def test_under_ddp_own_queries_against_gathered_keys_is_the_joined_loss(inputs, seen):
    network, z = network_on_the_joined_batch(inputs)
    worker_module().local_rows_against_all_keys(z, 0).backward()
    for process in seen:
        torch.testing.assert_close(process["split.ddp"], network.weight.grad)


def test_ids_flags_halves_and_missing_rows_are_gathered(seen):
    for process in seen:
        assert process["ids"].tolist() == [0, 10, 11]
        assert process["flags"].tolist() == [True, False]
        assert process["no_rows"].shape == (3, 2)
        assert process["half_mean"].tolist() == [1.5]
        assert process["half_rows"].tolist() == [1.0, 2.0]


def test_a_process_without_samples_adds_nothing_to_a_statistic(seen):
    for process in seen:
        assert process["empty_statistic"].item() / 5 == pytest.approx(0.4020, abs=5e-5)


def test_second_derivatives_pass_through_a_gather(seen):
    # x_0 = 2, x_1 = 3, L = (x_0 x_1)^2 on both processes, so each first gradient is 2 dL/dx_r and the sum over both
    # processes of the derivative of those by x_r is 2 (2 x_s^2 + 4 x_0 x_1).
    assert [process["second"].item() for process in seen] == [2 * (2 * 9 + 4 * 6), 2 * (2 * 4 + 4 * 6)]


def test_rows_are_counted_where_they_were_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    room = "coloss.ops.distributed"
    assert own_place(dealt_places(torch.zeros(3))) == 0
    monkeypatch.setattr(f"{room}.is_distributed", lambda: True)
    monkeypatch.setattr(f"{room}.row_counts", lambda rows: [3, 2])
    monkeypatch.setattr(f"{room}.rank", lambda: 1)
    places = dealt_places(torch.zeros(2, 4))
    # Samples 0 to 4 went to processes 0, 1, 0, 1, 0.
    assert [place.tolist() for place in places] == [[0, 2, 4], [1, 3]]
    assert own_place(places) == 1
    alone = dealt_places(torch.zeros(2, 4), across_processes=False)
    assert [place.tolist() for place in alone] == [[0, 1]]
    assert own_place(alone) == 0
