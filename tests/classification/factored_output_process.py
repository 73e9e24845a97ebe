"""Trains a small classifier with a factored output layer on any number of processes and stores its weights.

Run as `python factored_output_process.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor

import coloss
from coloss.classification import FactoredOutput
from coloss.nn import MLP, Classifier


def train(fabric: Fabric) -> dict[str, Tensor]:
    """Weights after four epochs in float64."""
    torch.manual_seed(0)
    model = Classifier(MLP(6, [5], norm=None), 20).double()
    run = coloss.fit(
        model,
        (torch.randn(48, 6, dtype=torch.float64), torch.randint(20, (48,))),
        methods=[FactoredOutput(0.5, stabilize_every=3, weight_decay=0.01)],
        batch_size=16,
        budget=coloss.Budget(epochs=4),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    return run.model.state_dict()


def main(processes: int, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    found = train(fabric)
    if fabric.global_rank == 0:
        save_file(found, path)
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
