"""Histories to ask one's own recommender about, made up in three ways, and its answers: what a copy of it would be trained on.

Every answered history counts as one query. A sequence of T items gives T queries, one after each item.

- random: items drawn evenly.
- autoregressive: each next item drawn evenly from the list that was answered (Yue et al. 2021, arXiv 2109.01165).
- few-shot: sequences begin as those of a few real users; a gate that saw whether real next items stand in the lists decides between the
  list, its best places more likely, and what followed the last item among the real users (arXiv 2411.11677, 2024: our reading of a
  "probabilistic interaction sampler" and a "synthesis determinant signal" whose formulas could not be confirmed).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.metrics import predict
from coloss.nn import SequentialRecommender

Answer = Callable[[Tensor], Tensor]
"""Histories (rows, positions) to ranked lists (rows, k)."""


class Queries(NamedTuple):
    """Histories, padded with 0 on the left, and the lists that they were answered with.

    Attributes:
        histories: (queries, max_history).
        lists: (queries, k), best first.
    """

    histories: Tensor
    lists: Tensor


def random_queries(
    answer: Answer,
    num_items: int,
    count: int,
    max_history: int,
    *,
    generator: torch.Generator | None = None,
) -> Queries:
    """Answers to sequences of items drawn evenly, without repeats.

    Args:
        answer: gives the lists.
        num_items: items are 1 .. num_items.
        count: queries to ask, >= 1.
        max_history: items in a sequence.
        generator: of the draw.

    Raises:
        ValueError: if `count` or `max_history` is below 1, or there are fewer items than a sequence needs.

    Examples:
        >>> asked = random_queries(lambda histories: histories[:, -2:] + 1, 9, count=7, max_history=3)
        >>> asked.histories.shape, (asked.histories[:3] > 0).sum(1)
        (torch.Size([7, 3]), tensor([1, 2, 3]))
    """
    _check(num_items, count, max_history)
    sequences = -(-count // max_history)
    drawn = torch.rand(sequences, num_items, generator=generator).topk(max_history, dim=1).indices + 1
    histories = _prefixes(drawn)[:count]
    return Queries(histories, answer(histories))


def autoregressive_queries(
    answer: Answer,
    num_items: int,
    count: int,
    max_history: int,
    *,
    generator: torch.Generator | None = None,
) -> Queries:
    """Answers to sequences that grow by an item drawn evenly from the last answer; the first is drawn from all.

    Args:
        answer, num_items, count, max_history, generator: as for `random_queries`.

    Raises:
        ValueError: as for `random_queries`.

    Source:
        Yue et al. 2021, arXiv 2109.01165, section 4.1.

    Examples:
        >>> asked = autoregressive_queries(lambda histories: histories[:, -1:] % 9 + 1, 9, 6, max_history=3)
        >>> bool(((asked.histories[3:, -1] - asked.histories[3:, -2]) % 9 == 1).all())
        True
    """
    _check(num_items, count, max_history)
    sequences = -(-count // max_history)
    first = torch.randint(1, num_items + 1, (sequences, 1), generator=generator)

    def draw(histories: Tensor, lists: Tensor) -> Tensor:
        place = torch.randint(lists.shape[1], (len(lists), 1), generator=generator)
        return lists.gather(1, place)

    return _grow(answer, F.pad(first, (max_history - 1, 0)), draw, count)


@dataclass
class FollowingItems:
    """What comes after an item among a few real users: counts of pairs, mixed with how frequent items are.

    p(i | last) = (1 - b) * count(last, i) / count(last) + b * count(i) / total, with b = 1 / (1 + count(last)): the more often an item was
    followed by something, the more the pairs count. Items that no user has stay possible, at a hundredth of a count.

    Args:
        sequences: of the real users, padded with 0.
        num_items: items are 1 .. num_items.

    Examples:
        >>> following = FollowingItems(torch.tensor([[1, 2, 1, 2]]), num_items=2)
        >>> [[round(p, 2) for p in row] for row in following.probabilities(torch.tensor([1])).tolist()]
        [[0.0, 0.17, 0.83]]
    """

    sequences: Int[Tensor, "users positions"]
    num_items: int

    def __post_init__(self) -> None:
        size = self.num_items + 1
        before, after = self.sequences[:, :-1].flatten(), self.sequences[:, 1:].flatten()
        real = (before > 0) & (after > 0)
        pairs = torch.bincount(before[real] * size + after[real], minlength=size * size).float()
        self._pairs = pairs.view(size, size)
        counts = torch.bincount(self.sequences.flatten(), minlength=size).float()
        counts[0] = 0.0
        self._frequency = (counts + 0.01) / (counts + 0.01)[1:].sum()
        self._frequency[0] = 0.0

    def probabilities(self, last: Int[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:
        """(rows, num_items + 1), by item number; 0 for padding."""
        pairs = self._pairs[last]
        seen = pairs.sum(1, keepdim=True)
        back_off = 1 / (1 + seen)
        return (1 - back_off) * pairs / seen.clamp(min=1) + back_off * self._frequency


def few_shot_queries(
    answer: Answer,
    sequences: Int[Tensor, "users positions"],
    count: int,
    model: SequentialRecommender,
    *,
    real_share: float = 0.25,
    generator: torch.Generator | None = None,
) -> Queries:
    """Answers to histories of a few real users, and to sequences that go on from their first item as theirs might have.

    The first share of the queries asks about real histories. Whether the real next item stands in the answer teaches a logistic
    regression on the states h(x) of `model`, rho(x) = sigma(w^T h(x) + b). A made-up sequence then goes on, with probability rho(x), by an
    item of the list, the one at place r with weight 1 / r; else by one that follows the last item among the real users
    (`FollowingItems`). Items of the sequence itself are not drawn again.

    Args:
        answer: gives the lists.
        sequences: of the real users, padded with 0 on the left.
        count: queries to ask, >= 1.
        model: trained on the real sequences.
        real_share: of the queries that ask about real histories, in [0, 1]; fewer where there are not as many.
        generator: of all draws.

    Raises:
        ValueError: if a value is out of range, or no sequence has two items.

    Source:
        arXiv 2411.11677, 2024: a reading of its description.

    Examples:
        >>> sequences = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
        >>> model = SequentialRecommender(9, 8, max_history=4)
        >>> asked = few_shot_queries(
        ...     lambda histories: model.eval().recommend(histories, 2), sequences, 12, model
        ... )
        >>> asked.histories.shape, asked.lists.shape
        (torch.Size([12, 4]), torch.Size([12, 2]))
    """
    _check(model.num_items, count, model.max_history)
    if not 0 <= real_share <= 1:
        raise ValueError(f"real_share must be in [0, 1], got {real_share}")
    real, following = _real_steps(sequences, model.max_history)
    if not len(real):
        raise ValueError("sequences must hold one with two items at least, got none")
    chosen = torch.randperm(len(real), generator=generator)[: round(real_share * count)]
    asked = [Queries(real[chosen], answer(real[chosen]))] if len(chosen) else []
    hits = (asked[0].lists == following[chosen, None]).any(1) if asked else torch.zeros(0, dtype=torch.bool)
    rho = _determinant(model, real[chosen], hits)
    left = count - len(chosen)
    if left:
        begun = -(-left // model.max_history)
        starts = real[torch.randint(len(real), (begun,), generator=generator)]
        first = starts.gather(1, (starts > 0).int().argmax(1, keepdim=True))
        after = FollowingItems(sequences, model.num_items)

        def draw(histories: Tensor, lists: Tensor) -> Tensor:
            from_list = torch.zeros(len(lists), model.num_items + 1)
            weights = 1 / torch.arange(1.0, lists.shape[1] + 1)
            from_list.scatter_(1, lists, weights.expand(lists.shape))
            listed = torch.rand(len(lists), generator=generator) < rho(histories)
            chances = torch.where(listed[:, None], from_list, after.probabilities(histories[:, -1]))
            fresh = chances.scatter(1, histories, 0.0)
            # Where nothing fresh is left, anything goes.
            fresh = torch.where(fresh.sum(1, keepdim=True) > 0, fresh, after.probabilities(histories[:, -1]))
            return torch.multinomial(fresh, 1, generator=generator)

        asked.append(_grow(answer, F.pad(first, (model.max_history - 1, 0)), draw, left))
    return Queries(*(torch.cat(parts) for parts in zip(*asked, strict=True)))


def _determinant(model: SequentialRecommender, real: Tensor, hits: Tensor) -> Callable[[Tensor], Tensor]:
    """The probability that the next item stands in the list, for histories; of real ones it is known."""
    from sklearn.linear_model import LogisticRegression

    def states(histories: Tensor) -> Tensor:
        return predict(model, histories, call=lambda rows: model(rows).states[:, -1]).outputs

    if int(hits.sum()) in (0, len(hits)):  # nothing to tell apart
        share = float(hits.float().mean()) if len(hits) else 0.5
        return lambda histories: torch.full((len(histories),), share)
    regression = LogisticRegression(max_iter=300).fit(states(real).numpy(), hits.numpy())
    return lambda histories: torch.from_numpy(regression.predict_proba(states(histories).numpy())[:, 1])


def _real_steps(sequences: Tensor, max_history: int) -> tuple[Tensor, Tensor]:
    """Every real history that something followed, and what followed."""
    users, positions = (sequences[:, 1:] > 0).nonzero(as_tuple=True)
    place = positions[:, None] + torch.arange(1 - max_history, 1)
    histories = sequences[users[:, None], place.clamp(min=0)] * (place >= 0)
    begun = histories[:, -1] > 0
    return histories[begun], sequences[users, positions + 1][begun]


def _prefixes(sequences: Tensor) -> Tensor:
    """What is known after each item of each sequence, padded on the left."""
    length = sequences.shape[1]
    place = torch.arange(length)[:, None] + torch.arange(1 - length, 1)
    return (sequences[:, place.clamp(min=0)] * (place >= 0)).flatten(0, 1)


def _grow(answer: Answer, histories: Tensor, draw: Callable[[Tensor, Tensor], Tensor], count: int) -> Queries:
    """Ask about histories of one item and what they grow into, up to their full length and `count` queries."""
    asked: list[Queries] = []
    while count > 0:
        histories = histories[:count]
        lists = answer(histories)
        asked.append(Queries(histories, lists))
        count -= len(histories)
        if count > 0:
            histories = torch.cat([histories[:, 1:], draw(histories, lists)], dim=1)
    return Queries(*(torch.cat(parts) for parts in zip(*asked, strict=True)))


def _check(num_items: int, count: int, max_history: int) -> None:
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if not 1 <= max_history <= num_items:
        raise ValueError(f"max_history must be in [1, {num_items}], the number of items, got {max_history}")
