"""Regularises fixed embeddings, and trains a small encoder, on any number of processes; stores what became of them.

Run as `python two_process_lejepa.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
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


def main(processes: int, path: Path) -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    found = {}
    for test in UNIVARIATE:
        found |= {f"sigreg/{test}/{name}": value for name, value in regularise(test, fabric).items()}
    for objective in (False, True):
        found |= {f"train/{objective}/{name}": value for name, value in train(objective, fabric).items()}
    save_file(
        {name: value.clone().contiguous() for name, value in found.items()}, f"{path}.{fabric.global_rank}"
    )
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
