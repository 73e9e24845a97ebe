"""Trains an estimator of mutual information on simulated sets, stores it, and judges what was stored: behind `coloss run mist`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import Splits, load
from coloss.errors import InputError
from coloss.jepa.mutual_information import SupervisedMI, pinball_loss
from coloss.jepa.mutual_information_data import MIMetaDataset, QuantileBatches
from coloss.jepa.mutual_information_estimators import KSG
from coloss.jepa.mutual_information_networks import CellMIRegressor
from coloss.jepa.mutual_information_report import (
    KSG_NEIGHBOURS,
    error_by_bin,
    interval_coverage,
    judge_estimator,
    mean_squared_error,
    rank_agreement,
)
from coloss.train.budget import Budget
from coloss.train.loop import Fit, fit
from coloss.train.run_folder import claim_folder, source_name, write_metrics
from coloss.train.schedules import cosine

# Sets are drawn as they are needed, so no budget comes to the end of them.
_ENDLESS = 10**9
CHECKPOINT_EVERY = 250


def fit_regressor(
    network: nn.Module,
    sets: MIMetaDataset,
    *,
    budget: Budget,
    rate: float = 3e-3,
    seed: int = 0,
    **options: Any,
) -> Fit:
    """Train a network on simulated sets, with one random quantile level for each.

    Args:
        network: `CellMIRegressor`, `SetMIRegressor` or another that is called as `(x, y, valid, tau)`; trained in place.
        sets: what it learns from.
        budget: in steps or seconds.
        rate: of AdamW, at the height of a cosine schedule, > 0.
        seed: of the run.
        options: further ones of `coloss.fit`, such as checkpoints.

    Returns:
        The record of the run; the network is in evaluation mode.

    Examples:
        >>> network = CellMIRegressor(width=8, depth=1, inducing=2)
        >>> fit_regressor(network, MIMetaDataset(batch_size=4, batches=2), budget=Budget(steps=2)).steps
        2
    """
    run = fit(
        _CalledWithParts(network),
        QuantileBatches(sets),
        _pinball,
        budget=budget,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=1e-4),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        seed=seed,
        **options,
    )
    network.eval()
    return run


class _CalledWithParts(nn.Module):
    """A regressor that takes its inputs as one tuple, as the loop gives them, and returns the levels with its quantiles."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y, tau = inputs
        return self.network(x, y, None, tau), tau


def _pinball(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Mapping[str, Tensor]:
    return {"pinball": pinball_loss(outputs[0], targets, outputs[1])}


def train_mist(
    data: str,
    folder: str | Path,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Train an estimator of mutual information on simulated sets, store it, and judge the stored file.

    The folder gets `mist.safetensors` (for `SupervisedMI.from_file`), `metrics.json` (with errors by number of samples, columns and true
    information besides), `run.json` and checkpoints; the same folder goes on where a stopped run ended. The file that comes with the package was made
    by this, with the command that stands in it.

    Args:
        data: a table that `coloss.data.load` takes: no part of training, but the pairs of its columns are put in order by the estimator and by
            KSG.
        folder: of the results.
        budget: in steps (of 32 sets) or seconds; default: 900 steps, some 3 minutes of one core.
        seed: of the weights and of the simulated sets.
        progress: called with the share done.

    Returns:
        `squared_error` and `coverage` (of the 5 % to 95 % interval) on fresh sets of the training distribution, the same with `held_out_` for a
        family and a map that were kept out; `ksg_...` on the same sets for KSG with the number of neighbours that is best on sets of the
        training distribution (`KSG_NEIGHBOURS`); `crossed`, the share of sets with quantiles out of order before they are sorted;
        `rank_agreement` with KSG on the table.

    Raises:
        InputError: for data that are no table, a budget in epochs (no set is seen twice), or a folder that holds another run.

    Source:
        MIST, arXiv 2511.18945.

    Examples:
        >>> train_mist("iris", "mist-run", budget=Budget(epochs=1))
        Traceback (most recent call last):
        coloss.errors.InputError: budget must be in steps or seconds, since no set is seen twice
    """
    if budget is None:
        budget = Budget(steps=900)
    if budget.epochs is not None:
        raise InputError("budget must be in steps or seconds, since no set is seen twice")
    splits = load(data, seed=seed)
    table = splits.train.inputs if isinstance(splits, Splits) else None
    if not isinstance(table, Tensor) or table.ndim < 2 or not table.is_floating_point():
        raise InputError("data must be a table, or samples that can be laid out as one")
    folder = Path(folder)
    claim_folder(folder, {"data": source_name(data), "seed": seed, "budget": budget.as_dict()})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CellMIRegressor()
    run = fit_regressor(
        network,
        MIMetaDataset(batches=_ENDLESS, seed=seed),
        budget=budget,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=CHECKPOINT_EVERY,
        resume=True,
        progress=(lambda share, terms: progress(share)) if progress is not None else None,
    )
    length = f"{budget.steps}steps" if budget.steps is not None else f"{budget.seconds:g}s"
    SupervisedMI(network).save(
        folder / "mist.safetensors",
        command=f"coloss run mist --budget {length} --seed {seed}",
        seed=str(seed),
        steps=str(run.steps),
        coloss=metadata.version("coloss"),
        torch=metadata.version("torch"),
    )
    metrics, errors = _judge(SupervisedMI.from_file(folder / "mist.safetensors"), seed)
    metrics["rank_agreement"] = rank_agreement(
        SupervisedMI.from_file(folder / "mist.safetensors"), table.flatten(1)[:500]
    )
    write_metrics(folder, metrics | errors)
    return metrics


def _judge(estimator: SupervisedMI, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics on fresh sets, and the errors on those of the training distribution by bin."""
    metrics: dict[str, float] = {}
    # Far from the numbers that seeds of training are chosen from.
    fresh = partial(MIMetaDataset, batch_size=8, batches=8, samples=(50, 200), seed=1_000_000 + seed)
    sets = {"": fresh(), "held_out_": fresh(["additive-uniform"], ["base", "spiral"])}
    errors: dict[str, float] = {}
    for kind, some in sets.items():
        found = judge_estimator(estimator, some, (0.05, 0.95))
        metrics[f"{kind}squared_error"] = mean_squared_error(found)
        metrics[f"{kind}coverage"] = interval_coverage(found)
        by_neighbours = judge_estimator(KSG(KSG_NEIGHBOURS), some)
        metrics[f"ksg_{kind}squared_error"] = mean_squared_error(by_neighbours)
        if not kind:
            errors = {
                f"squared_error, {', '.join(name)}": error for name, error in error_by_bin(found).items()
            }
    metrics["crossed"] = crossing_rate(estimator, sets[""])
    return metrics, errors


def crossing_rate(
    estimator: SupervisedMI, sets: MIMetaDataset, levels: Sequence[float] = (0.05, 0.5, 0.95)
) -> float:
    """Share of sets for which the network's quantiles are out of order before `SupervisedMI` sorts them.

    Args:
        estimator: with a network that takes levels.
        sets: to look at.
        levels: rising.

    Examples:
        >>> crossing_rate(SupervisedMI.pretrained(), MIMetaDataset(batch_size=4, batches=1)) <= 0.5
        True
    """
    crossed = []
    for batch in sets:
        with torch.no_grad():
            found = [
                estimator.network(batch.x, batch.y, None, torch.full_like(batch.information, level))
                for level in levels
            ]
        crossed.append((torch.stack(found).diff(dim=0) < 0).any(0))
    return torch.cat(crossed).float().mean().item()
