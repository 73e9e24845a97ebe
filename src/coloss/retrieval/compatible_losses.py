"""Losses of embeddings that must serve an older encoder's index as well as their own, and the class means they use."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import RunningMoments, full_precision, without_autocast
from coloss.retrieval.compatible_head import CompatibleOutput


def backward_compatible_terms(
    output: CompatibleOutput,
    target_new: Float[Tensor, "batch dim_new"] | None,
    target_old: Float[Tensor, "batch dim_old"] | None,
    labels: Int[Tensor, " batch"] | None = None,
    prototypes: Float[Tensor, "classes dim_old"] | None = None,
    *,
    prototype_scale: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """The parts of `backward_compatible_loss`, by name and unweighted; a part whose target is None is left out.

        match_new         mean of 1 - cos(feature, target_new)
        match_old         mean of 1 - cos(compatible, target_old)
        match_prototypes  cross-entropy of  prototype_scale * <compatible / |compatible|, prototype of each class>
        classification    cross-entropy of the head's own logits

    Args:
        output: of the head.
        target_new: embeddings by the unconstrained new encoder; no gradient reaches any target.
        target_old: embeddings by the old encoder.
        labels: classes of the samples, for the last two.
        prototypes: see `class_prototypes`.
        prototype_scale: > 0.

    Returns:
        Scalars, at least float32; 0 for no samples.

    Raises:
        InputError: if prototypes come without labels, or a target has another width.

    Examples:
        >>> from coloss.retrieval import BackwardCompatibleHead
        >>> output = BackwardCompatibleHead(6, 4, 2)(torch.randn(5, 10))
        >>> terms = backward_compatible_terms(output, output.feature, output.compatible)
        >>> {name: round(abs(term.item()), 5) for name, term in terms.items()}
        {'match_new': 0.0, 'match_old': 0.0}
    """
    if prototypes is not None and labels is None:
        raise InputError("prototypes must come with labels, got labels=None")
    for name, target, ours in (
        ("target_new", target_new, output.feature),
        ("target_old", target_old, output.compatible),
        ("prototypes", prototypes, output.compatible),
    ):
        if target is not None and target.shape[1] != ours.shape[1]:
            raise InputError(f"{name} must have {ours.shape[1]} columns, got {target.shape[1]}")
    terms = {}
    rows = max(len(output.embedding), 1)
    if labels is not None and output.logits is not None:
        terms["classification"] = (
            F.cross_entropy(full_precision(output.logits), labels, reduction="sum") / rows
        )
    if target_new is not None:
        terms["match_new"] = _distance(output.feature, target_new) / rows
    if target_old is not None:
        terms["match_old"] = _distance(output.compatible, target_old) / rows
    if prototypes is not None and labels is not None:
        unit = F.normalize(output.compatible, dim=1)
        with without_autocast(unit.device):
            logits = prototype_scale * unit @ full_precision(prototypes.detach()).to(unit.dtype).T
        terms["match_prototypes"] = F.cross_entropy(logits, labels, reduction="sum") / rows
    return terms


def backward_compatible_loss(
    output: CompatibleOutput,
    target_new: Float[Tensor, "batch dim_new"] | None,
    target_old: Float[Tensor, "batch dim_old"] | None,
    labels: Int[Tensor, " batch"] | None = None,
    prototypes: Float[Tensor, "classes dim_old"] | None = None,
    weights: tuple[float, float, float] = (1.0, 10.0, 5.0),
    *,
    prototype_scale: float = 1.0,
) -> Float[Tensor, ""]:
    """Cost of an embedding that serves an old index badly, or keeps less than all of the new encoder.

        classification + w_1 match_new + w_2 match_prototypes + w_3 match_old

    Args:
        output, target_new, target_old, labels, prototypes, prototype_scale: as for `backward_compatible_terms`.
        weights: w_1, w_2, w_3 >= 0, in the paper's order.

    Returns:
        A scalar, at least float32.

    Raises:
        InputError: for a negative weight, if nothing is left to compare, and as `backward_compatible_terms`.

    Source:
        Zhou et al. 2022, arXiv 2211.03989.

    Examples:
        >>> from coloss.retrieval import BackwardCompatibleHead
        >>> output = BackwardCompatibleHead(6, 4, 2)(torch.randn(5, 10))
        >>> backward_compatible_loss(output, output.feature, -output.compatible).item()  # 5 * (1 - (-1))
        10.0
    """
    if min(weights) < 0:
        raise InputError(f"weights must be >= 0, got {weights}")
    terms = backward_compatible_terms(
        output, target_new, target_old, labels, prototypes, prototype_scale=prototype_scale
    )
    if not terms:
        raise InputError("at least one of target_new, target_old and labels must be given, got none")
    factors = dict(zip(("match_new", "match_prototypes", "match_old"), weights, strict=True))
    return torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()


def class_prototypes(
    embeddings: Tensor | Iterable[Tensor], labels: Tensor | Iterable[Tensor], num_classes: int
) -> Float[Tensor, "classes dim"]:
    """Mean embedding of each class, gathered batch by batch.

    Classes that the old encoder was never trained on have a mean, too: noisy, but usable.

    Args:
        embeddings: (samples, dim), or batches of such.
        labels: (samples), or batches of such in the same order.
        num_classes: number of classes; each must occur.

    Returns:
        One row for each class, at least float32, not normalised.

    Raises:
        InputError: if there is no sample at all, or none of some classes, which are named.

    Cost:
        Memory of a batch and of the result.

    Examples:
        >>> vectors, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1, 1])
        >>> class_prototypes(vectors, labels, 2)
        tensor([[1., 0.],
                [0., 2.]])
        >>> bool(
        ...     (class_prototypes(vectors.split(1), labels.split(1), 2)[1] == torch.tensor([0.0, 2.0])).all()
        ... )
        True
    """
    whole = isinstance(embeddings, Tensor) and isinstance(labels, Tensor)
    pairs: Any = [(embeddings, labels)] if whole else zip(embeddings, labels, strict=True)
    total, dtype = None, torch.float32
    for vectors, classes in pairs:
        vectors = full_precision(vectors.detach())
        part, dtype = RunningMoments.of(vectors, classes, num_classes), vectors.dtype
        total = part if total is None else total.merge(part)
    if total is None:
        raise InputError("embeddings must hold at least one batch, got none")
    empty = (total.count == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"every class must have a sample to take its mean, got none of {', '.join(map(str, empty))}"
        )
    return total.mean.to(dtype)


def _distance(ours: Tensor, target: Tensor) -> Tensor:
    """Sum over samples of 1 - cosine."""
    unit = F.normalize(full_precision(target.detach()), dim=1).to(ours.dtype)
    return (1 - (F.normalize(ours, dim=1) * unit).sum(1)).sum()
