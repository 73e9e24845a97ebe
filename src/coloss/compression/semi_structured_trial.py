"""How the claim of sparsity-aware retraining is measured: one dense network on digits, and every way to bring it to 1:8 or 2:4."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coloss.compression.compressed_file import compress_model, load_compressed
from coloss.compression.nm_sparsity import finalize_nm_, masked_to_kept_ratio
from coloss.compression.semi_structured_training import Estimator, SemiStructuredSparsity
from coloss.data import Splits, load
from coloss.metrics import evaluate_classifier
from coloss.train.budget import Budget
from coloss.train.checkpoint import save_model
from coloss.train.loop import fit
from coloss.train.schedules import cosine
from coloss.train.task import Setting

HIDDEN = ("1", "3")
"""The layers that are pruned; the output layer stays dense."""

EPOCHS = 15
"""Of the dense network, and of each retraining."""


@dataclass(frozen=True)
class Retraining:
    """One way from a dense network to a sparse one.

    Args:
        estimator: of `SemiStructuredSparsity`; None prunes without retraining.
        rate: learning rate of AdamW, and of AdamS.
        weight_decay: of AdamW.
        options: further ones of the Method.
    """

    estimator: Estimator | None = None
    rate: float = 0.0
    weight_decay: float = 0.0
    options: Mapping[str, Any] | None = None


ARMS: Mapping[str, Retraining] = {
    "one-shot": Retraining(),
    "fixed mask": Retraining("fixed", 0.1),
    "ste": Retraining("ste", 3e-3, 1e-2),
    "sr-ste": Retraining("sr-ste", 0.1, 0.0, {"decay": 2e-2}),
    "cast": Retraining("cast", 0.01, 0.0, {"decay": 1e-2, "scale_groups": 0}),
}
"""Learning rate, weight decay or decay that were best for each at 1:8 on validation digits of other seeds."""


def train_dense(splits: Splits, seed: int, budget: Budget) -> nn.Module:
    """A network 64-64-64-10 on 8 x 8 digits, trained plainly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
    return fit(
        model,
        splits.train,
        F.cross_entropy,
        budget=budget,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0),
        learning_rate_schedule=cosine(0.99, 0.01, warmup=0.05),
        seed=seed,
    ).model


def retrain(
    dense: nn.Module, splits: Splits, how: Retraining, nm: tuple[int, int], seed: int, budget: Budget
) -> nn.Module:
    """A copy of the dense network after retraining; that of "cast" and of one-shot pruning is not pruned yet."""
    model = copy.deepcopy(dense)
    if how.estimator is None:
        return model
    method = SemiStructuredSparsity(
        *nm,
        estimator=how.estimator,
        layers=HIDDEN,
        prune=how.estimator != "cast",
        **dict(how.options or {}),
    )
    return fit(
        model,
        splits.train,
        F.cross_entropy,
        [method],
        budget=budget,
        optimizer=partial(torch.optim.AdamW, lr=how.rate, weight_decay=how.weight_decay),
        learning_rate_schedule=cosine(1.0, 0.01, warmup=0.05),
        seed=seed + 1,
    ).model


def judge(model: nn.Module, nm: tuple[int, int], splits: Splits, part: str = "test") -> dict[str, float]:
    """Accuracy before and after pruning, size of the losers before it, and the same network written to a file and read back."""
    data = getattr(splits, part)

    def accuracy(model: nn.Module) -> float:
        return evaluate_classifier(model, data)["accuracy"]

    found = {
        "accuracy_before_pruning": accuracy(model),
        "masked_to_kept_before_pruning": masked_to_kept_ratio(model, *nm, layers=HIDDEN).mean,
    }
    sparse = copy.deepcopy(model)
    finalize_nm_(sparse, *nm, layers=HIDDEN)
    with tempfile.TemporaryDirectory() as folder:
        file = compress_model(sparse).save(Path(folder) / "sparse.coloss")
        restored = load_compressed(file).load_into(copy.deepcopy(model))
        found["stored_bytes"] = file.stat().st_size
        found["dense_bytes"] = save_model(model, Path(folder) / "dense.safetensors").stat().st_size
    return found | {"accuracy": accuracy(sparse), "accuracy_after_export": accuracy(restored)}


def compare_estimators(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: one dense network, every arm at 1:8; one-shot, fixed mask and CAST at 2:4, too."""
    splits = load("digits", seed=setting.seed)
    assert isinstance(splits, Splits)
    budget = Budget(steps=3) if setting.smoke else Budget(epochs=EPOCHS)
    dense = train_dense(splits, setting.seed, budget)
    found = {}
    for name, how in ARMS.items():
        for nm in ((1, 8),) if setting.smoke else ((1, 8), (2, 4)):
            if nm == (1, 8) or name in ("one-shot", "fixed mask", "cast"):
                model = retrain(dense, splits, how, nm, setting.seed, budget)
                found[name if nm == (1, 8) else f"{name} 2:4"] = judge(model, nm, splits)
    found["dense"] = {"accuracy": evaluate_classifier(dense, splits.test)["accuracy"]}
    return found
