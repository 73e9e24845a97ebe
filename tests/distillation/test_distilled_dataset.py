"""The distilled file: round trip and one-line errors for whatever is no such file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coloss.distillation import (
    DistilledDataset,
)
from coloss.distillation.distilled_dataset import holds_distilled
from coloss.errors import InputError


def distilled(**changes) -> DistilledDataset:
    generator = torch.Generator().manual_seed(0)
    values = {
        "images": torch.randn(4, 1, 8, 8, generator=generator),
        "labels": torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [0.3, 0.7]]),
        "learning_rate": 0.25,
        "momentum": 0.9,
        "mean": torch.full((1, 1, 1), 0.3),
        "scale": torch.full((1, 1, 1), 0.4),
        "source": "digits",
        "seed": 3,
        "images_per_class": 2,
        "class_names": ("zero", "one"),
    }
    return DistilledDataset(**values | changes)


def test_a_file_gives_back_everything_and_holds_no_pickle(tmp_path: Path) -> None:
    before = distilled()
    path = before.save(tmp_path / "deep" / "distilled.npz")
    assert [file.name for file in path.parent.iterdir()] == ["distilled.npz"]
    after = DistilledDataset.load(path)
    for name in ("images", "labels", "mean", "scale"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    plain = ("learning_rate", "momentum", "source", "seed", "images_per_class", "class_names", "augmentation")
    assert [getattr(before, name) for name in plain] == [getattr(after, name) for name in plain]
    assert holds_distilled(path)
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["metadata"]))["format_version"] == 1
        assert all(not file[name].dtype.hasobject for name in file.files)
    torch.testing.assert_close(after.normalize(after.raw_images()), after.images)


def test_a_truncated_file_a_foreign_one_and_a_pickle_are_refused_in_one_line(tmp_path: Path) -> None:
    path = distilled().save(tmp_path / "distilled.npz")
    content = path.read_bytes()
    for share in (0.0, 0.3, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match="is truncated or no distilled data set") as caught:
            DistilledDataset.load(path)
        assert "\n" not in str(caught.value)
    broken = bytearray(content)
    broken[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(broken))
    with pytest.raises(InputError, match=r"distilled\.npz"):
        DistilledDataset.load(path)
    np.savez(path, x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(InputError, match="is no distilled data set: it has no 'metadata'"):
        DistilledDataset.load(path)
    assert not holds_distilled(path)
    np.savez(path, metadata=np.array({"a": 1}, dtype=object), images=0, labels=0, mean=0, scale=0)
    with pytest.raises(InputError, match="is truncated or no distilled data set"):
        DistilledDataset.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(InputError, match="is no distilled data set"):
        DistilledDataset.load(tmp_path / "array.npy")
    with pytest.raises(InputError, match=r"there is no file .*absent\.npz"):
        DistilledDataset.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2, this coloss reads 1"),
        ({"learning_rate": -0.1}, "is damaged: learning_rate must be > 0 and finite, got -0.1"),
        ({"learning_rate": "fast"}, "is damaged: learning_rate must be of type float, got 'fast'"),
        ({"seed": None}, "is damaged: seed must be of type int, got None"),
        ({"class_names": ["a"]}, "is damaged: class_names must be 2 or none, got 1"),
    ],
)
def test_metadata_that_cannot_be_are_named(tmp_path: Path, change: dict, message: str) -> None:
    path = distilled().save(tmp_path / "distilled.npz")
    with np.load(path) as file:
        arrays = dict(file)
    metadata = json.loads(str(arrays.pop("metadata"))) | change
    np.savez(path, metadata=np.array(json.dumps(metadata)), **arrays)
    with pytest.raises(InputError, match=message):
        DistilledDataset.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.full((4, 2), 0.6)}, "labels must be probabilities"),
        ({"images": torch.full((4, 1, 8, 8), torch.nan)}, "images must be finite"),
        ({"scale": torch.zeros(1)}, "scale must be > 0"),
        ({"mean": torch.zeros(3, 1, 1)}, "mean and scale must fit an image"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
    ],
)
def test_values_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        distilled(**changes)


def test_a_folder_that_cannot_be_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file/deep\.npz"):
        distilled().save(tmp_path / "file" / "deep.npz")
