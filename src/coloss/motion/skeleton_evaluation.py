"""Says what a frozen encoder of skeletons is worth, in one table with what costs nothing: raw coordinates, and the encoder untrained."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import MotionClips, motion_splits
from coloss.errors import InputError
from coloss.metrics import extract_features, knn_probe, linear_probe

ENCODER, UNTRAINED, RAW = "encoder", "untrained encoder", "raw coordinates"
"""Rows of the table."""


def evaluate_skeleton_encoder(
    encoder: nn.Module | Mapping[str, nn.Module],
    data: Any,
    *,
    untrained: nn.Module,
    label: str | None = None,
    frames: int = 32,
    split: str = "test",
    k: int = 5,
    temperature: float = 0.1,
    label_shares: Sequence[float] = (0.01, 0.1),
    labels_per_class: Sequence[int] = (),
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 512,
) -> dict[str, dict[str, float]]:
    """Test accuracy of probes on frozen features: linear, nearest neighbours, and linear with few labels.

    Encoders are looked at in evaluation mode, whatever mode they are in: batch norms use their running statistics and keep them, dropout
    is off. (Probes of encoders left in training mode account for several irreproducible numbers of the field.) Raw coordinates are brought
    to mean 0 and variance 1 each by the training clips.

    Args:
        encoder: takes clips (clips, channels, frames, joints[, persons]) and gives a vector for each; or several by name, each a row.
        data: splits with `train` and the part to score, such as `coloss.data.motion_splits` gives; or `MotionClips`, the name of a data set
            or a path, which are divided by it: by person, or for `bandai` by pairs of action and style.
        untrained: the same network as initialised: what does training add?
        label: the class, for clips; their first label by default.
        frames: that clips are brought to.
        split: "test" or "validation".
        k: neighbours that vote, each with weight exp(cosine / temperature).
        temperature: > 0.
        label_shares: of the training labels for few-label probes, in (0, 1]; raised to one label for each class.
        labels_per_class: likewise, in labels for each class on average, >= 1.
        draws: of these labels, >= 1, the same for all rows; accuracies are averaged over them.
        seed: of the draws, and of the division of clips.
        batch_size: clips in one forward pass.

    Returns:
        For the rows "encoder" (or the names given), "untrained encoder" and "raw coordinates" the accuracies `linear`, `knn`, and `linear_1_percent` or
        `linear_5_per_class` and so on; `labels_1_percent` and so on say how many labels those are. NaN for features that are not finite.

    Raises:
        InputError: for a value out of range, `untrained` being the encoder itself, or data that cannot be divided.

    Cost:
        A forward pass of both encoders over the data, and a logistic regression for each number.

    Examples:
        >>> import numpy as np
        >>> from coloss.data import Skeleton
        >>> walks = [
        ...     np.full((9, 2, 3), float(n % 2)) + np.arange(9.0)[:, None, None] * (n % 2) for n in range(24)
        ... ]
        >>> clips = MotionClips.from_list(walks, Skeleton((-1, 0)), 15, labels={"action": [0, 1] * 12})
        >>> table = evaluate_skeleton_encoder(nn.Flatten(), clips, untrained=nn.Flatten(), frames=8)
        >>> sorted(table), table["raw coordinates"]["knn"]
        (['encoder', 'raw coordinates', 'untrained encoder'], 1.0)
    """
    encoders = dict(encoder) if isinstance(encoder, Mapping) else {ENCODER: encoder}
    for name in (UNTRAINED, RAW):
        if name in encoders:
            raise InputError(f"encoder must not be named {name!r}, a row of its own")
    if any(untrained is network for network in encoders.values()):
        raise InputError("untrained must be the network as initialised, got the encoder itself")
    if draws < 1:
        raise InputError(f"draws must be >= 1, got {draws}")
    for share in label_shares:
        if not 0 < share <= 1:
            raise InputError(f"label_shares must be in (0, 1], got {share}")
    for number in labels_per_class:
        if number < 1:
            raise InputError(f"labels_per_class must be >= 1, got {number}")
    if isinstance(data, MotionClips | str | Path):
        data = motion_splits(data, label=label, frames=frames, seed=seed)
    train, test = _whole(data, "train"), _whole(data, split)
    budgets = _budgets(train[1], label_shares, labels_per_class)
    mean, std = train[0].flatten(1).mean(0), train[0].flatten(1).std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    raw = [(inputs.flatten(1) - mean) / std for inputs, _ in (train, test)]
    rows = {
        name: [
            extract_features(network, inputs, batch_size=batch_size).features for inputs, _ in (train, test)
        ]
        for name, network in (encoders | {UNTRAINED: untrained}).items()
    } | {RAW: raw}
    return {
        name: _probed((seen, train[1], scored, test[1]), budgets, k, temperature, draws, seed)
        for name, (seen, scored) in rows.items()
    }


def _probed(
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    budgets: Mapping[str, int],
    k: int,
    temperature: float,
    draws: int,
    seed: int,
) -> dict[str, float]:
    if not bool(parts[0].isfinite().all() and parts[2].isfinite().all()):
        return dict.fromkeys(("linear", "knn", *(f"linear_{name}" for name in budgets)), math.nan)
    found = {
        "linear": linear_probe(*parts).accuracy,
        "knn": knn_probe(*parts, k=k, temperature=temperature).accuracy,
    }
    for name, labels in budgets.items():
        seeds = range(seed * draws, (seed + 1) * draws)
        drawn = [linear_probe(*parts, labels=labels, seed=draw).accuracy for draw in seeds]
        found |= {f"linear_{name}": sum(drawn) / draws, f"labels_{name}": float(labels)}
    return found


def _budgets(targets: Tensor, shares: Sequence[float], per_class: Sequence[int]) -> dict[str, int]:
    classes, count = len(targets.unique()), len(targets)
    named = {f"{100 * share:g}_percent": round(share * count) for share in shares}
    named |= {f"{number}_per_class": number * classes for number in per_class}
    return {name: min(max(labels, classes), count) for name, labels in named.items()}


def _whole(data: Any, name: str) -> tuple[Tensor, Tensor]:
    part = getattr(data, name, None)
    if part is None or not hasattr(part, "all") or not len(part):
        raise InputError(f"data must have clips for {name!r}, got a {type(data).__name__} without them")
    batch = part.all()
    if not isinstance(batch.inputs, Tensor) or not isinstance(batch.targets, Tensor):
        raise InputError(f"data.{name} must hold one tensor of clips and one of classes")
    return batch.inputs.float(), batch.targets
