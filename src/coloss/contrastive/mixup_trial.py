"""What is measured of multimodal mixup: digits cut into two halves, few labels, noise on the training inputs."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits, halves, load
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, FusionClassifier
from coloss.train import Budget, Method, State, Task

LABELS = 100
NOISE = 0.1


class InputNoise(Method):
    """Gaussian noise on every training input, the same for all arms.

    Args:
        scale: standard deviation.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def on_batch(self, state: State) -> None:
        state.batch.inputs = tuple(
            part + self.scale * torch.randn(part.shape, generator=state.local_generator).to(part)
            for part in state.batch.inputs
        )


def halves_task(budget: Budget) -> Task:
    """A fusion of two perceptrons on the halves of 100 digits; all the others test it.

    Args:
        budget: of each arm.

    Examples:
        >>> splits = halves_task(Budget(epochs=1)).load(0)
        >>> [part.shape for part in splits.train.inputs], len(splits.test)
        ([torch.Size([100, 1, 4, 8]), torch.Size([100, 1, 4, 8])], 1697)
    """
    return Task(
        name="digits-halves-100",
        kind="classification",
        title="100 digits, each as its top and its bottom half",
        load=_few_halves,
        model=_fusion,
        objective=F.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: {},
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=budget,
        batch_size=50,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluate_every=10**9,
    )


def _few_halves(seed: int) -> Splits:
    """100 training digits drawn by the seed; the test part holds all others."""
    splits = load("digits", seed=seed)
    assert isinstance(splits, Splits)
    parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")
    )
    everything = IndexedDataset(inputs, targets, ids)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    splits.train, splits.test = everything.subset(order[:LABELS]), everything.subset(order[LABELS:])
    splits.validation = everything.subset(order[:0])
    return halves(splits)


def _fusion(splits: Any) -> nn.Module:
    half: Tensor = splits.train.inputs[0][0]
    return FusionClassifier([MLP(half.numel(), [128], 64, norm=None) for _ in range(2)], splits.num_classes)
