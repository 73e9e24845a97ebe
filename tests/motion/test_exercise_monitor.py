"""The monitor: one frame at a time equals whole windows; which repetitions count for whom; missing joints, other cameras; the stored model."""

import json

import numpy as np
import pytest
import torch

from coloss import Budget
from coloss.data import MotionClips, save_motion
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion import (
    COCO_LANDMARKS,
    CounterChoice,
    ExerciseModel,
    ExerciseMonitor,
    WindowClassifier,
    cut_windows,
    draw_skeleton,
    frame_features,
    load_exercise_model,
    pose_spec,
    resample_rate,
    train_exercise_monitor,
)

SPEC = pose_spec(COCO_LANDMARKS)
KNEE = SPEC.names.index("left knee angle")


class Told(WindowClassifier):
    """Tells class 1 where the left knee's angle changes within the window, else class 0."""

    def __init__(self) -> None:
        super().__init__(len(SPEC.names), 2, hidden=1)

    def forward(self, windows):
        knee = windows[..., KNEE].nan_to_num(180.0)
        moves = (knee.amax(1) - knee.amin(1) > 30).float()
        return 20 * torch.stack([1 - moves, moves], 1)


def body(knee_degrees: torch.Tensor) -> torch.Tensor:
    """Frames of 17 joints, standing, whose left knee bends."""
    joints = torch.zeros(len(knee_degrees), 17, 3)
    for name, joint in COCO_LANDMARKS.items():
        side = 0.2 if name.startswith("left") else -0.2
        height = {"shoulder": 1.5, "elbow": 1.2, "wrist": 0.9, "hip": 1.0, "knee": 0.5, "ankle": 0.0}
        joints[:, joint] = torch.tensor([side, height[name.split("_")[1]], 0.0])
    bend = torch.deg2rad(180 - knee_degrees)
    ankle, knee = COCO_LANDMARKS["left_ankle"], COCO_LANDMARKS["left_knee"]
    joints[:, ankle, 1] = joints[:, knee, 1] - 0.5 * bend.cos()
    joints[:, ankle, 2] = -0.5 * bend.sin()
    return joints


def squats(count: int, frames: int = 12) -> torch.Tensor:
    return body(130 + 45 * torch.cos(torch.linspace(0, 2 * torch.pi * count, count * frames)))


def model(classifier: WindowClassifier | None = None, window: int = 16, kind="invariant") -> ExerciseModel:
    counters = {"squat": CounterChoice(KNEE, "levels", 110.0, 150.0, 0.0)}
    width = frame_features(torch.zeros(1, 17, 3), SPEC, kind).shape[-1]
    torch.manual_seed(0)
    found = classifier or WindowClassifier(width, 2, hidden=3)
    return ExerciseModel(found.eval(), SPEC, ("rest", "squat"), 15.0, window, kind, counters)


@pytest.mark.parametrize("kind", ["invariant", "body-frame"])
def test_a_frame_at_a_time_is_the_whole_window(kind):
    trained = model(kind=kind)
    joints = squats(2)
    monitor = ExerciseMonitor(trained, stride=4, threshold=0.0)
    for number, frame in enumerate(joints, 1):
        reading = monitor.update(frame)
        if reading.decided and number >= 16:
            features = frame_features(joints[number - 16 : number], SPEC, kind)
            probabilities = trained.classifier(features[None]).softmax(-1)[0]
            assert reading.probability == pytest.approx(probabilities.max().item(), abs=1e-5)
            assert reading.label == trained.labels[int(probabilities.argmax())]
    whole = trained.probabilities(joints, stride=8)
    expected = trained.classifier(cut_windows(frame_features(joints, SPEC, kind), 16, 8)).softmax(-1)
    torch.testing.assert_close(whole, expected)


def watched(monitor: ExerciseMonitor, joints) -> list:
    return [monitor.update(frame) for frame in joints]


def test_the_first_repetitions_are_not_lost_and_rest_counts_nothing():
    monitor = ExerciseMonitor(model(Told()))
    readings = watched(monitor, torch.cat([squats(3), body(torch.full((24,), 178.0))]))
    assert max(reading.count or 0 for reading in readings) == 3 and readings[-1].counts == {"squat": 3}
    assert readings[-1].label == "rest" and readings[-1].count is None
    counts = [reading.counts["squat"] for reading in readings]
    assert all(0 <= after - before <= 1 for before, after in zip(counts, counts[1:]))


def test_the_counter_of_a_class_that_is_not_told_does_not_count():
    class Never(Told):
        def forward(self, windows):
            return torch.tensor([[20.0, 0.0]]).expand(len(windows), 2)

    readings = watched(ExerciseMonitor(model(Never())), squats(3))
    assert readings[-1].label == "rest" and readings[-1].counts == {"squat": 0}
    # Below the threshold nothing is told.
    unsure = model()
    unsure.classifier.classifier.weight.data.zero_()
    assert watched(ExerciseMonitor(unsure, threshold=0.9), squats(2))[-1].label is None


def test_missing_joints_and_persons():
    generator = torch.Generator().manual_seed(0)
    joints = squats(4)
    hidden = joints.masked_fill(torch.rand(len(joints), 17, 1, generator=generator) < 0.1, torch.nan)
    monitor = ExerciseMonitor(model(Told()))
    last = watched(monitor, hidden)[-1]
    assert last.label == "squat" and 3 <= last.count <= 4 and 0 <= last.missing < 0.6
    gone = watched(monitor, [None] * 20)
    assert gone[-1].label is None and gone[-1].missing == 1 and gone[0].label == "squat"
    assert gone[-1].counts == last.counts
    broken = joints[0].clone()
    broken[3, 1] = torch.inf
    assert watched(monitor, [broken])[0].missing == 0  # no feature looks at an eye
    monitor.reset()
    assert watched(monitor, joints)[-1].counts == watched(ExerciseMonitor(model(Told())), joints)[-1].counts


@pytest.mark.parametrize("fps", [30.0, 10.0])
def test_another_camera_counts_the_same(fps):
    frames = int(12 * fps / 15)
    monitor = ExerciseMonitor(model(Told()), fps=fps)
    readings = watched(monitor, squats(3, frames))
    assert readings[-1].counts == {"squat": 3}
    assert abs(readings[-1].frame - 3 * 12) <= 2  # counted in the model's frames


@pytest.mark.parametrize("fps", [25.0, 10.0])
def test_frames_of_another_camera_are_the_resampled_recording(fps, monkeypatch):
    joints = squats(3, 20)
    taken = []
    monitor = ExerciseMonitor(model(), fps=fps)
    monkeypatch.setattr(monitor, "_take", taken.append)
    watched(monitor, joints)
    torch.testing.assert_close(torch.stack(taken), resample_rate(joints, fps, 15.0)[:, : SPEC.num_joints])


def test_dropped_and_late_frames_do_not_move_the_clock():
    joints, generator = squats(4, 24), torch.Generator().manual_seed(0)
    times = torch.arange(len(joints)) / 30 + 0.01 * torch.rand(len(joints), generator=generator)
    kept = (torch.rand(len(joints), generator=generator) < 0.6).nonzero().flatten().tolist()
    monitor = ExerciseMonitor(model(Told()), fps=30.0)
    for frame in kept:
        reading = monitor.update(joints[frame], times[frame].item())
    assert reading.counts == {"squat": 4} and abs(reading.frame - 4 * 12) <= 2
    # Half a minute without a frame: nobody was seen, and nothing that is older than two windows is worked on.
    later = monitor.update(joints[0], times[-1].item() + 30.0)
    assert abs(later.frame - reading.frame - 450) <= 1 and later.label is None
    with pytest.raises(InputError, match="time must be finite and later than"):
        monitor.update(joints[0], 0.0)


def test_nobody_in_every_other_frame_does_not_move_the_clock():
    joints = torch.cat([squats(4, 24), torch.zeros(96, 16, 3)], 1)  # a detector of 33 joints
    monitor = ExerciseMonitor(model(Told()), fps=30.0)
    readings = watched(monitor, [frame if k % 2 == 0 else None for k, frame in enumerate(joints)])
    assert readings[-1].frame == 48 and readings[-1].counts == {"squat": 4}


def test_axes_bring_coordinates_to_one_unit():
    plain, joints = model(kind="body-frame"), squats(2)
    scaled = model(plain.classifier, kind="body-frame")
    scaled.axes = (1.0, 1.0, 0.25)
    deep = joints * torch.tensor([1.0, 1.0, 4.0])
    torch.testing.assert_close(scaled.probabilities(deep), plain.probabilities(joints))
    last = [watched(ExerciseMonitor(m, threshold=0.0), x)[-1] for m, x in ((scaled, deep), (plain, joints))]
    assert last[0] == last[1]


@pytest.mark.parametrize("kind", ["invariant", "raw", "mixed", "body-frame"])
def test_probabilities_are_numbers_whatever_is_missing(kind):
    joints = squats(2)
    joints[3:9, 5] = torch.nan
    joints[:, 11] = torch.inf  # a hip that is no number: no frame of the body
    joints[12:] = torch.nan
    found = model(kind=kind).probabilities(joints)
    assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(len(found)))
    assert all(
        reading.probability == reading.probability
        for reading in watched(ExerciseMonitor(model(kind=kind)), joints)
    )


def test_bad_input():
    for given, message in (
        ({"stride": 0}, "stride must be >= 1, got 0"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        ({"fps": 0.0}, "fps must be > 0"),
    ):
        with pytest.raises(InputError, match=message):
            ExerciseMonitor(model(), **given)
    with pytest.raises(InputError, match=r"must be \(joints, 3\) with >= 17 joints, got \(5, 3\)"):
        ExerciseMonitor(model()).update(torch.zeros(5, 3))
    with pytest.raises(InputError, match="labels must be 2"):
        ExerciseModel(WindowClassifier(22, 2, hidden=1), SPEC, ("rest",), 15, 16)
    wrong = {"jump": CounterChoice(0, "levels", 0.0, 1.0, 0.0)}
    with pytest.raises(InputError, match="axes must be three factors > 0"):
        ExerciseModel(WindowClassifier(22, 2, hidden=1), SPEC, ("a", "b"), 15, 16, axes=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="stride must be >= 1"):
        model().probabilities(squats(1), stride=0)
    with pytest.raises(InputError, match="counters must be of classes and features"):
        ExerciseModel(WindowClassifier(22, 2, hidden=1), SPEC, ("a", "b"), 15, 16, counters=wrong)


def test_a_body_in_characters():
    skeleton = SKELETONS["msr-action3d"]
    picture = draw_skeleton(torch.randn(20, 3), skeleton.parents, columns=10, rows=5)
    assert [len(line) for line in picture.splitlines()] == [10] * 5
    upright = draw_skeleton(torch.tensor([[0.0, 0, 0], [0, 1, 0]]), (-1, 0), columns=3, rows=2)
    filled = [[ord(cell) - 0x2800 for cell in line] for line in upright.splitlines()]
    assert all(row[0] == row[2] == 0 or row[1] for row in filled) and all(any(row) for row in filled)
    nobody = draw_skeleton(torch.full((2, 3), torch.nan), (-1, 0), columns=3, rows=2)
    assert set(nobody) == {chr(0x2800), "\n"}
    with pytest.raises(ValueError, match="columns and rows must be >= 1"):
        draw_skeleton(torch.zeros(2, 3), (-1, 0), rows=0)
    with pytest.raises(ValueError, match="parents must be 3"):
        draw_skeleton(torch.zeros(3, 3), (-1, 0))


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """Squats and rests of four persons, in the msr skeleton's names."""
    skeleton = SKELETONS["msr-action3d"]
    generator = torch.Generator().manual_seed(0)
    order = [skeleton.joint(name) for name in COCO_LANDMARKS]
    recordings, exercise, person, repetitions = [], [], [], []
    for who in range(4):
        for kind in (0, 1):
            source = squats(3) if kind else body(torch.full((36,), 178.0))
            joints = torch.zeros(36, 20, 3)
            joints[:, order] = source[:, list(COCO_LANDMARKS.values())]
            recordings.append((joints + 0.002 * torch.randn(36, 20, 3, generator=generator)).numpy())
            exercise.append(kind)
            person.append(who)
            repetitions.append(3 * kind)
    clips = MotionClips.from_list(
        recordings,
        skeleton,
        15,
        labels={"exercise": exercise, "person": person, "repetitions": repetitions},
        label_names={"exercise": ("rest", "squat")},
        split=[0] * 6 + [2] * 2,
    )
    path = tmp_path_factory.mktemp("own") / "gym.npz"
    save_motion(path, clips)
    return path


def test_trained_stored_and_used_again(own_file, tmp_path):
    run = tmp_path / "run"
    shares: list[float] = []
    metrics = train_exercise_monitor(own_file, run, hidden=6, budget=Budget(steps=3), progress=shares.append)
    assert shares[-1] == 1.0 and metrics["count_exact"] == 1 and metrics["repetitions"] == 3
    assert {"accuracy", "moved_accuracy", "missing_accuracy", "raw_knn_accuracy"} <= metrics.keys()
    assert json.loads((run / "metrics.json").read_text()).keys() == metrics.keys()
    trained = load_exercise_model(run)
    assert trained.labels == ("rest", "squat") and set(trained.counters) == {"squat"}
    assert trained.counters["squat"].feature in (KNEE, -1 - KNEE)
    # A finished run goes on from its checkpoint and ends the same.
    before = (run / "model.safetensors").read_bytes()
    again = train_exercise_monitor(own_file, run, hidden=6, budget=Budget(steps=3))
    assert again == metrics and (run / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="other settings"):
        train_exercise_monitor(own_file, run, hidden=7, budget=Budget(steps=3))
    (run / "counters.json").write_text("{")
    with pytest.raises(InputError, match="holds no exercise model"):
        load_exercise_model(run)
    with pytest.raises(InputError, match="features must be one of"):
        train_exercise_monitor(own_file, run, features="angles")


def test_the_scaler_knows_only_the_training_part(own_file, tmp_path):
    train_exercise_monitor(own_file, tmp_path / "a", hidden=2, budget=Budget(steps=1))
    arrays = dict(np.load(own_file))
    held = np.repeat(arrays["split"], arrays["length"]) == 2
    arrays["joints"] = arrays["joints"].copy()
    arrays["joints"][held] *= 3  # the test persons are giants
    np.savez(tmp_path / "giants.npz", **arrays)
    train_exercise_monitor(tmp_path / "giants.npz", tmp_path / "b", hidden=2, budget=Budget(steps=1))
    first, second = (load_exercise_model(tmp_path / name).classifier.state_dict() for name in "ab")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
