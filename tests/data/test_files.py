from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from coloss.data import Splits, load
from coloss.data.image_folder import LazyImages
from coloss.data.tables import encode_targets
from coloss.errors import DataNotFoundError, InputError


def _people(count: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.integers(18, 80, count),
            "height": rng.normal(170, 10, count),
            "city": rng.choice(["Rome", "Oslo", "Lima"], count),
            "member": rng.random(count) < 0.5,
            "target": np.where(rng.random(count) < 0.5, "yes", "no"),
        }
    )


def _load(path: Path | str, **options) -> Splits:
    splits = load(path, **options)
    assert isinstance(splits, Splits)
    return splits


def _written(table: pd.DataFrame, folder: Path, name: str = "people.csv") -> Path:
    table.to_parquet(folder / name) if name.endswith("parquet") else table.to_csv(folder / name, index=False)
    return folder / name


@pytest.mark.parametrize("name", ["people.csv", "people.parquet"])
def test_a_table_of_numbers_and_categories(name: str, tmp_path: Path) -> None:
    table = _people()
    path = _written(table, tmp_path, name)
    for splits in (_load(path), _load(str(path))):
        assert (splits.kind, splits.num_classes, splits.class_names) == ("classification", 2, ("no", "yes"))
        assert splits.feature_names == ("age", "height", "member", "city=Lima", "city=Oslo", "city=Rome")
        assert abs(len(splits.train) - 24) <= 1 and len(splits.validation) == len(splits.test) == 8
        test = splits.test.all()
        assert test.ids is not None and splits.standardize is not None
        rows = table.iloc[test.ids.numpy()]
        assert (test.targets.numpy() == (rows["target"] == "yes").to_numpy()).all()
        assert (test.inputs[:, 5].numpy() == (rows["city"] == "Rome").to_numpy()).all()
        age = table["age"].to_numpy()[splits.train.ids.numpy()]
        assert np.allclose(test.inputs[:, 0].numpy(), (rows["age"] - age.mean()) / age.std(), atol=1e-4)


def test_row_numbers_written_by_pandas_are_left_out(tmp_path: Path) -> None:
    _people().to_csv(tmp_path / "people.csv")
    assert "Unnamed: 0" not in (_load(tmp_path / "people.csv").feature_names or ())


def test_a_split_column_divides_the_rows(tmp_path: Path) -> None:
    table = _people()
    table["split"] = ["train"] * 20 + ["dev"] * 8 + ["test"] * 12
    splits = _load(_written(table, tmp_path))
    assert splits.validation.ids.tolist() == list(range(20, 28)) and splits.test.ids.tolist() == list(
        range(28, 40)
    )
    table["split"] = ["left", "right"] * 20
    assert "split=left" in (_load(_written(table, tmp_path)).feature_names or ())


def test_a_category_unknown_to_the_training_part_has_no_column(tmp_path: Path) -> None:
    table = _people()
    table["split"] = ["train"] * 30 + ["test"] * 10
    table.loc[30:, "city"] = "Bonn"
    splits = _load(_written(table, tmp_path))
    assert "city=Bonn" not in (splits.feature_names or ())
    assert (splits.test.all().inputs[:, 3:] == 0).all()


def test_sentences_become_text_features(tmp_path: Path) -> None:
    count = 60
    table = pd.DataFrame(
        {"comment": [f"good film number {n}" for n in range(count)], "label": [n % 2 for n in range(count)]}
    )
    splits = _load(_written(table, tmp_path))
    assert "text:good film" in (splits.feature_names or ())
    hashed = _load(_written(table, tmp_path), text_features="hashing")
    assert hashed.input_shape == (2000,)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.arange(40) / 7, "regression"),
        (np.arange(40.0), "regression"),
        (np.arange(40.0) % 5, "classification"),
        (np.arange(40) % 5, "classification"),
        (np.arange(40) * 1000, "regression"),
        (np.repeat(np.arange(25), 4), "classification"),
        (np.arange(40) % 2 == 0, "classification"),
        (np.array(["a", "b"] * 20), "classification"),
        (np.array([[0, 1], [1, 1]] * 20), "multilabel"),
        (np.array([[1], [2]] * 20), "classification"),
    ],
)
def test_the_kind_of_a_target(values: np.ndarray, kind: str) -> None:
    assert encode_targets(values, "y")[0] == kind


def test_the_kind_may_be_said(tmp_path: Path) -> None:
    table = _people()
    table["target"] = np.arange(40) % 5
    path = _written(table, tmp_path)
    assert _load(path).class_names == ("0", "1", "2", "3", "4")
    splits = _load(path, kind="regression", standardize=False)
    assert splits.kind == "regression" and splits.num_classes is None
    assert (splits.test.all().targets == splits.test.ids % 5).all()


def _with(column: str, values: object, count: int = 40) -> pd.DataFrame:
    return _people(count).assign(**{column: values})


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            _with("age", [None, 1, None] + [2] * 37),
            {},
            r"column 'age' .* has 2 missing .*\(rows 1, 3\): fill them",
        ),
        (
            _with("height", [np.inf] + [1.0] * 39),
            {},
            r"column 'height' .* has 1 missing or infinite value \(row 1\)",
        ),
        (
            _with("target", ["a", None] * 20),
            {},
            r"column 'target' .* has 20 missing .*\.\.\.\): drop those rows",
        ),
        (_with("target", "same"), {}, r"holds one value only \(same\)"),
        (_people(), {"target": "heigth"}, "has no column 'heigth'; did you mean 'height'"),
        (
            _people(),
            {"target": "zzz"},
            "has no column 'zzz'; its columns are age, height, city, member, target",
        ),
        (_people().rename(columns={"target": "answer"}), {}, "no column 'target' or 'label': say which"),
        (_people(9), {}, "has 9 rows: at least 10"),
        (_people()[["target"]], {}, "nothing to learn from"),
        (_people(), {"kind": "regression"}, "must hold numbers for a regression, got 'yes'"),
        (
            _people(),
            {"kind": "clustering"},
            "kind must be 'classification' or 'regression', got 'clustering'",
        ),
        (_with("target", [f"name{n}" for n in range(40)]), {}, "too few rows .* 40 rows of 40 classes"),
        (
            _with("name", [f"id{n}" for n in range(80)], 80),
            {},
            "column 'name' .* has 80 different texts of one word",
        ),
    ],
)
def test_bad_tables(table: pd.DataFrame, options: dict, message: str, tmp_path: Path) -> None:
    path = _written(table, tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(path, **options)
    assert str(path) in str(caught.value) or "kind" in options
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("when", pd.date_range("2020-01-01", periods=40), "holds times"),
        ("parts", [[1, 2]] * 40, "holds ndarray values: only numbers and text"),
        ("raw", [b"x"] * 40, "holds bytes values"),
    ],
)
def test_bad_parquet_columns(column: str, values: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"column '{column}' .*{message}"):
        load(_written(_with(column, values), tmp_path, "people.parquet"))


def test_numbers_of_every_column_type(tmp_path: Path) -> None:
    table = _people().assign(
        small=pd.array([1, 2] * 20, dtype="Int8"),
        flag=pd.array([True, False] * 20, dtype="boolean"),
        grade=pd.Categorical(["low", "high"] * 20),
        half=np.float16(0.5),
    )
    splits = _load(_written(table, tmp_path, "people.parquet"))
    assert splits.feature_names == (
        *("age", "height", "member", "small", "flag", "half"),
        *("city=Lima", "city=Oslo", "city=Rome", "grade=high", "grade=low"),
    )
    inputs = splits.train.all().inputs
    assert inputs.isfinite().all() and (inputs[:, 5] == 0).all()  # a constant column


RNG = np.random.default_rng(0)
Y = np.arange(30) % 3


def test_arrays_of_images(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x=colour, y=Y, class_names=np.array(["a", "b", "c"]))
    splits = _load(tmp_path / "colour.npz")
    assert splits.input_shape == (3, 6, 5) and splits.class_names == ("a", "b", "c")
    row = int(splits.test.ids[0])
    assert torch.equal(
        splits.test.all().inputs[0], torch.from_numpy(colour[row]).permute(2, 0, 1).float() / 255
    )
    np.savez(tmp_path / "grey.npz", x=colour[..., 0], y=np.array(["u", "v", "w"])[Y])
    splits = _load(tmp_path / "grey.npz")
    assert splits.input_shape == (1, 6, 5) and splits.class_names == ("u", "v", "w")


def test_arrays_with_their_own_test_part(tmp_path: Path) -> None:
    x = RNG.normal(size=(30, 4))
    np.savez(
        tmp_path / "m.npz",
        x_train=x[:20],
        y_train=Y[:20],
        x_test=x[20:],
        y_test=Y[20:],
        feature_names=np.array(list("abcd")),
    )
    splits = _load(tmp_path / "m.npz")
    assert splits.test.ids.tolist() == list(range(20, 30)) and splits.feature_names == tuple("abcd")
    assert len(splits.train) + len(splits.validation) == 20


def test_series_and_multilabel_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=RNG.normal(size=(30, 2, 9)), y=RNG.integers(0, 2, (30, 4)))
    splits = _load(tmp_path / "s.npz")
    assert splits.input_shape == (2, 9) and (splits.kind, splits.num_classes) == ("multilabel", 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": Y}, "must hold x and y, or x_train, .*; it holds a"),
        ({}, "it holds nothing"),
        ({"x": np.zeros((9, 2)), "y": Y}, r"as many rows as each other, got shapes \(9, 2\) and \(30,\)"),
        (
            {"x": np.zeros((30, 3, 8, 8), np.uint8), "y": Y},
            "uint8 images .rows, height, width.* got uint8 of shape",
        ),
        ({"x": np.zeros((30, 8, 8, 3)), "y": Y}, "got float64 of shape"),
        ({"x": np.full((30, 2), np.nan), "y": Y}, "x of .* has 60 missing or infinite values in 30 rows"),
        ({"x": np.array([["a"]] * 30), "y": Y}, "must hold numbers, got <U1"),
        ({"x": np.zeros((30, 2)), "y": np.zeros(30, int)}, r"one value only \(0\)"),
        ({"x": np.zeros((30, 2)), "y": np.where(Y > 0, np.nan, 1.0)}, "y of .* has 20 missing"),
        ({"x": np.zeros((30, 2)), "y": np.stack([Y, Y], 1)}, "0 / 1"),
        ({"x": np.zeros((30, 2)), "y": np.zeros((30, 2, 2))}, "0 / 1|one-dimensional"),
        ({"x": np.zeros((30, 2)), "y": Y, "class_names": np.array(["a", "b"])}, r"numbers in \[0, 2\)"),
        ({"x": np.zeros((30, 2)), "y": Y, "feature_names": np.array(["a"])}, "name each column"),
        ({"x": np.zeros((5, 2)), "y": Y[:5]}, "has 5 rows: at least 10"),
        (
            {"x_train": np.zeros((20, 2)), "y_train": Y[:20], "x_test": np.zeros((9, 3)), "y_test": Y[:9]},
            "of one shape",
        ),
    ],
)
def test_bad_arrays(arrays: dict, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "bad.npz")


def _folder(
    root: Path, mode: str = "RGB", size: tuple[int, int] = (7, 5), parts: tuple[str, ...] = ("",)
) -> Path:
    for part in parts:
        for label, shade in [("cat", 40), ("dog", 200)]:
            (root / part / label).mkdir(parents=True)
            for number in range(6):
                colour = shade + number if mode == "L" else (shade, number, 0)
                Image.new(mode, size, colour).save(root / part / label / f"{number}.png")
    return root


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    splits = _load(root)
    assert splits.input_shape == (3, 5, 7) and splits.class_names == ("cat", "dog")
    test = splits.test.all()
    assert test.ids is not None
    expected = torch.where(test.targets == 0, 40 / 255, 200 / 255)
    assert torch.allclose(test.inputs[:, 0].mean((1, 2)), expected)
    assert torch.allclose(test.inputs[:, 1, 0, 0] * 255, (test.ids % 6).float(), atol=1e-3)


def test_parts_of_a_folder_are_kept(tmp_path: Path) -> None:
    splits = _load(_folder(tmp_path, mode="L", parts=("train", "test")))
    assert splits.input_shape == (1, 5, 7) and len(splits.test) == 12 and len(splits.train) == 10


def test_sizes_that_differ_or_are_large_are_brought_to_one(tmp_path: Path) -> None:
    root = _folder(tmp_path / "a")
    Image.new("RGB", (20, 30)).save(root / "cat" / "other.png")
    splits = _load(root)
    assert splits.input_shape == (3, 64, 64) and "resized to 64 x 64" in splits.description
    large = [Image.new("L", (300, 300))] * 2
    assert LazyImages(large)[np.array([0])].shape == (1, 64, 64)


def test_modes_of_images() -> None:
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (LazyImages([transparent])[np.array([0])] == 255).all()
    mixed = LazyImages([Image.new("L", (4, 4), 9), Image.new("RGB", (4, 4), (1, 2, 3))])
    assert mixed[np.array([0, 1])][:, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3]]
    deep = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    assert (LazyImages([deep])[np.array([0])] == 255).all()


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_named(content: bytes, tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=r"dog/bad\.png cannot be read as an image"):
        load(root)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    root = tmp_path
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
            content = (root / label / f"{number}.png").read_bytes()
            (root / label / f"{number}.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"\.png cannot be read as an image"):
        load(root)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold one folder of images for each class"):
        load(tmp_path)
    root = _folder(tmp_path / "one")
    for path in (root / "dog").iterdir():
        path.rename(root / "cat" / f"dog{path.name}")
    with pytest.raises(InputError, match=r"one value only \(cat\)"):
        load(root)
    with pytest.raises(InputError, match="target names a column of a table"):
        load(root, target="x")


def test_other_paths(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must be a folder of images, or end in \.csv"):
        load(tmp_path / "a.xlsx")
    with pytest.raises(DataNotFoundError, match="there is no file or folder"):
        load(tmp_path / "none.csv")


def test_a_name_of_the_catalog_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert _load("digits", limit=20).num_classes == 10
    assert _load("./digits").num_classes == 2
    assert _load(Path("digits")).num_classes == 2
