"""Files of motion with training and test clips, for the clients of a small federation."""

from pathlib import Path

import numpy as np

from coloss.data import MotionClips, Skeleton, save_motion

ARM = Skeleton((-1, 0, 1))


def write_shard(path: Path, classes: int, seed: int, skeleton: Skeleton = ARM) -> str:
    """16 training and 8 test clips whose class is the place of the last joint; gives the path."""
    generator = np.random.default_rng(seed)
    action = np.arange(24) % classes
    joints = [generator.normal(0, 0.1, (5, skeleton.num_joints, 3)) for _ in action]
    for clip, number in zip(joints, action):
        clip[:, -1] += number
    clips = MotionClips.from_list(
        joints,
        skeleton,
        15,
        labels={"action": action},
        label_names={"action": tuple(f"action {n}" for n in range(classes))},
        split=np.where(np.arange(24) < 16, 0, 2),
    )
    save_motion(path, clips)
    return str(path)


def write_pair(folder: Path) -> str:
    """Two such files, as a federation takes them: clients `one` with 3 classes and `two` with 4."""
    return "+".join([write_shard(folder / "one.npz", 3, 0), write_shard(folder / "two.npz", 4, 1)])
