"""What is measured of dual-head distillation: uses of a teacher's logits beside each other, on 77 kinds of questions to a bank."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import IndexedDataset, Splits, load
from coloss.distillation.conflict_report import conflict_report
from coloss.distillation.dual_head import DualHeadDistillation
from coloss.distillation.logit_distillation import LogitDistillation
from coloss.distillation.teacher import tabulate_teacher_logits
from coloss.metrics import evaluate_classifier
from coloss.nn import MLP, Classifier
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.method import Method
from coloss.train.outcome import Fit
from coloss.train.schedules import cosine
from coloss.train.task import Setting

QUESTIONS = 1536
"""Training questions, of 8,005: twenty of each kind, about, and whole batches, whose statistics the small student needs."""

WIDTH = 8
"""Features of the student, a tenth of the 77 classes."""


@dataclass(frozen=True)
class Use:
    """One way to use the teacher, at the learning rate, weight decay and weight that were best for it on validation questions of other seeds.

    Args:
        learning_rate: of the student.
        weight_decay: of the student, and of a second head.
        weight: of the distillation term.
        method: class of the Method; None leaves the teacher out.
        options: of the Method.

    Examples:
        >>> Use(0.6, 2e-3).methods(torch.zeros(4, 3))
        []
    """

    learning_rate: float
    weight_decay: float
    weight: float = 0.0
    method: type[LogitDistillation] | type[DualHeadDistillation] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def methods(self, teacher_logits: Tensor) -> list[Method]:
        """The Method, if any, made for the teacher's logits of the training questions."""
        if self.method is None:
            return []
        # Taking off the mean changes nothing for the losses of softmaxes and spares the others an offset that means nothing.
        made: Any = self.method
        return [made(teacher_logits=teacher_logits, weight=self.weight, center_teacher=True, **self.options)]


def one_head(learning_rate: float, weight_decay: float, weight: float, loss: str) -> Use:
    """Cross-entropy and a distillation loss on the one classifier.

    Examples:
        >>> one_head(0.6, 2e-3, 0.1, "kl").options
        {'loss': 'kl'}
    """
    return Use(learning_rate, weight_decay, weight, LogitDistillation, {"loss": loss})


def dual_head(learning_rate: float, weight_decay: float, weight: float, **options: Any) -> Use:
    """Cross-entropy on the classifier, the logit gap on a second head.

    Examples:
        >>> dual_head(0.6, 2e-3, 0.1, head="linear").options
        {'head': 'linear'}
    """
    return Use(learning_rate, weight_decay, weight, DualHeadDistillation, options)


USES: Mapping[str, Use] = {
    "cross-entropy": Use(1.0, 2e-3),
    "one head, kl": one_head(1.0, 5e-4, 0.03, "kl"),
    "one head, logit gap": one_head(0.6, 5e-4, 0.003, "logit_gap"),
    "dual head": dual_head(0.6, 5e-3, 0.3),
}
"""The arms of the claim."""


def few_questions(seed: int) -> Splits:
    """Questions to a bank as TF-IDF vectors, few of them for training; the origin's test part as it is.

    Examples:
        >>> splits = few_questions(0)
        >>> len(splits.train), len(splits.test), splits.num_classes
        (1536, 3080, 77)
    """
    splits = load("banking77", seed=seed)
    assert isinstance(splits, Splits)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    return replace(splits, train=splits.train.subset(order[:QUESTIONS]))


def teach(splits: Splits, seed: int, epochs: float = 10) -> nn.Module:
    """The teacher: width 256, on the same training questions as its students."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = MLP(splits.input_shape[0], [256], splits.num_classes)
    return fit(
        teacher,
        splits.train,
        F.cross_entropy,
        budget=Budget(epochs=epochs),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        learning_rate_schedule=cosine(),
        seed=seed,
    ).model


def train_student(splits: Splits, teacher_logits: Tensor, use: Use, seed: int, epochs: float = 20) -> Fit:
    """A student trained in one way, from the same initial weights and on the same batches as in any other."""
    assert splits.num_classes is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        student = Classifier(MLP(splits.input_shape[0], [WIDTH]), splits.num_classes)
    return fit(
        student,
        splits.train,
        F.cross_entropy,
        use.methods(teacher_logits),
        budget=Budget(epochs=epochs),
        optimizer=partial(torch.optim.SGD, lr=use.learning_rate, momentum=0.9, weight_decay=use.weight_decay),
        learning_rate_schedule=cosine(),
        seed=seed,
    )


def compare_uses(setting: Setting) -> dict[str, dict[str, float]]:
    """One seed of the claim: one teacher, and a student for each use of it, judged on test questions.

    Where both losses meet on one head, and for cross-entropy alone, `cosine_...` say how they agree at the end of training.
    """
    splits = few_questions(setting.seed)
    epochs = 0.1 if setting.smoke else 20
    teacher = teach(splits, setting.seed, 0.1 if setting.smoke else 10)
    table = tabulate_teacher_logits(teacher, splits.train)
    found = {}
    for name, use in USES.items():
        run = train_student(splits, table, use, setting.seed, epochs)
        metrics = dict(evaluate_classifier(run.model, splits.test))
        if name in ("cross-entropy", "one head, logit gap"):
            metrics |= _cosines(run.model, table, splits.train)
        found[name] = metrics
    return found | {"teacher": dict(evaluate_classifier(teacher, splits.test))}


def _cosines(student: nn.Module, teacher_logits: Tensor, train: IndexedDataset) -> dict[str, float]:
    centred = teacher_logits - teacher_logits.mean(1, keepdim=True)
    report = conflict_report(student, centred, train)
    return {
        "cosine_classifier": report.classifier.mean_cosine,
        "cosine_features": report.features.mean_cosine,
        "cosine_backbone": report.backbone.mean_cosine,
    }
