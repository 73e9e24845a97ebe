"""Before paying for a second head or a second backward pass: do cross-entropy and the teacher's logits disagree at all?

What the advice rests on, for the logit gap: mean cosines of students trained to the end with both losses on one head, the gap weighed by
about 10 / classes, and what a second head then gained over the single one (questions: validation data of two seeds, the best learning
rate and weight of each at weight decay 5e-4; digits: test data of ten seeds, weight 1 for both):

    student                                classifier   features   gain
    8 features, 77 kinds of questions         +0.2        -0.7     +2 points of accuracy
    32 features, 77 kinds of questions        +0.3        -0.2     none
    8 features, 10 digits                     +0.4        +0.3     none beyond the noise

So it is the features on which the losses oppose each other where a second head pays, not the classifier's rows, as its authors expect:
eight features have no room for both the classes and 77 logits in one matrix. At other weights, and for other losses, the cosines are other
numbers and nothing was measured, so no advice is given. Nor do they say what gradient alignment would do: it acts on two heads, where the
gradients of the backbone are others than on this one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.func import functional_call

from coloss.data.batch import Batch
from coloss.distillation.logit_losses import LogitFunction, LogitLoss, LossName, logit_loss
from coloss.distillation.teacher import TeacherLogits
from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.nn import Taps, find_classifier
from coloss.ops import gradient_cosine, logit_gap_loss
from coloss.train.feed import Feed
from coloss.train.teacher_cache import TeacherTable

OPPOSED = -0.5
"""Mean cosine on the features below which a second head is recommended."""


@dataclass(frozen=True)
class Agreement:
    """How two gradients relate at one place of a network, over a number of batches.

    Attributes:
        mean_cosine: from -1 (opposed) to 1 (the same direction); NaN if nothing is trained at that place.
        share_in_conflict: share of the batches with a negative cosine; likewise NaN.

    Examples:
        >>> Agreement.of([0.5, -0.25])
        Agreement(mean_cosine=0.125, share_in_conflict=0.5)
    """

    mean_cosine: float
    share_in_conflict: float

    @classmethod
    def of(cls, cosines: Sequence[float]) -> "Agreement":
        """Summarise the cosines of single batches."""
        if not cosines:
            return cls(math.nan, math.nan)
        return cls(sum(cosines) / len(cosines), sum(cosine < 0 for cosine in cosines) / len(cosines))


@dataclass(frozen=True)
class ConflictReport:
    """Where the gradients of an objective and of a distillation loss oppose each other in a student with one head.

    Attributes:
        classifier: on the weight of the main classifier.
        features: on the input of the classifier, for each sample what the one head tells the network below.
        backbone: over all trainable parameters below the classifier.
        rows: share of the classifier's rows on which the two gradients oppose each other, over rows and batches.
        batches: how many were looked at.
        logit_gap: whether the distillation loss was the logit gap, the only one for which a second head was tried.
        second_head: whether a second head is worth its parameters, for a student that learned the logit gap at a weight of about
            10 / classes: the gradients oppose each other on the features, on average by a cosine below -1/2. One head then tells the
            network below two things of which each undoes the other. False where nothing below the classifier is trained: what a
            second head learns would not ship. None, no advice, for other losses.
    """

    classifier: Agreement
    features: Agreement
    backbone: Agreement
    batches: int
    rows: float = math.nan
    logit_gap: bool = True

    @property
    def second_head(self) -> bool | None:
        if not self.logit_gap:
            return None
        return not math.isnan(self.backbone.mean_cosine) and self.features.mean_cosine < OPPOSED

    @property
    def recommendation(self) -> str:
        """One sentence that says what to use, and the numbers it follows from.

        Examples:
            >>> agree, oppose = Agreement(0.4, 0.0), Agreement(-0.7, 1.0)
            >>> ConflictReport(agree, oppose, oppose, batches=20).recommendation.split(":")[0]
            'For a logit gap weighed by about 10 / classes, use a second head'
        """
        advice = {
            None: "No advice for this loss",
            True: "For a logit gap weighed by about 10 / classes, use a second head",
            False: "For a logit gap weighed by about 10 / classes, one head will do",
        }[self.second_head]
        if math.isnan(self.backbone.share_in_conflict):
            below = "nothing is trained below it"
        else:
            below = (
                f"{self.features.mean_cosine:.2f} on its input, "
                f"conflict in {self.backbone.share_in_conflict:.0%} of batches in the backbone"
            )
        return f"{advice}: mean cosine {self.classifier.mean_cosine:.2f} on the classifier, {below}."

    def metrics(self) -> dict[str, float]:
        """Its numbers by name, for tables: NaN where nothing is trained.

        Examples:
            >>> same = Agreement(1.0, 0.0)
            >>> sorted(ConflictReport(same, same, same, batches=1).metrics())[:2]
            ['conflict_share_backbone', 'conflict_share_classifier_rows']
        """
        return {
            "cosine_classifier": self.classifier.mean_cosine,
            "cosine_features": self.features.mean_cosine,
            "cosine_backbone": self.backbone.mean_cosine,
            "conflict_share_backbone": self.backbone.share_in_conflict,
            "conflict_share_classifier_rows": self.rows,
        }


def conflict_report(
    student: nn.Module,
    teacher: nn.Module | Tensor | TeacherTable | TeacherLogits,
    data: Any,
    *,
    loss: LossName | LogitFunction | LogitLoss = "logit_gap",
    temperature: float | None = None,
    classifier: str | None = None,
    objective: Callable[[Any, Any], Tensor | Mapping[str, Tensor]] = F.cross_entropy,
    batches: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> ConflictReport:
    """Measure how an objective and a distillation loss pull at a student, on one head as it is.

    For some training batches: the cosine between the gradients of `objective(logits, targets)` and of the distillation loss on the
    classifier's weight, on its input, and on all parameters below it. The student runs as in training (batch statistics, dropout) but
    nothing of it changes. For advice, give it a student that was trained to the end with both losses on its one head, the logit gap weighed
    by about 10 / classes: one that knows only the objective, or was hardly distilled, looks the same whether a second head will help or
    not. For other losses the report has the numbers and no advice.
    `LogitDistillation(report_conflict=True)` adds the numbers to a comparison of the lab, `coloss run dhkd` prints them for any
    classification data; during a run, `ConflictMonitor` follows the cosines over the parameters that the terms share.

    Args:
        student: gives logits.
        teacher: gives logits of the same shape, runs in evaluation mode and is left as it was; or a table of logits, indexed by
            sample id.
        data: what `fit` takes: tensors, a data set, a loader.
        loss: the distillation loss, as for `LogitDistillation`.
        temperature: of the loss, > 0; None takes its usual one.
        classifier: module path of the main classifier, an `nn.Linear`; default: the last one.
        objective: the student's own loss; of several by name, their sum.
        batches: how many to look at, >= 1; at most one epoch of them.
        batch_size: for tensors and data sets.
        seed: of the order of the batches and of dropout.

    Returns:
        Agreement of the two gradients by place, and for the logit gap a recommendation.

    Raises:
        InputError: if `classifier` names no `nn.Linear`, `batches` < 1, the loss is unknown, the objective gives no scalar, or a gradient
            is not finite.

    Cost: for each batch one forward pass of both networks and two backward passes.

    Examples:
        >>> from coloss.nn import MLP, Classifier
        >>> student, teacher = Classifier(MLP(4, [8]), 3), MLP(4, [64], 3)
        >>> data = (torch.randn(128, 4), torch.randint(3, (128,)))
        >>> report = conflict_report(student, teacher, data, batches=2)
        >>> report.batches, -1 <= report.features.mean_cosine <= 1
        (2, True)
    """
    if batches < 1:
        raise InputError(f"batches must be >= 1, got {batches}")
    compared = loss if isinstance(loss, LogitLoss) else logit_loss(loss, temperature)
    path = find_classifier(student) if classifier is None else classifier
    cosines: dict[str, list[float]] = {"classifier": [], "features": [], "backbone": []}
    opposed: list[float] = []
    with Taps(student, {"features": f"{path}:input"}) as taps, _training_mode(student, seed):
        layer = linear_at(student, path)
        above = set(layer.parameters())
        backbone = [p for p in student.parameters() if p.requires_grad and p not in above]
        feed = Feed(data, batch_size, seed, Fabric(accelerator="cpu", devices=1)).batches(epoch=0)
        looked = 0
        for batch in islice(feed, batches):
            batch = batch.to(layer.weight.device)
            # Batch norm writes its running statistics to copies that are thrown away.
            buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
            logits = functional_call(student, buffers, (batch.inputs,))
            distillation = compared(logits, _teacher_logits(teacher, batch), batch.targets)
            places = {"classifier": [layer.weight], "features": [taps["features"]], "backbone": backbone}
            gradients = _gradients(_total(objective(logits, batch.targets)), distillation, places)
            for name, (own, other) in gradients.items():
                cosine = float(gradient_cosine(own, other))
                if not math.isfinite(cosine):
                    raise InputError(
                        f"losses must have finite gradients to be compared, got NaN or infinity on the {name} in batch {looked}"
                    )
                cosines[name].append(cosine)
            if "classifier" in gradients:
                opposed.append(_opposed_rows(*gradients["classifier"]))
            looked += 1
    return ConflictReport(
        **{name: Agreement.of(found) for name, found in cosines.items()},
        batches=looked,
        rows=sum(opposed) / len(opposed) if opposed else math.nan,
        logit_gap=compared.function is logit_gap_loss,
    )


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a module path that is known to exist.

    Raises:
        InputError: if it is another kind of module.

    Examples:
        >>> linear_at(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), "1").out_features
        3
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"classifier must be the path of an nn.Linear, got {path!r}, which is {type(layer).__name__}"
        )
    return layer


def _total(found: Any) -> Tensor:
    """What the objective gives, in one number."""
    values = list(found.values()) if isinstance(found, Mapping) else [found]
    if not values or not all(isinstance(value, Tensor) and value.numel() == 1 for value in values):
        kinds = sorted({str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values})
        raise InputError(
            f"objective must give a scalar tensor, or some by name, got {', '.join(kinds) or 'none'}"
        )
    return torch.stack([value.reshape(()) for value in values]).sum()


Gradients = list[Tensor | None]


def _gradients(
    first: Tensor, second: Tensor, places: Mapping[str, Sequence[Tensor]]
) -> dict[str, tuple[Gradients, Gradients]]:
    """Gradients of two losses at each place where anything is trained, by one backward pass for each loss."""
    trained = {name: [t for t in tensors if t.requires_grad] for name, tensors in places.items()}
    trained = {name: tensors for name, tensors in trained.items() if tensors}
    everything = [tensor for tensors in trained.values() for tensor in tensors]
    if not everything:
        return {}
    found = [
        iter(torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True))
        for loss in (first, second)
    ]
    return {
        name: ([next(found[0]) for _ in tensors], [next(found[1]) for _ in tensors])
        for name, tensors in trained.items()
    }


def _opposed_rows(own: Gradients, other: Gradients) -> float:
    """Share of the rows of one weight on which two gradients point against each other."""
    (first,), (second,) = own, other
    if first is None or second is None:
        return 0.0
    return float(((first.double() * second.double()).sum(1) < 0).double().mean())


def _teacher_logits(teacher: nn.Module | Tensor | TeacherTable | TeacherLogits, batch: Batch) -> Tensor:
    if isinstance(teacher, Tensor | TeacherTable):
        return TeacherLogits(table=teacher)(batch)
    if isinstance(teacher, TeacherLogits):
        return teacher(batch)
    with evaluation_mode(teacher):
        return teacher(batch.inputs)


@contextmanager
def _training_mode(model: nn.Module, seed: int) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            model.train()
            yield
        finally:
            for module, training in modes:
                module.training = training
