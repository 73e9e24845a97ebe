"""A skeleton as simple solid shapes seen by a camera: limbs with the colour of their side, a trunk, a head, near ones over far ones."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coloss.data import Skeleton
from coloss.errors import InputError

Side = Literal["left", "right", "middle"]

_THICKNESS = {"leg": (0.040, 0.036, 0.029, 0.024), "arm": (0.030, 0.028, 0.023, 0.018), "trunk": (0.034,)}
"""Radii of a part's bones from the body outwards, as shares of the body's height."""

_HEAD = 0.068
_DISTANCE = 4.5


@dataclass(frozen=True)
class Shape:
    """A shape on the picture plane, in body heights, y up: all that is nearer to its `points` than `radius`.

    Attributes:
        points: (1, 2) a disc, (2, 2) a rounded bone, (4, 2) a rounded polygon.
        radius: > 0.
        side: of the body.
        depth: distance from the camera, in body heights.

    Examples:
        >>> Shape(np.zeros((1, 2)), 0.1, "left", 4.0).side
        'left'
    """

    points: NDArray[np.float64]
    radius: float
    side: Side
    depth: float


class BodyView:
    """Looks at a clip from slightly above, in front and to the left of where the body faces at the beginning.

    Args:
        joints: (frames, joints, 3), y up, any unit; joints that are not seen are NaN.
        skeleton: `parts` give colours, `face` gives a trunk and the direction to look from; without them bones are drawn alike, seen from +z.
        azimuth: of the camera about the vertical, degrees from where the body faces towards its left.
        pitch: of the camera above the horizontal, degrees.

    Attributes:
        height: of the body, in the joints' unit: the median over frames of the span from its lowest to its highest joint.
        floor: y of the lowest joint of the clip.

    Raises:
        InputError: for joints of another skeleton, no frames, or joints that are never seen.

    Examples:
        >>> from coloss.data.skeleton import SKELETONS
        >>> view = BodyView(np.random.default_rng(0).normal(size=(3, 21, 3)), SKELETONS["bandai"])
        >>> shapes = view.shapes(0)
        >>> len(shapes), all(near.depth <= far.depth for far, near in zip(shapes, shapes[1:]))
        (13, True)
    """

    def __init__(
        self,
        joints: NDArray[np.floating],
        skeleton: Skeleton,
        *,
        azimuth: float = 35.0,
        pitch: float = 14.0,
    ) -> None:
        joints = np.asarray(joints, np.float64)
        if joints.ndim != 3 or joints.shape[1:] != (skeleton.num_joints, 3) or not len(joints):
            raise InputError(
                f"joints must be (frames, {skeleton.num_joints}, 3) with at least one frame, got {joints.shape}"
            )
        seen = np.isfinite(joints).all(-1)
        if not seen.any(1).all():
            raise InputError(
                f"joints must be seen in every frame, frame {int(seen.any(1).argmin())} has none"
            )
        self.joints, self.skeleton = joints, skeleton
        self.floor = float(np.nanmin(joints[..., 1]))
        span = np.nanmax(joints[..., 1], axis=1) - np.nanmin(joints[..., 1], axis=1)
        self.height = max(float(np.median(span)), 1e-9)
        yaw = self._facing()
        turn, tilt = yaw + math.radians(azimuth), math.radians(pitch)
        self._towards = np.array(
            [math.sin(turn) * math.cos(tilt), math.sin(tilt), math.cos(turn) * math.cos(tilt)]
        )
        self._right = np.array([math.cos(turn), 0.0, -math.sin(turn)])
        self._up = np.cross(self._towards, self._right)
        self._bones = self._plan()

    def place(self, frame: int) -> NDArray[np.float64]:
        """Where the body stands in a frame: its root brought down to the floor (or, unseen, the mean of what is seen)."""
        root = self.joints[frame, self.skeleton.root]
        if not np.isfinite(root).all():
            root = np.nanmean(self.joints[frame], axis=0)
        return np.array([root[0], self.floor, root[2]])

    def project(
        self, points: NDArray[np.floating], place: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points on the picture plane (..., 2), in body heights about the spot half a body above `place`, and their depths.

        Args:
            points: (..., 3) in the joints' unit.
            place: (3,) on the floor, what the camera looks at.
        """
        centre = place + np.array([0.0, 0.5 * self.height, 0.0])
        offset = (np.asarray(points, np.float64) - centre) / self.height
        depth = np.maximum(_DISTANCE - offset @ self._towards, 0.3)
        flat = np.stack([offset @ self._right, offset @ self._up], axis=-1)
        return flat * (_DISTANCE / depth)[..., None], depth

    def ground_plan(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points (..., 3) from above as (..., 2): the camera's right, and away from it."""
        away = np.array([-self._towards[0], 0.0, -self._towards[2]])
        return np.stack([points @ self._right, points @ (away / np.linalg.norm(away))], axis=-1)

    def shapes(self, frame: int, place: NDArray[np.floating] | None = None) -> list[Shape]:
        """The body of a frame, the farthest shape first.

        Args:
            frame: number, negative ones from the end.
            place: what the camera looks at; default: where the body stands.
        """
        joints = self.joints[frame]
        flat, depth = self.project(joints, self.place(frame) if place is None else place)
        found = []
        for members, radius, side in self._bones:
            points = flat[list(members)]
            if np.isfinite(points).all():
                scale = _DISTANCE / float(depth[list(members)].mean())
                found.append(Shape(points, radius * scale, side, float(depth[list(members)].mean())))
        head = self._head_shape(flat, depth)
        return sorted(found + ([head] if head else []), key=lambda shape: -shape.depth)

    def shadow(self, frame: int, place: NDArray[np.floating]) -> NDArray[np.float64]:
        """Outline (24, 2) of a soft round shadow under the body, on the picture plane."""
        angle = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        ring = 0.2 * self.height * np.stack([np.cos(angle), 0 * angle, np.sin(angle)], axis=-1)
        return self.project(self.place(frame) + ring, place)[0]

    def _head_shape(self, flat: NDArray[np.float64], depth: NDArray[np.float64]) -> Shape | None:
        head = self._head
        if head is None or not np.isfinite(flat[[head, self.skeleton.parents[head]]]).all():
            return None
        scale = _DISTANCE / float(depth[head])
        along = flat[head] - flat[self.skeleton.parents[head]]
        along = along / max(float(np.linalg.norm(along)), 1e-9)
        centre = flat[head] + 0.55 * _HEAD * scale * along
        return Shape(centre[None], _HEAD * scale, "middle", float(depth[head]) - 0.02)

    def _facing(self) -> float:
        if self.skeleton.face is None:
            return 0.0
        right_hip, left_hip, right_shoulder, left_shoulder = self.skeleton.face
        across = self.joints[:, right_hip] - self.joints[:, left_hip]
        across = across + self.joints[:, right_shoulder] - self.joints[:, left_shoulder]
        across = across[np.isfinite(across).all(1)]
        return math.atan2(across[0, 2], -across[0, 0]) if len(across) else 0.0

    def _plan(self) -> list[tuple[tuple[int, ...], float, Side]]:
        """Joints, radius and side of each shape but the head's."""
        skeleton = self.skeleton
        part_of = {joint: name for name, part in skeleton.parts.items() for joint in part}
        middle = tuple(joint for joint, partner in enumerate(skeleton.mirror or ()) if joint == partner)
        leaves = [joint for joint in middle if joint not in skeleton.parents and skeleton.parents[joint] >= 0]
        named = [joint for joint, name in enumerate(skeleton.names) if "head" in name.lower()]
        self._head: int | None = next(iter(named or leaves), None)
        plan: list[tuple[tuple[int, ...], float, Side]] = []
        torso: set[int] = set()
        if skeleton.face is not None:
            right_hip, left_hip, right_shoulder, left_shoulder = skeleton.face
            plan.append(
                ((left_shoulder, right_shoulder, right_hip, left_hip), _THICKNESS["trunk"][0], "middle")
            )
            torso = self._inside()
        for joint, parent in skeleton.bones():
            if joint in torso:
                continue
            name = part_of.get(joint, "")
            kind = next((kind for kind in ("leg", "arm", "trunk") if kind in name), None)
            if kind == "trunk" and parent in torso and joint != self._head:
                continue
            side: Side = "left" if "left" in name else "right" if "right" in name else "middle"
            sizes = _THICKNESS.get(kind or "", (0.024,))
            order = skeleton.part(name).index(joint) if kind and name else 0
            plan.append(((parent, joint), sizes[min(order, len(sizes) - 1)], side))
        return plan

    def _inside(self) -> set[int]:
        """Joints whose bone lies within the trunk's shape: on the way from the root to hips and shoulders."""
        assert self.skeleton.face is not None
        found: set[int] = set()
        for joint in self.skeleton.face:
            at = joint
            while at >= 0:
                found.add(at)
                at = self.skeleton.parents[at]
        return found
