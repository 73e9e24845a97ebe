"""The recipe of LaMP on a few made-up clips, the trained model as people use it, and the files it reads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_lamp import BODY, TINY, stored_lamp, walk
from torch import nn

from coloss.data import Batch, MotionClips, WordVocabulary, save_motion
from coloss.data.skeleton import SKELETONS
from coloss.errors import InputError
from coloss.motion import lamp_stages
from coloss.motion.bvh import write_bvh
from coloss.motion.clip_files import at_rate, read_clips
from coloss.motion.generic_text import GenericTextEncoder
from coloss.motion.lamp_evaluation import _turn_metrics
from coloss.motion.lamp_methods import DrawnCaption, GenericCondition, TurnTerm
from coloss.motion.lamp_model import load_lamp, skeleton_of, skeleton_record
from coloss.motion.lamp_recipe import train_lamp
from coloss.motion.lamp_stages import STAGES, LampTraining, Stage
from coloss.motion.motion_representation import motion_features
from coloss.motion.motion_tokenizer import MotionReconstruction
from coloss.train import Budget
from coloss.train.state import State

LONG = " on and on" * 15  # more words than the model takes


def made_up_folder(folder: Path) -> Path:
    for name in ("new_joint_vecs", "texts"):
        (folder / name).mkdir(parents=True)
    lists = {"train": [], "val": [], "test": []}
    for number in range(14):
        features = motion_features(torch.from_numpy(walk(14 + number, number)), BODY, fps=15)
        np.save(folder / "new_joint_vecs" / f"{number:03}.npy", features.numpy())
        how = "slowly" if number % 2 else "quickly"
        (folder / "texts" / f"{number:03}.txt").write_text(
            f"a person walks {how}{LONG * (number in (0, 9))}#a/DET#0.0#0.0\nsomeone goes {how}#x/X#0.0#0.0\n"
        )
        lists["train" if number < 8 else "val" if number < 9 else "test"].append(f"{number:03}")
    for name, members in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(members))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """Networks and stages so small that a run takes a second."""
    monkeypatch.setattr("coloss.motion.lamp_recipe.LAMP_SIZES", {"small": TINY})
    stages = {name: Stage(2, 4, 1e-3) for name in lamp_stages.STAGES["small"]}
    for module in ("lamp_recipe", "lamp_stages"):
        monkeypatch.setattr(f"coloss.motion.{module}.STAGES", {"small": stages})
    monkeypatch.setattr("coloss.motion.lamp_recipe.load_text_motion", load_text_motion_of_body)


def load_text_motion_of_body(source, **given):
    from coloss.motion.text_motion_data import load_text_motion

    return load_text_motion(source, fps=15, min_frames=8, skeleton=BODY, limit=given["limit"])


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("coloss.train.loop.REPORT_SECONDS", -1.0)
    data = made_up_folder(tmp_path / "set")
    shares = []
    metrics = train_lamp(data, tmp_path / "whole", progress=shares.append)
    assert shares == sorted(shares) and shares[-1] <= 1

    def stop(share):
        if share > 0.5:  # in the generator, its method's own layers half trained
            raise Killed

    with pytest.raises(Killed):
        train_lamp(data, tmp_path / "parts", compare=False, progress=stop)
    monkeypatch.setattr("coloss.motion.lamp_recipe.evaluate_lamp", lambda *given, **options: {})
    train_lamp(data, tmp_path / "parts", compare=False)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    for name in (
        *("fid", "r_precision@3", "multimodal_distance", "diversity", "real_r_precision@1", "multimodality"),
        *("motion_to_text_r@1", "motion_to_text_medr", "text_to_motion_r@5", "text_to_motion_medr"),
        *("bleu@1", "rouge_l", "caption_right", "caption_score_generated", "tokenizer_joint_error"),
        *("generated_turn_right", "generated_turn_wrong"),
        *("generic_text_fid", "bidirectional_fid", "attention_rank", "bidirectional_attention_rank"),
    ):
        assert name in metrics
    with pytest.raises(InputError, match="and other settings: choose another folder"):
        train_lamp(data, tmp_path / "whole", compare=False)


def test_sizes_and_data_are_checked(tmp_path, tiny):
    data = made_up_folder(tmp_path / "set")
    (data / "test.txt").write_text("009")
    with pytest.raises(InputError, match="at least two test clips, got 1"):
        train_lamp(data, tmp_path / "run")


def test_the_turn_alone_is_scored_where_a_clip_still_runs():
    features, decoded = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
    features[0, :, 0] = torch.tensor([3.0, 0.5, 0.0, 99.0])
    features[0, :, 1] = 50.0
    valid = torch.tensor([[True, True, True, False]])
    outputs = MotionReconstruction(decoded, torch.zeros(1, 1), torch.tensor(0.0), torch.tensor(1.0), valid)
    state = State(nn.Identity())
    state.batch, state.outputs = Batch((features, torch.tensor([3]))), outputs
    # Smooth L1: 3 - 1/2, 1/2 of 0.5 squared, and 0; the last frame is filling.
    assert TurnTerm(1.0).terms(state)["turn"].item() == pytest.approx((2.5 + 0.125) / 3)
    with pytest.raises(ValueError, match="weight must be >= 0"):
        TurnTerm(-1.0)


def test_every_sentence_of_a_clip_is_drawn_and_no_filling():
    words = torch.arange(2 * 3 * 2).view(2, 3, 2)
    batch = Batch(torch.zeros(2, 1), extras={"words": words, "caption_counts": torch.tensor([3, 1])})
    state = State(nn.Identity(), local_generator=torch.Generator().manual_seed(0))
    draw, seen = DrawnCaption(lambda batch, words: replace(batch, targets=words)), set()
    for _ in range(40):
        state.batch = batch
        draw.on_batch(state)
        seen |= {(clip, tuple(drawn)) for clip, drawn in enumerate(state.batch.targets.tolist())}
    assert seen == {(0, (0, 1)), (0, (2, 3)), (0, (4, 5)), (1, (6, 7))}


def test_frozen_text_encoder_of_the_rival_gets_no_gradient():
    condition = GenericCondition(GenericTextEncoder(9, dim=8, depth=1, heads=2), 4).train()
    condition(torch.tensor([[3, 4, 0]])).sum().backward()
    assert not condition.encoder.training
    assert all(parameter.grad is None for parameter in condition.encoder.parameters())
    assert condition.output.weight.grad.abs().sum() > 0


def test_a_budget_of_time_is_shared_by_time_and_one_of_steps_by_steps():
    def shares(budget):
        training = object.__new__(LampTraining)
        training.stages, training.budget = STAGES["small"], budget
        return {name: training._budget(name) for name in STAGES["small"]}

    seconds = {name: part.seconds for name, part in shares(Budget(seconds=1000)).items()}
    assert sum(seconds.values()) == pytest.approx(950)  # the rest is for the evaluation
    dearer = STAGES["small"]["pretraining"].minutes / STAGES["small"]["length"].minutes
    assert seconds["pretraining"] == pytest.approx(dearer * seconds["length"]) and dearer > 5
    whole = Budget(steps=sum(stage.steps for stage in STAGES["small"].values()))
    assert {name: part.steps for name, part in shares(whole).items()} == {
        name: stage.steps for name, stage in STAGES["small"].items()
    }


def test_generated_turns_are_counted_to_the_side_of_the_real_ones(as_users_call):
    def turned(*degrees):  # half the turn, and to the left where it is negative
        return [torch.full((4, 5), -math.radians(each) / 8) for each in degrees]

    lamp = SimpleNamespace(
        tokenizer=SimpleNamespace(frames_per_token=4),
        decode=lambda codes: torch.stack(turned(80, 80, -60, 10, -50)),
    )
    test = SimpleNamespace(features=turned(90, -90, -90, 0, 20))
    found = _turn_metrics(lamp, test, torch.zeros(5, 1))
    assert found == {"generated_turn_right": pytest.approx(2 / 3), "generated_turn_wrong": 0.5}


def test_clips_in_another_unit_are_refused(tmp_path):
    lamp = load_lamp(stored_lamp(tmp_path / "model"))
    lamp.normalizer.mean[:] = motion_features(torch.from_numpy(walk(20, 0)), BODY, fps=15).mean(0)
    clips = MotionClips.from_list([walk(20, 1)], BODY, 15.0, names=["mine"])
    assert len(lamp.embed_clips(clips)) == 1
    lost = clips.joints.copy()
    lost[3, 2] = np.nan
    with pytest.raises(InputError, match="mine: joints must be finite.* frame 3, joint 2"):
        lamp.embed_clips(replace(clips, joints=lost))
    for scale, size in ((100, "101"), (0.0254, "0.0256")):
        with pytest.raises(InputError, match=f"body of 'mine' is {size}.* times as large"):
            lamp.embed_clips(replace(clips, joints=clips.joints * np.float32(scale)))


def test_more_clips_than_the_networks_get_at_once(tmp_path, monkeypatch):
    lamp = load_lamp(stored_lamp(tmp_path / "model"))
    clips = MotionClips.from_list([walk(9 + number, number) for number in range(5)], BODY, 15.0)
    whole, said = lamp.embed_clips(clips), lamp.caption(clips, beams=2)
    monkeypatch.setattr("coloss.motion.lamp_model._AT_ONCE", 2)
    torch.testing.assert_close(lamp.embed_clips(clips), whole, atol=1e-6, rtol=0)
    assert lamp.caption(clips, beams=2) == said


def test_generated_motion_follows_seed_seconds_and_sentence(tmp_path):
    lamp = load_lamp(stored_lamp(tmp_path / "model"))
    clips = lamp.generate(["a person walks", "someone runs proudly"], seconds=0.8, seed=3)
    assert len(clips) == 2 and clips.names == ("a person walks", "someone runs proudly")
    assert clips.length.tolist() == [12, 12] and clips.fps == 15 and clips.skeleton == BODY
    again = lamp.generate(["a person walks", "someone runs proudly"], seconds=0.8, seed=3)
    np.testing.assert_array_equal(clips.joints, again.joints)
    drawn = lamp.generate("a person walks", seed=4)
    assert drawn.length[0] % 4 == 0 and 4 <= drawn.length[0] <= 16
    np.testing.assert_allclose(clips.clip(0)[0, 0, [0, 2]], 0, atol=1e-6)


def test_words_that_were_never_seen_are_named(tmp_path):
    lamp = load_lamp(stored_lamp(tmp_path / "model"))
    with pytest.raises(InputError, match="never seen 'dragon', 'flies'"):
        lamp.generate("a dragon flies")
    with pytest.raises(InputError, match="never seen 'walk'; did you mean 'walks'"):
        lamp.generate("a person walk")
    assert len(lamp.generate("a dragon walks", allow_unknown=True, seconds=0.5)) == 1
    for text in ("", "...", "a a a a a a a", "a person walks " * 30):
        with pytest.raises(InputError, match="1 to 6 words.{0,80}$"):
            lamp.generate(text)
    for seconds in (0.0, 9.0):
        with pytest.raises(InputError, match="seconds must be in"):
            lamp.generate("a person walks", seconds=seconds)


def test_clips_and_sentences_find_each_other(tmp_path):
    lamp = load_lamp(stored_lamp(tmp_path / "model"))
    clips = MotionClips.from_list([walk(12, 0), walk(30, 1)], BODY, 15.0, names=["short", "long"])
    scores = lamp.embed_clips(clips) @ lamp.embed_texts(["a person walks"])[0]
    found = lamp.retrieve_clips("a person walks", clips, count=1)
    assert found == [(clips.names[int(scores.argmax())], pytest.approx(float(scores.max())))]
    lamp.sentences = (*lamp.sentences[:1], "someone runs" + LONG)  # as a training sentence may be
    texts = lamp.retrieve_texts(clips)
    assert [len(rows) for rows in texts] == [2, 2]
    assert all(first[1] >= second[1] for first, second in texts)
    # What a clip is found by does not depend on its neighbours, its place or where it faces.
    alone = lamp.embed_clips(clips.select([0]))
    torch.testing.assert_close(alone, lamp.embed_clips(clips)[:1], atol=1e-5, rtol=0)
    moved = replace(clips, joints=clips.joints * np.float32([-1, 1, -1]) + np.float32([3, 0, -5]))
    torch.testing.assert_close(lamp.embed_clips(moved), lamp.embed_clips(clips), atol=1e-4, rtol=0)
    sentences = lamp.caption(clips)
    assert len(sentences) == 2 and all(isinstance(sentence, str) for sentence in sentences)
    with pytest.raises(InputError, match="skeleton of 7 joints, got one of 21"):
        lamp.embed_clips(MotionClips.from_list([np.zeros((30, 21, 3))], SKELETONS["bandai"], 15.0))
    with pytest.raises(InputError, match="'short' lasts 0.27"):
        lamp.caption(MotionClips.from_list([walk(4, 0)], BODY, 15.0, names=["short"]))


def test_a_stored_model_comes_back_whole(tmp_path):
    folder = stored_lamp(tmp_path / "model")
    one, other = load_lamp(folder), load_lamp(folder)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert (
        not one.training
        and one.vocabulary.words
        == WordVocabulary(["a", "person", "someone", "walks", "runs", "proudly"]).words
    )
    assert skeleton_of(json.loads(json.dumps(skeleton_record(SKELETONS["bandai"])))) == SKELETONS["bandai"]
    with pytest.raises(InputError, match="holds no trained LaMP: train one with coloss run lamp"):
        load_lamp(tmp_path / "nowhere")
    (folder / "run.json").write_text('{"motion": {}}')
    with pytest.raises(InputError, match="no description of a LaMP"):
        load_lamp(folder)


def test_clips_of_files_folders_and_other_rates(tmp_path):
    slow, quick = walk(16, 0), walk(31, 1, fps=30)
    save_motion(tmp_path / "a.npz", MotionClips.from_list([slow, slow[:9]], BODY, 15.0, names=["x", "y"]))
    write_bvh(tmp_path / "b.bvh", quick, BODY, 30.0)
    (tmp_path / "notes.txt").write_text("no clip")
    clips = read_clips(tmp_path, BODY, fps=15)
    assert clips.names == ("a:x", "a:y", "b") and clips.length.tolist() == [16, 9, 16]
    np.testing.assert_array_equal(clips.clip(0), slow)
    bones = [np.linalg.norm(quick[:, joint] - quick[:, parent], axis=-1) for joint, parent in BODY.bones()]
    assert abs(clips.clip(2)[:, 0] - quick[::2, 0]).max() < 1e-4 and len(bones) == 6
    assert read_clips(tmp_path / "b.bvh", BODY, fps=30).names == ("b",)
    large = read_clips(tmp_path / "a.npz", BODY, fps=15, scale=100.0).clip(1)
    np.testing.assert_allclose(large, 100 * slow[:9], rtol=1e-5)
    for path, words in (
        (tmp_path / "none.npz", "is not there"),
        (tmp_path / "notes.txt", "must end in .npz or .bvh"),
    ):
        with pytest.raises(InputError, match=words):
            read_clips(path, BODY, fps=15)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no clips"):
        read_clips(tmp_path / "empty", BODY, fps=15)
    with pytest.raises(InputError, match="a.npz: clips must be of the model's skeleton with 21 joints"):
        read_clips(tmp_path / "a.npz", SKELETONS["bandai"], fps=15)
    assert len(at_rate(slow, 15, 20)) == 21 and len(at_rate(slow[:1], 15, 20)) == 1
