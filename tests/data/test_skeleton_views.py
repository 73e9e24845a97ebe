import math

import pytest
import torch

from coloss.data import (
    Skeleton,
    axis_mask,
    canonical_joints,
    crop_and_shear,
    default_views,
    facing,
    joint_noise,
    mirror_skeleton,
    resample_frames,
    rotate_joints,
    shear,
    skeleton_streams,
    temporal_crop,
)
from coloss.data.skeleton import SKELETONS
from coloss.data.skeleton_views import axis_rotation

PARENTS = [-1, 0, 1, 1]


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(5, 3, 9, 4, generator=torch.Generator().manual_seed(0))


def test_bones_along_a_chain_sum_to_leaf_minus_root(clips) -> None:
    bone = skeleton_streams(clips, PARENTS)["bone"]
    assert torch.allclose(bone[..., 1] + bone[..., 3], clips[..., 3] - clips[..., 0], atol=1e-6)
    assert float(bone[..., 0].abs().max()) == 0


def test_a_clip_that_stands_still_has_no_motion_and_a_shift_changes_joints_alone(clips) -> None:
    still = clips[:, :, :1].expand_as(clips)
    streams = skeleton_streams(still, PARENTS)
    assert float(streams["motion"].abs().max()) == float(streams["bone_motion"].abs().max()) == 0
    before, after = skeleton_streams(clips, PARENTS), skeleton_streams(clips + 2.0, PARENTS)
    for name in ("bone", "motion", "bone_motion"):
        assert torch.allclose(before[name], after[name], atol=1e-5)


def test_streams_of_persons_are_those_of_each(clips) -> None:
    both = torch.stack([clips, clips.flip(0)], -1)
    streams = skeleton_streams(both, PARENTS)
    for name, stream in skeleton_streams(clips, PARENTS).items():
        assert torch.equal(streams[name][..., 0], stream)


def test_resampling_keeps_the_ends_and_lines(clips) -> None:
    out = resample_frames(clips, 20)
    assert torch.equal(out[:, :, [0, -1]], clips[:, :, [0, -1]])
    line = torch.linspace(0, 1, 5).view(1, 1, 5, 1)
    assert torch.allclose(resample_frames(line, 9).flatten(), torch.linspace(0, 1, 9))
    assert torch.equal(resample_frames(clips[:, :, :1], 4), clips[:, :, :1].expand(-1, -1, 4, -1))


def test_temporal_crop_is_a_window_of_the_mirrored_clip() -> None:
    clip = torch.arange(6.0).view(1, 1, 6, 1)
    padded = torch.tensor([3.0, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2])
    windows = {tuple(padded[first : first + 6].tolist()) for first in range(7)}
    crops = temporal_crop(clip.repeat(200, 1, 1, 1), 3, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in crops.flatten(1).tolist()} == windows


def test_shear_keeps_its_diagonal_and_draws_for_each_clip() -> None:
    basis = torch.eye(3).view(1, 3, 1, 3).repeat(50, 1, 1, 1)
    matrices = shear(basis, 0.5, torch.Generator().manual_seed(0))[:, :, 0]
    assert torch.equal(matrices.diagonal(dim1=1, dim2=2), torch.ones(50, 3))
    off = matrices[:, ~torch.eye(3).bool()]
    assert float(off.abs().max()) <= 0.5
    assert float(off.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.15)


def test_turns_keep_lengths_and_the_axis(clips) -> None:
    turned = rotate_joints(clips, 180, "y", torch.Generator().manual_seed(1))
    assert torch.allclose(turned.norm(dim=1), clips.norm(dim=1), atol=1e-5)
    assert torch.equal(turned[:, 1], clips[:, 1])
    quarter = axis_rotation(torch.tensor([math.pi / 2]), "z")[0]
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_mirroring_twice_gives_the_clip_again(clips) -> None:
    once = mirror_skeleton(clips, [0, 1, 3, 2])
    assert torch.equal(mirror_skeleton(once, [0, 1, 3, 2]), clips)
    assert torch.equal(once[:, 0, :, 2], -clips[:, 0, :, 3])


def test_axis_mask_clears_one_axis_of_a_share_of_the_clips() -> None:
    out = axis_mask(torch.ones(2000, 3, 1, 1), 0.5, torch.Generator().manual_seed(0))
    cleared = (out == 0).flatten(1).sum(1)
    assert set(cleared.tolist()) == {0, 1}
    assert float(cleared.float().mean()) == pytest.approx(0.5, abs=0.05)


def test_views_are_functions_of_the_generator_alone(clips) -> None:
    for view in (shear, rotate_joints, temporal_crop, joint_noise, axis_mask):
        one, two = (view(clips, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two)
        five = view(clips[..., None].half(), generator=torch.Generator().manual_seed(3))
        assert five.dtype == torch.float16
        assert torch.allclose(five[..., 0].float(), one, atol=2e-2)


def test_default_views_of_clips_are_crops_and_shears(clips) -> None:
    views = default_views(clips[..., None], 2, torch.Generator().manual_seed(0))
    assert views.shape == (2, 5, 3, 9, 4, 1)
    assert torch.equal(views, crop_and_shear(clips[..., None], 2, torch.Generator().manual_seed(0)))
    assert not torch.equal(views[0], views[1])
    assert torch.equal(crop_and_shear(clips, 2, padding=0.0, amplitude=0.0), torch.stack([clips, clips]))


def test_a_video_is_no_clip_of_a_skeleton() -> None:
    with pytest.raises(ValueError, match="to have default views, got shape .2, 3, 4, 16, 16.: give a view"):
        default_views(torch.rand(2, 3, 4, 16, 16))


def test_a_body_that_faces_nowhere_is_not_turned() -> None:
    """Hips and shoulders in one point: neither values nor gradients may be NaN."""
    skeleton = SKELETONS["bandai"]
    joints = torch.zeros(1, 3, 21, 3)
    joints[..., skeleton.joint("Head"), :] = torch.tensor([1.0, 2.0, 3.0])
    joints.requires_grad_()
    out = canonical_joints(joints, skeleton)
    assert torch.equal(out, joints)
    out.sum().backward()
    assert bool(joints.grad.isfinite().all())


def test_a_canonical_clip_does_not_know_where_it_was_recorded() -> None:
    skeleton = SKELETONS["bandai"]
    generator = torch.Generator().manual_seed(0)
    joints = torch.randn(2, 6, 21, 3, generator=generator)
    turn = axis_rotation(torch.tensor([2.0]), "y")[0]
    moved = joints @ turn.T + torch.tensor([3.0, 7.0, -2.0])
    one, two = canonical_joints(joints, skeleton), canonical_joints(moved, skeleton)
    assert torch.allclose(one, two, atol=1e-5)
    assert torch.allclose(one[:, 0, 0, [0, 2]], torch.zeros(2, 2), atol=1e-6)
    assert torch.allclose(one[..., 1].flatten(1).amin(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(facing(one[:, 0], skeleton), torch.tensor([0.0, 0, 1]).expand(2, 3), atol=1e-6)


def test_bad_arguments_are_named(clips, as_users_call) -> None:
    with pytest.raises(ValueError, match="3 joints"):
        skeleton_streams(clips, [-1, 0, 1])
    with pytest.raises(ValueError, match=r"padding must be in \[0, 9\), got 9"):
        temporal_crop(clips, 9)
    with pytest.raises(ValueError, match="views must be >= 1, got 0"):
        crop_and_shear(clips, 0)
    with pytest.raises(ValueError, match=r"padding must be in \[0, 1\), got 1.0"):
        crop_and_shear(clips, padding=1.0)
    with pytest.raises(ValueError, match="amplitude must be >= 0, got -1"):
        shear(clips, -1)
    with pytest.raises(ValueError, match='axis must be letters of "xyz", got'):
        rotate_joints(clips, axis="w")
    with pytest.raises(ValueError, match="frames must be >= 1, got 0"):
        resample_frames(clips, 0)
    with pytest.raises(ValueError, match="clips must have 3 channels"):
        shear(clips[:, :2])
    with pytest.raises(ValueError, match="face, got None"):
        canonical_joints(torch.zeros(1, 2, 1, 3), Skeleton((-1,)))
