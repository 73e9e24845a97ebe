"""BVH files: written, read back by forward kinematics, and files of others."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from coloss.data import Skeleton
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion.bvh import read_bvh, write_bvh

BODY = SKELETONS["bandai"]


def rigid_clip(skeleton, frames=12, seed=0, size=1.5):
    """Bones of fixed length that turn by smooth random rotations: what a motion-capture system gives."""
    generator = np.random.default_rng(seed)
    offsets = generator.normal(size=(skeleton.num_joints, 3)) * 0.3
    speed = generator.normal(size=(skeleton.num_joints, 3)) * size / frames
    joints = np.zeros((frames, skeleton.num_joints, 3))
    world = {}
    for joint in skeleton.order():
        parent = skeleton.parents[joint]
        local = Rotation.from_rotvec(np.arange(frames)[:, None] * speed[joint])
        if parent < 0:
            joints[:, joint] = np.linspace([0, 1, 0], [1, 1.2, -2], frames)
            world[joint] = local
        else:
            joints[:, joint] = joints[:, parent] + world[parent].apply(offsets[joint])
            world[joint] = world[parent] * local
    return joints


@pytest.mark.parametrize("name", ["bandai", "hdm05", "msr-action3d"])
@pytest.mark.parametrize("size", [1.5, 20.0])
def test_stiff_bones_come_back_exactly(tmp_path, name, size):
    skeleton = SKELETONS[name]
    joints = rigid_clip(skeleton, size=size)
    write_bvh(tmp_path / "clip.bvh", joints, skeleton, fps=15)
    found = read_bvh(tmp_path / "clip.bvh")
    assert found.fps == 15 and sorted(found.skeleton.names) == sorted(skeleton.names)
    order = [found.skeleton.names.index(joint) for joint in skeleton.names]
    np.testing.assert_allclose(found.joints[:, order], joints, atol=2e-5)
    for joint, parent in skeleton.bones():
        place = order[joint]
        assert found.skeleton.names[found.skeleton.parents[place]] == skeleton.names[parent]


def test_bones_that_stretch_keep_their_median_length(tmp_path):
    arm = Skeleton((-1, 0, 1))
    joints = np.zeros((3, 3, 3))
    joints[:, 1, 0], joints[:, 2, 0] = [1.0, 1.1, 1.4], [2.0, 2.1, 2.4]
    write_bvh(tmp_path / "arm.bvh", joints, arm, fps=10)
    found = read_bvh(tmp_path / "arm.bvh").joints
    np.testing.assert_allclose(found[:, 1, 0], 1.1, atol=1e-5)
    np.testing.assert_allclose(found[:, 2, 0], 2.1, atol=1e-5)


def test_noise_moves_joints_by_about_as_much(tmp_path):
    joints = rigid_clip(BODY)
    noise = np.random.default_rng(1).normal(size=joints.shape) * 0.005
    write_bvh(tmp_path / "clip.bvh", joints + noise, BODY, fps=15)
    found = read_bvh(tmp_path / "clip.bvh")
    order = [found.skeleton.names.index(joint) for joint in BODY.names]
    error = np.linalg.norm(found.joints[:, order] - joints, axis=-1)
    assert error.mean() < 0.03


def test_a_bone_turned_right_around(tmp_path):
    joints = np.array([[[0.0, 0, 0], [0, 1, 0], [0, 2, 0]], [[0, 0, 0], [0, -1, 0], [0, 0, 0]]])
    write_bvh(tmp_path / "flip.bvh", joints, Skeleton((-1, 0, 1)), fps=10)
    np.testing.assert_allclose(read_bvh(tmp_path / "flip.bvh").joints, joints, atol=1e-5)


def test_angles_do_not_jump_between_frames(tmp_path):
    wheel = Skeleton((-1, 0))
    turn = np.linspace(0, 4 * math.pi, 41)
    joints = np.zeros((41, 2, 3))
    joints[:, 1, 0], joints[:, 1, 1] = np.cos(turn), np.sin(turn)
    write_bvh(tmp_path / "wheel.bvh", joints, wheel, fps=10)
    rows = (tmp_path / "wheel.bvh").read_text().split("Frame Time:")[1].splitlines()[1:]
    about_z = np.array([float(row.split()[3]) for row in rows])
    np.testing.assert_allclose(np.diff(about_z), 18.0, atol=1e-3)


def test_unit_and_names_of_the_file(tmp_path):
    joints = np.zeros((2, 2, 3))
    joints[:, 1, 1] = 0.5
    write_bvh(tmp_path / "cm.bvh", joints, Skeleton((-1, 0), ("left hip", "left hip")), fps=30, scale=100)
    found = read_bvh(tmp_path / "cm.bvh")
    assert found.skeleton.names == ("left_hip_0", "left_hip_1")
    assert found.joints[0, 1, 1] == pytest.approx(50)
    write_bvh(tmp_path / "alone.bvh", joints[:, :1], Skeleton((-1,)), fps=30)
    assert read_bvh(tmp_path / "alone.bvh").skeleton.names == ("joint_0",)


OTHERS = """HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Xrotation Yrotation Zrotation
  JOINT Chest
  {
    OFFSET 0 1 0
    CHANNELS 6 Xposition Yposition Zposition Zrotation Yrotation Xrotation
    JOINT Head
    {
      OFFSET 0 1 0
      CHANNELS 3 Yrotation Xrotation Zrotation
      End Site
      {
        OFFSET 0 9 0
      }
    }
  }
}
MOTION
Frames: 1
Frame Time: 0.05
1 2 3 90 0 0 0 2 0 90 0 0 0 0 0
"""


def test_a_file_of_another_program(tmp_path):
    path = tmp_path / "other.bvh"
    path.write_text(OTHERS)
    found = read_bvh(path)
    assert found.skeleton.names == ("Hips", "Chest", "Head") and found.fps == 20
    # The hips turn a quarter about x: up becomes +z. The chest stands 2 above them by its own channels, turned a quarter about z.
    np.testing.assert_allclose(found.joints[0], [[1, 2, 3], [1, 2, 5], [0, 2, 5]], atol=1e-6)


def test_bad_files_and_arguments_are_named(tmp_path):
    path = tmp_path / "bad.bvh"
    for old, new, words in (
        ("OFFSET 0 9 0", "OFFSET 0 9", "line 16: is no part of a BVH file"),
        ("CHANNELS 3", "CHANNELS 4", "line 13"),
        ("Frames: 1", "Frames: one", "line 22: must be 'Frames: NUMBER'"),
        ("Frames: 1", "Frames: nan", "line 22: must be 'Frames: NUMBER'"),
        ("Frame Time: 0.05", "Frame Time: inf", "line 23: must be 'Frame Time: NUMBER'"),
        ("Frames: 1", "Frames: 2", "must hold 2 frames"),
        ("0 0 0 0 0\n", "0 0 0 0\n", "must be 15 numbers for each frame"),
        ("MOTION", "", "is no part of a BVH file"),
        ("JOINT Head", "LIMB Head", "line 10"),
    ):
        path.write_text(OTHERS.replace(old, new))
        with pytest.raises(InputError, match=words):
            read_bvh(path)
    joints = np.zeros((2, 21, 3))
    for clip, given, words in (
        (joints[:, :20], {}, "joints must be \\(frames, 21, 3\\)"),
        (joints[:0], {}, "at least one frame"),
        (joints * np.nan, {}, "joints must be finite, got NaN in frame 0"),
        (joints, {"fps": 0.0}, "fps must be > 0"),
        (joints, {"scale": -1.0}, "scale must be > 0"),
    ):
        with pytest.raises(InputError, match=words):
            write_bvh(path, clip, BODY, **({"fps": 15.0} | given))
    with pytest.raises(InputError, match="must end in .bvh"):
        write_bvh(tmp_path / "clip.txt", joints, BODY, 15.0)
    with pytest.raises(InputError, match="cannot write"):
        write_bvh(path / "inside.bvh", joints, BODY, 15.0)
