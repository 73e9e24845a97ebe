"""Clients of a federation made from recorded motion: one for each data set, or one for each group of classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coloss.data import (
    IndexedDataset,
    MotionClips,
    Skeleton,
    common_layout,
    held_out_pairs,
    load_motion,
)
from coloss.data.skeleton import COMMON_JOINTS
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.motion.adaptive_topology import add_adaptive_topology
from coloss.motion.federated_client import FederatedClient
from coloss.nn import Classifier, SkeletonEncoder
from coloss.ops import graph_partition

Division = Literal["dataset", "class"]
LABELS = ("action", "gesture")


@dataclass(frozen=True)
class SkeletonShard:
    """The labelled clips of one client, divided.

    Attributes:
        name: of the client.
        train: inputs float32 (clips, 3, frames, joints), targets int64 (clips).
        test: likewise.
        classes: names of the classes, by target.
        skeleton: of the clips.
    """

    name: str
    train: IndexedDataset
    test: IndexedDataset
    classes: tuple[str, ...]
    skeleton: Skeleton


def clip_inputs(clips: MotionClips, frames: int) -> Tensor:
    """Clips as a network takes them: resampled in time, the root of each first frame at the origin.

    Args:
        clips: of any skeleton.
        frames: of the result, >= 1.

    Returns:
        float32 (clips, 3, frames, joints), in the clips' unit. A joint that is never seen stands where the root does.

    Raises:
        InputError: for a number of frames below 1, or a clip whose root is never seen.

    Examples:
        >>> one = MotionClips.from_list([np.ones((4, 2, 3))], Skeleton((-1, 0)), 15)
        >>> clip_inputs(one, 8).shape, clip_inputs(one, 8).abs().max()
        (torch.Size([1, 3, 8, 2]), tensor(0.))
    """
    joints = clips.resampled(frames)
    root = joints[:, :, clips.skeleton.root]
    if torch.isnan(root).any():
        at = int(torch.isnan(root).flatten(1).any(1).nonzero()[0])
        raise InputError(f"clips must show the root joint, {clips.names[at]!r} never does")
    joints = torch.where(torch.isnan(joints), root[:, :, None], joints)
    return (joints - root[:, :1, None]).permute(0, 3, 1, 2).contiguous()


def skeleton_shards(
    data: str | Sequence[str] = ("bandai", "hdm05", "msr-action3d"),
    *,
    by: Division = "dataset",
    parts: int = 3,
    frames: int = 32,
    limit: int | None = 300,
    test_limit: int | None = None,
    seed: int = 0,
) -> list[SkeletonShard]:
    """Divided, labelled clips for each client.

    The three named sets of bodies are brought to the 15 joints that they share, in units of the body's torso. Tests are of other people (`hdm05`,
    `msr-action3d`), of pairs of action and style that training does not show (`bandai`, its larger part of ten actions), or as a file's own
    `split` says. Other sets and files stay as they are, and must then share one skeleton.

    Args:
        data: names or paths for `coloss.data.load_motion`, as a sequence or joined by `+`. The label is `action` or `gesture`, or the file's first.
        by: `"dataset"` makes each set a client; `"class"` deals the classes of one set to `parts` clients.
        parts: clients of one set, with `by="class"`.
        frames: of each clip.
        limit: training clips of a client at most, drawn by the seed.
        test_limit: test clips of a client at most, drawn by the seed.
        seed: of what is drawn.

    Raises:
        InputError: for sets that do not fit together, a set without labels or without test clips, or values out of range.
        DataNotFoundError: if a file is not there.

    Examples:
        >>> shards = skeleton_shards(["hdm05"], limit=50)  # doctest: +SKIP
        >>> shards[0].train.inputs.shape, len(shards[0].classes)  # doctest: +SKIP
        (torch.Size([50, 3, 32, 15]), 11)
    """
    names = data.split("+") if isinstance(data, str) else list(data)
    if not names or len(set(names)) != len(names):
        raise InputError(f"data must be distinct names or paths, got {'+'.join(names) or 'none'}")
    if by == "class" and len(names) != 1:
        raise InputError(f'by="class" takes one data set, got {len(names)}')
    if by == "class" and parts < 1:
        raise InputError(f"parts must be >= 1, got {parts}")
    for name, value in (("limit", limit), ("test_limit", test_limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    loaded = [load_motion(name) for name in names]
    if all(clips.source in COMMON_JOINTS for clips in loaded):
        loaded = [common_layout(clips) for clips in loaded]
    for clips in loaded[1:]:
        if clips.skeleton.parents != loaded[0].skeleton.parents:
            raise InputError(
                "data must share one skeleton: only "
                + ", ".join(COMMON_JOINTS)
                + " can be brought to common joints"
            )
    sides = [_labelled(name, clips) for name, clips in zip(names, loaded, strict=True)]
    if by == "class":
        sides = _by_class(sides[0], parts)
    return [
        SkeletonShard(
            side.name,
            _dataset(side.train, limit, frames, seed),
            _dataset(side.test, test_limit, frames, seed),
            side.classes,
            side.train[0].skeleton,
        )
        for side in sides
    ]


@dataclass(frozen=True)
class _Labelled:
    """Clips and targets of one client, before they are drawn and resampled."""

    name: str
    train: tuple[MotionClips, NDArray[np.int64]]
    test: tuple[MotionClips, NDArray[np.int64]]
    classes: tuple[str, ...]


def _labelled(name: str, clips: MotionClips) -> _Labelled:
    if not clips.labels:
        raise InputError(f"data must have labels, {name} has none")
    label = next((label for label in LABELS if label in clips.labels), next(iter(clips.labels)))
    if clips.source == "bandai":
        clips = clips.select(clips.labels["part"] == 2)
        test = held_out_pairs(clips)
    elif clips.source in COMMON_JOINTS:
        test = clips.split != 0
    else:
        clips = clips.select(clips.split != 1)
        test = clips.split == 2
    if test.all() or not test.any():
        raise InputError(
            f"data must have training and test clips (split 0 and 2), {name} has only one of them"
        )
    numbers, targets = np.unique(clips.labels[label], return_inverse=True)
    known = clips.label_names.get(label)
    return _Labelled(
        name.rpartition("/")[2].removesuffix(".npz"),
        (clips.select(~test), targets[~test]),
        (clips.select(test), targets[test]),
        tuple(str(known[n]) if known else str(n) for n in numbers),
    )


def _by_class(whole: _Labelled, parts: int) -> list[_Labelled]:
    if parts > len(whole.classes) // 2:
        raise InputError(
            f"parts must leave each client two classes of {len(whole.classes)}, got {parts} parts"
        )

    def dealt(
        side: tuple[MotionClips, NDArray[np.int64]], part: int
    ) -> tuple[MotionClips, NDArray[np.int64]]:
        chosen = side[1] % parts == part
        return side[0].select(chosen), side[1][chosen] // parts

    return [
        _Labelled(
            f"{whole.name}-{part + 1}",
            dealt(whole.train, part),
            dealt(whole.test, part),
            whole.classes[part::parts],
        )
        for part in range(parts)
    ]


def _dataset(
    side: tuple[MotionClips, NDArray[np.int64]], limit: int | None, frames: int, seed: int
) -> IndexedDataset:
    clips, targets = side
    # Drawn for each set alone, so that a client's clips do not depend on who else takes part.
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    chosen = order[:limit].sort().values.numpy()
    return IndexedDataset(clip_inputs(clips.select(chosen), frames), torch.from_numpy(targets[chosen]))


def skeleton_clients(
    shards: Sequence[SkeletonShard],
    *,
    private: Sequence[str] = ("head", "norm"),
    topology: bool = False,
    private_links: bool = True,
    widths: Sequence[int] = (16, 32, 64),
    kernel: int = 9,
    seed: int = 0,
    evaluate: Callable[[nn.Module, IndexedDataset], Mapping[str, float]] = evaluate_classifier,
) -> list[FederatedClient]:
    """A client for each shard, with a small graph network that begins alike for all but for its head.

    Args:
        shards: of `skeleton_shards`.
        private: what stays with a client, as in `split_state`.
        topology: give the network adaptive topologies, and keep their private part on the client.
        private_links: whether they have such a part; without it, all of them is shared.
        widths: channels of the blocks of `coloss.nn.SkeletonEncoder`; every block but the first halves the frames.
        kernel: frames of its temporal convolutions.
        seed: of the initial weights.
        evaluate: `(model, test data) -> metrics`.

    Returns:
        Clients whose models are `Classifier(SkeletonEncoder)`: blocks to be distilled are `"backbone.blocks.0"` and so on.

    Examples:
        >>> x, y = torch.randn(8, 3, 8, 2), torch.arange(8) % 2
        >>> shard = SkeletonShard(
        ...     "a", IndexedDataset(x, y), IndexedDataset(x, y), ("sit", "run"), Skeleton((-1, 0))
        ... )
        >>> client = skeleton_clients([shard], topology=True, widths=(4,))[0]
        >>> client.private
        ('head', 'norm', 'topology')
    """
    kept = tuple(dict.fromkeys((*private, *(("topology",) if topology and private_links else ()))))
    return [
        FederatedClient(
            shard.name,
            skeleton_classifier(
                shard.skeleton,
                len(shard.classes),
                topology=topology,
                private_links=private_links,
                widths=widths,
                kernel=kernel,
                seed=seed,
            ),
            shard.train,
            shard.test,
            kept,
            evaluate,
        )
        for shard in shards
    ]


def skeleton_classifier(
    skeleton: Skeleton,
    classes: int,
    *,
    topology: bool = False,
    private_links: bool = True,
    widths: Sequence[int] = (16, 32, 64),
    kernel: int = 9,
    seed: int = 0,
) -> Classifier:
    """A small graph network with a linear head; all but the head depends on the seed and not on the number of classes.

    Args:
        skeleton: of the clips.
        classes: at least 1.
        topology: give it adaptive topologies.
        private_links: whether these have a private matrix.
        widths: channels of the blocks.
        kernel: frames of its temporal convolutions.
        seed: of the initial weights.

    Raises:
        ValueError: for impossible widths, kernel or classes.

    Examples:
        >>> model = skeleton_classifier(Skeleton((-1, 0)), 5, widths=(4, 8))
        >>> model(torch.randn(2, 3, 8, 2)).shape
        torch.Size([2, 5])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SkeletonEncoder(
            graph_partition(skeleton.parents),
            widths=widths,
            strides=(1, *[2] * (len(widths) - 1)),
            kernel=kernel,
        )
        model = Classifier(encoder, classes)
        if topology:
            add_adaptive_topology(model, private=private_links)
    return model
