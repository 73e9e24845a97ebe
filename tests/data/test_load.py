import numpy as np
import pytest
import torch

from coloss.data import DATASETS, SUPERVISED_KINDS, IndexedDataset, RetrievalSplits, Splits, load, load_raw
from coloss.errors import InputError, UnknownNameError

SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (1, 8, 8),
    "breast-cancer": (30,),
    "wine": (13,),
    "iris": (4,),
    "diabetes": (10,),
    "cifar10": (3, 32, 32),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "omniglot": (1, 28, 28),
    "openmoji": (3, 64, 64),
    "spoken-digits": (1, 40, 63),
    "ecg5000": (1, 140),
    "gun-point": (1, 150),
    "arrow-head": (1, 251),
    "osu-leaf": (1, 427),
    "italy-power-demand": (1, 24),
    "basic-motions": (6, 100),
    "japanese-vowels": (12, 29),
    "sonar": (60,),
    "ionosphere": (34,),
    "breast-cancer-wisconsin": (9,),
    "glass": (9,),
    "wine-uci": (13,),
    "wine-quality": (12,),
    "abalone": (10,),
}
LIMIT = 160
SUPERVISED = sorted(
    name for name, info in DATASETS.items() if info.kind in SUPERVISED_KINDS and info.kind != "retrieval"
)


def _parts(splits: Splits) -> list[IndexedDataset]:
    return [splits.train, splits.validation, splits.test]


def _splits(name: str, **options) -> Splits:
    splits = load(name, **options)
    assert isinstance(splits, Splits)
    return splits


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_supervised_set_comes_ready_for_a_model(name: str, needs) -> None:
    info = DATASETS[needs(name)]
    splits = _splits(name, limit=LIMIT)
    assert splits.name == name and splits.kind == info.kind
    if name in SHAPES:
        assert splits.input_shape == SHAPES[name]
    assert splits.num_classes == (info.classes if isinstance(info.classes, int) else None)
    if splits.num_classes is not None:
        assert splits.class_names is not None and len(splits.class_names) == splits.num_classes
    ids = torch.cat([part.ids for part in _parts(splits)])
    assert ids.unique().numel() == ids.numel()
    for part in _parts(splits):
        inputs, targets = part.inputs, part.targets
        assert isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)
        assert 0 < len(part) <= LIMIT
        assert (
            inputs.dtype == torch.float32
            and inputs.shape[1:] == splits.input_shape
            and inputs.is_contiguous()
        )
        assert inputs.isfinite().all()
        if len(splits.input_shape) == 3 and name != "spoken-digits":
            assert inputs.min() >= 0 and inputs.max() <= 1
        if splits.kind == "classification":
            assert targets.dtype == torch.int64 and targets.ndim == 1
            assert targets.min() >= 0 and targets.max() < splits.num_classes
        else:
            assert targets.dtype == torch.float32 and targets.isfinite().all()
            assert targets.ndim == (2 if splits.kind == "multilabel" else 1)
    if splits.feature_names is not None:
        assert len(splits.feature_names) == splits.input_shape[0]


@pytest.mark.parametrize("name", ["diabetes", "wine", "ecg5000", "basic-motions", "abalone", "spoken-digits"])
def test_numbers_are_standardised_by_the_training_part_alone(name: str, needs) -> None:
    splits = _splits(needs(name), limit=LIMIT)
    raw = _splits(name, limit=LIMIT, standardize=False)
    assert raw.standardize is None and splits.standardize is not None
    inputs = splits.train.all().inputs
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    assert torch.allclose(inputs.mean(axes), torch.zeros(()), atol=1e-4)
    spread = inputs.std(axes, correction=0)
    assert torch.allclose(spread[spread > 0], torch.ones(()), atol=1e-3)
    for part, raw_part in zip(_parts(splits), _parts(raw), strict=True):
        assert torch.allclose(splits.standardize.apply(raw_part.all().inputs), part.all().inputs, atol=1e-4)
    if splits.kind == "regression":
        restored = splits.standardize.restore_targets(splits.test.all().targets)
        assert torch.allclose(restored, raw.test.all().targets, rtol=1e-4)
        assert abs(float(splits.train.all().targets.mean())) < 1e-4


def test_official_parts_are_kept(needs) -> None:
    raw = load_raw(needs("ecg5000"))
    splits = _splits("ecg5000")
    assert splits.test.ids.tolist() == np.flatnonzero(raw["split"] == 2).tolist()
    assert torch.equal(
        splits.test.all().targets, torch.from_numpy(raw["y"][raw["split"] == 2].astype(np.int64))
    )
    table = load_raw(needs("clinc150"))["table"]
    splits = _splits("clinc150", limit=2000, text_features="hashing")
    assert set(table["split"].to_numpy()[splits.validation.ids.numpy()]) == {"val"}
    assert set(table["split"].to_numpy()[splits.train.ids.numpy()]) == {"train"}


def test_ids_point_to_the_stored_rows(needs) -> None:
    raw = load_raw(needs("omniglot"))
    splits = _splits("omniglot", limit=50, seed=4)
    stored = torch.from_numpy(raw["x"][splits.test.ids.numpy()]).float().div(255).unsqueeze(1)
    assert torch.equal(splits.test.all().inputs, stored)


def test_the_seed_decides_which_rows_are_held_out() -> None:
    drawn = [set(_splits("iris", seed=seed).test.ids.tolist()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_colours_are_channels_first(needs) -> None:
    raw = load_raw(needs("cifar10"))
    splits = _splits("cifar10", limit=10)
    row = int(splits.test.ids[0]) - len(raw["x_train"])
    expected = torch.from_numpy(raw["x_test"][row]).permute(2, 0, 1).float() / 255
    assert torch.equal(splits.test.all().inputs[0], expected)


@pytest.mark.parametrize(
    ("name", "target", "kind", "classes"),
    [
        ("openmoji", "subgroup", "classification", 111),
        ("omniglot", "alphabet", "classification", 8),
        ("spoken-digits", "speaker", "classification", 6),
        ("sick", "entailment", "classification", 3),
        ("sick", "score", "regression", None),
    ],
)
def test_sets_with_a_choice_of_target(name: str, target: str, kind: str, classes: int | None, needs) -> None:
    splits = _splits(needs(name), target=target, limit=40)
    assert (splits.kind, splits.num_classes) == (kind, classes)


def test_adult_categories(needs) -> None:
    splits = _splits(needs("adult"), limit=2000)
    assert splits.feature_names is not None
    names, inputs = list(splits.feature_names), splits.train.all().inputs
    assert names[:6] == ["age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
    assert "workclass=missing" in names
    occupation = inputs[:, [number for number, name in enumerate(names) if name.startswith("occupation=")]]
    assert ((occupation == 0) | (occupation == 1)).all() and (occupation.sum(1) == 1).all()
    raw = load_raw("adult")["table"]
    missing = torch.from_numpy(raw["workclass"].isna().to_numpy()[splits.train.ids.numpy()])
    assert torch.equal(inputs[:, names.index("workclass=missing")] == 1, missing)
    assert splits.class_names == ("<=50K", ">50K")


def test_a_missing_number_becomes_the_training_mean(needs) -> None:
    raw = load_raw(needs("breast-cancer-wisconsin"))["x"]
    splits = _splits("breast-cancer-wisconsin")
    missing = torch.from_numpy(np.isnan(raw[splits.train.ids.numpy()]))
    assert missing.any() and (splits.train.all().inputs[missing] == 0).all()


def test_the_end_of_short_series_is_their_mean(needs) -> None:
    raw = load_raw(needs("japanese-vowels"))["test_x"]
    splits = _splits("japanese-vowels")
    missing = torch.from_numpy(np.isnan(raw))
    assert (splits.test.all().inputs[missing] == 0).all()


def test_vocabulary_comes_from_the_training_part_alone(needs) -> None:
    splits = _splits(needs("sst2"), limit=60)
    table = load_raw("sst2")["table"]
    assert splits.feature_names is not None
    train_text = " ".join(table["text"].to_numpy()[splits.train.ids.numpy()]).lower()
    assert all(name.split()[0] in train_text for name in splits.feature_names)
    assert torch.allclose(splits.train.all().inputs.norm(dim=1), torch.ones(()), atol=1e-5)


def test_sentence_pairs_are_symmetric(needs) -> None:
    splits = _splits(needs("sick"), limit=100)
    assert splits.feature_names is not None and splits.feature_names[0].startswith("|a - b| ")
    inputs = splits.train.all().inputs
    half = inputs.shape[1] // 2
    assert (inputs >= 0).all()
    # |a - b|^2 + 2 a b = a^2 + b^2, and both rows have unit length.
    total = inputs[:, :half].square().sum(1) + 2 * inputs[:, half:].sum(1)
    assert torch.allclose(total, torch.full_like(total, 2.0), atol=1e-4)


def test_reuters_topics(needs) -> None:
    splits = _splits(needs("reuters"), limit=300, text_features="hashing")
    assert splits.num_classes == 90 and splits.class_names is not None and "earn" in splits.class_names
    targets = splits.train.all().targets
    assert (
        ((targets == 0) | (targets == 1)).all() and (targets.sum(1) >= 1).all() and targets.sum(1).max() > 1
    )


def test_spoken_digits_are_told_apart_by_their_spectrograms(needs) -> None:
    from sklearn.linear_model import RidgeClassifier

    splits = _splits(needs("spoken-digits"), limit=300)
    train, test = splits.train.all(), splits.test.all()
    probe = RidgeClassifier(alpha=1000.0).fit(train.inputs.flatten(1).numpy(), train.targets.numpy())
    assert probe.score(test.inputs.flatten(1).numpy(), test.targets.numpy()) > 0.5


def test_retrieval_collection(needs) -> None:
    splits = load(needs("cranfield"), limit=20, text_features="hashing")
    assert isinstance(splits, RetrievalSplits) and splits.kind == "retrieval"
    assert splits.documents.shape == (1400, 2000) and splits.test_queries.shape == (20, 2000)
    assert splits.test_relevance.shape == (20, 1400) and splits.test_relevance.any(dim=1).all()
    queries, documents = splits.train.inputs
    batch = splits.train.all()
    assert torch.equal(queries, splits.train_queries[batch.extras["query"]])
    assert torch.equal(documents, splits.documents[batch.extras["document"]])
    assert splits.train_relevance[batch.extras["query"], batch.extras["document"]].all()
    assert len(splits.train) == splits.train_relevance.sum()
    assert splits.input_shape == (2000,)


def test_tfidf_finds_relevant_documents(needs) -> None:
    splits = load(needs("cranfield"))
    assert isinstance(splits, RetrievalSplits)
    best = (splits.test_queries @ splits.documents.T).topk(10).indices
    found = splits.test_relevance.gather(1, best).any(dim=1).float().mean()
    assert found > 0.6  # chance is below 0.06


def test_a_limit_caps_every_part() -> None:
    splits = _splits("digits", limit=30)
    assert [len(part) for part in _parts(splits)] == [30, 30, 30]
    assert torch.bincount(splits.train.all().targets).tolist() == [3] * 10


@pytest.mark.parametrize(
    "name", sorted(name for name, info in DATASETS.items() if info.kind not in SUPERVISED_KINDS)
)
def test_other_sets_point_to_their_raw_form(name: str) -> None:
    with pytest.raises(InputError, match=rf"load_raw\('{name}'\)"):
        load(name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_path": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"name_or_path": "./no.csv"}, FileNotFoundError, "there is no file or folder no.csv"),
        ({"name_or_path": "iris", "target": "x"}, InputError, "has one target: leave target out"),
        (
            {"name_or_path": "sick", "target": "scores"},
            InputError,
            "score or entailment.*did you mean 'score'",
        ),
        ({"name_or_path": "cranfield", "target": "x"}, InputError, "no target column"),
        (
            {"name_or_path": "iris", "kind": "regression"},
            InputError,
            "is a classification set: leave kind out",
        ),
        ({"name_or_path": "iris", "limit": 0}, InputError, "limit must be >= 1, got 0"),
        ({"name_or_path": "iris", "seed": -1}, InputError, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(**arguments)
