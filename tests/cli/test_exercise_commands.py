"""`coloss exercise`, as a person types it."""

import json

import numpy as np
import pytest
import torch

from coloss import Budget
from coloss.data import MotionClips, save_motion
from coloss.data.skeleton import SKELETONS
from coloss.motion import train_exercise_monitor


@pytest.fixture(scope="module")
def gym(tmp_path_factory):
    """A file of clips, and a model trained on it for two steps."""
    folder = tmp_path_factory.mktemp("gym")
    generator = np.random.default_rng(0)
    joints = [generator.normal(size=(20, 20, 3)).astype(np.float32) for _ in range(6)]
    clips = MotionClips.from_list(
        joints,
        SKELETONS["msr-action3d"],
        15,
        labels={"exercise": [0, 1] * 3},
        label_names={"exercise": ("rest", "squat")},
        split=[0, 0, 0, 0, 2, 2],
        names=[f"take{k}" for k in range(6)],
    )
    save_motion(folder / "gym.npz", clips)
    train_exercise_monitor(
        folder / "gym.npz", folder / "runs" / "fitness-bilstm-gym", hidden=2, budget=Budget(steps=2)
    )
    return folder


def test_a_session_line_by_line_and_as_json(coloss, gym, monkeypatch):
    monkeypatch.chdir(gym)
    outcome = coloss("exercise", "gym.npz", "--clip", "take4", "--clip", "5", "--repeat", "2", "--speed", 0)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("frame 1: watching") and lines[-1] == "repetitions: none (80 frames)"
    assert any("rest (" in line or "squat (" in line for line in lines)
    found = json.loads(coloss("exercise", "gym.npz", "--missing", "0.3", "--json").out)
    assert found["clips"] == ["rest", "squat"] and found["frames"] == 40
    assert found["model"] == "runs/fitness-bilstm-gym" and found["counts"] == {}


def test_the_live_view(gym, monkeypatch):
    from rich.console import Console

    from coloss.cli import exercise_commands
    from coloss.data import load_motion
    from coloss.motion import ExerciseMonitor, load_exercise_model

    clips = load_motion(gym / "gym.npz")
    monitor = ExerciseMonitor(load_exercise_model(gym / "runs" / "fitness-bilstm-gym"), threshold=0.0)
    console = Console(width=90, height=24, force_terminal=True, record=True)
    session = exercise_commands._session(clips, [4], monitor, 0.0)
    last = exercise_commands._live(console, session, clips.skeleton.parents, 0.0, ["rest"])
    shown = console.export_text()
    assert last.frame == 20 and last.label in shown and "frame 20, 0% of the joints missing" in shown
    assert any(0x2800 < ord(character) < 0x2900 for character in shown)  # the skeleton
    assert torch.get_num_threads() >= 1


def test_what_is_wrong_is_one_line(coloss, gym, monkeypatch):
    for arguments, line in (
        (["exercise", "gym.npz"], "there is no trained model under runs: train one with coloss run"),
        (["exercise", "gym.npz", "--repeat", "0"], "repeat must be >= 1, got 0"),
        (["exercise", "gym.npz", "--missing", "1"], "missing must be in [0, 1), got 1.0"),
        (["exercise", "gym.npz", "--speed", "-1"], "speed must be >= 0"),
        (["exercise", "gym.npz", "--speed", "nan"], "speed must be >= 0 and finite, got nan"),
    ):
        outcome = coloss(*arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and line in outcome.err, outcome.err
    monkeypatch.chdir(gym)
    for arguments, line in (
        (["exercise", "gym.npz", "--clip", "take9"], "clip must be a name or a number below 6, got 'take9'"),
        (["exercise", "nothing.npz"], "nothing.npz"),
        (["exercise", "hdm05"], "has its landmarks at other joints than the data that the model"),
        (["exercise", "sfinge-hands"], "landmarks must have a joint for each name"),
        (["exercise", "sfinge-hand"], "did you mean 'sfinge-hands'"),
    ):
        outcome = coloss(*arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and line in outcome.err, outcome.err
