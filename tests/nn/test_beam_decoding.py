import itertools

import pytest
import torch
from torch import Tensor

from coloss.nn import beam_search

END = 3


def random_model(seed: int) -> Tensor:
    """Log-probabilities of the next token by the last two."""
    return torch.randn(5, 5, 4, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def next_logits(table: Tensor, ids: Tensor) -> Tensor:
    return table[ids[:, -2], ids[:, -1]]


def best_by_trying_all(
    table: Tensor, start: list[int], longest: int, penalty: float
) -> tuple[list[int], float]:
    found = []
    for length in range(1, longest + 1):
        for written in itertools.product(range(4), repeat=length):
            if END in written[:-1] or (written[-1] != END and length < longest):
                continue
            ids, total = [*start], 0.0
            for token in written:
                total += table[ids[-2], ids[-1], token].item()
                ids.append(token)
            found.append((list(written), total / length**penalty))
    return max(found, key=lambda pair: pair[1])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(penalty: float) -> None:
    for seed in range(3):
        table = random_model(seed)
        start = torch.tensor([[4, 4], [4, 0]])
        found = beam_search(
            lambda ids, table=table: next_logits(table, ids),
            start,
            end_id=END,
            max_tokens=3,
            beams=64,
            length_penalty=penalty,
        )
        for row, first in enumerate(start.tolist()):
            written, score = best_by_trying_all(table, first, 3, penalty)
            assert [token for token in found.ids[row, 0].tolist() if token >= 0] == written
            assert found.scores[row, 0].item() == pytest.approx(score, rel=1e-5)


def test_one_beam_is_greedy() -> None:
    table = random_model(5)
    found = beam_search(
        lambda ids: next_logits(table, ids), torch.tensor([[4, 4]]), end_id=END, max_tokens=4, beams=1
    )
    ids = [4, 4]
    while len(ids) < 6 and ids[-1] != END:
        ids.append(int(table[ids[-2], ids[-1]].argmax()))
    assert [token for token in found.ids[0, 0].tolist() if token >= 0] == ids[2:]


def test_a_text_that_nothing_may_follow_leaves_the_others_as_they_are() -> None:
    likely = torch.tensor(
        [[-torch.inf, 1.0, 2.0, -1.0], [-torch.inf] * 4, [0.0, -torch.inf, -torch.inf, 1.0], [0.0] * 4]
    )
    found = beam_search(
        lambda ids: likely[ids[:, -1]], torch.tensor([[0], [1]]), end_id=END, max_tokens=2, beams=3
    )
    assert found.ids[0].tolist() == [[2, 3], [2, 0], [3, -1]]
    assert not found.scores.isnan().any()
    assert (found.ids[1] == -1).all()
    assert (found.scores[1] == -torch.inf).all()


def test_beams_are_sorted_distinct_and_filled_with_nothing() -> None:
    table = random_model(1)
    found = beam_search(
        lambda ids: next_logits(table, ids), torch.tensor([[4, 4]]), end_id=END, max_tokens=1, beams=6
    )
    assert found.scores[0].sort(descending=True).values.equal(found.scores[0])
    assert sorted(found.ids[0, :4, 0].tolist()) == [0, 1, 2, 3]
    assert found.ids[0, 4:].eq(-1).all()
    assert found.scores[0, 4:].isinf().all()


def test_bad_input_is_named() -> None:
    start = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="beams must be >= 1, got 0"):
        beam_search(lambda ids: ids, start, end_id=1, max_tokens=1, beams=0)
    with pytest.raises(ValueError, match="max_tokens must be >= 1, got 0"):
        beam_search(lambda ids: ids, start, end_id=1, max_tokens=0)
    with pytest.raises(ValueError, match="start must have at least one token"):
        beam_search(lambda ids: ids, start[:, :0], end_id=1, max_tokens=1)
