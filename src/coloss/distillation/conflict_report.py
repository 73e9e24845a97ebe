"""Before paying for a second head or a second backward pass: do cross-entropy and the teacher's logits disagree at all?"""

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
from coloss.distillation.teacher import TeacherLogits
from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.nn import Taps, find_classifier
from coloss.ops import gradient_cosine, logit_gap_loss
from coloss.train.feed import Feed


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
            return cls(float("nan"), float("nan"))
        return cls(sum(cosines) / len(cosines), sum(cosine < 0 for cosine in cosines) / len(cosines))


@dataclass(frozen=True)
class ConflictReport:
    """Where the gradients of an objective and of the logit-gap loss oppose each other in a student with one head.

    Attributes:
        classifier: on the weight of the main classifier, which the losses stop sharing with a second head.
        features: on the input of the classifier.
        backbone: over all trainable parameters below the classifier, which they share in any case.
        batches: how many were looked at.
        second_head: whether a second head is worth its parameters: the gradients oppose each other on the classifier, on average.
        alignment: whether a second backward pass is worth its time: they oppose each other in the backbone in a tenth of the batches
            or more.
    """

    classifier: Agreement
    features: Agreement
    backbone: Agreement
    batches: int

    @property
    def second_head(self) -> bool:
        return self.classifier.mean_cosine < 0

    @property
    def alignment(self) -> bool:
        return self.backbone.share_in_conflict >= 0.1

    @property
    def recommendation(self) -> str:
        """One sentence that says what to use, and the numbers it follows from.

        Examples:
            >>> agree, oppose = Agreement(0.4, 0.0), Agreement(-0.3, 0.9)
            >>> print(ConflictReport(oppose, agree, agree, batches=20).recommendation)
            Use a second head without gradient alignment: mean cosine -0.30 on the classifier, conflict in 0% of batches in the backbone.
        """
        advice = {
            (False, False): "One head and a plain sum will do",
            (False, True): "Keep one head and project conflicting gradients",
            (True, False): "Use a second head without gradient alignment",
            (True, True): "Use a second head with gradient alignment",
        }[self.second_head, self.alignment]
        if self.backbone.share_in_conflict != self.backbone.share_in_conflict:
            below = "nothing is trained in the backbone"
        else:
            below = f"conflict in {self.backbone.share_in_conflict:.0%} of batches in the backbone"
        return f"{advice}: mean cosine {self.classifier.mean_cosine:.2f} on the classifier, {below}."


def conflict_report(
    student: nn.Module,
    teacher: nn.Module | Tensor,
    data: Any,
    *,
    classifier: str | None = None,
    temperature: float = 2.0,
    objective: Callable[[Any, Any], Tensor] = F.cross_entropy,
    batches: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> ConflictReport:
    """Measure how an objective and the logit-gap loss pull at a student, on one head as it is.

    For some training batches: the cosine between the gradients of `objective(logits, targets)` and of
    `logit_gap_loss(logits, teacher logits)` on the classifier's weight, on its input, and on all parameters below it. The student runs
    as in training (batch statistics, dropout) but nothing of it changes. Worth repeating late in training: conflicts grow as the
    training loss vanishes. During a run, `ConflictMonitor` follows the cosines over the parameters that the terms share.

    Args:
        student: gives logits.
        teacher: gives logits of the same shape, runs in evaluation mode and is left as it was; or a table of logits, indexed by
            sample id.
        data: what `fit` takes: tensors, a data set, a loader.
        classifier: module path of the main classifier, an `nn.Linear`; default: the last one.
        temperature: of the logit-gap loss, > 0.
        objective: the student's own loss.
        batches: how many to look at, >= 1; at most one epoch of them.
        batch_size: for tensors and data sets.
        seed: of the order of the batches and of dropout.

    Returns:
        Agreement of the two gradients by place, and a recommendation.

    Raises:
        InputError: if `classifier` names no `nn.Linear`, or `batches` < 1.

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
    path = find_classifier(student) if classifier is None else classifier
    cosines: dict[str, list[float]] = {"classifier": [], "features": [], "backbone": []}
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
            gap = logit_gap_loss(logits, _teacher_logits(teacher, batch), temperature)
            places = {"classifier": [layer.weight], "features": [taps["features"]], "backbone": backbone}
            found = _cosines(objective(logits, batch.targets), gap, places)
            for name, cosine in found.items():
                cosines[name].append(cosine)
            looked += 1
    return ConflictReport(**{name: Agreement.of(found) for name, found in cosines.items()}, batches=looked)


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


def _cosines(first: Tensor, second: Tensor, places: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Cosine of two losses' gradients at each place that anything is trained at, by one backward pass for each loss."""
    trained = {name: [t for t in tensors if t.requires_grad] for name, tensors in places.items()}
    everything = [tensor for tensors in trained.values() for tensor in tensors]
    if not everything:
        return {}
    gradients = [
        iter(torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True))
        for loss in (first, second)
    ]
    cosines = {}
    for name, tensors in trained.items():
        own, other = ([next(gradient) for _ in tensors] for gradient in gradients)
        if tensors:
            cosines[name] = float(gradient_cosine(own, other))
    return cosines


def _teacher_logits(teacher: nn.Module | Tensor, batch: Batch) -> Tensor:
    if isinstance(teacher, Tensor):
        return TeacherLogits(table=teacher)(batch)
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
