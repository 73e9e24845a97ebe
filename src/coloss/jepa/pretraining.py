"""Trains an encoder for any data set without its labels, stores it, and judges what was stored: behind `coloss run lejepa`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from coloss.data import Splits, load
from coloss.errors import InputError
from coloss.jepa.lejepa import LeJEPA
from coloss.metrics import (
    evaluate_encoder,
    extract_features,
    feature_standard_deviation,
    rankme,
    ridge_probe,
)
from coloss.nn import MLP, ConvNet
from coloss.train.budget import Budget
from coloss.train.checkpoint import load_model, save_model
from coloss.train.loop import fit
from coloss.train.run_folder import claim_folder, read_run, source_name, write_metrics
from coloss.train.schedules import cosine

_BATCH_SIZE = 128


def encoder_for_shape(input_shape: Sequence[int]) -> nn.Module:
    """A small encoder for one kind of input: convolutions for images and series, a perceptron for tables and text.

    Args:
        input_shape: of one sample: (channels, height, width), (channels, steps) or (features,).

    Raises:
        InputError: for any other shape.

    Examples:
        >>> encoder_for_shape((1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 128])
    """
    shape = tuple(input_shape)
    if len(shape) == 3:
        return ConvNet(shape[0], (32, 64, 128))
    if len(shape) == 2:
        return ConvNet(shape[0], (32, 64, 128), dims=1)
    if len(shape) == 1:
        return MLP(shape[0], (256, 256), 64)
    raise InputError(f"input_shape must be that of an image, a series or a vector, got {shape}")


def load_encoder(folder: str | Path) -> nn.Module:
    """The encoder that `pretrain_lejepa` left in a folder, in evaluation mode.

    Args:
        folder: holds `encoder.safetensors` and `run.json`.

    Raises:
        InputError: if a file is missing or damaged.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = pretrain_lejepa("iris", folder, budget=Budget(steps=2))
        >>> load_encoder(folder)(torch.zeros(3, 4)).shape
        torch.Size([3, 64])
    """
    folder = Path(folder)
    shape = read_run(folder).get("input_shape")
    if shape is None:
        raise InputError(
            f"{folder} holds no encoder that can be read (run.json does not give its input_shape)"
        )
    return load_model(encoder_for_shape(shape), folder / "encoder.safetensors").eval()


def pretrain_lejepa(
    data: str,
    folder: str | Path,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Pretrain an encoder on a data set by name or path, and say what it is worth beside the raw inputs and an untrained encoder.

    Labels serve the probes alone. The folder gets `encoder.safetensors`, `metrics.json`, `run.json` and checkpoints; the same
    folder goes on where a stopped run ended. The metrics are those of the stored file, loaded into a fresh encoder.

    Args:
        data: what `coloss.data.load` takes: images, series, tables or text with class labels or numeric targets.
        folder: of the results.
        budget: default: 20 epochs, at least 300 and at most 2,000 steps.
        seed: of the split and of training.
        progress: called with the share done.

    Returns:
        For class labels `linear_probe` and `knn` on test data, with 100 training labels (at least one for each class); for numeric
        targets `ridge_r2`, with all labels; `feature_std` of the features. The same for the raw inputs ("raw_...") and for the
        encoder as initialised ("untrained_..."). `rankme` of the features and `rankme_embeddings` of the projector's output, both
        on the training inputs.

    Raises:
        InputError: for data that cannot be read or have no single target, or a folder that holds another run.

    Source:
        Balestriero, LeCun, 2025 (LeJEPA), arXiv 2511.08544.

    Examples:
        >>> import tempfile
        >>> metrics = pretrain_lejepa("iris", tempfile.mkdtemp(), budget=Budget(steps=2))
        >>> sorted(name for name in metrics if "knn" in name)
        ['knn', 'raw_knn', 'untrained_knn']
    """
    splits = load(data, seed=seed)
    if not isinstance(splits, Splits) or splits.kind not in ("classification", "regression"):
        raise InputError(
            f"data must have one class or number for each sample, to judge the encoder by, got a {splits.kind} set"
        )
    folder = Path(folder)
    claim_folder(folder, {"data": source_name(data), "seed": seed, "input_shape": list(splits.input_shape)})
    if budget is None:
        epoch = max(len(splits.train) // _BATCH_SIZE, 1)
        budget = Budget(steps=min(max(20 * epoch, 300), 2000))
    method = LeJEPA()
    run = fit(
        _seeded_encoder(splits, seed),
        splits.train,
        methods=[method],
        budget=budget,
        batch_size=_BATCH_SIZE,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        learning_rate_schedule=cosine(warmup=0.05),
        checkpoint_dir=folder / "checkpoints",
        resume=True,
        progress=(lambda share, terms: progress(share)) if progress is not None else None,
        seed=seed,
    )
    save_model(run.model, folder / "encoder.safetensors")
    metrics = _judge(load_encoder(folder), splits)
    features, _ = extract_features(load_encoder(folder), splits.train)
    embeddings, _ = extract_features(method.projector, features)
    metrics |= {"rankme": float(rankme(features)), "rankme_embeddings": float(rankme(embeddings))}
    for name, encoder in (("raw", nn.Flatten()), ("untrained", _seeded_encoder(splits, seed))):
        metrics |= {f"{name}_{metric}": value for metric, value in _judge(encoder, splits).items()}
    write_metrics(folder, metrics)
    return metrics


def _judge(encoder: nn.Module, splits: Splits) -> dict[str, float]:
    if splits.kind == "classification":
        found = evaluate_encoder(encoder, splits, labels=100)
        return {name: found[name] for name in ("linear_probe", "knn", "feature_std")}
    train, train_targets = extract_features(encoder, splits.train)
    test, test_targets = extract_features(encoder, splits.test)
    r2 = ridge_probe(train, train_targets, test, test_targets).r2
    return {"ridge_r2": r2, "feature_std": float(feature_standard_deviation(test))}


def _seeded_encoder(splits: Splits, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return encoder_for_shape(splits.input_shape)
