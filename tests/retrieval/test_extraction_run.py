"""The audit of one's own interactions: what it stores, that it goes on where it stopped, and what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from coloss.errors import InputError
from coloss.nn import SequentialRecommender
from coloss.retrieval import ExtractionAudit, audit_recommender
from coloss.train import Budget
from coloss.train.checkpoint import load_model

QUICK = {"budget": Budget(steps=5), "queries": 160, "copy_steps": 2}


@pytest.fixture
def two_copies(monkeypatch):
    """The first and the last copy of the plan alone, where the others would show nothing more."""
    plan = ExtractionAudit.plan
    monkeypatch.setattr(ExtractionAudit, "plan", lambda self: [*plan(self)[:1], *plan(self)[-1:]])


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


@pytest.mark.usefixtures("two_copies")
def test_a_recommender_of_ones_own_is_audited(plays, tmp_path):
    mine = SequentialRecommender(40, 8, max_history=8)
    before = mine.item_embeddings.clone()
    found = audit_recommender(str(plays), tmp_path, queries=20, copy_steps=2, target=mine)
    assert bool((mine.item_embeddings == before).all()) and not (tmp_path / "target.safetensors").exists()
    assert "agreement@10 few-shot, 150 queries" in found


@pytest.mark.usefixtures("two_copies")
def test_a_folder_belongs_to_one_recommender_and_to_one_content(plays, tmp_path):
    """Neither another model of one's own nor edited interactions get the rows of the first audit."""
    options = {"queries": 20, "copy_steps": 1}

    def mine(seed):
        torch.manual_seed(seed)
        model = SequentialRecommender(40, 8, max_history=8)
        torch.nn.init.normal_(model.item_embeddings)
        return model

    first = audit_recommender(str(plays), tmp_path / "audit", target=mine(0), **options)
    assert audit_recommender(str(plays), tmp_path / "audit", target=mine(0), **options) == first
    with pytest.raises(InputError, match="and other settings: choose another folder"):
        audit_recommender(str(plays), tmp_path / "audit", target=mine(1), **options)
    table = pd.read_csv(plays)
    table["time"] = table["time"].sample(frac=1.0, random_state=0).to_numpy()
    table.to_csv(plays, index=False)
    with pytest.raises(InputError, match="and other settings: choose another folder"):
        audit_recommender(str(plays), tmp_path / "audit", target=mine(0), **options)


class Plain(torch.nn.Module):
    """No more than what is asked for, and it lists what was seen."""

    def recommend(self, histories, k):
        last = histories[:, -1:]
        return (last - 1 + torch.arange(k)) % 40 + 1

    def scores(self, histories):
        raise AssertionError("scores alone are not enough to measure recall")


@pytest.mark.usefixtures("two_copies")
def test_no_more_is_needed_of_a_recommender_than_its_lists(plays, tmp_path):
    options = {"queries": 20, "copy_steps": 1}
    with pytest.raises(InputError, match="the target lists items of the history: give exclude_seen=False"):
        audit_recommender(str(plays), tmp_path / "one", target=Plain(), **options)
    found = audit_recommender(str(plays), tmp_path / "two", target=Plain(), exclude_seen=False, **options)
    assert "agreement@10 few-shot, 150 queries" in found and "target_recall@10" not in found


def test_a_trained_recommender_may_list_what_was_seen(plays, tmp_path, monkeypatch):
    truths = []

    def look(self):
        truths.append((self.truth, self.held_out))
        return []

    monkeypatch.setattr(ExtractionAudit, "plan", look)
    for exclude_seen in (True, False):
        audit_recommender(str(plays), tmp_path / f"{exclude_seen}", **QUICK, exclude_seen=exclude_seen)
    seen = [bool((lists[:, :, None] == held_out[:, None]).any()) for lists, held_out in truths]
    assert seen == [False, True]


@pytest.mark.usefixtures("two_copies")
def test_22_users_are_enough_and_21_are_not(plays, tmp_path):
    table = pd.read_csv(plays)
    table = table[table["user"] < 22]
    table.to_csv(plays, index=False)
    assert audit_recommender(
        str(plays), tmp_path / "22", target=Plain(), exclude_seen=False, queries=9, copy_steps=1
    )
    table[table["user"] < 21].to_csv(plays, index=False)
    with pytest.raises(
        InputError, match="at least 22 users of 3 interactions or more, some of 4, and 30 items"
    ):
        audit_recommender(str(plays), tmp_path / "21", target=Plain(), exclude_seen=False)


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
        InputError, match="must hold at least 22 users of 3 interactions or more, some of 4, and 30 items"
    ):
        audit_recommender(str(few), tmp_path / "few")
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "run.json").write_text('{"data": "other", "seed": 3}')
    with pytest.raises(InputError, match="holds a run on 'other' with seed 3: choose another folder"):
        audit_recommender(str(plays), folder, **QUICK)
