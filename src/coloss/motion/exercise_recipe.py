"""From recorded motion to a monitor that tells exercises and counts them, in one call."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, MotionClips, load_motion
from coloss.errors import InputError
from coloss.metrics import knn_probe, predict
from coloss.motion.counter_choice import CounterChoice, choose_counter
from coloss.motion.exercise_data import (
    ExerciseWindows,
    axis_factors,
    chained,
    grouped,
    hide_joints,
    in_one_unit,
    known_repetitions,
    labelled_windows,
    moved,
    recordings_at,
)
from coloss.motion.exercise_monitor import ExerciseModel
from coloss.motion.pose_features import (
    FeatureKind,
    PoseSpec,
    frame_features,
    invariant_pose_features,
    pose_spec,
)
from coloss.motion.window_classifier import WindowClassifier
from coloss.train import Budget, cosine, fit, load_model, save_model
from coloss.train.atomic_text import write_atomically
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

_FPS, _WINDOW, _STRIDE = 15.0, 16, 8
_STEPS, _RATE = 600, 2e-3
_HIDDEN, _DROPOUT = 91, 0.4
_SESSIONS = 20


def train_exercise_monitor(
    data: str | Path = "hdm05",
    folder: str | Path = "runs/fitness-bilstm",
    *,
    features: str = "body-frame",
    hidden: int = _HIDDEN,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a classifier of windows and chooses a counter for every class whose repetitions are known; behind `coloss run fitness-bilstm`.

    Windows of 16 frames at 15 frames a second, the paper's network, and copies of the training windows in which joints are missing or the
    recording has just begun. A run that was stopped goes on in its folder.

    Args:
        data: `"hdm05"` (eleven motions, squats, kicks and hops among them; test persons are new), `"bandai"` (walks, waves and others in
            many styles; tested on pairs of them that nobody trained on), `"msr-action3d"` (its depth is brought to the unit of the other
            axes by `axis_factors`), or a file that `load_motion` reads, with `repetitions` for its counts.
        folder: for `model.safetensors`, `run.json`, `counters.json`, `metrics.json` and checkpoints; `load_exercise_model` reads it.
        features: kind of features, see `frame_features`.
        hidden: units of each LSTM in each direction.
        budget: of the training; default: 600 steps.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On the test part: `accuracy` by window and `recording_accuracy`; `moved_accuracy` of windows turned by up to 90 degrees, scaled
        and shifted; `missing_accuracy` with a fifth of the joints hidden; `raw_knn_accuracy` of neighbours by coordinates and
        `untrained_knn_accuracy` by the network as it began; where repetitions are known, `count_error` (mean over sessions, in
        repetitions), `count_exact` (share of sessions) and `repetitions` (mean of what was to be counted).

    Raises:
        InputError: for data or a skeleton that will not do, an unknown kind of features, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_exercise_monitor(
        ...     "hdm05", tempfile.mkdtemp(), hidden=8, budget=Budget(steps=2)
        ... )  # doctest: +SKIP
        >>> metrics["count_exact"] > 0.5  # doctest: +SKIP
        True
    """
    if features not in get_args(FeatureKind):
        raise InputError(f"features must be one of {', '.join(get_args(FeatureKind))}, got {features!r}")
    if hidden < 1:
        raise InputError(f"hidden must be >= 1, got {hidden}")
    clips, folder = load_motion(data), Path(folder)
    spec, axes = pose_spec(clips.skeleton), axis_factors(clips)
    clips = in_one_unit(clips, axes)
    generator = torch.Generator().manual_seed(seed)
    windows = labelled_windows(clips, fps=_FPS, window=_WINDOW, stride=_STRIDE, generator=generator)
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "features": features,
        "hidden": hidden,
        "labels": windows.labels,
        "fps": _FPS,
        "window": _WINDOW,
        "spec": spec.as_dict(),
        "axes": axes,
        "budget": (budget or Budget(steps=_STEPS)).as_dict(),
    }
    claim_folder(folder, run)
    train = windows.split == 0
    joints, targets = _with_gaps(windows.joints[train], windows.targets[train], generator)
    inputs = frame_features(joints, spec, features)
    model = _new_classifier(run)
    model.scaler.fit(inputs)
    untrained = _untrained_accuracy(model, windows, spec, features)
    fit(
        model,
        (inputs, targets),
        nn.functional.cross_entropy,
        budget=Budget(**run["budget"]),
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=_RATE, weight_decay=0.01),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=100,
        resume=True,
        progress=None if progress is None else lambda share, terms: progress(0.8 * share),
        seed=seed,
    )
    counters, counted = _counters(clips, spec, windows, seed)
    kept = {label: choice._asdict() for label, choice in counters.items()}
    write_atomically(folder / "counters.json", json.dumps(kept, indent=1) + "\n")
    save_model(model, folder / "model.safetensors")
    metrics = _judged(load_exercise_model(folder), windows, generator) | untrained | counted
    write_metrics(folder, metrics)
    if progress is not None:
        progress(1.0)
    return metrics


def load_exercise_model(folder: str | Path) -> ExerciseModel:
    """What `train_exercise_monitor` stored, ready for an `ExerciseMonitor`.

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> model = load_exercise_model("runs/fitness-bilstm-hdm05")  # doctest: +SKIP
        >>> model.labels[-2:]  # doctest: +SKIP
        ('squat1Reps', 'throwBasketball')
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        classifier = _new_classifier(run)
        kept = json.loads((folder / "counters.json").read_text())
        counters = {label: CounterChoice(**choice) for label, choice in kept.items()}
        spec, labels = PoseSpec.from_dict(run["spec"]), tuple(run["labels"])
        load_model(classifier, folder / "model.safetensors")
        return ExerciseModel(
            classifier.eval(),
            spec,
            labels,
            run["fps"],
            run["window"],
            run["features"],
            counters,
            tuple(run["axes"]),
        )
    except (KeyError, TypeError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} holds no exercise model that can be read ({error!r})") from error


def _new_classifier(run: Mapping[str, Any]) -> WindowClassifier:
    spec = PoseSpec.from_dict(run["spec"])
    width = frame_features(torch.zeros(1, spec.num_joints, 3), spec, run["features"]).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        return WindowClassifier(width, len(run["labels"]), run["hidden"], _DROPOUT)


def _with_gaps(joints: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The windows as they are, once with joints missing, and once as they look when the camera was just switched on."""
    count, frames = joints.shape[:2]
    hidden = hide_joints(joints, 0.5 * torch.rand(count, generator=generator), generator)
    begun = torch.randint(0, 2 * frames // 3, (count, 1), generator=generator)
    before = torch.arange(frames) < begun
    late = joints.masked_fill(before[..., None, None], torch.nan)
    return torch.cat([joints, hidden, late]), targets.repeat(3)


def _judged(model: ExerciseModel, windows: ExerciseWindows, generator: torch.Generator) -> dict[str, float]:
    test = windows.split == 2
    joints, targets, number = windows.joints[test], windows.targets[test], windows.recordings[test]

    def logits(joints: Tensor) -> Tensor:
        inputs = frame_features(joints, model.spec, model.kind)
        return predict(model.classifier, IndexedDataset(inputs, targets)).outputs.float()

    def accuracy(found: Tensor, targets: Tensor) -> float:
        return (found.argmax(-1) == targets).float().mean().item()

    plain = logits(joints)
    clips, place = number.unique(return_inverse=True)
    together = torch.zeros(len(clips), plain.shape[1]).index_add(0, place, plain.log_softmax(-1))
    of_clip = torch.zeros(len(clips), dtype=torch.int64).index_copy(0, place, targets)
    return {
        "accuracy": accuracy(plain, targets),
        "recording_accuracy": accuracy(together, of_clip),
        "moved_accuracy": accuracy(logits(moved(joints, generator)), targets),
        "missing_accuracy": accuracy(logits(hide_joints(joints, 0.2, generator)), targets),
    }


def _untrained_accuracy(
    model: WindowClassifier, windows: ExerciseWindows, spec: PoseSpec, kind: str
) -> dict[str, float]:
    """Neighbours by raw coordinates, and by what the network makes of its inputs before it learnt anything."""
    train, test = windows.split == 0, windows.split == 2
    raw = frame_features(windows.joints, spec, "raw")
    middle = raw[train].flatten(0, 1).nanmean(0)
    raw = torch.where(raw.isnan(), middle, raw).flatten(1)
    with torch.no_grad():
        states = model.eval().features(frame_features(windows.joints, spec, kind))
    found = {}
    for name, rows, metric in (("raw_knn", raw, "euclidean"), ("untrained_knn", states, "cosine")):
        probe = knn_probe(
            rows[train],
            windows.targets[train],
            rows[test],
            windows.targets[test],
            k=5,
            temperature=None,
            metric=metric,  # type: ignore[arg-type]
        )
        found[f"{name}_accuracy"] = probe.accuracy
    return found


def _counters(
    clips: MotionClips, spec: PoseSpec, windows: ExerciseWindows, seed: int
) -> tuple[dict[str, CounterChoice], dict[str, float]]:
    """A counter for each class whose repetitions are known, from the training part; how well they count in the test part."""
    repetitions = known_repetitions(clips)
    name = next(iter(clips.labels))
    part, group = torch.zeros(len(clips), dtype=torch.int64), torch.zeros(len(clips), dtype=torch.int64)
    part[windows.recordings], group[windows.recordings] = windows.split, windows.groups
    rows = [invariant_pose_features(recording, spec)[0] for recording in recordings_at(clips, _FPS)]
    counters: dict[str, CounterChoice] = {}
    errors, true = [], []
    for number, label in enumerate(windows.labels):
        of_class = torch.from_numpy(clips.labels[name] == number) & (repetitions > 0)
        sessions = {}
        for key, chosen in (("train", part < 2), ("test", part == 2)):
            own = (of_class & chosen).nonzero().flatten().tolist()
            # Of each class its own stream, so that another class with known counts changes nothing.
            generator = torch.Generator().manual_seed(1000 * seed + 2 * number + (key == "test"))
            sessions[key] = _sessions(own, rows, repetitions, group, generator)
        if len(sessions["train"]) < 3:
            continue
        counters[label] = choose_counter(
            [session for session, _ in sessions["train"]],
            [count for _, count in sessions["train"]],
            columns=range(len(spec.angles)),
        )
        for session, count in sessions["test"]:
            errors.append(abs(counters[label].count(session) - count))
            true.append(count)
    if not errors:
        return counters, {}
    found = np.array(errors)
    return counters, {
        "count_error": float(found.mean()),
        "count_exact": float((found == 0).mean()),
        "repetitions": float(np.mean(true)),
    }


def _sessions(
    own: list[int], rows: list[Tensor], repetitions: Tensor, group: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, int]]:
    """Recordings with their counts: as they are if they repeat, else several of one person joined."""
    if not own:
        return []
    counts = repetitions.tolist()
    if np.mean([counts[k] for k in own]) > 2.5:
        order = torch.randperm(len(own), generator=generator)[: 2 * _SESSIONS].tolist()
        return [(rows[own[k]], counts[own[k]]) for k in order]
    people = list(grouped(own, group[own].tolist()).values())
    found = []
    for turn in range(_SESSIONS):
        chosen = people[turn % len(people)]
        found.append(chained([rows[k] for k in chosen], [counts[k] for k in chosen], generator=generator))
    return found
