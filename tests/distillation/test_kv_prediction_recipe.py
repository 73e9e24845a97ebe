"""From a text to a model that answers with a predicted cache: stages, resumption, what is stored, what is refused."""

import json
import math

import pytest
import torch
from contract import Killed

from coloss import Budget
from coloss.data import load_characters
from coloss.distillation import (
    first_token_milliseconds,
    kv_prediction_recipe,
    load_kv_prediction,
    train_kv_prediction,
)
from coloss.errors import InputError
from coloss.lab.claims import verify
from coloss.nn import CausalLanguageModel

SIZES = {"dim": 16, "depth": 4, "heads": 2, "key_value_heads": 1}


@pytest.fixture
def text(tmp_path, monkeypatch):
    path = tmp_path / "play.txt"
    path.write_text(load_characters().decode(load_characters().train[:4000]))
    monkeypatch.setattr(kv_prediction_recipe, "_JUDGED", 8)
    return str(path)


def train(text, folder, **options):
    return train_kv_prediction(text, folder, sizes=SIZES, budget=Budget(steps=8), **options)


def test_a_killed_run_goes_on_and_what_it_stored_is_the_same(text, tmp_path, monkeypatch):
    auxiliary = "sibling"  # the stages of both kinds; a pruned one leaves out a stage
    whole = train(text, tmp_path / "whole", auxiliary=auxiliary, share=0.5)
    steps, saved = [], kv_prediction_recipe.kv_prediction_terms

    def killed(outputs, targets):
        steps.append(1)
        if len(steps) == 2:
            raise Killed
        return saved(outputs, targets)

    monkeypatch.setattr(kv_prediction_recipe, "kv_prediction_terms", killed)
    with pytest.raises(Killed):
        train(text, tmp_path / "killed", auxiliary=auxiliary, share=0.5)
    monkeypatch.setattr(kv_prediction_recipe, "kv_prediction_terms", saved)
    shares = []
    again = train(text, tmp_path / "killed", auxiliary=auxiliary, share=0.5, progress=shares.append)
    assert {name: value for name, value in again.items() if "_ms_" not in name} == {
        name: value for name, value in whole.items() if "_ms_" not in name
    }
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0
    (model, characters), (other, _) = (load_kv_prediction(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(v, other.state_dict()[name]) for name, v in model.state_dict().items())
    assert model.auxiliary.depth == 2
    written = model.generate(characters.encode("the ")[None], 5)
    assert len(characters.decode(written[0])) == 5
    stored = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert stored == whole
    assert all(math.isfinite(value) for value in whole.values())
    flops = [whole[f"first_token_mflop_{name}"] for name in ("base", "predicted", "auxiliary")]
    assert flops == sorted(flops, reverse=True)


def test_another_run_is_not_taken_for_this_one(text, tmp_path):
    train(text, tmp_path / "run", share=0.25)
    with pytest.raises(InputError, match="choose another folder"):
        train(text, tmp_path / "run", share=0.5)
    with pytest.raises(InputError, match="choose another folder"):
        train(text, tmp_path / "run", share=0.25, seed=1)


def test_what_cannot_work_is_refused(text, tmp_path):
    with pytest.raises(InputError, match=r"share must be in \(0, 1\], got 0"):
        train(text, tmp_path / "a", share=0.0)
    with pytest.raises(
        InputError, match="sizes must be those of a CausalLanguageModel: heads must divide dim"
    ):
        train_kv_prediction(text, tmp_path / "b", sizes={"dim": 16, "heads": 3, "key_value_heads": 3})
    with pytest.raises(InputError, match="context of at least 128 characters with learned positions, got 64"):
        train_kv_prediction(text, tmp_path / "b", sizes=SIZES | {"positions": "learned", "context": 64})
    with pytest.raises(InputError, match="name must be that of a running text"):
        train_kv_prediction("sst2", tmp_path / "c")
    short = tmp_path / "short.txt"
    short.write_text("to be or not to be")
    with pytest.raises(InputError, match="data must be a text of some thousand characters"):
        train_kv_prediction(short, tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abcd")
    with pytest.raises(InputError, match="that can be read"):
        load_kv_prediction(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds no KV prediction"):
        load_kv_prediction(tmp_path / "other")


def test_the_clock_counts_passes_in_evaluation_mode_and_leaves_the_mode(monkeypatch):
    modes, read = [], kv_prediction_recipe.first_token_logits
    monkeypatch.setattr(
        kv_prediction_recipe,
        "first_token_logits",
        lambda model, ids: modes.append(model.training) or read(model, ids),
    )
    model, prompt = CausalLanguageModel(7, 8, 1, 2).train(), torch.zeros(1, 3, dtype=torch.long)
    assert first_token_milliseconds(model, prompt, repeats=2) > 0
    assert (modes, model.training) == ([False] * 3, True)
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        first_token_milliseconds(model, prompt, repeats=0)


def test_the_claim_runs_and_its_method_takes_no_more_operations():
    arms = verify("kv-prediction", smoke=True, seeds=1)["arms"]
    spent = {name: arm["metrics"]["first_token_mflop"]["mean"] for name, arm in arms.items()}
    assert 0.97 * spent["pruned model alone"] < spent["kv prediction"] <= spent["pruned model alone"]
    assert all(math.isfinite(arm["metrics"]["loss"]["mean"]) for arm in arms.values())
