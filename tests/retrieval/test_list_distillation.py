"""List losses by hand, their gradients item by item, and the method in a run."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.data import IndexedDataset
from coloss.errors import InputError
from coloss.metrics import agreement_at_k
from coloss.nn import SequentialRecommender, next_item_loss
from coloss.retrieval import ListDistillation, bidirectional_repair_loss, list_distillation_loss
from coloss.train import Budget, TrainingStep


def test_the_list_loss_written_out():
    logits, lists = (
        torch.randn(3, 7, dtype=torch.float64),
        torch.stack([torch.randperm(7)[:3] for _ in range(3)]),
    )
    order, gaps = [], []
    for z, c in zip(logits.tolist(), lists.tolist()):
        order += [max(0, 0.4 - (z[c[t]] - z[c[t + 1]])) for t in range(2)]
        gaps += [max(0, 0.9 - (z[t] - z[n])) for t in c for n in range(7) if n not in c]
    expected = sum(order) / len(order) + sum(gaps) / len(gaps)
    found = list_distillation_loss(logits, lists, margin_order=0.4, margin_negative=0.9)
    assert found.item() == pytest.approx(expected)


def test_the_list_loss_is_zero_where_gaps_reach_the_margins():
    logits = torch.tensor([[0.0, 0.0, 1.0, 1.5, 0.5]], requires_grad=True)
    loss = list_distillation_loss(logits, torch.tensor([[3, 2, 4]]))
    assert loss == 0.0 and not torch.autograd.grad(loss, logits)[0].any()
    assert list_distillation_loss(logits, torch.tensor([[3, 2, 4]]), margin_order=0.6) > 0.0


def test_drawn_negatives_are_never_listed_nor_ignored():
    """Listed and ignored items score highest: a single one of them drawn would cost more than the rest together."""
    logits = torch.tensor([[-1.0, 50.0, 49.0, 9e9, 0.0, 0.0]])
    ignore = torch.tensor([[False, False, False, True, False, False]])
    lists = torch.tensor([[1, 2]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert (
            list_distillation_loss(logits, lists, num_negatives=4, ignore=ignore, generator=generator) == 0.0
        )
    assert list_distillation_loss(logits, lists, ignore=ignore) == 0.0


def test_drawn_negatives_give_the_full_loss_in_the_mean():
    logits, lists = torch.randn(4, 30), torch.stack([torch.randperm(30)[:5] for _ in range(4)])
    full = list_distillation_loss(logits, lists)
    drawn = [list_distillation_loss(logits, lists, num_negatives=3).item() for _ in range(300)]
    assert sum(drawn) / 300 == pytest.approx(full.item(), rel=0.02)


@pytest.mark.parametrize("form", ["threshold", "pairwise"])
def test_repair_pushes_missing_up_spurious_down_and_nothing_else(form):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    lists = torch.stack([torch.randperm(9)[:4] for _ in range(5)])
    loss = bidirectional_repair_loss(logits, lists, form=form)
    gradient = torch.autograd.grad(loss, logits)[0]
    own = logits.argsort(dim=1, descending=True)[:, :4]
    for row in range(5):
        given, mine = set(lists[row].tolist()), set(own[row].tolist())
        for item in range(9):
            slope = gradient[row, item]
            if item in given - mine:
                assert slope < 0
            elif item in mine - given:
                assert slope > 0
            else:
                assert slope == 0


def test_repair_written_out():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    lists = torch.tensor([[0, 4, 3]])  # own: 0 1 2; missing 4 3, spurious 1 2, threshold 2
    soft = lambda x: math.log1p(math.exp(x))
    expected = (soft(2 - 0) + soft(2 - 1)) / 2 + (soft(3 - 2) + soft(2 - 2)) / 2
    assert bidirectional_repair_loss(logits, lists).item() == pytest.approx(expected, rel=1e-5)
    pairs = (soft(3 - 0) + soft(3 - 1) + soft(2 - 0) + soft(2 - 1)) / 4
    assert bidirectional_repair_loss(logits, lists, form="pairwise").item() == pytest.approx(pairs, rel=1e-5)
    assert bidirectional_repair_loss(logits, lists, k=1).item() == 0.0


@pytest.mark.parametrize("form", ["threshold", "pairwise"])
def test_repair_is_nothing_where_the_sets_agree(form):
    logits = torch.randn(4, 6, requires_grad=True)
    own = logits.argsort(dim=1, descending=True)
    for lists in (own[:, :3].flip(1), own):  # another order; all items
        loss = bidirectional_repair_loss(logits, lists, form=form)
        assert loss == 0.0 and not torch.autograd.grad(loss, logits)[0].any()


# The threshold form takes its threshold for fixed, which numerical differences do not.
@pytest.mark.parametrize(
    "loss",
    [list_distillation_loss, partial(bidirectional_repair_loss, form="pairwise")],
    ids=["list", "repair"],
)
def test_gradients_precision_extremes_and_nothing(loss):
    lists = torch.stack([torch.randperm(8)[:3] for _ in range(4)])
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, lists), (logits,))
    half = torch.randn(4, 8).bfloat16()
    assert loss(half, lists).dtype == torch.float32 and loss(half, lists) == loss(half.float(), lists)
    extreme = torch.full((1, 8), -math.inf)
    extreme[0, lists[0]] = torch.tensor([3e4, -3e4, 0.0])
    extreme.requires_grad_()
    value = loss(extreme, lists[:1])
    assert value.isfinite() and torch.autograd.grad(value, extreme)[0].isfinite().all()
    tied = torch.zeros(2, 8, requires_grad=True)
    assert loss(tied, lists[:2]).isfinite()
    assert loss(torch.zeros(0, 8), lists[:0]) == 0.0


def test_bad_input_is_refused(as_users_call):
    z, lists = torch.zeros(1, 4), torch.tensor([[1, 2]])
    for call, message in (
        (
            lambda: list_distillation_loss(z, lists, margin_order=-1),
            "margin_order must be >= 0 and finite, got -1",
        ),
        (lambda: list_distillation_loss(z, lists, num_negatives=0), "num_negatives must be >= 1, got 0"),
        (lambda: list_distillation_loss(z, torch.tensor([[4]])), r"ranked_items must be in \[0, 4\), got 4"),
        (lambda: list_distillation_loss(z, lists.expand(2, 2)), "ranked_items must have 1 rows, got 2"),
        (lambda: list_distillation_loss(z, lists[:, :0]), "at least one item in each row, got none"),
        (
            lambda: list_distillation_loss(z, lists, ignore=torch.zeros(1, 3) > 0),
            "ignore must have 4 columns",
        ),
        (
            lambda: bidirectional_repair_loss(z, lists, k=3),
            r"k must be in \[1, 2\], the length of the lists, got 3",
        ),
        (lambda: bidirectional_repair_loss(z, lists, form="both"), 'form must be "threshold" or "pairwise"'),
        (
            lambda: bidirectional_repair_loss(z, lists, ignore=torch.tensor([[False, True, False, False]])),
            "must not hold ignored items: both sides must leave out the same ones",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for options, message in (
        ({"target": nn.Linear(2, 2)}, r"target must have a method recommend\(histories, k\), got Linear"),
        ({"repair": -1.0}, "repair must be >= 0 and finite, or a schedule, got -1.0"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"form": "both"}, 'form must be "threshold" or "pairwise"'),
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            ListDistillation(**options)


HISTORIES = torch.randint(1, 21, (48, 5), generator=torch.Generator().manual_seed(0))


def new_model(seed: int = 3, dim: int = 8) -> SequentialRecommender:
    torch.manual_seed(seed)
    model = SequentialRecommender(20, dim, max_history=5, dropout=0.0)
    with torch.no_grad():
        model.item_embeddings.normal_()
    return model


TARGET = new_model(7, 12).eval()


def answered(rows: int = 48) -> IndexedDataset:
    return IndexedDataset(HISTORIES[:rows], extras={"ranked_items": TARGET.recommend(HISTORIES[:rows], 6)})


def test_a_small_recommender_learns_the_lists_of_a_large_one():
    before = agreement_at_k(new_model().eval().recommend(HISTORIES, 6), TARGET.recommend(HISTORIES, 6), 6)
    run = coloss.fit(
        new_model(), answered(), None, [ListDistillation()], budget=Budget(steps=80), batch_size=48,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2),
    )  # fmt: skip
    after = agreement_at_k(run.model.recommend(HISTORIES, 6), TARGET.recommend(HISTORIES, 6), 6)
    assert after > max(0.75, before + 0.3)


def test_a_live_target_stays_in_evaluation_mode_and_as_it_was():
    target = SequentialRecommender(20, 12, max_history=5, dropout=0.5)
    before = copy.deepcopy(target.state_dict())
    method = ListDistillation(target, k=6, num_negatives=None)
    step = TrainingStep(new_model(), None, [method])
    step.train()
    assert not target.training
    live = step(HISTORIES)
    lists = target.recommend(HISTORIES, 6)
    stored = TrainingStep(new_model(), None, [ListDistillation(num_negatives=None)])
    told = stored({"inputs": HISTORIES, "ranked_items": lists})
    assert live == told
    step.backward(live)
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_padding_and_seen_items_are_nobodys_negatives():
    """Gradients reach neither the scores of the items of the history nor that of padding."""
    logits = torch.randn(48, 21)
    logits[:, 0] = -math.inf
    logits.requires_grad_()

    class Given(nn.Module):
        def forward(self, histories: Tensor) -> Tensor:
            return logits

    step = TrainingStep(Given(), None, [ListDistillation(num_negatives=None)])
    terms = step(answered().all())
    sum(terms.values()).backward()
    assert not logits.grad.gather(1, HISTORIES).any() and not logits.grad[:, 0].any() and logits.grad.any()


def test_beside_an_objective_every_term_counts():
    data = IndexedDataset(HISTORIES[:, :-1], HISTORIES[:, 1:], extras={
        "ranked_items": TARGET.recommend(HISTORIES[:, :-1], 6)
    })  # fmt: skip
    run = coloss.fit(
        new_model(), data, next_item_loss, [ListDistillation(replace_objective=False)], budget=Budget(steps=2)
    )
    assert set(run.history[-1].terms) == {"next_item", "list", "repair"}
    alone = coloss.fit(new_model(), data, None, [ListDistillation(repair=0)], budget=Budget(steps=2))
    assert set(alone.history[-1].terms) == {"list"}


class Plain(nn.Module):
    """A recommender of the documented interface and nothing more: it lists what was not seen."""

    def recommend(self, histories: Tensor, k: int) -> Tensor:
        return TARGET.recommend(histories, k)


def test_a_target_needs_no_more_than_recommend():
    found = TrainingStep(new_model(), None, [ListDistillation(Plain(), k=6, num_negatives=None)])(HISTORIES)
    known = TrainingStep(
        new_model(), None, [ListDistillation(copy.deepcopy(TARGET), k=6, num_negatives=None)]
    )
    assert found == known(HISTORIES)
    everything = ListDistillation(copy.deepcopy(TARGET), k=20, exclude_seen=False)
    assert all(term.isfinite() for term in TrainingStep(new_model(), None, [everything])(HISTORIES).values())


def test_lists_longer_than_what_is_left_name_the_option():
    with pytest.raises(InputError, match=r"the target has no lists of k = 18 items: k must be in \[1, 1"):
        TrainingStep(new_model(), None, [ListDistillation(copy.deepcopy(TARGET), k=18)])(HISTORIES)


def test_without_lists_or_with_wrong_ones_a_run_says_so():
    model = new_model()
    for batch, options, message in (
        ({"inputs": HISTORIES}, {}, r"batch.extras\['ranked_items'\] must hold a list for each of 48 histories, got NoneType"),
        ({"inputs": HISTORIES, "ranked_items": HISTORIES[:, -2:]}, {}, "the lists do not fit the student: ranked_items must not hold"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            TrainingStep(model, None, [ListDistillation(**options)])(batch)
    with pytest.raises(InputError, match="target must not share parameters with the student"):
        TrainingStep(model, None, [ListDistillation(model)])
    with pytest.raises(
        InputError,
        match=r"the model must return scores \(batch, items\) or NextItemOutputs, got \(48, 5, 8\)",
    ):
        TrainingStep(nn.Embedding(21, 8), None, [ListDistillation()])(answered().all())


class Scores(nn.Module):
    """Scores of all items as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.EmbeddingBag(21, 8, mode="mean")
        self.write = nn.Linear(8, 21)

    def forward(self, histories: Tensor) -> Tensor:
        return self.write(self.read(histories))


def new_scores() -> nn.Module:
    torch.manual_seed(5)
    return Scores()


def test_fit_a_plain_loop_and_lightning_take_the_same_steps():
    batches = [(part, part[:, -1]) for part in HISTORIES.split(16)]
    check_loops(
        new_scores,
        lambda: ListDistillation(copy.deepcopy(TARGET), k=5, replace_objective=False),
        batches,
        F.cross_entropy,
    )


def test_a_killed_run_resumes_bit_identically(tmp_path: Path):
    check_resume(new_model, ListDistillation, answered(), tmp_path, steps=6, kill_at=4, checkpoint_every=2)


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    def train(fabric: Fabric) -> dict[str, Tensor]:
        run = coloss.fit(
            new_model().double(), answered(), None, [ListDistillation(num_negatives=None)], budget=Budget(steps=5),
            batch_size=16, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), fabric=fabric,
        )  # fmt: skip
        return dict(run.model.state_dict())

    check_two_processes(train, tmp_path)
