"""Stages trained one after the other and kept on disk, with a curve of validation loss against training FLOPs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, Loader
from coloss.distillation.v_cycle import Stage, training_flops
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.nn import next_token_loss
from coloss.train import Budget, fit, load_model, save_model
from coloss.train.atomic_text import write_atomically
from coloss.train.state_map import LazyTensors

Stages: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], Iterator[Stage]]
"""State dicts that the finished stages ended with, to the stages that are left."""

_WINDOWS_AT_ONCE = 64


@dataclass(frozen=True)
class CurvePoint:
    """Where a run stood: FLOPs and seconds of training so far, over all stages, and the validation loss of the model then trained.

    Attributes:
        stage: number of the stage.
        step: of the stage; 0 is its beginning.
        flops: of training so far.
        seconds: of training so far.
        loss: on validation data, nats per token.
    """

    stage: int
    step: int
    flops: float
    seconds: float
    loss: float


@dataclass
class StagedRun:
    """A model trained in stages.

    Attributes:
        model: of the last stage.
        curve: over all stages.
        flops: of training.
        seconds: of training, evaluation excluded.
    """

    model: nn.Module
    curve: list[CurvePoint] = field(default_factory=list)
    flops: float = 0.0
    seconds: float = 0.0


def train_in_stages(
    new_model: Callable[[int], nn.Module],
    stages: Stages,
    train: IndexedDataset,
    validation: IndexedDataset,
    *,
    learning_rate: float,
    warmup_steps: int = 20,
    batch_size: int = 16,
    evaluate_every: int = 50,
    folder: Path | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> StagedRun:
    """Train language models through stages; each with a fresh AdamW whose rate rises over `warmup_steps` and falls in a line to 0.

    All batches are whole, so that each step of a stage costs the same: what is left of an epoch is left out of it.

    Args:
        new_model: level -> a model, as for `VCycle`.
        stages: finished state dicts -> the stages that are left; `VCycle.stages`, or one plain stage of `single_stage`. The last one is
            of level 0.
        train: windows of ids and their next ids.
        validation: likewise.
        learning_rate: peak of the large model's; a stage's scale multiplies it.
        warmup_steps: at most half of a stage's.
        batch_size: windows a step; all there are, if they are fewer.
        evaluate_every: steps between points of the curve.
        folder: for what each stage ended with and checkpoints; a run that was stopped goes on there.
        seed: of batch order and dropout; each stage draws its own order.
        progress: called with the training FLOPs spent so far.

    Returns:
        The last model and the curve.

    Raises:
        InputError: if the folder cannot be read or written, or there is no stage.
        NonFiniteLossError: if training diverges.
    """
    finished, done = _read_finished(folder)
    batch_size = min(batch_size, len(train))
    run: StagedRun | None = None
    for place, stage in enumerate(stages(finished), start=len(finished)):
        seed_of_stage = seed + 7919 * stage.number
        begun = done[-1] if done else CurvePoint(0, 0, 0.0, 0.0, 0.0)
        inputs, targets = train.inputs[:batch_size], train.targets[:batch_size]  # type: ignore[index]
        cost = training_flops(stage.model, next_token_loss, inputs, targets)  # type: ignore[arg-type]
        points = [
            CurvePoint(stage.number, 0, begun.flops, begun.seconds, held_out_loss(stage.model, validation))
        ]
        found = fit(
            stage.model,
            Loader(train, batch_size, drop_last=True, seed=seed_of_stage),
            next_token_loss,
            budget=Budget(steps=stage.steps),
            optimizer=partial(torch.optim.AdamW, lr=learning_rate * stage.learning_rate_scale),
            learning_rate_schedule=_rise_and_fall(min(warmup_steps / stage.steps, 0.5)),
            evaluate=lambda model: {"validation_loss": held_out_loss(model, validation)},
            evaluate_every=evaluate_every,
            log_every=evaluate_every,
            checkpoint_dir=None if folder is None else folder / f"stage-{place}",
            checkpoint_every=max(stage.steps // 4, 1),
            resume=folder is not None,
            progress=_flops_reported(progress, begun.flops, cost * stage.steps),
            seed=seed_of_stage,
        )
        for point in found.history:
            if "validation_loss" in point.metrics:
                points.append(
                    CurvePoint(
                        stage.number,
                        point.step,
                        begun.flops + point.step * cost,
                        begun.seconds + point.seconds,
                        point.metrics["validation_loss"],
                    )
                )
        done += points
        if folder is not None:
            rows = json.dumps([asdict(point) for point in points])
            write_atomically(folder / f"stage-{place}.json", rows + "\n")
            save_model(found.model, folder / f"stage-{place}.safetensors")
        run = StagedRun(found.model, list(done), done[-1].flops, done[-1].seconds)
    if run is None:
        if folder is None or not finished:
            raise InputError("stages must give at least one stage to train, got none")
        # All had ended before.
        model = load_model(new_model(0), folder / f"stage-{len(finished) - 1}.safetensors").eval()
        run = StagedRun(model, list(done), done[-1].flops, done[-1].seconds)
    return run


def single_stage(new_model: Callable[[int], nn.Module], steps: int) -> Stages:
    """Training from scratch, as one stage."""

    def stages(finished: Sequence[Mapping[str, Any]] = ()) -> Iterator[Stage]:
        if not finished:
            yield Stage(0, 0, new_model(0), steps, 1.0)

    return stages


def held_out_loss(model: nn.Module, windows: IndexedDataset) -> float:
    """Mean cross-entropy of the next token in nats, over all windows; the model's mode stays as it was.

    Examples:
        >>> class Even(nn.Module):
        ...     def forward(self, ids: Tensor) -> Tensor:
        ...         return torch.zeros(*ids.shape, 4)
        >>> round(held_out_loss(Even(), IndexedDataset(torch.zeros(3, 2).long(), torch.ones(3, 2).long())), 4)
        1.3863
    """
    inputs, targets = windows.inputs, windows.targets
    assert isinstance(inputs, Tensor) and isinstance(targets, Tensor)
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    total = 0.0
    with evaluation_mode(model), torch.no_grad():
        for some, wanted in zip(inputs.split(_WINDOWS_AT_ONCE), targets.split(_WINDOWS_AT_ONCE)):
            total += float(next_token_loss(model(some.to(device)), wanted.to(device))) * len(some)
    return total / len(inputs)


def flops_to_reach(curve: Sequence[CurvePoint], loss: float, *, last_stage_only: bool = True) -> float:
    """Training FLOPs until a curve first is at `loss` or below, on a straight line between its points; infinity if it never is.

    Args:
        curve: of one run.
        loss: to be reached.
        last_stage_only: count only points of the last stage, in which the model that ships is trained.

    Examples:
        >>> curve = [
        ...     CurvePoint(0, step, 100.0 * step, 0.0, loss) for step, loss in ((0, 4.0), (1, 3.0), (2, 2.0))
        ... ]
        >>> flops_to_reach(curve, 2.5), flops_to_reach(curve, 1.0)
        (150.0, inf)
    """
    points = [point for point in curve if not last_stage_only or point.stage == curve[-1].stage]
    if points and points[0].loss <= loss:
        return points[0].flops
    for before, after in pairwise(points):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return before.flops + share * (after.flops - before.flops)
    return float("inf")


def _flops_reported(
    progress: Callable[[float], None] | None, before: float, cost: float
) -> Callable[[float, dict[str, float]], None] | None:
    if progress is None:
        return None
    return lambda share, terms: progress(before + share * cost)


def _rise_and_fall(warmup: float) -> Callable[[float], float]:
    def schedule(progress: float) -> float:
        return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)

    return schedule


def _read_finished(folder: Path | None) -> tuple[list[Mapping[str, Any]], list[CurvePoint]]:
    states: list[Mapping[str, Any]] = []
    points: list[CurvePoint] = []
    while folder is not None and (path := folder / f"stage-{len(states)}.safetensors").exists():
        try:
            points += [CurvePoint(**row) for row in json.loads(path.with_suffix(".json").read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path.with_suffix('.json')} is damaged ({error}): choose another folder"
            ) from error
        states.append(LazyTensors(path))
    return states, points
