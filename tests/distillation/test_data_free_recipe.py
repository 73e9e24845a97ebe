"""The whole way from a data set to a small classifier, and that nothing of the task's texts gets past the teacher."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import coloss.distillation.data_free_recipe as recipe
from coloss.data import WordVocabulary
from coloss.distillation import (
    DataFreeLengths,
    TextTask,
    distill_without_data,
    public_texts,
    small_text_classifier,
    text_task,
)
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.metrics import evaluate_classifier
from coloss.train import Budget, load_model

FEW = DataFreeLengths(teacher=4, rewriter=4, student=12, batch_size=16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> TextTask:
    """Four intents of banking77, loaded once; public texts that are few."""
    task = text_task("banking77", classes=4, length=8)
    public = public_texts(task.vocabulary, 6)[:200]
    monkeypatch.setattr(recipe, "text_task", lambda data, seed: task)
    monkeypatch.setattr(recipe, "public_texts", lambda vocabulary: public)
    return task


def test_a_killed_run_ends_as_one_that_was_not_and_the_student_is_used_again(
    small: TextTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill_without_data("banking77", tmp_path / "whole", lengths=FEW)
    assert whole["queries"] == 3 * 16 and 0 <= whole["accuracy"] <= 1
    written = recipe.write_texts

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "write_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        distill_without_data("banking77", tmp_path / "stopped", lengths=FEW)
    monkeypatch.setattr(recipe, "write_texts", written)
    assert distill_without_data("banking77", tmp_path / "stopped", lengths=FEW) == whole
    for name in ("teacher", "student", "rewriter"):
        files = [(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "stopped")]
        assert files[0] == files[1], name
    student = load_model(
        small_text_classifier(len(small.vocabulary), 4, 24, 8), tmp_path / "whole" / "student.safetensors"
    )
    assert evaluate_classifier(student, small.test)["accuracy"] == whole["accuracy"]
    assert student(small.vocabulary.encode(["where is my new card?"])).shape == (1, 4)
    assert list(pd.read_csv(tmp_path / "whole" / "texts.csv")) == ["text", "label", "confidence"]
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["queries"] == 48
    with pytest.raises(InputError, match="with seed 0 and other settings"):
        distill_without_data("banking77", tmp_path / "whole", lengths=FEW, budget=Budget(steps=3))


def test_after_the_teacher_nothing_of_the_training_texts_is_used(small: TextTask, tmp_path: Path) -> None:
    """With the same teacher, a task whose training and validation texts are all zeros gives the same student and rewriter."""
    torch.manual_seed(0)
    teacher = small_text_classifier(len(small.vocabulary), 4, length=8)
    for name in ("with", "without"):
        if name == "without":
            for part in (small.train, small.validation):
                part.inputs.zero_()  # type: ignore[union-attr]
                part.targets.zero_()  # type: ignore[union-attr]
        distill_without_data("banking77", tmp_path / name, lengths=FEW, teacher=teacher)
    for file in ("student.safetensors", "rewriter.safetensors", "texts.csv"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    # A folder belongs to one teacher: what it holds does not get into another.
    other = small_text_classifier(len(small.vocabulary), 4, length=8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InputError, match="holds a run on 'banking77' with seed 0 and other settings"):
        distill_without_data("banking77", tmp_path / "with", lengths=FEW, teacher=other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_public_sentences_are_of_known_words_and_none_is_a_training_text() -> None:
    task = text_task("banking77", classes=4)
    public = public_texts(task.vocabulary)
    assert bool(((public > 2) | (public == 0)).all()) and bool(((public > 0).sum(1) >= 3).all())
    own = {tuple(row) for row in task.train.inputs[:, :10].tolist()}  # type: ignore[index]
    assert not own & {tuple(row) for row in public.tolist()}


def test_word_numbers_do_not_tell_how_frequent_words_are() -> None:
    words = text_task("sst2").vocabulary.words[3:]
    assert list(words) == sorted(words) and "the" in words


def test_unfit_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data must be a classification of texts, got 'iris'"):
        text_task("iris")
    with pytest.raises(InputError, match=r"classes must be in \[2, 77\], got 1"):
        text_task("banking77", classes=1)
    with pytest.raises(InputError, match="budget must be a number of steps"):
        distill_without_data("sst2", tmp_path, budget=Budget(epochs=1))
    with pytest.raises(InputError, match="vocabulary must hold words of public texts"):
        public_texts(WordVocabulary(["xyzzy"]))


def test_the_claim_runs_and_gives_its_numbers() -> None:
    evidence = verify("dfkd-t3", smoke=True, seeds=1)
    assert evidence["method"]["name"] == "rewriter" and evidence["baseline"]["name"] == "random words"
