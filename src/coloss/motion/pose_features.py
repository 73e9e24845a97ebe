"""What a body does, in numbers that do not change when the camera moves: joint angles and distances in lengths of the body.

Features of one frame, after Riccio, 2024, arXiv 2411.11548 (fitness exercises):

    angle at b of joints a, b, c     atan2(|u x v|, u . v),  u = a - b, v = c - b,  in degrees in [0, 180]
    distance of joints a, b          |a - b| / scale
    height of a above b              |a_up - b_up| / scale
    scale of the frame               length of the first bone of a list that is there

In three dimensions angles and distances stay as they are under any rotation, shift and uniform scale; heights under rotations about the
vertical axis. Angles in the picture plane (`dims=2`) stay only under motions within that plane: they change when the body turns, and need
both axes in one unit (pixels, not shares of width and height).

A joint that was not seen is NaN. Whatever needs it is NaN then; nothing stands in for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.data.skeleton import Skeleton
from coloss.errors import InputError

Pair = tuple[int, int]
Triplet = tuple[int, int, int]
FeatureKind = Literal["invariant", "invariant-2d", "raw", "mixed", "body-frame"]

LANDMARKS = (
    *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
"""Twelve joints that every body detector gives."""

LANDMARK_NAMES: Mapping[str, tuple[str, ...]] = {
    "shoulder": ("UpperArm_L", "lclavicle", "left_shoulder"),
    "elbow": ("LowerArm_L", "lhumerus", "left_elbow"),
    "wrist": ("Hand_L", "lradius", "left_wrist", "left_hand"),
    "hip": ("UpperLeg_L", "lhipjoint", "left_hip"),
    "knee": ("LowerLeg_L", "lfemur", "left_knee"),
    "ankle": ("Foot_L", "ltibia", "left_ankle", "left_foot"),
}
"""Names of the left side's landmarks in the skeletons of the data sets; HDM05 names a joint by the bone that ends there."""

MEDIAPIPE_LANDMARKS: Mapping[str, int] = {
    name: joint for name, joint in zip(LANDMARKS, (11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28))
}
"""Their numbers among the 33 of MediaPipe Pose, where odd is left."""

COCO_LANDMARKS: Mapping[str, int] = {name: joint for joint, name in enumerate(LANDMARKS, 5)}
"""Their numbers among the 17 of COCO."""


@dataclass(frozen=True)
class PoseSpec:
    """Which angles, distances and heights describe a pose; joints by number, so any skeleton will do.

    Args:
        angles: joints (a, b, c), the angle is at b.
        distances: pairs of joints.
        heights: pairs of joints, of which the difference along the vertical axis counts.
        scales: pairs of joints whose distance is the unit; the first that is there in a frame.
        joints: whose coordinates the raw features are.
        hips: left and right hip, for the body's own frame.
        up: which coordinate is vertical: 0, 1 or 2.
        names: of the angles, distances and heights in this order.

    Raises:
        InputError: if names and features differ in number, joints are negative, or distances have no scale.

    Examples:
        >>> PoseSpec(angles=((0, 1, 2),), names=("elbow",)).names
        ('elbow',)
    """

    angles: tuple[Triplet, ...] = ()
    distances: tuple[Pair, ...] = ()
    heights: tuple[Pair, ...] = ()
    scales: tuple[Pair, ...] = ()
    joints: tuple[int, ...] = ()
    hips: Pair | None = None
    up: int = 1
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.angles) + len(self.distances) + len(self.heights)
        if not count:
            raise InputError("a pose must have at least one angle, distance or height, got none")
        if not self.names:
            object.__setattr__(self, "names", tuple(f"feature_{k}" for k in range(count)))
        if len(self.names) != count:
            raise InputError(f"names must be {count}, one for each feature, got {len(self.names)}")
        if (self.distances or self.heights) and not self.scales:
            raise InputError("scales must name at least one pair of joints, got none")
        if self.up not in (0, 1, 2):
            raise InputError(f"up must be 0, 1 or 2, got {self.up}")
        if min(self._joints()) < 0:
            raise InputError(f"joints must be >= 0, got {min(self._joints())}")

    def _joints(self) -> list[int]:
        groups = (*self.angles, *self.distances, *self.heights, *self.scales, self.joints, self.hips or ())
        return [joint for group in groups for joint in group]

    @property
    def num_joints(self) -> int:
        """How many joints a skeleton must have at least."""
        return max(self._joints()) + 1

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values, from which `from_dict` makes the same again."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "PoseSpec":
        """What `as_dict` gave, also after a way through JSON.

        Examples:
            >>> spec = pose_spec(COCO_LANDMARKS)
            >>> PoseSpec.from_dict(spec.as_dict()) == spec
            True
        """

        def tuples(value: object) -> object:
            return tuple(tuples(part) for part in value) if isinstance(value, list | tuple) else value

        return cls(**{name: tuples(value) for name, value in values.items()})  # type: ignore[arg-type]


def pose_spec(landmarks: Skeleton | Mapping[str, int], up: int = 1) -> PoseSpec:
    """The 22 features of the fitness classifier for a skeleton: 8 angles, 12 distances, 2 heights.

    Angles at elbows, knees, hips and shoulders; distances between the shoulders, the hips, hip and knee, shoulder and hip, elbow and knee,
    wrist and shoulder, wrist and hip; heights of the elbows over the shoulders. The unit is the length of the left trunk, else the right
    one, the left thigh, the right thigh.

    Args:
        landmarks: a skeleton whose joints have names that `LANDMARK_NAMES` knows (those of the data sets do), or the joint's number by
            name for each of `LANDMARKS`.
        up: which coordinate is vertical.

    Raises:
        InputError: if a landmark is missing.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> spec = pose_spec(SKELETONS["hdm05"])
        >>> len(spec.names), spec.names[0], spec.angles[0]
        (22, 'left elbow angle', (17, 18, 19))
    """
    at = _by_name(landmarks) if isinstance(landmarks, Skeleton) else dict(landmarks)
    if missing := [name for name in LANDMARKS if name not in at]:
        raise InputError(f"landmarks must have a joint for each name, missing: {', '.join(missing)}")
    angles: dict[str, Triplet] = {}
    distances: dict[str, Pair] = {
        "shoulder width": (at["left_shoulder"], at["right_shoulder"]),
        "hip width": (at["left_hip"], at["right_hip"]),
    }
    heights: dict[str, Pair] = {}
    for middle, (first, last) in {
        "elbow": ("shoulder", "wrist"),
        "knee": ("hip", "ankle"),
        "hip": ("shoulder", "knee"),
        "shoulder": ("hip", "elbow"),
    }.items():
        for side in ("left", "right"):
            angles[f"{side} {middle} angle"] = (
                at[f"{side}_{first}"],
                at[f"{side}_{middle}"],
                at[f"{side}_{last}"],
            )
    for first, last in (
        ("hip", "knee"),
        ("shoulder", "hip"),
        ("elbow", "knee"),
        ("wrist", "shoulder"),
        ("wrist", "hip"),
    ):
        for side in ("left", "right"):
            distances[f"{side} {first} to {last}"] = (at[f"{side}_{first}"], at[f"{side}_{last}"])
    for side in ("left", "right"):
        heights[f"{side} elbow over shoulder"] = (at[f"{side}_elbow"], at[f"{side}_shoulder"])
    trunks = [distances[f"{side} shoulder to hip"] for side in ("left", "right")]
    thighs = [distances[f"{side} hip to knee"] for side in ("left", "right")]
    return PoseSpec(
        tuple(angles.values()),
        tuple(distances.values()),
        tuple(heights.values()),
        (*trunks, *thighs),
        tuple(at[name] for name in LANDMARKS),
        (at["left_hip"], at["right_hip"]),
        up,
        (*angles, *distances, *heights),
    )


def _by_name(skeleton: Skeleton) -> dict[str, int]:
    known = {name: joint for joint, name in enumerate(skeleton.names)}
    found: dict[str, int] = {}
    for landmark, names in LANDMARK_NAMES.items():
        left = next((known[name] for name in names if name in known), None)
        if left is not None and skeleton.mirror is not None:
            found[f"left_{landmark}"], found[f"right_{landmark}"] = left, skeleton.mirror[left]
    return found


def joint_angles(
    joints: Float[Tensor, "*frames joints axes"], triplets: Sequence[Triplet], dims: int = 3
) -> Float[Tensor, "*frames angles"]:
    """Angle of a limb at its middle joint, without a sign: 180 degrees for a straight one, on both sides of the body.

    Args:
        joints: coordinates, all axes in one unit; NaN where a joint was not seen.
        triplets: joints (a, b, c) of each angle, which is at b.
        dims: 3, or 2 for the angle in the plane of the first two axes.

    Returns:
        Degrees in [0, 180]; NaN where a joint is missing or two of them lie in one place.

    Raises:
        ValueError: for other `dims`, too few axes, or a joint that is not there.

    Examples:
        >>> joints = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> joint_angles(joints, [(0, 1, 2)])
        tensor([90.])
    """
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {dims}")
    points = _points(joints, triplets)
    if points.shape[-1] < dims:
        raise ValueError(f"joints must have {dims} axes, got {points.shape[-1]}")
    if not triplets:
        return points.new_zeros((*points.shape[:-2], 0))
    a, b, c = (points[..., list(column), :dims] for column in zip(*triplets))
    u, v = a - b, c - b
    if dims == 2:
        across = (u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]).abs()
    else:
        across = torch.linalg.cross(u, v).norm(dim=-1)
    along = (u * v).sum(-1)
    degenerate = (u.square().sum(-1) == 0) | (v.square().sum(-1) == 0)
    return torch.rad2deg(torch.atan2(across, along)).masked_fill(degenerate, torch.nan)


def pair_distances(
    joints: Float[Tensor, "*frames joints axes"], pairs: Sequence[Pair]
) -> Float[Tensor, "*frames pairs"]:
    """Euclidean distance of each two joints, in the unit of the coordinates; NaN where one is missing.

    Args:
        joints: coordinates, all axes in one unit.
        pairs: of joints.

    Raises:
        ValueError: for a joint that is not there.

    Examples:
        >>> pair_distances(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]), [(0, 1)])
        tensor([5.])
    """
    points = _points(joints, pairs)
    if not pairs:
        return points.new_zeros((*points.shape[:-2], 0))
    first, second = (points[..., list(column), :] for column in zip(*pairs))
    return (first - second).norm(dim=-1)


def body_scale(
    joints: Float[Tensor, "*frames joints axes"], pairs: Sequence[Pair]
) -> Float[Tensor, "*frames"]:
    """Length of the first bone of a list that can be measured in each frame.

    Args:
        joints: coordinates, all axes in one unit.
        pairs: bones, the preferred one first.

    Returns:
        A length > 0; NaN where none of the bones has both joints, or all have no length.

    Raises:
        ValueError: for a joint that is not there, or no pairs.

    Examples:
        >>> body_scale(torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [0.0, 2.0]]), [(0, 1), (0, 2)])
        tensor(2.)
    """
    if not pairs:
        raise ValueError("pairs must name at least one bone, got none")
    lengths = pair_distances(joints, pairs)
    usable = lengths > 0
    first = usable.int().argmax(-1, keepdim=True)
    found = lengths.gather(-1, first).squeeze(-1)
    return found.masked_fill(~usable.any(-1), torch.nan)


def invariant_pose_features(
    joints: Float[Tensor, "*frames joints axes"], spec: PoseSpec, dims: int = 3
) -> tuple[Float[Tensor, "*frames features"], Bool[Tensor, "*frames features"]]:
    """Angles (degrees), distances and heights (in lengths of the body) of every frame.

    Args:
        joints: coordinates, all axes in one unit; NaN where a joint was not seen. Three axes, or two with `dims=2`.
        spec: which features.
        dims: of the angles, see `joint_angles`; distances take all axes that there are.

    Returns:
        The features, NaN where something they need is missing; and where they are there.

    Raises:
        ValueError: for coordinates with too few joints or axes.

    Examples:
        >>> joints = torch.randn(4, 17, 3)
        >>> joints[0, 9] = torch.nan  # the left wrist
        >>> features, present = invariant_pose_features(joints, pose_spec(COCO_LANDMARKS))
        >>> features.shape, (~present).sum(-1).tolist()
        (torch.Size([4, 22]), [3, 0, 0, 0])
    """
    points = joints.float() if joints.dtype in (torch.float16, torch.bfloat16) else joints
    if points.shape[-1] <= spec.up and spec.heights:
        raise ValueError(f"joints must have the vertical axis {spec.up}, got {points.shape[-1]} axes")
    parts = [joint_angles(points, spec.angles, dims)]
    if spec.distances or spec.heights:
        lengths = [pair_distances(points, spec.distances)]
        heights = points[..., spec.up : spec.up + 1] if spec.heights else points
        lengths.append(pair_distances(heights, spec.heights))
        parts.append(torch.cat(lengths, -1) / body_scale(points, spec.scales)[..., None])
    features = torch.cat(parts, -1)
    return features, ~features.isnan()


def body_frame_coordinates(
    joints: Float[Tensor, "*frames joints 3"], spec: PoseSpec
) -> Float[Tensor, "*frames joints 3"]:
    """Coordinates as the body sees them: from the middle of its hips, in lengths of the body, turned so that the hips lie along one axis.

    They stay as they are when the body is shifted, scaled or turned about the vertical axis, and unlike angles they keep everything else.

    Args:
        joints: coordinates, all axes in one unit; NaN where a joint was not seen.
        spec: names the hips, the scale and the vertical axis.

    Returns:
        (..., joints, 3), NaN for a joint that is missing; all of a frame if a hip or the scale is.

    Raises:
        ValueError: if the spec names no hips or scale, or there are too few joints.

    Examples:
        >>> spec = pose_spec(COCO_LANDMARKS)
        >>> joints = torch.randn(5, 17, 3)
        >>> torch.allclose(
        ...     body_frame_coordinates(2 * joints + 1, spec), body_frame_coordinates(joints, spec), atol=1e-4
        ... )
        True
    """
    if spec.hips is None:
        raise ValueError("spec must name the hips for a frame of the body, got None")
    points = _points(joints, [spec.hips])
    left, right = points[..., spec.hips[0], :], points[..., spec.hips[1], :]
    centred = (points - ((left + right) / 2)[..., None, :]) / body_scale(points, spec.scales)[..., None, None]
    first, second = (axis for axis in range(3) if axis != spec.up)
    across = left - right
    length = torch.hypot(across[..., first], across[..., second])
    upright = length == 0
    cosine = torch.where(upright, 1.0, across[..., first] / length)[..., None]
    sine = torch.where(upright, 0.0, across[..., second] / length)[..., None]
    turned = list(centred.unbind(-1))
    turned[first] = cosine * centred[..., first] + sine * centred[..., second]
    turned[second] = cosine * centred[..., second] - sine * centred[..., first]
    return torch.stack(turned, -1)


def frame_features(
    joints: Float[Tensor, "*frames joints 3"], spec: PoseSpec, kind: str = "invariant"
) -> Float[Tensor, "*frames features"]:
    """One row of numbers for each frame, of the kind that a classifier was made for.

    Args:
        joints: coordinates, all axes in one unit; NaN where a joint was not seen.
        spec: which features, and whose coordinates.
        kind: `"invariant"`; `"invariant-2d"`, with angles in the plane of the first two axes; `"raw"`, coordinates of `spec.joints`;
            `"mixed"`, invariant ones and coordinates; `"body-frame"`, coordinates of `spec.joints` as the body sees them.

    Returns:
        (..., features), NaN where something is missing.

    Raises:
        ValueError: for an unknown kind or too few joints.

    Examples:
        >>> spec, joints = pose_spec(COCO_LANDMARKS), torch.randn(4, 17, 3)
        >>> [frame_features(joints, spec, kind).shape[-1] for kind in ("invariant", "raw", "mixed")]
        [22, 36, 58]
    """
    if kind not in get_args(FeatureKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(FeatureKind))}, got {kind!r}")
    if kind == "body-frame":
        return body_frame_coordinates(joints, spec)[..., list(spec.joints), :].flatten(-2)
    parts = []
    if kind != "raw":
        parts.append(invariant_pose_features(joints, spec, 2 if kind == "invariant-2d" else 3)[0])
    if kind in ("raw", "mixed"):
        parts.append(_points(joints, [spec.joints])[..., list(spec.joints), :].flatten(-2))
    return torch.cat(parts, -1)


def _points(joints: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Coordinates in float32 at least, after a look that the joints are there."""
    highest = max((joint for group in groups for joint in group), default=-1)
    if joints.ndim < 2 or joints.shape[-2] <= highest:
        count = joints.shape[-2] if joints.ndim >= 2 else 0
        raise ValueError(f"joints must be at least {highest + 1} as the features need, got {count}")
    return joints.float() if joints.dtype in (torch.float16, torch.bfloat16) else joints
