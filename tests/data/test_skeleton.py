import pytest

from coloss.data import DATASETS, Skeleton
from coloss.data.skeleton import COMMON, COMMON_JOINTS, SKELETONS, mirror_by_names
from coloss.errors import InputError, UnknownNameError
from coloss.lab.known_tasks import MOTION_SETS


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_parts_of_the_known_skeletons_are_whole_and_mirror_each_other(name) -> None:
    skeleton = SKELETONS[name]
    held = {joint for part in skeleton.parts.values() for joint in part}
    assert held == set(range(skeleton.num_joints)) - ({0} if name == "sfinge-hands" else set())  # the palm
    if skeleton.mirror is not None:
        for one, other in (("left_arm", "right_arm"), ("left_leg", "right_leg"), ("trunk", "trunk")):
            assert {skeleton.mirror[joint] for joint in skeleton.part(one)} == set(skeleton.part(other))
        # Mirroring keeps bones: the partner's parent is the parent's partner.
        for joint, parent in skeleton.bones():
            assert skeleton.parents[skeleton.mirror[joint]] == skeleton.mirror[parent]


def test_the_known_skeletons_are_those_of_the_data_sets_of_motion() -> None:
    assert set(SKELETONS) == set(MOTION_SETS)
    assert all(DATASETS[name].kind == "motion" for name in SKELETONS)


@pytest.mark.parametrize("name", sorted(COMMON_JOINTS))
def test_common_joints_are_distinct_and_lie_on_the_same_side(name) -> None:
    joints = COMMON_JOINTS[name]
    assert len(set(joints)) == COMMON.num_joints == 15
    side = {joint: part for part, members in SKELETONS[name].parts.items() for joint in members}
    for joint, part in ((4, "left_arm"), (8, "right_arm"), (10, "left_leg"), (14, "right_leg"), (2, "trunk")):
        assert side[joints[joint]] == part


def test_a_subset_hangs_on_the_nearest_ancestor_and_keeps_partners() -> None:
    skeleton = SKELETONS["bandai"]
    legs = skeleton.subset([0, 13, 15, 17, 19])
    assert legs.parents == (-1, 0, 1, 0, 3)
    assert legs.mirror == (0, 3, 4, 1, 2)
    assert legs.parts == {"trunk": (0,), "left_leg": (1, 2), "right_leg": (3, 4)}
    assert skeleton.subset([13, 14]).mirror is None  # the other side is missing
    assert skeleton.subset(range(21)) == skeleton


def test_joints_without_a_common_ancestor_hang_on_the_first() -> None:
    assert SKELETONS["bandai"].subset([8, 12]).parents == (-1, 0)


def test_order_puts_parents_first() -> None:
    order = SKELETONS["msr-action3d"].order()
    for joint, parent in SKELETONS["msr-action3d"].bones():
        assert order.index(parent) < order.index(joint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parents": (-1, -1)}, r"parents must have one root \(-1\)"),
        ({"parents": (-1, 0), "names": ("a",)}, "names must be 2 or none, got 1"),
        ({"parents": (-1, 0), "mirror": (1, 1)}, "mirror must swap 2 joints in pairs"),
        ({"parents": (-1, 0), "parts": {"arm": (3,)}}, r"part 'arm' must hold joints in \[0, 2\), got 3"),
        ({"parents": (-1, 0), "parts": {"a": (1,), "b": (1,)}}, "parts must not overlap, joint 1"),
        ({"parents": (-1, 0), "feet": (0, 1, 2, 3)}, r"feet must hold joints in \[0, 2\), got 2"),
    ],
)
def test_skeletons_that_contradict_themselves_are_refused(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        Skeleton(**arguments)


def test_unknown_names_propose_close_ones() -> None:
    with pytest.raises(UnknownNameError, match="no joint named 'Hip'.*'Hips'"):
        SKELETONS["bandai"].joint("Hip")
    with pytest.raises(UnknownNameError, match="no part named 'left arm'"):
        SKELETONS["bandai"].part("left arm")
    with pytest.raises(InputError, match="'hand_R' is missing"):
        mirror_by_names(["hand_L"], "_L", "_R")
    with pytest.raises(InputError, match="joints must be distinct"):
        SKELETONS["bandai"].subset([1, 1])
