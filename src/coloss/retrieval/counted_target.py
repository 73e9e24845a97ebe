"""Answers of a recommender to histories: counted, limited, and made less telling by defences."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.metrics.inference import _device
from coloss.retrieval.query_synthesis import Answer


class QueryBudgetError(InputError):
    """More answers were asked for than the budget allows.

    Examples:
        >>> issubclass(QueryBudgetError, InputError)
        True
    """


@dataclass(frozen=True)
class Defence:
    """What an owner can do to answers: shorter lists, some wrong items, fewer queries.

    Args:
        name: in reports.
        list_length: items shown at most; None: all asked for.
        noise: share of the shown items replaced by others, drawn anew at each query, in [0, 1). Drawn anew, it can be averaged away by
            asking twice; a service should remember its answers.
        max_queries: answers given at most; None: as many as asked for.

    Raises:
        InputError: for a value out of range.

    Examples:
        >>> Defence("short lists", list_length=5)
        Defence(name='short lists', list_length=5, noise=0.0, max_queries=None)
    """

    name: str
    list_length: int | None = None
    noise: float = 0.0
    max_queries: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise InputError(f"noise must be in [0, 1), got {self.noise}")
        for name in ("list_length", "max_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")


NO_DEFENCE = Defence("none")


class CountedTarget:
    """Answers histories with ranked lists, counts them, and stops at a budget.

    Args:
        target: a module with `recommend(histories, k)`, which is called in evaluation mode and left in the mode it was in; or a function
            from histories (rows, positions), padded with 0 on the left, to lists (rows, at least k) of item numbers from 1, best first.
            A module is given histories on its own device. A function adapts padding and device to its model, and is responsible for its
            mode.
        k: length of the lists.
        num_items: items are 1 .. num_items.
        budget: histories answered in all; None: no limit.
        defence: what is done to the answers.
        generator: of the noise.

    Attributes:
        asked: histories answered so far.

    Raises:
        InputError: for a target that is neither, or a value out of range; at a call, `QueryBudgetError` beyond the budget, and
            InputError for answers that are no lists of k different items.

    Examples:
        >>> from coloss.nn import SequentialRecommender
        >>> target = CountedTarget(SequentialRecommender(30), k=5, num_items=30, budget=10)
        >>> target(torch.tensor([[3, 4], [0, 9]])).shape, target.asked
        (torch.Size([2, 5]), 2)
    """

    def __init__(
        self,
        target: nn.Module | Answer,
        k: int,
        num_items: int,
        *,
        budget: int | None = None,
        defence: Defence = NO_DEFENCE,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 1 <= k <= num_items:
            raise InputError(f"k must be in [1, {num_items}], the number of items, got {k}")
        if isinstance(target, nn.Module) and not callable(getattr(target, "recommend", None)):
            raise InputError(
                f"target must have a method recommend(histories, k), got {type(target).__name__}"
            )
        if not callable(target):
            raise InputError(f"target must be a module or a function, got {type(target).__name__}")
        self.target, self.num_items = target, num_items
        self.k = k if defence.list_length is None else min(k, defence.list_length)
        limits = [limit for limit in (budget, defence.max_queries) if limit is not None]
        self.budget = min(limits) if limits else None
        self.noise, self.generator = defence.noise, generator
        self.asked = 0

    def __call__(self, histories: Int[Tensor, "rows positions"]) -> Int[Tensor, "rows k"]:
        if self.budget is not None and self.asked + len(histories) > self.budget:
            raise QueryBudgetError(
                f"the budget is {self.budget} queries, got {self.asked + len(histories)} asked for"
            )
        self.asked += len(histories)
        lists = self._lists(histories)
        if self.noise == 0 or not len(lists):
            return lists
        others = torch.ones(len(lists), self.num_items + 1).scatter(1, lists, 0.0)
        others = others.scatter(1, histories.cpu(), 0.0)
        others[:, 0] = 0.0
        # Of items that could stand in their place; where there are too few, the list stays as it is there.
        luck = torch.rand(others.shape, generator=self.generator) * others
        value, replacement = luck.topk(min(self.k, self.num_items), dim=1)
        wrong = (torch.rand(lists.shape, generator=self.generator) < self.noise) & (value[:, : self.k] > 0)
        return torch.where(wrong, replacement[:, : self.k], lists)

    def _lists(self, histories: Tensor) -> Tensor:
        """Lists on the CPU, wherever the target is."""
        module = self.target if isinstance(self.target, nn.Module) else getattr(self.target, "__self__", None)
        asked = histories.to(_device(module)) if isinstance(module, nn.Module) else histories
        with evaluation_mode(module) if isinstance(module, nn.Module) else nullcontext(), torch.no_grad():
            if isinstance(self.target, nn.Module):
                found: Any = self.target.recommend(asked, self.k)  # type: ignore[operator]
            else:
                found = self.target(asked)
        if (
            not isinstance(found, Tensor)
            or found.ndim != 2
            or found.is_floating_point()
            or len(found) != len(histories)
        ):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"target must answer with lists of item numbers ({len(histories)}, k), got {shape}"
            )
        lists = found[:, : self.k].cpu()
        ordered = lists.sort(dim=1).values
        repeats = bool((ordered[:, 1:] == ordered[:, :-1]).any())
        if (
            lists.shape[1] < self.k
            or repeats
            or (len(lists) and not 1 <= int(lists.min()) <= int(lists.max()) <= self.num_items)
        ):
            raise InputError(
                f"target must answer with {self.k} different items of 1 .. {self.num_items}, got {lists[0].tolist()}"
            )
        return lists
