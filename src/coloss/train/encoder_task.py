"""Small experiments on encoders learnt without labels: train on inputs alone, judge by probes with few labels."""

from collections.abc import Callable, Mapping
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


def encoder_task(
    name: str,
    load_splits: Callable[[int], Splits],
    encoder: Callable[[Splits], nn.Module],
    budget: Budget,
    *,
    title: str = "an encoder learnt without labels, judged by probes",
    labels: int | None = 100,
    k: int = 5,
    batch_size: int = 128,
) -> Task:
    """A task that trains an encoder without labels and judges it on test data by a linear and a nearest-neighbour probe.

    There is no objective: a method must supply the loss. Nothing is validated during a run.

    Args:
        name: what tables call it.
        load_splits: seed -> splits with class indices as targets.
        encoder: splits -> a fresh network that gives one feature vector for each input.
        budget: of each arm.
        title: one line for people.
        labels: training labels that the probes get; None for all.
        k: neighbours.
        batch_size: samples in a step, before views.

    Examples:
        >>> task = encoder_task(
        ...     "small", lambda seed: load("digits", seed=seed, limit=50), lambda _: MLP(64, [8]), Budget(1)
        ... )
        >>> task.kind, task.metric, task.objective
        ('self-supervised', 'knn', None)
    """
    return Task(
        name=name,
        kind="self-supervised",
        title=title,
        load=load_splits,
        model=encoder,
        objective=None,
        objective_name="untrained",
        validate=_nothing,
        test=partial(_probe, labels=labels, k=k),
        metric="knn",
        budget=budget,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluate_every=10**9,
    )


def digits_encoder_task(budget: Budget) -> Task:
    """An MLP 64-256-256-64 on 1,200 digits, the other 597 for the test; probes with 100 labels.

    Args:
        budget: of each arm.

    Examples:
        >>> splits = digits_encoder_task(Budget(steps=1)).load(0)
        >>> (
        ...     len(splits.train),
        ...     len(splits.test),
        ...     sorted(set(splits.train.ids.tolist()) & set(splits.test.ids.tolist())),
        ... )
        (1200, 597, [])
    """
    return encoder_task(
        "digits-1200-ssl",
        _load_digits,
        _perceptron,
        budget,
        title="an encoder for 1,200 digits without labels, judged by probes with 100 labels",
    )


def _load_digits(seed: int) -> Splits:
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


def _perceptron(splits: Any) -> nn.Module:
    return MLP(64, (256, 256), 64)


def _nothing(model: nn.Module, splits: Any) -> Mapping[str, float]:
    return {}


def _probe(model: nn.Module, splits: Any, labels: int | None, k: int) -> Mapping[str, float]:
    return evaluate_encoder(model, splits, labels=labels, k=k)
