"""Classes as the means of a few embeddings, and how near others are to them."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .loss_arguments import check_options, same_type
from .precision import without_autocast
from .segments import segment_mean

PrototypeMetric = Literal["sqeuclidean", "cosine"]


def prototypes(
    embeddings: Float[Tensor, "support dim"], labels: Int[Tensor, " support"], num_classes: int | None = None
) -> Float[Tensor, "classes dim"]:
    """The mean embedding of each class; gradients reach every embedding that it is made of.

    Args:
        embeddings: of the support set.
        labels: class of each, in [0, num_classes).
        num_classes: None takes the largest label plus one.

    Returns:
        One row for each class, at least float32; zeros for a class without a sample.

    Raises:
        ValueError: if a label is out of range.

    Source:
        Snell et al. 2017, arXiv 1703.05175, equation 1.

    Examples:
        >>> import torch
        >>> prototypes(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]))
        tensor([[2.],
                [7.]])
    """
    return segment_mean(embeddings, labels, num_classes)


def prototypical_logits(
    queries: Float[Tensor, "queries dim"],
    prototypes: Float[Tensor, "classes dim"],
    metric: PrototypeMetric = "sqeuclidean",
    temperature: float = 1.0,
) -> Float[Tensor, "queries classes"]:
    r"""Minus the distance of each query from each prototype, as logits of a softmax over classes.

    $-\|q - c\|^2 / \tau$, or the cosine over $\tau$.

    Args:
        queries: embeddings to classify.
        prototypes: one row for each class.
        metric: `"sqeuclidean"` or `"cosine"`.
        temperature: $\tau > 0$; for cosines about 0.1.

    Returns:
        Logits, at least float32, of pairs without a queries x classes x dim tensor.

    Raises:
        ValueError: if widths differ, or for an unknown metric or a temperature not above 0.

    Examples:
        >>> import torch
        >>> prototypical_logits(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0], [2.0, 1.0]]))
        tensor([[-1., -4.]])
    """
    check_options(temperature, "sum", None, 0)
    if metric not in ("sqeuclidean", "cosine"):
        raise ValueError(f'metric must be "sqeuclidean" or "cosine", got {metric!r}')
    if queries.shape[1] != prototypes.shape[1]:
        raise ValueError(f"prototypes must have width {queries.shape[1]}, got {prototypes.shape[1]}")
    x, y = same_type(queries, prototypes)
    if metric == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    else:
        # Distances do not change with the origin, rounding does.
        centre = y.detach().mean(0) if len(y) else y.new_zeros(y.shape[1])
        x, y = x - centre, y - centre
    with without_autocast(x.device):
        products = x @ y.T
    if metric == "cosine":
        return products / temperature
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return -(squares - 2 * products).clamp(min=0) / temperature
