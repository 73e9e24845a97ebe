"""The table transformer: scikit-learn's contract, tables as they come, and what is stored; and pretraining on a file by one call."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from coloss.errors import InputError
from coloss.jepa import (
    CollapseWarning,
    TJEPATransformer,
    between_sample_std,
    pretrain_tjepa,
    table_pretraining,
    table_transformer,
)
from coloss.jepa.table_pretraining import labelled_columns, labelled_rows, linear_scores
from coloss.train import Budget, Method

TINY: dict[str, Any] = {"dim": 4, "depth": 1, "steps": 2, "batch_size": 16, "random_state": 0}


def tiny(**options: Any) -> TJEPATransformer:
    return TJEPATransformer(**(TINY | options))


def people(count: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "age": rng.integers(18, 80, count).astype(float),
            "city": rng.choice(["Rome", "Oslo", "Bonn"], count).astype(object),
            "income": rng.lognormal(10, 1, count),
            "member": rng.random(count) < 0.5,
        }
    )
    table.loc[::7, "age"] = np.nan
    table.loc[1::6, "city"] = None
    return table


UNEVEN = {
    "check_methods_subset_invariance": "float32 products of batches of other sizes differ in the last digits; see below",
}


@pytest.mark.usefixtures("as_users_call")
@parametrize_with_checks([tiny(steps=1)], expected_failed_checks=lambda estimator: UNEVEN)
def test_it_is_a_scikit_learn_transformer(estimator: Any, check: Any) -> None:
    check(estimator)


def test_rows_are_encoded_one_by_one_and_their_order_does_not_matter() -> None:
    table = people()
    fitted = tiny().fit(table)
    whole = fitted.transform(table)
    assert whole.shape == (40, 4 * 4)
    assert whole.dtype == np.float32
    single = np.concatenate([fitted.transform(table.iloc[[row]]) for row in range(5)])
    np.testing.assert_allclose(single, whole[:5], atol=1e-5)
    np.testing.assert_allclose(fitted.transform(table[::-1]), whole[::-1], atol=1e-5)
    np.testing.assert_array_equal(fitted.transform(table), whole)


def test_the_outputs_are_the_columns_vectors_flat_or_averaged() -> None:
    table = people()
    flat, mean = tiny().fit(table), tiny(output="mean").fit(table)
    vectors = flat.transform(table).reshape(40, 4, 4)
    np.testing.assert_allclose(mean.transform(table), vectors.mean(1), atol=1e-6)
    with torch.no_grad():
        rows = torch.from_numpy(flat.encoding_.transform(table))
        prefixed = flat.encoder_.encode(rows, with_prefix=True)
    assert prefixed.shape == (40, 5, 4)  # one register in front, which is no feature
    np.testing.assert_allclose(vectors, prefixed[:, 1:], atol=1e-6)
    assert flat.get_feature_names_out()[[0, 4, 15]].tolist() == ["age_0", "income_0", "city_3"]
    assert mean.get_feature_names_out().tolist() == ["mean_0", "mean_1", "mean_2", "mean_3"]
    assert flat.set_output(transform="pandas").transform(table).columns[0] == "age_0"


def test_scales_and_categories_are_those_of_fit() -> None:
    table = people()
    fitted = tiny().fit(table)
    assert fitted.encoding_.numeric["age"][0] == pytest.approx(table["age"].mean())
    before = fitted.encoding_
    whole = fitted.transform(table)
    shifted = table.assign(age=table["age"] + 5)
    fitted.transform(shifted)
    assert fitted.encoding_ == before
    np.testing.assert_array_equal(fitted.transform(table), whole)
    assert np.abs(fitted.transform(shifted) - whole).max() > 1e-3


def test_an_unknown_category_is_a_missing_one() -> None:
    table = people()
    fitted = tiny().fit(table)
    strange, none = table.assign(city="Atlantis"), table.assign(city=None)
    np.testing.assert_array_equal(fitted.transform(strange), fitted.transform(none))
    assert np.abs(fitted.transform(none) - fitted.transform(table)).max() > 1e-3


def test_holes_everywhere() -> None:
    table = people()
    fitted = tiny().fit(table)
    empty = pd.DataFrame({name: [None, None] for name in table})
    found = fitted.transform(empty)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    nothing = np.full((20, 3), np.nan)
    assert np.isfinite(tiny().fit(nothing).transform(nothing)).all()


def test_arrays_of_numbers_and_of_objects_are_tables_too() -> None:
    numbers = people()[["age", "income"]].to_numpy()
    found = tiny().fit(numbers).transform(numbers)
    np.testing.assert_allclose(found, tiny().fit_transform(numbers), atol=0)
    mixed = people()[["age", "city", "income"]].to_numpy(dtype=object)
    fitted = tiny().fit(mixed)
    assert fitted.encoding_.columns == ("0", "2", "1")
    table = people()[["age", "city", "income"]]
    np.testing.assert_allclose(fitted.transform(mixed), tiny().fit(table).transform(table), atol=1e-6)


def test_the_seed_decides_and_the_global_state_stays() -> None:
    table = people()
    torch.manual_seed(5)
    first = tiny().fit_transform(table)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    np.testing.assert_array_equal(clone(tiny()).fit_transform(table), first)
    assert np.abs(tiny(random_state=1).fit_transform(table) - first).max() > 1e-3


def test_training_changes_an_untrained_encoder_of_the_same_seed() -> None:
    table = people()
    untrained, trained = tiny(steps=0).fit(table), tiny(steps=20, momentum=0.0).fit(table)
    assert untrained.feature_std_ == untrained.untrained_feature_std_ == trained.untrained_feature_std_
    assert trained.feature_std_ != trained.untrained_feature_std_
    assert np.abs(untrained.transform(table) - trained.transform(table)).max() > 1e-2
    assert not trained.encoder_.training


def test_the_deviation_of_features_is_that_of_rows_from_the_whole_table() -> None:
    """Sorted, the first 1,024 of 3,000 rows lie close together."""
    table = pd.DataFrame({"a": np.linspace(-2, 2, 3000), "b": np.linspace(-2, 2, 3000)})
    ordered, shuffled = (tiny(steps=0).fit(some) for some in (table, table.sample(frac=1, random_state=0)))
    assert ordered.feature_std_ == pytest.approx(shuffled.feature_std_, rel=0.05)
    tokens = torch.from_numpy(ordered.transform(table)).unflatten(1, (2, -1))
    assert ordered.feature_std_ == pytest.approx(between_sample_std(tokens).item(), rel=0.05)


def test_collapse_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_transformer, "COLLAPSED", 100.0)
    with pytest.warns(
        CollapseWarning, match="deviate by .* between rows, .* before training; try registers=1"
    ):
        tiny().fit(people())


def test_it_works_in_a_pipeline_with_words_and_holes() -> None:
    table = people()
    labels = (table["member"] & (table["income"] > 1)).astype(int)
    model = make_pipeline(tiny(steps=5), StandardScaler(), LogisticRegression())
    assert model.fit(table, labels).score(table, labels) > 0.9
    changed = clone(model).set_params(tjepatransformer__output="mean")
    assert changed.fit(table, labels)[0].transform(table).shape == (40, 4)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    table = people()
    fitted = tiny(output="mean", context=(0.2, 0.4), random_state=np.int64(3)).fit(table)
    again = TJEPATransformer.load(fitted.save(tmp_path / "kept"))
    np.testing.assert_array_equal(again.transform(table), fitted.transform(table))
    assert again.get_params() == fitted.get_params()
    assert again.feature_std_ == fitted.feature_std_
    assert again.get_feature_names_out().tolist() == fitted.get_feature_names_out().tolist()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "encoder.safetensors",
        "transformer.json",
    ]
    with pytest.raises(ValueError, match="feature names should match"):
        again.transform(table[["city", "age", "income", "member"]])
    (tmp_path / "kept" / "transformer.json").write_text("{}")
    with pytest.raises(InputError, match="holds no table transformer that can be read"):
        TJEPATransformer.load(tmp_path / "kept")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "max"}, 'output must be "flatten" or "mean"'),
        ({"dim": 5}, "dim must be even and divisible by heads"),
        ({"heads": 3}, "dim must be even and divisible by heads = 3, got 4"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"registers": -1}, "registers must be >= 0"),
        ({"steps": -1}, "steps must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\]"),
        ({"context": (0.0, 0.1)}, "context must be"),
        ({"max_categories": 0}, "max_categories must be >= 1"),
    ],
)
def test_options_out_of_range_are_refused_in_fit(
    options: dict[str, Any], message: str, as_users_call: None
) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**options).fit(people())


def test_tables_that_cannot_be_learnt_from_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 rows and 2 columns, got shape"):
        tiny().fit(people()[["age"]])
    with pytest.raises(InputError, match="at least 2 rows and 2 columns"):
        tiny().fit(people(1))
    with pytest.raises(InputError, match="infinity in row 0"):
        tiny().fit(people().assign(age=np.inf))
    with pytest.raises(InputError, match="random_state must be a number with checkpoint_dir"):
        tiny(random_state=None).pretrain(people(), checkpoint_dir="anywhere")


@pytest.fixture
def census(tmp_path: Path) -> str:
    """A file of one's own, with words, holes, row numbers and a split."""
    table = people(60).assign(target=np.where(np.arange(60) % 3, "no", "yes"))
    table["split"] = np.where(np.arange(60) < 40, "train", "test")
    table.to_csv(tmp_path / "census.csv")
    return str(tmp_path / "census.csv")


def test_a_file_leaves_a_transformer_that_can_be_loaded_and_used(census: str, tmp_path: Path) -> None:
    shares: list[float] = []
    metrics = pretrain_tjepa(census, tmp_path / "out", budget=Budget(steps=3), progress=shares.append)
    kinds = [f"{who}_{model}" for who in ("features", "untrained", "raw") for model in ("linear", "boosting")]
    named = {f"{kind}_{metric}_32" for kind in kinds for metric in ("accuracy", "auc")}
    assert set(metrics) == named | {"feature_std", "untrained_feature_std"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert shares
    again = TJEPATransformer.load(tmp_path / "out")
    assert again.transform(people(3)).shape == (3, 4 * 32)
    assert set(again.feature_names_in_) == set(people())


def test_a_stopped_run_goes_on_to_the_same_end(census: str, tmp_path: Path, monkeypatch) -> None:
    class Killed(Exception):
        pass

    def stop_at_three(self: Method, state: Any) -> None:
        if state.step == 3:
            raise Killed

    monkeypatch.setattr(table_pretraining, "_judge", lambda kept, *rest: {"feature_std": kept.feature_std_})
    fit = table_transformer.fit
    monkeypatch.setattr(
        table_transformer, "fit", lambda *given, **more: fit(*given, checkpoint_every=2, **more)
    )
    whole = pretrain_tjepa(census, tmp_path / "whole", budget=Budget(steps=5))
    with monkeypatch.context() as killing:
        killing.setattr(table_transformer.TabularJEPA, "on_epoch", stop_at_three)
        with pytest.raises(Killed):
            pretrain_tjepa(census, tmp_path / "stopped", budget=Budget(steps=5))
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert pretrain_tjepa(census, tmp_path / "stopped", budget=Budget(steps=5)) == whole
    files = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_numbers_to_predict_are_judged_by_their_explained_variance(tmp_path: Path) -> None:
    metrics = pretrain_tjepa("diabetes", tmp_path, budget=Budget(steps=2))
    assert 0.2 < metrics["raw_linear_r2_100"] < 0.7
    assert {"features_linear_r2_265", "untrained_linear_r2_265", "raw_boosting_r2_265"} <= set(metrics)


def test_words_and_holes_are_kept_and_the_target_is_not_a_feature(census: str) -> None:
    rows = labelled_columns(census)
    assert list(rows.inputs) == ["age", "city", "income", "member"]
    assert rows.inputs["city"].isna().sum() == people(60)["city"].isna().sum()
    assert rows.class_names == ("no", "yes")
    assert rows.parts.tolist() == [0] * 40 + [2] * 20


def test_labelled_rows_are_even_over_classes() -> None:
    targets = np.repeat([0, 1], [90, 10])
    assert np.bincount(targets[labelled_rows(targets, "classification", 20, 0)]).tolist() == [10, 10]
    assert len(labelled_rows(targets, "regression", 20, 0)) == 20
    assert labelled_rows(targets, "classification", 100, 0).tolist() == list(range(100))


@pytest.mark.parametrize("lone", [0, 1, 3])
def test_a_class_of_one_labelled_row_does_not_turn_the_choice_of_a_penalty_off(lone: int) -> None:
    """The heaviest penalty names the largest class for every row."""
    sizes = [30, 10] + [1] * lone
    targets = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(len(sizes))[targets] + 0.1 * np.random.default_rng(0).standard_normal(
        (len(targets), len(sizes))
    )
    heavy = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(rows, targets)
    assert heavy.score(rows, targets) == 30 / len(targets)
    assert linear_scores("classification", rows, targets, rows, targets)["accuracy"] == 1


def test_without_two_classes_to_choose_a_penalty_on_it_is_one() -> None:
    targets = np.array([0, 0, 0, 0, 1])
    rows, others = np.array([[-1.0], [0], [0], [1], [4]]), np.linspace(-1, 4, 101)[:, None]
    found = {
        strength: make_pipeline(StandardScaler(), LogisticRegression(C=strength))
        .fit(rows, targets)
        .predict(others)
        for strength in (1e-3, 1e-2, 1e-1, 1.0)
    }
    assert linear_scores("classification", rows, targets, others, found[1.0]) == {"accuracy": 1, "auc": 1}
    assert all((found[strength] != found[1.0]).any() for strength in (1e-3, 1e-2, 1e-1))


def test_what_cannot_be_judged_or_read_is_refused(census: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="must be a table with one class or number for each row, got image rows"
    ):
        pretrain_tjepa("digits", tmp_path)
    with pytest.raises(InputError, match="one class or number for each row, got the retrieval set"):
        pretrain_tjepa("cranfield", tmp_path)
    with pytest.raises(InputError, match="no file or folder"):
        pretrain_tjepa("irisses", tmp_path)
    people().to_csv(tmp_path / "bare.csv")
    with pytest.raises(InputError, match="must have a column 'target' or 'label'"):
        pretrain_tjepa(str(tmp_path / "bare.csv"), tmp_path)
    people().assign(label=[None, *["a", "b"] * 19, "a"]).to_csv(tmp_path / "holes.csv")
    with pytest.raises(InputError, match="'label' of .* has 1 missing values"):
        pretrain_tjepa(str(tmp_path / "holes.csv"), tmp_path)
