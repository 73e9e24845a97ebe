"""The small experiment on which the gate contrast is measured: which shown video game a customer chose, with all or little of the history."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits, last_items, load_interactions
from coloss.metrics import grouped_auc, pooled_auc, predict
from coloss.nn import MLP
from coloss.retrieval.mixture_ranker import HistoryInput, MixtureRanker, small_mixture_ranker
from coloss.train import Budget, Task, cosine


def click_metrics(model: nn.Module, shown: IndexedDataset) -> Mapping[str, float]:
    """How well a ranker tells chosen items from others, with whole histories and with only the most recent items of each.

    Args:
        model: gives a logit for (histories, items).
        shown: from `InteractionSplits.impressions`.

    Returns:
        `auc` over all rows and `gauc` within users; `auc_last_1`, `gauc_last_1`, `auc_last_3` and `gauc_last_3` for histories cut to so
        many items, as if the user were new; and `auc_drop`, how far the AUC falls when only the last item is known.

    Examples:
        >>> splits = load_interactions("amazon-video-games", items=50, min_length=6)
        >>> sorted(click_metrics(small_mixture_ranker(splits.num_items), splits.impressions("test")))
        ['auc', 'auc_drop', 'auc_last_1', 'auc_last_3', 'gauc', 'gauc_last_1', 'gauc_last_3']
    """
    inputs: Any = shown.inputs
    labels: Any = shown.targets
    found = {}
    for ending, histories in [
        ("", inputs[0]),
        *((f"_last_{count}", last_items(inputs[0], count)) for count in (1, 3)),
    ]:
        logits: Tensor = predict(model, IndexedDataset((histories, inputs[1])), 4096).outputs
        found[f"auc{ending}"] = float(pooled_auc(logits, labels))
        found[f"gauc{ending}"] = grouped_auc(logits, labels, shown.extras["user"])
    return found | {"auc_drop": found["auc"] - found["auc_last_1"]}


def shown_items_task(budget: Budget) -> Task:
    """Every training item of a customer beside one never chosen; for validation and test, one beside nine.

    The other items are drawn in proportion to the root of their popularity, so that popularity alone tells little.

    Args:
        budget: of each arm.

    Examples:
        >>> shown_items_task(Budget(steps=1)).metric
        'auc_last_1'
    """
    return Task(
        name="shown-video-games",
        kind="classification",
        title="which of the shown video games a customer chose, among the 200 most reviewed",
        load=_load,
        model=lambda splits: small_mixture_ranker(splits.num_classes),
        objective=F.binary_cross_entropy_with_logits,
        objective_name="mixture",
        validate=lambda model, splits: {},
        test=lambda model, splits: click_metrics(model, splits.test),
        metric="auc_last_1",
        budget=budget,
        batch_size=256,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        learning_rate_schedule=cosine(),
        evaluate_every=10**9,
    )


def tower(num_items: int) -> MixtureRanker:
    """One wide expert without a gate, of about as many parameters as the mixture: the ranker of DIN.

    Examples:
        >>> one, mixture = tower(200), small_mixture_ranker(200)
        >>> sizes = [sum(p.numel() for p in model.parameters()) for model in (one, mixture)]
        >>> abs(sizes[0] / sizes[1] - 1) < 0.01
        True
    """
    network = HistoryInput(num_items)
    return MixtureRanker(network, [MLP(network.out_features, (160,), 1, norm=None)])


def _load(seed: int) -> Splits:
    splits = load_interactions("amazon-video-games", items=200, max_history=8)
    shown = partial(splits.impressions, popularity_power=0.5, seed=seed)
    train, validation, test = (
        shown("train", negatives=1),
        shown("validation", negatives=9),
        shown("test", negatives=9),
    )
    return Splits(
        "shown-video-games", "classification", train, validation, test, (8,), num_classes=splits.num_items
    )
