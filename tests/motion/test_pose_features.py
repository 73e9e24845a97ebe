"""Angles and scaled distances of a pose: values by hand, what they do not change under, and joints that are missing."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data.skeleton import COMMON, SKELETONS, Skeleton
from coloss.errors import InputError
from coloss.motion import (
    COCO_LANDMARKS,
    MEDIAPIPE_LANDMARKS,
    PoseSpec,
    body_frame_coordinates,
    body_scale,
    frame_features,
    invariant_pose_features,
    joint_angles,
    pair_distances,
    pose_spec,
)

SPEC = pose_spec(COCO_LANDMARKS)


def poses(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 17, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(seed: int, vertical: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if vertical:
        angle = torch.rand((), generator=generator, dtype=torch.float64) * 6
        c, s = angle.cos(), angle.sin()
        return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    return matrix * torch.linalg.det(matrix)


@pytest.mark.parametrize("dims", [2, 3])
def test_straight_right_and_folded_limbs(dims):
    at = torch.tensor([[0.0, 2, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 3, 0], [1, 2, 0]])
    angles = joint_angles(at, [(0, 1, 2), (0, 1, 3), (0, 1, 4), (5, 1, 3), (5, 1, 2)], dims)
    torch.testing.assert_close(angles, torch.tensor([180.0, 90, 0, 45, 135]))


def test_an_angle_has_no_sign_so_both_sides_of_a_body_are_alike():
    bent = poses()
    mirrored = bent * torch.tensor([-1.0, 1, 1])
    for dims in (2, 3):
        torch.testing.assert_close(
            joint_angles(bent, SPEC.angles, dims), joint_angles(mirrored, SPEC.angles, dims)
        )


@given(st.integers(0, 10_000), st.floats(0.05, 20))
@settings(max_examples=5, deadline=None)
def test_angles_and_ratios_stay_under_rotation_shift_and_scale(seed, scale):
    joints = poses(seed=seed)
    moved = scale * joints @ rotation(seed).T + torch.tensor([3.0, -1, 2])
    free = PoseSpec(SPEC.angles, SPEC.distances, scales=SPEC.scales)  # heights know the vertical
    before, after = (invariant_pose_features(x, free)[0] for x in (joints, moved))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-6)
    turned = scale * joints @ rotation(seed, vertical=True).T + 1
    torch.testing.assert_close(
        invariant_pose_features(turned, SPEC)[0],
        invariant_pose_features(joints, SPEC)[0],
        atol=1e-5,
        rtol=1e-6,
    )
    torch.testing.assert_close(
        body_frame_coordinates(turned, SPEC), body_frame_coordinates(joints, SPEC), atol=1e-5, rtol=1e-6
    )


def test_plane_angles_stay_only_within_the_plane():
    joints = poses()
    in_plane = torch.tensor([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]], dtype=torch.float64)
    before = joint_angles(joints, SPEC.angles, 2)
    torch.testing.assert_close(joint_angles(2 * joints @ in_plane.T - 1, SPEC.angles, 2), before)
    turned = joint_angles(joints @ rotation(0, vertical=True).T, SPEC.angles, 2)
    assert (turned - before).abs().max() > 10


def test_a_missing_joint_takes_only_what_needs_it():
    joints = poses()
    joints[2, 7] = torch.nan  # left elbow
    features, present = invariant_pose_features(joints, SPEC)
    lost = {name for name, there in zip(SPEC.names, present[2].tolist()) if not there}
    assert lost == {
        "left elbow angle",
        "left shoulder angle",
        "left elbow to knee",
        "left elbow over shoulder",
    }
    assert present[[0, 1, 3, 4]].all() and torch.equal(present, ~features.isnan())
    whole = invariant_pose_features(poses(), SPEC)[0]
    torch.testing.assert_close(features[present], whole[present])


def test_a_coordinate_of_zero_is_a_coordinate():
    joints = poses()
    joints[:, 9] = 0.0  # the wrist lies at the origin: there it counts as missing, here it does not
    assert invariant_pose_features(joints, SPEC)[1].all()


def test_the_scale_is_the_first_bone_that_is_there():
    joints = poses()
    lengths = pair_distances(joints, SPEC.scales)
    joints[1, 5] = torch.nan  # left shoulder: the right trunk stands in
    joints[2, [5, 6]] = torch.nan  # the left thigh
    joints[3, [11, 12]] = torch.nan  # no hips, no bone
    joints[4, 5] = joints[4, 11]  # a bone without length is none
    found = body_scale(joints, SPEC.scales)
    torch.testing.assert_close(
        found[[0, 1, 2, 4]], lengths[torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, 1])]
    )
    assert found[3].isnan()
    assert invariant_pose_features(joints, SPEC)[1][3, len(SPEC.angles) :].sum() == 0


def test_two_joints_in_one_place_have_no_angle():
    joints = torch.zeros(3, 3)
    joints[2, 0] = 1
    assert joint_angles(joints, [(0, 1, 2)]).isnan().all()


def test_gradients_are_finite_at_straight_limbs():
    joints = torch.tensor([[0.0, 2, 0], [0, 1, 0], [0, 0, 0]], requires_grad=True)
    joint_angles(joints, [(0, 1, 2)]).sum().backward()
    assert joints.grad.isfinite().all()
    bent = torch.tensor([[0.3, 2, 0], [0, 1, 0.2], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: joint_angles(x, [(0, 1, 2)]), bent)


def test_half_precision_goes_up():
    joints = poses().half()
    features, _ = invariant_pose_features(joints, SPEC)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, invariant_pose_features(joints.float(), SPEC)[0])


@pytest.mark.parametrize("name", ["bandai", "hdm05", "msr-action3d"])
def test_every_skeleton_has_its_spec(name):
    spec = pose_spec(SKELETONS[name])
    assert len(spec.names) == 22 and spec.num_joints <= SKELETONS[name].num_joints
    for left, right in zip(spec.angles[::2], spec.angles[1::2]):
        assert tuple(SKELETONS[name].mirror[joint] for joint in left) == right


def test_specs_of_other_detectors():
    assert pose_spec(COMMON).angles[0] == (3, 4, 5)
    assert pose_spec(MEDIAPIPE_LANDMARKS).angles[:2] == ((11, 13, 15), (12, 14, 16))  # odd is left
    with pytest.raises(InputError, match="missing: left_wrist"):
        pose_spec({name: joint for name, joint in COCO_LANDMARKS.items() if name != "left_wrist"})
    with pytest.raises(InputError, match="landmarks must have a joint for each name"):
        pose_spec(Skeleton((-1, 0)))


def test_a_spec_survives_json():
    assert PoseSpec.from_dict(json.loads(json.dumps(SPEC.as_dict()))) == SPEC


def test_feature_kinds():
    joints = poses().float()
    assert {
        kind: frame_features(joints, SPEC, kind).shape[-1]
        for kind in ("invariant", "invariant-2d", "raw", "mixed", "body-frame")
    } == {"invariant": 22, "invariant-2d": 22, "raw": 36, "mixed": 58, "body-frame": 36}
    torch.testing.assert_close(frame_features(joints, SPEC, "raw"), joints[:, list(SPEC.joints)].flatten(1))
    with pytest.raises(ValueError, match="kind must be one of invariant"):
        frame_features(joints, SPEC, "angles")


def test_bad_input():
    with pytest.raises(ValueError, match="dims must be 2 or 3, got 4"):
        joint_angles(poses(), SPEC.angles, 4)
    with pytest.raises(ValueError, match="joints must be at least 17"):
        invariant_pose_features(poses()[:, :10], SPEC)
    with pytest.raises(ValueError, match="joints must have 3 axes, got 2"):
        joint_angles(poses()[..., :2], SPEC.angles)
    with pytest.raises(ValueError, match="pairs must name at least one bone"):
        body_scale(poses(), [])
    for given_, message in (
        ({}, "at least one angle"),
        ({"angles": ((0, 1, 2),), "names": ("a", "b")}, "names must be 1"),
        ({"distances": ((0, 1),)}, "scales must name at least one pair"),
        ({"angles": ((0, 1, -2),)}, "joints must be >= 0"),
        ({"angles": ((0, 1, 2),), "up": 3}, "up must be 0, 1 or 2"),
    ):
        with pytest.raises(InputError, match=message):
            PoseSpec(**given_)
    with pytest.raises(ValueError, match="spec must name the hips"):
        body_frame_coordinates(poses(), PoseSpec(((0, 1, 2),)))
    assert math.isclose(joint_angles(poses()[:0], SPEC.angles).numel(), 0)
