from functools import partial

import pytest
import torch
import torch.distributed as dist
from contract import run_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

from coloss.nn import SyncBatchNorm1d

CASES = {"rows": ((10, 3), 5), "series": ((8, 3, 7), 4), "ragged": ((9, 3), 2), "half": ((10, 3), 5)}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5)])
def test_on_one_process_it_is_torch_batch_norm(momentum, shape):
    ours, theirs = SyncBatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_refuses_a_single_value_like_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        SyncBatchNorm1d(3)(torch.ones(1, 3))


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"weight": draw(3), "bias": draw(3)}
    for case, (shape, split) in CASES.items():
        # An offset makes differences between processes visible.
        tensors[case] = draw(*shape) + torch.arange(shape[0], dtype=torch.float64).reshape(
            -1, *[1] * (len(shape) - 1)
        )
        tensors[f"{case}.direction"] = draw(*shape)
        tensors[f"{case}.bounds"] = torch.tensor([0, split, shape[0]])
    return tensors


def normalise(given: dict[str, Tensor], fabric: Fabric) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of one of two processes."""
    rank, results = fabric.global_rank, {}
    for case in CASES:
        norm = SyncBatchNorm1d(3, momentum=None if case == "rows" else 0.3).double()
        with torch.no_grad():
            norm.weight.copy_(given["weight"])
            norm.bias.copy_(given["bias"])
        start, stop = given[f"{case}.bounds"].tolist()[rank : rank + 2]
        inputs = given[case][start:stop]
        if case == "half":
            norm, inputs = norm.float(), inputs.bfloat16()
        inputs = inputs.clone().requires_grad_()
        for _ in range(2):
            outputs = norm(inputs)
        # The factor 2 undoes the average over processes below: the loss is a sum over all rows.
        loss = 2 * (outputs * given[f"{case}.direction"][start:stop].to(outputs)).sum()
        loss.backward()
        for parameter in norm.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        results |= {
            f"{case}.outputs": outputs.detach(),
            f"{case}.input_gradient": inputs.grad / 2,
            f"{case}.weight_gradient": norm.weight.grad,
            f"{case}.bias_gradient": norm.bias.grad,
            f"{case}.running_mean": norm.running_mean,
            f"{case}.running_var": norm.running_var,
            f"{case}.evaluated": norm.eval()(inputs.detach()),
        }
    try:
        SyncBatchNorm1d(3)(torch.ones(1 - rank, 3))
        refused = 0
    except ValueError:
        refused = 1
    return results | {"single_value_refused": torch.tensor(refused)}


@pytest.fixture(scope="module")
def two_processes(given, tmp_path_factory) -> list[dict[str, Tensor]]:
    return run_processes(partial(normalise, given), tmp_path_factory.mktemp("sync_batch_norm"))


@pytest.mark.parametrize("case", ["rows", "series", "ragged"])
def test_two_processes_equal_one_with_the_joined_batch(case, given, two_processes):
    norm = nn.BatchNorm1d(3, momentum=None if case == "rows" else 0.3).double()
    with torch.no_grad():
        norm.weight.copy_(given["weight"])
        norm.bias.copy_(given["bias"])
    inputs = given[case].clone().requires_grad_()
    for _ in range(2):
        outputs = norm(inputs)
    (outputs * given[f"{case}.direction"]).sum().backward()
    joined = {
        "outputs": outputs.detach(),
        "input_gradient": inputs.grad,
        "evaluated": norm.eval()(inputs.detach()),
    }
    for name, expected in joined.items():
        found = torch.cat([result[f"{case}.{name}"] for result in two_processes])
        assert torch.allclose(found, expected, rtol=0, atol=1e-12), name
    shared = {
        "weight_gradient": norm.weight.grad,
        "bias_gradient": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    for name, expected in shared.items():
        for result in two_processes:
            assert torch.allclose(result[f"{case}.{name}"], expected, rtol=0, atol=1e-12), name


def test_half_precision_is_normalised_in_single_precision(given, two_processes):
    inputs = given["half"].bfloat16().double()
    norm = nn.BatchNorm1d(3).double()
    with torch.no_grad():
        norm.weight.copy_(given["weight"])
        norm.bias.copy_(given["bias"])
    found = torch.cat([result["half.outputs"] for result in two_processes])
    assert found.dtype == torch.bfloat16
    # Two roundings at 8 bits of mantissa, nothing more.
    assert torch.allclose(found.double(), norm(inputs), rtol=2**-8, atol=1e-4)


def test_a_single_value_over_all_processes_is_refused(two_processes):
    assert [int(result["single_value_refused"]) for result in two_processes] == [1, 1]
