"""Trains small students with dual-head distillation on any number of processes and stores what became of them.

Run as `python two_process_fit.py PROCESSES FILE`: Lightning Fabric starts the other processes from the same command line.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn

import coloss
from coloss.distillation import DualHeadDistillation
from coloss.nn import MLP, Classifier

VARIANTS = {
    "linear, aligned": {"head": "linear"},
    "nonlinear, aligned": {"hidden": 12, "dropout": 0.0},
    "nonlinear, plain backward, switched off half-way": {
        "hidden": 12,
        "dropout": 0.0,
        "align_gradients": False,
        "weight": lambda progress: 1.0 if progress < 0.5 else 0.0,
    },
}


def train(variant: str, fabric: Fabric) -> dict[str, Tensor]:
    """Weights of student and head after four epochs in float64, and how many steps projected a gradient."""
    torch.manual_seed(0)
    student, teacher = Classifier(MLP(6, [5], norm=None), 4).double(), MLP(6, [32], 4).double()
    inputs, targets = torch.randn(48, 6, dtype=torch.float64), torch.randint(4, (48,))
    method = DualHeadDistillation(teacher, **VARIANTS[variant])
    coloss.fit(
        student,
        (inputs, targets),
        nn.functional.cross_entropy,
        [method],
        batch_size=16,
        budget=coloss.Budget(epochs=4),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        fabric=fabric,
    )
    found = {f"student.{name}": value for name, value in student.state_dict().items()}
    found |= {f"head.{name}": value for name, value in method.head.state_dict().items()}
    return found | {"conflicting_steps": method.conflicting_steps}


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
