import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from coloss.data import Splits, load
from coloss.errors import DataNotFoundError, InputError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra coloss[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def _table(count: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"age": rng.integers(18, 80, count), "target": np.arange(count) % 2})


def test_a_local_parquet_file_reads_as_it_does_directly(hub, tmp_path: Path) -> None:
    path = tmp_path / "people.parquet"
    _table().to_parquet(path)
    through, direct = load(f"hf:parquet:{path}"), load(path)
    assert isinstance(through, Splits) and isinstance(direct, Splits)
    assert (through.test.all().inputs == direct.test.all().inputs).all()
    assert through.feature_names == direct.feature_names == ("age",)


def test_a_local_csv_file_with_a_named_target(hub, tmp_path: Path) -> None:
    _table().to_csv(tmp_path / "people.csv", index=False)
    splits = load(f"hf:csv:{tmp_path / 'people.csv'}", target="age")
    assert isinstance(splits, Splits) and splits.kind == "regression" and splits.feature_names == ("target",)


def _labels(datasets):
    return datasets.ClassLabel(names=["cat", "dog"])


def test_parts_class_names_and_hidden_labels(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    features = hub.Features({"text": hub.Value("string"), "label": _labels(hub)})

    def part(count: int, hidden: bool = False):
        labels = [-1] * count if hidden else [n % 2 for n in range(count)]
        rows = {"text": [f"a long sentence number {n}" for n in range(count)], "label": labels}
        return hub.Dataset.from_dict(rows, features=features)

    parts = hub.DatasetDict(train=part(80), validation=part(20), test=part(20, hidden=True))
    monkeypatch.setattr(hub, "load_dataset", lambda name, config: parts)
    splits = load("hf:someone/pets:small")
    assert isinstance(splits, Splits)
    assert splits.class_names == ("cat", "dog") and len(splits.validation) == 20
    assert len(splits.train) + len(splits.test) == 80 and "left out: test" in splits.description
    assert "text:long sentence" in (splits.feature_names or ())


def test_images(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    features = hub.Features({"picture": hub.Image(), "label": _labels(hub)})
    rows = {
        "picture": [Image.new("L", (6, 4), 10 * n) for n in range(20)],
        "label": [n % 2 for n in range(20)],
    }
    parts = hub.DatasetDict(train=hub.Dataset.from_dict(rows, features=features))
    monkeypatch.setattr(hub, "load_dataset", lambda name, config: parts)
    splits = load("hf:pets")
    assert isinstance(splits, Splits) and splits.input_shape == (1, 4, 6)
    assert np.allclose(splits.test.all().inputs[:, 0, 0, 0].numpy() * 255, 10 * splits.test.ids.numpy())
    with pytest.raises(InputError, match="has no column 'labels'; did you mean 'label'"):
        load("hf:pets", target="labels")


def test_what_the_library_cannot_load_is_one_line(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, config: str | None) -> None:
        raise ConnectionError("no network\nmany lines")

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(InputError, match="hf:nobody/nothing could not be loaded: no network$"):
        load("hf:nobody/nothing")


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'coloss\[hf\]'"):
        load("hf:mnist")


def test_bad_addresses(tmp_path: Path) -> None:
    for address in ("hf:", "hf::x", "hf:parquet", "hf:parquet:"):
        with pytest.raises(InputError, match="must be hf:NAME"):
            load(address)
    with pytest.raises(DataNotFoundError, match="there is no file"):
        load(f"hf:parquet:{tmp_path / 'none.parquet'}")
