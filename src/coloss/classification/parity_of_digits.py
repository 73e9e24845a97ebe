"""A small stage for weak-to-strong generalisation: even or odd digits, told by a supervisor that hardly sees them.

The strong model knows digits from 2,000 images of its own, whose ten classes it was trained to tell apart; the supervisor sees four
principal components. The strong model is then fine-tuned, all of it, on the supervisor's labels for the new task, parity. Images are
those of MNIST, two by two pixels averaged.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.classification.gap_recovered import performance_gap_recovered
from coloss.data import IndexedDataset, Splits, load
from coloss.nn import MLP, Classifier
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.schedules import cosine
from coloss.train.task import Setting

SIZES = {"pretraining": 2000, "labelled": 1000, "unlabelled": 3000}
PRETRAINING_STEPS, STEPS = 600, 1500
BATCH_SIZE, LEARNING_RATE, COMPONENTS = 64, 1e-3, 4


def digits_parts(seed: int) -> dict[str, IndexedDataset]:
    """Disjoint parts of the digits: pretraining with ten classes, then labelled, unlabelled and test with parity."""
    inputs, targets, ids = _all_digits()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    sizes = [*SIZES.values(), len(inputs) - sum(SIZES.values())]
    parts = {}
    for name, rows in zip([*SIZES, "test"], order.split(sizes)):
        labels = targets[rows] if name == "pretraining" else targets[rows] % 2
        parts[name] = IndexedDataset(inputs[rows], labels, ids[rows])
    return parts


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Tensor, Tensor, Tensor]:
    splits = load("mnist")
    assert isinstance(splits, Splits)
    whole = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in whole]) for name in ("inputs", "targets", "ids")
    )
    return F.avg_pool2d(inputs, 2).flatten(1), targets, ids


def pretrained(data: IndexedDataset, seed: int, steps: int) -> Classifier:
    """A small network that tells ten digits apart."""
    model = Classifier(MLP(data[0][0].numel(), (64, 32), norm=None), 10)
    _train(model, data, (), seed=seed, steps=steps, learning_rate=3 * LEARNING_RATE)
    return model


def measure_parity(
    setting: Setting,
    protocol: Callable[..., Any],
    losses: Mapping[str, Callable[[], Method]],
) -> dict[str, dict[str, float]]:
    """One seed of all arms; the supervisor and the ceiling are arms as well."""
    seed = setting.seed
    before, steps = (3, 3) if setting.smoke else (PRETRAINING_STEPS, STEPS)
    parts = digits_parts(seed)
    seen = parts["labelled"].inputs
    assert isinstance(seen, Tensor)
    backbone = pretrained(parts["pretraining"], seed, before).backbone

    def strong() -> nn.Module:
        return _with_zero_head(copy.deepcopy(backbone), 32)

    def weak() -> nn.Module:
        return _with_zero_head(principal_components(seen, COMPONENTS), COMPONENTS)

    report = protocol(
        weak,
        strong,
        parts["labelled"],
        parts["unlabelled"],
        parts["test"],
        losses=losses,
        train=partial(_train, seed=seed, steps=steps),
    )
    found = {
        "supervisor": {"accuracy": report.weak, "weak_label_accuracy": report.weak_label_accuracy},
        "ceiling": {"accuracy": report.ceiling},
    }
    for name, student in report.students.items():
        found[name] = {
            "accuracy": student.accuracy,
            "gap_recovered": performance_gap_recovered(report.weak, student.accuracy, report.ceiling),
            "agreement": student.agreement,
            "imitated_errors": student.imitated_errors,
        }
    return found


def principal_components(inputs: Tensor, count: int) -> nn.Linear:
    """A fixed layer that gives the first principal components, each with variance 1."""
    mean = inputs.mean(0)
    _, scale, directions = torch.linalg.svd(inputs - mean, full_matrices=False)
    layer = nn.Linear(inputs.shape[1], count).requires_grad_(False)
    weight = directions[:count] * (len(inputs) ** 0.5 / scale[:count, None])
    layer.weight.copy_(weight)
    layer.bias.copy_(-weight @ mean)
    return layer


def _with_zero_head(features: nn.Module, width: int) -> nn.Module:
    head = nn.Linear(width, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(features, head)


def _train(
    model: nn.Module,
    data: IndexedDataset,
    methods: Sequence[Method],
    *,
    seed: int,
    steps: int,
    learning_rate: float = LEARNING_RATE,
) -> nn.Module:
    return fit(
        model,
        data,
        F.cross_entropy,
        methods,
        budget=Budget(steps=steps),
        batch_size=BATCH_SIZE,
        optimizer=partial(torch.optim.Adam, lr=learning_rate),
        learning_rate_schedule=cosine(),
        seed=seed,
    ).model
