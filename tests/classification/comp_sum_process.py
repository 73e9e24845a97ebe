"""Trains small classifiers on any number of processes with losses that change the gradient, and stores their weights.

Run as `python comp_sum_process.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor

import coloss
from coloss.classification import CompSumObjective, EnsLossObjective
from coloss.nn import MLP, Classifier

VARIANTS = {
    "comp-sum": lambda: CompSumObjective(1.5, warmup=0.8),
    "attacked": lambda: CompSumObjective(1.0, eps=0.1, steps=2),
    "ensloss": lambda: EnsLossObjective(period=1),
}


def train(variant: str, fabric: Fabric) -> dict[str, Tensor]:
    """Weights after two epochs in float64."""
    torch.manual_seed(0)
    model = Classifier(MLP(6, [5], norm=None), 4).double()
    coloss.fit(
        model,
        (torch.randn(48, 6, dtype=torch.float64), torch.randint(4, (48,))),
        methods=[VARIANTS[variant]()],
        batch_size=16,
        budget=coloss.Budget(epochs=2),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    return model.state_dict()


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
