import numpy as np
import pytest
import torch

from coloss.data import Batch, MotionClips, Skeleton
from coloss.motion import MirrorPoses, PinholeCamera, lifting_pairs, lifting_splits, mirror_poses
from coloss.train import State

SKELETON = Skeleton((-1, 0, 1, 0, 3), mirror=(0, 3, 4, 1, 2))
BODY = np.array([[0, 1.0, 0], [0.2, 0.9, 0], [0.2, 0.5, 0.1], [-0.2, 0.9, 0], [-0.2, 0.5, 0.0]])


def clips(lengths: tuple[int, ...] = (10, 4), **options: object) -> MotionClips:
    rng = np.random.default_rng(0)
    walks = [
        BODY + rng.normal(size=(n, 5, 3)) * 0.05 + np.linspace(0, 4, n)[:, None, None] * [1.0, 0, 0]
        for n in lengths
    ]
    return MotionClips.from_list(walks, SKELETON, 15, **options)  # type: ignore[arg-type]


def test_without_noise_the_image_is_the_projection_of_the_pose_at_its_root() -> None:
    pairs = lifting_pairs(clips(), noise=0.0, camera=PinholeCamera(1.7))
    torch.testing.assert_close(pairs.camera(pairs.pose + pairs.root[:, None]), pairs.image)
    assert torch.equal(pairs.pose[:, 0], torch.zeros(14, 3))
    torch.testing.assert_close(pairs.camera.fit_root(pairs.pose, pairs.image), pairs.root, atol=1e-4, rtol=0)


def test_poses_are_turned_never_bent() -> None:
    source = clips()
    pairs = lifting_pairs(source, noise=0.0)
    world = torch.from_numpy(source.joints)
    torch.testing.assert_close(
        torch.cdist(pairs.pose, pairs.pose), torch.cdist(world, world), atol=1e-4, rtol=0
    )
    # Not mirrored either: the volume that hips, knees and ankle span keeps its sign, in axes of equal handedness.
    volumes = [torch.linalg.det(p[:, 1:4] - p[:, :1]) for p in (pairs.pose, world)]
    torch.testing.assert_close(*volumes, atol=1e-5, rtol=1e-3)


def test_noise_has_the_size_that_was_asked_for() -> None:
    source = clips((60, 60, 60))
    exact, noisy = (
        lifting_pairs(source, noise=noise, generator=torch.Generator().manual_seed(0)).image
        for noise in (0.0, 0.02)
    )
    assert (noisy - exact).std().item() == pytest.approx(0.02, rel=0.1)


def test_frames_are_spread_and_know_their_clip() -> None:
    pairs = lifting_pairs(clips(labels={"action": [3, 5]}), frames=4, views=2)
    assert pairs.frame.tolist() == [0, 3, 6, 9, 0, 1, 2, 3] * 2
    assert pairs.clip.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert pairs.labels["action"].tolist() == [3] * 4 + [5] * 4 + [3] * 4 + [5] * 4
    chosen = pairs.select(torch.tensor([5, 1]))
    assert chosen.frame.tolist() == [1, 3] and torch.equal(chosen.image, pairs.image[[5, 1]])
    assert len(pairs.dataset()) == 16


def test_the_camera_of_a_clip_keeps_its_direction_and_walks_along() -> None:
    steady = [np.repeat(BODY[None], 6, 0) + np.linspace(0, 9, 6)[:, None, None] * [0, 0, 1.0]] * 2
    source = MotionClips.from_list(steady, SKELETON, 15)
    film = lifting_pairs(source, noise=0.0, viewpoint="clip")
    for clip in (0, 1):
        rows = film.pose[film.clip == clip]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(film.root[:6], film.root[:1].expand(6, 3), atol=1e-4, rtol=0)
    assert not torch.allclose(film.pose[0], film.pose[6], atol=1e-2)
    drawn = lifting_pairs(source, noise=0.0, viewpoint="frame")
    assert not torch.allclose(drawn.pose[0], drawn.pose[1], atol=1e-2)


def test_frames_with_an_unseen_joint_are_left_out() -> None:
    source = clips()
    source.joints[2, 3] = np.nan
    pairs = lifting_pairs(source, frames=60)
    assert pairs.frame.tolist() == [0, 1, *range(3, 10), 0, 1, 2, 3]
    source.joints[:] = np.nan
    with pytest.raises(ValueError, match="at least one frame with every joint, got none"):
        lifting_pairs(source)


def test_the_same_seed_draws_the_same_pairs() -> None:
    first, second = (lifting_splits(clips((5,) * 6), seed=3) for _ in range(2))
    assert torch.equal(first.train.image, second.train.image)
    assert not torch.equal(first.train.image, lifting_splits(clips((5,) * 6), seed=4).train.image)


def test_parts_hold_different_clips_by_the_given_division_or_a_new_one() -> None:
    lengths = tuple(range(2, 14))
    given = lifting_splits(clips(lengths, split=[0] * 8 + [1] * 2 + [2] * 2))
    assert [len(part.clip.unique()) for part in given] == [8, 2, 2]
    assert len(given.test) == 12 + 12  # 12 of 13 frames, all of 12
    made = lifting_splits(clips(lengths))
    assert [len(part.clip.unique()) for part in made] == [9, 1, 2]
    assert sum(len(part) for part in made) == sum(lengths)  # the one of 13 frames trains, by all of them
    with pytest.raises(ValueError, match="at least 3, to train, choose and test by, got 2"):
        lifting_splits(clips((4, 4)))
    for split, counts in (([0, 2, 2], "1, 0, 2"), ([2, 2, 2], "0, 0, 3"), ([0, 1, 1], "0, 2, 1")):
        with pytest.raises(ValueError, match=f"leave some to train, choose and test by, got {counts}"):
            lifting_splits(clips((4, 4, 4), split=split))


def test_bad_input_is_named(as_users_call: None) -> None:
    for arguments, message in (
        ({"frames": 0}, "frames must be >= 1, got 0"),
        ({"views": 0}, "views must be >= 1, got 0"),
        ({"noise": -1.0}, r"noise must be in \[0, 1\) of half the image's width, got -1"),
        ({"viewpoint": "drone"}, "viewpoint must be .* got 'drone'"),
    ):
        with pytest.raises(ValueError, match=message):
            lifting_pairs(clips(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clips must be in metres .* got 'screen'"):
        lifting_pairs(clips(units="screen"))


def test_mirroring_twice_gives_the_poses_back_and_swaps_sides() -> None:
    pairs = lifting_pairs(clips(), noise=0.0)
    assert SKELETON.mirror is not None
    turned = mirror_poses(pairs.pose, SKELETON.mirror)
    torch.testing.assert_close(turned[:, 1], pairs.pose[:, 3] * torch.tensor([-1.0, 1, 1]))
    assert torch.equal(mirror_poses(turned, SKELETON.mirror), pairs.pose)
    with pytest.raises(ValueError, match="mirror must have a partner for each of 5 joints, got 3"):
        mirror_poses(pairs.pose, (0, 2, 1))
    with pytest.raises(ValueError, match="mirror must name the partner .* got None"):
        MirrorPoses(None)
    for wrong in ((1, 2, 0, 3, 4), (0, 1, 2, 3, 9)):
        with pytest.raises(ValueError, match="mirror must swap 5 joints in pairs"):
            MirrorPoses(wrong)
        with pytest.raises(ValueError, match="mirror must swap 5 joints in pairs"):
            mirror_poses(pairs.pose, wrong)


def test_half_of_a_batch_is_mirrored_image_and_pose_together() -> None:
    pairs = lifting_pairs(clips((60, 60, 60, 60)), noise=0.0)
    state = State(torch.nn.Identity())
    state.batch = Batch(pairs.image, pairs.pose)
    method = MirrorPoses(SKELETON.mirror)
    method.on_batch(state)
    same = (state.batch.targets == pairs.pose).all(-1).all(-1)
    assert 0.35 < same.float().mean() < 0.65
    # Each is still a pose with its image, seen by the mirrored camera at the mirrored root, which for a centred lens is the camera itself.
    root = torch.where(same[:, None], pairs.root, pairs.root * torch.tensor([-1.0, 1, 1]))
    torch.testing.assert_close(pairs.camera(state.batch.targets + root[:, None]), state.batch.inputs)
