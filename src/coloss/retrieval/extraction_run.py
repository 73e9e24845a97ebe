"""Audits a recommender of one's own interactions against imitation, and stores what came out: behind `coloss run recsys-extraction`."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coloss.data import load_interactions
from coloss.errors import InputError
from coloss.metrics import evaluate_recommender
from coloss.nn import SequentialRecommender, next_item_loss
from coloss.retrieval.counted_target import NO_DEFENCE, Defence
from coloss.retrieval.extraction_audit import ExtractionAudit
from coloss.train import Budget, cosine, fit
from coloss.train.atomic_text import write_atomically
from coloss.train.checkpoint import save_model
from coloss.train.run_folder import claim_folder, source_name, write_metrics

K = 10
"""Items that the recommender and its copies are compared on."""

DEFENCES = (
    NO_DEFENCE,
    Defence("lists of 5", list_length=5),
    Defence("10% noise", noise=0.1),
    Defence("150 queries", max_queries=150),
)


def audit_recommender(
    data: str = "amazon-video-games",
    folder: str | Path = "runs/recsys-extraction",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    target: nn.Module | None = None,
    queries: int = 600,
    copy_steps: int = 150,
    exclude_seen: bool = True,
) -> dict[str, float]:
    """Train a recommender on interactions, or take your own, and measure how far copies made from its answers agree with it.

    A tenth of the users is held out from the recommender and its copies, to measure agreement on; a twentieth of the others is what
    somebody might know of your data. Copies know neither the recommender's weights nor its scores.

    The folder gets `audit.csv`, the table of `ExtractionAudit.run`; `metrics.json`; `target.safetensors`, the recommender that was trained;
    `run.json`, what was audited; and `checkpoints`. The same folder goes on where a stopped audit ended.

    Args:
        data: "amazon-video-games" (its 300 most reviewed games), or the path of a table with columns user, item and time.
        folder: of the results.
        budget: of training the recommender; default: 20 epochs, at least 300 and at most 2,000 steps.
        seed: of users, queries and training.
        progress: called with the share done.
        target: your own recommender of these items, a module with `recommend(histories, k)`; None trains one. Items are numbered as by
            `coloss.data.load_interactions(data, min_length=3).item_names`, those of the data set by name as with `items=300` instead.
            With `scores(histories)` and `unwanted(histories, seen=...)`, which `coloss.metrics.evaluate_recommender` needs, its recall
            is measured, too.
        queries: answers that each copy is made from, >= 1.
        copy_steps: of training a copy, >= 1.
        exclude_seen: whether the recommender leaves the items of a history out of its lists; copies do the same.

    Returns:
        `target_recall@10` on held-out users, where the recommender gives scores, and the agreement@10 of each copy with the recommender,
        under the name of its strategy and defence: "agreement@10 few-shot, lists of 5".

    Raises:
        InputError: for data that cannot be read or hold too few users or items, a value out of range, or a folder that holds another
            audit: of other data, options, or a recommender that answers held-out users otherwise.

    Source:
        arXiv 2411.11677, 2024; Yue et al. 2021, arXiv 2109.01165.

    Examples:
        >>> import tempfile
        >>> found = audit_recommender(
        ...     "amazon-video-games", tempfile.mkdtemp(), budget=Budget(steps=2), queries=20, copy_steps=2
        ... )
        >>> sorted(name for name in found if "noise" in name)
        ['agreement@10 autoregressive, 10% noise', 'agreement@10 few-shot, 10% noise', 'agreement@10 random, 10% noise']
    """
    for name, value in (("queries", queries), ("copy_steps", copy_steps)):
        if value < 1:
            raise InputError(f"{name} must be >= 1, got {value}")
    named = not Path(data).expanduser().is_file()
    splits = load_interactions(
        data if named else Path(data).expanduser(),
        items=300 if named else None,
        min_length=5 if named else 3,
        max_history=8,
    )
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(seed))
    held_out, others = order[: len(order) // 10], order[len(order) // 10 :]
    known = others[: len(others) // 20]
    owned = torch.isin(splits.train.ids, others).nonzero().flatten()
    if not len(held_out) or not len(known) or not len(owned) or splits.num_items < 3 * K:
        raise InputError(
            f"{data} must hold at least 22 users of 3 interactions or more, some of 4, and {3 * K} items, for an audit, "
            f"got {len(order)} users and {splits.num_items} items"
        )
    folder = Path(folder)
    run = {
        "data": data if named else source_name(str(Path(data).expanduser())),
        "seed": seed,
        "users": len(order),
        "content": _fingerprint(splits.sequence, splits.start),
        "budget": budget.as_dict() if budget is not None else None,
        "queries": queries,
        "copy_steps": copy_steps,
        "exclude_seen": exclude_seen,
        "own_target": target is not None,
    }
    histories = splits.test.subset(held_out)
    own = target is not None
    if target is None:
        claim_folder(folder, run)
        train = splits.train.subset(owned)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            untrained = SequentialRecommender(splits.num_items, 32, max_history=splits.max_history)
        target = fit(
            untrained,
            train,
            next_item_loss,
            budget=budget or Budget(steps=min(max(20 * len(train) // 128, 300), 2000)),
            optimizer=partial(torch.optim.AdamW, lr=5e-3),
            learning_rate_schedule=cosine(warmup=0.05),
            batch_size=128,
            seed=seed,
            checkpoint_dir=folder / "checkpoints",
            resume=True,
            progress=(lambda share, terms: progress(share / 3)) if progress is not None else None,
        ).model
        save_model(target, folder / "target.safetensors")
    few_shot, inputs = splits.test.subset(known).inputs, histories.inputs
    assert isinstance(few_shot, Tensor) and isinstance(inputs, Tensor)
    audit = ExtractionAudit(
        target if own or exclude_seen else _WithSeen(target),
        few_shot,
        inputs,
        num_items=splits.num_items,
        budgets=(queries,),
        k=K,
        defences=DEFENCES,
        steps=copy_steps,
        exclude_seen=exclude_seen,
        seed=seed,
    )
    if own:  # known by what it answers: it may be any module
        claim_folder(folder, run | {"answers": _fingerprint(audit.truth.numpy())})
    table = _table(audit, folder / "audit.csv", progress)
    metrics = {}
    if hasattr(target, "scores") and hasattr(target, "unwanted"):
        quality = evaluate_recommender(target, histories, ks=(K,), exclude_seen=exclude_seen)
        metrics[f"target_recall@{K}"] = quality[f"recall@{K}"]
    for row in table.to_dict("records"):
        defence = "" if row["defence"] == NO_DEFENCE.name else f", {row['defence']}"
        metrics[f"agreement@{K} {row['strategy']}{defence}"] = float(row[f"agreement@{K}"])
    write_metrics(folder, metrics)
    return metrics


class _WithSeen(nn.Module):
    """A recommender that lists items of the history, too."""

    def __init__(self, recommender: nn.Module) -> None:
        super().__init__()
        self.recommender = recommender

    def recommend(self, histories: Tensor, k: int) -> Tensor:
        return self.recommender.recommend(histories, k, exclude_seen=False)  # type: ignore[operator]


def _fingerprint(*arrays: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _table(audit: ExtractionAudit, path: Path, progress: Callable[[float], None] | None) -> pd.DataFrame:
    """The report, of which each row is stored once it is there."""
    plan = audit.plan()
    rows: list[dict[Any, Any]] = []
    if path.exists():
        rows = pd.read_csv(path, keep_default_na=False).to_dict("records")
    for number, step in enumerate(plan[len(rows) :], len(rows) + 1):
        rows.append(audit.row(*step))
        write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
        if progress is not None:
            progress(1 / 3 + 2 / 3 * number / len(plan))
    return pd.DataFrame(rows)
