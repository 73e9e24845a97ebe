"""From a data set to a model on disk: what it learns, what is saved, and that a stopped run goes on."""

import inspect
from pathlib import Path

import pytest

from coloss.data import load
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.retrieval import small_retrieval_reader, train_retrieval_reader
from coloss.train import Budget, load_model


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "marginal"])
def test_the_saved_model_answers_with_the_metrics_that_were_given(tmp_path: Path, kind: str):
    shares: list[float] = []
    metrics = train_retrieval_reader(
        "wine", tmp_path, kind=kind, budget=Budget(steps=30), progress=shares.append
    )
    splits = load("wine", seed=0)
    model = load_model(small_retrieval_reader(splits, kind), tmp_path / "model.safetensors").eval()
    again = evaluate_classifier(model, splits.test)
    assert again["accuracy"] == metrics["accuracy"] > 0.8
    assert {name: metrics[name] for name in again} == pytest.approx(dict(again), rel=1e-5)
    assert -1 <= metrics["agreement"] <= 1 and shares[-1] > 0.9


def test_a_run_of_the_same_folder_goes_on_where_it_ended(tmp_path: Path):
    whole = train_retrieval_reader("wine", tmp_path / "whole", budget=Budget(steps=12), kind="marginal")
    again = train_retrieval_reader("wine", tmp_path / "whole", budget=Budget(steps=12), kind="marginal")
    for name, value in whole.items():
        assert name == "agreement" or again[name] == value


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    train_retrieval_reader("wine", tmp_path, budget=Budget(steps=1))
    for options in ({"kind": "listwise"}, {"seed": 1}):
        with pytest.raises(InputError, match="holds a run on 'wine' with seed 0.*: choose another folder"):
            train_retrieval_reader("wine", tmp_path, budget=Budget(steps=1), **options)


def table(path: Path, distinct: int, alike: int) -> Path:
    rows = [f"{row},{row % 5},{'ab'[row % 2]}" for row in range(distinct)]
    rows += [f"-1,-1,{'ab'[row % 2]}" for row in range(alike)]
    path.write_text("\n".join(["x,y,target", *rows]) + "\n")
    return path


@pytest.mark.parametrize(("distinct", "alike"), [(24, 0), (20, 180)])
@pytest.mark.parametrize("kind", ["pairwise", "marginal"])
def test_small_and_repetitive_tables_have_fewer_candidates(
    tmp_path: Path, distinct: int, alike: int, kind: str
):
    data = table(tmp_path / "data.csv", distinct, alike)
    metrics = train_retrieval_reader(data, tmp_path / "run", kind=kind, budget=Budget(steps=2))
    assert 0 <= metrics["accuracy"] <= 1


def test_too_few_different_items_are_refused(tmp_path: Path):
    data = table(tmp_path / "data.csv", 4, 96)
    with pytest.raises(
        InputError,
        match=r"at least 5 others to read that are no copies of it, got [0-4]: \d+ of \d+ items are alike",
    ):
        train_retrieval_reader(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_kinds_of_data_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="kind must be .* got 'both'"):
        inspect.unwrap(small_retrieval_reader)(load("iris"), "both")
    with pytest.raises(
        InputError, match="data must be a classification to look answers up in, got a regression set"
    ):
        train_retrieval_reader("diabetes", tmp_path)
