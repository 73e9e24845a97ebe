"""Watches a body, frame after frame, and says what it does and how often it has done it."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.motion.counter_choice import CounterChoice
from coloss.motion.exercise_windows import cut_windows
from coloss.motion.pose_features import PoseSpec, frame_features, invariant_pose_features
from coloss.motion.window_classifier import WindowClassifier

_LONGEST_GAP = 0.5
"""Seconds without a frame over which joints are interpolated."""


@dataclass
class ExerciseModel:
    """A trained classifier and all that must be known to use it: features, rate, window, classes, and what counts each class.

    Args:
        classifier: takes windows of the features.
        spec: which joints the features are made of.
        labels: names of the classes.
        fps: frames per second that it was trained at.
        window: frames of a window.
        kind: of the features.
        counters: what counts a class; a class without one is not counted. Their columns are those of the invariant features.
        axes: what the coordinates along each axis are multiplied by, so that all are in one unit.

    Raises:
        InputError: if labels, counters or axes do not fit the classifier and the features.

    Examples:
        >>> from coloss.motion import COCO_LANDMARKS, pose_spec
        >>> spec = pose_spec(COCO_LANDMARKS)
        >>> knee = spec.names.index("left knee angle")
        >>> model = ExerciseModel(
        ...     WindowClassifier(22, 2, hidden=8),
        ...     spec,
        ...     ("rest", "squat"),
        ...     fps=15,
        ...     window=16,
        ...     counters={"squat": CounterChoice(knee, "levels", 100.0, 150.0, 0.0)},
        ... )
        >>> model.probabilities(torch.randn(40, 17, 3)).shape
        torch.Size([4, 2])
    """

    classifier: WindowClassifier
    spec: PoseSpec
    labels: tuple[str, ...]
    fps: float
    window: int
    kind: str = "invariant"
    counters: Mapping[str, CounterChoice] = field(default_factory=dict)
    axes: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.labels) != self.classifier.classifier.out_features:
            raise InputError(
                f"labels must be {self.classifier.classifier.out_features} as the classifier has, got {len(self.labels)}"
            )
        if not self.fps > 0 or self.window < 1:
            raise InputError(f"fps must be > 0 and window >= 1, got {self.fps} and {self.window}")
        if len(self.axes) != 3 or not all(0 < factor < math.inf for factor in self.axes):
            raise InputError(f"axes must be three factors > 0, got {self.axes}")
        for label, choice in self.counters.items():
            if label not in self.labels or not -len(self.spec.names) <= choice.feature < len(self.spec.names):
                raise InputError(
                    f"counters must be of classes and features that there are, got {label!r} and {choice.feature}"
                )

    def probabilities(
        self, joints: Float[Tensor, "frames joints 3"], stride: int | None = None
    ) -> Float[Tensor, "windows classes"]:
        """What happens in each window of a recording.

        Args:
            joints: positions of one recording at the model's rate; NaN where a joint was not seen.
            stride: frames from one window to the next; default: half a window.
        """
        features = frame_features(self.in_one_unit(joints), self.spec, self.kind)
        windows = cut_windows(features, self.window, max(self.window // 2, 1) if stride is None else stride)
        with evaluation_mode(self.classifier), torch.no_grad():
            return self.classifier(windows.to(self.classifier.scaler.mean)).softmax(-1)

    def in_one_unit(self, joints: Float[Tensor, "*frames 3"]) -> Float[Tensor, "*frames 3"]:
        """Coordinates along each axis multiplied by `axes`; a joint of which one is no number is missing."""
        seen = joints.isfinite().all(-1, keepdim=True)
        return torch.where(seen, joints.float(), torch.nan) * torch.tensor(self.axes, device=joints.device)


@dataclass(frozen=True)
class Reading:
    """What a monitor knows after a frame.

    Attributes:
        frame: number of frames at the model's rate so far.
        label: what the person does; None before the first decision, and after a window in which nobody was seen.
        probability: of that label in the last decision; 0 without one.
        count: repetitions of that label so far; None if nothing counts it.
        counts: repetitions of every class that is counted.
        missing: share of the features' joints that this frame lacks.
        decided: whether this frame brought a decision.
    """

    frame: int
    label: str | None
    probability: float
    count: int | None
    counts: Mapping[str, int]
    missing: float
    decided: bool


class ExerciseMonitor:
    """Takes one frame at a time and says, after each, what the person does and how often.

    Decisions come every `stride` frames from the last window, as soon as a third of one has been seen; a decision below `threshold` leaves
    the label as it was. Every class's counter runs all the time, but a repetition counts only for the class that is told: when it happens,
    or up to a window later, if the decision comes then. So the first repetitions are not lost, and a class that is not told is not counted.
    Missing joints are NaN: features without them keep their last value within the window; counters wait.

    Args:
        model: what to watch with.
        fps: frames per second of a camera that never drops one; frames are interpolated to the model's rate. Default: the model's. For a
            camera that does, give each frame its time, see `update`.
        stride: frames (at the model's rate) from one decision to the next, >= 1.
        threshold: least probability of a decision that counts, in [0, 1].

    Raises:
        InputError: for a value out of range; from `update` for a frame of another shape.

    Cost: a decision takes one pass of the classifier over one window; `coloss bench exercise` measures it.

    Examples:
        >>> from coloss.motion import COCO_LANDMARKS, WindowClassifier, pose_spec
        >>> classifier = WindowClassifier(22, 2, hidden=8)
        >>> model = ExerciseModel(classifier, pose_spec(COCO_LANDMARKS), ("rest", "squat"), fps=15, window=12)
        >>> monitor = ExerciseMonitor(model, threshold=0.0)
        >>> readings = [monitor.update(torch.randn(17, 3)) for _ in range(8)]
        >>> [reading.decided for reading in readings], readings[-1].label in ("rest", "squat")
        ([False, False, False, True, False, False, False, True], True)
    """

    def __init__(
        self,
        model: ExerciseModel,
        *,
        fps: float | None = None,
        stride: int = 4,
        threshold: float = 0.5,
    ) -> None:
        if fps is not None and not 0 < fps < math.inf:
            raise InputError(f"fps must be > 0 and finite, got {fps}")
        if stride < 1:
            raise InputError(f"stride must be >= 1, got {stride}")
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must be in [0, 1], got {threshold}")
        self.model, self.stride, self.threshold = model, stride, threshold
        self.step = model.fps / (model.fps if fps is None else fps)
        self.reset()

    def reset(self) -> None:
        """Forget everything: another person stands before the camera."""
        width = len(self.model.classifier.scaler.mean)
        self.window = torch.full((self.model.window, width), torch.nan)
        self.frame, self.probability = 0, 0.0
        self.label: str | None = None
        self.counters = {label: choice.new_counter() for label, choice in self.model.counters.items()}
        self.counts = dict.fromkeys(self.counters, 0)
        self._waiting: dict[str, deque[int]] = {label: deque() for label in self.counters}
        self._before: Tensor | None = None
        self._time: float | None = None
        self._clock, self._missing, self._decided = 0.0, 0.0, False

    def update(self, joints: Float[Tensor, "joints 3"] | None, time: float | None = None) -> Reading:
        """Take the camera's next frame.

        Args:
            joints: positions, NaN for a joint that was not seen; None where no person was.
            time: when it was taken, in seconds from any beginning, later than the frame before. Default: one frame of `fps` after it.
                Over up to half a second without a frame the joints are interpolated; in a longer gap nobody was seen.
        """
        frame, step = self._checked(joints), self.step
        if time is not None:
            if not math.isfinite(time) or (self._time is not None and time <= self._time):
                raise InputError(f"time must be finite and later than {self._time}, got {time}")
            if self._time is not None:
                step = (time - self._time) * self.model.fps
        self._time = time if time is not None or self._time is None else self._time + step / self.model.fps
        self._decided = False
        for moment in self._moments(frame, step):
            self._take(moment)
        return Reading(
            self.frame,
            self.label,
            self.probability,
            self.counts.get(self.label) if self.label is not None else None,
            dict(self.counts),
            self._missing,
            self._decided,
        )

    def _checked(self, joints: Tensor | None) -> Tensor:
        least = self.model.spec.num_joints
        if joints is None:
            return torch.full((least, 3), torch.nan)
        if joints.ndim != 2 or joints.shape[0] < least or joints.shape[1] != 3:
            raise InputError(f"a frame must be (joints, 3) with >= {least} joints, got {tuple(joints.shape)}")
        # Only the joints that features need, so that a frame without a person has as many.
        return self.model.in_one_unit(joints[:least].detach().cpu())

    def _moments(self, frame: Tensor, step: float) -> Iterator[Tensor]:
        """The model's frames up to this one of the camera, which is `step` of them after the one before: none, one or more."""
        before, self._before = self._before, frame
        if before is None:
            yield frame
            return
        # `_clock` is the time since the model's last frame, in its frames.
        start, end = self._clock, self._clock + step
        count = int(end + 1e-6)
        self._clock = end - count
        gap = step > max(self.step, _LONGEST_GAP * self.model.fps) + 1e-6
        # What is older than two windows is forgotten anyway.
        passed = max(count - 2 * self.model.window, 0)
        self.frame += passed
        for due in range(passed + 1, count + 1):
            share = (due - start) / step
            if share > 1 - 1e-6:
                yield frame
            else:
                yield torch.full_like(frame, torch.nan) if gap else before + share * (frame - before)

    def _take(self, joints: Tensor) -> None:
        model = self.model
        invariant, _ = invariant_pose_features(joints, model.spec)
        row = invariant if model.kind == "invariant" else frame_features(joints, model.spec, model.kind)
        self.window = torch.cat([self.window[1:], row[None].to(self.window)])
        self.frame += 1
        used = joints[list(model.spec.joints)] if model.spec.joints else joints
        self._missing = used.isnan().any(-1).float().mean().item()
        values = invariant.tolist()
        for label, counter in self.counters.items():
            column = model.counters[label].feature
            before = counter.count
            if counter.update(values[column] if column >= 0 else -values[-1 - column]) > before:
                self._waiting[label].append(self.frame)
        if self.frame % self.stride == 0 and 3 * self.frame >= model.window:
            self._decide()
        for label, waiting in self._waiting.items():
            while waiting and waiting[0] <= self.frame - model.window:
                waiting.popleft()
            if label == self.label:
                self.counts[label] += len(waiting)
                waiting.clear()

    def _decide(self) -> None:
        if self.window.isnan().all():
            self.label, self.probability = None, 0.0
            return
        with evaluation_mode(self.model.classifier), torch.no_grad():
            window = self.window[None].to(self.model.classifier.scaler.mean)
            found = self.model.classifier(window)[0].softmax(-1)
        probability, best = found.max(0)
        self._decided = True
        if probability.item() >= self.threshold:
            self.label, self.probability = self.model.labels[int(best)], probability.item()
        elif self.label is not None:
            self.probability = found[self.model.labels.index(self.label)].item()
