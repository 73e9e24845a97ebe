from dataclasses import replace

import numpy as np
import pytest
import torch

from coloss.data import MotionClips, Skeleton, common_layout, held_out_pairs, load_motion, save_motion
from coloss.data.motion_clips import filled
from coloss.data.motion_splits import holds_motion, motion_splits
from coloss.data.skeleton import COMMON_JOINTS, SKELETONS
from coloss.errors import InputError, UnknownNameError

CHAIN = Skeleton((-1, 0), names=("hip", "knee"))


def made_clips(count: int = 30, **options) -> MotionClips:
    random = np.random.default_rng(0)
    clips = [random.normal(size=(int(random.integers(4, 9)), 2, 3)) for _ in range(count)]
    labels = {"action": np.arange(count) % 3, "subject": np.arange(count) % 5}
    return MotionClips.from_list(clips, CHAIN, 15, labels=labels, **options)


def test_clips_come_back_as_they_were_given() -> None:
    clips = MotionClips.from_list([np.zeros((2, 2, 3)), np.ones((3, 2, 3))], CHAIN, 15, split=[0, 2])
    assert clips.clip(1).tolist() == np.ones((3, 2, 3)).tolist()
    test = clips.part(2)
    assert len(test) == 1 and test.names == ("1",) and test.clip(0).shape == (3, 2, 3)


def test_resampling_a_straight_line_gives_it_again_and_the_centre_cuts_both_ends() -> None:
    line = np.linspace(0, 1, 11)[:, None, None] * np.ones((1, 2, 3))
    clips = MotionClips.from_list([line], CHAIN, 15)
    assert clips.resampled(5)[0, :, 0, 0].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert clips.resampled(3, centre=0.5)[0, :, 1, 2].tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert clips.resampled(1)[0, 0, 0, 0] == pytest.approx(0.5)
    single = MotionClips.from_list([np.ones((1, 2, 3))], CHAIN, 15)
    assert torch.equal(single.resampled(4), torch.ones(1, 4, 2, 3))


def test_joints_not_seen_are_filled_in_time_and_zeros_are_positions() -> None:
    clip = np.zeros((4, 1, 3), np.float32)
    clip[:, 0, 0] = [0, np.nan, np.nan, 3]
    assert filled(clip)[:, 0, 0].tolist() == [0, 1, 2, 3]
    never = np.full((2, 1, 3), np.nan, np.float32)
    assert np.isnan(filled(never)).all()


def test_clips_survive_being_stored(tmp_path) -> None:
    clips = load_motion("msr-action3d").select([3, 5])
    save_motion(tmp_path / "two.npz", clips)
    again = load_motion(tmp_path / "two.npz")
    assert again.skeleton == clips.skeleton and again.names == clips.names and again.units == "screen"
    assert {name: list(values) for name, values in again.labels.items()} == {
        name: list(values) for name, values in clips.labels.items()
    }
    assert again.label_names["action"] == clips.label_names["action"]
    np.testing.assert_array_equal(again.clip(1), clips.clip(1))
    assert holds_motion(tmp_path / "two.npz")


def test_labels_may_not_take_the_names_of_fields(tmp_path) -> None:
    for name in ("start", "joint", "part_arm"):
        clips = MotionClips.from_list([np.zeros((2, 2, 3))], CHAIN, 15, labels={name: [0]})
        with pytest.raises(InputError, match=f"no other use for, got '{name}'"):
            save_motion(tmp_path / "one.npz", clips)


def test_msr_has_the_axes_of_the_others() -> None:
    clips = load_motion("msr-action3d")
    assert len(clips) == 566  # one clip of the stored 567 shows nobody
    joints, skeleton = clips.joints, clips.skeleton
    height = np.nanmean(joints[:, skeleton.joint("head"), 1] - joints[:, skeleton.joint("hips"), 1])
    assert height > 0
    # "high arm wave" and the other one-handed actions are made with the right hand.
    wave = clips.select(clips.labels["action"] == 0)
    moved = [
        np.nanstd(wave.joints[wave.start[0] :][: wave.length[0], skeleton.joint(f"{side}_hand")], 0).sum()
        for side in ("left", "right")
    ]
    assert moved[1] > 3 * moved[0]
    left, right = (np.nanmean(joints[:, skeleton.joint(f"{side}_shoulder"), 0]) for side in ("left", "right"))
    assert left > right


@pytest.mark.parametrize(
    ("name", "clips", "fps"), [("bandai", 1571, 15), ("hdm05", 287, 15), ("sfinge-hands", 468, 20)]
)
def test_known_sets_load_in_metres(name, clips, fps) -> None:
    found = load_motion(name)
    assert (len(found), found.fps, found.units) == (clips, fps, "m")
    assert found.skeleton == SKELETONS[name]
    if name != "sfinge-hands":
        height = np.ptp(found.joints[..., 1], axis=1)
        assert 1 < np.median(height) < 2
        head, feet = found.skeleton.parts["trunk"][-1], found.skeleton.feet or (0,)
        assert (found.joints[:, head, 1] > found.joints[:, feet[0], 1]).mean() > 0.9


def test_common_layout_is_measured_in_torsos() -> None:
    for name in ("hdm05", "msr-action3d"):
        clips = common_layout(load_motion(name).select(np.arange(20)))
        assert clips.skeleton.num_joints == 15
        joints = clips.clip(4)
        hips = joints[:, [9, 12]].mean(1)
        assert np.nanmedian(np.linalg.norm(joints[:, 1] - hips, axis=-1)) == pytest.approx(1, rel=1e-5)
    # Pixels across and up stay in proportion, the depth comes to the spread across (here in pixels: MSR's are 320 x 240).
    raw = load_motion("msr-action3d").select([4])
    before, after = raw.clip(0)[:, list(COMMON_JOINTS["msr-action3d"])], common_layout(raw).clip(0)
    scale = after[..., :2] / before[..., :2]
    assert scale.std() < 1e-4 * scale.mean()
    own = after - after[:, [9, 12]].mean(1, keepdims=True)
    assert own[..., 2].std() == pytest.approx(own[..., 0].std(), rel=1e-4)
    with pytest.raises(
        InputError, match="clips must come from bandai, hdm05, msr-action3d .*clips of your own"
    ):
        common_layout(made_clips())


def test_common_layout_divides_each_clip_once_and_looks_at_the_clips_given_alone() -> None:
    clips = load_motion("msr-action3d")
    some = clips.select([3, 7])
    twice = common_layout(clips.select([3, 3, 7]))
    np.testing.assert_array_equal(twice.clip(0), twice.clip(1))
    again = [common_layout(part) for part in (some, replace(some, joints=some.joints.copy()))]
    elsewhere = some.joints.copy()
    elsewhere[: some.start[0]] *= 100
    other = common_layout(replace(some, joints=elsewhere))
    for index in range(2):
        np.testing.assert_array_equal(again[0].clip(index), other.clip(index))
    flat = some.joints.copy()
    flat[some.start[1] : some.start[1] + some.length[1]] = 0
    with pytest.raises(InputError, match="clip '7' must show hips and neck apart"):
        common_layout(replace(some, joints=flat))


@pytest.mark.parametrize("label", ["action", "style"])
def test_bandai_holds_out_pairs_of_which_each_half_was_seen(label: str) -> None:
    clips = load_motion("bandai")
    held = held_out_pairs(clips)
    pairs = {(a, s) for a, s in zip(clips.labels["action"][held], clips.labels["style"][held])}
    # One clip of the smaller part has a held-out pair too: whoever trains on both parts must leave it out.
    assert len(pairs) == 20 and (held & (clips.labels["part"] == 2)).sum() == 397 and held.sum() == 398
    splits = motion_splits("bandai", frames=4, label=label)
    assert len(splits.train) + len(splits.validation) == 1000 and len(splits.test) == 397

    def pairs_of(part) -> set:
        rows = part.ids.numpy()
        return set(zip(clips.labels["action"][rows], clips.labels["style"][rows]))

    assert not pairs_of(splits.test) & (pairs_of(splits.train) | pairs_of(splits.validation))
    assert not pairs_of(splits.train) & pairs_of(splits.validation)


def test_a_selection_of_bandai_is_divided_like_the_whole() -> None:
    clips = load_motion("bandai")
    some = motion_splits(clips.select(np.isin(clips.labels["action"], [9, 10, 11, 13])), frames=4)
    assert min(len(some.train), len(some.validation), len(some.test)) > 0


@pytest.mark.parametrize(
    ("name", "label", "sizes"), [("msr-action3d", "subject", 275), ("hdm05", "actor", 99)]
)
def test_nobody_is_in_two_parts(name, label, sizes) -> None:
    clips = load_motion(name)
    splits = motion_splits(name, frames=4, seed=1)
    people = [
        set(clips.labels[label][part.ids.numpy()]) for part in (splits.train, splits.validation, splits.test)
    ]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert len(splits.test) == sizes
    assert torch.equal(
        splits.train.inputs[:, :, 0, splits.skeleton.root], torch.zeros(len(splits.train), 3, 1)
    )


def test_own_clips_are_cut_by_person_where_persons_are_named() -> None:
    splits = motion_splits(made_clips(), frames=4)
    subjects = [set((part.ids % 5).tolist()) for part in (splits.train, splits.validation, splits.test)]
    assert [len(people) for people in subjects] == [3, 1, 1]
    assert len(set.union(*subjects)) == 5
    limited = motion_splits(made_clips(), frames=4, limit=4)
    assert max(len(limited.train), len(limited.validation), len(limited.test)) <= 4


def test_a_limit_leaves_no_class_untrained() -> None:
    clips = made_clips(60)
    labels = {"action": np.where(np.arange(60) % 20 == 3, 1, 0)}
    for seed in range(5):
        splits = motion_splits(replace(clips, labels=labels), frames=4, limit=3, seed=seed)
        assert set(splits.train.targets.tolist()) == {0, 1}
        alone = motion_splits(replace(clips, labels=labels), frames=4, limit=1, seed=seed)
        assert set(alone.test.targets.tolist()) <= set(alone.train.targets.tolist())
        assert alone.num_classes == 2


def test_too_few_persons_are_cut_by_clip_and_the_description_says_so() -> None:
    clips = made_clips(30)
    two = replace(clips, labels=dict(clips.labels) | {"subject": np.arange(30) % 2})
    assert "parts drawn by clip" in motion_splits(two, frames=4).description
    assert "parts share no subject" in motion_splits(clips, frames=4).description
    # Who the person is cannot be learnt where nobody is in two parts.
    assert "parts drawn by clip" in motion_splits(clips, frames=4, label="subject").description
    named = replace(clips, split=np.repeat([0, 1, 2], 10).astype(np.uint8))
    assert "parts as the clips name them" in motion_splits(named, frames=4).description


def test_what_a_recogniser_cannot_use_is_refused() -> None:
    clips = made_clips()
    with pytest.raises(InputError, match="has no label 'style', it has action, subject"):
        motion_splits(clips, label="style")
    with pytest.raises(InputError, match="frames must be >= 1, got 0"):
        motion_splits(clips, frames=0)
    with pytest.raises(InputError, match="limit must be >= 1, got 0"):
        motion_splits(clips, limit=0)
    with pytest.raises(InputError, match="class 2 of action is tested but has no training clip"):
        motion_splits(replace(clips, split=np.where(clips.labels["action"] == 2, 2, 0).astype(np.uint8)))
    joints = clips.joints.copy()
    joints[: clips.length[0], 1] = np.nan
    with pytest.raises(InputError, match="a joint of clip '0' is never seen"):
        motion_splits(replace(clips, joints=joints))
    with pytest.raises(InputError, match="has no labels"):
        motion_splits(MotionClips.from_list([np.zeros((2, 2, 3))], CHAIN, 15))


def test_files_that_hold_no_motion_are_named(tmp_path) -> None:
    np.savez(tmp_path / "table.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="table.npz holds no motion: 'joints' is missing, it has x"):
        load_motion(tmp_path / "table.npz")
    np.savez(tmp_path / "flat.npz", joints=np.zeros((3, 2)), parents=[-1, 0], fps=15.0)
    with pytest.raises(InputError, match=r"joints must be \(frames, joints, 3\), got \(3, 2\)"):
        load_motion(tmp_path / "flat.npz")
    np.savez(
        tmp_path / "torn.npz", joints=np.zeros((3, 2, 3)), parents=[-1, 0], fps=15.0, start=[0], length=[9]
    )
    with pytest.raises(InputError, match=r"torn.npz: each clip must hold frames in \[0, 3\)"):
        load_motion(tmp_path / "torn.npz")
    with pytest.raises(InputError, match=r"data set 'digits' \(.*\) holds no motion: choose one of bandai"):
        load_motion("digits")
    with pytest.raises(UnknownNameError, match="bandai"):
        load_motion("bandia")
    with pytest.raises(InputError, match="path must end in .npz, got 'clip.csv'"):
        save_motion(tmp_path / "clip.csv", made_clips())
    with pytest.raises(
        InputError, match=r"joints must be \(frames, 2, 3\) for this skeleton, got \(4, 3, 3\)"
    ):
        MotionClips.from_list([np.zeros((4, 3, 3))], CHAIN, 15)
