"""Trains with accumulated gradients on any number of processes and stores the weights.

Run as `python accumulation_process.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torchjd.aggregation import UPGrad

import coloss
from coloss.ops import distributed


class Spread(nn.Module):
    """A statistic of the batch of all processes."""

    batch_statistic = True

    def forward(self, outputs, targets):
        outputs = distributed.gather_with_gradient(outputs)
        return (outputs - outputs.mean(0)).square().mean().log()


def two_terms(outputs, targets):
    return {"first": F.cross_entropy(outputs, targets), "second": (outputs[:, 0] + 1).square().mean()}


def count_syncs(found, bucket):
    found.append(1)
    return allreduce_hook(None, bucket)


class CountingDDP(DDPStrategy):
    """Counts how often the reducer runs."""

    def setup_module(self, module):
        self.found = []
        wrapper = super().setup_module(module)
        wrapper.register_comm_hook(self.found, count_syncs)
        return wrapper


def train(objective, combine, fabric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(48, 6, dtype=torch.float64), torch.randint(3, (48,))
    coloss.fit(model, data, objective, combine=combine, batch_size=8, accumulate=3, budget=coloss.Budget(epochs=2),
               optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9), fabric=fabric)  # fmt: skip
    return dict(model.state_dict()) | {"syncs": torch.tensor(len(getattr(fabric.strategy, "found", [])))}


def main(processes, path):
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=CountingDDP() if processes > 1 else "auto")
    fabric.launch()
    variants = {
        "averaged": (two_terms, None),
        "joined": (Spread(), None),
        "descent": (two_terms, coloss.JacobianDescent(UPGrad())),
    }
    found = {}
    for variant, given in variants.items():
        found |= {f"{variant}/{name}": value.clone() for name, value in train(*given, fabric).items()}
    if fabric.global_rank == 0:
        save_file(found, path)
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
