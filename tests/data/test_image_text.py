"""Pairs of images and captions, from OpenMoji and from what users have on disk."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from coloss.data import WordVocabulary, load_image_text
from coloss.errors import InputError

SHADES = {"dark": 10, "grey": 120, "light": 240}


def picture(path, shade, side=8):
    Image.new("RGB", (side, side), (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path):
    rows = ["file_name,caption,label,split"]
    for number in range(12):
        shade = list(SHADES)[number % 3]
        picture(tmp_path / f"{number}.png", SHADES[shade])
        part = ("train", "train", "validation", "test")[number // 3]
        rows += [
            f"{number}.png,a {shade} square,{shade},{part}",
            f"{number}.png,one more {shade} one,{shade},{part}",
        ]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def test_openmoji_pairs_image_and_name():
    splits = load_image_text("openmoji", caption="name")
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (1693, 297)
    images, ids = splits.train.inputs
    assert images.shape[1:] == (3, 64, 64) and images.min() >= 0 and images.max() <= 1
    everything = torch.cat([part.ids for part in (splits.train, splits.validation, splits.test)])
    assert everything.sort().values.tolist() == list(range(1990))
    row = int((splits.train.ids == splits.captions.index("jack-o-lantern")).nonzero())
    assert splits.vocabulary.decode(ids[row : row + 1]) == ["jack o lantern"]
    assert splits.class_names[splits.train.targets[row]] == "activities"


def test_words_come_from_the_training_captions_alone():
    splits = load_image_text("openmoji", caption="name", vocabulary_size=10_000)
    unknown = [(part.inputs[1] == 1).any().item() for part in (splits.train, splits.test)]
    assert unknown == [False, True]


def test_a_folder_with_a_list(folder):
    splits = load_image_text(folder, max_words=5)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [12, 6, 6]
    assert splits.class_names == ("dark", "grey", "light")
    images, ids = splits.test.inputs
    for image, words, label, number in zip(images, ids, splits.test.targets, splits.test.ids):
        shade = splits.class_names[label]
        assert image.unique().item() == pytest.approx(SHADES[shade] / 255)
        assert shade in splits.vocabulary.decode(words[None])[0].split()
        assert shade in splits.captions[number]


def test_rows_of_one_image_stay_together(folder):
    lines = (folder / "captions.csv").read_text().splitlines()
    rows = [dict(zip(("image", "text"), line.split(",")[:2])) for line in lines[1:]]
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for seed in range(3):
        splits = load_image_text(folder, seed=seed)
        assert splits.train.targets is None and splits.num_classes is None
        parts = [{int(i) // 2 for i in part.ids} for part in (splits.train, splits.validation, splits.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 12
        assert all(parts)


def test_text_files_beside_images_and_an_npz(tmp_path):
    for number in range(6):
        picture(tmp_path / f"{number}.png", 40 * number, side=8 + number)
        (tmp_path / f"{number}.txt").write_text(f"number {number}\n")
    picture(tmp_path / "alone.png", 3)
    splits = load_image_text(tmp_path)
    assert len(splits.captions) == 6 and splits.input_shape == (3, 64, 64)
    assert load_image_text(tmp_path, size=4).input_shape == (3, 4, 4)
    images = np.arange(5 * 6 * 6, dtype=np.uint8).reshape(5, 6, 6)
    np.savez(
        tmp_path / "pairs.npz", image=images, caption=np.array(list("abcde")), split=np.array([0, 0, 1, 2, 2])
    )
    splits = load_image_text(tmp_path / "pairs.npz")
    assert splits.input_shape == (1, 6, 6)
    assert splits.test.ids.tolist() == [3, 4]
    assert torch.equal(splits.test.inputs[0][:, 0], torch.from_numpy(images[3:]) / 255)


def test_the_limit_is_of_each_part():
    splits = load_image_text("openmoji", limit=7)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [7, 7, 7]


def test_bad_input_is_named(folder, tmp_path_factory, as_users_call):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(
        InputError, match="must hold captions.csv or captions.jsonl, or images with a text file"
    ):
        load_image_text(empty)
    with pytest.raises(InputError, match="no file or folder '/nowhere'"):
        load_image_text("/nowhere")
    for options, message in (
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"caption": "both"}, 'caption must be "name", "tags" or "name\\+tags", got \'both\''),
    ):
        with pytest.raises(InputError, match=message):
            load_image_text("openmoji", **options)
    (folder / "captions.csv").write_text("file_name,words\n1.png,a square")
    with pytest.raises(
        InputError, match="must have a caption column \\(caption, text, sentence\\), got file_name, words"
    ):
        load_image_text(folder)
    (folder / "captions.csv").write_text("file_name,caption\nabsent.png,a square")
    with pytest.raises(InputError, match="names 'absent.png' in row 0, and there is no such file"):
        load_image_text(folder)
    (folder / "captions.csv").write_text("file_name,caption\n1.png,")
    with pytest.raises(
        InputError, match="must name a file and a caption in every row, row 0 has '1.png', nan"
    ):
        load_image_text(folder)
    (folder / "captions.csv").write_text("file_name,caption\n1.png,one\n2.png,two")
    with pytest.raises(InputError, match="there must be at least 3 images with captions, got 2"):
        load_image_text(folder)
    np.savez(empty / "a.npz", picture=np.zeros(3))
    with pytest.raises(InputError, match="must hold image and caption, got picture"):
        load_image_text(empty / "a.npz")


def test_a_vocabulary_is_the_most_frequent_words():
    vocabulary = WordVocabulary.of_texts(["b a a", "c b A"], size=5)
    assert vocabulary.words[3:] == ("a", "b")
    assert vocabulary.encode(["", "C a's"]).tolist()[0] == [0] * 16
    assert vocabulary.encode(["c a"])[0, :3].tolist() == [1, 3, 0]
    with pytest.raises(ValueError, match="words must hold each word once, got 'x' twice"):
        WordVocabulary(["x", "x"])
    with pytest.raises(ValueError, match="size must be > 3, got 3"):
        WordVocabulary.of_texts([], size=3)
    with pytest.raises(ValueError, match="max_words must be >= 1, got 0"):
        WordVocabulary([], max_words=0)
