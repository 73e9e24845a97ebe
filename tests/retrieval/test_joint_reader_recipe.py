"""From a data set to a model on disk: what it learns, what is saved, and that a stopped run goes on."""

from pathlib import Path

import pytest

from coloss.data import load
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.retrieval import small_retrieval_reader, train_retrieval_reader
from coloss.train import Budget, load_model


def test_the_saved_model_answers_with_the_metrics_that_were_given(tmp_path: Path):
    shares: list[float] = []
    metrics = train_retrieval_reader("wine", tmp_path, budget=Budget(steps=30), progress=shares.append)
    splits = load("wine", seed=0)
    model = load_model(small_retrieval_reader(splits), tmp_path / "model.safetensors").eval()
    again = evaluate_classifier(model, splits.test)
    assert again["accuracy"] == metrics["accuracy"] > 0.8
    assert -1 <= metrics["agreement"] <= 1 and shares[-1] > 0.9


def test_a_run_of_the_same_folder_goes_on_where_it_ended(tmp_path: Path):
    whole = train_retrieval_reader("wine", tmp_path / "whole", budget=Budget(steps=12), kind="marginal")
    again = train_retrieval_reader("wine", tmp_path / "whole", budget=Budget(steps=12), kind="marginal")
    for name, value in whole.items():
        assert name == "agreement" or again[name] == value


def test_other_kinds_of_data_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match="data must be a classification to look answers up in, got a regression set"
    ):
        train_retrieval_reader("diabetes", tmp_path)
