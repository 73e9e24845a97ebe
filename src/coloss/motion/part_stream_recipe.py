"""From recorded clips to a recogniser of actions made of networks for parts of the body, in one call."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data import IndexedDataset, MotionClips, MotionSplits, motion_splits
from coloss.errors import InputError
from coloss.metrics import knn_probe, macro_f1, predict
from coloss.metrics.inference import evaluation_mode
from coloss.motion.clip_crops import ClipCrops
from coloss.motion.part_streams import (
    ARM_STRIDES,
    ARM_WIDTHS,
    BODY_STRIDES,
    BODY_WIDTHS,
    LEG_STRIDES,
    LEG_WIDTHS,
    PartStream,
    PartStreamEnsemble,
    PartStreamNet,
    streams_of_parts,
)
from coloss.motion.score_fusion import fit_fusion_weights, fuse_scores
from coloss.train import Budget, cosine, fit, load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

Size = Literal["small", "paper"]

_FRAMES = {"small": 32, "paper": 64}
_STEPS = {"small": 1500, "paper": 12000}
_SMALL = ((16, 32, 64), (1, 2, 2))
_PAPER = {"body": (BODY_WIDTHS, BODY_STRIDES), "arms": (ARM_WIDTHS, ARM_STRIDES)}
_CENTRE = 0.95


class PartStreamModel(NamedTuple):
    """A trained recogniser and what clips must look like for it.

    Attributes:
        networks: clips to scores.
        class_names: of the scores.
        parents: of the skeleton's joints.
        frames: that clips are brought to.
        root: joint that lies at the origin in the first frame.
        scale: what coordinates are divided by, (1, 3 or 1, 1, 1, 1).
    """

    networks: PartStreamEnsemble
    class_names: tuple[str, ...]
    parents: tuple[int, ...]
    frames: int
    root: int
    scale: Tensor

    def probabilities(self, clips: MotionClips) -> Float[Tensor, "clips classes"]:
        """What happens in clips of the same skeleton.

        Args:
            clips: of any length; joints that are missing for a time are interpolated.

        Raises:
            InputError: for clips of another skeleton, or a joint that is never seen in a clip.
        """
        if tuple(clips.skeleton.parents) != self.parents:
            raise InputError(
                f"clips must have the skeleton of {len(self.parents)} joints that the networks were trained on, "
                f"got another of {clips.skeleton.num_joints}"
            )
        joints = clips.resampled(self.frames, centre=_CENTRE)
        if missing := joints.isnan().flatten(1).any(1).nonzero().flatten().tolist():
            raise InputError(f"a joint of clip {clips.names[missing[0]]!r} is never seen, or not a number")
        centred = (joints - joints[:, :1, self.root, None]).permute(0, 3, 1, 2)[..., None]
        with evaluation_mode(self.networks), torch.no_grad():
            return self.networks((centred / self.scale).to(self.networks.weights)).softmax(-1)


def train_part_streams(
    data: str | Path = "msr-action3d",
    folder: str | Path = "runs/psumnet",
    *,
    size: str = "small",
    together: bool = False,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains networks for body, arms and legs on unified modalities and weighs their scores; behind `coloss run psumnet`.

    One network after the other, each on random stretches of the clips turned a little; then the weights, on validation data. A run that was
    stopped goes on in its folder, in the network where it was.

    Args:
        data: name of a set of motion, or a file that `load_motion` reads; divided by person where persons are known.
        folder: for `model.safetensors`, `run.json`, `metrics.json` and checkpoints; `load_part_streams` reads it.
        size: `"small"`, three plain blocks of 16 to 64 channels on 32 frames; `"paper"`, ten, six and four of 64 to 256, with learnt relations, on 64
            frames (for a GPU).
        together: one loss on the mean of the scores, in place of one for each network.
        budget: of all networks together; default: 1,500 steps, or 12,000.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On the test part: `accuracy` (fused with the fitted weights), `macro_f1`, `equal_weights_accuracy`, the accuracy and the weight of
        each network, `parameters`, `raw_knn_accuracy` (five neighbours by coordinates) and `untrained_knn_accuracy` (by the networks as
        they began).

    Raises:
        InputError: for an unknown size, data that cannot be divided, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_part_streams(
        ...     "msr-action3d", tempfile.mkdtemp(), budget=Budget(steps=6)
        ... )  # doctest: +SKIP
        >>> sorted(name for name in metrics if name.startswith("weight_"))  # doctest: +SKIP
        ['weight_arms', 'weight_body', 'weight_legs']
    """
    if size not in get_args(Size):
        raise InputError(f'size must be "small" or "paper", got {size!r}')
    folder = Path(folder)
    splits = motion_splits(str(data), frames=_FRAMES[size], seed=seed)
    streams = streams_of_parts(splits.skeleton)
    assert splits.standardize is not None and splits.standardize.scale is not None
    run: dict[str, Any] = {
        "data": source_name(str(data)),
        "seed": seed,
        "size": size,
        "together": together,
        "streams": {name: [stream.joints, stream.parents] for name, stream in streams.items()},
        "class_names": splits.class_names,
        "parents": splits.skeleton.parents,
        "root": splits.skeleton.root,
        "scale": splits.standardize.scale.flatten().tolist(),
        "budget": (budget or Budget(steps=_STEPS[size])).as_dict(),
    }
    claim_folder(folder, run)
    model = _new_networks(run)
    untrained = _neighbours(model, splits)
    stages: Mapping[str, nn.Module] = {"together": model} if together else dict(model.nets.items())
    for number, (name, part) in enumerate(stages.items()):
        fit(
            part,
            splits.train,
            nn.functional.cross_entropy,
            [ClipCrops()],
            budget=Budget(**run["budget"]).part(1 / len(stages)),
            batch_size=16 if size == "small" else 64,
            optimizer=partial(torch.optim.AdamW, lr=1.2e-2 if size == "small" else 2e-3, weight_decay=0.01),
            learning_rate_schedule=cosine(warmup=0.05),
            clip_norm=1.0,
            checkpoint_dir=folder / "checkpoints" / name,
            checkpoint_every=100,
            resume=True,
            progress=None
            if progress is None
            else lambda share, terms, done=number: progress((done + share) / len(stages)),  # type: ignore[misc]
            seed=seed,
        )
    model = model.cpu().eval()
    targets = splits.validation.targets
    assert isinstance(targets, Tensor)
    if not together:
        model.weights.copy_(fit_fusion_weights(_scores(model, splits.validation), targets))
    save_model(model, folder / "model.safetensors")
    metrics = _judged(load_part_streams(folder).networks, splits) | untrained
    write_metrics(folder, metrics)
    return metrics


def load_part_streams(folder: str | Path) -> PartStreamModel:
    """What `train_part_streams` stored, in evaluation mode.

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> from coloss.data import load_motion
        >>> model = load_part_streams("runs/psumnet-msr-action3d")  # doctest: +SKIP
        >>> model.probabilities(load_motion("msr-action3d")).shape  # doctest: +SKIP
        torch.Size([566, 20])
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        model = _new_networks(run)
        parents = tuple(run["parents"])
        names, scale = tuple(run["class_names"]), torch.tensor(run["scale"]).view(1, -1, 1, 1, 1)
        frames, root = _FRAMES[run["size"]], int(run["root"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no part streams ({error!r} in run.json)") from error
    load_model(model, folder / "model.safetensors")
    return PartStreamModel(model.eval(), names, parents, frames, root, scale)


def _new_networks(run: Mapping[str, Any]) -> PartStreamEnsemble:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        nets = {}
        for name, (joints, parents) in run["streams"].items():
            small = run["size"] == "small"
            widths, strides = _SMALL if small else _PAPER.get(name, (LEG_WIDTHS, LEG_STRIDES))
            nets[name] = PartStreamNet(
                PartStream(tuple(joints), tuple(parents)),
                len(run["class_names"]),
                widths=widths,
                strides=strides,
                graph="importance" if small else "relation",
            )
        return PartStreamEnsemble(nets)


def _scores(model: PartStreamEnsemble, data: IndexedDataset) -> list[Tensor]:
    """Of each network, as the ensemble adds them."""
    return [predict(net, data).outputs.float() for net in model.nets.values()]


def _judged(model: PartStreamEnsemble, splits: MotionSplits) -> dict[str, float]:
    scores, targets = _scores(model, splits.test), splits.test.targets
    assert isinstance(targets, Tensor)
    fused = fuse_scores(scores, model.weights)

    def accuracy(scores: Tensor) -> float:
        return (scores.argmax(-1) == targets).float().mean().item()

    found = {
        "accuracy": accuracy(fused),
        "macro_f1": float(macro_f1(fused, targets)),
        "equal_weights_accuracy": accuracy(fuse_scores(scores)),
    }
    for name, score, weight in zip(model.nets, scores, model.weights.tolist()):
        found |= {f"accuracy_{name}": accuracy(score), f"weight_{name}": weight}
    found["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
    return found


def _neighbours(model: PartStreamEnsemble, splits: MotionSplits) -> dict[str, float]:
    """Accuracy of five neighbours by coordinates, and by what untrained networks make of them."""

    def encoded(data: IndexedDataset) -> Tensor:
        nets: Any = list(model.nets.values())
        return predict(
            model, data, call=lambda clips: torch.cat([net.encoded(clips) for net in nets], 1)
        ).outputs.float()

    train, test = splits.train, splits.test
    assert isinstance(train.inputs, Tensor) and isinstance(test.inputs, Tensor)
    assert isinstance(train.targets, Tensor) and isinstance(test.targets, Tensor)
    found = {}
    for name, rows, others in (
        ("raw_knn", train.inputs.flatten(1), test.inputs.flatten(1)),
        ("untrained_knn", encoded(train), encoded(test)),
    ):
        probe = knn_probe(
            rows, train.targets, others, test.targets, k=5, temperature=None, metric="euclidean"
        )
        found[f"{name}_accuracy"] = probe.accuracy
    return found
