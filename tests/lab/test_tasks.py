"""One task of each kind works end to end; names, files and options are read as they are meant."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from coloss import Budget, Comparison
from coloss.data import DATASETS, RETRIEVAL_VIEWS, load
from coloss.errors import InputError, UnknownNameError
from coloss.lab import find_task, task_from_splits, task_names
from coloss.lab.directions import metric_direction
from coloss.lab.known_tasks import tasks_of
from coloss.lab.tasks import content_hash, default_model


@pytest.mark.parametrize(
    ("name", "kind", "arms", "metric"),
    [
        ("digits", "classification", ["cross-entropy", "trp"], "accuracy"),
        ("iris", "classification", ["cross-entropy", "dhkd"], "accuracy"),
        ("diabetes", "regression", ["mean-squared-error", "trp"], "mse"),
        ("reuters", "multilabel", ["binary-cross-entropy", "trp"], "average_precision"),
        ("cranfield", "retrieval", ["info-nce", "mw-loss"], "mrr"),
        ("banking77-retrieval", "retrieval", ["info-nce", "decoupled-softmax"], "mrr"),
        ("sick-retrieval", "retrieval", ["info-nce"], "mrr"),
        ("digits-halves", "retrieval", ["info-nce", "mw-loss"], "mrr"),
        ("openmoji-pairs", "retrieval", ["clip", "isogclr", "mw-loss"], "mrr"),
        ("fashion-mnist", "classification", ["cross-entropy"], "accuracy"),
        ("ecg5000", "classification", ["cross-entropy", "trp"], "accuracy"),
        ("banking77", "classification", ["cross-entropy"], "accuracy"),
        ("sick", "regression", ["mean-squared-error"], "mse"),
        ("iris-ssl", "self-supervised", ["untrained", "lejepa"], "knn"),
        ("digits-ssl", "self-supervised", ["untrained", "lejepa"], "knn"),
    ],
)
def test_one_of_each_kind(name, kind, arms, metric, needs, tmp_path):
    needs(name.removesuffix("-ssl").removesuffix("-pairs").removesuffix("-retrieval"))
    comparison = Comparison(name, arms, seeds=1, budget=Budget(steps=2), limit=100)
    assert comparison.task.kind == kind and comparison.task.metric == metric
    result = comparison.run(tmp_path)
    assert not result.failures and [trial.arm for trial in result.trials] == arms
    assert all(np.isfinite(trial.metrics[metric]) for trial in result.trials)


def test_a_folder_of_images_with_captions_is_a_task(tmp_path):
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"shade {number} of red")
    result = Comparison(str(tmp_path), ["clip"], seeds=1, budget=Budget(steps=2)).run(tmp_path / "run")
    assert not result.failures
    assert {"mrr", "image_to_text_recall@1", "text_to_image_recall@1"} <= set(result.trials[0].metrics)
    with pytest.raises(InputError, match="pairs images with captions: leave target, kind, label noise"):
        find_task(str(tmp_path), target="label")


def test_images_of_ones_own_train_an_encoder_without_their_labels(tmp_path):
    for number in range(24):
        folder = tmp_path / ("dark" if number % 2 else "light")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(folder / f"{number}.png")
    task = find_task(str(tmp_path), kind="self-supervised")
    assert task.kind == "self-supervised" and task.objective is None
    comparison = Comparison(
        str(tmp_path), ["contrastive-temperature"], seeds=1, budget=Budget(steps=2), kind="self-supervised"
    )
    (trial,) = comparison.run(tmp_path / "run").trials
    assert {"linear_probe", "knn", "uniformity", "tolerance", "rankme"} <= set(trial.metrics)
    with pytest.raises(
        InputError, match="splits must hold class labels, to judge an encoder by, got a regression"
    ):
        find_task("diabetes", kind="self-supervised")


def test_every_supervised_data_set_is_a_task():
    names = set(task_names())
    for name, info in DATASETS.items():
        supervised = info.kind in ("classification", "regression", "multilabel", "retrieval")
        assert (name in names) == (supervised or info.kind in ("recommendation", "language", "motion"))
        assert (f"{name}-next" in names) == (info.kind == "recommendation")
        assert (f"{name}-ssl" in names) == (info.kind in ("classification", "motion"))
        assert (f"{name}-retrieval" in names) == (name in RETRIEVAL_VIEWS)
        assert set(tasks_of(name)) <= names
    assert "digits-halves" in names


def test_a_self_supervised_method_learns_without_labels(tmp_path):
    result = Comparison("digits-ssl", ["untrained", "lejepa"], seeds=1, budget=Budget(steps=10)).run(tmp_path)
    untrained, trained = result.trials
    assert untrained.cost.steps == 0 and trained.cost.steps == 10
    assert {"knn", "linear_probe"} <= set(untrained.metrics) < set(trained.metrics)
    assert {name for name in trained.metrics if name not in untrained.metrics} >= {
        "embedding_rankme",
        "embedding_lidar",
    }


def write_table(path, target):
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"a": generator.normal(size=40), "b": ["x", "y"] * 20, "target": target})
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return path


def test_files_of_ones_own(tmp_path):
    generator = np.random.default_rng(0)
    words = ["no", "yes"] * 20
    (tmp_path / "images").mkdir()
    for number, label in enumerate(words):
        (tmp_path / "images" / label).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(
            tmp_path / "images" / label / f"{number}.png"
        )
    np.savez(tmp_path / "series.npz", x=generator.normal(size=(40, 2, 16)), y=np.arange(40) % 2)
    cases = {
        write_table(tmp_path / "words.csv", words): "classification",
        write_table(tmp_path / "numbers.parquet", generator.normal(size=40)): "regression",
        tmp_path / "series.npz": "classification",
        tmp_path / "images": "classification",
    }
    for path, kind in cases.items():
        task = find_task(str(path))
        result = Comparison(str(path), [task.objective_name], seeds=1, budget=Budget(steps=1)).run(
            tmp_path / f"{path.stem}-out"
        )
        assert task.kind == kind and task.title == f"{kind} on {path.name}" and not result.failures
        assert result.record.task == str(path) and result.record.options["data"] == content_hash(path)


def test_a_hub_address_is_read_through_its_library(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra coloss[hf]")
    path = write_table(tmp_path / "rows.parquet", ["no", "yes"] * 20)
    assert find_task(f"hf:parquet:{path}").kind == "classification"


def test_options_reach_the_data(tmp_path):
    write_table(tmp_path / "table.csv", [0, 1] * 20)
    path = str(tmp_path / "table.csv")
    assert find_task(path, target="b").load(0).class_names == ("x", "y")
    assert find_task(path, kind="regression").kind == "regression"
    assert len(find_task("digits", limit=30).load(2).train) == 30
    assert len(find_task("digits-halves", limit=30).load(2).train) == 30
    assert (
        find_task("sst2", text_features="hashing", limit=20).load(0).feature_names is None
        if _has("sst2")
        else True
    )
    with pytest.raises(InputError, match="digits-halves pairs halves"):
        find_task("digits-halves", kind="classification")


def test_wrong_labels_and_rare_classes_are_drawn_by_the_seed():
    clean, noisy = find_task("digits").load(1), find_task("digits", label_noise=0.4).load(1)
    wrong = clean.train.targets != noisy.train.targets
    assert int(wrong.sum()) == round(0.4 * len(clean.train)) and torch.equal(clean.train.ids, noisy.train.ids)
    assert torch.equal(clean.test.targets, noisy.test.targets)
    assert (clean.validation.targets != noisy.validation.targets).float().mean().item() == pytest.approx(
        0.4, abs=0.01
    )
    again = find_task("digits", label_noise=0.4)
    assert torch.equal(noisy.train.targets, again.load(1).train.targets)
    assert not torch.equal(noisy.train.targets, again.load(2).train.targets)
    pairwise = find_task("digits", label_noise=0.4, noise_kind="pairwise").load(1).train.targets
    assert set(((pairwise - clean.train.targets) % 10).tolist()) == {0, 1}
    rare = find_task("breast-cancer", imbalance=0.05).load(0)
    assert rare.train.targets.bincount().tolist() == [11, 214]
    assert find_task("iris", imbalance=0.1, imbalance_kind="step").load(
        0
    ).train.targets.bincount().tolist() == [30, 30, 3]
    both = find_task("breast-cancer", imbalance=0.05, label_noise=0.2, limit=100)
    assert both.title == (
        "classification on breast-cancer, 20% of the training labels wrong, rarest class at 0.05 of the most frequent"
    )
    assert both.name == "breast-cancer" and len(both.load(0).train) < 100


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"label_noise": 1.5}, r"label noise must be in \[0, 1\], got 1.5"),
        ("digits", {"imbalance": 0.0}, r"imbalance must be in \(0, 1\], got 0.0"),
        ("diabetes", {"label_noise": 0.1}, "for classification, diabetes is a regression set"),
        ("digits-ssl", {"imbalance": 0.1}, "for classification tasks, digits-ssl is a self-supervised one"),
        ("digits-halves", {"label_noise": 0.1}, "for classification tasks, digits-halves is a retrieval one"),
        ("digits", {"noise_kind": "pairwise"}, "noise_kind goes with label_noise, which is not given"),
        ("digits", {"imbalance_kind": "step"}, "imbalance_kind goes with imbalance, which is not given"),
    ],
)
def test_wrong_labels_and_rare_classes_are_for_classification(name, options, message):
    with pytest.raises(InputError, match=message):
        find_task(name, **options)


def _has(name):
    try:
        load(name, limit=10)
    except FileNotFoundError:
        return False
    return True


def test_a_file_that_changes_is_read_again(tmp_path):
    path = write_table(tmp_path / "table.csv", ["no", "yes"] * 20)
    assert find_task(str(path)).load(0).class_names == ("no", "yes")
    before = content_hash(path)
    write_table(path, ["left", "right"] * 20)
    assert find_task(str(path)).load(0).class_names == ("left", "right") and content_hash(path) != before


def test_content_hash_of_a_folder_follows_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.png").write_bytes(b"123")
    before = content_hash(tmp_path)
    (tmp_path / "a" / "two.png").write_bytes(b"123")
    after = content_hash(tmp_path)
    (tmp_path / "a" / "two.png").write_bytes(b"1234")
    assert len({before, after, content_hash(tmp_path)}) == 3
    with pytest.raises(InputError, match="cannot be read"):
        content_hash(tmp_path / "missing")


def test_content_hash_of_a_folder_follows_what_its_tables_say(tmp_path):
    """A file of judgements rewritten at equal length is another one; images count by name and size."""
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\n1\t1\n")
    (tmp_path / "one.PNG").write_bytes(b"123")
    before = content_hash(tmp_path)
    (tmp_path / "one.PNG").write_bytes(b"456")
    assert content_hash(tmp_path) == before
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\n1\t2\n")
    assert content_hash(tmp_path) != before


@pytest.mark.parametrize("name", ["~nobody-of-this-name/rows.csv", "a" * 5000])
def test_what_cannot_be_a_path_is_no_task(name):
    with pytest.raises(UnknownNameError, match="^no "):
        find_task(name)


def test_pairs_of_emoji_point_to_the_task_with_tokens():
    with pytest.raises(InputError, match="ask for openmoji-tokens, and leave kind out"):
        find_task("openmoji-pairs", kind="token-retrieval")


def test_a_name_of_the_catalog_wins_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert find_task("digits").load(0).name == "digits"
    with pytest.raises(InputError, match="got no image"):
        find_task("./digits")


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_models_for_tasks.py").write_text(
        "from torch import nn\ndef build(splits):\n    return nn.Linear(4, splits.num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    for path in ("my_models_for_tasks:build", "my_models_for_tasks.build"):
        task = find_task("iris", model=path)
        assert isinstance(task.model(task.load(0)), nn.Linear)
    result = Comparison(
        "iris", ["cross-entropy"], seeds=1, budget=Budget(steps=1), model="my_models_for_tasks:build"
    ).run(tmp_path / "out")
    assert result.trials[0].cost.parameters == 15


def test_the_default_model_suits_the_shape_of_the_input(needs):
    for name in ("digits", "ecg5000", "wine"):
        splits = load(needs(name), limit=20)
        outputs = default_model(splits)(splits.train.inputs[:5])
        assert outputs.shape == (5, splits.num_classes)


def test_a_teacher_is_larger_than_its_student():
    for name in ("digits", "wine"):
        task = find_task(name)
        count = [
            sum(p.numel() for p in build(task.load(0)).parameters()) for build in (task.model, task.teacher)
        ]
        assert 3 < count[1] / count[0] < 20


def test_default_budgets_have_bounds():
    assert find_task("iris").budget == Budget(steps=300)
    assert find_task("digits").budget == Budget(steps=320)
    large = task_from_splits("large", lambda seed: _rows(40_000))
    assert large.budget == Budget(steps=2000)


def _rows(count):
    splits = load("iris")
    splits.train = type(splits.train)(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64))
    return splits


def test_splits_of_an_unknown_kind_are_refused():
    splits = load("iris")
    splits.kind = "ranking"
    with pytest.raises(
        InputError,
        match="splits must be of kind classification, regression, multilabel, retrieval, got 'ranking'",
    ):
        task_from_splits("mine", lambda seed: splits)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("accuracy", "higher"),
        ("nll", "lower"),
        ("ece", "lower"),
        ("mse", "lower"),
        ("r2", "higher"),
        ("mrr", "higher"),
        ("recall@5", "higher"),
        ("uniformity", "lower"),
        ("validation_loss", "lower"),
    ],
)
def test_metrics_know_their_direction(metric, direction):
    assert metric_direction(metric) == direction


def test_the_default_network_learns_digits():
    task = find_task("digits")
    from coloss import Setting

    setting = Setting.of(task, seed=0)
    run = setting.fit(setting.new_model())
    assert task.test(run.model, setting.splits)["accuracy"] > 0.95
