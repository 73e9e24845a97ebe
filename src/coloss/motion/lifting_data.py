"""Pairs of a 2-D pose, as a detector would give it, and the 3-D pose behind it, made from recorded motion by known cameras."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.data import IndexedDataset, MotionClips, Skeleton
from coloss.data.motion_clips import TEST, TRAIN, VALIDATION
from coloss.errors import InputError
from coloss.motion.cameras import PinholeCamera, Viewpoints, ring_viewpoints
from coloss.ops.skeleton_graph import check_mirror
from coloss.train.method import Method
from coloss.train.state import State


@dataclass(frozen=True)
class LiftingPairs:
    """Poses as a camera sees them, with the truth in that camera's coordinates.

    Args:
        image: (pairs, joints, 2), noisy, in units of half the image's width (see `coloss.motion.cameras`).
        pose: (pairs, joints, 3), relative to the root, metres, in camera axes (y downwards, z away from the camera).
        root: (pairs, 3), where the root really is, in camera coordinates, metres.
        camera: one for all pairs, or one for each.
        skeleton: of all poses.
        clip: int64 (pairs), number of the clip that each comes from.
        frame: int64 (pairs), its frame there.
        labels: int64 (pairs) by name, those of the clip.
        label_names: what the numbers mean.

    Examples:
        >>> skeleton = Skeleton((-1, 0))
        >>> clip = np.zeros((4, 2, 3)) + np.array([[0.0, 1.0, 0.0], [0.0, 1.5, 0.0]])
        >>> pairs = lifting_pairs(MotionClips.from_list([clip], skeleton, fps=15), noise=0.0)
        >>> len(pairs), torch.allclose(pairs.camera(pairs.pose + pairs.root[:, None]), pairs.image)
        (4, True)
    """

    image: Tensor
    pose: Tensor
    root: Tensor
    camera: PinholeCamera
    skeleton: Skeleton
    clip: Tensor
    frame: Tensor
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    def dataset(self) -> IndexedDataset:
        """Images as inputs and poses as targets, for `coloss.fit`."""
        return IndexedDataset(self.image, self.pose)

    def select(self, indices: Int[Tensor, " chosen"]) -> "LiftingPairs":
        """Some of the pairs.

        Args:
            indices: int64 positions.
        """
        return replace(
            self,
            **{name: getattr(self, name)[indices] for name in ("image", "pose", "root", "clip", "frame")},
            camera=self.camera.select(indices),
            labels={name: values[indices] for name, values in self.labels.items()},
        )


class LiftingSplits(NamedTuple):
    """Pairs to train on, to choose by, and to judge by, of different clips."""

    train: LiftingPairs
    validation: LiftingPairs
    test: LiftingPairs


def lifting_pairs(
    clips: MotionClips,
    *,
    frames: int = 60,
    views: int = 1,
    viewpoint: Literal["clip", "frame"] = "clip",
    noise: float = 0.01,
    camera: PinholeCamera | None = None,
    distance: tuple[float, float] = (3.5, 5.5),
    height: tuple[float, float] = (0.8, 1.8),
    generator: torch.Generator | None = None,
) -> LiftingPairs:
    """Frames of recorded motion, seen by cameras on a ring around the root, with noise on the image.

    Arrays (frames, joints, 3) of one's own come in by `MotionClips.from_list`. Frames with a joint that was not seen (NaN) are left out.

    Args:
        clips: in metres, y upwards; see `coloss.data.load_motion`.
        frames: of each clip at most, spread evenly; >= 1.
        views: cameras on each clip, >= 1.
        viewpoint: `"clip"` for one camera on all frames of a clip, which keeps its direction and moves along with the root, so that they are
            a film; `"frame"` for one drawn anew each time, which gives more different views to train on.
        noise: standard deviation on each image coordinate, in units of half the image's width; 0.01 is two centimetres at 4.5 m.
        camera: one for all; default: a focal length of 2.2 and no distortion.
        distance: least and largest horizontal distance of the camera from the root, metres.
        height: least and largest height of the camera above the floor, metres.
        generator: source of randomness.

    Raises:
        InputError: for units other than metres, a number out of range, or clips without a whole pose.

    Examples:
        >>> from coloss.data import load_motion
        >>> pairs = lifting_pairs(load_motion("bandai").part(2), frames=12)  # doctest: +SKIP
        >>> pairs.image.shape  # doctest: +SKIP
        torch.Size([2520, 21, 2])
    """
    if clips.units != "m":
        raise InputError(f'clips must be in metres (units "m") to be seen by a camera, got {clips.units!r}')
    for name, value in (("frames", frames), ("views", views)):
        if value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    if not 0 <= noise < 1:
        raise InputError(f"noise must be in [0, 1) of half the image's width, got {noise}")
    if viewpoint not in ("clip", "frame"):
        raise InputError(f'viewpoint must be "clip" or "frame", got {viewpoint!r}')
    camera = PinholeCamera(2.2) if camera is None else camera
    rows, owners, numbers = _frames(clips, frames)
    if not len(rows):
        raise InputError("clips must hold at least one frame with every joint, got none")
    world = torch.from_numpy(np.ascontiguousarray(clips.joints[rows])).repeat(views, 1, 1)
    clip, frame = torch.from_numpy(owners).repeat(views), torch.from_numpy(numbers).repeat(views)
    root = clips.skeleton.root
    # One camera for each run of frames of one clip in one view, which keeps its direction and goes along with the root on the floor.
    fresh = torch.ones(len(world), dtype=torch.bool)
    if viewpoint == "clip":
        fresh[1:] = clip[1:] != clip[:-1]
        fresh[:: len(rows)] = True
    of = fresh.cumsum(0) - 1
    first = world[fresh, root]
    rotation, position = ring_viewpoints(first, distance=distance, height=height, generator=generator)
    along = (world[:, root] - first[of]) * torch.tensor([1.0, 0.0, 1.0])
    placed = Viewpoints(rotation[of], position[of] + along).to_camera(world)
    image = camera(placed)
    image = image + noise * torch.randn(image.shape, generator=generator)
    labels = {name: torch.from_numpy(np.asarray(values))[clip] for name, values in clips.labels.items()}
    return LiftingPairs(
        image,
        placed - placed[:, root, None],
        placed[:, root],
        camera,
        clips.skeleton,
        clip,
        frame,
        labels,
        clips.label_names,
    )


def _frames(clips: MotionClips, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `clips.joints` with every joint seen, spread evenly over each clip; the clip and the frame of each."""
    none = np.zeros(0, np.int64)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(none, none, none)]
    for index in range(len(clips)):
        whole = np.flatnonzero(np.isfinite(clips.clip(index)).all((1, 2)))
        chosen = whole[np.linspace(0, len(whole) - 1, min(most, len(whole))).round().astype(np.int64)]
        found.append((clips.start[index] + chosen, np.full(len(chosen), index), chosen))
    rows, owners, numbers = (np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True))
    return rows, owners, numbers


def divided(clips: MotionClips) -> MotionClips:
    """The clips with a part to train on, one to choose by and one to test by: where one of the last two is missing, every tenth goes there.

    Args:
        clips: at least three.

    Raises:
        InputError: for fewer than three clips, or a division that leaves a part empty.

    Examples:
        >>> clips = MotionClips.from_list([np.zeros((5, 2, 3))] * 12, Skeleton((-1, 0)), 15)
        >>> divided(clips).split.tolist()
        [2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0]
    """
    if len(clips) < 3:
        raise InputError(f"clips must be at least 3, to train, choose and test by, got {len(clips)}")
    split = clips.split.copy()
    for wanted, offset in ((TEST, 0), (VALIDATION, 1)):
        if not (split == wanted).any():
            spare = np.flatnonzero(split == TRAIN)
            split[spare[offset::10]] = wanted
    counts = [int((split == part).sum()) for part in (TRAIN, VALIDATION, TEST)]
    if not all(counts):
        raise InputError(
            f"clips must leave some to train, choose and test by, got {', '.join(map(str, counts))}"
        )
    return replace(clips, split=split)


def lifting_splits(
    clips: MotionClips,
    *,
    seed: int = 0,
    train_frames: int = 60,
    test_frames: int = 12,
    noise: float = 0.01,
    camera: PinholeCamera | None = None,
) -> LiftingSplits:
    """Pairs by the clips' own division; of clips that have no validation or test part, every tenth goes there.

    Cameras of training pairs are drawn for each frame, those of the others for each clip, so that velocities can be judged, too.

    Args:
        clips: in metres, y upwards; at least three.
        seed: of cameras and noise, >= 0.
        train_frames: of each training clip at most.
        test_frames: of each validation and test clip at most.
        noise: standard deviation on each image coordinate, in units of half the image's width.
        camera: one for all; default: a focal length of 2.2 and no distortion.

    Raises:
        InputError: for what `divided` and `lifting_pairs` refuse.

    Examples:
        >>> clips = MotionClips.from_list([np.random.rand(5, 2, 3) for _ in range(20)], Skeleton((-1, 0)), 15)
        >>> [len(part) for part in lifting_splits(clips)]
        [80, 10, 10]
    """
    clips = divided(clips)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in (TRAIN, VALIDATION, TEST):
        parts.append(
            lifting_pairs(
                clips.part(part),
                frames=train_frames if part == TRAIN else test_frames,
                viewpoint="frame" if part == TRAIN else "clip",
                noise=noise,
                camera=camera,
                generator=generator,
            )
        )
    return LiftingSplits(*parts)


def mirror_poses(
    poses: Float[Tensor, "poses joints axes"], mirror: Sequence[int]
) -> Float[Tensor, "poses joints axes"]:
    """The poses of people seen in a mirror: x negated, left and right joints swapped. Twice gives the poses back.

    The same for images (x from the middle of the image) and for poses in camera axes; what a lifter predicts for one is then right
    for the other. The mirrored image belongs to the mirrored camera (`PinholeCamera.mirrored`).

    Args:
        poses: (poses, joints, 2 or 3), x first.
        mirror: partner of each joint on the other side, itself on the middle line.

    Raises:
        InputError: for a number of partners other than joints, or partners that are not each other's.

    Examples:
        >>> mirror_poses(torch.tensor([[[0.0, 1.0], [0.2, 0.0], [-0.3, 0.5]]]), (0, 2, 1))
        tensor([[[-0.0000, 1.0000],
                 [ 0.3000, 0.5000],
                 [-0.2000, 0.0000]]])
    """
    if len(mirror) != poses.shape[1]:
        raise InputError(f"mirror must have a partner for each of {poses.shape[1]} joints, got {len(mirror)}")
    partner = _swap(mirror)
    sign = poses.new_ones(poses.shape[-1])
    sign[0] = -1
    return poses[:, list(partner)] * sign


def _swap(mirror: Sequence[int] | None) -> tuple[int, ...]:
    try:
        return check_mirror(mirror, 0 if mirror is None else len(mirror))
    except ValueError as error:
        raise InputError(str(error)) from error


class MirrorPoses(Method):
    """Shows a lifter half of each batch in a mirror: image and target together, left and right swapped.

    Args:
        mirror: partner of each joint on the other side, itself on the middle line (`Skeleton.mirror`).

    Raises:
        InputError: if there is no mirror, it is no swap of pairs, or it does not have the batch's number of joints.

    Examples:
        >>> import coloss
        >>> from coloss.motion import ResidualLifter
        >>> data = (torch.randn(16, 3, 2), torch.randn(16, 3, 3))
        >>> run = coloss.fit(
        ...     ResidualLifter(3, 8, 1),
        ...     data,
        ...     torch.nn.functional.mse_loss,
        ...     [MirrorPoses((0, 2, 1))],
        ...     budget=coloss.Budget(steps=2),
        ... )
        >>> run.steps
        2
    """

    def __init__(self, mirror: Sequence[int] | None) -> None:
        super().__init__()
        self.mirror = _swap(mirror)

    def on_batch(self, state: State) -> None:
        image, pose = state.batch.inputs, state.batch.targets
        turned = torch.rand(len(image), generator=state.local_generator).to(image.device) < 0.5
        turned = turned[:, None, None]
        state.batch.inputs = torch.where(turned, mirror_poses(image, self.mirror), image)
        state.batch.targets = torch.where(turned, mirror_poses(pose, self.mirror), pose)
