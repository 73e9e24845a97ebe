"""Small tasks and methods for the lab's tests."""

from pathlib import Path

import pytest
import torch
from torch import nn

from coloss import Arm, Budget, Method, Task
from coloss.data import DATASETS, IndexedDataset, Splits, locate
from coloss.errors import DataNotFoundError
from coloss.metrics import evaluate_classifier

SUPPORT = Path(__file__).parent / "support"


@pytest.fixture
def needs():
    """Skips the test, with the loader's own message, if the file of a data set is not on this machine."""

    def check(name: str) -> str:
        if name in DATASETS and DATASETS[name].file is not None:
            try:
                locate(name)
            except DataNotFoundError as error:
                pytest.skip(str(error))
        return name

    return check


def points(seed: int) -> Splits:
    """Two clouds of points, drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 4, generator=generator)
    targets = (inputs[:, 0] + 0.3 * torch.randn(200, generator=generator) > 0).long()
    train, validation, test = (
        IndexedDataset(inputs[rows], targets[rows], torch.arange(200)[rows])
        for rows in (slice(0, 120), slice(120, 160), slice(160, 200))
    )
    return Splits("points", "classification", train, validation, test, (4,), num_classes=2)


@pytest.fixture
def task() -> Task:
    """A classification that a linear network solves in milliseconds."""
    return Task(
        name="points",
        kind="classification",
        title="two clouds of points",
        load=points,
        model=lambda splits: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2)),
        objective=nn.functional.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=Budget(steps=12),
        batch_size=32,
    )


class Watch(Method):
    """Notes what a run starts from and what it is fed; adds a term that draws on all its randomness."""

    def __init__(self, notes: list):
        super().__init__()
        self.notes = notes

    def setup(self, state):
        torch.rand(7)
        self.notes.append([parameter.detach().clone() for parameter in state.model.parameters()])
        self.head = nn.Linear(2, 1)

    def on_batch(self, state):
        self.notes.append(state.batch.ids.clone())

    def terms(self, state):
        torch.rand(3)
        noise = torch.rand(1, generator=state.generator)
        return {"watch": (self.head(state.outputs) * noise).square().mean()}


class Diverge(Method):
    """Makes the loss infinite at a step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def terms(self, state):
        return {"diverge": state.outputs.sum() * (float("nan") if state.step >= self.step else 0.0)}


@pytest.fixture
def watched():
    """Make an arm that notes, and its notes."""

    def make(name: str, plain: bool = False) -> tuple[Arm, list]:
        notes: list = []
        return Arm(name, lambda setting: [Watch(notes)] if not plain else [Silent(notes)]), notes

    return make


class Silent(Method):
    """Notes, and changes nothing."""

    def __init__(self, notes: list):
        super().__init__()
        self.notes = notes

    def setup(self, state):
        self.notes.append([parameter.detach().clone() for parameter in state.model.parameters()])

    def on_batch(self, state):
        self.notes.append(state.batch.ids.clone())


@pytest.fixture
def diverging():
    """Make an arm that diverges at a step."""
    return lambda step=5: Arm("diverging", lambda setting: [Diverge(step)])
