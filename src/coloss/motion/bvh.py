"""Motion as a BVH file, which Blender and other animation programs open, and joints from one.

A BVH file holds a skeleton of bones of fixed length and, for each frame, where the root is and how each joint is turned. Joint positions are
turned into that: the length of a bone is its median over the clip, and a joint is turned by the smallest rotation that brings its one child into
the right direction, or that brings all its children there as well as one rotation can (least squares). So a clip whose bones keep their length,
and whose hips and shoulders are stiff, as recorded ones are, comes back exactly; where bones stretch, as in generated clips, the file holds the
nearest motion without it. A bone's turn about its own axis cannot be seen from positions: it follows the bone before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from coloss.data import Skeleton
from coloss.data.formats import read_text
from coloss.errors import InputError
from coloss.train.atomic_text import write_atomically

_END_SHARE = 0.5
"""Length of what hangs on the last joint of a chain, as a share of the bone before it; it has no joint in the clip."""


@dataclass(frozen=True)
class BvhMotion:
    """What a BVH file says.

    Attributes:
        joints: float32 (frames, joints, 3), in the file's order (each after its parent) and unit, y up; ends of chains ("End Site") are no joints.
        skeleton: parents and names; sides, feet and face are not in the file: `dataclasses.replace(skeleton, feet=..., face=...)`.
        fps: frames per second.

    Examples:
        >>> BvhMotion(np.zeros((1, 1, 3), np.float32), Skeleton((-1,)), 15.0).fps
        15.0
    """

    joints: NDArray[np.float32]
    skeleton: Skeleton
    fps: float


def write_bvh(
    path: str | Path, joints: NDArray[np.floating], skeleton: Skeleton, fps: float, *, scale: float = 1.0
) -> None:
    """Write a clip as a BVH file: y up, rotations about z, x, y in degrees.

    Args:
        path: ends in `.bvh`.
        joints: (frames, joints, 3), y up.
        skeleton: joints without a name are called `joint_NUMBER`.
        fps: frames per second, > 0.
        scale: the file's numbers for one of the joints' units: 1 leaves metres, which Blender reads as its own; 100 writes centimetres, which
            most other programs expect.

    Raises:
        InputError: for joints that are not finite or not the skeleton's, no frames, an fps or scale not > 0, another ending, or if the file
            cannot be written.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "nod.bvh"
        >>> nod = np.array([[[0, 1, 0], [0, 2, 0.0]], [[0, 1, 0], [0, 1.8, 0.6]]])
        >>> write_bvh(path, nod, Skeleton((-1, 0), ("neck", "head")), fps=20)
        >>> found = read_bvh(path)
        >>> found.skeleton.names, found.fps, found.joints.round(1)[1].tolist()
        (('neck', 'head'), 20.0, [[0.0, 1.0, 0.0], [0.0, 1.7999999523162842, 0.6000000238418579]])
    """
    target = Path(path)
    joints = np.asarray(joints)
    if joints.ndim != 3 or joints.shape[1:] != (skeleton.num_joints, 3) or not len(joints):
        raise InputError(
            f"joints must be (frames, {skeleton.num_joints}, 3) with at least one frame, got {joints.shape}"
        )
    if not np.isfinite(joints).all():
        raise InputError(
            f"joints must be finite, got NaN in frame {int(np.argwhere(~np.isfinite(joints))[0, 0])}"
        )
    for name, value in (("fps", fps), ("scale", scale)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} must be > 0, got {value}")
    if target.suffix.lower() != ".bvh":
        raise InputError(f"path must end in .bvh, got {target.name!r}")
    offsets, rotations = _rest_and_rotations(joints.astype(np.float64), skeleton)
    names = _file_names(skeleton)
    children: dict[int, list[int]] = {joint: [] for joint in range(skeleton.num_joints)}
    for joint, parent in skeleton.bones():
        children[parent].append(joint)
    lines, columns = ["HIERARCHY"], []

    def describe(joint: int, depth: int) -> None:
        indent, root = "\t" * depth, joint == skeleton.root
        lines.append(f"{indent}{'ROOT' if root else 'JOINT'} {names[joint]}")
        lines.append(f"{indent}{{")
        offset = np.zeros(3) if root else offsets[joint] * scale
        lines.append(f"{indent}\tOFFSET {_numbers(offset)}")
        turns = "Zrotation Xrotation Yrotation"
        lines.append(
            f"{indent}\tCHANNELS 6 Xposition Yposition Zposition {turns}"
            if root
            else f"{indent}\tCHANNELS 3 {turns}"
        )
        if root:
            columns.append(joints[:, joint] * scale)
        columns.append(rotations[:, joint])
        for child in children[joint]:
            describe(child, depth + 1)
        if not children[joint]:
            end = np.array([0.0, 0.1, 0.0]) if root else offsets[joint] * _END_SHARE
            lines.extend(
                [
                    f"{indent}\tEnd Site",
                    f"{indent}\t{{",
                    f"{indent}\t\tOFFSET {_numbers(end * scale)}",
                    f"{indent}\t}}",
                ]
            )
        lines.append(f"{indent}}}")

    describe(skeleton.root, 0)
    lines += ["MOTION", f"Frames: {len(joints)}", f"Frame Time: {1 / fps:.8f}"]
    lines += [_numbers(row) for row in np.concatenate(columns, axis=1)]
    write_atomically(target, "\n".join(lines) + "\n")


def read_bvh(path: str | Path) -> BvhMotion:
    """Joint positions of a BVH file, by forward kinematics; any order of channels, positions at any joint.

    Args:
        path: of the file.

    Raises:
        InputError: if it is not there or no BVH file; the message names the line.

    Examples:
        >>> read_bvh("nowhere.bvh")
        Traceback (most recent call last):
        coloss.errors.InputError: nowhere.bvh is not there
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source} is not there")
    lines = read_text(source).splitlines()
    names, parents, offsets, channels, at = _read_hierarchy(source, lines)
    found: list[float] = []
    for text in ("Frames:", "Frame Time:"):
        while at < len(lines) and not lines[at].strip():
            at += 1
        line = lines[at].strip() if at < len(lines) else ""
        try:
            if not line.lower().startswith(text.lower()):
                raise ValueError
            found.append(float(line[len(text) :]))
            if not math.isfinite(found[-1]):
                raise ValueError
        except ValueError as error:
            raise InputError(f"{source}, line {at + 1}: must be '{text} NUMBER', got {line!r}") from error
        at += 1
    width = sum(map(len, channels))
    try:
        values = np.array(" ".join(lines[at:]).split(), np.float64).reshape(-1, width)
    except ValueError as error:
        raise InputError(
            f"{source}: from line {at + 1} on there must be {width} numbers for each frame"
        ) from error
    if len(values) != int(found[0]) or not found[1] > 0 or not np.isfinite(values).all():
        raise InputError(
            f"{source}: must hold {int(found[0])} frames of finite numbers and a time > 0, got {len(values)} frames, {found[1]} s"
        )
    skeleton = Skeleton(tuple(parents), tuple(names))
    joints = _forward(values, skeleton, np.array(offsets), channels)
    return BvhMotion(joints.astype(np.float32), skeleton, round(1 / found[1], 4))


def _rest_and_rotations(
    joints: NDArray[np.float64], skeleton: Skeleton
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bones at rest (joints, 3), and of each joint its turn against its parent's (frames, joints, 3), degrees about z, x, y, continuous."""
    frames, count = joints.shape[:2]
    parents = [max(parent, 0) for parent in skeleton.parents]
    bones = joints - joints[:, parents]
    bones[:, skeleton.root] = 0.0
    lengths = np.median(np.linalg.norm(bones, axis=-1), axis=0)
    directions = bones / np.maximum(np.linalg.norm(bones, axis=-1, keepdims=True), 1e-12)
    # The pose at rest is the first frame; where several bones leave a joint, the mean of how they stand to each other.
    rest = directions[0].copy()
    children: dict[int, list[int]] = {}
    for joint, parent in skeleton.bones():
        children.setdefault(parent, []).append(joint)
    world: dict[int, Rotation] = {}
    for joint in skeleton.order():
        parent = skeleton.parents[joint]
        before = world[parent] if parent >= 0 else Rotation.identity(frames)
        group = children.get(joint, [])
        if len(group) > 1:
            for _ in range(3):
                turn = _best_rotation(rest[group], directions[:, group])
                back = np.einsum("fji,fbj->fbi", turn.as_matrix(), directions[:, group]).mean(0)
                rest[group] = back / np.maximum(np.linalg.norm(back, axis=-1, keepdims=True), 1e-12)
            world[joint] = _best_rotation(rest[group], directions[:, group])
        elif group:
            world[joint] = _swing(before.apply(rest[group[0]]), directions[:, group[0]]) * before
        else:
            world[joint] = before
    angles = np.empty((frames, count, 3))
    for joint, parent in enumerate(skeleton.parents):
        local = world[joint] if parent < 0 else world[parent].inv() * world[joint]
        angles[:, joint] = _continuous(_euler(local))
    return rest * lengths[:, None], angles


def _best_rotation(rest: NDArray[np.float64], directions: NDArray[np.float64]) -> Rotation:
    """The rotation of each frame that turns the bones at rest nearest to their directions (Kabsch)."""
    left, _, right = np.linalg.svd(np.einsum("fbi,bj->fij", directions, rest))
    flip = np.ones((len(directions), 3))
    flip[:, 2] = np.sign(np.linalg.det(left) * np.linalg.det(right))
    return Rotation.from_matrix((left * flip[:, None]) @ right)


def _swing(source: NDArray[np.float64], target: NDArray[np.float64]) -> Rotation:
    """The smallest rotations of directions (frames, 3) into others; the identity where one is zero."""
    across = np.cross(source, target)
    sine, cosine = np.linalg.norm(across, axis=-1), (source * target).sum(-1)
    other = np.eye(3)[np.abs(source).argmin(-1)]
    aside = np.cross(source, other)
    axis = np.where((sine > 1e-9)[:, None], across, aside)
    axis /= np.maximum(np.linalg.norm(axis, axis=-1, keepdims=True), 1e-12)
    return Rotation.from_rotvec(axis * np.arctan2(sine, cosine)[:, None])


def _euler(rotation: Rotation) -> NDArray[np.float64]:
    """Degrees about z, then the turned x, then the turned y; at the pole, where z and y turn about one axis, that of y is 0."""
    matrix = rotation.as_matrix()
    x = np.arcsin(np.clip(matrix[:, 2, 1], -1, 1))
    pole = np.abs(matrix[:, 2, 1]) > 1 - 1e-9
    z = np.where(
        pole,
        np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]),
        np.arctan2(-matrix[:, 0, 1], matrix[:, 1, 1]),
    )
    y = np.where(pole, 0.0, np.arctan2(-matrix[:, 2, 0], matrix[:, 2, 2]))
    return np.degrees(np.stack([z, x, y], axis=-1))


def _continuous(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same turns without jumps of a whole turn from frame to frame, so that an editor draws smooth curves."""
    return np.degrees(np.unwrap(np.radians(angles), axis=0))


def _file_names(skeleton: Skeleton) -> list[str]:
    """Names without spaces, none twice."""
    given = skeleton.names or tuple(f"joint_{joint}" for joint in range(skeleton.num_joints))
    names = ["_".join(name.split()) or f"joint_{joint}" for joint, name in enumerate(given)]
    return [name if names.count(name) == 1 else f"{name}_{joint}" for joint, name in enumerate(names)]


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " ".join(f"{value + 0.0:.6f}" for value in values)


def _read_hierarchy(
    source: Path, lines: list[str]
) -> tuple[list[str], list[int], list[list[float]], list[list[str]], int]:
    """Names, parents, offsets and channels of the joints, and the first line after MOTION."""
    names: list[str] = []
    parents: list[int] = []
    offsets: list[list[float]] = []
    channels: list[list[str]] = []
    open_joints: list[int] = []  # -2: an end of a chain
    opening: int | None = None
    for number, line in enumerate(lines, 1):
        words = line.split()
        try:
            match words[:1]:
                case [] | ["HIERARCHY"]:
                    pass
                case ["ROOT" | "JOINT"]:
                    if opening is not None or (not open_joints) != (not names):
                        raise ValueError
                    opening = len(names)
                    names.append("_".join(words[1:]) or f"joint_{opening}")
                    parents.append(open_joints[-1] if open_joints else -1)
                    offsets.append([0.0, 0.0, 0.0])
                    channels.append([])
                case ["End"]:
                    opening = -2
                case ["{"]:
                    if opening is None:
                        raise ValueError
                    open_joints.append(opening)
                    opening = None
                case ["}"]:
                    open_joints.pop()
                case ["OFFSET"]:
                    values = [float(word) for word in words[1:]]
                    if len(values) != 3:
                        raise ValueError
                    if open_joints[-1] >= 0:
                        offsets[open_joints[-1]] = values
                case ["CHANNELS"]:
                    if int(words[1]) != len(words) - 2 or not set(words[2:]) <= _CHANNELS:
                        raise ValueError
                    channels[open_joints[-1]] = words[2:]
                case ["MOTION"]:
                    if open_joints or not names:
                        raise ValueError
                    return names, parents, offsets, channels, number
                case _:
                    raise ValueError
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{source}, line {number}: is no part of a BVH file: {line.strip()!r}"
            ) from error
    raise InputError(f"{source}: is no BVH file, there is no line MOTION")


_CHANNELS = {f"{axis}{kind}" for axis in "XYZ" for kind in ("position", "rotation")}


def _forward(
    values: NDArray[np.float64], skeleton: Skeleton, offsets: NDArray[np.float64], channels: list[list[str]]
) -> NDArray[np.float64]:
    joints = np.zeros((len(values), skeleton.num_joints, 3))
    world: dict[int, Rotation] = {}
    column = 0
    for joint, parent in enumerate(skeleton.parents):  # a file names each joint after its parent
        names = channels[joint]
        mine = dict(zip(names, values[:, column : column + len(names)].T))
        column += len(names)
        place = np.repeat(offsets[joint][None], len(values), axis=0)
        for axis, letter in enumerate("XYZ"):
            if f"{letter}position" in mine:
                place[:, axis] = mine[f"{letter}position"]
        turns = [name for name in names if name.endswith("rotation")]
        local = Rotation.identity(len(values))
        for name in turns:
            axis = np.eye(3)["XYZ".index(name[0])]
            local = local * Rotation.from_rotvec(np.radians(mine[name])[:, None] * axis)
        joints[:, joint] = place if parent < 0 else joints[:, parent] + world[parent].apply(place)
        world[joint] = local if parent < 0 else world[parent] * local
    return joints
