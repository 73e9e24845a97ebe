"""What the claims about encoders of skeletons without labels are measured on: MSR Action3D, tested on other persons."""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from coloss.data import MotionSplits, View, crop_and_shear, motion_splits
from coloss.motion.clip_crops import ClipCrops
from coloss.motion.momentum_views import MomentumViewMethod
from coloss.motion.skeleton_evaluation import evaluate_skeleton_encoder
from coloss.nn import Classifier, SkeletonEncoder
from coloss.ops import graph_partition
from coloss.train import Budget, Setting, Task

FRAMES = 12
LABELLED = "trained with labels"
"""Row of the table: what the encoder's features are worth after as many steps on all labels."""


class Pretraining(NamedTuple):
    """One arm: a method and the choices that were searched for it.

    Attributes:
        method: builds it afresh, for a setting and a view.
        shear: amplitude of the views' shear.
        learning_rate: of AdamW.
    """

    method: Callable[[Setting, View], MomentumViewMethod]
    shear: float
    learning_rate: float


def pretraining_task(budget: Budget, batch_size: int = 64, widths: tuple[int, int] = (8, 32)) -> Task:
    """An encoder of 12 frames in two blocks, trained on the clips of four persons without labels, tested on five others.

    The fifth training person, drawn by seed, is left for validation. Graph convolutions begin with the mean over a joint and its
    neighbours, and learn the weight of every pair of joints.

    Args:
        budget: of each arm.
        batch_size: clips in a step.
        widths: channels of the blocks.

    Examples:
        >>> pretraining_task(Budget(steps=1)).kind
        'self-supervised'
    """
    return Task(
        name=f"msr-action3d-{FRAMES}-ssl",
        kind="self-supervised",
        title="an encoder for MSR Action3D without labels, judged by probes on other persons",
        load=lambda seed: motion_splits("msr-action3d", frames=FRAMES, seed=seed),
        model=partial(_encoder, widths=widths),
        objective=None,
        objective_name="untrained",
        validate=lambda model, splits: {},
        test=lambda model, splits: {},
        metric="linear",
        budget=budget,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        evaluate_every=10**9,
    )


def _encoder(splits: MotionSplits, widths: tuple[int, int]) -> nn.Module:
    partition = graph_partition(splits.skeleton.parents, "uniform")
    return SkeletonEncoder(partition, splits.input_shape[0], widths, (2, 1), kernel=5, graph="additive")


def compare_pretraining(
    setting: Setting,
    arms: Mapping[str, Pretraining],
    shipped: Callable[[nn.Module, Setting], nn.Module] = lambda encoder, setting: encoder,
    split: str = "test",
) -> dict[str, dict[str, float]]:
    """Train a fresh encoder by each method, and probe it on other persons, frozen.

    Args:
        setting: on `pretraining_task`.
        arms: by name.
        shipped: makes of a fresh encoder what the methods ship, where that is another network.
        split: "test" or "validation".

    Returns:
        For each arm, an encoder trained with labels, the untrained encoder and raw coordinates what `evaluate_skeleton_encoder` gives; for
        arms also the metrics and terms at the end of training.
    """
    trained, ends = {}, {}
    few: dict[str, Any] = {"batch_size": 8} if setting.smoke else {}
    for name, arm in arms.items():
        run = setting.fit(
            setting.new_model(),
            methods=[arm.method(setting, partial(crop_and_shear, amplitude=arm.shear))],
            optimizer=partial(torch.optim.AdamW, lr=arm.learning_rate),
            **few,
        )
        trained[name], ends[name] = run.model, run.history[-1].terms | run.history[-1].metrics
    labelled = Classifier(shipped(setting.new_model(), setting), setting.splits.num_classes or 0)
    setting.fit(labelled, nn.functional.cross_entropy, methods=[ClipCrops()], **few)
    trained[LABELLED] = labelled.backbone
    parts = {"train": setting.splits.train, split: getattr(setting.splits, split)}
    if setting.smoke:
        parts = {name: part.subset(torch.arange(20)) for name, part in parts.items()}
    table = evaluate_skeleton_encoder(
        trained,
        SimpleNamespace(**parts),
        untrained=shipped(setting.new_model(), setting),
        split=split,
        label_shares=(),
        seed=setting.seed,
    )
    return {name: values | ends.get(name, {}) for name, values in table.items()}
