"""Trains on bags that are spread over any number of processes; stores what became of the weights.

Run as `python two_process_bags.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import nn

import coloss
from coloss.classification import AggregateSupervision, BagSampler, bag_dataset
from coloss.data import Loader


def train(fetched: bool, fabric: Fabric) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, bags = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) // 4
    data = bag_dataset(inputs, torch.rand(10, 3, dtype=torch.float64).softmax(-1), bags)
    loader = Loader(data, 8, seed=1) if fetched else Loader(data, None, sampler=BagSampler(bags, 2), seed=1)
    coloss.fit(
        model,
        loader,
        None,
        [AggregateSupervision("ce", rho=0.3, data=data if fetched else None)],
        budget=coloss.Budget(epochs=3),
        optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        fabric=fabric,
    )
    return {f"{fetched}/{name}": value for name, value in model.state_dict().items()}


def main(processes: int, path: Path) -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    save_file(train(False, fabric) | train(True, fabric), f"{path}.{fabric.global_rank}")
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
