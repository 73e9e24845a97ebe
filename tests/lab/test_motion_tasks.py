import numpy as np
import pytest
import torch

from coloss.data import MotionClips, Skeleton, save_motion
from coloss.errors import InputError
from coloss.lab.tasks import find_task
from coloss.train import Budget, Setting


@pytest.mark.parametrize(
    ("name", "kind", "metric"),
    [("msr-action3d", "classification", "accuracy"), ("hdm05-ssl", "self-supervised", "linear_probe")],
)
def test_tasks_of_the_data_sets_train_a_graph_network(name, kind, metric) -> None:
    task = find_task(name, limit=40)
    assert (task.kind, task.metric) == (kind, metric)
    setting = Setting.of(task, 0, Budget(steps=1), smoke=True)
    model = setting.new_model()
    if kind == "classification":
        model = setting.fit(model).model
    scores = task.test(model, setting.splits)
    assert 0 <= scores[metric] <= 1
    assert setting.splits.skeleton.num_joints == setting.splits.input_shape[2]


def test_own_clips_are_a_task(tmp_path) -> None:
    random = np.random.default_rng(0)
    clips = MotionClips.from_list(
        [random.normal(size=(6, 2, 3)) for _ in range(20)],
        Skeleton((-1, 0)),
        15,
        labels={"move": np.arange(20) % 2, "mood": np.arange(20) % 4},
    )
    path = tmp_path / "clips.npz"
    save_motion(path, clips)
    task = find_task(str(path), target="mood")
    assert task.title == "classification on clips.npz"
    assert Setting.of(task, 0).splits.num_classes == 4
    own = find_task(str(path), kind="self-supervised")
    assert own.kind == "self-supervised" and own.objective is None
    assert own.model(own.load(0))(torch.randn(2, 3, 32, 2, 1)).shape == (2, 64)


def test_what_has_no_meaning_for_clips_is_refused() -> None:
    with pytest.raises(InputError, match="bandai holds clips of motion: leave label noise"):
        find_task("bandai", label_noise=0.2)
    with pytest.raises(InputError, match="msr-action3d has no label 'style', it has action, subject, trial"):
        find_task("msr-action3d", target="style").load(0)
