"""Pretraining by one call: what it stores, judges, refuses, and goes on with."""

import json

import numpy as np
import pytest
import torch

from coloss.data import load
from coloss.errors import InputError
from coloss.jepa import load_encoder, pretrain_lejepa
from coloss.jepa.pretraining import encoder_for_shape
from coloss.metrics import evaluate_encoder, extract_features
from coloss.train import Budget, Method
from coloss.train.checkpoint import checkpoints

CLASSES = {"linear_probe", "knn", "feature_std"}


@pytest.fixture
def few_series(tmp_path):
    """Two kinds of waves, as a file of one's own."""
    rng = np.random.default_rng(0)
    time = np.linspace(0, 6.28, 24)
    targets = np.arange(60) % 2
    waves = np.stack([np.sin(time * (1 + 2 * kind)) for kind in targets])[:, None]
    path = tmp_path / "waves.npz"
    np.savez(path, x=(waves + 0.3 * rng.standard_normal(waves.shape)).astype(np.float32), y=targets)
    return str(path)


def names(parts, extra):
    return {f"{prefix}{name}" for prefix in ("", "raw_", "untrained_") for name in parts} | extra


def test_images_leave_an_encoder_that_can_be_loaded_and_used(tmp_path):
    shares = []
    metrics = pretrain_lejepa("digits", tmp_path, budget=Budget(steps=6), progress=shares.append)
    assert set(metrics) == names(CLASSES, {"rankme", "rankme_embeddings"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert shares
    encoder, splits = load_encoder(tmp_path), load("digits", seed=0)
    assert not encoder.training
    judged = evaluate_encoder(encoder, splits, labels=100)
    assert {name: judged[name] for name in CLASSES} == {name: metrics[name] for name in CLASSES}
    raw = evaluate_encoder(torch.nn.Flatten(), splits, labels=100)
    assert metrics["raw_knn"] == raw["knn"]
    # Trained weights, not the ones at the start.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = encoder_for_shape(splits.input_shape)
    assert (
        metrics["untrained_linear_probe"] == evaluate_encoder(untrained, splits, labels=100)["linear_probe"]
    )
    before, after = (extract_features(one, splits.test).features for one in (untrained, encoder))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", ["iris", "waves"])
def test_tables_and_series(tmp_path, few_series, name):
    source = few_series if name == "waves" else name
    metrics = pretrain_lejepa(source, tmp_path / "out", budget=Budget(steps=2))
    assert set(metrics) == names(CLASSES, {"rankme", "rankme_embeddings"})


def test_numeric_targets_are_judged_by_ridge_regression(tmp_path):
    metrics = pretrain_lejepa("diabetes", tmp_path, budget=Budget(steps=2))
    assert set(metrics) == names({"ridge_r2", "feature_std"}, {"rankme", "rankme_embeddings"})
    assert 0.2 < metrics["raw_ridge_r2"] < 0.7


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def stop_at_three(self, state):
        if state.step == 3:
            raise Killed

    whole = pretrain_lejepa("iris", tmp_path / "whole", budget=Budget(steps=6))
    import coloss.jepa.pretraining as pretraining
    from coloss.train import fit

    monkeypatch.setattr(
        pretraining, "fit", lambda *given, **options: fit(*given, **options, checkpoint_every=2)
    )
    with monkeypatch.context() as killing:
        killing.setattr(Method, "on_step", stop_at_three)
        killing.setattr(
            pretraining.LeJEPA, "on_step", lambda self, state: stop_at_three(self, state), raising=False
        )
        with pytest.raises(Killed):
            pretrain_lejepa("iris", tmp_path / "stopped", budget=Budget(steps=6))
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert [path.name for path in checkpoints(tmp_path / "stopped" / "checkpoints")] == ["step-00000002"]
    assert pretrain_lejepa("iris", tmp_path / "stopped", budget=Budget(steps=6)) == whole
    one, other = (load_encoder(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_judged_again_but_not_trained_again(tmp_path):
    first = pretrain_lejepa("iris", tmp_path, budget=Budget(steps=3))
    stored = (tmp_path / "encoder.safetensors").read_bytes()
    assert pretrain_lejepa("iris", tmp_path, budget=Budget(steps=3)) == first
    assert (tmp_path / "encoder.safetensors").read_bytes() == stored


def test_a_folder_of_another_run_is_refused(tmp_path):
    pretrain_lejepa("iris", tmp_path, budget=Budget(steps=1))
    for other in ({"data": "wine"}, {"data": "iris", "seed": 1}):
        with pytest.raises(InputError, match="holds a run on 'iris' with seed 0: choose another folder"):
            pretrain_lejepa(folder=tmp_path, budget=Budget(steps=1), **other)


def test_what_cannot_be_judged_or_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="got a retrieval set"):
        pretrain_lejepa("cranfield", tmp_path)
    with pytest.raises(InputError, match="did you mean 'digits'"):
        pretrain_lejepa("digit", tmp_path)
    with pytest.raises(InputError, match="holds no encoder that can be read"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="that of an image, a series or a vector"):
        encoder_for_shape((1, 2, 3, 4))
