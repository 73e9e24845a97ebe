"""Trains on the metric of two processes' batches together: `python anyloss_process.py PROCESSES FOLDER`; see `test_anyloss.py`."""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file

from coloss.classification import MetricObjective
from coloss.nn import MLP, Classifier
from coloss.train import Budget, fit

CASES = {
    "binary": (2, lambda: [MetricObjective(metric="g_mean", amplification=10.0)]),
    "macro": (4, lambda: [MetricObjective(metric="f1", amplification=10.0)]),
}


def train(case, fabric):
    classes, methods = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    targets = (torch.randint(12, (60,), generator=generator) == 0).long() + 2 * (classes > 2) * (
        inputs[:, 0] > 1
    )
    torch.manual_seed(1)
    model = Classifier(MLP(5, (8,), norm=None), classes).double()
    run = fit(
        model,
        (inputs, targets),
        None,
        methods(),
        budget=Budget(epochs=2),
        batch_size=12,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        log_every=1,
        fabric=fabric,
    )
    name = "g_mean_loss" if case == "binary" else "f1_loss"
    return {
        **run.model.state_dict(),
        "losses": torch.tensor([point.terms[name] for point in run.history]).double(),
    }


def main(processes, folder):
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    for case in CASES:
        save_file(train(case, fabric), folder / f"{case}-{processes}-{fabric.global_rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
