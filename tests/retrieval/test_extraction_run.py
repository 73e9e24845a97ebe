"""The audit of one's own interactions: what it stores, that it goes on where it stopped, and what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from coloss.errors import InputError
from coloss.nn import SequentialRecommender
from coloss.retrieval import ExtractionAudit, audit_recommender
from coloss.train import Budget
from coloss.train.checkpoint import load_model

QUICK = {"budget": Budget(steps=5), "queries": 160, "copy_steps": 2}


@pytest.fixture
def plays(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        (user, int(item), step)
        for user in range(60)
        for step, item in enumerate(generator.permutation(40)[:6])
    ]
    path = tmp_path / "plays.csv"
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(path, index=False)
    return path


def test_the_table_the_metrics_and_the_recommender_are_stored(plays, tmp_path):
    shares = []
    found = audit_recommender(str(plays), tmp_path / "audit", **QUICK, progress=shares.append)
    table = pd.read_csv(tmp_path / "audit" / "audit.csv", keep_default_na=False)
    assert len(table) == 2 + 3 * 4 and {"agreement@1", "agreement@10", "rbo@10", "list_kept"} <= set(table)
    assert found == json.loads((tmp_path / "audit" / "metrics.json").read_text())
    for row in table.to_dict("records"):
        name = row["strategy"] if row["defence"] == "none" else f"{row['strategy']}, {row['defence']}"
        assert found[f"agreement@10 {name}"] == row["agreement@10"]
        asked = (
            0
            if row["strategy"] in ("popularity", "few-shot only")
            else 150
            if "150" in row["defence"]
            else 160
        )
        assert row["queries"] == asked
    assert shares == sorted(shares) and shares[-1] == 1.0
    model = load_model(
        SequentialRecommender(40, 32, max_history=8), tmp_path / "audit" / "target.safetensors"
    )
    assert model.num_items == 40 and 0 <= found["target_recall@10"] <= 1


def test_a_stopped_audit_goes_on_to_the_same_table(plays, tmp_path, monkeypatch):
    whole = audit_recommender(str(plays), tmp_path / "whole", **QUICK)
    row, done = ExtractionAudit.row, []

    def stopping(self, *step):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(step)
        return row(self, *step)

    monkeypatch.setattr(ExtractionAudit, "row", stopping)
    with pytest.raises(KeyboardInterrupt):
        audit_recommender(str(plays), tmp_path / "parts", **QUICK)
    monkeypatch.setattr(ExtractionAudit, "row", row)
    assert len(pd.read_csv(tmp_path / "parts" / "audit.csv")) == 4
    assert audit_recommender(str(plays), tmp_path / "parts", **QUICK) == whole
    tables = [(tmp_path / name / "audit.csv").read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_a_recommender_of_ones_own_is_audited(plays, tmp_path):
    mine = SequentialRecommender(40, 8, max_history=8)
    before = mine.item_embeddings.clone()
    found = audit_recommender(str(plays), tmp_path, queries=20, copy_steps=2, target=mine)
    assert bool((mine.item_embeddings == before).all()) and not (tmp_path / "target.safetensors").exists()
    assert "agreement@10 few-shot, lists of 5" in found


def test_bad_input_is_refused(plays, tmp_path):
    with pytest.raises(
        InputError, match="source must be amazon-video-games or the path of a table, got 'digits'"
    ):
        audit_recommender("digits", tmp_path)
    with pytest.raises(InputError, match="queries must be >= 1, got 0"):
        audit_recommender(str(plays), tmp_path, queries=0)
    table = pd.read_csv(plays)
    few = tmp_path / "few.csv"
    table[table["user"] < 5].to_csv(few, index=False)
    with pytest.raises(
        InputError, match="must hold at least 23 users of 4 interactions or more, and 30 items"
    ):
        audit_recommender(str(few), tmp_path / "few")
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "run.json").write_text('{"data": "other", "seed": 3}')
    with pytest.raises(InputError, match="holds a run on 'other' with seed 3: choose another folder"):
        audit_recommender(str(plays), folder, **QUICK)
