"""How well recommenders and click models rank: next-item metrics, and the area under the ROC curve within each user."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coloss.metrics.inference import _device, _moved, evaluation_mode
from coloss.metrics.retrieval import retrieval_metrics
from coloss.ops import accumulation_dtype


def grouped_auc(
    scores: Float[Tensor, " rows"],
    labels: Shaped[Tensor, " rows"],
    groups: Shaped[Tensor, " rows"],
    weighting: Literal["rows", "groups"] = "rows",
) -> float:
    """Area under the ROC curve within each group (user, visit, query), averaged: GAUC.

    The pooled curve also rewards telling busy users from idle ones, which reorders nobody's list.

    Args:
        scores: higher means more likely.
        labels: positive where > 0.
        groups: any numbers; equal ones belong together.
        weighting: `"rows"` weighs each group by its rows, `"groups"` all alike.

    Returns:
        A value in [0, 1], ties counted as half; NaN if no group has both classes. Groups with one class are left out.

    Raises:
        ValueError: if shapes differ, a score is NaN, or the weighting is unknown.

    Cost:
        O(rows * log rows) time.

    Source:
        Zhu et al. 2017 (optimised cost per click), section 5.1; Zhou et al. 2018 (DIN), arXiv 1706.06978, equation 8.

    Examples:
        >>> labels, users = torch.tensor([1, 0, 1, 0]), torch.tensor([7, 7, 8, 8])
        >>> grouped_auc(torch.tensor([0.2, 0.1, 0.9, 0.95]), labels, users)
        0.5
    """
    for name, value in (("labels", labels), ("groups", groups)):
        if value.shape != scores.shape:
            raise ValueError(
                f"{name} must have the shape of scores {tuple(scores.shape)}, got {tuple(value.shape)}"
            )
    if weighting not in ("rows", "groups"):
        raise ValueError(f'weighting must be "rows" or "groups", got {weighting!r}')
    if bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN")
    wide = accumulation_dtype(scores.device)
    _, group = groups.unique(return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    positive = labels > 0
    # Ranks within a group, ties sharing their mean rank: the rank sum of the positives gives the area.
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    by_group, by_score = group[order], scores[order]
    fresh = torch.ones(len(order), dtype=torch.bool, device=scores.device)
    fresh[1:] = (by_group[1:] != by_group[:-1]) | (by_score[1:] != by_score[:-1])
    run = fresh.cumsum(0) - 1
    place = torch.arange(len(order), device=scores.device, dtype=wide)
    size = torch.bincount(run).to(wide) if len(run) else place
    mean_place = torch.zeros_like(size).index_add(0, run, place) / size.clamp(min=1)
    rows = torch.bincount(group, minlength=count).to(wide)
    rank = mean_place[run] - (rows.cumsum(0) - rows)[by_group] + 1

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=wide, device=scores.device).index_add(0, by_group, values)

    hits = positive[order].to(wide)
    positives, rank_sum = total(hits), total(hits * rank)
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    if not bool(both.any()):
        return math.nan
    area = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives).clamp(min=1)
    weight = (rows if weighting == "rows" else torch.ones_like(rows)) * both
    return float((area * weight).sum() / weight.sum())


def evaluate_recommender(
    model: nn.Module,
    data: Any,
    ks: Sequence[int] = (1, 10),
    *,
    exclude_seen: bool = True,
    batch_size: int = 512,
) -> dict[str, float]:
    """How high the item that came next is ranked among all items.

    Args:
        model: has `scores(histories)` and `unwanted(histories, seen=...)`, such as `coloss.nn.SequentialRecommender`.
        data: a part of `coloss.data.InteractionSplits`: inputs (users, positions), targets the next items (users); moved to the model's
            device batch by batch.
        ks: cut-offs >= 1.
        exclude_seen: do not rank the items of the history; a user whose next item is one of them is not counted then.
        batch_size: histories at once.

    Returns:
        `recall@k` and `ndcg@k` for each k, `mrr`, and `users`, the number counted. Ties are broken by item number.

    Raises:
        ValueError: for a k below 1, or data without a user to count.

    Examples:
        >>> from coloss.data import load_interactions
        >>> from coloss.nn import SequentialRecommender
        >>> splits = load_interactions("amazon-video-games", items=50, min_length=8)
        >>> found = evaluate_recommender(SequentialRecommender(splits.num_items), splits.test)
        >>> sorted(found)
        ['mrr', 'ndcg@1', 'ndcg@10', 'recall@1', 'recall@10', 'users']
    """
    names = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")] + ["mrr"]
    totals, users = dict.fromkeys(names, 0.0), 0
    with evaluation_mode(model):
        for indices in torch.arange(len(data)).split(batch_size):
            batch = data.take(indices)
            histories, wanted = _moved((batch.inputs, batch.targets), _device(model))
            ignore = model.unwanted(histories, seen=exclude_seen)  # type: ignore[operator]
            counted = ~ignore.gather(1, wanted[:, None]).squeeze(1)
            if not bool(counted.any()):
                continue
            histories, ignore, wanted = histories[counted], ignore[counted], wanted[counted]
            scores = model.scores(histories)  # type: ignore[operator]
            relevance = torch.zeros_like(ignore).scatter(1, wanted[:, None], True)
            found = retrieval_metrics(scores, relevance, tuple(ks), ignore)
            users += len(wanted)
            for name in names:
                totals[name] += found[name] * len(wanted)
    if not users:
        raise ValueError("data must hold at least one user whose next item can be ranked, got none")
    return {name: total / users for name, total in totals.items()} | {"users": float(users)}
