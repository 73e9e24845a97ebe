"""The audit counts queries, asks in evaluation mode, compares like with like, and its defences do what they say."""

import pytest
import torch
from torch import nn

from coloss.errors import InputError
from coloss.lab import verify
from coloss.metrics import agreement_at_k
from coloss.nn import SequentialRecommender
from coloss.retrieval import (
    NO_DEFENCE,
    CountedTarget,
    Defence,
    ExtractionAudit,
    QueryBudgetError,
    extraction_audit,
)


def new_target(**options):
    torch.manual_seed(4)
    model = SequentialRecommender(30, 8, **({"max_history": 5} | options))
    with torch.no_grad():
        model.item_embeddings.normal_()
    return model


USERS = torch.randint(1, 31, (60, 5), generator=torch.Generator().manual_seed(0))


def audit(target=None, **options):
    options = {"num_items": 30, "budgets": (60,), "k": 5, "list_length": 8, "steps": 3} | options
    return ExtractionAudit(target or new_target().eval(), USERS[:10], USERS[10:], **options)


def test_every_answered_history_is_counted_and_the_budget_holds():
    answer = CountedTarget(new_target(), 5, 30, budget=12)
    answer(USERS[:7])
    assert answer.asked == 7
    with pytest.raises(QueryBudgetError, match="the budget is 12 queries, got 13 asked for"):
        answer(USERS[:6])
    assert answer.asked == 7  # what was refused is not counted
    answer(USERS[:5])
    limited = CountedTarget(new_target(), 5, 30, budget=12, defence=Defence("limit", max_queries=4))
    assert limited.budget == 4


def test_the_target_answers_in_evaluation_mode_and_keeps_its_own():
    """With dropout the same question would be answered in two ways."""
    target = new_target(dropout=0.9).train()
    answer = CountedTarget(target, 5, 30)
    assert torch.equal(answer(USERS), answer(USERS)) and target.training
    assert torch.equal(answer(USERS), new_target().eval().recommend(USERS, 5))
    bound = CountedTarget(target.recommend, 5, 30)
    assert torch.equal(bound(USERS), bound(USERS)) and target.training


class Elsewhere(nn.Module):
    """Stands for a recommender that training left on an accelerator: it takes histories of its own device alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))

    def recommend(self, histories, k, *, exclude_seen=True):
        assert histories.device == self.weight.device
        return torch.arange(1, k + 1).expand(len(histories), k)


def test_targets_and_copies_are_asked_on_their_own_device(monkeypatch):
    best = torch.arange(1, 6).expand(len(USERS), 5)
    assert torch.equal(CountedTarget(Elsewhere(), 5, 30)(USERS), best)
    assert audit(Elsewhere(), exclude_seen=False).judge(Elsewhere())["agreement@5"] == 1.0
    # What popular items are chosen from lies where the histories are.
    popular = extraction_audit._Popular(USERS, 30).to("meta")
    devices = []

    def look(scores, k, ignore):
        devices.extend([scores.device.type, ignore.device.type])
        return scores

    monkeypatch.setattr(extraction_audit, "top_items", look)
    popular.recommend(USERS.to("meta"), 3)
    assert devices == ["meta", "meta"]


def test_short_lists_are_the_beginning_of_the_long_ones():
    target = new_target().eval()
    short = CountedTarget(target, 8, 30, defence=Defence("short", list_length=3))(USERS)
    assert torch.equal(short, target.recommend(USERS, 8)[:, :3])


def test_noise_replaces_a_share_by_items_that_could_stand_there():
    target, true = new_target().eval(), new_target().eval().recommend(USERS, 8)
    noisy = CountedTarget(
        target, 8, 30, defence=Defence("noise", noise=0.3), generator=torch.Generator().manual_seed(0)
    )
    lists = torch.cat([noisy(USERS) for _ in range(20)])
    true, users = true.repeat(20, 1), USERS.repeat(20, 1)
    wrong = lists != true
    assert wrong.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (lists.sort(dim=1).values.diff(dim=1) > 0).all() and int(lists.min()) >= 1
    assert not (lists[:, :, None] == users[:, None, :]).any()
    assert not (lists[wrong][:, None] == true[wrong.nonzero()[:, 0]]).any()


def test_a_copy_that_is_the_target_agrees_wholly():
    target = new_target().eval()
    found = audit(target).judge(target)
    assert found == {
        "agreement@1": 1.0,
        "agreement@5": 1.0,
        "exact_match@5": 1.0,
        "rbo@5": pytest.approx(1.0),
    }


def test_the_floor_is_a_list_of_popular_items_without_a_query():
    checked = audit()
    copy, queries = checked.imitate("popularity", 60)
    counts = torch.bincount(USERS[:10].flatten(), minlength=31)
    user = USERS[10].tolist()
    expected = sorted((i for i in range(1, 31) if i not in user), key=lambda i: (-int(counts[i]), i))[:5]
    assert queries == 0 and copy.recommend(USERS[10:11], 5)[0].tolist() == expected


@pytest.mark.parametrize("strategy", ["random", "autoregressive", "few-shot"])
def test_copies_use_their_budget_and_no_more(strategy):
    checked = audit()
    first, queries = checked.imitate(strategy, 47)
    assert queries == 47
    limited, fewer = checked.imitate(strategy, 47, Defence("limit", max_queries=20))
    assert fewer == 20
    again, _ = audit().imitate(strategy, 47)
    for one, other in zip(first.parameters(), again.parameters()):
        assert torch.equal(one, other)


def test_the_report_holds_a_row_for_each_copy_and_what_defences_cost():
    shares = []
    defences = (NO_DEFENCE, Defence("short", list_length=2), Defence("limit", max_queries=30))
    report = audit(strategies=("popularity", "random"), defences=defences, budgets=(20, 40)).run(
        shares.append
    )
    assert report.strategy.tolist() == ["popularity"] + 6 * ["random"]
    assert report.queries.tolist() == [0, 20, 40, 20, 40, 20, 30] and shares[-1] == 1.0
    assert report.budget.tolist() == [0, 20, 40, 20, 40, 20, 40]
    kept = dict(zip(report.defence, report.list_kept))
    assert kept == {"none": 1.0, "short": pytest.approx(0.4), "limit": 1.0}
    assert (
        report[["agreement@1", "agreement@5", "exact_match@5", "rbo@5"]]
        .apply(lambda c: c.between(0, 1))
        .all(None)
    )


def test_more_answers_make_a_closer_copy():
    checked = audit(steps=50)
    few, many = (checked.judge(checked.imitate("random", count)[0])["agreement@5"] for count in (5, 200))
    assert many > few + 0.05


def test_a_function_may_be_audited():
    target = new_target().eval()
    found = audit(lambda histories: target.recommend(histories, 8), strategies=("popularity",)).truth
    assert torch.equal(found, target.recommend(USERS[10:], 5))


def test_seen_items_must_be_left_out_on_both_sides_or_on_none():
    target = new_target().eval()

    def all_items(histories):
        return target.recommend(histories, 8, exclude_seen=False)

    with pytest.raises(InputError, match="the target lists items of the history: give exclude_seen=False"):
        audit(all_items)
    checked = audit(all_items, exclude_seen=False, strategies=("random",))
    assert checked.run()["queries"].tolist() == [60]
    assert agreement_at_k(checked.truth, target.recommend(USERS[10:], 5, exclude_seen=False), 5) == 1.0


def test_bad_input_is_refused(as_users_call):
    target = new_target()
    for call, message in (
        (lambda: Defence("x", noise=1.0), r"noise must be in \[0, 1\), got 1.0"),
        (lambda: Defence("x", list_length=0), "list_length must be >= 1, got 0"),
        (lambda: Defence("x", max_queries=0), "max_queries must be >= 1, got 0"),
        (lambda: CountedTarget(target, 31, 30), r"k must be in \[1, 30\], the number of items, got 31"),
        (lambda: CountedTarget(nn.Linear(2, 2), 3, 30), r"target must have a method recommend\(histories, k\), got Linear"),
        (lambda: CountedTarget("model", 3, 30), "target must be a module or a function, got str"),
        (lambda: CountedTarget(lambda h: h.float(), 3, 30)(USERS), r"must answer with lists of item numbers \(60, k\)"),
        (lambda: CountedTarget(lambda h: torch.ones(60, 3).long(), 3, 30)(USERS), r"3 different items of 1 .. 30, got \[1, 1, 1\]"),
        (lambda: CountedTarget(lambda h: torch.arange(3).expand(60, 3), 3, 30)(USERS), r"got \[0, 1, 2\]"),
        (lambda: audit(strategies=("guess",)), "strategies must be some of .*, got 'guess'"),
        (lambda: audit(budgets=(0,)), "budgets must be >= 1, got 0"),
        (lambda: audit(steps=0), "steps must be >= 1, got 0"),
        (lambda: ExtractionAudit(target, USERS[:0], USERS, num_items=30), "few_shot and held_out must hold users, got 0 and 60"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()


def test_the_claim_runs():
    found = verify("recsys-extraction", smoke=True, seeds=1)
    assert found["metric"] == "agreement@10" and found["baseline"]["name"] == "autoregressive"
    assert found["arms"]["popularity"]["metrics"]["queries"]["mean"] == 0
    for arm in found["arms"].values():
        assert {"agreement@1", "agreement@10", "exact_match@10", "rbo@10", "target_recall@10"} <= set(
            arm["metrics"]
        )
