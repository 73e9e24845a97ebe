"""The small experiment on which the extraction audit is measured: a recommender of video games, and copies made from its answers."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from coloss.data import load_interactions
from coloss.metrics import evaluate_recommender
from coloss.nn import SequentialRecommender, next_item_loss
from coloss.retrieval.counted_target import NO_DEFENCE, Defence
from coloss.retrieval.extraction_audit import ExtractionAudit, Strategy
from coloss.train import Budget, Setting, cosine, fit

QUERIES = 600
"""Answers that each copy is made from."""

K = 10
"""Items that the target and its copies are compared on."""


def measure_extraction(setting: Setting) -> Mapping[str, Mapping[str, float]]:
    """Agreement of copies with a recommender trained on the 300 most reviewed video games, on users that neither side has seen.

    A twentieth of the training users is known to the few-shot strategies; the tenth of all users that is held out trains nothing.

    Args:
        setting: its seed draws users, queries and weights.

    Examples:
        >>> QUERIES, K
        (600, 10)
    """
    splits = load_interactions("amazon-video-games", items=300, max_history=8)
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(setting.seed))
    held_out = order[: len(order) // 10]
    owned = torch.isin(splits.train.ids, order[len(held_out) :]).nonzero().flatten()
    target = fit(
        SequentialRecommender(splits.num_items, 32, max_history=splits.max_history),
        splits.train.subset(owned),
        next_item_loss,
        budget=Budget(steps=2 if setting.smoke else 300),
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        learning_rate_schedule=cosine(warmup=0.05),
        batch_size=128,
        seed=setting.seed,
    ).model
    known = splits.test.subset(order[len(held_out) :][: len(owned) // 20])
    histories = splits.test.subset(held_out)
    few_shot, others = known.inputs, histories.inputs
    assert isinstance(few_shot, Tensor) and isinstance(others, Tensor)
    quality = evaluate_recommender(target, histories, ks=(K,))
    common = {"target_recall@10": quality["recall@10"]}

    def copies(repair: float) -> ExtractionAudit:
        return ExtractionAudit(
            target,
            few_shot,
            others,
            num_items=splits.num_items,
            k=K,
            repair=repair,
            steps=2 if setting.smoke else 150,
            seed=setting.seed,
        )

    plan: list[tuple[str, float, Strategy, Defence]] = [
        ("popularity", 1.0, "popularity", NO_DEFENCE),
        ("few-shot only", 1.0, "few-shot only", NO_DEFENCE),
        ("random", 1.0, "random", NO_DEFENCE),
        ("autoregressive", 1.0, "autoregressive", NO_DEFENCE),
        ("few-shot", 1.0, "few-shot", NO_DEFENCE),
        ("few-shot, no repair", 0.0, "few-shot", NO_DEFENCE),
        ("few-shot, lists of 5", 1.0, "few-shot", Defence("lists of 5", list_length=5)),
        ("few-shot, 10% noise", 1.0, "few-shot", Defence("10% noise", noise=0.1)),
        ("few-shot, 150 queries", 1.0, "few-shot", Defence("150 queries", max_queries=150)),
    ]
    audits = {repair: copies(repair) for repair in (0.0, 1.0)}
    found = {}
    for name, repair, strategy, defence in plan:
        copy, queries = audits[repair].imitate(strategy, 40 if setting.smoke else QUERIES, defence)
        own = evaluate_recommender(copy, histories, ks=(K,)) if hasattr(copy, "scores") else {}
        found[name] = {
            **audits[repair].judge(copy),
            "queries": float(queries),
            "list_kept": audits[repair].list_kept(defence),
            **common,
            **({"recall@10": own["recall@10"]} if own else {}),
        }
    return found
