"""Trains networks on several processes: `python mann_whitney_process.py PROCESSES FOLDER`; see `test_mann_whitney_retrieval.py`."""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file

from coloss.data import IndexedDataset
from coloss.nn import MLP, DualEncoder
from coloss.ops import world_size
from coloss.retrieval import MannWhitneyRetrieval
from coloss.train import Budget, Method, fit


class Masks(Method):
    """Threes of samples are relevant to each other, or unknown, where they meet on one process."""

    def on_batch(self, state):
        place = torch.arange(len(state.batch))
        met = (place[:, None] - place) % 2 == 0 if world_size() == 1 else torch.tensor(True)
        group = state.batch.ids // 3
        alike = (group[:, None] == group) & met & ~torch.eye(len(group), dtype=torch.bool)
        even = group[:, None] % 2 == 0
        state.batch.extras["relevance"] = torch.eye(len(group)) + (alike & even)
        state.batch.extras["ignore"] = alike & ~even


def first_value(outputs, targets):
    return outputs[0][:, 0].mean()


CASES = {
    "pairs": lambda: [MannWhitneyRetrieval(temperature=0.2)],
    "ids": lambda: [MannWhitneyRetrieval(temperature=0.2)],
    "queries": lambda: [MannWhitneyRetrieval(temperature=0.2, scope="query")],
    "beside": lambda: [MannWhitneyRetrieval(temperature=0.2, replace_objective=False, weight=0.5)],
    "masks": lambda: [Masks(), MannWhitneyRetrieval(temperature=0.2)],
    "drawn": lambda: [MannWhitneyRetrieval(temperature=0.2, num_negatives=7)],
}


def train(case, fabric):
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 50, 5, generator=generator, dtype=torch.float64)
    number = torch.arange(50)
    extras = {"document": number % 12, "query": number % 30} if case in ("ids", "queries") else {}
    torch.manual_seed(1)
    model = DualEncoder(*(MLP(5, (8,), 4, norm=None) for _ in range(2))).double()
    run = fit(
        model,
        IndexedDataset((queries, documents), extras=extras),
        first_value if case == "beside" else None,
        CASES[case](),
        budget=Budget(epochs=1),
        batch_size=16,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        log_every=1,
        fabric=fabric,
    )
    losses = torch.tensor([point.terms["mann_whitney"] for point in run.history], dtype=torch.float64)
    return {**run.model.state_dict(), "losses": losses}


def main(processes, folder):
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    for case in CASES:
        save_file(train(case, fabric), folder / f"{case}-{processes}-{fabric.global_rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
