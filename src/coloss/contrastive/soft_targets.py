r"""Targets for image-text contrast that leave a share to other pairs, by how similar they are, and more of it as training goes on.

    y_ii = 1 - a,   y_ij = a w_ij for j != i,   w_i. = softmax of similarities over the others, or uniform

Nothing is differentiated through them. With a < 1/2 a pair's own target stays the largest even where all of w falls on a duplicate.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops import full_precision, gather_with_gradient, is_distributed, rank, without_autocast
from coloss.ops.distributed import row_counts
from coloss.ops.score_tiles import Mask
from coloss.ops.streaming import streaming_logsumexp
from coloss.train import cosine, linear

Shape = Literal["linear", "cosine", "constant"]


def progressive_softening(highest: float = 0.2, shape: Shape = "linear") -> Callable[[float], float]:
    r"""The share of the targets that goes to other pairs, as a function of progress.

    `"linear"`: $\alpha u$; `"cosine"`: $\alpha (1 - \cos \pi u) / 2$ at progress $u$; `"constant"`: $\alpha$ throughout. Early
    similarities are the model's own guesses: a share that grows does not confirm them.

    Args:
        highest: $\alpha$ in [0, 0.5).
        shape: see above.

    Raises:
        ValueError: for another share or shape.

    Examples:
        >>> [progressive_softening(0.2, "cosine")(progress) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.1, 0.2]
    """
    check_softening(highest)
    if shape not in ("linear", "cosine", "constant"):
        raise ValueError(f'shape must be "linear", "cosine" or "constant", got {shape!r}')
    if shape == "constant":
        return lambda progress: highest
    return linear(0.0, highest) if shape == "linear" else cosine(0.0, highest)


def soft_targets(
    similarities: Float[Tensor, "pairs pairs"],
    alpha: float,
    weights: Literal["similarity", "uniform"] = "similarity",
    temperature: float = 1.0,
) -> Float[Tensor, "pairs pairs"]:
    r"""Contrastive targets of which a share goes to other pairs.

    $y_{ii} = 1 - \alpha$ and $y_{ij} = \alpha e^{s_{ij} / \tau} / \sum_{k \ne i} e^{s_{ik} / \tau}$. For the way back give the transpose
    of the similarities.

    Args:
        similarities: $s$; pair i of the rows belongs to pair i of the columns.
        alpha: $\alpha$ in [0, 0.5).
        weights: `"similarity"` as above, or `"uniform"`: label smoothing by $\alpha B / (B - 1)$ in the sense of torch.
        temperature: $\tau > 0$, best a fixed one: with a learnt scale the sharpness of targets would change over time.

    Returns:
        Rows that sum to 1, at least float32, without gradient. A single pair has the target 1.

    Raises:
        ValueError: if the similarities are not square, or a value is out of range.

    Cost:
        One more (B, B) matrix; `softened_targets` makes none.

    Source:
        The idea: Nie et al. 2023 (LightCLIP), arXiv 2312.00674. The formula is reconstructed, see `coloss.contrastive.lightweight_clip`.

    Examples:
        >>> soft_targets(torch.tensor([[1.0, 2.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 0.2)[0]
        tensor([0.8000, 0.1000, 0.1000])
    """
    check_softening(alpha)
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1]:
        raise ValueError(f"similarities must be square, got shape {tuple(similarities.shape)}")
    if weights not in ("similarity", "uniform"):
        raise ValueError(f'weights must be "similarity" or "uniform", got {weights!r}')
    _check_temperature(temperature)
    scores = full_precision(similarities.detach()) / temperature
    if weights == "uniform":
        scores = torch.zeros_like(scores)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    logs = scores.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
    return _softened(scores, logs, own, alpha)


def softened_targets(
    queries: Float[Tensor, "pairs dim"],
    keys: Float[Tensor, "pairs dim"],
    alpha: float,
    temperature: float = 0.1,
    *,
    chunk_size: int | None = None,
    across_processes: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`soft_targets` of the inner products of embeddings, as a function that losses ask for a tile at a time.

    Args:
        queries: rows; unit vectors for cosine similarity. For weights by the similarity of texts among themselves give these twice.
        keys: columns; row i belongs to query i.
        alpha, temperature: as for `soft_targets`.
        chunk_size, across_processes: as for the loss that takes them, `soft_target_clip_loss`.

    Returns:
        A function of row and column numbers; columns are those of all processes, in the order of ranks.

    Raises:
        ValueError: if shapes differ or a value is out of range.

    Cost:
        $O(B^2 D)$ time; memory of the embeddings of all processes.

    Examples:
        >>> pairs = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
        >>> targets = softened_targets(pairs, pairs, 0.2, temperature=1.0)
        >>> tile = targets(torch.arange(2)[:, None], torch.arange(4)[None])
        >>> bool(torch.allclose(tile, soft_targets(pairs @ pairs.T, 0.2)[:2]))
        True
    """
    check_softening(alpha)
    if queries.shape != keys.shape:
        raise ValueError(f"keys must have shape {tuple(queries.shape)}, got {tuple(keys.shape)}")
    _check_temperature(temperature)
    ring = across_processes and is_distributed()
    with torch.no_grad():
        x, y = full_precision(queries.detach()) / temperature, full_precision(keys.detach())
        start = sum(row_counts(y)[: rank()]) if ring else 0
        everyone = gather_with_gradient(y) if ring else y
        logs, _ = streaming_logsumexp(x, everyone, Mask(diagonal=start), side=chunk_size)

    def targets(rows: Tensor, columns: Tensor) -> Tensor:
        row, column = rows.flatten(), columns.flatten()
        with torch.no_grad(), without_autocast(x.device):
            own = rows + start == columns
            return _softened(x[row] @ everyone[column].T, logs[row].unsqueeze(1), own, alpha)

    return targets


def check_softening(alpha: float) -> None:
    """Refuse a share by which another pair could be a larger target than a pair's own.

    Raises:
        ValueError: naming the value.
    """
    if not 0 <= alpha < 0.5:
        raise ValueError(
            f"the softened share must be in [0, 0.5), so that a pair's own target stays largest, got {alpha}"
        )


def _softened(scores: Tensor, logs: Tensor, own: Tensor, alpha: float) -> Tensor:
    """Targets of a tile, by its scores and the log-sum-exp of each row's others; a row without others keeps all to itself."""
    others = alpha * (scores - logs.masked_fill(logs == -math.inf, 0.0)).exp()
    kept = torch.where(logs == -math.inf, 1.0, 1 - alpha).to(scores.dtype)
    return torch.where(own, kept, others)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
