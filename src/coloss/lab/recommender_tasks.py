"""Tasks on who chose what: rank the items shown to a user, or find the one that comes next; from a data set by name, or a table of one's own."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coloss.data import (
    DATASETS,
    IndexedDataset,
    InteractionSplits,
    holds_interactions,
    last_items,
    load_interactions,
)
from coloss.errors import InputError
from coloss.lab.known_tasks import NEXT_ITEM, is_file, task_names, tasks_of
from coloss.metrics import evaluate_recommender, grouped_auc, pooled_auc, predict, retrieval_metrics
from coloss.nn import SequentialRecommender, next_item_loss
from coloss.train.budget import Budget
from coloss.train.schedules import cosine
from coloss.train.task import Task

Part = Literal["validation", "test"]

ITEMS = 1000
"""Of the data sets known by name, the most frequent items that are kept: a run takes seconds then. A table of your own is used whole."""

SHOWN = 10
"""Items shown in each list that is ranked, the chosen one among them."""

JUDGED_USERS = 2000
"""Users that models are judged on at most, drawn by the seed; half as many in validation, which is done many times."""


def holds_choices(name: str, kind: str | None = None, target: str | None = None) -> bool:
    """Whether a task is about users who choose items: by its name, by the kind asked for, or by the columns of a table without a target.

    Examples:
        >>> (
        ...     holds_choices("amazon-video-games"),
        ...     holds_choices("digits"),
        ...     holds_choices("plays.csv", "ranking"),
        ... )
        (True, False, True)
    """
    if name in task_names():
        return any(name in tasks_of(data) for data, info in DATASETS.items() if info.kind == "recommendation")
    if kind is not None:
        return kind in ("ranking", "next-item")
    return target is None and is_file(name) and holds_interactions(name)


def recommender_task(name: str, kind: str | None = None, stamp: str = "", limit: int | None = None) -> Task:
    """The task of a name or table: "ranking", or "next-item" for names that end in `-next` and where that is asked for.

    Args:
        name: of a task, or the path of a table with columns user, item and time.
        kind: "ranking" or "next-item"; default: by the name, for a table "ranking".
        stamp: identifies the content of a file.
        limit: users at most.

    Raises:
        InputError: for a kind that the name does not have, or a table that cannot be read or has too few users.

    Examples:
        >>> recommender_task("amazon-video-games-next", limit=200).kind
        'next-item'
    """
    if not is_file(name):
        task = (next_item_task if name.endswith(NEXT_ITEM) else ranking_task)(
            name, name.removesuffix(NEXT_ITEM), limit=limit
        )
        if kind not in (None, task.kind):
            raise InputError(f"{name} is a {task.kind} task: leave kind out")
        return task
    return (next_item_task if kind == "next-item" else ranking_task)(
        name, Path(name).expanduser(), stamp, limit
    )


def ranking_task(name: str, source: str | Path, stamp: str = "", limit: int | None = None) -> Task:
    """Which of the shown items a user chose, by the items chosen before.

    Each training item stands beside one that the user never chose; in validation and test one stands among ten, drawn in proportion to the
    root of their popularity, so that popularity alone tells little. The default model mixes four experts for each user.

    A model of your own takes (histories (batch, positions), items (batch)) and gives logits (batch); it is built from splits with `num_items`
    and `max_history`.

    Args:
        name: of the task.
        source: what `coloss.data.load_interactions` takes.
        stamp: identifies the content of a file.
        limit: users at most.

    Examples:
        >>> task = ranking_task("amazon-video-games", "amazon-video-games", limit=200)
        >>> task.kind, task.metric, task.objective_name
        ('ranking', 'auc', 'binary-cross-entropy')
    """
    from coloss.retrieval.mixture_ranker import small_mixture_ranker

    load = partial(_shown_items, source, stamp, limit)
    steps = 20 * len(load(0).train) // 256
    return Task(
        name=name,
        kind="ranking",
        title=f"which of {SHOWN} shown items of {Path(source).name} a user chose",
        load=load,
        model=lambda splits: small_mixture_ranker(splits.num_items),
        objective=nn.functional.binary_cross_entropy_with_logits,
        objective_name="binary-cross-entropy",
        validate=lambda model, splits: shown_list_metrics(model, splits.validation),
        test=lambda model, splits: shown_list_metrics(model, splits.test, new_users=True),
        metric="auc",
        budget=Budget(steps=min(max(steps, 300), 2000)),
        batch_size=256,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        learning_rate_schedule=cosine(),
    )


def next_item_task(name: str, source: str | Path, stamp: str = "", limit: int | None = None) -> Task:
    """Which item comes next, among all items, by the items chosen before in their order.

    Each user's last item is for the test, the one before it for validation. Items of the history are not ranked, unless users choose items
    again. The default model is a causal transformer over items; the teacher is a wider and deeper one.

    A model of your own has the interface of `coloss.nn.SequentialRecommender`.

    Args:
        name, source, stamp, limit: as for `ranking_task`.

    Examples:
        >>> task = next_item_task("amazon-video-games-next", "amazon-video-games", limit=200)
        >>> task.kind, task.metric, task.objective_name
        ('next-item', 'ndcg@10', 'next-item')
    """
    load = partial(_next_items, source, stamp, limit)
    steps = 20 * len(load(0).train) // 128
    return Task(
        name=name,
        kind="next-item",
        title=f"which item of {Path(source).name} a user chooses next",
        load=load,
        model=partial(_recommender, dim=32, depth=1),
        objective=next_item_loss,
        objective_name="next-item",
        validate=partial(_judge_recommender, part="validation"),
        test=partial(_judge_recommender, part="test"),
        metric="ndcg@10",
        budget=Budget(steps=min(max(steps, 300), 2000)),
        batch_size=128,
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        teacher=partial(_recommender, dim=64, depth=2),
    )


def shown_list_metrics(
    model: nn.Module, shown: IndexedDataset, *, new_users: bool = False
) -> dict[str, float]:
    """How well a click model ranks lists of shown items.

    Args:
        model: gives a logit for each of (histories, items).
        shown: lists of `SHOWN` rows after one another, as `coloss.data.InteractionSplits.impressions` gives them.
        new_users: judge histories cut to their last item and last three as well, as if the users were new.

    Returns:
        `auc` over all rows, `gauc` within users, and within lists `recall@1`, `recall@3`, `ndcg@3` and `mrr`; with `new_users` also
        `auc_last_1`, `gauc_last_1`, `auc_last_3` and `gauc_last_3`.

    Examples:
        >>> from coloss.retrieval import small_mixture_ranker
        >>> splits = load_interactions("amazon-video-games", items=50, min_length=8)
        >>> shown = splits.impressions("test", negatives=SHOWN - 1)
        >>> sorted(shown_list_metrics(small_mixture_ranker(splits.num_items), shown))
        ['auc', 'gauc', 'mrr', 'ndcg@3', 'recall@1', 'recall@3']
    """
    inputs: Any = shown.inputs
    labels: Any = shown.targets

    def logits(histories: Tensor) -> Tensor:
        return predict(model, IndexedDataset((histories, inputs[1])), 4096).outputs

    def areas(scores: Tensor, ending: str) -> dict[str, float]:
        return {
            f"auc{ending}": float(pooled_auc(scores, labels)),
            f"gauc{ending}": grouped_auc(scores, labels, shown.extras["user"]),
        }

    whole = logits(inputs[0])
    lists = retrieval_metrics(whole.view(-1, SHOWN), labels.view(-1, SHOWN) > 0, (1, 3))
    found = areas(whole, "") | {name: lists[name] for name in ("recall@1", "recall@3", "ndcg@3", "mrr")}
    if new_users:
        for count in (1, 3):
            found |= areas(logits(last_items(inputs[0], count)), f"_last_{count}")
    return found


def _recommender(splits: Any, dim: int, depth: int) -> nn.Module:
    return SequentialRecommender(splits.num_items, dim, depth=depth, max_history=splits.max_history)


def _judge_recommender(model: nn.Module, splits: Any, part: Part) -> Mapping[str, float]:
    return evaluate_recommender(model, getattr(splits, part), (1, 10), exclude_seen=not _chosen_again(splits))


def _chosen_again(splits: InteractionSplits) -> bool:
    """Whether some user chose an item more than once, as listeners do and reviewers do not."""
    owner = np.repeat(np.arange(len(splits.start) - 1), np.diff(splits.start))
    pairs = owner * (splits.num_items + 1) + splits.sequence
    return len(np.unique(pairs)) < len(pairs)


# As for other data: a set is used by every arm of a seed in turn.
@lru_cache(maxsize=3)
def _sequences(source: str | Path, stamp: str, limit: int | None, seed: int) -> InteractionSplits:
    """`stamp` makes a file that changed another entry of the cache. The split is in time: a seed draws users where there is a limit."""
    named = isinstance(source, str)
    return load_interactions(
        source,
        items=ITEMS if named else None,
        users=limit,
        min_length=5 if named else 3,
        max_history=10,
        seed=seed,
    )


@lru_cache(maxsize=3)
def _next_items(source: str | Path, stamp: str, limit: int | None, seed: int) -> InteractionSplits:
    splits = _sequences(source, stamp, limit, seed)
    return replace(
        splits,
        validation=_some_users(splits.validation, JUDGED_USERS // 2, seed),
        test=_some_users(splits.test, JUDGED_USERS, seed),
    )


@lru_cache(maxsize=3)
def _shown_items(source: str | Path, stamp: str, limit: int | None, seed: int) -> InteractionSplits:
    """Parts hold impressions in place of sequences."""
    splits = _sequences(source, stamp, limit, seed)
    shown = partial(splits.impressions, popularity_power=0.5, seed=seed)
    return replace(
        splits,
        train=shown("train", negatives=1),
        validation=_some_users(shown("validation", negatives=SHOWN - 1), JUDGED_USERS // 2, seed, SHOWN),
        test=_some_users(shown("test", negatives=SHOWN - 1), JUDGED_USERS, seed, SHOWN),
    )


def _some_users(data: IndexedDataset, count: int, seed: int, rows: int = 1) -> IndexedDataset:
    """At most so many users, of whom each has so many rows after one another."""
    users = len(data) // rows
    if users <= count:
        return data
    chosen = torch.randperm(users, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return data.subset((chosen[:, None] * rows + torch.arange(rows)).flatten())
