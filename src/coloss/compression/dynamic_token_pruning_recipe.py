"""From images with class maps to a segmenter whose confident patches stop early, in one call, by stages that go on after a stop."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.compression.dynamic_token_pruning import DynamicTokenPruning
from coloss.compression.early_exit_models import (
    EarlyExitSegmenter,
    early_exit_cost,
    evaluate_segmenter,
    segmentation_loss,
)
from coloss.data import IndexedDataset, load_segmentation
from coloss.errors import InputError
from coloss.train import Budget, cosine, fit, load_model, save_model
from coloss.train.run_folder import claim_folder, read_run, write_metrics

_SIZES: dict[str, Any] = {
    "patch_size": 5,
    "dim": 64,
    "depth": 6,
    "heads": 4,
    "exit_after": [2, 4, 6],
    "head": "linear",
}
_STEPS, _LATER = 4000, 0.2
_STAGES = {"base": (1 - _LATER, 2e-3), "pruned": (_LATER, 5e-4)}


def train_token_pruning(
    data: str = "camvid",
    folder: str | Path = "runs/dtop",
    *,
    threshold: float = 0.8,
    keep_per_class: int = 5,
    shrink: int = 3,
    sizes: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Trains a plain vision transformer with heads on the way, then fine-tunes it with confident patches left out; behind `coloss run dtop`.

    Four fifths of the budget with all patches, the rest with pruning. A run that was stopped goes on in its folder, in the stage where it
    was. Training images are joined by their mirror images.

    Args:
        data: name of a segmentation data set of `coloss.data`.
        folder: for `model.safetensors`, `run.json`, `metrics.json` and checkpoints; `load_token_pruning` reads it.
        threshold: confidence above which a patch stops, in [0, 1].
        keep_per_class: confident patches of each class that go on, >= 0.
        shrink: of the images, see `coloss.data.load_segmentation`.
        sizes: of the network, arguments of `EarlyExitSegmenter` that replace the recipe's own: patches of 5 pixels, six blocks of width
            64, linear heads after 2, 4 and 6.
        budget: of both stages together; default: 4,000 steps.
        seed: of everything random.
        progress: called with the share that is done.

    Returns:
        On the test images: `mean_iou` and `pixel_accuracy` with pruning, `mean_iou_unpruned` of the same network with all patches in all
        blocks, `mean_iou_base` before the fine-tuning; `multiply_adds` of an image with `multiply_adds_share` and `token_layer_share`, see
        `early_exit_cost`.

    Raises:
        InputError: for data of another kind, values or sizes out of range, or a folder that holds another run.

    Examples:
        >>> import tempfile
        >>> metrics = train_token_pruning(
        ...     "camvid", tempfile.mkdtemp(), budget=Budget(steps=4)
        ... )  # doctest: +SKIP
        >>> metrics["multiply_adds_share"] <= 1  # doctest: +SKIP
        True
    """
    folder = Path(folder)
    splits = load_segmentation(data, shrink=shrink)
    run: dict[str, Any] = {
        "data": data,
        "seed": seed,
        "threshold": threshold,
        "keep_per_class": keep_per_class,
        "image_size": list(splits.input_shape[1:]),
        "num_classes": splits.num_classes,
        "sizes": _SIZES | dict(sizes or {}),
        "budget": (budget or Budget(steps=_STEPS)).as_dict(),
    }
    model: nn.Module = _new_model(run)
    claim_folder(folder, run)
    images, classes = splits.train.inputs, splits.train.targets
    assert isinstance(images, Tensor) and isinstance(classes, Tensor)
    train = IndexedDataset(torch.cat([images, images.flip(3)]), torch.cat([classes, classes.flip(2)]))
    done, metrics = 0.0, {}
    for stage, (share, rate) in _STAGES.items():
        pruning = stage == "pruned"
        start = done
        model = fit(
            model,
            train,
            segmentation_loss,
            [
                DynamicTokenPruning(
                    threshold=threshold if pruning else 1.0,
                    keep_per_class=keep_per_class,
                    prune_from=0.0 if pruning else 1.0,
                )
            ],
            budget=Budget(**run["budget"]).part(share),
            batch_size=16,
            optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
            learning_rate_schedule=cosine(warmup=0.1),
            clip_norm=1.0,
            checkpoint_dir=folder / "checkpoints" / stage,
            checkpoint_every=100,
            resume=True,
            progress=None
            if progress is None
            else lambda part, terms, start=start, share=share: progress(start + share * part),  # type: ignore[misc]
            seed=seed,
        ).model.cpu()
        done += share
        assert isinstance(model, EarlyExitSegmenter)
        if not pruning:
            metrics["mean_iou_base"] = evaluate_segmenter(model, splits.test)["mean_iou"]
    save_model(model, folder / "model.safetensors")
    shipped = load_token_pruning(folder)
    metrics |= evaluate_segmenter(shipped, splits.test) | early_exit_cost(shipped, splits.test.inputs)
    shipped.early_exit.threshold = 1.0
    metrics["mean_iou_unpruned"] = evaluate_segmenter(shipped, splits.test)["mean_iou"]
    write_metrics(folder, metrics)
    return metrics


def load_token_pruning(folder: str | Path) -> EarlyExitSegmenter:
    """The segmenter that `train_token_pruning` stored, in evaluation mode, with its threshold set.

    Args:
        folder: of the run.

    Raises:
        InputError: if there is no such run, or it is damaged.

    Examples:
        >>> model = load_token_pruning("runs/dtop-camvid")  # doctest: +SKIP
        >>> model.class_maps(model(torch.rand(1, 3, 30, 40))).shape  # doctest: +SKIP
        torch.Size([1, 30, 40])
    """
    folder = Path(folder)
    run = read_run(folder)
    try:
        model = _new_model(run)
    except KeyError as error:
        raise InputError(f"{folder} holds no token pruning ({error!r} in run.json)") from error
    load_model(model, folder / "model.safetensors")
    model.early_exit.threshold = run["threshold"]
    return model.eval()


def _new_model(run: Mapping[str, Any]) -> EarlyExitSegmenter:
    size, classes = tuple(run["image_size"]), run["num_classes"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        try:
            return EarlyExitSegmenter(
                size,
                num_classes=classes,
                threshold=run["threshold"],
                keep_per_class=run["keep_per_class"],
                **run["sizes"],
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"the network cannot be made: {error}") from error
