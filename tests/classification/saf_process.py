"""Trains small classifiers with SAF and MESA on any number of processes and stores what became of them.

Run as `python saf_process.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn

import coloss
from coloss.classification import EMADistillation, TrajectoryDistillation
from coloss.nn import MLP

VARIANTS: dict[str, Any] = {
    "saf": lambda: TrajectoryDistillation(lag=2, start_epoch=1, dtype="float64", weight=3.0),
    "mesa": lambda: EMADistillation(start_epoch=1, decay=0.8, weight=3.0),
}


def train(variant: str, fabric: Fabric) -> dict[str, Tensor]:
    """Weights after six epochs in float64, in reshuffled shards, and the method's own state."""
    torch.manual_seed(0)
    model = MLP(6, (8,), 4, norm=None).double()
    method = VARIANTS[variant]()
    coloss.fit(
        model,
        (torch.randn(40, 6, dtype=torch.float64), torch.randint(4, (40,))),
        nn.functional.cross_entropy,
        [method],
        batch_size=8,
        budget=coloss.Budget(epochs=6),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    return {f"model.{n}": v for n, v in model.state_dict().items()} | {
        f"method.{n}": v for n, v in method.state_dict().items()
    }


def main(processes: int, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    found = {
        f"{variant}/{name}": value.clone()
        for variant in VARIANTS
        for name, value in train(variant, fabric).items()
    }
    if fabric.global_rank == 0:
        save_file(found, path)
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
