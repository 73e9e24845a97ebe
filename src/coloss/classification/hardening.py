"""What a student says by itself, as a target: its predictions hardened to one class each, with given shares of the classes."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import distributed
from coloss.ops.distributed import gather_with_gradient
from coloss.ops.precision import full_precision

Student = Literal["balanced", "argmax", "soft"]
_IMPOSSIBLE = -1e4


@torch.no_grad()
def hardened_predictions(
    logits: Float[Tensor, "batch classes"],
    weak_labels: Float[Tensor, "batch classes"] | Int[Tensor, " batch"],
    *,
    student: Student = "balanced",
    threshold: float | None = None,
) -> Float[Tensor, "batch classes"]:
    """What the student itself says, as a target: see `confidence_loss`.

    Args:
        logits: of the student.
        weak_labels: give the class shares, and break ties.
        student: "balanced", "argmax" or "soft".
        threshold: for two classes, in place of the balance.

    Returns:
        One row of class probabilities for each sample, one-hot unless "soft"; without a graph.

    Raises:
        ValueError: on an unknown `student`, or a threshold for more than two classes or outside [0, 1].

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> half = torch.full((4, 2), 0.5)
        >>> (
        ...     hardened_predictions(logits, half)[:, 1],
        ...     hardened_predictions(logits, half, student="argmax")[:, 1],
        ... )
        (tensor([0., 0., 1., 1.]), tensor([0., 0., 0., 1.]))
    """
    if student not in ("balanced", "argmax", "soft"):
        raise InputError(f'student must be "balanced", "argmax" or "soft", got {student!r}')
    classes = logits.shape[1]
    log_probabilities = torch.log_softmax(full_precision(logits), dim=1)
    if threshold is not None:
        if classes != 2:
            raise InputError(f"threshold is for 2 classes, got {classes}")
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must be in [0, 1], got {threshold}")
        chosen = (log_probabilities[:, 0].exp() < threshold).long()
    elif student == "soft":
        return log_probabilities.exp()
    elif student == "argmax":
        chosen = log_probabilities.argmax(1)
    else:
        weak = label_probabilities(logits, weak_labels)
        everyone, labels = gather_with_gradient(log_probabilities), gather_with_gradient(weak)
        chosen = balanced_assignment(everyone, labels.mean(0), labels)
        if distributed.is_distributed():
            owner = torch.full((len(logits),), distributed.rank(), device=logits.device)
            chosen = chosen[gather_with_gradient(owner) == distributed.rank()]
    return torch.nn.functional.one_hot(chosen, classes).to(log_probabilities.dtype)


@torch.no_grad()
def balanced_assignment(
    scores: Float[Tensor, "samples classes"],
    shares: Float[Tensor, " classes"],
    ties: Float[Tensor, "samples classes"] | None = None,
) -> Int[Tensor, " samples"]:
    """One class for each sample so that every class gets its share, at the highest total score.

    Args:
        scores: such as log-probabilities; a constant added to a row or a column changes nothing.
        shares: non-negative, sum 1; class c gets shares[c] * samples, rounded by largest remainders.
        ties: decides between assignments of equal score, higher is better.

    Returns:
        Class numbers.

    Cost:
        A sort for two classes; otherwise an assignment problem on the CPU, about O(samples^3).

    Examples:
        >>> scores = torch.tensor([[5.0, 0.0, 0.0], [4.0, 0.0, 1.0], [3.0, 2.0, 0.0]])
        >>> balanced_assignment(scores, torch.full((3,), 1 / 3))
        tensor([0, 2, 1])
    """
    samples, classes = scores.shape
    if not samples:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    # A diverged network must not stop here: its loss is NaN, which says more.
    scores = scores.nan_to_num(0.0, -_IMPOSSIBLE, _IMPOSSIBLE).clamp(min=_IMPOSSIBLE)
    quota = shares.double().nan_to_num(1 / classes).clamp(min=0)
    quota = quota / quota.sum() * samples
    counts = quota.floor().long()
    rest = samples - int(counts.sum())
    counts[(quota - counts).argsort(descending=True, stable=True)[:rest]] += 1
    if classes == 2:
        order = torch.arange(samples, device=scores.device)
        if ties is not None:
            order = (ties[:, 1] - ties[:, 0]).argsort(descending=True, stable=True)
        margin = scores[:, 1] - scores[:, 0]
        order = order[margin[order].argsort(descending=True, stable=True)]
        chosen = torch.zeros(samples, dtype=torch.int64, device=scores.device)
        chosen[order[: int(counts[1])]] = 1
        return chosen
    from scipy.optimize import linear_sum_assignment

    value = scores.double()
    if ties is not None:
        value = value + 1e-9 * ties.double().nan_to_num(0.0)
    places = torch.arange(classes, device=scores.device).repeat_interleave(counts)
    rows, columns = linear_sum_assignment(value[:, places].cpu().numpy(), maximize=True)
    chosen = torch.empty(samples, dtype=torch.int64)
    chosen[torch.from_numpy(rows)] = places.cpu()[torch.from_numpy(columns)]
    return chosen.to(scores.device)


def label_probabilities(logits: Tensor, weak_labels: Tensor) -> Tensor:
    """Weak labels as rows of probabilities, in the precision of the loss."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"logits must be (batch, classes), got {tuple(logits.shape)}")
    dtype = full_precision(logits).dtype
    if weak_labels.is_floating_point():
        if weak_labels.shape != logits.shape:
            raise InputError(
                f"weak_labels must have the shape {tuple(logits.shape)} of logits, got {tuple(weak_labels.shape)}"
            )
        return weak_labels.detach().to(dtype)
    if weak_labels.shape != logits.shape[:1]:
        raise InputError(
            f"weak_labels must hold {len(logits)} class numbers, got shape {tuple(weak_labels.shape)}"
        )
    if len(weak_labels) and not 0 <= int(weak_labels.min()) <= int(weak_labels.max()) < logits.shape[1]:
        raise InputError(
            f"weak_labels must be class numbers in [0, {logits.shape[1]}), got {weak_labels.tolist()[:8]}"
        )
    return torch.nn.functional.one_hot(weak_labels.long(), logits.shape[1]).to(dtype)
