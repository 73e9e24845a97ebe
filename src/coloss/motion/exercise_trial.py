"""What is measured of the fitness classifier: features that do not see the camera, beside coordinates; and what a leaking split tells."""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from coloss.data import load_motion
from coloss.metrics import knn_probe
from coloss.motion.exercise_data import ExerciseWindows, labelled_windows, moved
from coloss.motion.exercise_windows import WindowSplit, group_window_split, random_window_split
from coloss.motion.pose_features import FeatureKind, PoseSpec, frame_features, pose_spec
from coloss.motion.window_classifier import WindowClassifier
from coloss.train import Budget, Setting, cosine, fit

HIDDEN, STEPS = 32, 100
RATE = 8e-3
COPIES = 10
"""Copies of the training windows for the arm that is trained on moved ones, each moved in another way."""

ARMS: dict[str, tuple[FeatureKind, bool]] = {
    "raw coordinates": ("raw", False),
    "invariant features": ("invariant", False),
    "invariant, angles in the picture plane": ("invariant-2d", False),
    "invariant features and raw coordinates": ("mixed", False),
    "coordinates in the body's frame": ("body-frame", False),
    "raw coordinates, trained on moved windows": ("raw", True),
}
"""Kind of features, and whether training windows are moved."""


def features_under_movement(setting: Setting) -> dict[str, dict[str, float]]:
    """Accuracy of every kind of features on HDM05's windows, as recorded (`accuracy`) and seen by another camera (`moved_accuracy`).

    Of five persons the seed draws two for the test and one for validation; the network, its training and the windows are the same for
    all arms. "random windows" is another split of the same windows, by which test windows have neighbours of their own recording in
    training: what not to report.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    windows, spec = _windows(8 if setting.smoke else 1)
    generator = torch.Generator().manual_seed(setting.seed)
    people = group_window_split(windows.persons, test=0.4, validation=0.3, generator=generator)
    shares = len(people.test) / len(windows.targets)
    drawn = random_window_split(len(windows.targets), test=shares, validation=0.3, generator=generator)
    steps = 2 if setting.smoke else STEPS
    found = {
        name: _trained(windows, spec, people, kind, move, setting.seed, steps)
        for name, (kind, move) in ARMS.items()
    }
    for name in ("raw coordinates", "invariant features"):
        found[f"{name}, random windows"] = _trained(
            windows, spec, drawn, ARMS[name][0], False, setting.seed, steps
        )
    found["neighbours by raw coordinates"] = _neighbours(windows, spec, people, setting.seed)
    return found


@lru_cache(maxsize=1)
def _windows(every: int = 1) -> tuple[ExerciseWindows, PoseSpec]:
    """All clips, or every so many of them."""
    clips = load_motion("hdm05")
    clips = clips.select(range(0, len(clips), every))
    return labelled_windows(clips, generator=torch.Generator().manual_seed(0)), pose_spec(clips.skeleton)


def _trained(
    windows: ExerciseWindows,
    spec: PoseSpec,
    split: WindowSplit,
    kind: FeatureKind,
    move: bool,
    seed: int,
    steps: int,
    rate: float = RATE,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1000 + seed)
    joints, targets = windows.joints[split.train], windows.targets[split.train]
    if move:
        joints = torch.cat([joints, *(moved(joints, generator) for _ in range(COPIES - 1))])
        targets = targets.repeat(COPIES)
    inputs = frame_features(joints, spec, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WindowClassifier(inputs.shape[-1], len(windows.labels), HIDDEN)
    model.scaler.fit(inputs)
    run = fit(
        model,
        (inputs, targets),
        nn.functional.cross_entropy,
        budget=Budget(steps=steps),
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
    )
    trained = run.model.cpu().eval()

    def accuracy(joints: Tensor, targets: Tensor) -> float:
        with torch.no_grad():
            found = trained(frame_features(joints, spec, kind)).argmax(-1)
        return (found == targets).float().mean().item()

    test, wanted = windows.joints[split.test], windows.targets[split.test]
    return {
        "accuracy": accuracy(test, wanted),
        "moved_accuracy": accuracy(moved(test, torch.Generator().manual_seed(seed)), wanted),
        "validation_accuracy": accuracy(windows.joints[split.validation], windows.targets[split.validation]),
    }


def _neighbours(windows: ExerciseWindows, spec: PoseSpec, split: WindowSplit, seed: int) -> dict[str, float]:
    test = windows.joints[split.test]
    train = frame_features(windows.joints[split.train], spec, "raw")
    middle = train.flatten(0, 1).nanmean(0)
    found = {}
    for name, joints in (
        ("accuracy", test),
        ("moved_accuracy", moved(test, torch.Generator().manual_seed(seed))),
    ):
        rows = frame_features(joints, spec, "raw")
        found[name] = knn_probe(
            torch.where(train.isnan(), middle, train).flatten(1),
            windows.targets[split.train],
            torch.where(rows.isnan(), middle, rows).flatten(1),
            windows.targets[split.test],
            k=5,
            temperature=None,
            metric="euclidean",
        ).accuracy
    return found
