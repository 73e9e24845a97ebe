"""Halves of digits that find each other, and losses whose temperature is chosen on validation pairs: the trial behind MW's claim."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from coloss.data import Splits, halves, load
from coloss.metrics import evaluate_dual_encoder, predict
from coloss.nn import MLP, DualEncoder
from coloss.ops import info_nce_loss
from coloss.retrieval.threshold_report import threshold_report
from coloss.train import Budget, Setting, Task

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Tried by both losses."""

METRIC = "pooled_auc"


def digit_halves_task() -> Task:
    """Find the bottom half of a digit by its top half.

    Examples:
        >>> digit_halves_task().metric
        'pooled_auc'
    """
    return Task(
        name="digits-halves-small",
        kind="retrieval",
        title="find the bottom half of a digit by its top half; two perceptrons of 32-128-32, cosine",
        load=lambda seed: halves(cast(Splits, load("digits", seed=seed))),
        model=lambda splits: DualEncoder(*(MLP(32, (128,), 32, norm=None) for _ in range(2))),
        objective=info_nce,
        objective_name="info-nce",
        validate=lambda model, splits: evaluate_dual_encoder(model, splits.validation),
        test=_judge,
        metric=METRIC,
        budget=Budget(steps=1000),
        batch_size=48,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        learning_rate_schedule=None,
        evaluate_every=10**9,
    )


def info_nce(outputs: Any, targets: Any = None, temperature: float = 0.05) -> Tensor:
    """InfoNCE from query to document and back, as both sides of a pair count in a loss over all pairs.

    Examples:
        >>> info_nce((torch.eye(3), torch.eye(3))).item() < 1e-6
        True
    """
    queries, documents = outputs
    return info_nce_loss(queries, documents, temperature, symmetric=True)


def measure_tuned(setting: Setting) -> dict[str, dict[str, float]]:
    """Both losses at each of `TEMPERATURES`; of either the model with the highest pooled AUC on validation pairs is the one that counts.

    Args:
        setting: of `digit_halves_task`.

    Returns:
        Metrics on test pairs of "info-nce" and "mann-whitney", with the `temperature` that was chosen; of both at 0.05, and of MW
        within queries at 0.05.
    """
    # The room that declares the claim imports this module.
    from coloss.retrieval.mann_whitney import MannWhitneyRetrieval

    found: dict[str, dict[str, float]] = {}
    for loss in ("info-nce", "mann-whitney"):
        models: list[tuple[float, float, nn.Module]] = []
        for temperature in TEMPERATURES:
            if loss == "info-nce":
                objective, methods = partial(info_nce, temperature=temperature), []
            else:
                objective, methods = None, [MannWhitneyRetrieval(temperature=temperature)]
            model = setting.fit(setting.new_model(), objective, methods).model
            models.append((setting.task.validate(model, setting.splits)[METRIC], temperature, model))
        # Of equal ones the smaller temperature, for both.
        _, chosen, best = max(models, key=lambda entry: entry[0])
        found[loss] = {**setting.task.test(best, setting.splits), "temperature": chosen}
        found[f"{loss} at 0.05"] = dict(
            setting.task.test(models[TEMPERATURES.index(0.05)][2], setting.splits)
        )
    within = MannWhitneyRetrieval(temperature=0.05, scope="query")
    model = setting.fit(setting.new_model(), methods=[within]).model
    found["mann-whitney within queries at 0.05"] = dict(setting.task.test(model, setting.splits))
    return found


def _judge(model: nn.Module, splits: Any) -> dict[str, float]:
    """Metrics on test pairs, with what one cut-off at 1% of false positives gives, and how far queries' own cut-offs lie apart."""
    queries, documents = predict(model, splits.test).outputs
    report = threshold_report(queries @ documents.T, torch.eye(len(queries)), 0.01)
    low, _, high = report.query_thresholds
    return {
        **evaluate_dual_encoder(model, splits.test),
        "recall_at_1pct_fpr": report.recall,
        "precision_at_1pct_fpr": report.precision,
        "threshold_spread_over_queries": high - low,
    }
