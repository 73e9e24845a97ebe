import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coloss.data import DATASETS, data_directory, dataset_info, locate
from coloss.errors import DataNotFoundError, InputError, UnknownNameError

EMBEDDED = {"digits", "breast-cancer", "wine", "iris", "diabetes"}


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys; from coloss.data import DATASETS, locate; print(sorted(set(sys.modules) & {'torch', 'numpy', 'pandas', 'sklearn'}))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert shown.stdout.strip() == "[]"


def test_entries_are_complete() -> None:
    assert {name for name, info in DATASETS.items() if info.file is None} == EMBEDDED
    for name, info in DATASETS.items():
        assert name == info.name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert info.title and info.kind and info.shape and info.samples and info.licence and info.source
        if info.file is not None:
            assert info.sha256 is not None and re.fullmatch("[0-9a-f]{64}", info.sha256)
            assert info.size is not None and info.size > 0


@pytest.mark.parametrize("name", sorted(set(DATASETS) - EMBEDDED))
def test_file_is_the_documented_one(name: str, needs) -> None:
    path, info = locate(needs(name)), DATASETS[name]
    assert path.name == info.file and path.stat().st_size == info.size
    if path.stat().st_size < 2_000_000:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == info.sha256


def test_entries_agree_with_the_readme_beside_the_files() -> None:
    readme = data_directory() / "README.md"
    if not readme.is_file():
        pytest.skip(f"no {readme}")
    rows = re.findall(
        r"\| `([^`]+)` .*\| ([\d,]+) \| `([0-9a-f]{64})` \|", readme.read_text(encoding="utf-8")
    )
    documented = {file: (int(size.replace(",", "")), digest) for file, size, digest in rows}
    known = {info.file: (info.size, info.sha256) for info in DATASETS.values() if info.file}
    assert known == documented


def test_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path / "elsewhere"))
    assert data_directory() == tmp_path / "elsewhere"
    monkeypatch.setenv("COLOSS_DATA", "~/sets")
    assert data_directory() == Path.home() / "sets"


def test_directory_without_checkout_is_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from coloss.data import catalog

    monkeypatch.delenv("COLOSS_DATA", raising=False)
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "lib" / "a" / "coloss" / "data" / "catalog.py"))
    assert data_directory() == Path.home() / ".cache" / "coloss"
    beside = tmp_path.parent / "shared" / "data"
    (tmp_path / "lib" / "pyproject.toml").parent.mkdir()
    (tmp_path / "lib" / "pyproject.toml").touch()
    assert data_directory() == Path.home() / ".cache" / "coloss"
    beside = tmp_path / "shared" / "data"
    beside.mkdir(parents=True)
    assert data_directory() == beside


def test_a_missing_file_says_what_where_and_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path))
    with pytest.raises(DataNotFoundError) as caught:
        locate("cifar10")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'cifar10'", "image_cifar10_8k.npz", str(tmp_path), "github.com/YoongiKim", "COLOSS_DATA"):
        assert part in message


def test_unknown_and_embedded_names() -> None:
    with pytest.raises(UnknownNameError, match="'cifar'.*did you mean 'cifar10'"):
        dataset_info("cifar")
    with pytest.raises(UnknownNameError, match="known are digits, .*kit-captions"):
        dataset_info("qqqq")
    with pytest.raises(InputError, match="embedded in scikit-learn"):
        locate("digits")
