"""A small recommender that reads a history of items in order: a causal transformer with tied item embeddings."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.nn.token_encoder import TokenEncoder
from coloss.nn.tokenizers import Words
from coloss.ops import decoupled_softmax_loss, full_precision, masked_logsumexp, top_items, without_autocast


class NextItemOutputs(NamedTuple):
    """What a recommender knows after each item of a history, and the items it chooses from.

    The score of item i after position t is the inner product of `states[:, t]` and `items[i]`.

    Attributes:
        states: (batch, positions, dim).
        items: (num_items + 1, dim), by item number; row 0 is padding and stands for no item.
    """

    states: Tensor
    items: Tensor


class SequentialRecommender(nn.Module):
    """Scores the item that comes next, from the items before it in their order.

    A causal `TokenEncoder` reads the history; its output at a position is compared with the embeddings of all items, the same that the
    history was read with. Histories are int64 with 0 for padding, on the left: the last column is the most recent item.

    Args:
        num_items: items are 1 .. num_items.
        dim: of embeddings and states.
        depth: transformer blocks.
        heads: of attention; divides `dim`.
        max_history: the longest history.
        dropout: in [0, 1).

    Returns:
        From `forward(histories)`: `NextItemOutputs`, for `next_item_loss`. `scores` and `recommend` answer for the position after the last.

    Raises:
        ValueError: for impossible sizes, or a longer history in `forward` (`scores` takes the last `max_history` items).

    Source:
        Kang, McAuley 2018 (SASRec), arXiv 1808.09781; here with the pre-norm blocks of `coloss.nn`.

    Examples:
        >>> model = SequentialRecommender(num_items=50, dim=16, max_history=6)
        >>> histories = torch.tensor([[0, 0, 3, 9, 4, 7]])
        >>> model(histories).states.shape, model.eval().recommend(histories, 5).shape
        (torch.Size([1, 6, 16]), torch.Size([1, 5]))
    """

    def __init__(
        self,
        num_items: int,
        dim: int = 32,
        *,
        depth: int = 1,
        heads: int = 2,
        max_history: int = 20,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(f"num_items must be >= 1, got {num_items}")
        self.num_items, self.max_history = num_items, max_history
        words = Words(num_items + 1, dim, max_history, padding_id=0)
        self.encoder = TokenEncoder(words, dim, depth, heads, causal=True, pool="none", dropout=dropout)

    @property
    def item_embeddings(self) -> nn.Parameter:
        """(num_items + 1, dim), by item number; row 0 belongs to padding."""
        weight: nn.Parameter = self.encoder.tokenizer.embedding.weight  # type: ignore[union-attr, assignment]
        return weight

    def forward(self, histories: Int[Tensor, "batch positions"]) -> NextItemOutputs:
        missing = self.max_history - histories.shape[1]
        if missing < 0:
            raise ValueError(
                f"histories must have at most {self.max_history} columns, got {histories.shape[1]}"
            )
        # Positions are counted from the most recent item, whatever the width of the batch.
        states = self.encoder(F.pad(histories, (missing, 0)))
        return NextItemOutputs(states[:, missing:], self.item_embeddings)

    def scores(
        self, histories: Int[Tensor, "batch positions"], *, exclude_seen: bool = False
    ) -> Float[Tensor, "batch outputs"]:
        """Scores of all items to come next; minus infinity for padding.

        Args:
            histories: of any width; the last `max_history` columns count.
            exclude_seen: minus infinity also for the items of the history.

        Returns:
            (batch, num_items + 1), by item number.

        Raises:
            ValueError: for item numbers outside 0 .. num_items.

        Examples:
            >>> model = SequentialRecommender(4).eval()
            >>> model.scores(torch.tensor([[3, 1]]), exclude_seen=True).isinf()
            tensor([[ True,  True, False,  True, False]])
        """
        unwanted = self.unwanted(histories, seen=exclude_seen)
        if histories.shape[1] == 0:
            histories = histories.new_zeros(len(histories), 1)
        states, items = self(histories[:, -self.max_history :])
        return next_item_scores(states[:, -1], items).masked_fill(unwanted, -math.inf)

    def recommend(
        self, histories: Int[Tensor, "batch positions"], k: int = 10, *, exclude_seen: bool = True
    ) -> Int[Tensor, "batch k"]:
        """The k best items to come next, best first; ties by item number.

        Args:
            histories: as for `scores`.
            k: length of the lists, at most the number of items that may be listed.
            exclude_seen: leave out the items of the history.

        Raises:
            ValueError: for item numbers or a `k` out of range.

        Examples:
            >>> SequentialRecommender(3).eval().recommend(torch.tensor([[3]]), 2).sort().values
            tensor([[1, 2]])
        """
        unwanted = self.unwanted(histories, seen=exclude_seen)
        return top_items(self.scores(histories), k, unwanted)

    def unwanted(
        self, histories: Int[Tensor, "batch positions"], *, seen: bool = True
    ) -> Bool[Tensor, "batch outputs"]:
        """True for what may not be recommended: padding and, if so asked, the items of the history.

        Examples:
            >>> SequentialRecommender(3).unwanted(torch.tensor([[0, 2]]))
            tensor([[ True, False,  True, False]])
        """
        if histories.numel() and not 0 <= int(histories.min()) <= int(histories.max()) <= self.num_items:
            wrong = histories[(histories < 0) | (histories > self.num_items)][0]
            raise ValueError(f"histories must hold item numbers in [0, {self.num_items}], got {int(wrong)}")
        mask = torch.zeros(len(histories), self.num_items + 1, dtype=torch.bool, device=histories.device)
        mask[:, 0] = True
        return mask.scatter(1, histories, True) if seen else mask


def next_item_scores(
    states: Float[Tensor, "*positions dim"], items: Float[Tensor, "outputs dim"]
) -> Float[Tensor, "*positions outputs"]:
    """Inner products of states with item embeddings, at least float32; minus infinity for row 0, which is padding.

    Examples:
        >>> next_item_scores(torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 9.0], [0.5, 2.0]]))
        tensor([[  -inf, 0.5000]])
    """
    with without_autocast(states.device):
        scores = full_precision(states) @ full_precision(items).T
    padding = torch.arange(len(items), device=items.device) == 0
    return scores.masked_fill(padding, -math.inf)


def next_item_loss(
    outputs: tuple[Tensor, Tensor],
    targets: Int[Tensor, "batch *positions"],
    *,
    negatives: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Softmax cost of the item that came next among all items, or among a few drawn ones.

    $\frac1{|A|} \sum_{t \in A} [\log \sum_i e^{s_{ti}} - s_{t y_t}]$ over the positions $A$ with a target $y_t \ne 0$. With `negatives`, the
    sum over the items other than $y_t$ is estimated from as many that are drawn evenly, the same for all positions.

    Args:
        outputs: (states, item embeddings), as `SequentialRecommender` returns them.
        targets: number of the next item at each position, 0 for none; or one for each row, which belongs to its last position.
        negatives: items to draw, >= 1; None takes all. All of them drawn is the same as None.
        generator: of the draw.

    Returns:
        A scalar, at least float32; 0 without a target.

    Raises:
        ValueError: if shapes disagree, a target is no item, or `negatives` < 1.

    Cost:
        O(positions * items * dim) time, in memory that does not hold all scores at once; with `negatives`, those instead of the items.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = SequentialRecommender(50, 16)
        >>> loss = next_item_loss(model(torch.tensor([[4, 8, 3]])), torch.tensor([[8, 3, 0]]))
        >>> bool((loss - math.log(50)).abs() < 0.1)  # nothing is learnt yet
        True
    """
    states, items = outputs
    if negatives is not None and negatives < 1:
        raise ValueError(f"negatives must be >= 1, got {negatives}")
    if targets.ndim == 1:
        states = states[:, -1]
    if states.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have shape {tuple(states.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(items):
        raise ValueError(
            f"targets must be in [0, {len(items)}), got {int(targets.min())} to {int(targets.max())}"
        )
    rows = targets > 0
    wanted, queries = targets[rows] - 1, states[rows]
    keys = items[1:]
    if negatives is None or negatives >= len(keys):
        place = torch.arange(len(wanted), device=wanted.device)
        pairs = torch.stack([place, wanted])
        return decoupled_softmax_loss(queries, keys, pairs, 1.0, across_processes=False)
    device = keys.device if generator is None else generator.device
    drawn = torch.randperm(len(keys), generator=generator, device=device)[:negatives].to(keys.device)
    queries, keys = full_precision(queries), full_precision(keys)
    with without_autocast(keys.device):
        scores = queries @ keys[drawn].T
        own = (queries * keys[wanted]).sum(1)
    other = drawn != wanted[:, None]
    # Each drawn item stands for as many of the others.
    weight = ((len(keys) - 1) / other.sum(1).clamp(min=1)).log()
    cost = F.softplus(masked_logsumexp(scores, other) + weight - own)
    return cost.sum() / max(len(cost), 1)
