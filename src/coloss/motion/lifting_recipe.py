"""From recorded motion to a lifter for one's own 2-D poses, in one call: pairs by known cameras, training with uncertainty, a test, a file."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from coloss.data import MotionClips, Skeleton, load_motion
from coloss.data.motion_clips import TEST
from coloss.errors import InputError
from coloss.metrics import mean_over_actions, mpjve, pose_report
from coloss.metrics.inference import evaluation_mode
from coloss.motion.cameras import PinholeCamera
from coloss.motion.hop_graph_former import HopGraphFormer
from coloss.motion.lifting import GraphMLPLifter, ResidualLifter
from coloss.motion.lifting_data import (
    LiftingPairs,
    LiftingSplits,
    MirrorPoses,
    divided,
    lifting_pairs,
    lifting_splits,
)
from coloss.motion.pose_refinement import test_time_optimize
from coloss.motion.uncertain_lifting import UncertainLifter, UncertainPose, scale_calibration
from coloss.train import Budget, cosine, fit, load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

Network = Literal["residual", "graph-mlp", "hop", "hop-convolution", "semantic-convolution"]

_STEPS = 8000
_WIDTHS: Mapping[Network, int] = {
    "residual": 256,
    "graph-mlp": 64,
    "hop": 48,
    "hop-convolution": 48,
    "semantic-convolution": 48,
}


def train_lifter(
    data: str | Path = "bandai",
    folder: str | Path = "runs/uao",
    *,
    network: Network = "residual",
    width: int | None = None,
    depth: int | None = None,
    max_hop: int = 3,
    noise: float = 0.01,
    focal: float = 2.2,
    budget: Budget | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a 2-D to 3-D lifter that knows its uncertainty on recorded motion; this is behind `coloss run uao`.

    The motion is seen by cameras on a ring, with noise on the image; half of each batch is mirrored where the skeleton has two sides. The same
    folder goes on where a stopped run ended.

    Args:
        data: name of a data set of bodies in metres (`bandai`, `hdm05`), or path of an `.npz` that
            `coloss.data.save_motion` wrote: any skeleton.
        folder: for `model.safetensors`, `run.json`, `metrics.json` and checkpoints; `load_lifter` reads it.
        network: `"residual"` (an MLP), `"graph-mlp"` (the network of UAO), `"hop"` (HopFIR), `"hop-convolution"` (its rings without attention) or
            `"semantic-convolution"` (that of one bone).
        width: of the network's features; default: by network.
        depth: its blocks; default: 2 for `"residual"`, else 3.
        max_hop: K, for the two `hop` networks.
        noise: standard deviation on each image coordinate, in units of half the image's width.
        focal: focal length of the cameras in those units (pixels * 2 / width): that of the camera whose poses are to be lifted.
        budget: of the training; default: 8,000 steps.
        batch_size: poses in a step, >= 1.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On test clips, in millimetres and averaged over actions where the data name them: `mpjpe`, `p_mpjpe`, `n_mpjpe`, `mpjve` (per frame, of
        30 clips at most, every frame of them),
        and `mpjpe_mean_pose` of always answering the mean training pose; `scale_correlation` of expected and true joint errors;
        `mpjpe_refined` and `mpjpe_refined_true_root` after four steps of `test_time_optimize` with fitted and with true root.

    Raises:
        InputError: for an unknown network, a value out of range, data that are no motion in metres, a network that needs two sides
            (`"graph-mlp"`) on a skeleton without, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_lifter("bandai", tempfile.mkdtemp(), budget=Budget(steps=50))  # doctest: +SKIP
        >>> metrics["mpjpe"] < metrics["mpjpe_mean_pose"]  # doctest: +SKIP
        True
    """
    if network not in get_args(Network):
        raise InputError(f"network must be one of {', '.join(get_args(Network))}, got {network!r}")
    if batch_size < 1:
        raise InputError(f"batch_size must be >= 1, got {batch_size}")
    folder = Path(folder)
    clips = load_motion(data)
    camera = PinholeCamera(focal)
    splits = lifting_splits(clips, seed=seed, noise=noise, camera=camera)
    skeleton = clips.skeleton
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "network": network,
        "width": _WIDTHS[network] if width is None else width,
        "depth": (2 if network == "residual" else 3) if depth is None else depth,
        "max_hop": max_hop,
        "noise": noise,
        "focal": focal,
        "batch_size": batch_size,
        "skeleton": _written(skeleton),
        "budget": (budget or Budget(steps=_STEPS)).as_dict(),
    }
    lifter = _new_network(run, skeleton)
    claim_folder(folder, run)
    methods = [MirrorPoses(skeleton.mirror)] if skeleton.mirror is not None else []
    model = fit(
        lifter,
        splits.train.dataset(),
        None,
        [*methods, UncertainPose(root=skeleton.root)],
        budget=Budget(**run["budget"]),
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=1000,
        resume=True,
        progress=None if progress is None else lambda share, terms: progress(share),
        seed=seed,
    ).model
    save_model(model, folder / "model.safetensors")
    metrics = _judge(load_lifter(folder)[0], clips, splits, noise, camera, seed)
    write_metrics(folder, metrics)
    return metrics


def train_hop_lifter(
    data: str | Path = "bandai",
    folder: str | Path = "runs/hopfir",
    *,
    width: int | None = None,
    depth: int | None = None,
    max_hop: int = 3,
    noise: float = 0.01,
    focal: float = 2.2,
    budget: Budget | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a lifter of hop-wise attention and limb refinement on recorded motion; this is behind `coloss run hopfir`.

    Args:
        data: see `train_lifter`, whose `network="hop"` this is.
        folder: for the model, its metrics and checkpoints; `load_lifter` reads it.
        width: of a joint's features; default: 48.
        depth: number of blocks; default: 3.
        max_hop: K, the largest number of bones between joints of a group.
        noise: see `train_lifter`.
        focal: see `train_lifter`.
        budget: of the training; default: 8,000 steps.
        batch_size: poses in a step, >= 1.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        As `train_lifter`.

    Raises:
        InputError: see `train_lifter`.

    Examples:
        >>> import tempfile
        >>> metrics = train_hop_lifter(
        ...     "bandai", tempfile.mkdtemp(), budget=Budget(steps=50)
        ... )  # doctest: +SKIP
    """
    return train_lifter(
        data,
        folder,
        network="hop",
        width=width,
        depth=depth,
        max_hop=max_hop,
        noise=noise,
        focal=focal,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def load_lifter(folder: str | Path) -> tuple[UncertainLifter, Skeleton]:
    """The lifter that `train_lifter` stored, in evaluation mode, and the skeleton whose joints it takes.

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> from coloss.motion import screen_coordinates
        >>> lifter, skeleton = load_lifter("runs/uao-bandai")  # doctest: +SKIP
        >>> detected = torch.rand(1, skeleton.num_joints, 2) * 1000  # pixels  # doctest: +SKIP
        >>> pose, log_scale = lifter(screen_coordinates(detected, 1000, 1000))  # doctest: +SKIP
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        skeleton = _read(run["skeleton"])
        model = UncertainLifter(_new_network(run, skeleton))
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no lifter ({error!r} in run.json)") from error
    load_model(model, folder / "model.safetensors")
    return model.eval(), skeleton


def _new_network(run: Mapping[str, Any], skeleton: Skeleton) -> nn.Module:
    network, width, depth = run["network"], run["width"], run["depth"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        if network == "residual":
            return ResidualLifter(skeleton.num_joints, width, depth, root=skeleton.root)
        if network == "graph-mlp":
            if skeleton.mirror is None:
                raise InputError(
                    'network "graph-mlp" needs a skeleton whose mirror is known, got one without'
                )
            return GraphMLPLifter(skeleton.parents, skeleton.mirror, width, depth)
        hops = 1 if network == "semantic-convolution" else run["max_hop"]
        more: dict[str, Any] = {} if network == "hop" else {"attention": False, "limbs": ()}
        return HopGraphFormer.for_skeleton(skeleton, hops, dim=width, depth=depth, **more)


def _written(skeleton: Skeleton) -> dict[str, Any]:
    return {
        "parents": list(skeleton.parents),
        "names": list(skeleton.names),
        "mirror": None if skeleton.mirror is None else list(skeleton.mirror),
        "parts": {name: list(part) for name, part in skeleton.parts.items()},
    }


def _read(stored: Mapping[str, Any]) -> Skeleton:
    return Skeleton(
        tuple(stored["parents"]),
        tuple(stored["names"]),
        None if stored["mirror"] is None else tuple(stored["mirror"]),
        {name: tuple(part) for name, part in stored["parts"].items()},
    )


def _judge(
    model: UncertainLifter,
    clips: MotionClips,
    splits: LiftingSplits,
    noise: float,
    camera: PinholeCamera,
    seed: int,
) -> dict[str, float]:
    test = splits.test
    root = test.skeleton.root
    action = test.labels.get("action")
    with evaluation_mode(model):
        pose, log_scale = model(test.image)
        errors = (pose - test.pose).norm(dim=-1)
        others = torch.arange(pose.shape[1]) != root
        found = dict(pose_report(pose, test.pose, action, root=root))
        mean_pose = splits.train.pose.mean(0).expand_as(test.pose)
        found["mpjpe_mean_pose"] = pose_report(mean_pose, test.pose, action, root=root)["mpjpe"]
        found["scale_correlation"] = scale_calibration(errors[:, others], log_scale[:, others]).correlation
        shown = divided(clips).part(TEST)
        film = lifting_pairs(
            shown.select(np.linspace(0, len(shown) - 1, min(len(shown), 30)).round().astype(np.int64)),
            frames=10**6,
            noise=noise,
            camera=camera,
            generator=torch.Generator().manual_seed(seed + 1),
        )
        found["mpjve"] = 1000 * _velocity_error(model, film)
    for name, place in (("mpjpe_refined", None), ("mpjpe_refined_true_root", test.root)):
        refined = test_time_optimize(
            model, test.image, test.camera, root=place, mirror=test.skeleton.mirror
        ).pose
        found[name] = pose_report(refined, test.pose, action, root=root)["mpjpe"]
    return found


def _velocity_error(model: nn.Module, film: LiftingPairs) -> float:
    predicted = model(film.image).pose
    values, actions = [], []
    labels = film.labels.get("action", torch.zeros(len(film), dtype=torch.int64))
    for clip in film.clip.unique():
        rows = film.clip == clip
        if int(rows.sum()) > 1:
            values.append(mpjve(predicted[rows][None], film.pose[rows][None], root=film.skeleton.root))
            actions.append(labels[rows][:1])
    if not values:
        return float("nan")
    means = mean_over_actions(torch.cat(values), torch.cat(actions))
    return sum(means.values()) / len(means)
