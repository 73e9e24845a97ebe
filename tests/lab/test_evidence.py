"""Evidence files are read whole or refused by name."""

import pytest

from coloss.errors import InputError
from coloss.lab import evidence as stored
from coloss.lab.evidence import evidence_folder, read_evidence


def test_a_checkout_keeps_its_evidence_beside_the_source(tmp_path, monkeypatch):
    assert evidence_folder().name == "evidence" and (evidence_folder().parent / "pyproject.toml").exists()
    monkeypatch.setattr(stored, "PACKAGE", tmp_path / "lib" / "coloss")
    assert evidence_folder() == tmp_path / "lib" / "coloss" / "evidence"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ('{"slug": "x"}', "statement: Field required"),
        ('{"verdict": "proved"}', "Field required"),
        ("[]", "Input should be an object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(stored, "evidence_folder", lambda: tmp_path)
    assert read_evidence("x") is None
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=f"x.json is damaged .*{reason}.*coloss verify x"):
        read_evidence("x")


def test_a_folder_in_its_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "evidence_folder", lambda: tmp_path)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(InputError, match="x.json is damaged"):
        read_evidence("x")
