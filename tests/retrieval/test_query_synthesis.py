"""Made-up histories: prefixes of sequences, drawn as their names say, as many as were asked for."""

import pytest
import torch

from coloss.nn import SequentialRecommender
from coloss.retrieval import FollowingItems, autoregressive_queries, few_shot_queries, random_queries


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder:
    """Answers with the two items after the last one, around a ring of nine."""

    def __init__(self):
        self.asked = []

    def __call__(self, histories):
        self.asked.append(histories)
        return torch.stack([histories[:, -1] % 9 + 1, (histories[:, -1] + 1) % 9 + 1], dim=1)


@pytest.mark.parametrize("make", [random_queries, autoregressive_queries])
@pytest.mark.parametrize("count", [1, 4, 9, 10])
def test_as_many_answers_as_were_asked_for_and_padding_on_the_left(make, count):
    answer = Recorder()
    asked = make(answer, 9, count, 4, generator=seeded())
    assert asked.histories.shape == (count, 4) and asked.lists.shape == (count, 2)
    assert sum(map(len, answer.asked)) == count
    filled = asked.histories > 0
    assert filled[:, -1].all() and (filled[:, 1:] >= filled[:, :-1]).all()
    assert torch.equal(asked.lists, Recorder()(asked.histories))
    assert torch.equal(make(answer, 9, count, 4, generator=seeded()).histories, asked.histories)


def test_random_sequences_hold_no_item_twice_and_each_item_alike():
    asked = random_queries(Recorder(), 9, 4000, 4, generator=seeded())
    full = asked.histories[3::4]
    assert (full.sort(dim=1).values.diff(dim=1) > 0).all()
    share = torch.bincount(full.flatten(), minlength=10)[1:] / full.numel()
    assert (share - 1 / 9).abs().max() < 0.02


def test_autoregressive_sequences_go_on_by_any_listed_item():
    asked = autoregressive_queries(Recorder(), 9, 2000, 4, generator=seeded())
    last = asked.histories[asked.histories[:, -2] > 0]
    step = (last[:, -1] - last[:, -2]) % 9
    assert set(step.tolist()) == {1, 2} and (step == 1).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_what_follows_worked_by_hand():
    following = FollowingItems(torch.tensor([[0, 1, 2], [1, 2, 1], [0, 0, 3]]), num_items=4)
    found = following.probabilities(torch.tensor([1, 3]))
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert not found[:, 0].any() and (found[:, 1:] > 0).all()
    frequency = torch.tensor([3.01, 2.01, 1.01, 0.01]) / 6.04
    torch.testing.assert_close(found[1, 1:], frequency)  # nothing followed item 3
    torch.testing.assert_close(found[0, 1:], frequency / 3 + torch.tensor([0.0, 2 / 3, 0.0, 0.0]))


def model(num_items=9):
    torch.manual_seed(0)
    return SequentialRecommender(num_items, 8, max_history=4, dropout=0.0)


SEQUENCES = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 7], [0, 0, 0, 8]])


def test_real_histories_are_asked_about_first():
    answer = Recorder()
    asked = few_shot_queries(answer, SEQUENCES, 20, model(), real_share=1.0, generator=seeded())
    real = {(0, 0, 0, 1), (0, 0, 1, 2), (0, 1, 2, 3), (0, 0, 0, 5), (0, 0, 5, 6)}
    assert {tuple(row) for row in answer.asked[0].tolist()} == real
    assert len(asked.histories) == 20 and torch.equal(asked.lists, Recorder()(asked.histories))
    # The made-up ones begin with a real user's first item and hold nothing twice.
    made_up = asked.histories[5:]
    begun = made_up.gather(1, (made_up > 0).int().argmax(1, keepdim=True))
    assert set(begun.flatten().tolist()) <= {1, 5}
    for row in made_up.tolist():
        items = [item for item in row if item]
        assert len(set(items)) == len(items)


def test_without_real_histories_the_source_of_the_next_item_is_a_coin():
    asked = few_shot_queries(Recorder(), SEQUENCES, 12, model(), real_share=0.0, generator=seeded())
    assert len(asked.histories) == 12


def test_the_determinant_takes_the_list_where_real_items_stood_in_it():
    """The lists always hold what really came next: made-up sequences then follow the lists alone."""
    ring = torch.stack([(torch.arange(4) + start) % 9 + 1 for start in range(9)])
    asked = few_shot_queries(Recorder(), ring, 200, model(), real_share=0.1, generator=seeded())
    made_up = asked.histories[20:]
    last = made_up[made_up[:, -2] > 0]
    assert set(((last[:, -1] - last[:, -2]) % 9).tolist()) == {1, 2}
    # The better place is drawn twice as often as the second.
    assert ((last[:, -1] - last[:, -2]) % 9 == 1).float().mean().item() == pytest.approx(2 / 3, abs=0.1)


def test_the_model_that_gives_states_is_left_as_it_was():
    one = model().train()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    few_shot_queries(Recorder(), SEQUENCES, 12, one, real_share=0.5, generator=seeded())
    assert one.training and all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_bad_input_is_refused():
    for call, message in (
        (lambda: random_queries(Recorder(), 9, 0, 4), "count must be >= 1, got 0"),
        (lambda: autoregressive_queries(Recorder(), 9, 3, 10), r"max_history must be in \[1, 9\], the number of items, got 10"),
        (lambda: few_shot_queries(Recorder(), SEQUENCES, 4, model(), real_share=1.5), r"real_share must be in \[0, 1\], got 1.5"),
        (lambda: few_shot_queries(Recorder(), SEQUENCES[2:], 4, model()), "sequences must hold one with two items at least"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
