"""A data set distilled from end to end: experts, matching, the file, and what the file is worth; behind `coloss run dataset-distillation`."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coloss.data import IndexedDataset, Splits, load
from coloss.distillation.distillation_networks import distillation_network, named_augmentation, seeded
from coloss.distillation.distillation_plan import DistillationPlan, plan_for
from coloss.distillation.distilled_dataset import DistilledDataset, holds_distilled
from coloss.distillation.expert_trajectories import loss_ramp, record_trajectory
from coloss.distillation.fresh_networks import (
    NewNetwork,
    as_metrics,
    evaluate_distilled,
    evaluate_references,
    normalized,
)
from coloss.distillation.representatives import kmeans_representatives, random_representatives
from coloss.distillation.trajectory_matching import TrajectoryMatcher
from coloss.errors import InputError
from coloss.metrics import predict
from coloss.train import checkpoint as disk
from coloss.train.atomic_text import whole_file
from coloss.train.budget import Budget
from coloss.train.run_folder import claim_folder, source_name, write_metrics

Progress = Callable[[float], None]


def distill_dataset(
    data: str = "digits:1",
    folder: str | Path = "runs/dataset-distillation",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    plan: DistillationPlan | None = None,
    network: NewNetwork | None = None,
) -> dict[str, float]:
    """Distil a labelled data set into a few synthetic images of each class, store them, and say what they are worth.

    Trains experts and keeps their paths, learns the images, writes `distilled.npz`, and trains fresh networks on what that file holds,
    beside networks on as many real images. The folder also gets `metrics.json`, `run.json`, the experts and checkpoints; the same folder
    goes on where a stopped run ended, to the same bits on a CPU.

    A distilled file in place of data is judged again, with the data it names; nothing is distilled, and of the plan `networks` and
    `network_steps` alone count.

    Args:
        data: what `coloss.data.load` takes, with one class for each sample; `:10` after it asks for 10 images of each class.
        folder: of the results.
        budget: outer steps of matching; default: the plan's.
        seed: of the split and of everything random.
        progress: called with the share done.
        plan: default: `plan_for` the data.
        network: of experts, students and judges; default: `distillation_network`. No batch norm.

    Returns:
        `SET_accuracy` with its 95% interval `SET_accuracy_low`, `SET_accuracy_high` over fresh networks, final test accuracy; SET is
        "distilled", and of real images "random", "kmeans" (near K-means centres), "means" (the centres) and "whole" (all of them). Also
        "experts_accuracy" on validation data where their paths end, "learning_rate" as learned, "matching_loss" of the last tenth, and
        "matching_loss_at_rest", that of a student which does not move. A network that diverges has accuracy 0.

    Raises:
        InputError: for data that cannot be read or have no single class, a budget that is not in steps or for a distilled file, or a
            folder of another run.

    Source:
        Shen, Yang, Lam, 2023, arXiv 2310.10541.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> plan = DistillationPlan(
        ...     experts=1, expert_epochs=3, max_start=2, steps=2, networks=2, network_steps=3
        ... )
        >>> metrics = distill_dataset("iris:2", folder, budget=Budget(steps=2), plan=plan)
        >>> DistilledDataset.load(folder / "distilled.npz").images.shape, metrics["learning_rate"] > 0
        (torch.Size([6, 4]), True)
    """
    report = progress or (lambda share: None)
    if Path(data).is_file() and holds_distilled(data):
        if budget is not None:
            raise InputError(
                "dataset-distillation takes no budget for a distilled file: it is judged, not distilled"
            )
        return _judge_file(Path(data), Path(folder), seed, report, network, plan)
    name, count = _split_count(data)
    splits = _load(name, seed)
    plan = plan or plan_for(splits, count or 1)
    if count is not None:
        plan = replace(plan, images_per_class=count)
    if budget is not None:
        if budget.steps is None:
            raise InputError("dataset-distillation takes a budget in steps, like 500steps")
        plan = replace(plan, outer_steps=budget.steps)
    folder = Path(folder)
    described = {key: value for key, value in asdict(plan).items() if key != "outer_steps"}
    build = network or partial(distillation_network, splits.input_shape, splits.num_classes or 0)
    described["parameters"] = [list(p.shape) for p in seeded(build, seed).parameters()]
    claim_folder(folder, {"data": source_name(name), "seed": seed, "plan": described})
    distilled, numbers = distill_splits(
        splits,
        plan,
        build,
        seed=seed,
        folder=folder,
        source=source_name(name),
        progress=lambda s: report(0.6 * s),
    )
    path = distilled.save(folder / "distilled.npz")
    metrics = _judged(
        DistilledDataset.load(path), splits, build, plan, seed, lambda share: report(0.6 + 0.4 * share)
    )
    metrics |= numbers
    write_metrics(folder, metrics)
    return metrics


def distill_splits(
    splits: Splits,
    plan: DistillationPlan,
    network: NewNetwork,
    *,
    seed: int = 0,
    folder: Path | None = None,
    source: str = "",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[DistilledDataset, dict[str, float]]:
    """Experts and matching: the two stages that see training data.

    Args:
        splits: the data; validation data serve "experts_accuracy" alone, test data are not looked at.
        plan: every choice.
        network: builds experts and students.
        seed: of everything random.
        folder: keeps experts and checkpoints, so that a stopped run goes on; None keeps nothing.
        source: what the file will name as its source.
        device: default: a GPU if there is one.
        progress: called with the share done.

    Returns:
        The distilled data set, and "experts_accuracy", "learning_rate", "matching_loss" and "matching_loss_at_rest" as of
        `distill_dataset`.
    """
    report = progress or (lambda share: None)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mean, scale = _statistics(splits)
    train = normalized(splits.train, lambda raw: (raw - mean) / scale).to(device)
    validation = normalized(splits.validation, lambda raw: (raw - mean) / scale)
    trajectories, accuracies = [], []
    for number in range(plan.experts):

        def expert_share(share: float, number: int = number) -> None:
            report(0.3 * (number + share) / plan.experts)

        trajectory, accuracy = _expert(number, train, validation, plan, network, seed, folder, expert_share)
        trajectories.append(trajectory)
        accuracies.append(accuracy)
    generator = torch.Generator().manual_seed(_stage_seed(seed, "matching"))
    rows = _first_images(train, plan, network, trajectories[0], seed, generator)
    model = seeded(network, seed).to(device)
    assert isinstance(train.inputs, Tensor) and isinstance(train.targets, Tensor)
    labels = torch.nn.functional.one_hot(train.targets[rows], splits.num_classes or 0).float()
    matcher = TrajectoryMatcher(
        model,
        trajectories,
        train.inputs[rows],
        labels,
        steps=plan.steps,
        expert_steps=plan.expert_steps,
        max_start=plan.max_start,
        learning_rate=plan.learning_rate,
        momentum=plan.momentum,
        intermediate=plan.intermediate,
        balanced=plan.balanced,
        perturbation=plan.perturbation,
        learn_labels=plan.learn_labels,
        image_rate=plan.image_rate,
        clip=plan.clip,
        inner_batch=plan.inner_batch,
        augment=named_augmentation(plan.augmentation),
        checkpoint=plan.checkpoint,
        truncate=plan.truncate,
        generator=generator,
    )
    place = folder / "matching" if folder is not None else None
    losses = _match(matcher, plan.outer_steps, place, lambda share: report(0.3 + 0.7 * share))
    images, targets, rate = matcher.dataset()
    last = losses[-max(len(losses) // 10, 1) :]
    numbers = {
        "experts_accuracy": sum(accuracies) / len(accuracies),
        "learning_rate": rate,
        "matching_loss": sum(last) / len(last),
        "matching_loss_at_rest": matcher.loss_at_rest,
    }
    distilled = DistilledDataset(
        images.cpu(),
        targets.cpu(),
        rate,
        plan.momentum,
        mean,
        scale,
        source or splits.name,
        seed,
        plan.images_per_class,
        tuple(splits.class_names or ()),
        plan.augmentation,
    )
    return distilled, numbers


def _match(matcher: TrajectoryMatcher, steps: int, folder: Path | None, report: Progress) -> list[float]:
    """Outer steps from where the newest checkpoint is, up to a number; the losses of all of them."""
    losses: list[float] = []
    found = disk.checkpoints(folder) if folder is not None else []
    if found:
        tensors, values = disk.load_checkpoint(found[-1])
        if values["step"] > steps:
            raise InputError(
                f"{folder} has {values['step']} steps already, more than {steps}: choose another folder"
            )
        try:
            matcher.load_state_dict(disk.join_state("matcher/", tensors, {}))
            disk.join_optimizer(matcher.optimizer, tensors, values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{found[-1]} is of another run: {' '.join(str(error).split())}") from error
        matcher.generator.set_state(tensors["random"])
        losses = [float("nan") if loss is None else loss for loss in values["losses"]]
    every = max(min(steps // 10, 50), 1)
    while len(losses) < steps:
        losses.append(matcher.step())
        if folder is not None and (len(losses) % every == 0 or len(losses) == steps):
            _save(matcher, losses, folder)
        report(len(losses) / steps)
    return losses


def _save(matcher: TrajectoryMatcher, losses: list[float], folder: Path) -> None:
    tensors, _ = disk.split_state("matcher/", matcher.state_dict())
    optimizer_tensors, optimizer_values = disk.split_optimizer(matcher.optimizer)
    values: Mapping[str, Any] = {
        "optimizer": optimizer_values,
        "losses": [loss if loss == loss and abs(loss) != float("inf") else None for loss in losses],
    }
    random = {"random": matcher.generator.get_state()}
    disk.save_checkpoint(folder, len(losses), tensors | optimizer_tensors | random, values)


def _expert(
    number: int,
    train: IndexedDataset,
    validation: IndexedDataset,
    plan: DistillationPlan,
    network: NewNetwork,
    seed: int,
    folder: Path | None,
    report: Progress,
) -> tuple[Tensor, float]:
    """One expert's path and its validation accuracy, from its file if that is there."""
    path = folder / "experts" / f"expert-{number:03d}.safetensors" if folder is not None else None
    if path is not None and path.exists():
        try:
            stored = load_file(path)
            return stored["trajectory"], float(stored["accuracy"])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it") from error
    own = _stage_seed(seed, f"expert {number}")
    model = seeded(network, own).to(train.ids.device)
    trajectory = record_trajectory(
        model,
        train,
        epochs=plan.expert_epochs,
        learning_rate=plan.expert_rate,
        momentum=plan.expert_momentum,
        weight_decay=plan.expert_decay,
        batch_size=plan.expert_batch,
        loss_scale=loss_ramp(epochs=plan.ramp_epochs) if plan.ramp_epochs else None,
        penalty=plan.penalty,
        augment=named_augmentation(plan.augmentation),
        stop_after=plan.trained_epochs,
        generator=torch.Generator().manual_seed(own),
        progress=report,
    )
    logits, targets = predict(model, validation)
    accuracy = (logits.argmax(1) == targets).double().mean()
    if path is not None:
        try:
            with whole_file(path) as temporary:
                save_file({"trajectory": trajectory, "accuracy": accuracy}, temporary)
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error
    return trajectory, float(accuracy)


def _first_images(
    train: IndexedDataset,
    plan: DistillationPlan,
    network: NewNetwork,
    trajectory: Tensor,
    seed: int,
    generator: torch.Generator,
) -> Tensor:
    """Places of the real images that the synthetic ones start as."""
    from coloss.train.unrolling import FlatParameters

    assert isinstance(train.inputs, Tensor) and isinstance(train.targets, Tensor)
    try:
        if plan.start == "random":
            return random_representatives(train.targets, plan.images_per_class, generator)
        model = seeded(network, seed)
        FlatParameters(model).load(trajectory[-1])
        logits, targets = predict(model, train.to("cpu"))
        chosen = kmeans_representatives(logits, targets, plan.images_per_class, seed)
    except ValueError as error:
        raise InputError(f"images_per_class is too large: {error}") from error
    return chosen.to(train.targets.device)


def _judged(
    distilled: DistilledDataset,
    splits: Splits,
    network: NewNetwork | None,
    plan: DistillationPlan,
    seed: int,
    report: Progress,
) -> dict[str, float]:
    options: dict[str, Any] = {"networks": plan.networks, "steps": plan.network_steps, "seed": seed}
    found = {"distilled": evaluate_distilled(distilled, splits, network, **options)}
    report(0.1)
    found |= evaluate_references(
        distilled, splits, network, progress=lambda share: report(0.1 + 0.9 * share), **options
    )
    return as_metrics(found)


def _judge_file(
    path: Path,
    folder: Path,
    seed: int,
    report: Progress,
    network: NewNetwork | None,
    plan: DistillationPlan | None,
) -> dict[str, float]:
    distilled = DistilledDataset.load(path)
    splits = _load(distilled.source, distilled.seed)
    plan = plan or plan_for(splits, distilled.images_per_class)
    claim_folder(folder, {"data": source_name(str(path)), "seed": seed})
    metrics = _judged(distilled, splits, network, plan, seed, report)
    write_metrics(folder, metrics)
    return metrics


def _split_count(data: str) -> tuple[str, int | None]:
    """`mnist:10` as ("mnist", 10); a path that exists is a path, whatever it ends in."""
    name, colon, count = data.rpartition(":")
    if not colon or Path(data).exists() or not count.lstrip("-").isdigit():
        return data, None
    if int(count) < 1:
        raise InputError(f"images per class must be >= 1, got {count}")
    return name, int(count)


def _load(data: str, seed: int) -> Splits:
    splits = load(data, seed=seed)
    if not isinstance(splits, Splits) or splits.kind != "classification":
        raise InputError(f"data must have one class for each sample, got the {splits.kind} set {data}")
    if not isinstance(splits.train.inputs, Tensor):
        raise InputError(f"data must have one tensor of inputs, got several in {data}")
    return splits


def _statistics(splits: Splits) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the training images; other inputs are standardised already."""
    inputs = splits.train.inputs
    assert isinstance(inputs, Tensor)
    if inputs.ndim != 4:
        return torch.zeros(1), torch.ones(1)
    mean, std = inputs.mean((0, 2, 3)), inputs.std((0, 2, 3))
    return mean[:, None, None], torch.where(std > 0, std, 1.0)[:, None, None]


def _stage_seed(seed: int, stage: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {stage}".encode()).digest()[:4], "little")
