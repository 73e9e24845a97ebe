"""What is measured of hop-wise attention: lifters of as many parameters and operations on the same poses, with and without it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from coloss.data import MotionClips, Skeleton, load_motion
from coloss.data.skeleton import COMMON, COMMON_JOINTS
from coloss.metrics import pose_report
from coloss.motion.hop_graph_former import HopGraphFormer
from coloss.motion.lifting_data import LiftingSplits, lifting_splits
from coloss.train import Budget, cosine, fit
from coloss.train.task import Setting

STEPS, BATCH = 800, 64


@dataclass(frozen=True)
class Lifter:
    """A network and the learning rate that was best for it on validation poses of other seeds.

    Args:
        build: from a skeleton.
        learning_rate: peak of AdamW's.
    """

    build: Callable[[Skeleton], nn.Module]
    learning_rate: float


def hops(
    max_hop: int, dim: int, depth: int, *, attention: bool, limbs: bool = False
) -> Callable[[Skeleton], nn.Module]:
    """Builds a `HopGraphFormer`; limbs are refined only where asked for.

    Examples:
        >>> hops(1, 8, 2, attention=False)(COMMON).joints
        15
    """

    def build(skeleton: Skeleton) -> nn.Module:
        options = {} if limbs else {"limbs": ()}
        return HopGraphFormer.for_skeleton(
            skeleton,
            max_hop,
            dim=dim,
            depth=depth,
            heads=2 if attention else 1,
            attention=attention,
            **options,
        )

    return build


LIFTERS: Mapping[str, Lifter] = {
    "one-hop graph convolution": Lifter(hops(1, 26, 8, attention=False), 2e-2),
    "hop attention": Lifter(hops(3, 32, 2, attention=True), 2e-2),
}
"""The arms of the claim: 38,105 and 35,755 parameters, 223 and 212 million operations for a step."""


def fifteen_joints() -> MotionClips:
    """The Bandai-Namco clips with the fifteen joints that bodies of all sets share, in metres, limbs of three joints each.

    Examples:
        >>> fifteen_joints().joints.shape[1]  # doctest: +SKIP
        15
    """
    clips = load_motion("bandai")
    return replace(clips, joints=clips.joints[:, list(COMMON_JOINTS["bandai"])], skeleton=COMMON)


def trained(lifter: Lifter, splits: LiftingSplits, seed: int, steps: int = STEPS) -> nn.Module:
    """A lifter trained with the mean squared error, from the same batches as any other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lifter.build(splits.train.skeleton)
    return fit(
        model,
        splits.train.dataset(),
        nn.functional.mse_loss,
        budget=Budget(steps=steps),
        batch_size=BATCH,
        optimizer=partial(torch.optim.AdamW, lr=lifter.learning_rate, weight_decay=1e-4),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
    ).model.cpu()


def compare_lifters(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: errors of the lifters on test poses, in millimetres, averaged over actions.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    clips = fifteen_joints()
    clips = clips.select(range(0, len(clips), 10)) if setting.smoke else clips
    splits = lifting_splits(
        clips,
        seed=setting.seed,
        train_frames=1 if setting.smoke else 60,
        test_frames=1 if setting.smoke else 12,
    )
    test, found = splits.test, {}
    for name, lifter in LIFTERS.items():
        model = trained(lifter, splits, setting.seed, 2 if setting.smoke else STEPS)
        with torch.no_grad():
            report = pose_report(model(test.image), test.pose, test.labels["action"])
        found[name] = report | {"parameters": float(sum(p.numel() for p in model.parameters()))}
    return found
