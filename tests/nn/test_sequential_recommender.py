"""The recommender is causal, blind to padding, ties its embeddings, and its loss is the softmax cost over items."""

import math

import pytest
import torch
import torch.nn.functional as F

import coloss
from coloss.nn import SequentialRecommender, next_item_loss, next_item_scores
from coloss.ops import top_items


def new_model(**options):
    torch.manual_seed(1)
    model = SequentialRecommender(12, **({"dim": 8, "max_history": 6, "depth": 2} | options))
    with torch.no_grad():  # as far from the symmetric start as training takes it
        model.item_embeddings.normal_()
    return model.eval()


def test_a_state_sees_no_later_item_and_no_padding():
    model = new_model()
    history = torch.tensor([[0, 3, 5, 7]])
    before = model(history).states
    assert torch.equal(before[:, :3], model(torch.tensor([[0, 3, 5, 9]])).states[:, :3])
    assert not torch.allclose(before[:, 3], model(torch.tensor([[0, 3, 4, 7]])).states[:, 3])
    # The same history, however wide the batch is.
    for wider in (torch.tensor([[3, 5, 7]]), torch.tensor([[0, 0, 0, 3, 5, 7]])):
        torch.testing.assert_close(model(wider).states[:, -3:], before[:, -3:])


def test_scores_take_the_last_items_of_a_long_history_and_never_rank_padding():
    model = new_model()
    long = torch.tensor([[9, 9, 1, 2, 3, 4, 5, 6]])
    torch.testing.assert_close(model.scores(long), model.scores(long[:, -6:]))
    scores = model.scores(long)
    assert scores.shape == (1, 13) and scores[0, 0] == -math.inf and scores[0, 1:].isfinite().all()
    assert not set(model.recommend(long, 5)[0].tolist()) & {0, 1, 2, 3, 4, 5, 6, 9}
    assert model.recommend(long, 12, exclude_seen=False).sort().values.tolist() == [list(range(1, 13))]


def test_an_empty_history_is_answered():
    model = new_model()
    assert torch.equal(model.scores(torch.zeros(1, 0, dtype=torch.int64)), model.scores(torch.tensor([[0]])))


def test_embeddings_are_tied_and_lists_follow_the_scores():
    model = new_model()
    history = torch.tensor([[1, 2]])
    states, items = model(history)
    assert items is model.item_embeddings
    torch.testing.assert_close(model.scores(history)[0, 1:], items[1:] @ states[0, -1])
    assert torch.equal(
        model.recommend(history, 3), top_items(model.scores(history, exclude_seen=True)[:, :], 3)
    )


def test_the_loss_is_cross_entropy_over_real_items():
    model = new_model()
    histories, targets = torch.tensor([[0, 3, 5], [1, 2, 4]]), torch.tensor([[0, 5, 7], [2, 4, 0]])
    states, items = model(histories)
    kept = targets > 0
    expected = F.cross_entropy(states[kept] @ items[1:].T, targets[kept] - 1)
    torch.testing.assert_close(next_item_loss((states, items), targets), expected)
    torch.testing.assert_close(next_item_loss((states, items), targets, negatives=12), expected)
    last = next_item_loss((states, items), torch.tensor([7, 9]))
    torch.testing.assert_close(last, F.cross_entropy(states[:, -1] @ items[1:].T, torch.tensor([6, 8])))


def test_drawn_negatives_give_the_full_loss_in_the_mean():
    states, items = torch.randn(4, 1, 6), torch.randn(41, 6)
    targets = torch.tensor([1, 7, 20, 40])
    full = next_item_loss((states, items), targets)
    generator = torch.Generator().manual_seed(0)
    drawn = [next_item_loss((states, items), targets, negatives=30, generator=generator) for _ in range(200)]
    assert torch.stack(drawn).mean().item() == pytest.approx(full.item(), rel=0.02)
    assert torch.stack(drawn).std() > 0


def test_a_drawn_item_that_is_the_target_is_no_negative():
    states, items = torch.zeros(1, 1, 2), torch.zeros(3, 2)
    states[...] = 1.0
    items[1] = 50.0
    for seed in range(6):
        loss = next_item_loss(
            (states, items), torch.tensor([1]), negatives=1, generator=torch.Generator().manual_seed(seed)
        )
        assert loss < 1e-30  # the target scores 100, the one other item 0


def test_nothing_to_learn_costs_nothing():
    model = new_model()
    for negatives in (None, 3):
        loss = next_item_loss(model(torch.tensor([[0, 0]])), torch.tensor([[0, 0]]), negatives=negatives)
        assert loss == 0.0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("negatives", [None, 5])
def test_half_precision_is_computed_in_float32(negatives):
    states, items = torch.randn(3, 1, 8), torch.randn(9, 8)
    targets, outputs = torch.tensor([1, 2, 8]), (states.bfloat16(), items.bfloat16())
    found = next_item_loss(outputs, targets, negatives=negatives, generator=torch.Generator().manual_seed(0))
    exact = next_item_loss(
        tuple(part.float() for part in outputs), targets, negatives=negatives, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    assert found.dtype == torch.float32 and found == exact
    assert next_item_scores(*outputs)[0, 0].dtype == torch.float32


def test_it_learns_a_cycle():
    """Item i is followed by i + 1: two steps of memory are not needed, one is."""
    start = torch.randint(12, (64, 1))
    histories = (start + torch.arange(7)) % 12 + 1
    model = new_model(dim=16)
    run = coloss.fit(
        model, (histories[:, :-1], histories[:, 1:]), next_item_loss, budget=coloss.Budget(steps=150),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )  # fmt: skip
    assert {name for point in run.history for name in point.terms} == {"next_item"}
    assert model.recommend(torch.tensor([[3, 4, 5], [10, 11, 12]]), 1).tolist() == [[6], [1]]


def test_bad_input_is_refused(as_users_call):
    model = new_model()
    for call, message in (
        (lambda: SequentialRecommender(0), "num_items must be >= 1, got 0"),
        (lambda: model(torch.ones(1, 7, dtype=torch.int64)), "histories must have at most 6 columns, got 7"),
        (
            lambda: model.scores(torch.tensor([[13]])),
            r"histories must hold item numbers in \[0, 12\], got 13",
        ),
        (lambda: model.recommend(torch.tensor([[1]]), 12), r"k must be in \[1, 11\]"),
        (
            lambda: next_item_loss(model(torch.tensor([[1]])), torch.tensor([[13]])),
            r"targets must be in \[0, 13\)",
        ),
        (
            lambda: next_item_loss(model(torch.tensor([[1]])), torch.tensor([[1, 2]])),
            r"targets must have shape \(1, 1\)",
        ),
        (
            lambda: next_item_loss(model(torch.tensor([[1]])), torch.tensor([[1]]), negatives=0),
            "negatives must be >= 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
