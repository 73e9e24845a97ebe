import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import Kill, Killed, differing, weights

from coloss.data import MotionClips, Skeleton, load_motion, save_motion
from coloss.motion import (
    LiftingPairs,
    PinholeCamera,
    UncertainLifter,
    UncertainPoses,
    load_lifter,
    train_hop_lifter,
    train_lifter,
)
from coloss.motion import lifting_recipe as recipe
from coloss.train import Budget

SKELETON = Skeleton(
    (-1, 0, 1, 0, 3), ("hip", "knee_L", "foot_L", "knee_R", "foot_R"), (0, 3, 4, 1, 2), {"left_leg": (1, 2)}
)
BODY = np.array([[0, 1.0, 0], [0.2, 0.9, 0], [0.2, 0.5, 0.1], [-0.2, 0.9, 0], [-0.2, 0.5, 0.0]])


def own_motion(folder: Path, **options: Any) -> Path:
    rng = np.random.default_rng(0)
    given = {"labels": {"action": [0, 1] * 6}, "label_names": {"action": ("walk", "run")}} | options
    count = len(given["labels"]["action"])
    clips = [BODY + rng.normal(size=(6, 5, 3)) * 0.05 for _ in range(count)]
    save_motion(
        folder / "own.npz", MotionClips.from_list(clips, given.pop("skeleton", SKELETON), 15, **given)
    )
    return folder / "own.npz"


def check_loads_back(folder: Path) -> UncertainLifter:
    model, skeleton = load_lifter(folder)
    assert isinstance(model, UncertainLifter) and not model.training
    assert skeleton == SKELETON
    pose, log_scale = model(torch.randn(3, 5, 2))
    assert pose.shape == (3, 5, 3) and log_scale.shape == (3, 5)
    return model


@pytest.mark.parametrize("train", [train_lifter, train_hop_lifter])
def test_ones_own_motion_becomes_a_lifter_that_loads_back(tmp_path: Path, train: Any) -> None:
    metrics = train(
        own_motion(tmp_path), tmp_path / "run", width=8, depth=1, budget=Budget(steps=2), batch_size=8
    )
    assert {"mpjpe", "p_mpjpe", "n_mpjpe", "mpjve", "mpjpe_mean_pose", "mpjpe_refined"} < metrics.keys()
    assert {"mpjpe_refined_true_root", "scale_correlation"} < metrics.keys()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()).keys() == metrics.keys()
    network = type(check_loads_back(tmp_path / "run").lifter).__name__
    assert network == ("ResidualLifter" if train is train_lifter else "HopGraphFormer")


@pytest.mark.parametrize("network", ["graph-mlp", "hop-convolution", "semantic-convolution"])
def test_every_network_is_stored_and_loads_back(tmp_path: Path, network: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(recipe, "_judge", lambda *_: {})
    options: dict[str, Any] = {"network": network, "width": 8, "depth": 1, "max_hop": 2}
    train_lifter(own_motion(tmp_path), tmp_path / "run", budget=Budget(steps=1), batch_size=8, **options)
    check_loads_back(tmp_path / "run")


def test_velocities_are_those_of_test_clips_of_all_actions(tmp_path: Path, monkeypatch: Any) -> None:
    films = []

    def velocity_error(model: Any, film: LiftingPairs) -> float:
        films.append(film)
        return 0.0

    monkeypatch.setattr(recipe, "_velocity_error", velocity_error)
    options: dict[str, Any] = {"width": 8, "depth": 1, "budget": Budget(steps=1), "batch_size": 8}
    # Without a division of their own, the first and the eleventh of twelve clips are for the test.
    train_lifter(own_motion(tmp_path), tmp_path / "own", noise=0.0, **options)
    clips = load_motion(tmp_path / "own.npz")
    world = torch.from_numpy(np.concatenate([clips.clip(index) for index in (0, 10)]))
    torch.testing.assert_close(
        torch.cdist(films[0].pose, films[0].pose), torch.cdist(world, world), atol=1e-4, rtol=0
    )
    labels = {"action": [0] * 40 + [1] * 4}
    split = [0, 1] + [2] * 42
    train_lifter(own_motion(tmp_path, labels=labels, split=split), tmp_path / "many", **options)
    assert len(films[1].clip.unique()) == 30
    assert films[1].labels["action"].unique().tolist() == [0, 1]


def test_velocity_errors_are_averaged_over_actions() -> None:
    class Still(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> UncertainPoses:
            return UncertainPoses(torch.zeros(len(image), 2, 3), torch.zeros(len(image), 2))

    rows = torch.arange(2).repeat(3).float()  # three clips of two frames
    pose = torch.zeros(6, 2, 3)
    pose[:, 1, 0] = rows * torch.tensor([0.2, 0.4, 0.9]).repeat_interleave(
        2
    )  # velocity errors 0.1, 0.2, 0.45
    clip = torch.arange(3).repeat_interleave(2)
    film = LiftingPairs(
        torch.zeros(6, 2, 2),
        pose,
        torch.zeros(6, 3),
        PinholeCamera(2.0),
        Skeleton((-1, 0)),
        clip,
        rows.long(),
    )
    assert recipe._velocity_error(Still(), film) == pytest.approx((0.1 + 0.2 + 0.45) / 3)
    named = replace(film, labels={"action": torch.tensor([0, 0, 0, 0, 7, 7])})
    assert recipe._velocity_error(Still(), named) == pytest.approx((0.15 + 0.45) / 2)


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not(tmp_path: Path, monkeypatch: Any) -> None:
    data = own_motion(tmp_path)
    monkeypatch.setattr(recipe, "_judge", lambda *_: {})  # the weights are compared
    options: dict[str, Any] = {"width": 8, "depth": 1, "budget": Budget(steps=4), "batch_size": 8}
    whole = train_lifter(data, tmp_path / "whole", **options)
    plain = recipe.fit

    def stopped(*args: Any, **given: Any) -> Any:
        args = (*args[:3], [*args[3], Kill(3)])
        return plain(*args, **(given | {"checkpoint_every": 2}))

    monkeypatch.setattr(recipe, "fit", stopped)
    with pytest.raises(Killed):
        train_lifter(data, tmp_path / "stopped", **options)
    monkeypatch.setattr(
        recipe, "fit", lambda *args, **given: plain(*args, **(given | {"checkpoint_every": 2}))
    )
    assert train_lifter(data, tmp_path / "stopped", **options) == whole
    models = [load_lifter(tmp_path / name)[0] for name in ("whole", "stopped")]
    assert not differing(*(weights(model) for model in models))


def test_bad_input_is_named(tmp_path: Path, as_users_call: None) -> None:
    data = own_motion(tmp_path)
    with pytest.raises(ValueError, match="network must be one of residual, .* got 'deep'"):
        train_lifter(data, tmp_path / "run", network="deep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        train_lifter(data, tmp_path / "run", width=0)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        train_lifter(data, tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="holds no encoder that can be read"):
        load_lifter(tmp_path / "nowhere")
    alone = own_motion(tmp_path, skeleton=Skeleton(SKELETON.parents))
    with pytest.raises(ValueError, match='network "graph-mlp" needs a skeleton whose mirror is known'):
        train_lifter(alone, tmp_path / "run", network="graph-mlp")
    screen = own_motion(tmp_path, units="screen")
    with pytest.raises(ValueError, match="clips must be in metres"):
        train_lifter(screen, tmp_path / "run")
