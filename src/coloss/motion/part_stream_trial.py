"""What is measured of PSUMNet: one network on four modalities at once beside one on joints, four networks, and networks of parts."""

import time
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, MotionSplits, motion_splits
from coloss.metrics import knn_probe
from coloss.motion.part_streams import (
    MODALITIES,
    PartStream,
    PartStreamEnsemble,
    PartStreamNet,
    streams_of_parts,
)
from coloss.motion.score_fusion import fit_fusion_weights, fuse_scores
from coloss.train import Budget, Setting, cosine, fit

FRAMES, BATCH = 16, 16
STEPS, RATE = 150, 1.2e-2


def unified_against_joints(setting: Setting) -> dict[str, dict[str, float]]:
    """Cross-subject accuracy on MSR Action3D, parameters, and processor seconds of training, of every way to use the modalities.

    Every network has the same blocks and as many steps. Validation data, one training person drawn by seed, choose the weights of fused
    scores and nothing else.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    splits = _splits(setting.seed, 40 if setting.smoke else None)
    streams = streams_of_parts(splits.skeleton)
    steps = 2 if setting.smoke else STEPS
    train = partial(trained, splits=splits, steps=steps, seed=setting.seed)

    def net(part: str, modalities: Sequence[str]) -> PartStreamNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            return small_net(streams[part], splits.num_classes or 0, modalities)

    single = {name: train(net("body", (name,))) for name in MODALITIES}
    parts = {part: train(net(part, MODALITIES)) for part in streams}
    together = train(PartStreamEnsemble({part: net(part, MODALITIES) for part in streams}))
    return {
        "unified modalities": _judged([parts["body"]], splits),
        "joints": _judged([single["joint"]], splits),
        "bones": _judged([single["bone"]], splits),
        "four networks, one for each modality": _judged(list(single.values()), splits),
        "unified body, arms, legs": _judged(list(parts.values()), splits),
        "unified body, arms, legs, one loss": _judged([together], splits),
        "unified arms": _judged([parts["arms"]], splits),
        "unified legs": _judged([parts["legs"]], splits),
        "neighbours by raw coordinates": {"accuracy": _neighbours(None, splits)},
        "untrained network, neighbours": {"accuracy": _neighbours(net("body", MODALITIES), splits)},
    }


def small_net(stream: PartStream, classes: int, modalities: Sequence[str]) -> PartStreamNet:
    """Three plain blocks: relations between joints take four times as long on a CPU."""
    return PartStreamNet(
        stream, classes, modalities=modalities, widths=(16, 32, 64), strides=(2, 2, 2), graph="importance"
    )


@lru_cache(maxsize=2)
def _splits(seed: int, limit: int | None = None) -> MotionSplits:
    return motion_splits("msr-action3d", frames=FRAMES, seed=seed, limit=limit)


def trained(
    net: nn.Module, splits: MotionSplits, steps: int, seed: int, rate: float = RATE
) -> tuple[nn.Module, float]:
    """A network trained on the training clips, in evaluation mode, and the processor seconds it took.

    Args:
        net: takes clips.
        splits: of clips.
        steps: of 16 clips.
        seed: of the batches.
        rate: learning rate.
    """
    start = time.process_time()
    run = fit(
        net,
        splits.train,
        nn.functional.cross_entropy,
        budget=Budget(steps=steps),
        batch_size=BATCH,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
    )
    return run.model.cpu().eval(), time.process_time() - start


def scores_of(net: nn.Module, data: IndexedDataset) -> Tensor:
    """Log-probabilities of all clips."""
    with torch.no_grad():
        return torch.cat([net(clips) for clips in data.inputs.split(64)]).log_softmax(-1)  # type: ignore[union-attr]


def accuracy_of(scores: Tensor, data: IndexedDataset) -> float:
    """Share of clips whose class has the highest score."""
    assert isinstance(data.targets, Tensor)
    return (scores.argmax(-1) == data.targets).float().mean().item()


def _judged(nets: Sequence[tuple[nn.Module, float]], splits: MotionSplits) -> dict[str, float]:
    """Networks with fitted weights (`accuracy`) and with equal ones (`equal_weights_accuracy`)."""
    test = [scores_of(net, splits.test) for net, _ in nets]
    validation = [scores_of(net, splits.validation) for net, _ in nets]
    targets = splits.validation.targets
    assert isinstance(targets, Tensor)
    weights = fit_fusion_weights(validation, targets)
    found = {
        "accuracy": accuracy_of(fuse_scores(test, weights), splits.test),
        "equal_weights_accuracy": accuracy_of(fuse_scores(test), splits.test),
        "parameters": float(sum(p.numel() for net, _ in nets for p in net.parameters())),
        "train_cpu_seconds": sum(seconds for _, seconds in nets),
    }
    start = time.process_time()
    for net, _ in nets:
        scores_of(net, splits.test)
    found["test_cpu_ms_per_clip"] = (time.process_time() - start) / len(splits.test) * 1000
    return found


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
