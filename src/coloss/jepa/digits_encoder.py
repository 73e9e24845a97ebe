"""The small experiment on which this family's claims are measured: an encoder for 8 x 8 digits, learnt without labels."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from coloss.data import IndexedDataset, Splits, load
from coloss.errors import InputError
from coloss.metrics import evaluate_encoder
from coloss.nn import MLP
from coloss.train.budget import Budget
from coloss.train.task import Task


def digits_task(budget: Budget) -> Task:
    """1,200 training images, the other 597 for the test; an MLP 64-256-256-64; probes with 100 labels.

    Nothing is tuned during a run, so there is no validation part.

    Args:
        budget: of each arm.

    Examples:
        >>> splits = digits_task(Budget(steps=1)).load(0)
        >>> (
        ...     len(splits.train),
        ...     len(splits.test),
        ...     sorted(set(splits.train.ids.tolist()) & set(splits.test.ids.tolist())),
        ... )
        (1200, 597, [])
    """
    return Task(
        name="digits-1200-ssl",
        kind="self-supervised",
        title="an encoder for 1,200 digits without labels, judged by probes with 100 labels",
        load=_load,
        model=_encoder,
        objective=None,
        objective_name="untrained",
        validate=_nothing,
        test=_probe,
        metric="knn",
        budget=budget,
        batch_size=128,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluate_every=10**9,
    )


def _load(seed: int) -> Splits:
    splits = load("digits", seed=seed)
    if not isinstance(splits, Splits):
        raise InputError("digits must be a classification set")
    parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
    inputs, targets, ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "ids")
    )
    everything = IndexedDataset(inputs, targets, ids)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    splits.train, splits.test = everything.subset(order[:1200]), everything.subset(order[1200:])
    splits.validation = everything.subset(order[:0])
    return splits


def _encoder(splits: Any) -> nn.Module:
    return MLP(64, (256, 256), 64)


def _nothing(model: nn.Module, splits: Any) -> Mapping[str, float]:
    return {}


def _probe(model: nn.Module, splits: Any) -> Mapping[str, float]:
    return evaluate_encoder(model, splits, labels=100)
