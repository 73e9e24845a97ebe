"""Facts about losses whose keys travel from process to process: two and three processes get what one gets of the joined batch."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from contract import run_processes
from torch import Tensor

WORKER = Path(__file__).with_name("ring_worker.py")
EDGES = {2: [0, 4, 11], 3: [0, 5, 5, 11]}  # uneven shares, and one process without rows


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ring_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        F.normalize(torch.randn(11, 5, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    )
    targets = torch.rand(11, 11, generator=generator, dtype=torch.float64)
    targets = targets * (targets > 0.6)
    return {
        "queries": queries,
        "keys": keys,
        "labels": torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 2, 1, 4]) * 10**9,
        "targets": targets,
        "positives": torch.tensor([[0, 0, 2, 5, 9, 10], [3, 9, 2, 0, 1, 10]]),
        "temperature": torch.tensor(0.3, dtype=torch.float64),
    }


@pytest.fixture(scope="module")
def alone(inputs) -> dict[str, Tensor]:
    return worker_module().observe(inputs, slice(0, 11))


@pytest.fixture(scope="module", params=[2, 3])
def seen(request, inputs, tmp_path_factory) -> tuple[int, list[dict[str, Tensor]]]:
    count = request.param
    worker, edges = worker_module(), EDGES[count]
    found = run_processes(
        lambda fabric: worker.observe(inputs, slice(*edges[fabric.global_rank : fabric.global_rank + 2])),
        tmp_path_factory.mktemp("ring"),
        count,
    )
    return count, found


@pytest.mark.parametrize("name", sorted(worker_module().losses({}, 0)))
def test_values_and_gradients_are_those_of_the_joined_batch(seen, alone, name):
    count, found = seen
    for process in found:
        torch.testing.assert_close(process[f"{name}.value"], alone[f"{name}.value"], rtol=1e-10, atol=1e-12)
    assert alone[f"{name}.queries"].abs().max() > 0.01
    for key in ("queries", "keys"):
        joined = torch.cat([process[f"{name}.{key}"] for process in found])
        # Averaging over processes, as data-parallel training does, divides by their number.
        torch.testing.assert_close(joined / count, alone[f"{name}.{key}"], rtol=1e-9, atol=1e-11)
    shared = sum(process[f"{name}.temperature"] for process in found) / count
    torch.testing.assert_close(shared, alone[f"{name}.temperature"], rtol=1e-9, atol=1e-11)
