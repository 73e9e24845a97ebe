"""One frame through the exercise monitor: features, counters, and every fourth frame a decision.

By processor time on a busy core, for the paper's network on windows of 30 frames: 0.9 ms a frame with a decision every fourth one, 2.5 ms
with one in every frame. Missing joints cost nothing more.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from coloss.lab.benchmarks.measure import Report, interleaved, silent
from coloss.lab.benchmarks.row import Row
from coloss.motion import (
    COCO_LANDMARKS,
    CounterChoice,
    ExerciseModel,
    ExerciseMonitor,
    WindowClassifier,
    pose_spec,
)

LIMIT = 5.0
"""Milliseconds for a frame, so that a camera of 30 frames a second leaves time for the detection of the pose."""

Times = tuple[float, float]


def measure(
    report: Report = silent, *, frames: int = 120, hidden: int = 91, window: int = 30, rounds: int = 5
) -> list[Row]:
    """Milliseconds for a frame of 17 joints, one thread of a CPU, the paper's network (91 units) on windows of 30 frames.

    Args:
        report: told the share done.
        frames: of one measurement.
        hidden: units of each LSTM in each direction.
        window: frames of a window.
        rounds: measurements of each case.
    """
    spec = pose_spec(COCO_LANDMARKS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = WindowClassifier(len(spec.names), 10, hidden).eval()
    counters = {f"class {k}": CounterChoice(k, "levels", 90.0, 140.0, 0.0) for k in range(8)}
    model = ExerciseModel(
        classifier, spec, tuple(f"class {k}" for k in range(10)), 30.0, window, counters=counters
    )
    joints = torch.randn(frames, 17, 3, generator=torch.Generator().manual_seed(0))
    gaps = joints.masked_fill(
        torch.rand(frames, 17, 1, generator=torch.Generator().manual_seed(1)) < 0.3, torch.nan
    )
    cases: dict[str, Callable[[], Times]] = {
        "mean, a decision every 4 frames": partial(watched, model, joints, 4),
        "mean, a decision every frame": partial(watched, model, joints, 1),
        "mean, every frame, 30% of the joints missing": partial(watched, model, gaps, 1),
        "slowest of a hundred frames, a decision every frame": partial(watched, model, joints, 1, 0.99),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = interleaved(cases, rounds, report)
    finally:
        torch.set_num_threads(threads)
    return [Row.of(name, found[name], "ms", limit=LIMIT) for name in cases]


def watched(model: ExerciseModel, joints: Tensor, stride: int, quantile: float | None = None) -> Times:
    """Milliseconds for a frame by the wall clock and of processor time: the mean, or a quantile over the frames.

    Examples:
        >>> spec = pose_spec(COCO_LANDMARKS)
        >>> model = ExerciseModel(WindowClassifier(22, 2, hidden=4), spec, ("rest", "squat"), 30.0, 6)
        >>> min(watched(model, torch.randn(8, 17, 3), 2)) > 0
        True
    """
    monitor = ExerciseMonitor(model, stride=stride, threshold=0.0)
    taken = []
    for frame in joints:
        wall, cpu = time.perf_counter(), time.process_time()
        monitor.update(frame)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    times = 1000 * np.asarray(taken)[len(taken) // 5 :]  # the first frames warm up
    wall, cpu = times.mean(0) if quantile is None else np.quantile(times, quantile, axis=0)
    return float(wall), float(cpu)
