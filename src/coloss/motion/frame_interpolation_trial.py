"""What is measured of losses through frozen networks: where joints are in the pictures of a small frame interpolator, told by a network apart."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coloss.motion.figure_networks import FigureNetwork, MaskNetwork
from coloss.motion.figure_sequences import FigureFrames, MotionParts, figure_frames, motion_parts
from coloss.motion.figure_training import (
    JUDGE_WIDTH,
    KEYPOINT_WIDTH,
    Stage,
    interpolated,
    judge_pictures,
    judged_joint_error,
    seeded,
    train_interpolator,
    train_keypoint_network,
    train_mask_network,
)
from coloss.motion.frame_interpolation import FrameInterpolator
from coloss.motion.human_aware_loss import mask_distance
from coloss.motion.interpolation_losses import heatmap_mse_loss, reconstruction_loss
from coloss.nn import FrozenTaskLoss
from coloss.train import Budget, FrozenTaskTerms, Setting, matched_weights

SIZE = 32
"""Side of a picture in pixels."""

PAIRS, JUDGED = 600, 400
"""Pairs of pictures to train and to judge on."""

NETWORK_STEPS, MASK_STEPS, BASE_STEPS, STEPS = 400, 250, 200, 70
"""Of the networks for joints, of the one for masks, of the interpolator before, and with terms; without, twice as many for as much compute."""


@dataclass(frozen=True)
class Tuning:
    """How an arm goes on from the base.

    Args:
        terms: names of its terms.
        ratio: norm of all its terms' gradient beside the objective's, at the start, as if they were orthogonal.
        rate: learning rate.
        steps: of training.

    Examples:
        >>> Tuning(("keypoints",), 2.0).rate
        0.001
    """

    terms: tuple[str, ...] = ()
    ratio: float = 0.0
    rate: float = 1e-3
    steps: int = STEPS


ARMS: Mapping[str, Tuning] = {
    "reconstruction": Tuning(steps=2 * STEPS),
    "keypoints": Tuning(("keypoints",), 6.0, 2e-3),
    "keypoints and masks": Tuning(("keypoints", "masks"), 6.0, 2e-3),
    "random features": Tuning(("random",), 2.0, 2e-3),
}
"""The arms of the claim, with the settings that were best for each on validation clips."""


class Networks(NamedTuple):
    """Networks that are the same for all seeds, none of which is trained further.

    Attributes:
        keypoints: for the keypoint term.
        masks: for the mask term.
        judge: finds joints in the pictures that are judged; other weights, width and training pictures than `keypoints`.
    """

    keypoints: FigureNetwork
    masks: MaskNetwork
    judge: FigureNetwork


@lru_cache(maxsize=1)
def bandai_parts() -> MotionParts:
    """Recorded motion of Bandai-Namco, divided."""
    return motion_parts("bandai")


@lru_cache(maxsize=2)
def trained_networks(smoke: bool = False) -> Networks:
    """The networks of the claim, trained once in a process.

    Args:
        smoke: one step on few pictures.
    """
    parts, pictures = bandai_parts(), 8 if smoke else 2000

    def stage(steps: int, seed: int) -> Stage:
        return Stage(Budget(steps=1 if smoke else steps), 10_000 + seed)

    return Networks(
        train_keypoint_network(parts, stage(NETWORK_STEPS, 0), size=SIZE, pictures=pictures),
        train_mask_network(parts, stage(MASK_STEPS, 1), size=SIZE, pictures=pictures),
        train_keypoint_network(
            parts, stage(NETWORK_STEPS, 2), size=SIZE, pictures=pictures, width=JUDGE_WIDTH
        ),
    )


def compare_terms(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: an interpolator trained on reconstruction, which then goes on in several ways, judged on pictures of test clips.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    return train_arms(setting.seed, ARMS, smoke=setting.smoke)


def train_arms(
    seed: int, arms: Mapping[str, Tuning], *, judged_on: str = "test", smoke: bool = False
) -> dict[str, dict[str, float]]:
    """Metrics of each arm, of the base, of blending the two pictures, and of the true pictures themselves.

    Args:
        seed: of the pictures drawn, the base's weights, the random features and the order of batches.
        arms: by name.
        judged_on: "validation" or "test".
        smoke: one step on few pictures.
    """
    parts, networks = bandai_parts(), trained_networks(smoke)
    generator = torch.Generator().manual_seed(seed)

    def draw(clips: str, count: int) -> FigureFrames:
        return figure_frames(
            getattr(parts, clips), 8 if smoke else count, size=SIZE, extent=parts.extent, generator=generator
        )

    train, judged = draw("train", PAIRS), draw(judged_on, JUDGED)
    losses = {
        "keypoints": FrozenTaskLoss(networks.keypoints, heatmap_mse_loss),
        "masks": FrozenTaskLoss(networks.masks, mask_distance),
    }
    if any("random" in tuning.terms for tuning in arms.values()):
        features = _random_features(networks.keypoints, train, seed)
        losses["random"] = FrozenTaskLoss(features, heatmap_mse_loss)
    base = train_interpolator(train, Stage(Budget(steps=1 if smoke else BASE_STEPS), seed))
    weights = _unit_weights(losses, base, train)
    found = {}
    for name, tuning in arms.items():
        share = tuning.ratio / max(len(tuning.terms), 1) ** 0.5
        methods = []
        if tuning.terms:
            chosen = {term: losses[term] for term in tuning.terms}
            methods = [FrozenTaskTerms(chosen, weights={term: share * weights[term] for term in chosen})]
        steps = 1 if smoke else tuning.steps
        started = time.process_time()
        network = train_interpolator(
            train,
            Stage(Budget(steps=steps), seed + 1),
            network=copy.deepcopy(base),
            rate=tuning.rate,
            methods=methods,
        )
        seconds = time.process_time() - started
        found[name] = judge_pictures(interpolated(network, judged), judged, networks.judge)
        found[name] |= {"cpu_ms_per_step": 1000 * seconds / steps, "steps": steps}
    first, last, share = judged.dataset.inputs
    truth = judged.dataset.targets
    assert isinstance(truth, Tensor)
    blend = torch.lerp(first, last, share[:, None, None, None])
    found["before"] = judge_pictures(interpolated(base, judged), judged, networks.judge)
    found["blend"] = judge_pictures(blend, judged, networks.judge)
    found["true pictures"] = {
        "joint_error": judged_joint_error(truth, judged, networks.judge),
        "motion": judged.motion,
    }
    return found


def _random_features(like: FigureNetwork, frames: FigureFrames, seed: int) -> nn.Module:
    """An untrained network of the same form, whose batch norms know the statistics of the pictures."""
    network = seeded(lambda: FigureNetwork(like.head.out_channels, KEYPOINT_WIDTH), 20_000 + seed).train()
    assert isinstance(frames.dataset.targets, Tensor)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]  # the plain mean
    with torch.no_grad():
        for some in frames.dataset.targets[:256].split(64):
            network(some)
    return network.eval()


def _unit_weights(
    losses: Mapping[str, FrozenTaskLoss], base: FrameInterpolator, frames: FigureFrames
) -> dict[str, float]:
    """Weights with which each term pulls at the base's pictures as strongly as the reconstruction loss."""
    batch = frames.dataset.take(torch.arange(min(128, len(frames.dataset))))
    prediction = base(batch.inputs)
    return matched_weights(losses, prediction, batch.targets, reconstruction_loss(prediction, batch.targets))
