"""The small experiment on which DFKD-T3 is measured: 40 intents of bank customers, whose questions the student never sees.

How many intents there are, and the settings of all students, were chosen on validation questions: that far the setting is not data-free.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from coloss.data import IndexedDataset
from coloss.distillation.data_free_distillation import DataFreeDistillation, student_and_rewriter_adamw
from coloss.distillation.data_free_recipe import (
    REWRITER_RATE,
    STUDENT_RATE,
    TextTask,
    judge_student,
    pretrain_rewriter,
    public_texts,
    small_text_classifier,
    text_task,
    train_text_teacher,
)
from coloss.distillation.token_generator import PADDING, SPECIAL, distinct_share
from coloss.metrics import evaluate_classifier
from coloss.train import Budget, Setting, cosine, fit

INTENTS, WORDS, PUBLIC_WORDS = 40, 12, 8
TEACHER_STEPS, REWRITER_STEPS, STUDENT_STEPS, BATCH, STUDENT_DIM = 200, 200, 320, 32, 24


def bank_task(seed: int) -> TextTask:
    """40 intents of banking77, drawn by seed, as ids of 12 words.

    Examples:
        >>> task = bank_task(0)
        >>> task.num_classes, task.train.inputs.shape[1]
        (40, 12)
    """
    return text_task("banking77", seed, classes=INTENTS, length=WORDS)


ARMS = ("rewriter", "random words", "public texts", "rewriter, only pretrained", "task's own texts")
"""What the claim compares; `compare_texts` knows more."""


def compare_texts(setting: Setting, names: Sequence[str] = ARMS) -> dict[str, dict[str, float]]:
    """Students of one teacher and of equal beginning, each with as many queries and steps, on texts from different sources.

    Args:
        setting: of the claim.
        names: of arms: those of the claim, "frequent words", and the rewriter with "no specificity", "no balance", "no disagreement" or
            "not kept readable".
    """
    seed, task = setting.seed, bank_task(setting.seed)
    smoke = setting.smoke
    teacher = train_text_teacher(task, 3 if smoke else TEACHER_STEPS, seed=seed)
    words = len(task.vocabulary)
    public = public_texts(task.vocabulary, PUBLIC_WORDS)
    generator = torch.Generator().manual_seed(seed)
    public = public[torch.randperm(len(public), generator=generator)]
    rewriter = pretrain_rewriter(
        public, words, INTENTS, 3 if smoke else REWRITER_STEPS, batch_size=BATCH, seed=seed
    )
    there = public != PADDING
    known = public[there]
    arms: dict[str, tuple[Tensor, dict[str, Any] | None]] = {
        "rewriter": (public, {}),
        "random words": (torch.randint(SPECIAL, words, public.shape, generator=generator) * there, None),
        "frequent words": (known[torch.randint(len(known), public.shape, generator=generator)] * there, None),
        "public texts": (public, None),
        "rewriter, only pretrained": (public, {"frozen": True}),
        "rewriter, no specificity": (public, {"specificity": 0.0}),
        "rewriter, no balance": (public, {"balance": 0.0}),
        "rewriter, no disagreement": (public, {"adversarial": 0.0}),
        "rewriter, not kept readable": (public, {"readable": 0.0}),
        "task's own texts": (task.train.all().inputs, None),
    }
    found = {}
    for name in names:
        texts, options = arms[name]
        method = DataFreeDistillation(teacher)
        if options is not None:
            own = deepcopy(rewriter)
            frozen = "frozen" in options
            own.requires_grad_(not frozen)
            method = DataFreeDistillation(teacher, own, **({} if frozen else options))
        found[name] = _measure(task, teacher, texts, method, seed, smoke)
    found["teacher"] = dict(evaluate_classifier(teacher, task.test))
    return found


def _measure(
    task: TextTask,
    teacher: torch.nn.Module,
    texts: Tensor,
    method: DataFreeDistillation,
    seed: int,
    smoke: bool,
) -> dict[str, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed + 2)
        student = small_text_classifier(len(task.vocabulary), INTENTS, STUDENT_DIM, WORDS)
    run = fit(
        student,
        IndexedDataset(texts),
        methods=[method],
        budget=Budget(steps=3 if smoke else STUDENT_STEPS),
        batch_size=BATCH,
        optimizer=student_and_rewriter_adamw(method.rewriter, STUDENT_RATE, REWRITER_RATE),
        learning_rate_schedule=cosine(warmup=0.05),
        seed=seed,
    )
    metrics = dict(evaluate_classifier(run.model, task.test))
    labels = method.answers.softmax(1)
    spread = labels.mean(0)
    return {
        "accuracy": metrics["accuracy"],
        "agreement": judge_student(run.model, teacher, task.test)["agreement"],
        "queries": float(method.queries),
        "teacher_confidence": labels.amax(1).mean().item(),
        "teacher_label_entropy": -(spread * spread.clamp(min=1e-30).log()).sum().item(),
        "distinct_2": distinct_share(method.texts.cpu()),
    }
