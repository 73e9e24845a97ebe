"""What the claims about encoders of skeletons without labels are measured on: MSR Action3D, tested on other persons."""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from coloss.data import MotionSplits, motion_splits
from coloss.motion.momentum_views import MomentumViewMethod
from coloss.motion.skeleton_evaluation import evaluate_skeleton_encoder
from coloss.nn import SkeletonEncoder
from coloss.ops import graph_partition
from coloss.train import Budget, Setting, Task

FRAMES = 16


def pretraining_task(budget: Budget, widths: tuple[int, int] = (16, 64)) -> Task:
    """An encoder of 16 frames in two blocks, trained on the clips of four persons without labels, tested on five others.

    The fifth training person, drawn by seed, is left for validation.

    Args:
        budget: of each arm.
        widths: channels of the blocks.

    Examples:
        >>> pretraining_task(Budget(steps=1)).kind
        'self-supervised'
    """
    return Task(
        name="msr-action3d-16-ssl",
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
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluate_every=10**9,
    )


def _encoder(splits: MotionSplits, widths: tuple[int, int]) -> nn.Module:
    return SkeletonEncoder(
        graph_partition(splits.skeleton.parents), splits.input_shape[0], widths, (2, 1), kernel=5
    )


def compare_pretraining(
    setting: Setting,
    arms: Mapping[str, Callable[[Setting], MomentumViewMethod]],
    untrained: Callable[[nn.Module, Setting], nn.Module] = lambda encoder, setting: encoder,
    split: str = "test",
) -> dict[str, dict[str, float]]:
    """Train a fresh encoder by each method, and probe it on other persons, frozen.

    Args:
        setting: on `pretraining_task`.
        arms: name -> what builds a fresh method.
        untrained: makes of a fresh encoder what the methods ship, where that is another network.
        split: "test" or "validation".

    Returns:
        For each arm, the untrained encoder and raw coordinates what `evaluate_skeleton_encoder` gives; for arms also the metrics and terms
        at the end of training.
    """
    trained, ends = {}, {}
    few: dict[str, Any] = {"batch_size": 8} if setting.smoke else {}
    for name, new_method in arms.items():
        run = setting.fit(setting.new_model(), methods=[new_method(setting)], **few)
        trained[name], ends[name] = run.model, run.history[-1].terms | run.history[-1].metrics
    parts = {"train": setting.splits.train, split: getattr(setting.splits, split)}
    if setting.smoke:
        parts = {name: part.subset(torch.arange(20)) for name, part in parts.items()}
    table = evaluate_skeleton_encoder(
        trained,
        SimpleNamespace(**parts),
        untrained=untrained(setting.new_model(), setting),
        split=split,
        label_shares=(),
        labels_per_class=() if setting.smoke else (3,),
        seed=setting.seed,
    )
    return {name: values | ends.get(name, {}) for name, values in table.items()}
