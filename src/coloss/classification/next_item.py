"""The small experiment on which the many-class claim is measured: which of 23,715 video games a customer reviews next."""

from collections.abc import Mapping
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits, load_raw
from coloss.metrics import evaluation_mode
from coloss.train import Budget, Task

HISTORY = 5
"""Earlier items that a prediction sees."""

TEST_USERS = 2000
"""Customers whose last item is predicted; writing out all logits for more takes longer than training."""


class NextItem(nn.Module):
    """Scores every item from the sum of learned embeddings of the last few.

    Args:
        items: number of items; the number itself stands for "none".
        width: of embeddings and features.

    Examples:
        >>> NextItem(items=10, width=4)(torch.tensor([[3, 7, 10, 10, 10]])).shape
        torch.Size([1, 10])
    """

    def __init__(self, items: int, width: int = 64) -> None:
        super().__init__()
        # Sparse gradients: else the optimizer would walk through all embeddings at each step, whatever the output layer costs.
        self.embedding = nn.EmbeddingBag(items + 1, width, mode="sum", padding_idx=items, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, items)

    def forward(self, history: Int[Tensor, "batch history"]) -> Float[Tensor, "batch outputs"]:
        return self.head(torch.relu(self.hidden(self.embedding(history))))


def next_item_task(budget: Budget) -> Task:
    """All users' items but their last two for training, the one before last for validation, the last for the test.

    Args:
        budget: of each arm.

    Examples:
        >>> next_item_task(Budget(steps=1)).metric
        'top_10'
    """
    return Task(
        name="next-video-game",
        kind="classification",
        title="which of 23,715 video games a customer reviews next, from the last five",
        load=_load,
        model=lambda splits: NextItem(splits.num_classes),
        objective=nn.functional.cross_entropy,
        objective_name="cross-entropy",
        validate=lambda model, splits: {},
        test=lambda model, splits: top_accuracies(model, splits.test),
        metric="top_10",
        budget=budget,
        batch_size=256,
        optimizer=partial(torch.optim.Adagrad, lr=0.05),
        learning_rate_schedule=None,
        evaluate_every=10**9,
    )


def top_accuracies(
    model: nn.Module, data: IndexedDataset, places: tuple[int, ...] = (1, 10, 50)
) -> Mapping[str, float]:
    """How often the right class is among the k highest scores, and the mean reciprocal rank; ties count against it.

    Args:
        model: gives logits.
        data: inputs and classes.
        places: the k.

    Examples:
        >>> data = IndexedDataset(torch.eye(3), torch.tensor([0, 1, 0]))
        >>> found = top_accuracies(nn.Identity(), data, places=(1,))
        >>> round(found["top_1"], 3), round(found["mean_reciprocal_rank"], 3)
        (0.667, 0.778)
    """
    ranks = []
    with evaluation_mode(model):
        # A batch of all customers' logits would take gigabytes.
        for indices in torch.arange(len(data)).split(500):
            batch = data.take(indices)
            scores = model(batch.inputs)
            assert isinstance(batch.targets, Tensor)
            ranks.append((scores >= scores.gather(1, batch.targets[:, None])).sum(1))
    rank = torch.cat(ranks).double()
    found = {f"top_{place}": float((rank <= place).double().mean()) for place in places}
    return found | {"mean_reciprocal_rank": float(rank.reciprocal().mean())}


@lru_cache(maxsize=1)
def _histories() -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """Number of items; and by part, the last items before each item, newest first, and the item itself."""
    raw = load_raw("amazon-video-games")
    item, length = raw["item"].astype(np.int64), raw["length"].astype(np.int64)
    items = int(item.max()) + 1
    place = np.arange(len(item)) - np.repeat(raw["start"], length)
    left = np.repeat(length, length) - 1 - place
    before = [
        np.where(place >= back, item[np.maximum(np.arange(len(item)) - back, 0)], items)
        for back in range(1, HISTORY + 1)
    ]
    history = np.stack(before, axis=1)
    parts = {}
    for name, chosen in (("train", left >= 2), ("validation", left == 1), ("test", left == 0)):
        rows = chosen & (place >= 1)
        parts[name] = torch.from_numpy(history[rows]), torch.from_numpy(item[rows])
    return items, parts


def _load(seed: int) -> Splits:
    items, parts = _histories()
    found, first = {}, 0
    for name, (history, item) in parts.items():
        data = IndexedDataset(history, item, torch.arange(first, first + len(item)))
        first += len(item)
        if name != "train":
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            data = data.subset(order[:TEST_USERS])
        found[name] = data
    return Splits(
        "next-video-game",
        "classification",
        found["train"],
        found["validation"],
        found["test"],
        input_shape=(HISTORY,),
        num_classes=items,
    )
