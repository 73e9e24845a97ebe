"""Numbers that describe a motion wherever it happens and wherever it faces, and the joints back from them.

The representation of HumanML3D (C. Guo et al., Generating Diverse and Natural 3D Human Motions from Text, CVPR 2022) for any skeleton of J
joints. Of frame t, with r_t the turn about the vertical that makes the body face +z:

    turn         1         half the yaw from t to t+1, of r_{t+1} r_t^-1, rad
    travel       2         x and z of r_{t+1} (root_{t+1} - root_t), m
    height       1         y of the root, m
    positions    3 (J-1)   r_t (joint - root), with the joint's own y, m
    rotations    6 (J-1)   first two columns of each bone's rotation, from swings only; left out unless asked for
    velocities   3 J       r_t (joint_{t+1} - joint_t), m per frame
    contacts     4         left ankle, left toe, right ankle, right toe: 1 where the step is short

263 numbers for 22 joints with rotations, 251 for 21, and 131 for 21 without them. The root, its height and the positions alone determine the
joints; the rest is redundant, which helps a network and does not help `recover_joints`.

Two things differ from the published code, where that code is at fault: a turn through straight backwards keeps its sign (there the sign
flips, and the recovered body faces elsewhere from then on), and a bone that points exactly against its direction at rest is turned by half a
turn (there it becomes NaN). The published rotations of a bone at the beginning of a chain are relative to r_t, not to its inverse; this is
kept, so that files agree.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from coloss.data import Skeleton, canonical_joints
from coloss.errors import InputError

_PUBLISHED_FPS = 20.0
_PUBLISHED_CONTACT = math.sqrt(0.002)


def feature_groups(num_joints: int, *, rotations: bool = False) -> dict[str, slice]:
    """Which numbers of a frame are what; the kinds of the table above, in its order.

    Args:
        num_joints: J, >= 2.
        rotations: whether the frame holds rotations of bones.

    Raises:
        ValueError: for fewer than two joints.

    Examples:
        >>> feature_groups(22, rotations=True)["contacts"], feature_groups(21)["contacts"]
        (slice(259, 263, None), slice(127, 131, None))
    """
    if num_joints < 2:
        raise ValueError(f"num_joints must be >= 2, got {num_joints}")
    sizes = {"turn": 1, "travel": 2, "height": 1, "positions": 3 * (num_joints - 1)}
    if rotations:
        sizes["rotations"] = 6 * (num_joints - 1)
    sizes |= {"velocities": 3 * num_joints, "contacts": 4}
    groups, start = {}, 0
    for name, size in sizes.items():
        groups[name] = slice(start, start + size)
        start += size
    return groups


def motion_features(
    joints: Float[Tensor, "frames joints 3"],
    skeleton: Skeleton,
    *,
    fps: float = _PUBLISHED_FPS,
    contact_step: float | None = None,
    smoothing: float = 20.0,
    rotations: bool = False,
    rest: Float[Tensor, "joints 3"] | None = None,
) -> Float[Tensor, "steps features"]:
    """The numbers of the table above for each frame but the last.

    The clip is first put on the floor, its first root over the origin, its first frame facing +z (`canonical_joints`).

    Args:
        joints: positions in metres, y up; at least two frames.
        skeleton: must know `face` and `feet`.
        fps: frames per second, > 0; only sets the default of `contact_step`.
        contact_step: metres per frame below which a foot counts as standing; None: 0.89 metres per second, as published.
        smoothing: standard deviation, in frames, of the Gaussian that the facing is smoothed with; 0 for none.
        rotations: adds the rotations of bones; then `rest` is needed.
        rest: direction of the bone that ends in each joint in the pose of no rotation, of any length > 0 (of the root: ignored);
            `rest_directions` finds them.

    Returns:
        (frames - 1, features) in the dtype of `joints`.

    Raises:
        InputError: for one frame, another number of joints, joints that are not finite, a skeleton without face or feet, or rotations
            without `rest`.

    Source:
        HumanML3D (Guo et al., CVPR 2022), its published preprocessing.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> joints = torch.randn(5, 21, 3, generator=torch.Generator().manual_seed(0))
        >>> features = motion_features(joints, SKELETONS["bandai"], fps=15)
        >>> features.shape, recover_joints(features, 21).shape
        (torch.Size([4, 131]), torch.Size([4, 21, 3]))
    """
    _check_clip(joints, skeleton)
    if skeleton.feet is None:
        raise InputError("skeleton must know its feet: left ankle, left toe, right ankle, right toe")
    for name, value in (("fps", fps), ("contact_step", contact_step)):
        if value is not None and not value > 0:
            raise InputError(f"{name} must be > 0, got {value}")
    if smoothing < 0:
        raise InputError(f"smoothing must be >= 0, got {smoothing}")
    if rotations and rest is None:
        raise InputError(
            "rest must give each bone's direction at rest where rotations are asked for, got None"
        )
    if contact_step is None:
        contact_step = _PUBLISHED_CONTACT * _PUBLISHED_FPS / fps
    places = canonical_joints(joints.double(), skeleton)
    yaw = _yaws(places, skeleton, smoothing)
    yaw[0] = 0.0
    root = places[:, skeleton.root]
    others = [joint for joint in range(skeleton.num_joints) if joint != skeleton.root]
    step = torch.remainder(yaw.diff() + math.pi, 2 * math.pi) - math.pi
    travel = _turned(root.diff(dim=0), -yaw[1:])
    positions = places[:, others] - root[:, None] * root.new_tensor([1.0, 0.0, 1.0])
    velocities = places.diff(dim=0)
    parts = [
        -step[:, None] / 2,
        travel[:, [0, 2]],
        root[:-1, 1:2],
        _turned(positions, -yaw[:, None])[:-1].flatten(1),
        _turned(velocities, -yaw[:-1, None]).flatten(1),
        (velocities[:, list(skeleton.feet)].norm(dim=-1) < contact_step).double(),
    ]
    if rotations and rest is not None:
        turns = _bone_rotations(places, yaw, skeleton, rest.double())[:-1, others]
        parts.insert(4, turns.transpose(-1, -2)[..., :2, :].flatten(1))
    return torch.cat(parts, dim=1).to(joints.dtype)


def recover_joints(
    features: Float[Tensor, "*batch frames features"], num_joints: int, *, root: int = 0
) -> Float[Tensor, "*batch frames joints 3"]:
    """The joints that features describe, beginning over the origin and facing +z; differentiable.

    Uses the first 4 + 3 (J - 1) numbers of a frame and no others.

    Args:
        features: of `motion_features`, not normalised; leading dimensions are a batch.
        num_joints: J, >= 2.
        root: the root's number among the joints.

    Returns:
        metres, y up, as many frames as the features have.

    Raises:
        ValueError: for fewer numbers in a frame than the joints need, or a root that does not exist.

    Examples:
        >>> standing = torch.zeros(3, 4 + 3 + 6 + 4)
        >>> standing[:, 2], standing[:, 3] = 0.5, 1.0  # half a metre forward in each frame, one metre high
        >>> recover_joints(standing, 2)[:, 0]
        tensor([[0.0000, 1.0000, 0.0000],
                [0.0000, 1.0000, 0.5000],
                [0.0000, 1.0000, 1.0000]])
    """
    positions = feature_groups(num_joints)["positions"]
    if features.shape[-1] < positions.stop:
        raise ValueError(
            f"features must hold at least {positions.stop} numbers a frame for {num_joints} joints, got {features.shape[-1]}"
        )
    if not 0 <= root < num_joints:
        raise ValueError(f"root must be in [0, {num_joints}), got {root}")
    turn, travel = features[..., 0], features[..., 1:3]
    nothing = torch.zeros_like(turn[..., :1])
    yaw = -2 * torch.cat([nothing, turn[..., :-1].cumsum(-1)], dim=-1)
    moved = torch.stack([travel[..., 0], torch.zeros_like(turn), travel[..., 1]], dim=-1)
    moved = torch.cat([torch.zeros_like(moved[..., :1, :]), moved[..., :-1, :]], dim=-2)
    place = _turned(moved, yaw).cumsum(-2)
    others = _turned(features[..., positions].unflatten(-1, (num_joints - 1, 3)), yaw[..., None])
    others = others + place[..., None, :]
    hips = (place + features[..., 3:4] * place.new_tensor([0.0, 1.0, 0.0]))[..., None, :]
    return torch.cat([others[..., :root, :], hips, others[..., root:, :]], dim=-2)


def rest_directions(
    clips: Sequence[Float[Tensor, "_ joints 3"]], skeleton: Skeleton
) -> Float[Tensor, "joints 3"]:
    """For each bone the axis (x, y or z, up or down it) nearest to where it points on average, for `motion_features(rest=...)`.

    One set of directions must serve all clips of a data set: take it from the training clips, once.

    Args:
        clips: joints in metres, y up.
        skeleton: must know `face`.

    Returns:
        unit vectors; zeros at the root.

    Raises:
        InputError: for no clips, or what `motion_features` raises.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> joints = torch.zeros(2, 21, 3)
        >>> joints[:, [6, 13], 0], joints[:, [10, 17], 0] = 0.2, -0.2  # shoulders and hips, left and right
        >>> rest_directions([joints], SKELETONS["bandai"])[13]
        tensor([1., 0., 0.])
    """
    if not len(clips):
        raise InputError("clips must be at least one, got none")
    total = torch.zeros(skeleton.num_joints, 3, dtype=torch.float64)
    parents = [max(parent, joint) if parent < 0 else parent for joint, parent in enumerate(skeleton.parents)]
    for joints in clips:
        _check_clip(joints, skeleton)
        places = canonical_joints(joints.double(), skeleton)
        places = _turned(places, -_yaws(places, skeleton)[:, None])
        bones = places - places[:, parents]
        total += (bones / bones.norm(dim=-1, keepdim=True).clamp(min=1e-9)).mean(0)
    axis = total.abs().argmax(-1, keepdim=True)
    sign = torch.where(total.gather(-1, axis) < 0, -1.0, 1.0).to(total)
    rest = torch.zeros_like(total).scatter(-1, axis, sign)
    rest[skeleton.root] = 0.0
    return rest.float()


class FeatureNormalizer(nn.Module):
    """Brings features to mean 0 and comparable spread, and back; its numbers are buffers, so they are stored with a model.

        normalised = (features - mean) / std,    std averaged inside each group of features

    so that small joints are not blown up against large ones. With `bias` b, the std of turn, travel, height and contacts is further divided
    by b: they weigh b times as much in a loss (5 where a tokenizer is trained, 1 for an evaluator).

    Args:
        mean: of each feature.
        std: of each feature, > 0.

    Raises:
        ValueError: for a std that is not > 0.

    Examples:
        >>> features = torch.randn(50, 131, generator=torch.Generator().manual_seed(0))
        >>> normalizer = FeatureNormalizer.of([features], feature_groups(21))
        >>> torch.allclose(normalizer.restore(normalizer(features)), features, atol=1e-5)
        True
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Float[Tensor, " features"], std: Float[Tensor, " features"]) -> None:
        super().__init__()
        if mean.shape != std.shape or not bool((std > 0).all()):
            raise ValueError(f"std must be > 0 and as many as the mean's {len(mean)}, got {std}")
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    @classmethod
    def of(
        cls,
        clips: Sequence[Float[Tensor, "_ features"]],
        groups: Mapping[str, slice],
        *,
        bias: float = 1.0,
    ) -> "FeatureNormalizer":
        """From the frames of (training) clips; a group that never changes keeps std 1.

        Args:
            clips: features, not normalised.
            groups: of `feature_groups`; must cover the features.
            bias: b above, > 0.

        Raises:
            ValueError: for no frames, numbers that are not finite, groups of another size, or a bias not > 0.
        """
        if not bias > 0:
            raise ValueError(f"bias must be > 0, got {bias}")
        frames = torch.cat([clip.double() for clip in clips]) if len(clips) else torch.zeros(0, 0)
        if not len(frames) or not bool(torch.isfinite(frames).all()):
            raise ValueError(f"clips must hold at least one frame, all finite, got {len(frames)} frames")
        covered = sum(group.stop - group.start for group in groups.values())
        if covered != frames.shape[1]:
            raise ValueError(f"groups must cover {frames.shape[1]} features, got {covered}")
        spread = frames.std(0, unbiased=False)
        for name, group in groups.items():
            mean = spread[group].mean()
            weighted = name in ("turn", "travel", "height", "contacts")
            spread[group] = torch.where(mean > 1e-8, mean, torch.ones_like(mean)) / (bias if weighted else 1)
        return cls(frames.mean(0), spread)

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Normalised features. Pad after this, never before: a padded 0 is the mean of nothing until here."""
        return (features - self.mean) / self.std

    def restore(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Features from normalised ones."""
        return features * self.std + self.mean


def _yaws(joints: Tensor, skeleton: Skeleton, smoothing: float = 0.0) -> Tensor:
    """Angle about +y in each frame, rad, from +z to where hips and shoulders face; frames beyond the ends repeat the end."""
    assert skeleton.face is not None  # canonical_joints has looked
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.face
    across = joints[:, right_hip] - joints[:, left_hip] + joints[:, right_shoulder] - joints[:, left_shoulder]
    # up x across, which is of unit length before it is smoothed, as published.
    across = across / across.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    forward = torch.stack([across[:, 2], -across[:, 0]], dim=-1)
    if smoothing > 0:
        smooth = gaussian_filter1d(forward.detach().cpu().numpy(), smoothing, axis=0, mode="nearest")
        forward = torch.from_numpy(smooth).to(forward)
    return torch.atan2(forward[:, 0], forward[:, 1])


def _turned(points: Tensor, yaw: Tensor) -> Tensor:
    """Points turned about +y by yaw, which takes +z towards +x."""
    x, y, z = points.unbind(-1)
    cos, sin = yaw.cos(), yaw.sin()
    return torch.stack([x * cos + z * sin, y.expand_as(x * cos), z * cos - x * sin], dim=-1)


def _bone_rotations(places: Tensor, yaw: Tensor, skeleton: Skeleton, rest: Tensor) -> Tensor:
    """Matrices (frames, joints, 3, 3) of each joint, relative to the bone before it in its chain, or to r_t where a chain begins.

    From a joint with several children, the first goes on with the chain and the others begin chains of their own; so do all children of the
    root.
    """
    frames, count = places.shape[:2]
    eye = torch.eye(3, dtype=places.dtype, device=places.device)
    into_body = torch.stack([_turned(axis.expand(frames, 3), -yaw) for axis in eye], dim=-1)
    swings = torch.zeros(frames, count, 3, 3, dtype=places.dtype, device=places.device)
    local = eye.expand(frames, count, 3, 3).clone()
    first: dict[int, int] = {}
    for joint, parent in skeleton.bones():
        first.setdefault(parent, joint)
    for joint in skeleton.order():
        parent = skeleton.parents[joint]
        if parent < 0:
            continue
        swings[:, joint] = swing_rotation(rest[joint].expand(frames, 3), places[:, joint] - places[:, parent])
        goes_on = parent != skeleton.root and first[parent] == joint
        before = swings[:, parent] if goes_on else into_body
        local[:, joint] = before.transpose(-1, -2) @ swings[:, joint]
    return local


def swing_rotation(
    source: Float[Tensor, "*batch 3"], target: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 3 3"]:
    """The smallest rotation that turns one direction into another, without twist.

    Args:
        source: directions of any length > 0; of length 0 the rotation is the identity.
        target: likewise.

    Returns:
        matrices R with R source parallel to target; half a turn about some perpendicular axis where they point against each other.

    Examples:
        >>> up, left = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> swing_rotation(up, left) @ up
        tensor([1., 0., 0.])
        >>> swing_rotation(up, -up) @ up
        tensor([ 0., -1.,  0.])
    """
    tiny = torch.finfo(source.dtype).tiny
    a = source / source.norm(dim=-1, keepdim=True).clamp(min=tiny)
    b = target / target.norm(dim=-1, keepdim=True).clamp(min=tiny)
    cosine = (a * b).sum(-1)
    # Any axis at right angles to a: with the coordinate axis that a is farthest from.
    other = torch.zeros_like(a).scatter(-1, a.abs().argmin(-1, keepdim=True), 1.0)
    aside = torch.linalg.cross(a, other)
    aside = aside / aside.norm(dim=-1, keepdim=True).clamp(min=tiny)
    eye = torch.eye(3, dtype=a.dtype, device=a.device)
    half_turn = 2 * aside[..., :, None] * aside[..., None, :] - eye
    # Twice reflected: at the plane between -a and b, then at a's own. Exact near cosine 1, and near -1 until the bisector vanishes.
    middle = a + b
    length = (middle * middle).sum(-1)[..., None, None]
    across = 2 * middle[..., :, None] * middle[..., None, :] / length.clamp(min=tiny) - eye
    rotation = across @ (2 * a[..., :, None] * a[..., None, :] - eye)
    rotation = torch.where((length > 1e-10) | (cosine[..., None, None] > 0), rotation, half_turn)
    known = (source.norm(dim=-1) > 0) & (target.norm(dim=-1) > 0)
    return torch.where(known[..., None, None], rotation, eye)


def _check_clip(joints: Tensor, skeleton: Skeleton) -> None:
    if skeleton.face is None:
        raise InputError("skeleton must know its face: right hip, left hip, right shoulder, left shoulder")
    if joints.shape[1] != skeleton.num_joints:
        raise InputError(f"joints must be {skeleton.num_joints} as the skeleton's, got {joints.shape[1]}")
    if len(joints) < 2:
        raise InputError(f"joints must hold at least two frames, got {len(joints)}")
    if not bool(torch.isfinite(joints).all()):
        frame, joint = torch.nonzero(~torch.isfinite(joints).all(-1))[0].tolist()
        raise InputError(
            f"joints must be finite, got {joints[frame, joint].tolist()} at frame {frame}, joint {joint}"
        )
