"""Interactions of users with items are tasks: by name, from a table of one's own, for the methods that are made for them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from coloss import Budget, Comparison
from coloss.data import load_interactions
from coloss.errors import InputError
from coloss.lab import find_task
from coloss.lab.recommender_tasks import JUDGED_USERS, SHOWN, holds_choices, shown_list_metrics
from coloss.metrics import evaluate_recommender
from coloss.nn import SequentialRecommender

NAME = "amazon-video-games"


@pytest.fixture
def plays(tmp_path):
    """Users who go round in a circle of 12 items, from a place of their own."""
    rows = [
        (f"user {user}", f"item {(user + step) % 12}", 100 * user + step)
        for user in range(30)
        for step in range(6)
    ]
    path = tmp_path / "plays.csv"
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(path, index=False)
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind", "arms", "metric"),
    [
        (NAME, "ranking", ["binary-cross-entropy", "aw-moe:weight=0.1"], "auc"),
        (f"{NAME}-next", "next-item", ["next-item", "recsys-extraction:repair=0.5"], "ndcg@10"),
    ],
)
def test_a_data_set_by_name(name, kind, arms, metric, needs, tmp_path, quick_teacher):
    needs(NAME)
    comparison = Comparison(name, arms, seeds=1, budget=Budget(steps=2), limit=60)
    assert comparison.task.kind == kind and comparison.task.metric == metric
    result = comparison.run(tmp_path)
    assert not result.failures and [trial.arm for trial in result.trials] == arms
    assert all(np.isfinite(trial.metrics[metric]) for trial in result.trials)
    first, second = (trial.history[-1].terms for trial in result.trials)
    assert set(second) > set(first) and second.keys() & {"gate_contrast", "list"}


@pytest.fixture
def quick_teacher(monkeypatch):
    """A teacher trained for two steps."""
    from coloss.train import Setting

    trained = Setting.fit

    def quick(self, model, *args, **options):
        return trained(self, model, *args, **(options | {"budget": Budget(steps=2)}))

    monkeypatch.setattr(Setting, "fit", quick)


def test_a_table_of_ones_own_is_ranked_and_continued(plays, tmp_path):
    assert find_task(plays).kind == "ranking"
    task = find_task(plays, kind="next-item")
    splits = task.load(0)
    assert splits.num_items == 12 and len(splits.test) == 30
    comparison = Comparison(plays, ["next-item"], seeds=1, budget=Budget(steps=120), kind="next-item")
    (trial,) = comparison.run(tmp_path / "run").trials
    assert comparison.record.task == plays and comparison.record.options["data"]
    # What comes next on a circle is certain.
    assert trial.metrics["recall@1"] > 0.9
    ranked = Comparison(plays, ["binary-cross-entropy"], seeds=1, budget=Budget(steps=2)).run(
        tmp_path / "other"
    )
    assert not ranked.failures


def test_a_table_with_a_target_is_no_recommendation(plays):
    assert holds_choices(plays) and not holds_choices(plays, target="item")
    assert not holds_choices(plays, kind="regression")
    with pytest.raises(InputError, match="holds who chose what: leave target, label noise and imbalance out"):
        find_task(plays, kind="ranking", target="item")


def test_a_changed_table_is_read_anew(plays):
    assert find_task(plays).load(0).num_items == 12
    table = pd.read_csv(plays)
    table["item"] = table["item"].where(table["user"] != "user 3", table["item"] + " again")
    table.to_csv(plays, index=False)
    assert find_task(plays).load(0).num_items == 18


def test_where_users_choose_again_seen_items_are_ranked(tmp_path):
    rows = [(user, f"song {step % 2}", step) for user in range(12) for step in range(6)]
    rows += [(user, f"song {user}", 0.5) for user in range(2, 12)]
    path = tmp_path / "songs.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "time"]).to_csv(path, index=False)
    task = find_task(str(path), kind="next-item")
    splits = task.load(0)
    found = task.test(task.model(splits), splits)
    assert found["users"] == 12  # all of them chose before what they chose last


def test_lists_are_judged_as_retrieval_and_by_area(needs):
    splits = load_interactions(needs(NAME), items=50, min_length=8)
    shown = splits.impressions("test", negatives=SHOWN - 1)

    class Oracle(nn.Module):
        """Knows the item that was chosen, as long as it sees the history."""

        def __init__(self):
            super().__init__()
            self.wanted = {
                tuple(row.tolist()): int(item) for row, item in zip(splits.test.inputs, splits.test.targets)
            }

        def forward(self, inputs):
            histories, items = inputs
            wanted = torch.tensor([self.wanted.get(tuple(row), 0) for row in histories.tolist()])
            return (items == wanted).float()

    found = shown_list_metrics(Oracle(), shown, new_users=True)
    assert found["auc"] == found["gauc"] == found["recall@1"] == found["ndcg@3"] == found["mrr"] == 1.0
    assert found["auc_last_1"] == pytest.approx(0.5, abs=0.05)


def test_few_users_are_judged_and_all_train(needs):
    needs(NAME)
    for name, rows in ((NAME, SHOWN), (f"{NAME}-next", 1)):
        splits = find_task(name).load(0)
        assert len(splits.test) == rows * JUDGED_USERS and len(splits.validation) == rows * JUDGED_USERS // 2
        assert len(splits.train) > JUDGED_USERS
    shown = find_task(NAME).load(0).test
    labels = shown.targets.view(-1, SHOWN)
    users = shown.extras["user"].view(-1, SHOWN)
    assert bool((labels[:, 0] == 1).all()) and bool((labels[:, 1:] == 0).all())
    assert bool((users == users[:, :1]).all()) and len(users[:, 0].unique()) == JUDGED_USERS


def test_a_teacher_is_larger_and_learns_from_it_to_agree(plays):
    from coloss.metrics import agreement_at_k
    from coloss.retrieval import ListDistillation
    from coloss.train import Setting

    task = replace(find_task(plays, kind="next-item"), budget=Budget(steps=60))
    setting = Setting.of(task, 0)
    method = ListDistillation.for_setting(setting, k=3, replace_objective=True)
    teacher = method.target.module
    student = setting.new_model()
    assert sum(p.numel() for p in teacher.parameters()) > 2 * sum(p.numel() for p in student.parameters())
    histories = setting.splits.train.inputs
    before = agreement_at_k(student.eval().recommend(histories, 3), teacher.recommend(histories, 3), 3)
    setting.fit(student, methods=[method])
    after = agreement_at_k(student.eval().recommend(histories, 3), teacher.recommend(histories, 3), 3)
    assert after > before + 0.3


def test_methods_that_do_not_fit_are_refused(needs):
    needs(NAME)
    with pytest.raises(
        InputError, match="aw-moe is made for ranking tasks, amazon-video-games-next is a next-item task"
    ):
        Comparison(f"{NAME}-next", ["aw-moe"], limit=60)
    with pytest.raises(InputError, match="dhkd is made for"):
        Comparison(NAME, ["dhkd"], limit=60)
    with pytest.raises(InputError, match="amazon-video-games is a ranking task: leave kind out"):
        find_task(NAME, kind="next-item")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("user,item,rating\nann,a,3\n", "ranking", "must have a column 'time'"),
        ("user,item,time\nann,a,soon\n", None, "column 'time' of .* must hold numbers or ISO dates"),
        (
            "user,item,time\nann,a,1\nann,,2\n",
            None,
            "must have a value of 'item' in every row, row 2 has none",
        ),
        (
            "user,item,time\nann,a,1\nann,b,2\n",
            None,
            "no user of .* has 3 interactions or more: each part takes one",
        ),
        ("user,item,time\n", None, "must have at least one row, got none"),
    ],
)
def test_bad_tables_give_one_line(tmp_path, content, kind, message):
    path = tmp_path / "plays.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        find_task(str(path), kind=kind)
    assert "\n" not in str(caught.value)


def test_a_recommender_of_ones_own_takes_part(plays, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from coloss.nn import SequentialRecommender\n"
        "def build(splits):\n    return SequentialRecommender(splits.num_items, 8, max_history=splits.max_history)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = find_task(plays, kind="next-item", model="mine:build")
    splits = task.load(0)
    model = task.model(splits)
    assert isinstance(model, SequentialRecommender) and model.item_embeddings.shape == (13, 8)
    assert task.test(model, splits) == evaluate_recommender(model, splits.test, (1, 10), exclude_seen=True)
