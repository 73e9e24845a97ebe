"""Pretrains an encoder of series without labels, stores it, and judges it with few labels: behind `coloss run ecg-jepa`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coloss.errors import InputError
from coloss.jepa.few_label_probes import few_label_probes
from coloss.jepa.masked_prediction import find_token_encoder
from coloss.jepa.series_data import SeriesSet, read_series
from coloss.jepa.series_model import SeriesModel, fine_tune_series
from coloss.jepa.series_prediction import default_patch_size, new_series_encoder, train_series_encoder
from coloss.jepa.series_preparation import SeriesPreparation
from coloss.metrics import (
    attentive_probe,
    extract_features,
    feature_standard_deviation,
    label_budget,
    predict,
    rankme,
)
from coloss.train.budget import Budget
from coloss.train.checkpoint import load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics

_BATCH_SIZE = 32


def load_series_encoder(folder: str | Path) -> SeriesModel:
    """The encoder that `pretrain_series` left in a folder, in evaluation mode; it takes raw series.

    Args:
        folder: holds `encoder.safetensors` and `run.json`, which also names the channels where the data did (`model.channels`).

    Raises:
        InputError: if a file is missing or damaged.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> import torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "waves.npy", np.sin(np.arange(960.0)).reshape(40, 24))
        >>> _ = pretrain_series(str(folder / "waves.npy"), folder / "run", budget=Budget(steps=2))
        >>> load_series_encoder(folder / "run")(torch.zeros(5, 1, 24)).shape
        torch.Size([5, 32])
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        model = _new_model(run)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no encoder of series ({error!r})") from error
    loaded = load_model(model, folder / "encoder.safetensors").eval()
    assert isinstance(loaded, SeriesModel)
    return loaded


def pretrain_series(
    data: str = "ecg5000",
    folder: str | Path = Path("runs") / "ecg-jepa",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    patch_size: int | None = None,
    crop: int | None = None,
    high_pass: float | None = None,
    dim: int = 32,
    depth: int = 2,
    labels_per_class: int = 5,
) -> dict[str, float]:
    """Pretrain an encoder on series by name or file, store it, and say what it is worth with few labels.

    Labels, where there are any, serve probes and fine-tuning alone. The folder gets `encoder.safetensors`, `metrics.json`, `run.json`
    and checkpoints; the same folder goes on where a stopped run ended. The metrics are those of the stored file, loaded again.

    Args:
        data: what `read_series` takes.
        folder: of the results.
        budget: default: 20 epochs, at least 400 and at most 4,000 steps.
        seed: of everything random; data whose file names no test part are divided by it.
        progress: called with the share done.
        patch_size: steps of a patch; None for `default_patch_size`.
        crop: steps of the random crops it learns on; None for all, cut to whole patches.
        high_pass: cutoff of `remove_drift`, in cycles per step; None for no filter.
        dim, depth: of the encoder.
        labels_per_class: for probes and fine-tuning.

    Returns:
        `feature_std` and `rankme` of the features of test series, if there are at least two (0 and 1 are collapse). With classes also test accuracies `linear_probe`
        and `knn` (see `few_label_probes`), `attentive_probe` on tokens, and `fine_tuned`, the last two for one draw of labels. The same
        for the encoder as initialised ("untrained_...", where fine-tuning is plain supervised training: `supervised`) and for the raw
        series ("raw_linear_probe", "raw_knn").

    Raises:
        InputError: for data that cannot be read, sizes that do not fit them, or a folder that holds another run.

    Source:
        Weimann, Conrad, 2024 (ECG-JEPA), arXiv 2410.13867.

    Examples:
        >>> import tempfile
        >>> metrics = pretrain_series("italy-power-demand", tempfile.mkdtemp(), budget=Budget(steps=2))
        >>> sorted(name for name in metrics if "linear" in name)
        ['linear_probe', 'raw_linear_probe', 'untrained_linear_probe']
    """
    found = read_series(data, seed)
    channels, steps = found.train.shape[1:]
    patch = default_patch_size(steps) if patch_size is None else patch_size
    size = steps // max(patch, 1) * max(patch, 1) if crop is None else crop
    if not 1 <= patch <= steps // 2:
        raise InputError(
            f"patch_size must be in [1, {steps // 2}], half the {steps} steps of the series, got {patch}"
        )
    if not 2 * patch <= size <= steps or size % patch:
        raise InputError(
            f"crop must be a multiple of the patch of {patch} steps, at least two and at most {steps} steps, got {size}"
        )
    if labels_per_class < 1:
        raise InputError(f"labels_per_class must be >= 1, got {labels_per_class}")
    folder = Path(folder)
    run = {
        "data": source_name(data),
        "seed": seed,
        "channels": channels if found.channels is None else list(found.channels),
        "patch_size": patch,
        "crop": size,
        "high_pass": high_pass,
        "dim": dim,
        "depth": depth,
    }
    try:
        untrained = _new_model(run)
    except ValueError as error:
        raise InputError(str(error)) from error
    claim_folder(folder, run)
    untrained.preparation.measure(found.train)
    trained = _new_model(run)
    trained.preparation.load_state_dict(untrained.preparation.state_dict())
    if budget is None:
        epoch = max(len(found.train) // _BATCH_SIZE, 1)
        budget = Budget(steps=min(max(20 * epoch, 400), 4000))
    train_series_encoder(
        find_token_encoder(trained),
        trained.preparation(found.train),
        crop=size,
        budget=budget,
        batch_size=_BATCH_SIZE,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        resume=True,
        progress=(lambda share, terms: progress(share)) if progress is not None else None,
    )
    save_model(trained, folder / "encoder.safetensors")
    metrics = _judge(load_series_encoder(folder), found, labels_per_class, seed)
    for name, value in _judge(untrained.eval(), found, labels_per_class, seed).items():
        metrics["supervised" if name == "fine_tuned" else f"untrained_{name}"] = value
    if found.train_targets is not None and found.test_targets is not None:
        raw = (trained.preparation(part).flatten(1) for part in (found.train, found.test))
        parts = (next(raw), found.train_targets, next(raw), found.test_targets)
        probes = few_label_probes(*parts, labels_per_class=labels_per_class, seed=seed)
        metrics |= {f"raw_{name}": value for name, value in probes.items()}
    write_metrics(folder, metrics)
    return metrics


def _new_model(run: dict[str, Any]) -> SeriesModel:
    names = None if isinstance(run["channels"], int) else run["channels"]
    channels = run["channels"] if names is None else len(names)
    encoder = new_series_encoder(
        channels, run["crop"], run["patch_size"], dim=run["dim"], depth=run["depth"], seed=run["seed"]
    )
    return SeriesModel(SeriesPreparation(channels, high_pass=run["high_pass"]), encoder, run["crop"], names)


def _judge(model: SeriesModel, data: SeriesSet, labels_per_class: int, seed: int) -> dict[str, float]:
    (train, _), (test, _) = extract_features(model, data.train), extract_features(model, data.test)
    metrics: dict[str, float] = {}
    if len(test) > 1:
        metrics = {"feature_std": float(feature_standard_deviation(test)), "rankme": float(rankme(test))}
    if data.train_targets is None or data.test_targets is None:
        return metrics
    targets, classes = data.train_targets, data.classes
    metrics |= few_label_probes(
        train, targets, test, data.test_targets, labels_per_class=labels_per_class, seed=seed
    )
    labels = min(labels_per_class * len(targets.unique()), len(targets))
    chosen = label_budget(targets, labels, seed)
    few, few_targets = data.train[chosen], targets[chosen]
    tokens, _ = predict(model, few, call=model.tokens)
    test_tokens, _ = predict(model, data.test, call=model.tokens)
    probe = attentive_probe(tokens, few_targets, test_tokens, data.test_targets, steps=150, seed=seed)
    logits, _ = predict(fine_tune_series(model, few, few_targets, classes=classes, seed=seed), data.test)
    fine_tuned = float((logits.argmax(1) == data.test_targets).double().mean())
    return {**metrics, "attentive_probe": probe.accuracy, "fine_tuned": fine_tuned}
