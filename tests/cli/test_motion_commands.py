"""`coloss generate`, `coloss retrieve` and `coloss caption`, as a person types them."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_lamp import BODY, stored_lamp, walk

from coloss.data import MotionClips, load_motion, save_motion
from coloss.motion.bvh import read_bvh, write_bvh


@pytest.fixture
def model(tmp_path):
    return stored_lamp(tmp_path / "model")


def test_a_sentence_becomes_files(coloss, model):
    asked = ("a person walks proudly", "--model", model, "--seconds", "0.8", "--seed", "2")
    outcome = coloss(
        "generate",
        *asked,
        "--out",
        "new/clip.npz",
        "--gif",
        "clip.gif",
        "--bvh",
        "clip.bvh",
        "--svg",
        "clip.svg",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == "12 frames, 0.8 s: new/clip.npz, clip.gif, clip.bvh, clip.svg"
    clips = load_motion("new/clip.npz")
    assert clips.names == ("a person walks proudly",) and clips.clip(0).shape == (12, 7, 3)
    assert clips.skeleton == BODY
    assert read_bvh("clip.bvh").joints.shape == (12, 7, 3)
    with Image.open("clip.gif") as picture:
        assert picture.n_frames == 12
    assert "a person walks proudly" in Path("clip.svg").read_text()
    found = json.loads(coloss("generate", *asked, "--json").out)
    assert found["files"] == ["motion.npz"] and found["frames"] == 12 and found["seconds"] == 0.8
    assert (load_motion("motion.npz").joints == clips.joints).all()  # the same seed


def test_words_the_model_has_never_seen(coloss, model):
    outcome = coloss("generate", "a person wlaks", "--model", model)
    assert outcome.code == 2 and "never seen 'wlaks'; did you mean 'walks'" in outcome.err
    assert coloss("generate", "a person wlaks", "--model", model, "--allow-unknown").code == 0


def test_clips_by_sentence_and_sentences_by_clip(coloss, model, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(3):
        clip = MotionClips.from_list([walk(12 + 8 * number, number)], BODY, 15.0)
        save_motion(tmp_path / "clips" / f"{number}.npz", clip)
    write_bvh(tmp_path / "clips" / "tool.bvh", walk(20, 9), BODY, 15.0)
    rows = coloss("retrieve", "someone runs", "clips", "--model", model, "--count", "3").out.splitlines()
    scores = [float(row.split()[0]) for row in rows]
    assert len(rows) == 3 and scores == sorted(scores, reverse=True)
    assert {row.split()[1] for row in rows} <= {"0", "1", "2", "tool"}
    found = json.loads(coloss("retrieve", "clips/tool.bvh", "--model", model, "--json").out)
    assert {row["found"] for row in found["tool"]} == {"a person walks", "someone runs"}
    (tmp_path / "said.txt").write_text("someone walks proudly\n\na person runs\n")
    outcome = coloss("retrieve", "clips/0.npz", "--texts", "said.txt", "--model", model, "--count", "1")
    assert outcome.out.split(maxsplit=1)[1].strip() in ("someone walks proudly", "a person runs")
    sentences = json.loads(coloss("caption", "clips", "--model", model, "--json").out)
    assert list(sentences) == ["0", "1", "2", "tool"]
    write_bvh(tmp_path / "centimetres.bvh", walk(20, 9), BODY, 15.0, scale=100)
    scaled = coloss("caption", "centimetres.bvh", "--scale", "0.01", "--model", model)
    assert scaled.out.strip() == sentences["tool"]
    alone = coloss("caption", "clips/tool.bvh", "--model", model)
    assert alone.code == 0 and alone.out.strip() == sentences["tool"]


def test_bad_input_is_one_line(coloss, model, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, words in (
        (
            ("generate", "a person walks"),
            "runs/lamp-bandai holds no trained LaMP: train one with coloss run lamp",
        ),
        (("generate", "a person walks", "--gif", "clip.png", "--model", model), "clip.png must end in .gif"),
        (("generate", "a person walks", "--seed", "-1", "--model", model), "seed must be >= 0"),
        (("generate", "a person walks", "--seconds", "99", "--model", model), "seconds must be in (0,"),
        (("retrieve", "someone runs", "--model", model), "clips must be a folder, file or data set"),
        (("retrieve", "clip.npz", "folder", "--model", model), "clips must be left out"),
        (("retrieve", "clip.npz", "--texts", "empty.txt", "--model", model), "holds no sentences"),
        (("retrieve", "clip.npz", "--texts", "none.txt", "--model", model), "none.txt cannot be read"),
        (("retrieve", "clip.npz", "--count", "0", "--model", model), "count must be >= 1"),
        (("caption", "none.npz", "--model", model), "none.npz is not there"),
        (("caption", "none.npz", "--scale", "0", "--model", model), "scale must be > 0"),
    ):
        outcome = coloss(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert words in outcome.err and len(outcome.err.splitlines()) == 1
