"""What a skeleton is: which joint hangs on which, which are left and right, and which make an arm or a leg."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coloss.errors import InputError, UnknownNameError, suggest_names
from coloss.ops.skeleton_graph import check_mirror, check_parents


@dataclass(frozen=True)
class Skeleton:
    """The joints of a body (or a hand) as a tree, with whatever else is known of them.

    Only the parents are needed; methods that flip sides, mix parts or look at feet say so when the rest is missing.

    Args:
        parents: of each joint, -1 at the root.
        names: of the joints, or none.
        mirror: partner of each joint on the other side, itself on the middle line; or None.
        parts: joints by part; bodies here have `trunk`, `left_arm`, `right_arm`, `left_leg`, `right_leg`, hands their fingers. Parts do
            not overlap; joints may be in none.
        feet: left ankle, left toe, right ankle, right toe; or None.
        face: right hip, left hip, right shoulder, left shoulder, from which follows where the body faces; or None.

    Raises:
        InputError: if any of it is wrong: parents that are no tree, joints that do not exist, parts that overlap.

    Examples:
        >>> arm = Skeleton((-1, 0, 1), names=("shoulder", "elbow", "hand"))
        >>> arm.num_joints, arm.root, arm.bones()
        (3, 0, [(1, 0), (2, 1)])
    """

    parents: tuple[int, ...]
    names: tuple[str, ...] = ()
    mirror: tuple[int, ...] | None = None
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    feet: tuple[int, int, int, int] | None = None
    face: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "parents", check_parents(self.parents))
            if self.mirror is not None:
                object.__setattr__(self, "mirror", check_mirror(self.mirror, self.num_joints))
        except ValueError as error:
            raise InputError(str(error)) from error
        if sum(parent == -1 for parent in self.parents) != 1:
            raise InputError(f"parents must have one root (-1), got {self.parents}")
        if self.names and len(self.names) != self.num_joints:
            raise InputError(f"names must be {self.num_joints} or none, got {len(self.names)}")
        groups = {"feet": self.feet or (), "face": self.face or ()}
        for name, joints in {
            **groups,
            **{f"part {name!r}": part for name, part in self.parts.items()},
        }.items():
            for joint in joints:
                if not 0 <= joint < self.num_joints:
                    raise InputError(f"{name} must hold joints in [0, {self.num_joints}), got {joint}")
        for name, group in groups.items():
            if len(group) not in (0, 4):
                raise InputError(f"{name} must be four joints, got {len(group)}")
        held = [joint for part in self.parts.values() for joint in part]
        if len(set(held)) != len(held):
            raise InputError(f"parts must not overlap, joint {max(held, key=held.count)} is in more than one")
        object.__setattr__(self, "parts", {name: tuple(part) for name, part in self.parts.items()})

    @property
    def num_joints(self) -> int:
        """Number of joints."""
        return len(self.parents)

    @property
    def root(self) -> int:
        """The joint without a parent."""
        return self.parents.index(-1)

    def bones(self) -> list[tuple[int, int]]:
        """Each (joint, parent) that a bone connects."""
        return [(joint, parent) for joint, parent in enumerate(self.parents) if parent >= 0]

    def order(self) -> list[int]:
        """All joints, each after its parent.

        Examples:
            >>> Skeleton((1, -1, 0)).order()
            [1, 0, 2]
        """
        depth = []
        for joint in range(self.num_joints):
            at, steps = joint, 0
            while self.parents[at] >= 0:
                at, steps = self.parents[at], steps + 1
            depth.append(steps)
        return sorted(range(self.num_joints), key=lambda joint: (depth[joint], joint))

    def joint(self, name: str) -> int:
        """Number of the joint of a name.

        Raises:
            UnknownNameError: if there is none; close names are proposed.
        """
        if name not in self.names:
            raise UnknownNameError(f"no joint named {name!r}{suggest_names(name, list(self.names))}")
        return self.names.index(name)

    def part(self, name: str) -> tuple[int, ...]:
        """Joints of a part.

        Raises:
            UnknownNameError: if there is none; close names are proposed.
        """
        if name not in self.parts:
            raise UnknownNameError(f"no part named {name!r}{suggest_names(name, list(self.parts))}")
        return self.parts[name]

    def subset(self, joints: Sequence[int]) -> "Skeleton":
        """The skeleton of some joints, numbered as given; each hangs on its nearest ancestor among them.

        A joint with no ancestor among them hangs on the first such joint, so that the result stays one tree.

        Args:
            joints: distinct, at least one.

        Raises:
            InputError: if a joint repeats or does not exist, or there are none.

        Examples:
            >>> chain = Skeleton((-1, 0, 1, 2), names=("hip", "knee", "ankle", "toe"))
            >>> chain.subset([0, 3]).parents
            (-1, 0)
        """
        kept = [int(joint) for joint in joints]
        if not kept or len(set(kept)) != len(kept) or not all(0 <= joint < self.num_joints for joint in kept):
            raise InputError(f"joints must be distinct, in [0, {self.num_joints}), at least one, got {kept}")
        new = {joint: number for number, joint in enumerate(kept)}
        parents: list[int] = []
        for joint in kept:
            at = self.parents[joint]
            while at >= 0 and at not in new:
                at = self.parents[at]
            parents.append(new[at] if at >= 0 else -1)
        root = parents.index(-1)
        parents = [root if parent == -1 and joint != root else parent for joint, parent in enumerate(parents)]
        whole = self.mirror is not None and all(self.mirror[joint] in new for joint in kept)
        return Skeleton(
            tuple(parents),
            names=tuple(self.names[joint] for joint in kept) if self.names else (),
            mirror=tuple(new[self.mirror[joint]] for joint in kept) if whole and self.mirror else None,
            parts={
                name: inside
                for name, part in self.parts.items()
                if (inside := tuple(new[joint] for joint in part if joint in new))
            },
            feet=_renumbered(self.feet, new),
            face=_renumbered(self.face, new),
        )


def _renumbered(joints: tuple[int, ...] | None, new: Mapping[int, int]) -> tuple[int, int, int, int] | None:
    if joints is None or any(joint not in new for joint in joints):
        return None
    first, second, third, fourth = (new[joint] for joint in joints)
    return first, second, third, fourth


def mirror_by_names(names: Sequence[str], left: str, right: str) -> tuple[int, ...]:
    """Partner of each joint, where names of the sides differ by a piece of text.

    Args:
        names: of the joints.
        left: text that names of the left side hold.
        right: text in its place on the right side.

    Raises:
        InputError: if a joint's partner is missing.

    Examples:
        >>> mirror_by_names(["Hips", "Hand_L", "Hand_R"], "_L", "_R")
        (0, 2, 1)
    """
    known = {name: joint for joint, name in enumerate(names)}
    partners = []
    for name in names:
        if left in name:
            other = name.replace(left, right, 1)
        else:
            other = name.replace(right, left, 1)
        if other not in known:
            raise InputError(
                f"names must have a partner for {name!r} on the other side, {other!r} is missing"
            )
        partners.append(known[other])
    return tuple(partners)


BANDAI_NAMES = (
    *("Hips", "Spine", "Chest", "Neck", "Head"),
    *("Shoulder_L", "UpperArm_L", "LowerArm_L", "Hand_L"),
    *("Shoulder_R", "UpperArm_R", "LowerArm_R", "Hand_R"),
    *("UpperLeg_L", "LowerLeg_L", "Foot_L", "Toes_L"),
    *("UpperLeg_R", "LowerLeg_R", "Foot_R", "Toes_R"),
)
HDM05_NAMES = (
    "root",
    *("lhipjoint", "lfemur", "ltibia", "lfoot", "ltoes"),
    *("rhipjoint", "rfemur", "rtibia", "rfoot", "rtoes"),
    *("lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head"),
    *("lclavicle", "lhumerus", "lradius", "lwrist", "lhand", "lfingers", "lthumb"),
    *("rclavicle", "rhumerus", "rradius", "rwrist", "rhand", "rfingers", "rthumb"),
)
MSR_NAMES = (
    *("left_shoulder", "right_shoulder", "neck", "spine", "left_hip", "right_hip", "hips"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle", "left_foot", "right_foot", "head"),
)
_FINGERS = ("index", "middle", "ring", "little")

SKELETONS: Mapping[str, Skeleton] = {
    "bandai": Skeleton(
        (-1, 0, 1, 2, 3, 2, 5, 6, 7, 2, 9, 10, 11, 0, 13, 14, 15, 0, 17, 18, 19),
        BANDAI_NAMES,
        mirror_by_names(BANDAI_NAMES, "_L", "_R"),
        {
            "trunk": (0, 1, 2, 3, 4),
            "left_arm": (5, 6, 7, 8),
            "right_arm": (9, 10, 11, 12),
            "left_leg": (13, 14, 15, 16),
            "right_leg": (17, 18, 19, 20),
        },
        feet=(15, 16, 19, 20),
        face=(17, 13, 10, 6),
    ),
    "hdm05": Skeleton(
        (-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 15, *(13, 17, 18, 19, 20, 21, 20))
        + (13, 24, 25, 26, 27, 28, 27),
        HDM05_NAMES,
        (0, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, *range(11, 17), *range(24, 31), *range(17, 24)),
        {
            "trunk": (0, *range(11, 17)),
            "left_arm": tuple(range(17, 24)),
            "right_arm": tuple(range(24, 31)),
            "left_leg": (1, 2, 3, 4, 5),
            "right_leg": (6, 7, 8, 9, 10),
        },
        feet=(3, 5, 8, 10),
        face=(6, 1, 24, 17),
    ),
    "msr-action3d": Skeleton(
        (2, 2, 3, 6, 6, 6, -1, 0, 1, 7, 8, 9, 10, 4, 5, 13, 14, 15, 16, 2),
        MSR_NAMES,
        mirror_by_names(MSR_NAMES, "left", "right"),
        {
            "trunk": (6, 3, 2, 19),
            "left_arm": (0, 7, 9, 11),
            "right_arm": (1, 8, 10, 12),
            "left_leg": (4, 13, 15, 17),
            "right_leg": (5, 14, 16, 18),
        },
        feet=(15, 17, 16, 18),
        face=(5, 4, 1, 0),
    ),
    "sfinge-hands": Skeleton(
        (-1, 0, 1, 2, 0, 4, 5, 6, 0, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18),
        ("palm", *(f"thumb_{k}" for k in range(3)), *(f"{f}_{k}" for f in _FINGERS for k in range(4))),
        parts={
            "thumb": (1, 2, 3),
            **{finger: tuple(range(4 * k, 4 * k + 4)) for k, finger in enumerate(_FINGERS, 1)},
        },
    ),
}
"""Skeletons of the data sets of motion, by the name of the set. MSR Action3D's joints are named by the literature, not by its files; which
side is which follows from the hand that moves in its one-handed actions. The hands' joints go by the order of their files."""

COMMON_NAMES = (
    *("torso", "neck", "head", "left_shoulder", "left_elbow", "left_hand"),
    *("right_shoulder", "right_elbow", "right_hand", "left_hip", "left_knee", "left_foot"),
    *("right_hip", "right_knee", "right_foot"),
)

COMMON = Skeleton(
    (-1, 0, 1, 1, 3, 4, 1, 6, 7, 0, 9, 10, 0, 12, 13),
    COMMON_NAMES,
    mirror_by_names(COMMON_NAMES, "left", "right"),
    {
        "trunk": (0, 1, 2),
        "left_arm": (3, 4, 5),
        "right_arm": (6, 7, 8),
        "left_leg": (9, 10, 11),
        "right_leg": (12, 13, 14),
    },
    face=(12, 9, 6, 3),
)
"""Fifteen joints that the bodies of the data sets share; feet are the ankles."""

COMMON_JOINTS: Mapping[str, tuple[int, ...]] = {
    "bandai": (1, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 15, 17, 18, 19),
    "hdm05": (11, 14, 16, 17, 18, 20, 24, 25, 27, 1, 2, 3, 6, 7, 8),
    "msr-action3d": (3, 2, 19, 0, 7, 9, 1, 8, 10, 4, 13, 15, 5, 14, 16),
}
"""Which joint of a data set stands for each of `COMMON`; hands are the wrists, where a set has both."""
