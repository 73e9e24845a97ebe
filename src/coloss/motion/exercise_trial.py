"""What is measured of the fitness classifier: features that do not see the camera, beside coordinates; and what a leaking split tells."""

from functools import lru_cache, partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from coloss.data import load_motion
from coloss.metrics import knn_probe
from coloss.motion.exercise_data import ExerciseWindows, labelled_windows, moved
from coloss.motion.exercise_windows import WindowSplit, random_window_split
from coloss.motion.pose_features import FeatureKind, PoseSpec, frame_features, pose_spec
from coloss.motion.window_classifier import WindowClassifier
from coloss.train import Budget, Setting, cosine, fit

HIDDEN, STEPS = 32, 100
COPIES = 10
"""Copies of the training windows for the arm that is trained on moved ones, each moved in another way."""

ARMS: dict[str, tuple[FeatureKind, bool, float]] = {
    "raw coordinates": ("raw", False, 0.032),
    "invariant features": ("invariant", False, 0.032),
    "invariant, angles in the picture plane": ("invariant-2d", False, 0.016),
    "invariant features and raw coordinates": ("mixed", False, 0.004),
    "coordinates in the body's frame": ("body-frame", False, 0.032),
    "raw coordinates, trained on moved windows": ("raw", True, 0.008),
}
"""Kind of features, whether training windows are moved, and the learning rate: the best of six on validation persons, see the claim."""


def features_under_movement(setting: Setting) -> dict[str, dict[str, float]]:
    """Accuracy of every kind of features on HDM05's windows, as recorded (`accuracy`) and seen by another camera (`moved_accuracy`).

    Of five persons two are for the test and one for validation, other two for each of ten seeds (`persons_apart`); the network, its
    training and the windows are the same for all arms. "random windows" is another split of the same windows, by which test windows have
    neighbours of their own recording in training: what not to report.

    Args:
        setting: seed, and whether it is a smoke run.
    """
    windows, spec = _windows(8 if setting.smoke else 1)
    generator = torch.Generator().manual_seed(setting.seed)
    people = persons_apart(windows.groups, setting.seed)
    shares = len(people.test) / len(windows.targets)
    drawn = random_window_split(len(windows.targets), test=shares, validation=0.3, generator=generator)
    steps = 2 if setting.smoke else STEPS
    found = {
        name: _trained(windows, spec, people, kind, move, setting.seed, steps, rate)
        for name, (kind, move, rate) in ARMS.items()
    }
    for name in ("raw coordinates", "invariant features"):
        kind, move, rate = ARMS[name]
        found[f"{name}, random windows"] = _trained(
            windows, spec, drawn, kind, move, setting.seed, steps, rate
        )
    found["neighbours by raw coordinates"] = _neighbours(windows, spec, people, setting.seed)
    return found


def persons_apart(persons: Int[Tensor, " windows"], seed: int) -> WindowSplit:
    """Two of five or more persons for the test, one for validation, the others to train on.

    With five persons, seeds 0 to 4 test each person twice and each pair of neighbours once, seeds 5 to 9 the other five pairs, and so on
    from the beginning. Drawn at random, five seeds would often hold one pair twice.

    Args:
        persons: of each window.
        seed: which.

    Raises:
        ValueError: for fewer than five persons.

    Examples:
        >>> persons_apart(torch.arange(5), 0)
        WindowSplit(train=tensor([3, 4]), validation=tensor([2]), test=tensor([0, 1]))
        >>> [persons_apart(torch.arange(5), seed).test.tolist() for seed in (4, 5, 9, 10)]
        [[0, 4], [0, 2], [1, 4], [0, 1]]
    """
    who = persons.unique()
    count = len(who)
    if count < 5:
        raise ValueError(f"persons must be at least five, got {count}")
    apart = 1 + seed // count % (count // 2)
    held = who[torch.tensor([seed % count, (seed + apart) % count])]
    chosen = next(who[(seed + k) % count] for k in range(1, count) if who[(seed + k) % count] not in held)
    test, validation = torch.isin(persons, held), persons == chosen
    return WindowSplit(*(part.nonzero().flatten() for part in (~test & ~validation, validation, test)))


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
    rate: float,
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
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01, fused=True),
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
