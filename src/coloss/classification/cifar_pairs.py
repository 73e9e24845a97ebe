"""Pairs of CIFAR-10 classes that look alike, as small binary problems on which a perceptron overfits: one compares objectives there.

Images are averaged down to 8x8 pixels; some 960 of a pair are for training, 400 for the test. The perceptron (192-256-256-256-2, batch
normalisation) learns them by heart within 40 epochs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.data import IndexedDataset, Splits, load
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP
from coloss.train import Budget, Method, Objective, Setting, cosine, fit

PAIRS = {"cat-dog": (3, 5), "deer-horse": (4, 7), "automobile-truck": (1, 9)}

Arms = Mapping[str, tuple[Objective | None, Callable[[], Sequence[Method]]]]
"""Name -> objective and fresh methods."""


def hinge_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of max(0, 1 - m), the margin m being the difference of two logits.

    Examples:
        >>> hinge_loss(torch.tensor([[0.0, 3.0], [0.0, -0.5]]), torch.tensor([1, 1]))
        tensor(0.7500)
    """
    return (1 - (logits[:, 1] - logits[:, 0]) * (2 * targets - 1)).clamp(min=0).mean()


def compare_on_pairs(setting: Setting, arms: Arms) -> dict[str, dict[str, float]]:
    """Test accuracy of every arm after training, by pair and on average.

    Args:
        setting: its seed draws split, initial weights and batches.
        arms: what to compare.

    Returns:
        Arm -> `accuracy` (mean over pairs), `training_accuracy`, and `accuracy_<pair>`.
    """
    splits = load("cifar10", seed=setting.seed, limit=200 if setting.smoke else None)
    assert isinstance(splits, Splits)
    budget = Budget(steps=3) if setting.smoke else Budget(epochs=40)
    found: dict[str, dict[str, float]] = {}
    for name, (objective, methods) in arms.items():
        scores: dict[str, float] = {}
        learnt = []
        for pair, classes in PAIRS.items():
            train, test = (_pair(part, *classes) for part in (splits.train, splits.test))
            with torch.random.fork_rng():
                torch.manual_seed(setting.seed)
                model = MLP(192, (256, 256, 256), 2)
            fit(
                model,
                train,
                objective,
                methods(),
                budget=budget,
                batch_size=64,
                optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
                learning_rate_schedule=cosine(),
                log_every=1000,
                seed=setting.seed,
            )
            scores[f"accuracy_{pair}"] = evaluate_classifier(model, test)["accuracy"]
            learnt.append(evaluate_classifier(model, train)["accuracy"])
        found[name] = {
            "accuracy": sum(scores.values()) / len(scores),
            "training_accuracy": sum(learnt) / len(learnt),
            **scores,
        }
    return found


def _pair(part: IndexedDataset, first: int, second: int) -> IndexedDataset:
    assert isinstance(part.inputs, Tensor) and isinstance(part.targets, Tensor)
    rows = ((part.targets == first) | (part.targets == second)).nonzero().squeeze(1)
    pixels = F.avg_pool2d(part.inputs[rows], 4).flatten(1)
    return IndexedDataset((pixels - 0.47) / 0.2, (part.targets[rows] == second).long())
