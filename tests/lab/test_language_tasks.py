"""Tasks on running text."""

import math

import pytest
import torch
from torch import nn

from coloss.errors import InputError
from coloss.lab import Comparison, find_task
from coloss.lab.language_tasks import evaluate_next_token
from coloss.train import Budget


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path


def test_a_text_file_is_a_task_whose_targets_are_the_next_characters(text_file):
    task = find_task(str(text_file), limit=12)
    splits = task.load(0)
    assert (len(splits.train), len(splits.characters), task.title) == (
        12,
        28,
        "next-token on own.txt",
    )
    assert torch.equal(splits.train.inputs[:, 1:], splits.train.targets[:, :-1])
    assert task.load(1) is splits  # the text is cut at the same places for every seed


def test_a_comparison_stores_the_size_of_each_compressed_model(text_file, tmp_path):
    comparison = Comparison(str(text_file), ["next-token"], seeds=1, budget=Budget(steps=2), limit=8)
    trial = comparison.run(tmp_path / "out").trials[0]
    assert set(trial.metrics) == {"accuracy", "nll"} and 0 < trial.metrics["nll"] < 2 * math.log(28)
    assert trial.cost.stored_bytes is not None
    assert 4 * trial.cost.parameters < trial.cost.stored_bytes < 4 * trial.cost.parameters + 10_000


def test_what_a_text_has_not_is_refused(text_file, tmp_path):
    with pytest.raises(ValueError, match="is a running text: leave target"):
        find_task("tiny-shakespeare", label_noise=0.2)
    short = tmp_path / "short.txt"
    short.write_text("to be or not to be")
    with pytest.raises(ValueError, match="must have more than 64 characters in each part.*got 16, 1, 1"):
        find_task(str(short)).load(0)
    edge = tmp_path / "edge.txt"
    edge.write_text("ab" * 645)
    with pytest.raises(ValueError, match="in each part.*got 1162, 64, 64"):
        find_task(str(edge)).load(0)
    edge.write_text("ab" * 646)
    assert len(find_task(str(edge)).load(0).test) == 1
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"limit must be >= 1, got {limit}"):
            find_task(str(text_file), limit=limit).load(0)


def test_evaluation_weighs_every_token_alike_whatever_the_batches():
    table = nn.Embedding(5, 5)
    inputs, targets = torch.randint(5, (7, 3)), torch.randint(5, (7, 3))
    whole, cut = (evaluate_next_token(table, (inputs, targets), size) for size in (7, 2))
    expected = nn.functional.cross_entropy(table(inputs).flatten(0, 1), targets.flatten()).item()
    assert whole["nll"] == pytest.approx(expected, rel=1e-5) == pytest.approx(cut["nll"], rel=1e-5)
    assert whole["accuracy"] == cut["accuracy"] == (table(inputs).argmax(-1) == targets).float().mean()
