"""One of two processes of `test_trained_rank_pruning.py`: `python trp_process.py FOLDER`, with RANK and address in the environment."""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from coloss.compression import TrainedRankPruning
from coloss.train import Budget, fit


def train(fabric: Fabric) -> dict[str, torch.Tensor]:
    """Weights and ranks after ten steps on data that the processes share; no batch statistics, so splitting changes nothing."""
    torch.manual_seed(0)
    images, targets = torch.randn(64, 1, 6, 6), torch.randint(3, (64,))
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 3),
    )
    method = TrainedRankPruning(
        every=3, energy=0.8, nuclear_weight=0.1, project_momentum=True, decompose=False
    )
    run = fit(
        model,
        (images, targets),
        F.cross_entropy,
        [method],
        budget=Budget(steps=10),
        batch_size=16,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    ranks = torch.tensor([[step, *ranks.values()] for step, ranks in method.rank_history])
    return {**run.model.state_dict(), "ranks": ranks}


if __name__ == "__main__":
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    assert fabric.world_size == 2
    save_file(train(fabric), Path(sys.argv[1]) / f"{fabric.global_rank}.safetensors")
