"""Trains small classifiers on weak labels on any number of processes and stores what became of them.

Run as `python weak_supervision_process.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor

import coloss
from coloss.classification import WeakSupervision
from coloss.nn import MLP

VARIANTS: dict[str, dict[str, Any]] = {
    "two classes": {"classes": 2, "warmup": 0.0, "alpha": 1.0},
    "four classes": {"classes": 4, "alpha": 0.5},
}


def train(classes: int, fabric: Fabric, **options: Any) -> dict[str, Tensor]:
    """Weights after four epochs in float64."""
    torch.manual_seed(0)
    model = MLP(6, (8,), classes, norm=None).double()
    inputs = torch.randn(40, 6, dtype=torch.float64)
    weak = torch.randn(40, classes, dtype=torch.float64).softmax(1)
    coloss.fit(
        model,
        (inputs, weak),
        methods=[WeakSupervision(**options)],
        batch_size=8,
        budget=coloss.Budget(epochs=4),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    return dict(model.state_dict())


def main(processes: int, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    found = {
        f"{variant}/{name}": value.clone()
        for variant, options in VARIANTS.items()
        for name, value in train(fabric=fabric, **options).items()
    }
    if fabric.global_rank == 0:
        save_file(found, path)
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
