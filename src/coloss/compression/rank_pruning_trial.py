"""What is measured of pruning with a rank loss: ways to prune a small network to one weight in fifty, on digits."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coloss.compression.compressed_file import compress_model, load_compressed
from coloss.compression.pruned_layers import prune_by_magnitude, sparsity_report
from coloss.data import Splits, load
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, Classifier
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.schedules import cosine
from coloss.train.task import Setting

if TYPE_CHECKING:
    from coloss.train.method import Method

SPARSITY = 0.98
"""Of the three matrices before the classifier: 2,949 of 147,456 weights are left."""

LAYERS = ("backbone.layers.0", "backbone.layers.2", "backbone.layers.4")

EPOCHS = 30


@dataclass(frozen=True)
class Pruning:
    """One way to prune, at a learning rate and weight decay chosen on validation data of other seeds.

    Args:
        learning_rate, weight_decay: of SGD with momentum 0.9.
        options: of `RankBasedPruning`; None trains densely, and cuts after training.

    Examples:
        >>> Pruning(0.1, 1e-4).methods()
        []
    """

    learning_rate: float
    weight_decay: float
    options: Mapping[str, Any] | None = field(default=None)

    def methods(self) -> "list[Method]":
        """The Method, if any."""
        from coloss.compression.rank_based_pruning import RankBasedPruning

        if self.options is None:
            return []
        plan: dict[str, Any] = {"final_sparsity": SPARSITY, "every": 10, "layers": LAYERS, "delta": 0.2}
        return [RankBasedPruning(**(plan | dict(self.options)))]


PRUNINGS: Mapping[str, Pruning] = {
    "gradual": Pruning(0.2, 5e-4, {"rank_weight": 0.0}),
    "gradual, own setting": Pruning(0.2, 2e-3, {"rank_weight": 0.0}),
    "rpg": Pruning(0.2, 5e-4, {"rank_weight": 4.0}),
    "cut at half time": Pruning(
        0.2, 2e-3, {"rank_weight": 0.0, "grow": "none", "every": 10**6, "until": 0.5}
    ),
    "cut after training": Pruning(0.3, 5e-3),
}
"""The arms of the claim. "gradual" differs from "rpg" in the rank loss alone; the others have the learning rate and weight decay that were
best for them."""


def new_network(splits: Splits, seed: int) -> Classifier:
    """Three layers of 256 and a classifier."""
    assert splits.num_classes is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(MLP(64, (256, 256, 256), norm=None), splits.num_classes)


def train_pruned(
    splits: Splits, pruning: Pruning, seed: int, epochs: float = EPOCHS
) -> tuple[nn.Module, nn.Module]:
    """The network as training leaves it, and pruned: the same object, unless it is cut after training."""
    run = fit(
        new_network(splits, seed),
        splits.train,
        nn.functional.cross_entropy,
        pruning.methods(),
        budget=Budget(epochs=epochs),
        batch_size=64,
        optimizer=partial(
            torch.optim.SGD, lr=pruning.learning_rate, momentum=0.9, weight_decay=pruning.weight_decay
        ),
        learning_rate_schedule=cosine(),
        seed=seed,
    )
    if pruning.options is not None:
        return run.model, run.model
    pruned = new_network(splits, seed).to(next(run.model.parameters()).device)
    pruned.load_state_dict(run.model.state_dict())
    return run.model, prune_by_magnitude(pruned, SPARSITY, LAYERS).eval()


def compare_prunings(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: every way to prune from the same initial weights, on the same batches, judged on test data.

    `accuracy` and `bytes` are of the pruned network as read back from its compressed file, `accuracy_before_export` of the one that was
    written, `accuracy_before_cut` of the network as training left it.
    """
    splits = load("digits", seed=setting.seed)
    assert isinstance(splits, Splits)
    return {
        name: _judge(
            splits, *train_pruned(splits, way, setting.seed, 0.2 if setting.smoke else EPOCHS), setting.seed
        )
        for name, way in PRUNINGS.items()
    }


def _judge(splits: Splits, trained: nn.Module, pruned: nn.Module, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = compress_model(pruned).save(Path(folder) / "pruned.coloss")
        read = load_compressed(file).load_into(new_network(splits, seed)).eval()
        size = file.stat().st_size
    rows = sparsity_report(pruned, LAYERS)
    return {
        **evaluate_classifier(read, splits.test),
        "accuracy_before_export": evaluate_classifier(pruned, splits.test)["accuracy"],
        "accuracy_before_cut": evaluate_classifier(trained, splits.test)["accuracy"],
        "bytes": size,
        "density": sum(row.density * row.weights for row in rows) / sum(row.weights for row in rows),
        "delta_rank": sum(row.delta_rank for row in rows) / len(rows),
        **{f"delta_rank_{number}": row.delta_rank for number, row in enumerate(rows, 1)},
        **{f"density_{number}": row.density for number, row in enumerate(rows, 1)},
        "dead_rows": sum(row.dead_rows for row in rows),
        "dead_columns": sum(row.dead_columns for row in rows),
    }
