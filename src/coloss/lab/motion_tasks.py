"""Tasks on recorded motion: recognise the action of a clip of joints, or learn an encoder of clips without labels."""

from functools import lru_cache, partial
from pathlib import Path

from torch import nn

from coloss.data import DATASETS, holds_motion
from coloss.data.motion_splits import MotionSplits, motion_splits
from coloss.lab.known_tasks import SELF_SUPERVISED, is_file
from coloss.metrics import evaluate_classifier, evaluate_encoder
from coloss.nn import Classifier, SkeletonEncoder
from coloss.ops import graph_partition
from coloss.train.budget import Budget
from coloss.train.task import Task

FRAMES = 32
"""Frames that every clip is brought to."""


def holds_clips(name: str) -> bool:
    """Whether a name is that of a task on motion, or of a file of clips.

    Examples:
        >>> holds_clips("msr-action3d-ssl"), holds_clips("digits")
        (True, False)
    """
    known = DATASETS.get(name.removesuffix(SELF_SUPERVISED))
    if known is not None:
        return known.kind == "motion"
    return is_file(name) and holds_motion(name)


def motion_task(
    name: str,
    stamp: str = "",
    label: str | None = None,
    limit: int | None = None,
    *,
    self_supervised: bool = False,
) -> Task:
    """Classification of clips by a small graph network; or, for names that end in `-ssl`, an encoder judged by probes with all labels.

    The division is that of `coloss.data.motion_splits`: by person, or by pairs of action and style.

    Args:
        name: of a task, or path of an `.npz` file.
        stamp: identifies the content of a file.
        label: the class; the first label by default.
        limit: clips of each part at most.
        self_supervised: for a file.

    Raises:
        InputError: when it loads clips that cannot be divided, or have no such label.

    Examples:
        >>> task = motion_task("msr-action3d")
        >>> task.kind, task.metric, task.budget.steps
        ('classification', 'accuracy', 300)
    """
    source = name.removesuffix(SELF_SUPERVISED)
    title = source if source in DATASETS else Path(name).name
    load = partial(_load, source if source in DATASETS else str(Path(name).expanduser()), stamp, label, limit)
    if self_supervised or (source in DATASETS and name != source):
        return Task(
            name=name,
            kind="self-supervised",
            title=f"an encoder for {title} without labels, judged by probes",
            load=load,
            model=skeleton_encoder,
            objective=None,
            objective_name="untrained",
            validate=partial(evaluate_encoder, labels=None, split="validation"),
            test=partial(evaluate_encoder, labels=None, split="test"),
            metric="linear_probe",
            budget=Budget(steps=300),
            batch_size=64,
        )
    return Task(
        name=name,
        kind="classification",
        title=f"classification on {title}",
        load=load,
        model=skeleton_classifier,
        objective=nn.functional.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: evaluate_classifier(model, splits.validation),
        test=lambda model, splits: evaluate_classifier(model, splits.test),
        metric="accuracy",
        budget=Budget(steps=300),
        batch_size=32,
        teacher=partial(skeleton_classifier, width=2.0),
    )


def skeleton_encoder(splits: MotionSplits, width: float = 1.0) -> SkeletonEncoder:
    """Three blocks of graph and temporal convolutions over the splits' skeleton, with a learnt weight for every pair of joints.

    With weights along bones alone a network of this size learns the actions far worse: after 200 steps on MSR Action3D 0.43 and 0.64 of two
    held-out persons' clips, against 0.63 and 0.85.
    """
    return SkeletonEncoder(
        graph_partition(splits.skeleton.parents),
        splits.input_shape[0],
        tuple(int(width * channels) for channels in (16, 32, 64)),
        graph="additive",
    )


def skeleton_classifier(splits: MotionSplits, width: float = 1.0) -> Classifier:
    """That encoder with a linear head."""
    return Classifier(skeleton_encoder(splits, width), splits.num_classes or 0)


@lru_cache(maxsize=3)
def _load(source: str, stamp: str, label: str | None, limit: int | None, seed: int) -> MotionSplits:
    """`stamp` makes a file that changed another entry of the cache."""
    chosen: str | Path = source if source in DATASETS else Path(source)
    return motion_splits(chosen, label=label, frames=FRAMES, seed=seed, limit=limit)
