"""How the claim of layered self-distillation is measured: few pictures of clothes, a small network, every arm with its own recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from coloss.data import IndexedDataset, Splits, load
from coloss.data.dataset import Standardization
from coloss.metrics import evaluate_classifier
from coloss.nn import Classifier, ConvNet
from coloss.nn.operation_count import count_operations
from coloss.ops import rotate4
from coloss.train.budget import Budget
from coloss.train.method import Method
from coloss.train.state import State
from coloss.train.step import Objective, TrainingStep
from coloss.train.task import Setting

_TRAIN, _VALIDATION = 300, 200


@dataclass(frozen=True)
class Recipe:
    """How one arm trains.

    Args:
        epochs: length of training.
        rate: learning rate.
        methods: makes fresh methods.
        objective: the loss.
    """

    epochs: int
    rate: float
    methods: Callable[[], Sequence[Method]] = tuple
    objective: Objective = F.cross_entropy


class QuarterTurns(Method):
    """Trains on all four turns of each image as further images of its class: what self-distillation sees, as plain augmentation."""

    def on_batch(self, state: State) -> None:
        batch = state.batch
        assert batch.targets is not None and batch.ids is not None
        state.batch = replace(
            batch,
            inputs=rotate4(batch.inputs),
            targets=batch.targets.repeat_interleave(4),
            ids=batch.ids.repeat_interleave(4),
        )


def few_clothes(seed: int) -> Splits:
    """Fashion-MNIST at 14 x 14: 300 training and 200 validation images drawn by seed from the same 500; the other 400 are for tests."""
    splits = load("fashion-mnist", seed=0)
    assert isinstance(splits, Splits)
    whole = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in whole]) for name in ("inputs", "targets", "ids")
    )
    order = ids.argsort()
    inputs, targets, ids = F.avg_pool2d(inputs[order], 2), targets[order], ids[order]
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(12345))
    pool, test = shuffled.split([_TRAIN + _VALIDATION, len(ids) - _TRAIN - _VALIDATION])
    drawn = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    train, validation = drawn.split([_TRAIN, _VALIDATION])
    scale = Standardization(inputs[train].mean(), inputs[train].std())
    inputs = scale.apply(inputs)
    parts = [IndexedDataset(inputs[rows], targets[rows], ids[rows]) for rows in (train, validation, test)]
    return replace(
        splits, input_shape=(1, 14, 14), train=parts[0], validation=parts[1], test=parts[2], standardize=scale
    )


def small_network(splits: Splits) -> nn.Module:
    """Three convolutions of stride 2, 6,274 weights."""
    return Classifier(ConvNet(1, (8, 16, 32), downsample=(True, True, True)), 10)


def measure_arms(setting: Setting, arms: Mapping[str, Recipe]) -> dict[str, dict[str, float]]:
    """Accuracy and calibration of every arm on test images, and the multiply-adds of its forward passes in training."""
    found = {}
    for name, recipe in arms.items():
        run = setting.fit(
            setting.new_model(),
            recipe.objective,
            recipe.methods(),
            budget=setting.budget if setting.smoke else Budget(epochs=recipe.epochs),
            optimizer=partial(
                torch.optim.SGD, lr=recipe.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
            ),
        )
        found[name] = evaluate_classifier(run.model, setting.splits.test) | {
            "giga_multiply_adds": run.steps * _multiply_adds(setting, recipe) / 1e9
        }
    return found


def _multiply_adds(setting: Setting, recipe: Recipe) -> float:
    """Of the forward passes of one training step."""
    batch = setting.splits.train.take(torch.arange(setting.task.batch_size))
    with torch.random.fork_rng():
        step = TrainingStep(setting.new_model(), recipe.objective, recipe.methods())
        return count_operations(lambda: step(batch)) / 2
