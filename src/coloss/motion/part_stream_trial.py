"""What is measured of PSUMNet: one network on four modalities at once beside one on joints, four networks, and networks of parts."""

import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, MotionSplits, motion_splits
from coloss.metrics import knn_probe
from coloss.motion.clip_crops import ClipCrops
from coloss.motion.part_streams import MODALITIES, PartStreamNet, streams_of_parts
from coloss.motion.score_fusion import fit_fusion_weights, fuse_scores
from coloss.train import Budget, Setting, cosine, fit

FRAMES, BATCH, STEPS = 16, 16, 300

RATES: dict[tuple[str, tuple[str, ...]], float] = {
    ("body", ("joint",)): 0.006,
    ("body", ("bone",)): 0.006,
    ("body", ("motion",)): 0.006,
    ("body", ("bone_motion",)): 0.006,
    ("body", MODALITIES): 0.012,
    ("arms", MODALITIES): 0.024,
    ("legs", MODALITIES): 0.024,
}
"""Learning rate of each network by its part and modalities: the best of five on validation persons, see the claim."""


class Judged(NamedTuple):
    """A trained network and what it says of clips that it was not trained on.

    Attributes:
        test: log-probabilities of the test clips.
        validation: of the validation clips.
        parameters: of the network.
        train_seconds: of a processor.
        test_seconds: of a processor, for all test clips.
    """

    test: Tensor
    validation: Tensor
    parameters: int
    train_seconds: float
    test_seconds: float


def unified_against_joints(setting: Setting) -> dict[str, dict[str, float]]:
    """Cross-subject accuracy on MSR Action3D, parameters, and processor seconds of training, of every way to use the modalities.

    Every network has the same blocks and as many steps, at its own rate of `RATES`. Validation data, one training person drawn by seed,
    choose the weights of fused scores and nothing else.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    splits = _splits(setting.seed, 40 if setting.smoke else None)
    steps = 2 if setting.smoke else STEPS
    single = {name: _judged("body", (name,), splits, steps, setting.seed) for name in MODALITIES}
    parts = {
        part: _judged(part, MODALITIES, splits, steps, setting.seed)
        for part in streams_of_parts(splits.skeleton)
    }
    untrained = small_net("body", MODALITIES, splits, setting.seed)
    return {
        "unified modalities": _fused([parts["body"]], splits),
        "joints": _fused([single["joint"]], splits),
        "bones": _fused([single["bone"]], splits),
        "four networks, one for each modality": _fused(list(single.values()), splits),
        "unified body, arms, legs": _fused(list(parts.values()), splits),
        "unified arms": _fused([parts["arms"]], splits),
        "unified legs": _fused([parts["legs"]], splits),
        "neighbours by raw coordinates": {"accuracy": _neighbours(None, splits)},
        "untrained network, neighbours": {"accuracy": _neighbours(untrained, splits)},
    }


def small_net(part: str, modalities: Sequence[str], splits: MotionSplits, seed: int) -> PartStreamNet:
    """Three blocks with a weight for every pair of joints: relations that depend on the clip take four times as long on a CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PartStreamNet(
            streams_of_parts(splits.skeleton)[part],
            splits.num_classes or 0,
            modalities=modalities,
            widths=(16, 32, 64),
            strides=(2, 2, 2),
            graph="additive",
        )


@lru_cache(maxsize=2)
def _splits(seed: int, limit: int | None = None) -> MotionSplits:
    return motion_splits("msr-action3d", frames=FRAMES, seed=seed, limit=limit)


def trained(net: nn.Module, splits: MotionSplits, steps: int, seed: int, rate: float) -> nn.Module:
    """A network trained on random stretches of the training clips, turned a little; in evaluation mode.

    Args:
        net: takes clips.
        splits: of clips.
        steps: of 16 clips.
        seed: of the batches.
        rate: learning rate.
    """
    run = fit(
        net,
        splits.train,
        nn.functional.cross_entropy,
        [ClipCrops()],
        budget=Budget(steps=steps),
        batch_size=BATCH,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01, fused=True),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
    )
    return run.model.cpu().eval()


def scores_of(net: nn.Module, data: IndexedDataset) -> Tensor:
    """Log-probabilities of all clips."""
    with torch.no_grad():
        return torch.cat([net(clips) for clips in data.inputs.split(64)]).log_softmax(-1)  # type: ignore[union-attr]


def accuracy_of(scores: Tensor, data: IndexedDataset) -> float:
    """Share of clips whose class has the highest score."""
    assert isinstance(data.targets, Tensor)
    return (scores.argmax(-1) == data.targets).float().mean().item()


def _judged(part: str, modalities: tuple[str, ...], splits: MotionSplits, steps: int, seed: int) -> Judged:
    net = small_net(part, modalities, splits, seed)
    start = time.process_time()
    found = trained(net, splits, steps, seed, RATES[part, modalities])
    between = time.process_time()
    test = scores_of(found, splits.test)
    end = time.process_time()
    parameters = sum(parameter.numel() for parameter in found.parameters())
    return Judged(test, scores_of(found, splits.validation), parameters, between - start, end - between)


def _fused(nets: Sequence[Judged], splits: MotionSplits) -> dict[str, float]:
    """Networks with fitted weights (`accuracy`) and with equal ones (`equal_weights_accuracy`)."""
    test, targets = [net.test for net in nets], splits.validation.targets
    assert isinstance(targets, Tensor)
    weights = fit_fusion_weights([net.validation for net in nets], targets) if len(nets) > 1 else None
    return {
        "accuracy": accuracy_of(fuse_scores(test, weights), splits.test),
        "equal_weights_accuracy": accuracy_of(fuse_scores(test), splits.test),
        "parameters": float(sum(net.parameters for net in nets)),
        "train_cpu_seconds": sum(net.train_seconds for net in nets),
        "test_cpu_ms_per_clip": sum(net.test_seconds for net in nets) / len(splits.test) * 1000,
    }


def _neighbours(net: PartStreamNet | None, splits: MotionSplits) -> float:
    """Accuracy of five neighbours: by coordinates, or by what an untrained network makes of them."""

    def rows(data: IndexedDataset) -> Tensor:
        clips = data.inputs
        assert isinstance(clips, Tensor)
        if net is None:
            return clips.flatten(1)
        with torch.no_grad():
            return net.eval().encoded(clips)

    train, test = splits.train, splits.test
    assert isinstance(train.targets, Tensor) and isinstance(test.targets, Tensor)
    return knn_probe(
        rows(train), train.targets, rows(test), test.targets, k=5, temperature=None, metric="euclidean"
    ).accuracy
