"""Features of a motion: an exact inverse, invariances, and the published layout worked out by hand."""

import math

import numpy as np
import pytest
import torch

from coloss.data import Skeleton, canonical_joints
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion.motion_representation import (
    FeatureNormalizer,
    feature_groups,
    motion_features,
    recover_joints,
    rest_directions,
    swing_rotation,
)

BODY = SKELETONS["bandai"]


def turned(joints, yaw):
    cos, sin = math.cos(yaw), math.sin(yaw)
    return joints @ torch.tensor([[cos, 0.0, -sin], [0.0, 1.0, 0.0], [sin, 0.0, cos]], dtype=joints.dtype)


def walker(frames=30, turn=0.0, seed=0):
    """A stiff body that walks forward and turns by `turn` rad in each frame, with limbs that shake."""
    generator = torch.Generator().manual_seed(seed)
    pose = torch.zeros(21, 3, dtype=torch.float64)
    pose[:, 1] = torch.linspace(0.2, 1.6, 21)
    pose[[6, 13], 0], pose[[10, 17], 0] = 0.2, -0.2
    shaken = pose + 0.05 * torch.randn(frames, 21, 3, generator=generator, dtype=torch.float64)
    shaken[:, [6, 10, 13, 17], 2] = 0.0
    place = torch.zeros(3, dtype=torch.float64)
    clip = []
    for frame in range(frames):
        clip.append(turned(shaken[frame], turn * frame) + place)
        place = place + turned(torch.tensor([[0.02, 0.0, 0.1]], dtype=torch.float64), turn * frame)[0]
    return torch.stack(clip)


@pytest.mark.parametrize("turn", [0.0, 0.05, -0.3])
def test_recovered_joints_are_the_canonical_ones(turn):
    # 0.3 rad a frame passes straight backwards several times.
    joints = turned(walker(turn=turn), 2.5) + 3.0
    for smoothing in (0.0, 20.0):
        features = motion_features(joints, BODY, smoothing=smoothing)
        recovered = recover_joints(features, 21)
        torch.testing.assert_close(recovered, canonical_joints(joints, BODY)[:-1], atol=1e-9, rtol=0)


def test_features_do_not_depend_on_where_the_clip_happens_and_faces():
    joints = walker(turn=0.1)
    moved = turned(joints, -1.2) + torch.tensor([5.0, 0.7, -3.0], dtype=torch.float64)
    torch.testing.assert_close(motion_features(joints, BODY), motion_features(moved, BODY), atol=1e-9, rtol=0)


def test_recovery_is_batched_and_differentiable():
    features = torch.stack([motion_features(walker(seed=seed), BODY).float() for seed in (0, 1)])
    features.requires_grad_()
    joints = recover_joints(features, 21)
    assert torch.equal(joints[1], recover_joints(features[1], 21))
    joints.square().mean().backward()
    used = features.grad.abs().sum((0, 1)) > 0
    assert used[3:64].all() and not used[64:].any()


def test_each_number_of_a_hand_worked_frame():
    # Hips and shoulders across x; the body then turns a quarter to its left (+x) and steps 1 m that way.
    pose = torch.zeros(6, 3)
    pose[:, 1] = torch.tensor([1.0, 1.0, 1.0, 1.5, 1.5, 0.0])
    pose[[1, 3], 0], pose[[2, 4], 0] = -0.2, 0.2
    body = Skeleton((-1, 0, 0, 0, 0, 0), feet=(5, 5, 2, 1), face=(1, 2, 3, 4))
    joints = torch.stack([pose, turned(pose, math.pi / 2) + torch.tensor([1.0, 0.0, 0.0])])
    found = motion_features(joints, body, fps=15, smoothing=0.0)[0]
    groups = feature_groups(6)
    assert found[groups["turn"]].item() == pytest.approx(-math.pi / 4)  # half of the turn back
    # Seen from the second frame the way went straight ahead.
    torch.testing.assert_close(found[groups["travel"]], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert found[groups["height"]].item() == pytest.approx(1.0)
    torch.testing.assert_close(found[groups["positions"]].view(5, 3)[0], torch.tensor([-0.2, 1.0, 0.0]))
    # ... and from the first to the left; the right hip goes 1 m left and 0.2 m left and forward.
    velocities = found[groups["velocities"]].view(6, 3)
    torch.testing.assert_close(velocities[0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(velocities[1], torch.tensor([1.2, 0.0, 0.2]), atol=1e-6, rtol=0)
    assert found[groups["contacts"]].tolist() == [0, 0, 0, 0]
    still = motion_features(joints[[0, 0]], body)[0]
    assert still[groups["contacts"]].tolist() == [1, 1, 1, 1]


def test_the_threshold_of_contacts_is_in_metres_per_frame():
    joints = walker()[:1].repeat(2, 1, 1)
    joints[1, 15, 2] += 0.04
    contacts = [
        motion_features(joints, BODY, **given)[0, -4:].tolist()
        for given in ({"contact_step": 0.03}, {"contact_step": 0.05}, {"fps": 20}, {"fps": 40})
    ]
    # As published, 0.0447 m at 20 frames a second, hence half of it at 40.
    assert contacts == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_layouts_of_the_published_files():
    assert feature_groups(22, rotations=True) == {
        "turn": slice(0, 1),
        "travel": slice(1, 3),
        "height": slice(3, 4),
        "positions": slice(4, 67),
        "rotations": slice(67, 193),
        "velocities": slice(193, 259),
        "contacts": slice(259, 263),
    }
    assert feature_groups(21, rotations=True)["contacts"].stop == 251


def test_rotations_turn_the_rest_pose_into_the_clip():
    joints = turned(walker(turn=0.1), 0.4)
    rest = rest_directions([joints], BODY)
    features = motion_features(joints, BODY, rotations=True, rest=rest)
    assert features.shape == (29, 251)
    columns = features[:, feature_groups(21, rotations=True)["rotations"]].view(29, 20, 2, 3)
    third = torch.linalg.cross(columns[:, :, 0], columns[:, :, 1])
    local = torch.stack([columns[:, :, 0], columns[:, :, 1], third], dim=-1)
    torch.testing.assert_close(local @ local.transpose(-1, -2), torch.eye(3).double().expand_as(local))
    # Forward along the right leg (17 to 20 from the hips): each swing after the one before it gives the bone's direction.
    plain = motion_features(joints, BODY)
    places = canonical_joints(joints, BODY)[:-1]
    half = torch.cat([torch.zeros(1), plain[:-1, 0].cumsum(0)])
    angle = 2 * half
    zero, one = torch.zeros(29).double(), torch.ones(29).double()
    rows = [angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos()]
    turn = torch.stack(rows, dim=-1).view(29, 3, 3)
    parent = 0
    for joint in (17, 18, 19, 20):
        turn = turn @ local[:, joint - 1]
        bone = places[:, joint] - places[:, parent]
        bone = bone / bone.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(turn @ rest[joint].double(), bone, atol=1e-6, rtol=0)
        parent = joint


def test_a_chain_begins_anew_at_every_child_but_the_first():
    # Of joint 1's children, 2 goes on with its chain and 3 is relative to the body as if it hung on the root.
    body = Skeleton((-1, 0, 1, 1, 0, 0), feet=(4, 4, 5, 5), face=(4, 5, 4, 5))
    joints = torch.tensor([[0.0, 1, 0], [0, 1.5, 0], [0, 1.5, 0.5], [0.5, 1.5, 0], [-0.1, 0, 0], [0.1, 0, 0]])
    rest = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, -1, 0], [0, -1, 0]])
    features = motion_features(joints.expand(2, 6, 3), body, rotations=True, rest=rest)
    columns = features[0, feature_groups(6, rotations=True)["rotations"]].view(5, 2, 3)
    first = swing_rotation(rest[1], torch.tensor([0.0, 1, 0]))
    second = first.T @ swing_rotation(rest[2], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(columns[1], second[:, :2].T, atol=1e-6, rtol=0)
    torch.testing.assert_close(columns[2], torch.eye(3)[:2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("near", [1.0, 1e-3, 1e-6, 0.0])
def test_swings_are_rotations_up_to_opposite_directions(near):
    source = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    target = -2 * source + near * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rotation = swing_rotation(source, target)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0)
    reached = rotation @ source / source.norm()
    torch.testing.assert_close(reached, target / target.norm(), atol=1e-4, rtol=0)
    nothing = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(swing_rotation(nothing, target), torch.eye(3, dtype=torch.float64))


def test_std_is_averaged_in_groups_and_divided_by_the_bias():
    generator = torch.Generator().manual_seed(0)
    groups = feature_groups(3)
    frames = torch.randn(400, 23, generator=generator) * torch.linspace(0.1, 3.0, 23)
    frames[:, groups["contacts"]] = 1.0
    plain = FeatureNormalizer.of([frames[:100], frames[100:]], groups)
    expected = frames.numpy().std(0)[groups["positions"]].mean()
    np.testing.assert_allclose(plain.std[groups["positions"]], expected, rtol=1e-5)
    assert plain.std[groups["contacts"]].tolist() == [1.0] * 4  # never changes
    biased = FeatureNormalizer.of([frames], groups, bias=5.0)
    torch.testing.assert_close(biased.std[:4], plain.std[:4] / 5)
    torch.testing.assert_close(biased.std[groups["contacts"]], plain.std[groups["contacts"]] / 5)
    torch.testing.assert_close(biased.std[groups["positions"]], plain.std[groups["positions"]])
    again = FeatureNormalizer(torch.zeros(23), torch.ones(23))
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(frames), plain(frames))


def test_bad_input_is_named():
    joints = walker(4)
    broken = joints.clone()
    broken[2, 5, 1] = math.nan
    cases = [
        (broken, BODY, {}, "joints must be finite.*frame 2, joint 5"),
        (joints[:1], BODY, {}, "at least two frames, got 1"),
        (joints[:, :20], BODY, {}, "joints must be 21 as the skeleton's, got 20"),
        (joints, Skeleton(BODY.parents, feet=BODY.feet), {}, "must know its face"),
        (joints, Skeleton(BODY.parents, face=BODY.face), {}, "must know its feet"),
        (joints, BODY, {"rotations": True}, "rest must give"),
        (joints, BODY, {"fps": 0.0}, "fps must be > 0"),
        (joints, BODY, {"contact_step": 0.0}, "contact_step must be > 0"),
        (joints, BODY, {"smoothing": -1.0}, "smoothing must be >= 0"),
    ]
    for clip, skeleton, given, words in cases:
        with pytest.raises(InputError, match=words):
            motion_features(clip, skeleton, **given)
    with pytest.raises(ValueError, match="at least 64 numbers a frame for 21 joints, got 10"):
        recover_joints(torch.zeros(3, 10), 21)
    with pytest.raises(ValueError, match="root must be in"):
        recover_joints(torch.zeros(3, 131), 21, root=21)
    with pytest.raises(ValueError, match="std must be > 0"):
        FeatureNormalizer(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="groups must cover 9 features, got 131"):
        FeatureNormalizer.of([torch.zeros(2, 9)], feature_groups(21))
    with pytest.raises(InputError, match="clips must be at least one"):
        rest_directions([], BODY)


def test_a_root_that_is_not_the_first_joint():
    body = SKELETONS["msr-action3d"]
    generator = torch.Generator().manual_seed(3)
    joints = torch.randn(6, 20, 3, generator=generator, dtype=torch.float64)
    recovered = recover_joints(motion_features(joints, body), 20, root=body.root)
    torch.testing.assert_close(recovered, canonical_joints(joints, body)[:-1], atol=1e-9, rtol=0)
