"""Clips with sentences: the splits of Bandai-Namco's set, and folders in the format of HumanML3D."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coloss.data import locate
from coloss.data.skeleton import SKELETONS
from coloss.errors import DataNotFoundError, InputError
from coloss.motion.motion_representation import FeatureNormalizer, feature_groups
from coloss.motion.text_motion_data import load_text_motion
from coloss.motion.text_motion_folder import HUMANML3D, KIT


def bandai():
    try:
        return locate("bandai")
    except DataNotFoundError as error:
        pytest.skip(str(error))


def made_up_folder(folder: Path, numbers: int, frames: int = 50) -> Path:
    """Five clips: two to train with (one with two stretches), one with NaN, one to validate and one to test."""
    generator = np.random.default_rng(0)
    for name in ("new_joint_vecs", "texts"):
        (folder / name).mkdir(parents=True)
    texts = {
        "000": "a man walks forward.#a/DET man/NOUN walk/VERB#0.0#0.0\nsomeone walks#someone/NOUN#nan#nan\n",
        "001": "a person jumps#a/DET#0.0#0.0\na person lands#a/DET#0.5#3.0\nthe end#the/DET#2.9#3.0\n",
        "002": "broken#broken/ADJ#0.0#0.0\n",
        "003": "A man walks forward#a/DET#0.0#0.0\n",
        "004": "a person somersaults#a/DET#0.0#0.0\n",
    }
    for number, (name, text) in enumerate(texts.items()):
        clip = generator.normal(size=(frames + number, numbers)).astype(np.float32)
        if name == "002":
            clip[7, 3] = np.nan
        np.save(folder / "new_joint_vecs" / f"{name}.npy", clip)
        (folder / "texts" / f"{name}.txt").write_text(text)
    for name, listed in (("train", "000\n001\n002\n005\n"), ("val", "003\n"), ("test", "004\n")):
        (folder / f"{name}.txt").write_text(listed)
    return folder


@pytest.mark.parametrize(("numbers", "skeleton", "fps"), [(263, HUMANML3D, 20.0), (251, KIT, 12.5)])
def test_a_folder_in_the_published_format(tmp_path, numbers, skeleton, fps):
    motion = load_text_motion(made_up_folder(tmp_path / "set", numbers), min_frames=24)
    assert motion.names == ("000", "001", "001:0.5-3", "003", "004")
    assert motion.split.tolist() == [0, 0, 0, 1, 2]
    # Whole tokens of four frames; the stretch is frames 0.5 to 3 seconds of its clip.
    stretch = int(3 * fps) - int(0.5 * fps)
    assert motion.lengths.tolist() == [48, 48, min(stretch, 51 - int(0.5 * fps)) // 4 * 4, 52, 52]
    assert motion.captions[:3] == (
        ("a man walks forward.", "someone walks"),
        ("a person jumps",),
        ("a person lands",),
    )
    assert (motion.skeleton, motion.fps, motion.rotations) == (skeleton, fps, True)
    assert motion.feature_groups == feature_groups(skeleton.num_joints, rotations=True)
    assert torch.equal(motion.features[2][0], motion.features[1][int(0.5 * fps)])
    # The same first sentence, but for its full stop and capitals: one group.
    assert motion.groups.tolist() == [0, 1, 2, 0, 3]
    reasons = "\n".join(motion.skipped)
    assert "002: 002.npy holds NaN or infinity, first in frame 7" in reasons
    assert "005: 005.npy is missing" in reasons
    assert "001:2.9-3: " in reasons
    assert not motion.composed
    # "somersaults" stands in the test part alone.
    assert motion.vocabulary.decode(motion.vocabulary.encode(["a person somersaults"])) == [
        "a person <unknown>"
    ]


def test_joints_and_rate_follow_from_the_skeletons_of_the_files():
    assert (HUMANML3D.num_joints, KIT.num_joints) == (22, 21)
    for skeleton in (HUMANML3D, KIT):
        assert skeleton.mirror is not None and skeleton.face is not None and skeleton.feet is not None
        partner = skeleton.mirror
        assert [skeleton.parents[partner[joint]] for joint, _ in skeleton.bones()] == [
            partner[parent] for _, parent in skeleton.bones()
        ]
        assert tuple(partner[joint] for joint in skeleton.feet) == skeleton.feet[2:] + skeleton.feet[:2]
        assert (partner[skeleton.face[0]], partner[skeleton.face[2]]) == (skeleton.face[1], skeleton.face[3])


def test_padding_is_zero_after_normalisation(tmp_path):
    motion = load_text_motion(made_up_folder(tmp_path, 263), min_frames=24)
    motion = motion.select([0, 3])
    batch = motion.dataset().take(torch.tensor([1, 0]))
    features, lengths = batch.inputs
    assert features.shape == (2, 52, 263) and lengths.tolist() == [52, 48]
    assert not features[1, 48:].any()
    torch.testing.assert_close(features[1, :48], motion.normalizer(motion.features[0]))
    assert batch.extras["words"].shape == (2, 2, 32)
    assert batch.extras["caption_counts"].tolist() == [1, 2]
    assert not batch.extras["words"][0, 1].any()
    biased = FeatureNormalizer.of(motion.features, motion.feature_groups, bias=5.0)
    assert torch.equal(motion.padded(biased)[0][0, :48], biased(motion.features[0]))


def test_the_folders_own_mean_and_std_are_used(tmp_path):
    made_up_folder(tmp_path, 263)
    np.save(tmp_path / "Mean.npy", np.full(263, 2.0))
    np.save(tmp_path / "Std.npy", np.full(263, 4.0))
    motion = load_text_motion(tmp_path, min_frames=24)
    torch.testing.assert_close(motion.normalizer(torch.full((1, 263), 6.0)), torch.ones(1, 263))
    np.save(tmp_path / "Std.npy", np.zeros(263))
    with pytest.raises(InputError, match="Std.npy: std must be > 0"):
        load_text_motion(tmp_path, min_frames=24)
    np.save(tmp_path / "Std.npy", np.ones(251))
    with pytest.raises(InputError, match="must hold 263 finite numbers"):
        load_text_motion(tmp_path, min_frames=24)


def test_shortest_and_longest_clips_of_the_format(tmp_path):
    folder = made_up_folder(tmp_path, 263)
    assert "001:0.5-3" in load_text_motion(folder, max_frames=54).names  # 40 to 199 by default
    with pytest.raises(InputError, match="no clips to train with"):
        load_text_motion(folder, min_frames=52)
    with pytest.raises(InputError, match="holds no clip that can be used"):
        load_text_motion(folder, max_frames=20)


def test_other_skeletons_by_their_numbers(tmp_path):
    folder = made_up_folder(tmp_path / "plain", 131)
    with pytest.raises(InputError, match="fps must be given for clips with 131 numbers"):
        load_text_motion(folder)
    motion = load_text_motion(folder, fps=15, min_frames=24, skeleton=SKELETONS["bandai"])
    assert (motion.num_joints, motion.rotations) == (21, False)
    assert load_text_motion(folder, fps=15, min_frames=24).num_joints == 11  # 12 J - 1 comes first
    with pytest.raises(InputError, match="must have 239 or 125 numbers a frame for a skeleton of 20 joints"):
        load_text_motion(folder, fps=15, min_frames=24, skeleton=SKELETONS["msr-action3d"])
    with pytest.raises(InputError, match="12 J - 1 or 6 J \\+ 5"):
        load_text_motion(made_up_folder(tmp_path / "odd", 130), fps=15, min_frames=24)


def test_lines_that_are_no_sentences_are_named(tmp_path):
    folder = made_up_folder(tmp_path, 263)
    (folder / "texts" / "003.txt").write_text("fine#x#0.0#0.0\nno fields\n")
    with pytest.raises(InputError, match="003.txt, line 2: must be sentence#tokens#from#to"):
        load_text_motion(folder, min_frames=24)


def test_folders_without_a_list_are_refused(tmp_path):
    with pytest.raises(InputError, match="new_joint_vecs is missing"):
        load_text_motion(tmp_path)
    folder = made_up_folder(tmp_path / "set", 263)
    (folder / "val.txt").unlink()
    (folder / "test.txt").unlink()
    (folder / "train.txt").write_text("000 001 003 004")
    assert sorted(load_text_motion(folder, min_frames=24).split.tolist()) == [0, 0, 0, 1, 2]


def test_compositional_split_holds_out_pairs_and_templates():
    bandai()
    motion = load_text_motion("bandai", limit=20, parts=(2,))
    train, test = motion.part(0), motion.part(2)
    assert not set(train.groups.tolist()) & set(test.groups.tolist())
    assert not set(motion.part(1).groups.tolist()) & set(test.groups.tolist())
    assert motion.composed and all("," in caption for captions in test.captions for caption in captions)
    assert not any("," in caption for captions in train.captions for caption in captions)
    # Every word of the test is a word of the training sentences, so nothing there is unknown.
    words, _ = test.caption_words()
    assert not (words == motion.vocabulary.unknown_id).any()
    assert (motion.lengths % 4 == 0).all() and motion.lengths.max() <= 128
    inner = load_text_motion("bandai", limit=20, parts=(2,), split="compositional-validation")
    assert not set(inner.groups.tolist()) & set(test.groups.tolist())
    assert not set(inner.part(0).groups.tolist()) & set(inner.part(2).groups.tolist())


def test_clips_of_one_length():
    bandai()
    motion = load_text_motion("bandai", frames=64, limit=4, split="given")
    assert set(motion.lengths.tolist()) == {64} and motion.features[0].shape == (64, 131)


def test_options_that_do_not_fit(tmp_path):
    for given, words in (
        ({"frames": 30}, "frames must be a multiple of 4"),
        ({"max_frames": 3}, "max_frames must be"),
        ({"parts": (3,)}, "parts must be 1, 2 or both"),
        ({"fps": 20}, "those of the data set"),
    ):
        with pytest.raises(InputError, match=words):
            load_text_motion("bandai", **given)
    with pytest.raises(InputError, match="frames must be None for a folder"):
        load_text_motion(tmp_path, frames=64)
