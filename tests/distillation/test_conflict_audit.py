import json
from pathlib import Path

import pytest
import torch

from coloss import Budget
from coloss.data import load
from coloss.distillation import audit_conflict, conflict_audit
from coloss.lab import find_entry
from coloss.metrics import evaluate_classifier
from coloss.train.checkpoint import load_model

SHORT = Budget(steps=6)


def test_the_folder_holds_a_student_that_works_and_what_was_found(tmp_path: Path) -> None:
    shares: list[float] = []
    found = audit_conflict("iris", tmp_path, budget=SHORT, seed=1, progress=shares.append, width=0.5)
    assert found["second_head"] in (0.0, 1.0) and -1 <= found["cosine_classifier"] <= 1
    splits = load("iris", seed=1)
    student = load_model(
        conflict_audit._network(splits.input_shape, 3, 0.5, seed=1), tmp_path / "student.safetensors"
    ).eval()
    assert evaluate_classifier(student, splits.test)["accuracy"] == found["accuracy"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(found)
    sentence = (tmp_path / "recommendation.txt").read_text()
    assert f"mean cosine {found['cosine_classifier']:.2f} on the classifier" in sentence
    assert shares == sorted(shares)


def test_a_stopped_audit_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = audit_conflict("iris", tmp_path / "whole", budget=SHORT)

    class Stopped(Exception):
        pass

    def stop(*args: object, **options: object) -> None:
        raise Stopped

    monkeypatch.setattr(conflict_audit, "tabulate_teacher_logits", stop)
    with pytest.raises(Stopped):
        audit_conflict("iris", tmp_path / "stopped", budget=SHORT)
    monkeypatch.undo()
    assert audit_conflict("iris", tmp_path / "stopped", budget=SHORT) == whole


def test_images_and_series_have_networks_too() -> None:
    for shape in ((1, 8, 8), (3, 20)):
        network = conflict_audit._network(shape, 5, 0.25, seed=0)
        assert network(torch.randn(2, *shape)).shape == (2, 5)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width must be > 0, got 0.0"):
        audit_conflict("iris", tmp_path, width=0.0)
    with pytest.raises(ValueError, match="one class for each sample, got a regression set"):
        audit_conflict("diabetes", tmp_path)
    audit_conflict("iris", tmp_path, budget=Budget(steps=1))
    with pytest.raises(ValueError, match="holds a run on"):
        audit_conflict("wine", tmp_path, budget=Budget(steps=1))
    with pytest.raises(ValueError, match="holds a run on 'iris' with seed 0 and other settings"):
        audit_conflict("iris", tmp_path, budget=Budget(steps=2))


def test_it_is_the_command_of_the_system() -> None:
    assert find_entry("dhkd").recipe == "coloss.distillation.audit_conflict"
