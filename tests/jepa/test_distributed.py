"""Two gloo processes do what one does with the joined batch."""

from functools import partial

import pytest
import torch
from contract import run_processes
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import coloss
from coloss.jepa import EffectiveRankMonitor, LeJEPA, SIGReg
from coloss.jepa.univariate import UNIVARIATE


def share(rows: Tensor, fabric: Fabric) -> Tensor:
    """Unequal parts of the samples, so that sums and counts must be told apart."""
    return rows.tensor_split([3], dim=-2)[fabric.global_rank] if fabric.world_size > 1 else rows


def regularise(test: str, fabric: Fabric) -> dict[str, Tensor]:
    """Value of SIGReg on two views of eight samples, its gradient on a linear layer, and the rows it sees."""
    torch.manual_seed(0)
    views, layer = torch.randn(2, 8, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
    wrapped = DistributedDataParallel(layer) if fabric.world_size > 1 else layer
    sigreg = SIGReg(num_slices=6, univariate=UNIVARIATE[test], chunk_size=4)
    sigreg(views[..., :4])  # the second call has other slices, the same on every process
    value = sigreg(wrapped(share(views, fabric)))
    value.backward()
    return {"value": value.detach(), "weight": layer.weight.grad, "bias": layer.bias.grad}


def three_views(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Views without chance, since each process draws its own."""
    return torch.stack([inputs, 1.3 * inputs, inputs.roll(1, 1)])


def train(objective: bool, fabric: Fabric) -> dict[str, Tensor]:
    """Weights of encoder and projector after four epochs in float64, and what the monitor saw last."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    data = torch.randn(48, 6, dtype=torch.float64), torch.randint(5, (48,))
    method = LeJEPA(view=three_views, projector=(8, 3), num_slices=16, weight=0.3)
    monitor = EffectiveRankMonitor(every=4, capacity=96, min_scale=0.0)
    coloss.fit(
        encoder,
        data,
        nn.functional.cross_entropy if objective else None,
        [method, monitor],
        batch_size=16,
        budget=coloss.Budget(epochs=4),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    found = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    found |= {f"projector.{name}": value for name, value in method.projector.state_dict().items()}
    step, values = monitor.found[-1]
    return (
        found
        | {f"monitor.{name}": torch.tensor(value) for name, value in values.items()}
        | {"step": torch.tensor(step)}
    )


def everything(fabric: Fabric) -> dict[str, Tensor]:
    """All that is compared below, by name."""
    found = {}
    for test in UNIVARIATE:
        found |= {f"sigreg/{test}/{name}": value for name, value in regularise(test, fabric).items()}
    for objective in (False, True):
        found |= {f"train/{objective}/{name}": value for name, value in train(objective, fabric).items()}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process saw, and what each of two saw."""
    folder = tmp_path_factory.mktemp("processes")
    return [found for processes in (1, 2) for found in run_processes(everything, folder, processes)]


@pytest.mark.parametrize("test", list(UNIVARIATE))
def test_sigreg_has_the_value_and_gradient_of_the_joined_batch(runs, test):
    alone, *both = runs
    names = [name for name in alone if name.startswith(f"sigreg/{test}/")]
    assert len(names) == 3
    for name in names:
        for found in both:
            assert torch.allclose(found[name], alone[name], rtol=1e-9, atol=1e-9), name
    assert alone[f"sigreg/{test}/weight"].abs().max() > 1e-3


@pytest.mark.parametrize("objective", [False, True])
def test_training_takes_the_steps_of_one_process(runs, objective):
    alone, *both = runs
    prefix = f"train/{objective}/"
    names = [name for name in alone if name.startswith(prefix) and "monitor" not in name]
    assert any("projector" in name for name in names)
    for name in names:
        for found in both:
            assert torch.allclose(found[name].double(), alone[name].double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("objective", [False, True])
def test_the_monitor_sees_the_rows_of_all_processes(runs, objective):
    alone, *both = runs
    for name in (name for name in alone if name.startswith(f"train/{objective}/monitor")):
        for found in both:
            # The buffer holds two whole batches, in another order; rows are kept in single precision.
            assert torch.allclose(found[name], alone[name], rtol=1e-5), name
        assert torch.equal(both[0][name], both[1][name]), name
