"""Says for any classification data whether distillation needs a second head, before anybody pays for one: behind `coloss run dhkd`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coloss.data import Splits, load
from coloss.distillation.conflict_report import conflict_report
from coloss.distillation.logit_distillation import LogitDistillation
from coloss.distillation.teacher import tabulate_teacher_logits
from coloss.errors import InputError
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, Classifier, ConvNet
from coloss.train.atomic_text import write_atomically
from coloss.train.budget import Budget
from coloss.train.checkpoint import load_model, save_model
from coloss.train.loop import fit
from coloss.train.run_folder import claim_folder, source_name, write_metrics
from coloss.train.schedules import cosine


def audit_conflict(
    data: str = "digits",
    folder: str | Path = "runs/dhkd",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    width: float = 1.0,
) -> dict[str, float]:
    """Distil a large network into a small one with one head, and report how cross-entropy and the logit gap pull at it in the end.

    The folder gets `teacher.safetensors` and `student.safetensors`, `metrics.json`, `run.json`, `recommendation.txt` with the sentence of
    `ConflictReport`, and checkpoints; the same folder goes on where a stopped run ended.

    Args:
        data: what `coloss.data.load` takes, with one class for each sample.
        folder: of the results.
        budget: of each of the two networks; default: 20 epochs, at least 300 and at most 2,000 steps.
        seed: of the split and of training.
        progress: called with the share done.
        width: > 0, of the student: 1 has convolutions of 16 and 32 channels or layers of 64, 0.125 has an eighth. The teacher has four
            times the width of 1.

    Returns:
        `second_head`, 1 where it is worth a try, else 0; the cosines and shares of `ConflictReport.metrics`; `accuracy` and
        `teacher_accuracy` on test data.

    Raises:
        InputError: for data that cannot be read or have no classes, a width that is not > 0, or a folder that holds another run.

    Cost: training of two small networks.

    Source:
        Yang et al., 2024 (DHKD), arXiv 2411.08937, whose argument for a second head this puts to the test.

    Examples:
        >>> import tempfile
        >>> found = audit_conflict("iris", tempfile.mkdtemp(), budget=Budget(steps=2))
        >>> found["second_head"], -1 <= found["cosine_features"] <= 1
        (0.0, True)
    """
    if not width > 0:
        raise InputError(f"width must be > 0, got {width}")
    splits = load(data, seed=seed)
    if not isinstance(splits, Splits) or splits.kind != "classification":
        raise InputError(f"data must have one class for each sample, got a {splits.kind} set")
    assert splits.num_classes is not None
    classes = splits.num_classes
    folder = Path(folder)
    if budget is None:
        epoch = max(len(splits.train) // 64, 1)
        budget = Budget(steps=min(max(20 * epoch, 300), 2000))
    run = {
        "data": source_name(data),
        "seed": seed,
        "input_shape": list(splits.input_shape),
        "width": width,
        "budget": budget.as_dict(),
    }
    claim_folder(folder, run)

    def train(name: str, network: nn.Module, methods: Any, share: float) -> nn.Module:
        path = folder / f"{name}.safetensors"
        fitted = fit(
            network,
            splits.train,
            F.cross_entropy,
            methods,
            budget=budget,
            optimizer=partial(torch.optim.AdamW, lr=2e-3),
            learning_rate_schedule=cosine(warmup=0.05),
            checkpoint_dir=folder / "checkpoints" / name,
            resume=True,
            progress=(lambda done, terms: progress(share + done / 2)) if progress is not None else None,
            seed=seed,
        )
        save_model(fitted.model, path)
        return load_model(network.cpu(), path).eval()

    teacher = train("teacher", _network(splits.input_shape, classes, 4.0, seed=seed), [], 0.0)
    table = tabulate_teacher_logits(teacher, splits.train)
    method = LogitDistillation(
        teacher_logits=table, loss="logit_gap", weight=10 / classes, center_teacher=True
    )
    student = train("student", _network(splits.input_shape, classes, width, seed=seed), [method], 0.5)
    report = conflict_report(student, method.teacher, splits.train)
    write_atomically(folder / "recommendation.txt", report.recommendation + "\n")
    metrics = {
        "second_head": float(bool(report.second_head)),
        **report.metrics(),
        "accuracy": float(evaluate_classifier(student, splits.test)["accuracy"]),
        "teacher_accuracy": float(evaluate_classifier(teacher, splits.test)["accuracy"]),
    }
    write_metrics(folder, metrics)
    return metrics


def _network(shape: Sequence[int], num_classes: int, width: float, *, seed: int) -> nn.Module:
    channels = tuple(max(int(width * count), 1) for count in (16, 32, 32))
    features = max(int(width * 64), 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone: nn.Module
        if len(shape) == 3:
            backbone = ConvNet(shape[0], channels)
        elif len(shape) == 2:
            backbone = ConvNet(shape[0], channels, dims=1)
        else:
            backbone = MLP(shape[0], (features, features))
        return Classifier(backbone, num_classes)
